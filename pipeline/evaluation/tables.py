"""The scores of several methods on several image sets: intervals, tables, CSV, Markdown and JSON.

A mean over few images says little by itself, so each comes with a bootstrap interval. The draws
are seeded and the same for all methods, so that the difference between two methods is paired by
image.
"""

from __future__ import annotations

import csv
import io
import math
import platform
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, groupby
from typing import Any

import numpy as np
import torch

from pipeline.evaluation.image_sets import ImageSet
from pipeline.evaluation.scoring import BASELINES, DRIFTS, ImageScores
from pipeline.images import border_of
from pipeline.metrics import METRICS, Metric, means
from pipeline.metrics.psnr_ssim import CONVENTION

RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95
FEW_IMAGES = 10


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval.

    `low` and `high` are NaN if there is one image or a PSNR is infinite.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The difference `method` - `against` in a metric, paired by image."""

    method: str
    against: str
    metric: str
    interval: Interval
    num_images: int

    @property
    def is_known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.interval.low)

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.is_known and not self.interval.low <= 0 <= self.interval.high

    @property
    def verdict(self) -> str:
        """The conclusion in words: better, worse, not significant, or no interval."""
        if not self.is_known:
            return "no interval: one image" if self.num_images < 2 else "no interval: infinite PSNR"
        if not self.is_significant:
            return "difference not significant"
        is_better = METRICS[self.metric].is_better(self.interval.mean, 0)
        few = f" (on {self.num_images} images only)" if self.num_images < FEW_IMAGES else ""
        return f"{'better' if is_better else 'worse'}{few}"


def interval(values: Sequence[float], resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """Return the mean of `values` and its percentile bootstrap interval at confidence `LEVEL`.

    The draws depend only on the number of images and the seed, so the intervals of several
    methods or metrics on one benchmark are paired.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = sum(values) / len(values)
    if len(array) < 2 or not np.isfinite(array).all():
        return Interval(mean, math.nan, math.nan)
    # Not `@`: BLAS rounds differently with another number of threads.
    means = np.einsum("ij,j->i", _draws(len(array), resamples, seed), array)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


@lru_cache(maxsize=4)
def _draws(num_images: int, resamples: int, seed: int) -> np.ndarray:
    """Return every image's weight in every draw, resamples x images; each row sums to 1."""
    shares = np.full(num_images, 1 / num_images)
    return np.random.default_rng(seed).multinomial(num_images, shares, size=resamples) / num_images


def difference(images: Sequence[ImageScores], method: str, against: str, metric: str) -> Difference:
    """Compare two methods image by image; equal values, even infinite ones, differ by 0."""
    pairs = [(image.methods[method][metric], image.methods[against][metric]) for image in images]
    values = [0.0 if first == second else first - second for first, second in pairs]
    return Difference(method, against, metric, interval(values), len(images))


def differences(images: Sequence[ImageScores]) -> list[Difference]:
    """Compare every model with its input and the models before it in the measured main metrics.

    The input is bicubically upscaled, except at x1.
    """
    methods = images[0].methods
    models = [name for name in methods if name not in BASELINES]
    metrics = main_metrics(methods[models[0]])
    pairs = [
        *((model, images[0].reference) for model in models),
        *((second, first) for first, second in combinations(models, 2)),
    ]
    return [
        difference(images, method, against, metric)
        for method, against in pairs
        for metric in metrics
    ]


def main_metrics(measured: Container[str]) -> list[str]:
    """Return those `measured` metrics that papers print and that models are compared in."""
    return [name for name, metric in METRICS.items() if metric.is_main and name in measured]


@dataclass(frozen=True)
class SetScores:
    """An image set and the scores of every method on it."""

    data: ImageSet
    images: list[ImageScores]

    @property
    def name(self) -> str:
        """The set's name."""
        return self.data.name

    @property
    def methods(self) -> list[str]:
        """The methods: nearest and bicubic, or at x1 the input, then the models."""
        return list(self.images[0].methods)

    @property
    def metrics(self) -> list[str]:
        """The measured metrics, without the colour drift."""
        return [metric for metric in METRICS if metric in self.images[0].methods[self.reference]]

    @property
    def reference(self) -> str:
        """The name of the baseline: bicubic, or at x1 the input."""
        return self.images[0].reference

    def mean(self, method: str) -> dict[str, float]:
        """Return the mean of every metric for a method."""
        return means([image.methods[method] for image in self.images])

    @cached_property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """For each method, each metric's mean with its bootstrap interval."""
        return {
            method: {
                metric: interval([image.methods[method][metric] for image in self.images])
                for metric in self.metrics
            }
            for method in self.methods
        }

    @cached_property
    def differences(self) -> list[Difference]:
        """The comparisons of every model with its input and the other models."""
        return differences(self.images)


def number(value: float, metric: str, sign: str = "") -> str:
    """Format a value with its metric's decimals; `sign` "+" also marks positive values."""
    return METRICS[metric].text(value, sign)


