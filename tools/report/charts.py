"""Bar charts as coordinates, which the report's template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tools.dataset.sampling import Histogram

WIDTH, HEIGHT = 420, 250  # of a chart, in SVG units; the font size is 12
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 26, 44  # margins around the bars


@dataclass(frozen=True)
class Bar:
    """A bar with its top-left corner at (x, y) and its tooltip."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A bar chart; `summary` describes it in words."""

    title: str
    x_label: str
    y_label: str
    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    threshold: Tick | None
    summary: str


@dataclass(frozen=True)
class Gate:
    """How to draw the values of a gate."""

    title: str
    unit: str
    ticks: Sequence[float]
    explanation: str
    option: str = ""
    is_log: bool = False


GATES = {
    "gradient": Gate(
        "Gradient",
        "mean luma gradient, gray levels per pixel (log scale)",
        [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64],
        "Amount of detail in a crop. Flat crops, below the line, are rejected.",
        "--min-gradient",
        is_log=True,
    ),
    "source_sharpness": Gate(
        "Sharpness of the picture",
        "ratio of the finest octave to the next one",
        [0, 0.5, 1, 1.5, 2],
        "Measured at the sharpest place of the photograph or frame that a crop was cut from; "
        "counted once per crop. Blurred or enlarged ones, below the line, are rejected.",
        "--min-sharpness",
    ),
    "sharpness": Gate(
        "Sharpness as a whole",
        "ratio of the finest octave to the next one",
        [0, 0.5, 1, 1.5, 2],
        "Measured over the whole crop. Not a gate, because sharp photographs have parts that are "
        "out of focus.",
    ),
    "entropy": Gate(
        "Entropy",
        "bits per pixel of the luma histogram",
        [0, 2, 4, 6, 8],
        "Variety of gray levels in a crop. Not a gate.",
    ),
}


def gate_chart(name: str, histogram: Histogram) -> Chart:
    """Distribution of a gate (a key of `GATES`) over the images."""
    gate, total = GATES[name], histogram.total
    scale: Callable[[float], float] = math.log2 if gate.is_log else float
    low, high = scale(histogram.edges[0]), scale(histogram.edges[-1])

    def at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (scale(value) - low) / (high - low)

    bars = [
        (at(left), at(right), count, f"{left:.3g} to {right:.3g}: {count:,} images")
        for left, right, count in zip(
            histogram.edges, histogram.edges[1:], histogram.counts, strict=False
        )
    ]
    low_value, median, high_value = (histogram.quantile(share) for share in (0.05, 0.5, 0.95))
    summary = (
        f"{total:,} images: median {median:.3g}; 90 % are between {low_value:.3g} and "
        f"{high_value:.3g}."
    )
    ends = (
        (histogram.below, "below", histogram.edges[0]),
        (histogram.above, "above", histogram.edges[-1]),
    )
    outside = [f"{count:,} {where} {edge:g}" for count, where, edge in ends if count]
    if outside:
        summary += f" The outermost bars include {' and '.join(outside)}."
    threshold = None
    if histogram.threshold is not None:
        threshold = Tick(at(histogram.threshold), f"{gate.option} {histogram.threshold:g}")
        summary += f" {histogram.under:,} are below the line."
    return _chart(
        gate.title,
        gate.unit,
        bars,
        [Tick(at(value), f"{value:g}") for value in gate.ticks],
        threshold,
        summary,
    )


def photos_chart(by_size: Mapping[int, int]) -> Chart:
    """Distribution of crops per photograph.

    `by_size` maps n to the number of photographs with 2^n to 2^(n+1) - 1 crops.
    """
    exponents = range(min(by_size), max(by_size) + 1)
    step = (WIDTH - LEFT - RIGHT) / len(exponents)
    bars, ticks = [], []
    for number, exponent in enumerate(exponents):
        first, last, left = 2**exponent, 2 ** (exponent + 1) - 1, LEFT + number * step
        name = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        count = by_size.get(exponent, 0)
        bars.append(
            (left + step * 0.1, left + step * 0.9, count, f"{name} crops: {count:,} photographs")
        )
        ticks.append(Tick(left + step / 2, _short(first) if first == last else f"{_short(first)}+"))
    most = max(by_size, key=lambda exponent: by_size[exponent])
    usual = f"{2**most:,} to {2 ** (most + 1) - 1:,} crops" if most else "a single crop"
    summary = f"{sum(by_size.values()):,} photographs; most gave {usual}."
    return _chart(
        "Crops per photograph",
        "crops per photograph or video (log scale)",
        bars,
        ticks,
        None,
        summary,
        y_label="photographs",
    )


def _chart(
    title: str,
    x_label: str,
    columns: list[tuple[float, float, int, str]],
    ticks: list[Tick],
    threshold: Tick | None,
    summary: str,
    y_label: str = "images",
) -> Chart:
    """Build a chart from (left, right, count, text) columns."""
    step, top = _y_scale(max(count for _, _, count, _ in columns))
    height, floor = HEIGHT - TOP - BOTTOM, HEIGHT - BOTTOM
    bars = [
        Bar(
            left,
            floor - height * count / top,
            max(right - left - 0.6, 0.6),
            height * count / top,
            text,
        )
        for left, right, count, text in columns
        if count
    ]
    y_ticks = [
        Tick(floor - height * value / top, _short(value)) for value in range(0, top + 1, step)
    ]
    return Chart(title, x_label, y_label, bars, ticks, y_ticks, threshold, summary)


def _y_scale(largest: int) -> tuple[int, int]:
    """(Distance between ticks, last tick): 1, 2 or 5 times a power of ten, at most five ticks."""
    step = next(
        digit * 10**power
        for power in range(20)
        for digit in (1, 2, 5)
        if largest <= 5 * digit * 10**power
    )
    return step, max(step * -(-largest // step), step)


def _short(value: int) -> str:
    """Format a count in at most five characters."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return str(value)
