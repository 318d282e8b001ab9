"""What was measured on several image sets with several methods: CSV, Markdown and JSON values."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.evaluation.image_sets import ImageSet
from pipeline.evaluation.scoring import DRIFTS, MethodScores, means
from pipeline.evaluation.significance import (
    FEW_IMAGES,
    LEVEL,
    RESAMPLES,
    SEED,
    Difference,
    Interval,
    differences,
    interval,
)
from pipeline.metrics.psnr_ssim import METRICS

TITLES = {"psnr_y": "PSNR-Y", "ssim_y": "SSIM-Y", "psnr_y_float": "PSNR-Y float", "ssim_y_float": "SSIM-Y float",
          "psnr_rgb": "PSNR-RGB", "ssim_rgb": "SSIM-RGB", "lpips": "LPIPS"}


@dataclass(frozen=True)
class Measured:
    """An image set and what every method scored on it."""

    data: ImageSet
    images: list[MethodScores]

    @property
    def name(self) -> str:
        """The set's name."""
        return self.data.name

    @property
    def methods(self) -> list[str]:
        """Nearest, bicubic, then the models."""
        return list(self.images[0].methods)

    @property
    def metrics(self) -> list[str]:
        """What was measured, colour drift left out."""
        return [metric for metric in (*METRICS, "lpips") if metric in self.images[0].methods["bicubic"]]

    def mean(self, method: str) -> dict[str, float]:
        """A method's mean of every metric."""
        return means([image.methods[method] for image in self.images])

    @cached_property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """Method -> metric -> its mean with the bootstrap interval."""
        return {method: {metric: interval([image.methods[method][metric] for image in self.images])
                         for metric in self.metrics} for method in self.methods}

    @cached_property
    def differences(self) -> list[Difference]:
        """Every model against bicubic and the other models."""
        return differences(self.images)


def number(value: float, metric: str, sign: str = "") -> str:
    """dB with three digits, the rest with four; with the sign "+", positive ones have it, too."""
    return f"{value:{sign}.3f}" if metric.startswith("psnr") else f"{value:{sign}.4f}"


def spread(found: Interval, metric: str, sign: str = "") -> str:
    """An interval in words: "28.419 (26.1 to 30.9)", each number as `number` writes it."""
    mean, low, high = (number(value, metric, sign) for value in (found.mean, found.low, found.high))
    return mean if math.isnan(found.low) else f"{mean} ({low} to {high})"


def csv_text(sets: Sequence[Measured]) -> str:
    """A line for every image and method, unrounded; an infinite PSNR is "inf"."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [*sets[0].metrics, *DRIFTS]
    writer.writerow(["benchmark", "image", "method", *columns])
    for measured in sets:
        for image in measured.images:
            for method, scores in image.methods.items():
                writer.writerow([measured.name, image.name, method, *(repr(scores[column]) for column in columns)])
    return text.getvalue()


def markdown(sets: Sequence[Measured], scale: int) -> str:
    """The table of means that papers print, the other conventions, the intervals, and what differs."""
    return "\n".join([*headline(sets), "", _convention(scale), "", *_conventions(sets), "", *_differences(sets), ""])


def headline(sets: Sequence[Measured]) -> list[str]:
    """A row for every method, PSNR-Y / SSIM-Y of every set in a column, as papers print it."""
    metrics = [metric for metric in ("psnr_y", "ssim_y", "lpips") if metric in sets[0].metrics]
    what = " / ".join(TITLES[metric] for metric in metrics)
    rows = [[f"{what}", *(f"{measured.name} ({len(measured.images)})" for measured in sets)]]
    for method in sets[0].methods:
        rows.append([method, *(" / ".join(number(measured.mean(method)[metric], metric) for metric in metrics)
                               for measured in sets)])
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells, the first being the head, as a Markdown table that is aligned in plain text, too."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _convention(scale: int) -> str:
    return (f"Y is BT.601 luma rounded to uint8, as in the papers; {scale} pixels cut from every border; means over "
            "the images, whose number is in parentheses. Float: Y not rounded, as in BasicSR.")


def _conventions(sets: Sequence[Measured]) -> list[str]:
    lines = [f"Means with {LEVEL:.0%} intervals: bootstrap, {RESAMPLES:,} draws of the images, seed {SEED}.", ""]
    rows = [["Benchmark", "Method", *(TITLES[metric] for metric in sets[0].metrics)]]
    rows += [[measured.name, method,
              *(spread(measured.intervals[method][metric], metric) for metric in measured.metrics)]
             for measured in sets for method in measured.methods]
    return [*lines, *table(rows), *(f"\n{measured.name}: {measured.data.note}." for measured in sets
                                    if measured.data.note)]


def _differences(sets: Sequence[Measured]) -> list[str]:
    rows = [["Benchmark", "Method", "Against", "Metric", "Difference, paired by image", "Verdict"]]
    rows += [[measured.name, entry.method, entry.against, TITLES[entry.metric],
              spread(entry.interval, entry.metric, "+"), entry.verdict]
             for measured in sets for entry in measured.differences]
    few = [measured.name for measured in sets if len(measured.images) < FEW_IMAGES]
    if few:
        rest = ["", f"Fewer than {FEW_IMAGES} images ({', '.join(few)}): such intervals come out too narrow."]
        return [*table(rows), *rest]
    return table(rows)


def set_values(measured: Measured) -> dict[str, Any]:
    """A set as plain JSON values; what is not finite is null."""
    data = measured.data
    return {
        "name": measured.name, "hr": str(data.hr), "lr": None if data.lr is None else str(data.lr),
        "lr_made_by": data.lr_made_by, "note": data.note or None,
        "mean": {method: finite(measured.mean(method)) for method in measured.methods},
        "intervals": {method: {metric: _ends(measured.intervals[method][metric]) for metric in measured.metrics}
                      for method in measured.methods},
        "differences": [{"method": entry.method, "against": entry.against, "metric": entry.metric,
                         **finite({"mean": entry.interval.mean}), "interval": _ends(entry.interval),
                         "significant": entry.is_significant if entry.is_known else None, "verdict": entry.verdict}
                        for entry in measured.differences],
        "images": [{"name": image.name, "methods": {method: finite(scores) for method, scores in image.methods.items()}}
                   for image in measured.images],
    }


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: null stands for it."""
    return {metric: value if math.isfinite(value) else None for metric, value in metrics.items()}


def _ends(found: Interval) -> list[float] | None:
    return None if math.isnan(found.low) else [found.low, found.high]
