"""An evaluation as one self-contained HTML file: tables, a scatter plot, crops and sliders.

A `Gallery` is shown every image while it is in memory and keeps those with the largest and smallest
gain. `scatter` plots the gains for an SVG, and `write_page` fills the template `page.html.j2`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from pipeline.distributed.ranks import Ranks
from pipeline.evaluation.pictures import largest_square
from pipeline.evaluation.scoring import BASELINES, ImageScores, Views
from pipeline.evaluation.tables import Interval, SetScores, cropped, main_metrics, number
from pipeline.files import write_atomically
from pipeline.metrics import METRICS

# The scatter plot: each model's gain over its input on every image, in SVG coordinates.

WIDTH, HEIGHT = 800, 360
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 40, 64
NUM_MARKS = 6
"""Marks (colour and shape) in the page's style; further models reuse them."""


def scatter(measured: SetScores) -> dict[str, Any]:
    """Plot the gain in PSNR-Y over bicubic (y) against bicubic's PSNR-Y (x), for every image.

    At x1 the input takes the place of bicubic. Images with an infinite PSNR are omitted and
    counted.
    """
    models = [method for method in measured.methods if method not in BASELINES]
    points, reference = [], measured.reference
    for image in measured.images:
        before = image.methods[reference]["psnr_y"]
        for index, model in enumerate(models):
            gain = image.methods[model]["psnr_y"] - before
            if math.isfinite(before) and math.isfinite(gain):
                points.append(
                    (
                        before,
                        gain,
                        index % NUM_MARKS,
                        f"{image.name}: {model} {before + gain:.3f} dB, "
                        f"{reference} {before:.3f} dB, {gain:+.3f} dB",
                    )
                )
    across, upwards = (
        _Axis([point[0] for point in points]),
        _Axis([0.0, *(point[1] for point in points)]),
    )
    return {
        "points": [
            {"x": _across(across.share(x)), "y": _up(upwards.share(y)), "mark": mark, "text": text}
            for x, y, mark, text in points
        ],
        "x_ticks": [
            {"at": _across(across.share(tick)), "text": across.text(tick)} for tick in across.ticks
        ],
        "y_ticks": [
            {
                "at": _up(upwards.share(tick)),
                "text": upwards.text(tick, "+"),
                "is_zero": abs(tick) < 1e-9,
            }
            for tick in upwards.ticks
        ],
        "legend": [
            {"mark": index % NUM_MARKS, "text": model} for index, model in enumerate(models)
        ],
        "num_missing": len(measured.images) * len(models) - len(points),
    }


class _Axis:
    """An axis with round ticks that covers all values."""

    def __init__(self, values: list[float]) -> None:
        low, high = min(values, default=0.0), max(values, default=1.0)
        if high - low < 1e-6:
            low, high = low - 0.5, high + 0.5
        step = 10 ** math.floor(math.log10((high - low) / 4))
        self.step = next(
            step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6
        )
        first, last = math.floor(low / self.step), math.ceil(high / self.step)
        self.ticks = [index * self.step for index in range(first, last + 1)]

    def share(self, value: float) -> float:
        """Return a value's position along the axis, 0 to 1."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])

    def text(self, tick: float, sign: str = "") -> str:
        """Format a tick with as many decimals as the step has."""
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        return f"{0.0 if abs(tick) < 1e-9 else tick:{sign if abs(tick) > 1e-9 else ''}.{digits}f}"


def _across(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _up(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


# The gallery: the images that the page shows, cropped while they are in memory.

STAGE = 384
"""Largest side of a slider's image, in pixels."""
CROP = 64
"""Side of a magnified crop, in pixels."""
KINDS = ("best", "worst")
ORIGINAL = "HR"


class GalleryPlace(NamedTuple):
    """An image's rank among the best or the worst of its set, as a sort key."""

    name: str
    """The set's name."""
    kind: str
    """One of `KINDS`."""
    order: float
    """The smallest comes first."""
    index: int
    """The image's index in the set."""


