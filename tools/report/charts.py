"""Bar charts as coordinates, which the report's template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tools.dataset.sampling import Histogram

WIDTH, HEIGHT = 420, 250  # of a chart, in units of its SVG; fonts are 12 of them
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 26, 44  # margins around the bars


@dataclass(frozen=True)
class Bar:
    """A bar, its upper left corner at (x, y), and what a pointer over it reads."""

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
    """A bar chart. `summary` says in words what it shows."""

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
    """How the values of a gate are drawn."""

    title: str
    unit: str
    ticks: Sequence[float]
    explanation: str
    option: str = ""
    is_log: bool = False


GATES = {
    "gradient": Gate(
        "Gradient",
        "mean luma gradient, grey levels a pixel (log scale)",
        [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64],
        "How much there is to see in a crop. Flat crops, below the line, are rejected.",
        "--min-gradient",
        is_log=True,
    ),
    "source_sharpness": Gate(
        "Sharpness of the picture",
        "finest octave over the next one, a ratio",
        [0, 0.5, 1, 1.5, 2],
        "Of the photograph or frame that a crop was cut from, at its sharpest place; counted once "
        "a crop. Blurred or enlarged ones, below the line, are rejected.",
        "--min-sharpness",
    ),
    "sharpness": Gate(
        "Sharpness as a whole",
        "finest octave over the next one, a ratio",
        [0, 0.5, 1, 1.5, 2],
        "Of the crop itself, all of it. No gate: a sharp photograph has parts that are out of "
        "focus.",
    ),
    "entropy": Gate(
        "Entropy",
        "bits a pixel of the luma histogram",
        [0, 2, 4, 6, 8],
        "How many grey levels a crop makes use of. No gate.",
    ),
}


def gate_chart(name: str, histogram: Histogram) -> Chart:
    """The distribution of a gate (a key of `GATES`) over the images."""
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
        f"{total:,} images: median {median:.3g}; 90 % of them lie between {low_value:.3g} "
        f"and {high_value:.3g}."
    )
    ends = (
        (histogram.below, "below", histogram.edges[0]),
        (histogram.above, "above", histogram.edges[-1]),
    )
    outside = [f"{count:,} {where} {edge:g}" for count, where, edge in ends if count]
    if outside:
        summary += f" The outermost bars also hold {' and '.join(outside)}."
    threshold = None
    if histogram.threshold is not None:
        threshold = Tick(at(histogram.threshold), f"{gate.option} {histogram.threshold:g}")
        summary += f" {histogram.under:,} lie below the line."
    return _chart(
        gate.title,
        gate.unit,
        bars,
        [Tick(at(value), f"{value:g}") for value in gate.ticks],
        threshold,
        summary,
    )


def photos_chart(by_size: Mapping[int, int]) -> Chart:
    """How many photographs gave how many crops: n -> photographs with 2^n to 2^(n+1) - 1 of
    them."""
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
    summary = f"{sum(by_size.values()):,} photographs; most often one gave {usual}."
    return _chart(
        "Crops of a photograph",
        "crops of one photograph or film (log scale)",
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
    """A chart of (left, right, count, text) columns."""
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
    """(Distance of the ticks, the last one): 1, 2 or 5 times a power of ten, at most five ticks."""
    step = next(
        digit * 10**power
        for power in range(20)
        for digit in (1, 2, 5)
        if largest <= 5 * digit * 10**power
    )
    return step, max(step * -(-largest // step), step)


def _short(value: int) -> str:
    """A count in at most five characters."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return str(value)
