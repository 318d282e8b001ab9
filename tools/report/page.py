"""Build the HTML page of a dataset report from its statistics."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jinja2

from pipeline.data.image_files import TRAINING_LIST, VALIDATION_LIST
from pipeline.installation import as_typed
from tools.crops.quality import MIN_GRADIENT, MIN_SHARPNESS
from tools.dataset.rejects import MEANINGS, FileList, Rejects
from tools.dataset.sampling import Histogram, Tally
from tools.dataset.sources import Source, new_histograms
from tools.dataset.statistics import Statistics, tally, total, warnings
from tools.files import printable
from tools.report import charts, tiles
from tools.report.charts import GATES, gate_chart, photos_chart
from tools.report.tiles import Thumbnail

NUM_SOURCES = 200  # rows of the table; only the largest sources are shown if there are more
_MAX_CHARACTERS = 500  # of a name or a reason from outside
_NUM_KINDS = 5
_DOMINANT_PHOTO = 0.05  # a larger share of all crops is reported if there are many photographs
_MANY_PHOTOS = 100


@dataclass(frozen=True)
class View:
    """A section of the contact sheet: tiles with the values they were chosen by."""

    title: str
    explanation: str
    tiles: list[dict[str, object]]
    is_detail: bool


@dataclass(frozen=True)
class PlainImages:
    """The images in no manifest: their number, and those that were drawn and measured."""

    tiles: list[Thumbnail]
    num_images: int


def render(statistics: Statistics, views: list[View], plain: PlainImages) -> bytes:
    """Render the page in UTF-8."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(
        place=lambda value: f"{value:.4g}",
        number=lambda value: f"{value:.3g}",
        count=lambda value: f"{value:,}",
    )
    context = {
        **_geometry(),
        **_head(statistics),
        **_sources(statistics),
        **_gates(statistics, plain),
        "views": views,
        **_photos(statistics),
        **_rejects(statistics),
        **_lists(statistics),
        "command": as_typed("tools/dataset_report.py"),
    }
    return environment.get_template("page.html.j2").render(context).encode("utf-8")


def _printable(value: object) -> object:
    """Make an outside string printable; applied to all template expressions before escaping."""
    if not isinstance(value, str) or hasattr(value, "__html__") or value.startswith("data:image/"):
        return value
    return printable(value if len(value) <= _MAX_CHARACTERS else f"{value[:_MAX_CHARACTERS]}...")


def _geometry() -> dict[str, object]:
    return {
        "width": charts.WIDTH,
        "height": charts.HEIGHT,
        "left": charts.LEFT,
        "right": charts.RIGHT,
        "top": charts.TOP,
        "bottom": charts.BOTTOM,
        "side": tiles.SIDE,
    }


def _head(statistics: Statistics) -> dict[str, object]:
    """Headline numbers, hashes, and warnings."""
    sources, recorded = statistics.sources, statistics.recorded
    films, plain = total(sources, "films"), total(statistics.plain, "images")
    photographs, crops = total(sources, "photographs") - films, total(recorded, "images")
    lr_images, pixels = total(sources, "lr_images"), total(recorded, "pixels")
    numbers = [
        _fact("Sources", f"{len(sources):,}"),
        _fact("Photographs", f"{photographs:,}"),
        _fact("Videos", f"{films:,}"),
        _fact("Crops", f"{crops:,}", f"and {lr_images:,} LR sides" if lr_images else ""),
        _fact("Images in no manifest", f"{plain:,}"),
        _fact(
            "Pixels of the crops",
            f"{pixels / 1e9:.3g} G" if pixels >= 1e9 else f"{pixels / 1e6:.3g} M",
        ),
        _fact("On disk", _gigabytes(total(sources, "bytes"))),
        _fact(
            "Rejected",
            f"{statistics.rejects.total:,}",
            f"{statistics.quarantine.total:,} in quarantine",
        ),
    ]
    facts = [
        _fact("Crops by scale", _kinds(_by_scale(recorded))),
        _fact("Pixels per side", _kinds(tally(recorded, "sizes"))),
        _fact("Formats", _kinds(tally(sources, "formats"))),
        _fact("Decoded with", _kinds(tally(recorded, "decoders"))),
        _fact(
            "Hash of all crops, the same on every node",
            statistics.hash.hexdigest() if statistics.hash.count else "no manifest",
            is_code=True,
        ),
    ]
    folder = statistics.root.resolve()
    return {
        "name": folder.name or str(folder),
        "folder": str(folder),
        "numbers": numbers,
        "facts": facts,
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "seed": statistics.samples.seed,
        "samples": statistics.samples.size,
        "warnings": [*warnings(statistics), *_imbalance(statistics)],
    }


