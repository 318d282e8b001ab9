"""Levels that an image uses, black bars, and interlaced lines."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MIN_PIXELS = 20_000  # with fewer, levels may be unused by chance
_MIN_GAPS = 0.03  # minimum share of unused levels if levels were stretched or reduced
_MAX_IRREGULAR = 0.5  # standard deviation of the distances between used levels, over their mean
_BLACK = 24  # studio black is 16
_FLAT = 3.0  # levels by which a bar may vary
_COMB = 16  # side in pixels of the blocks that are tested for combing
_MIN_COMB = 6.0  # mean difference between neighbouring lines of a combed block, in levels


def used_levels(pixels: NDArray[np.uint8]) -> int | None:
    """Return the number of levels in use, out of 256, extrapolated from the middle of the range.

    256 for an ordinary image, 32 for one with 5 bits; also below 256 if a levels or gamma
    correction spread the histogram. `None` if there are too few pixels or colours to tell.
    `pixels` is uint8 (height, width, 3).
    """
    if pixels.shape[0] * pixels.shape[1] < _MIN_PIXELS:
        return None
    counts = []
    for channel in range(3):
        histogram = np.bincount(pixels[..., channel].ravel(), minlength=256)
        below = np.cumsum(histogram)
        low, high = np.searchsorted(below, [0.02 * below[-1], 0.98 * below[-1]])
        used = np.flatnonzero(histogram[low : high + 1])
        if high - low < 48 or len(used) < 4:
            continue
        distances = np.diff(used)
        gaps = 1 - len(used) / (used[-1] - used[0] + 1)
        if gaps < _MIN_GAPS:
            counts.append(256)
        elif distances.std() / distances.mean() < _MAX_IRREGULAR:
            counts.append(round(255 / float(distances.mean())) + 1)
    return max(counts) if counts else None


def black_bars(luma: NDArray[np.float32]) -> tuple[int, int, int, int]:
    """Return the heights and widths of black bars: (top, bottom, left, right), in pixels.

    Bars of less than 1 % of the side are ignored.
    """
    bars = []
    for plane in (luma, luma.T):
        is_bar = (plane.mean(axis=1) < _BLACK) & (plane.max(axis=1) - plane.min(axis=1) < 2 * _FLAT)
        for lines, flags in ((plane, is_bar), (plane[::-1], is_bar[::-1])):
            # A shadow is dark too, but not uniform.
            is_same = np.abs(lines.mean(axis=1) - lines[0].mean()) < _FLAT
            rows = np.flatnonzero(~(flags & is_same))
            end = int(rows[0]) if len(rows) else 0
            bars.append(end if end >= 0.01 * len(plane) else 0)
    return bars[0], bars[1], bars[2], bars[3]


def combed_share(luma: NDArray[np.float32]) -> float:
    """Return the share of blocks with combing, as in moving parts of interlaced frames.

    In a combed block, a line is closer to the next but one than to its neighbour.
    """
    rows, columns = (side // _COMB * _COMB for side in luma.shape)
    if not rows or not columns:
        return 0.0
    part = luma[:rows, :columns]

    def mean_difference(distance: int) -> NDArray[np.float32]:
        differences = np.zeros_like(part)
        differences[:-distance] = np.abs(part[distance:] - part[:-distance])
        blocks = differences.reshape(rows // _COMB, _COMB, columns // _COMB, _COMB)
        return blocks.mean(axis=(1, 3))

    near, far = mean_difference(1), mean_difference(2)
    return float(((near > _MIN_COMB) & (near > 1.5 * far)).mean())
