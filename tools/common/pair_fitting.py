"""Whether an HR and an LR picture show the same at the same place, told by their pixels."""

from __future__ import annotations

import math

import cv2
import numpy as np

MAX_SHIFT = 4        # LR pixels that LR may be found shifted by
_MIN_SIDE = 24       # LR pixels a side: less is too little to tell a shift by
# Another shift must correlate better by this, plus so many times what chance makes (the standard error of a
# correlation). Of Set5 and photographs at 1/2, 1/3, 1/4 and 1/8, as they are, with noise of sigma 25, JPEG of quality
# 30 and 10, blur of sigma 2, and with every s-th pixel for LR (nearly half a pixel off), no true pair is refused; of
# those shifted by one or two pixels 94 % are.
_MIN_GAIN, _ERRORS = 0.003, 5
_MIN_COLOR = 3.0     # root mean square of R - B, in grey levels: less says nothing
_SWAPPED = -0.4      # cosine between R - B of both sides: 1 for pairs, -1 for swapped planes, 0 for chance


def correlation(hr: np.ndarray, lr: np.ndarray) -> float:
    """Pearson's correlation of the luma of both pictures, each reduced to at most 64 pixels a side; flat ones: 1."""
    first, second = (cv2.cvtColor(side, cv2.COLOR_RGB2GRAY).astype(np.float64) for side in _thumbnails(hr, lr))
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / norm if norm > first.size else 1.0


def has_swapped_colors(hr: np.ndarray, lr: np.ndarray) -> bool:
    """Whether red is blue and blue red on one side (OpenCV's order of the channels taken for RGB)."""
    first, second = (side[..., 0].astype(np.float64) - side[..., 2] for side in _thumbnails(hr, lr))
    norms = [float(np.sqrt((values**2).mean())) for values in (first, second)]
    return min(norms) > _MIN_COLOR and float((first * second).mean()) < _SWAPPED * norms[0] * norms[1]


def shift(hr: np.ndarray, lr: np.ndarray) -> tuple[int, int]:
    """(Rows, columns) that `lr` lies below and to the right of `hr`, uint8 RGB, in LR pixels; (0, 0) unless clear.

    `hr` is reduced to the size of `lr` by means of areas; normalised cross-correlation of the band that survives blur
    and noise (differences of Gaussians of sigma 1 and 4), within `MAX_SHIFT`.
    """
    height, width = lr.shape[:2]
    if min(height, width) < _MIN_SIDE:
        return 0, 0
    first, second = _band(cv2.resize(hr, (width, height), interpolation=cv2.INTER_AREA)), _band(lr)
    inner = first[MAX_SHIFT:-MAX_SHIFT, MAX_SHIFT:-MAX_SHIFT]
    if min(inner.std(), second.std()) < 0.5:  # next to flat: whatever correlates is rounding
        return 0, 0
    scores = cv2.matchTemplate(second, inner, cv2.TM_CCOEFF_NORMED)
    row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    best, here = float(scores[row, column]), float(scores[MAX_SHIFT, MAX_SHIFT])
    if best - here <= _MIN_GAIN + _ERRORS * (1 - best**2) / math.sqrt(inner.size):
        return 0, 0
    return int(row) - MAX_SHIFT, int(column) - MAX_SHIFT


def _band(pixels: np.ndarray) -> np.ndarray:
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return cv2.GaussianBlur(luma, (0, 0), 1) - cv2.GaussianBlur(luma, (0, 0), 4)


def _thumbnails(hr: np.ndarray, lr: np.ndarray) -> list[np.ndarray]:
    """Both pictures at one size of at most 64 pixels a side."""
    height, width = lr.shape[:2]
    factor = max(1.0, max(height, width) / 64)
    size = max(1, round(width / factor)), max(1, round(height / factor))
    return [cv2.resize(side, size, interpolation=cv2.INTER_AREA) for side in (hr, lr)]