def _fact(name: str, value: str, more: str = "", is_code: bool = False) -> dict[str, object]:
    return {"name": name, "value": value, "more": more, "is_code": is_code}


def _imbalance(statistics: Statistics) -> list[str]:
    """Photographs and videos that training would see far more often than others."""
    crops, photographs = (
        total(statistics.recorded, "images"),
        total(statistics.recorded, "photographs"),
    )
    if photographs < _MANY_PHOTOS:
        return []
    return [
        f"{printable(name)} alone provides {count / crops:.0%} of the crops"
        for count, name in _largest(statistics)
        if count > _DOMINANT_PHOTO * crops
    ]


def _largest(statistics: Statistics) -> list[tuple[int, str]]:
    entries = [entry for source in statistics.recorded for entry in source.photos.largest]
    return sorted(entries, key=lambda entry: (-entry[0], entry[1]))[:10]


def _by_scale(sources: list[Source]) -> Tally:
    """Images by scale, named as fractions: "1/2"."""
    scales = sorted(tally(sources, "scales").items(), key=lambda entry: (len(entry[0]), entry[0]))
    return Tally({f"1/{scale}" if scale.isdigit() else scale: count for scale, count in scales})


def _kinds(counts: Tally) -> str:
    """All kinds with their shares, most frequent first."""
    whole = sum(counts.values())
    if len(counts) <= 1:
        return next(iter(counts), "-")
    entries = [
        f"{kind}: {count:,} ({count / whole:.1%})" for kind, count in counts.by_count()[:_NUM_KINDS]
    ]
    more = [f"{len(counts) - _NUM_KINDS} more"] if len(counts) > _NUM_KINDS else []
    return ", ".join(entries + more)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _sources(statistics: Statistics) -> dict[str, object]:
    """Table by source."""
    sources = statistics.sources
    images = total(sources, "images")
    largest = sorted(sources, key=lambda source: (-source.images, source.folder))[:NUM_SOURCES]
    sharpness = new_histograms()["source_sharpness"]
    for source in sources:
        sharpness.merge(source.gates["source_sharpness"])
    whole = {
        "sources": len(sources),
        "images": images,
        "photographs": total(sources, "photographs"),
        "scales": ", ".join(_by_scale(statistics.recorded)) or "-",
        "rejects": statistics.rejects.total,
        "sizes": ", ".join(
            size for size, _ in tally(statistics.recorded, "sizes").by_count()[:_NUM_KINDS]
        )
        or "-",
        "gigabytes": f"{total(sources, 'bytes') / 1e9:,.3f}",
        "sharpness": _median(sharpness),
        "training": total(sources, "training"),
        "validation": total(sources, "validation"),
        "hash": statistics.hash.hexdigest()[:12] if statistics.hash.count else "-",
    }
    return {
        "sources": [_source_row(source, images) for source in largest],
        "total": whole,
        "left_out": len(sources) - len(largest),
    }


def _source_row(source: Source, images: int) -> dict[str, object]:
    return {
        "folder": source.folder,
        "tool": source.tool,
        "gates": _other_gates(source),
        "images": source.images,
        "photographs": source.photos.photographs,
        "share": f"{source.images / images:.1%}" if images else "-",
        "scales": _by_scale([source]),
        "sizes": source.sides,
        "gigabytes": f"{source.bytes / 1e9:,.3f}",
        "formats": ", ".join(source.formats),
        "sharpness": _median(source.gates["source_sharpness"]),
        "rejects": f"{source.rejects.total:,}" if source.is_recorded else "-",
        "training": source.training,
        "validation": source.validation,
        "missing": source.missing,
        "hash": source.hash.hexdigest()[:12] if source.is_recorded else "-",
    }


def _median(histogram: Histogram) -> str:
    return f"{histogram.quantile(0.5):.2f}" if histogram.total else "-"


