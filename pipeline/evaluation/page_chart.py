"""The scatter of a page: how much each model gains over bicubic on every image, as places in an SVG."""

from __future__ import annotations

import math
from typing import Any

from pipeline.evaluation.scoring import BASELINES
from pipeline.evaluation.tables import Measured

WIDTH, HEIGHT = 800, 360
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 40, 64
NUM_MARKS = 6
"""Colours and shapes that the page's style has; further models repeat them."""


def scatter(measured: Measured) -> dict[str, Any]:
    """PSNR-Y of bicubic to the right, the model's less that upwards; images with an infinite PSNR are left out."""
    models = [method for method in measured.methods if method not in BASELINES]
    points = []
    for image in measured.images:
        bicubic = image.methods["bicubic"]["psnr_y"]
        for index, model in enumerate(models):
            gain = image.methods[model]["psnr_y"] - bicubic
            if math.isfinite(bicubic) and math.isfinite(gain):
                points.append((bicubic, gain, index % NUM_MARKS, f"{image.name}: {model} {bicubic + gain:.3f} dB, "
                               f"bicubic {bicubic:.3f} dB, {gain:+.3f} dB"))
    across, upwards = _Axis([point[0] for point in points]), _Axis([0.0, *(point[1] for point in points)])
    return {
        "points": [{"x": _across(across.share(x)), "y": _up(upwards.share(y)), "mark": mark, "text": text}
                   for x, y, mark, text in points],
        "x_ticks": [{"at": _across(across.share(tick)), "text": across.text(tick)} for tick in across.ticks],
        "y_ticks": [{"at": _up(upwards.share(tick)), "text": upwards.text(tick, "+"), "is_zero": abs(tick) < 1e-9}
                    for tick in upwards.ticks],
        "legend": [{"mark": index % NUM_MARKS, "text": model} for index, model in enumerate(models)],
        "num_missing": len(measured.images) * len(models) - len(points),
    }


class _Axis:
    """An axis over all of some values, with round ticks."""

    def __init__(self, values: list[float]) -> None:
        low, high = min(values, default=0.0), max(values, default=1.0)
        if high - low < 1e-6:
            low, high = low - 0.5, high + 0.5
        step = 10 ** math.floor(math.log10((high - low) / 4))
        self.step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
        first, last = math.floor(low / self.step), math.ceil(high / self.step)
        self.ticks = [index * self.step for index in range(first, last + 1)]

    def share(self, value: float) -> float:
        """How far along the axis a value is, 0 to 1."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])

    def text(self, tick: float, sign: str = "") -> str:
        """The tick with as many digits as the step has."""
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        return f"{0.0 if abs(tick) < 1e-9 else tick:{sign if abs(tick) > 1e-9 else ''}.{digits}f}"


def _across(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _up(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