def interval_text(found: Interval, metric: str, sign: str = "") -> str:
    """Format an interval as "28.419 (26.100 to 30.900)", with the decimals of `number`."""
    mean, low, high = (number(value, metric, sign) for value in (found.mean, found.low, found.high))
    return mean if math.isnan(found.low) else f"{mean} ({low} to {high})"


def csv_text(sets: Sequence[SetScores]) -> str:
    """Return CSV with one line per image and method, unrounded; an infinite PSNR is "inf"."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [*sets[0].metrics, *DRIFTS]
    writer.writerow(["benchmark", "image", "method", *columns])
    for measured in sets:
        for image in measured.images:
            for method, scores in image.methods.items():
                writer.writerow(
                    [
                        measured.name,
                        image.name,
                        method,
                        *(repr(scores[column]) for column in columns),
                    ]
                )
    return text.getvalue()


def markdown(sets: Sequence[SetScores], scale: int) -> str:
    """Return Markdown: the table as in papers, all metrics with intervals, and the differences."""
    return "\n".join(
        [
            *headline(sets),
            "",
            _convention(scale),
            "",
            *_conventions(sets),
            "",
            *_differences(sets),
            "",
        ]
    )


def headline(sets: Sequence[SetScores]) -> list[str]:
    """Return the table as in papers: one row per method, one PSNR-Y / SSIM-Y column per set."""
    metrics = main_metrics(sets[0].metrics)
    what = " / ".join(METRICS[metric].title for metric in metrics)
    rows = [[f"{what}", *(f"{measured.name} ({len(measured.images)})" for measured in sets)]]
    for method in sets[0].methods:
        rows.append(
            [
                method,
                *(
                    " / ".join(number(measured.mean(method)[metric], metric) for metric in metrics)
                    for measured in sets
                ),
            ]
        )
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table whose source is aligned as well; the first row is the header."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _convention(scale: int) -> str:
    return (
        f"Y is BT.601 luma rounded to uint8, as in the papers; {cropped(scale)}. Means over the "
        "images, whose number is in parentheses. Float: Y not rounded, as in BasicSR."
    )


def cropped(scale: int) -> str:
    """Say which borders are not measured."""
    border = border_of(scale)
    return f"{border} pixels are cropped from every border" if border else "no border is cropped"


def _conventions(sets: Sequence[SetScores]) -> list[str]:
    lines = [
        f"Means with {LEVEL:.0%} intervals: bootstrap over images, {RESAMPLES:,} draws, seed "
        f"{SEED}.",
        "",
    ]
    rows = [["Benchmark", "Method", *(METRICS[metric].title for metric in sets[0].metrics)]]
    rows += [
        [
            measured.name,
            method,
            *(
                interval_text(measured.intervals[method][metric], metric)
                for metric in measured.metrics
            ),
        ]
        for measured in sets
        for method in measured.methods
    ]
    return [
        *lines,
        *table(rows),
        *(f"\n{measured.name}: {measured.data.note}." for measured in sets if measured.data.note),
    ]


def _differences(sets: Sequence[SetScores]) -> list[str]:
    rows = [["Benchmark", "Method", "Against", "Metric", "Difference, paired by image", "Verdict"]]
    rows += [
        [
            measured.name,
            entry.method,
            entry.against,
            METRICS[entry.metric].title,
            interval_text(entry.interval, entry.metric, "+"),
            entry.verdict,
        ]
        for measured in sets
        for entry in measured.differences
    ]
    few = [measured.name for measured in sets if len(measured.images) < FEW_IMAGES]
    if few:
        rest = [
            "",
            f"Fewer than {FEW_IMAGES} images ({', '.join(few)}): these intervals are too narrow.",
        ]
        return [*table(rows), *rest]
    return table(rows)


def set_values(measured: SetScores) -> dict[str, Any]:
    """Return a set's scores as JSON values; values that are not finite become null."""
    data = measured.data
    return {
        "name": measured.name,
        "hr": str(data.hr),
        "lr": None if data.lr is None else str(data.lr),
        "lr_made_by": data.lr_made_by,
        "note": data.note or None,
        "mean": {method: finite(measured.mean(method)) for method in measured.methods},
        "intervals": {
            method: {
                metric: _ends(measured.intervals[method][metric]) for metric in measured.metrics
            }
            for method in measured.methods
        },
        "differences": [
            {
                "method": entry.method,
                "against": entry.against,
                "metric": entry.metric,
                **finite({"mean": entry.interval.mean}),
                "interval": _ends(entry.interval),
                "significant": entry.is_significant if entry.is_known else None,
                "verdict": entry.verdict,
            }
            for entry in measured.differences
        ],
        "images": [
            {
                "name": image.name,
                "methods": {method: finite(scores) for method, scores in image.methods.items()},
            }
            for image in measured.images
        ],
    }


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """Replace infinite values with `None`, because JSON has no infinity."""
    return {metric: value if math.isfinite(value) else None for metric, value in metrics.items()}