def _other_gates(source: Source) -> list[str]:
    """Thresholds with which a source was made, if they differ from the defaults."""
    usual = {"min_gradient": MIN_GRADIENT, "min_sharpness": MIN_SHARPNESS}
    others = {
        name: source.settings[name]
        for name, value in usual.items()
        if name in source.settings and source.settings[name] != value
    }
    lines = [
        f"--{name.replace('_', '-')} "
        + (f"{value:g}" if isinstance(value, (int, float)) else str(value))
        for name, value in others.items()
    ]
    if "max_hash_distance" in source.settings and source.settings["max_hash_distance"] is None:
        lines.append("--keep-duplicates")
    return lines


def _gates(statistics: Statistics, plain: PlainImages) -> dict[str, object]:
    """Histograms of the crops, and of the images in no manifest that were measured now."""
    histograms = new_histograms()
    for source in statistics.recorded:
        for name, histogram in source.gates.items():
            histograms[name].merge(histogram)
    measured = [tile.gates for tile in plain.tiles if "source_sharpness" in tile.gates]
    coarse = new_histograms()
    for gates in measured:
        for name, histogram in coarse.items():
            histogram.add(gates[name])
    numbers = {
        "images": plain.num_images,
        "looked_at": len(plain.tiles),
        "measured": len(measured),
        "unreadable": len(plain.tiles) - len(measured),
        "charts": _charts({name: histogram.coarser(4) for name, histogram in coarse.items()}),
    }
    return {
        "charts": _charts(histograms),
        "plain": numbers,
        "without_gates": total(statistics.recorded, "without_gates"),
    }


def _charts(histograms: dict[str, Histogram]) -> list[dict[str, object]]:
    return [
        {"chart": gate_chart(name, histogram), "explanation": GATES[name].explanation}
        for name, histogram in histograms.items()
        if histogram.total
    ]


def _photos(statistics: Statistics) -> dict[str, object]:
    """How evenly the crops are spread over photographs and videos."""
    by_size: dict[int, int] = {}
    for source in statistics.recorded:
        for exponent, count in source.photos.by_size.items():
            by_size[exponent] = by_size.get(exponent, 0) + count
    if not by_size:
        return {"photos": None}
    crops, largest = total(statistics.recorded, "images"), _largest(statistics)
    more = (
        f"The {len(largest)} largest provide {sum(count for count, _ in largest) / crops:.1%} of "
        "all crops."
    )
    rows = [
        {"name": name, "crops": count, "share": f"{count / crops:.1%}"} for count, name in largest
    ]
    return {
        "photos": {"chart": photos_chart(by_size), "more": more, "largest": rows, "crops": crops}
    }


def _rejects(statistics: Statistics) -> dict[str, object]:
    """Rejects of the cutting tools, and files moved to quarantine since."""
    cut, moved = statistics.rejects, statistics.quarantine
    note = (
        f"{moved.gone:,} more files in its report are no longer there (moved back or deleted)."
        if moved.gone
        else ""
    )
    return {
        "rejects": [
            {
                "title": "While cutting",
                "columns": ["Pictures", "Crops"],
                "note": "",
                "caption": (
                    "According to rejects.jsonl; a picture is a photograph, a frame, or one size "
                    "of them"
                ),
                **_reject_rows(cut, [cut.pictures, cut.crops]),
            },
            {
                "title": "In quarantine",
                "columns": ["Files"],
                "note": note,
                "caption": "According to quarantine/report.jsonl; files moved back are not counted",
                **_reject_rows(moved, [moved.pictures]),
            },
        ]
    }


def _reject_rows(rejects: Rejects, columns: list[Tally]) -> dict[str, object]:
    rows = []
    for gate in rejects.gates():
        counts = [column.get(gate, 0) for column in columns]
        rows.append(
            {
                "gate": gate,
                "meaning": MEANINGS.get(gate, ""),
                "counts": counts,
                "total": sum(counts),
                "examples": list(rejects.examples.get(gate, ())),
            }
        )
    return {"rows": rows, "most": max((row["total"] for row in rows), default=0)}


def _lists(statistics: Statistics) -> dict[str, object]:
    lists = statistics.lists
    entries: Iterable[tuple[str, str, FileList | None]] = (
        ("training", TRAINING_LIST, lists.training),
        ("validation", VALIDATION_LIST, lists.validation),
    )
    rows = [
        {
            "name": file,
            "is_there": names is not None,
            "files": len(names.keys) if names else 0,
            "photographs": sum(getattr(source.photos, side) for source in statistics.sources),
            "missing": len(names.keys) - names.found if names else 0,
        }
        for side, file, names in entries
    ]
    return {"lists": rows, "lists_hash": statistics.lists_hash}