@dataclass(frozen=True)
class Shown:
    """An image on the page: a large part of it for the slider, and a small one to magnify."""

    scores: ImageScores
    gain: float
    """PSNR-Y of the first model minus that of bicubic (at x1, of the input), in dB."""
    stage: dict[str, Tensor]
    """The slider's images by method, HR last: uint8 1 x 3 x H x W."""
    crop: dict[str, Tensor]
    """The crops to magnify, likewise."""
    place: tuple[int, int]
    """Top and left of the crop in the image."""


class Gallery:
    """Keeps the images of every set on which the first model gains most and least over its input.

    If gains are equal, the earlier image of the set is kept, whatever the order of the visits.
    """

    def __init__(self, num_sets: int) -> None:
        self._num_shown = 3 if num_sets == 1 else 2 if num_sets <= 3 else 1
        self._kept: dict[GalleryPlace, Shown] = {}

    def visit(self, name: str, index: int, views: Views) -> None:
        """Keep crops of image `index` of the set `name` if it is so far among the best or worst."""
        model = first_model(views.scores)
        gain = _gain(views.scores, model)
        for kind in KINDS:
            place = GalleryPlace(name, kind, -gain if kind == "best" else gain, index)
            if place in _first_of_each([*self._kept, place], self._num_shown):
                self._kept[place] = _cut(views, gain, _errors(views, model, kind))
        self.keep(_first_of_each(self._kept, self._num_shown))

    def keep(self, places: Iterable[GalleryPlace]) -> None:
        """Discard all images except those in `places`."""
        self._kept = {place: self._kept[place] for place in places if place in self._kept}

    def best(self, name: str) -> list[Shown]:
        """Return the images with the largest gain, in descending order.

        Their crop is where the input's error exceeds the model's most.
        """
        return [self._kept[place] for place in self._of(name, "best")]

    def worst(self, name: str) -> list[Shown]:
        """Return the images with the smallest gain, in ascending order, without those in `best`.

        Their crop is where the model's error is largest.
        """
        best = {place.index for place in self._of(name, "best")}
        return [self._kept[place] for place in self._of(name, "worst") if place.index not in best]

    def merge(self, ranks: Ranks) -> None:
        """Collect on the first rank what a single process would have kept."""
        everywhere = [place for places in ranks.gather(list(self._kept)) for place in places]
        # Discard before the pictures travel: only a few of them are still needed.
        self.keep(_first_of_each(everywhere, self._num_shown))
        self._kept = {
            place: shown for kept in ranks.gather(self._kept) for place, shown in kept.items()
        }

    def _of(self, name: str, kind: str) -> list[GalleryPlace]:
        return sorted(place for place in self._kept if (place.name, place.kind) == (name, kind))


def _first_of_each(places: Iterable[GalleryPlace], count: int) -> list[GalleryPlace]:
    """Return the first `count` places of every set and kind."""
    ordered = sorted(places)
    return [
        place
        for _, group in groupby(ordered, key=lambda place: (place.name, place.kind))
        for place in islice(group, count)
    ]


def _errors(views: Views, model: str, kind: str) -> Tensor:
    """Return a 1 x 1 x H x W map whose maximum is the place to crop.

    For "best" it is the input's squared error, upscaled bicubically, minus the model's, for "worst"
    the model's.
    """
    reference = views.scores.reference
    errors = {
        method: (views.pixels[method].float() - views.hr.float()).square().mean(dim=1, keepdim=True)
        for method in (model, reference)
    }
    return errors[reference] - errors[model] if kind == "best" else errors[model]


def first_model(scores: ImageScores) -> str:
    """Return the title of the first model among the methods."""
    return next(method for method in scores.methods if method not in BASELINES)


def data_uri(pixels: Tensor) -> str:
    """Encode uint8 1 x 3 x H x W as a lossless WebP in a data URI."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())).save(
        file, "webp", lossless=True
    )
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def layers(pixels: dict[str, Tensor], methods: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Encode the pictures of the methods (all by default) for the template."""
    chosen: Iterable[str] = pixels if methods is None else methods
    return [{"method": method, "uri": data_uri(pixels[method])} for method in chosen]


