"""What histograms tell of many images: exact moments, percentiles, clipping, the spread between images."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate

import cv2
import numpy as np

CHANNELS = ("red", "green", "blue")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
PERCENTILES = (1, 50, 99)
MAX_COUNT = 1 << 24  # cv2.calcHist counts in float32, which holds whole numbers exactly up to here


@dataclass(frozen=True)
class ImageCounts:
    """The histograms of one image, int64 (3, 256); or the `reason` why there are none."""

    name: str
    height: int = 0
    width: int = 0
    counts: np.ndarray | None = None
    reason: str = ""


@dataclass
class Spread:
    """Mean and standard deviation of numbers that come one by one (Welford, 1962), the least and the greatest."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: tuple[float, str] = (math.inf, "")
    greatest: tuple[float, str] = (-math.inf, "")

    def add(self, value: float, name: str) -> None:
        """Take in one number; `name` says whose it is."""
        self.count += 1
        difference = value - self.mean
        self.mean += difference / self.count
        self.squares += difference * (value - self.mean)
        self.least, self.greatest = min(self.least, (value, name)), max(self.greatest, (value, name))

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return math.sqrt(self.squares / self.count)


@dataclass
class Analysis:
    """What all images so far add up to."""

    counts: list[list[int]] = field(default_factory=lambda: [[0] * 256 for _ in CHANNELS])
    heights: tuple[int, int] = (sys.maxsize, 0)  # least and greatest
    widths: tuple[int, int] = (sys.maxsize, 0)
    luma: Spread = field(default_factory=Spread)  # of the images' mean luma
    means: tuple[Spread, ...] = field(default_factory=lambda: tuple(Spread() for _ in CHANNELS))

    def add(self, image: ImageCounts) -> None:
        """Take in one image."""
        pixels = image.height * image.width
        sums = image.counts @ np.arange(256)
        for channel, spread, total, mine in zip(image.counts.tolist(), self.means, sums.tolist(), self.counts,
                                                strict=True):
            mine[:] = [old + new for old, new in zip(mine, channel, strict=True)]
            spread.add(total / pixels, image.name)
        self.luma.add(float(np.dot(LUMA, sums / pixels)), image.name)
        self.heights = min(self.heights[0], image.height), max(self.heights[1], image.height)
        self.widths = min(self.widths[0], image.width), max(self.widths[1], image.width)

    @property
    def pixels(self) -> int:
        """Number of pixels of all images."""
        return sum(self.counts[0])


def histograms(pixels: np.ndarray) -> np.ndarray:
    """How often each level occurs in each channel of uint8 (height, width, channels): int64 (channels, 256), exact."""
    height, width, channels = pixels.shape
    rows = max(1, MAX_COUNT // width)
    counts = np.zeros((channels, 256), np.int64)
    for top in range(0, height, rows):
        band = pixels[top : top + rows]
        for channel in range(channels):
            counts[channel] += cv2.calcHist([band], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
    return counts


def moments(counts: list[int]) -> tuple[float, float]:
    """(Mean, population standard deviation) of the levels that a histogram counts; rounded only at the very end."""
    total = sum(counts)
    first = sum(level * count for level, count in enumerate(counts))
    second = sum(level * level * count for level, count in enumerate(counts))
    return float(Fraction(first, total)), math.sqrt(Fraction(second * total - first * first, total * total))


def percentile(counts: list[int], percent: int) -> int:
    """The lowest level that at least `percent` % of the pixels do not exceed."""
    total = sum(counts)
    return next(level for level, below in enumerate(accumulate(counts)) if below * 100 >= percent * total)


def summary(analysis: Analysis) -> dict[str, object]:
    """All that is reported, as JSON holds it. Levels are 0..255 except where a name ends with _01."""
    channels = {}
    for name, counts, spread in zip(CHANNELS, analysis.counts, analysis.means, strict=True):
        mean, std = moments(counts)
        levels = [level for level, count in enumerate(counts) if count]
        channels[name] = {
            "mean": mean, "std": std, "mean_01": mean / 255, "std_01": std / 255, "min": levels[0], "max": levels[-1],
            "percentiles": {str(percent): percentile(counts, percent) for percent in PERCENTILES},
            "share_at_0": counts[0] / analysis.pixels, "share_at_255": counts[255] / analysis.pixels,
            "std_of_image_means": spread.std}
    luma = analysis.luma
    mean_luma = sum(weight * channels[name]["mean"] for weight, name in zip(LUMA, CHANNELS, strict=True))
    return {"images": luma.count, "pixels": analysis.pixels, "height": list(analysis.heights),
            "width": list(analysis.widths), "channels": channels, "mean_luma": mean_luma,
            "std_of_image_mean_luma": luma.std,
            "darkest": {"name": luma.least[1], "mean_luma": luma.least[0]},
            "brightest": {"name": luma.greatest[1], "mean_luma": luma.greatest[0]}}
