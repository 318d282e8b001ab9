"""An evaluation as one HTML file that needs nothing else: tables, scatter, crops, and sliders between the images."""

from __future__ import annotations

import base64
import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.evaluation import page_chart
from pipeline.evaluation.page_images import ORIGINAL, Gallery, Shown, first_model, layers
from pipeline.evaluation.scoring import BASELINES
from pipeline.evaluation.significance import LOWER_IS_BETTER, Interval
from pipeline.evaluation.tables import TITLES, Measured, number
from pipeline.files import write_atomically

_HERE = Path(__file__).parent
SHOWN = ("recipe", "step", "weights", "dtype", "license")
"""Of what a model file says of itself; the JSON file has it all."""


def write_page(path: Path, sets: Sequence[Measured], gallery: Gallery, report: dict[str, Any]) -> None:
    """Write the page of what was measured; `report` is what goes into evaluation.json."""
    write_atomically(path, render(sets, gallery, report))


def render(sets: Sequence[Measured], gallery: Gallery, report: dict[str, Any]) -> bytes:
    """The page, in UTF-8."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_HERE), autoescape=True, finalize=_printable,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["place"] = lambda value: f"{value:.5g}"
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    names = {"width": page_chart.WIDTH, "height": page_chart.HEIGHT, "left": page_chart.LEFT,
             "right": page_chart.RIGHT, "top": page_chart.TOP, "bottom": page_chart.BOTTOM}
    context = {**names, **_head(sets, report), "script": Markup(script), "script_hash": _sha256(script),
               "metrics": [TITLES[metric] for metric in _metrics(sets)],
               "sets": [_set(measured, gallery) for measured in sets]}
    return environment.get_template("page.html.j2").render(context).encode("utf-8")


def _printable(value: object) -> object:
    """What others named, made printable; it is then escaped."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.startswith("data:image/webp;base64,"):
        return value
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in value)


def _sha256(script: str) -> str:
    """The hash by which the page's policy knows its one script."""
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def _metrics(sets: Sequence[Measured]) -> list[str]:
    return [metric for metric in ("psnr_y", "ssim_y", "lpips") if metric in sets[0].metrics]


def _head(sets: Sequence[Measured], report: dict[str, Any]) -> dict[str, Any]:
    models = [{"title": model["title"], "file": model["file"], "sha256": model["sha256"], "network": model["name"],
               "metadata": ", ".join(f"{key} {model['metadata'][key]}" for key in SHOWN if key in model["metadata"])}
              for model in report["models"]]
    names = ", ".join(measured.name for measured in sets)
    return {"title": f"{', '.join(model['title'] for model in models)} on {names}", "scale": report["scale"],
            "models": models, "self_ensemble": report["self_ensemble"], "device": report["data"]["device"],
            "versions": report["versions"], "bootstrap": report["bootstrap"],
            "notes": [f"{measured.name}: {measured.data.note}" for measured in sets if measured.data.note],
            "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}


def _set(measured: Measured, gallery: Gallery) -> dict[str, Any]:
    """Everything of one image set."""
    best, worst = gallery.best(measured.name), gallery.worst(measured.name)
    data = measured.data
    crops = [{"title": "Best", "what": "largest gain over bicubic; where bicubic errs more than the model",
              "shown": [_crop(shown) for shown in best]},
             {"title": "Worst", "what": "smallest gain over bicubic; where the model errs most",
              "shown": [_crop(shown) for shown in worst]}]
    return {
        "name": measured.name, "num_images": len(measured.images), "hr": str(data.hr),
        "lr": ("made by bicubic downscaling" if data.lr_made_by else
               "beside them" if data.lr is None else f"from {data.lr}"),
        "rows": _rows(measured), "columns": [TITLES[metric] for metric in measured.metrics],
        "differences": _differences(measured),
        "chart": page_chart.scatter(measured), "first": first_model(measured.images[0]),
        "crops": [group for group in crops if group["shown"]],
        "sliders": [_slider(shown) for shown in (*best, *worst)],
        "images": [{"name": image.name, "cells": [" / ".join(number(scores[metric], metric) for metric in _metrics([
            measured])) for scores in image.methods.values()]} for image in measured.images],
        "methods": measured.methods,
    }


def _rows(measured: Measured) -> list[dict[str, Any]]:
    """The table of means: a row for every method, with the intervals, and which model is best in what."""
    best = {metric: _best(measured.intervals, metric) for metric in measured.metrics}
    return [{"method": method, "is_baseline": method in BASELINES,
             "cells": [{"mean": number(found.mean, metric), "range": _range(found, metric),
                        "is_best": found.mean == best[metric]} for metric, found in of_method.items()]}
            for method, of_method in measured.intervals.items()]


def _differences(measured: Measured) -> list[dict[str, Any]]:
    """A row for every two methods, with a cell for every metric."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in measured.differences:
        rows.setdefault(f"{entry.method} over {entry.against}", []).append({
            "mean": number(entry.interval.mean, entry.metric, "+"), "is_open": not entry.is_significant,
            "range": _range(entry.interval, entry.metric, "+"), "verdict": entry.verdict})
    return [{"text": text, "cells": cells} for text, cells in rows.items()]


def _best(intervals: dict[str, dict[str, Interval]], metric: str) -> float:
    return (min if metric in LOWER_IS_BETTER else max)(of_method[metric].mean for of_method in intervals.values())


def _range(found: Interval, metric: str, sign: str = "") -> str:
    return "" if math.isnan(found.low) else f"{number(found.low, metric, sign)} to {number(found.high, metric, sign)}"


def _crop(shown: Shown) -> dict[str, Any]:
    captions = _captions(shown)
    return {"name": shown.scores.name, "gain": f"{shown.gain:+.3f} dB", "place": f"{shown.place[0]}, {shown.place[1]}",
            "layers": [{**layer, "caption": captions[layer["method"]]} for layer in layers(shown.crop)]}


def _slider(shown: Shown) -> dict[str, Any]:
    """The layers of a slider; it starts with bicubic to the left and the first model to the right."""
    height, width = shown.stage[ORIGINAL].shape[-2:]
    captions, model = _captions(shown), first_model(shown.scores)
    methods = list(shown.stage)
    return {"name": shown.scores.name, "width": width, "height": height, "left": methods.index("bicubic"),
            "right": methods.index(model),
            "layers": [{**layer, "caption": captions[layer["method"]]} for layer in layers(shown.stage)]}


def _captions(shown: Shown) -> dict[str, str]:
    return {method: f"{scores['psnr_y']:.2f} dB / {scores['ssim_y']:.4f}"
            for method, scores in shown.scores.methods.items()} | {ORIGINAL: "original"}