def _ends(found: Interval) -> list[float] | None:
    return None if math.isnan(found.low) else [found.low, found.high]


# One model on one set as a table for the terminal, and everything as JSON.

PAPERS = METRICS["psnr_y"].convention


def format_table(scores: SetScores, title: str, scale: int) -> str:
    """Return a table of the model `title` beside bicubic (at x1, its input), one row per image.

    The means follow, then the means in the other conventions.
    """
    reference = scores.reference
    columns = (
        f"PSNR-Y {reference}",
        "PSNR-Y model",
        "   gain",  # wide enough for "+12.345"
        f"SSIM-Y {reference}",
        "SSIM-Y model",
    )
    width = max(len("image"), *(len(image.name) for image in scores.images))
    rule = "-" * (width + sum(len(column) + 2 for column in columns))

    def row(name: str, methods: dict[str, dict[str, float]]) -> str:
        return f"{name:<{width}}" + "".join(
            f"  {cell:>{len(column)}}"
            for cell, column in zip(
                _cells(methods[title], methods[reference]), columns, strict=True
            )
        )

    means = {method: scores.mean(method) for method in scores.methods}
    return "\n".join(
        [
            f"{'image':<{width}}" + "".join(f"  {column}" for column in columns),
            rule,
            *(row(image.name, image.methods) for image in scores.images),
            rule,
            row("mean", means),
            "",
            *_other_conventions(means, reference, means[title], scale),
        ]
    )


def _cells(model: dict[str, float], reference: dict[str, float]) -> tuple[str, ...]:
    """Return the cells of a row of `format_table`."""
    gain = model["psnr_y"] - reference["psnr_y"]
    return (
        number(reference["psnr_y"], "psnr_y"),
        number(model["psnr_y"], "psnr_y"),
        number(gain, "psnr_y", "+"),
        number(reference["ssim_y"], "ssim_y"),
        number(model["ssim_y"], "ssim_y"),
    )


def _other_conventions(
    means: dict[str, dict[str, float]], reference: str, model: dict[str, float], scale: int
) -> list[str]:
    """Return one line per convention for the metrics that have no column in the table."""
    before = means[reference]
    metrics = [
        metric for name, metric in METRICS.items() if name in model and metric.convention != PAPERS
    ]
    lines = [
        f"  {title:<29} {reference} {_values(group, before)}   model {_values(group, model)}"
        for title, group in (
            (title, list(group)) for title, group in groupby(metrics, _convention_of)
        )
    ]
    papers = [METRICS["psnr_y"], METRICS["ssim_y"]]
    drift = f"{reference} {_drift(before)}   model {_drift(model)}"
    return [
        f"Y is BT.601 luma rounded to uint8, as in the papers; {cropped(scale)}; PSNR in dB.",
        "Means in other conventions:",
        *lines,
        f"  {'colour drift, levels R G B':<29} {drift}",
        *(
            f"  {f'nearest, {PAPERS}':<29} {_values(papers, means[method])}"
            for method in means
            if method == "nearest"
        ),
    ]


def _convention_of(metric: Metric) -> str:
    return (
        metric.convention
        or f"{metric.title}, {'lower' if metric.lower_is_better else 'higher'} is better"
    )


def _values(metrics: Sequence[Metric], scores: dict[str, float]) -> str:
    return " / ".join(
        metric.text(scores[metric.name]) + (metric.unit and f" {metric.unit}") for metric in metrics
    )


def _drift(means: dict[str, float]) -> str:
    return " ".join(f"{means[key]:+.2f}" for key in DRIFTS)


def as_json(
    sets: Sequence[SetScores],
    models: Sequence[dict[str, Any]],
    scale: int,
    *,
    device: str,
    self_ensemble: bool,
) -> dict[str, Any]:
    """Return everything as JSON values; an infinite PSNR (equal images) is null.

    The top level has the first model on the first set, which existing scripts read; "benchmarks"
    has everything. `models` describes each model, including its "title".
    """
    first = sets[0]
    baselines = [method for method in reversed(BASELINES) if method in first.methods]
    columns = {"model": models[0]["title"], **{method: method for method in baselines}}
    data = {
        "hr": str(first.data.hr),
        "lr": None if first.data.lr is None else str(first.data.lr),
        "lr_made_by": first.data.lr_made_by,
        "device": device,
    }
    return {
        "model": {key: value for key, value in models[0].items() if key != "title"},
        "scale": scale,
        "convention": CONVENTION,
        "mean": {column: finite(first.mean(method)) for column, method in columns.items()},
        "images": [
            {
                "name": image.name,
                **{column: finite(image.methods[method]) for column, method in columns.items()},
            }
            for image in first.images
        ],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "data": data,
        "self_ensemble": self_ensemble,
        "models": list(models),
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
        "benchmarks": [set_values(scores) for scores in sets],
    }