def _gain(scores: ImageScores, model: str) -> float:
    first, second = scores.methods[model]["psnr_y"], scores.methods[scores.reference]["psnr_y"]
    return 0.0 if first == second else first - second


def _cut(views: Views, gain: float, where: Tensor) -> Shown:
    """Cut out the `CROP` square where the map is largest, and the slider's part around it."""
    height, width = views.hr.shape[-2:]
    side = min(CROP, height, width)
    top, left = largest_square(where, side)
    first_row = min(max(0, top + side // 2 - STAGE // 2), max(0, height - STAGE))
    first_column = min(max(0, left + side // 2 - STAGE // 2), max(0, width - STAGE))
    pixels = {method: image for method, image in views.pixels.items() if method != "nearest"} | {
        ORIGINAL: views.hr
    }
    stage = {
        method: image[
            ..., first_row : first_row + STAGE, first_column : first_column + STAGE
        ].clone()
        for method, image in pixels.items()
    }
    crop = {
        method: image[..., top : top + side, left : left + side].clone()
        for method, image in pixels.items()
    }
    return Shown(views.scores, gain, stage, crop, (top, left))


# The page.

_HERE = Path(__file__).parent
SHOWN = ("recipe", "step", "weights", "dtype", "license")
"""Metadata of a model file that the page shows; the JSON file has all of it."""


def write_page(
    path: Path, sets: Sequence[SetScores], gallery: Gallery, report: dict[str, Any]
) -> None:
    """Write the page; `report` is the content of evaluation.json."""
    write_atomically(path, render(sets, gallery, report))


def render(sets: Sequence[SetScores], gallery: Gallery, report: dict[str, Any]) -> bytes:
    """Return the page in UTF-8."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["place"] = lambda value: f"{value:.5g}"
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    names = {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": RIGHT,
        "top": TOP,
        "bottom": BOTTOM,
    }
    context = {
        **names,
        **_head(sets, report),
        "script": Markup(script),
        "script_hash": _sha256(script),
        "metrics": [METRICS[metric].title for metric in main_metrics(sets[0].metrics)],
        "sets": [_set(measured, gallery) for measured in sets],
    }
    return environment.get_template("page.html.j2").render(context).encode("utf-8")


def _printable(value: object) -> object:
    """Replace unprintable characters in names from outside; jinja2 escapes the result."""
    if (
        not isinstance(value, str)
        or isinstance(value, Markup)
        or value.startswith("data:image/webp;base64,")
    ):
        return value
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in value
    )


def _sha256(script: str) -> str:
    """The hash by which the page's policy recognises its only script."""
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def _head(sets: Sequence[SetScores], report: dict[str, Any]) -> dict[str, Any]:
    models = [
        {
            "title": model["title"],
            "file": model["file"],
            "sha256": model["sha256"],
            "network": model["name"],
            "metadata": ", ".join(
                f"{key} {model['metadata'][key]}" for key in SHOWN if key in model["metadata"]
            ),
        }
        for model in report["models"]
    ]
    names = ", ".join(measured.name for measured in sets)
    return {
        "title": f"{', '.join(model['title'] for model in models)} on {names}",
        "scale": report["scale"],
        "cropped": cropped(report["scale"]),
        "models": models,
        "self_ensemble": report["self_ensemble"],
        "device": report["data"]["device"],
        "versions": report["versions"],
        "bootstrap": report["bootstrap"],
        "notes": [
            f"{measured.name}: {measured.data.note}" for measured in sets if measured.data.note
        ],
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _set(measured: SetScores, gallery: Gallery) -> dict[str, Any]:
    """Return the template's values for one image set."""
    best, worst = gallery.best(measured.name), gallery.worst(measured.name)
    data, over = measured.data, _over(measured)
    crops = [
        {
            "title": "Best",
            "what": f"largest gain over {over}, cropped where the error of {over} exceeds the "
            "model's most",
            "shown": [_crop(shown) for shown in best],
        },
        {
            "title": "Worst",
            "what": f"smallest gain over {over}, cropped where the model's error is largest",
            "shown": [_crop(shown) for shown in worst],
        },
    ]
    return {
        "name": measured.name,
        "num_images": len(measured.images),
        "hr": str(data.hr),
        "lr": (
            "made by bicubic downscaling"
            if data.lr_made_by
            else "beside them"
            if data.lr is None
            else f"from {data.lr}"
        ),
        "rows": _rows(measured),
        "columns": [METRICS[metric].title for metric in measured.metrics],
        "differences": _differences(measured),
        "chart": scatter(measured),
        "over": over,
        "first": first_model(measured.images[0]),
        "crops": [group for group in crops if group["shown"]],
        "sliders": [_slider(shown) for shown in (*best, *worst)],
        "images": [
            {
                "name": image.name,
                "cells": [
                    " / ".join(number(scores[metric], metric) for metric in main_metrics(scores))
                    for scores in image.methods.values()
                ],
            }
            for image in measured.images
        ],
        "methods": measured.methods,
    }


def _over(measured: SetScores) -> str:
    return "the input" if measured.reference == "input" else measured.reference


def _rows(measured: SetScores) -> list[dict[str, Any]]:
    """Return the table of means, one row per method, with intervals and the best value marked."""
    best = {metric: _best(measured.intervals, metric) for metric in measured.metrics}
    return [
        {
            "method": method,
            "is_baseline": method in BASELINES,
            "cells": [
                {
                    "mean": number(found.mean, metric),
                    "range": _range(found, metric),
                    "is_best": found.mean == best[metric],
                }
                for metric, found in of_method.items()
            ],
        }
        for method, of_method in measured.intervals.items()
    ]


def _differences(measured: SetScores) -> list[dict[str, Any]]:
    """Return one row per compared pair of methods, with one cell per metric."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in measured.differences:
        rows.setdefault(f"{entry.method} over {entry.against}", []).append(
            {
                "mean": number(entry.interval.mean, entry.metric, "+"),
                "is_open": not entry.is_significant,
                "range": _range(entry.interval, entry.metric, "+"),
                "verdict": entry.verdict,
            }
        )
    return [{"text": text, "cells": cells} for text, cells in rows.items()]


def _best(intervals: dict[str, dict[str, Interval]], metric: str) -> float:
    return (min if METRICS[metric].lower_is_better else max)(
        of_method[metric].mean for of_method in intervals.values()
    )


def _range(found: Interval, metric: str, sign: str = "") -> str:
    return (
        ""
        if math.isnan(found.low)
        else f"{number(found.low, metric, sign)} to {number(found.high, metric, sign)}"
    )


def _crop(shown: Shown) -> dict[str, Any]:
    captions = _captions(shown)
    return {
        "name": shown.scores.name,
        "gain": f"{shown.gain:+.3f} dB",
        "place": f"{shown.place[0]}, {shown.place[1]}",
        "layers": [{**layer, "caption": captions[layer["method"]]} for layer in layers(shown.crop)],
    }


def _slider(shown: Shown) -> dict[str, Any]:
    """Return a slider's layers; at first the input is on the left, the first model on the right."""
    height, width = shown.stage[ORIGINAL].shape[-2:]
    captions, model = _captions(shown), first_model(shown.scores)
    methods = list(shown.stage)
    return {
        "name": shown.scores.name,
        "width": width,
        "height": height,
        "left": methods.index(shown.scores.reference),
        "right": methods.index(model),
        "layers": [
            {**layer, "caption": captions[layer["method"]]} for layer in layers(shown.stage)
        ],
    }


def _captions(shown: Shown) -> dict[str, str]:
    return {
        method: f"{scores['psnr_y']:.2f} dB / {scores['ssim_y']:.4f}"
        for method, scores in shown.scores.methods.items()
    } | {ORIGINAL: "original"}
