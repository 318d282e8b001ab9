"""Chroma subsampling, from the traces that it leaves in decoded pixels.

After JPEG, the DCT coefficients of the reduced chroma are multiples of their quantisation steps for
the true subsampling only. Without JPEG, differences between neighbours are alternately small and
large if every second chroma sample was interpolated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tools.estimation.jpeg import ROUNDING, JpegTrace, block_dct, step_gains, table, whole_blocks

Plane = NDArray[np.float32]

_NAMES = {(1, 1): "444", (2, 1): "422", (1, 2): "440", (2, 2): "420"}
_MIN_NONZERO = 30  # chroma coefficients; with fewer, there is no estimate
_MIN_GAIN = 0.1  # nats per coefficient; the wrong subsampling gains less
# Median log ratio of alternate differences, and their mean in standard errors. The chroma of
# photographs without subsampling never reaches both.
_MIN_RATIO = 0.08
_MIN_ERRORS = 12.0


def after_jpeg(
    blue: Plane, red: Plane, trace: JpegTrace, clipped: NDArray[np.bool_] | None = None
) -> str | None:
    """Return "444", "422", "440" or "420"; `None` if the chroma has too little detail.

    `blue` and `red` are Cb and Cr around 0, float32 (height, width), of the image in whose luma
    `trace` was found. They may have been enlarged by repetition or by libjpeg's triangle filter.
    Blocks with pixels that are `clipped` in R, G or B are left out.
    """
    best, name = _MIN_GAIN, None
    for (across, down), candidate in _NAMES.items():
        for top in range(trace.offset[0], trace.offset[0] + 8 * down, 8):
            for left in range(trace.offset[1], trace.offset[1] + 8 * across, 8):
                mask = None
                if clipped is not None:
                    part = clipped[top:, left:].astype(np.float32)
                    mask = reduced(part, across, down, is_smooth=False) > 0
                for is_smooth in (True, False) if across * down > 1 else (False,):
                    gains = [
                        _gain(
                            reduced(plane[top:, left:], across, down, is_smooth),
                            mask,
                            trace.quality,
                        )
                        for plane in (blue, red)
                    ]
                    if np.mean(gains) > best:
                        best, name = float(np.mean(gains)), candidate
    return name


def reduced(plane: Plane, across: int, down: int, is_smooth: bool) -> Plane:
    """Undo an enlargement by repetition, or (`is_smooth`) by libjpeg's triangle filter."""
    from scipy.linalg import solve_banded

    for axis, factor in ((1, across), (0, down)):
        if factor == 1:
            continue
        plane = plane.swapaxes(0, axis)
        plane = plane[: len(plane) // 2 * 2]
        plane = (plane[::2] + plane[1::2]) / 2
        if is_smooth and len(plane) > 2:
            # Of the triangle filter's samples (a + 3b) / 4 and (3b + c) / 4, that is
            # (a + 6b + c) / 8.
            bands = np.full((3, len(plane)), 1 / 8)
            bands[1] = 6 / 8
            bands[1, [0, -1]] = 7 / 8
            plane = solve_banded((1, 1), bands, plane).astype(np.float32)
        plane = plane.swapaxes(0, axis)
    return np.ascontiguousarray(plane)


def _gain(plane: Plane, clipped: NDArray[np.bool_] | None, quality: int) -> float:
    """Return the log-likelihood gain of the quality's chroma steps, in nats per coefficient."""
    if min(plane.shape) < 16:
        return 0.0
    steps = table(quality, is_chroma=True).ravel()
    blocks = whole_blocks(block_dct(plane, (0, 0)), clipped, (0, 0))
    gain, count = 0.0, 0
    for frequency in range(1, 64):
        levels = np.abs(blocks[:, frequency])
        # Smaller values are zeros with errors from rounding and clipping.
        levels = levels[levels > max(3 * ROUNDING, 0.4 * steps[frequency])][:400]
        count += len(levels)
        if len(levels):
            gain += float(step_gains(levels, steps[frequency : frequency + 1])[0])
    return gain / count if count >= _MIN_NONZERO else 0.0


def in_turns(blue: Plane, red: Plane) -> str:
    """Return the subsampling of chroma that was not compressed with JPEG, "444" if none is found.

    `blue` and `red` are Cb and Cr, float32 (height, width).
    """
    halved = []
    for axis in (1, 0):
        found = [_turns(plane, axis) for plane in (blue, red)]
        ratio, errors = (float(np.mean(values)) for values in zip(*found, strict=True))
        halved.append(2 if abs(ratio) >= _MIN_RATIO and errors >= _MIN_ERRORS else 1)
    return _NAMES[halved[0], halved[1]]


def _turns(plane: Plane, axis: int) -> tuple[float, float]:
    """Return the log ratio of even to odd differences along an axis, and its significance.

    The first number is the median; the second is the absolute mean in standard errors.
    """
    differences = np.abs(np.diff(plane, axis=axis))
    # Limit strong edges, which are not periodic.
    differences = np.minimum(differences, np.quantile(differences[::7, ::7], 0.99) + 1e-6)
    levels = differences.mean(axis=1 - axis, dtype=np.float64)
    pairs = np.log(levels[: len(levels) // 2 * 2].reshape(-1, 2) + 0.01)
    ratios = pairs[:, 0] - pairs[:, 1]
    error = float(ratios.std()) / np.sqrt(len(ratios))
    return float(np.median(ratios)), abs(float(ratios.mean())) / max(error, 1e-9)
