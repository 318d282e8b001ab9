"""Do the two sides of an HR/LR pair show the same content, at the same place and brightness?

Every function takes HR and LR as uint8 RGB, (height, width, 3), with HR an integer factor larger.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.libraries import cv2

MAX_SHIFT = 4  # LR pixels; largest shift of LR that is searched for
_MIN_SIDE = 24  # LR pixels per side; smaller pictures are too small to measure a shift
# Another shift must correlate better by `_MIN_GAIN` plus `_ERRORS` standard errors of the
# correlation. Tested on Set5 and photographs at 1/2, 1/3, 1/4 and 1/8: unchanged, with noise of
# sigma 25, JPEG of quality 30 and 10, blur of sigma 2, and with every s-th pixel as LR (nearly half
# a pixel off). No true pair is rejected; 94 % of those shifted by one or two pixels are.
_MIN_GAIN, _ERRORS = 0.003, 5
_MIN_COLOR = 3.0  # root mean square of R - B, in gray levels; less is not significant
# Cosine between R - B of both sides: 1 for pairs, -1 for swapped planes, 0 for chance.
_SWAPPED = -0.4
CONTRAST = 0.1, 4.0
"""Allowed contrast of LR relative to HR."""
MAX_LEVEL = 128
"""Largest difference between the means of LR and HR in one colour, in gray levels."""
_MIN_SPREAD = 4.0  # standard deviation of HR, in gray levels; contrast is not compared below it
_FLAT, _WHITE = 0.5, 250  # standard deviation, and mean, in gray levels


def correlation(hr: np.ndarray, lr: np.ndarray) -> float:
    """Pearson's correlation of the luma of both pictures, reduced to at most 64 pixels per side.

    Flat pictures give 1.
    """
    first, second = (
        cv2.cvtColor(side, cv2.COLOR_RGB2GRAY).astype(np.float64) for side in _thumbnails(hr, lr)
    )
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / norm if norm > first.size else 1.0


def has_swapped_colors(hr: np.ndarray, lr: np.ndarray) -> bool:
    """Whether red and blue are swapped on one side (OpenCV's channel order read as RGB)."""
    first, second = (side[..., 0].astype(np.float64) - side[..., 2] for side in _thumbnails(hr, lr))
    norms = [float(np.sqrt((values**2).mean())) for values in (first, second)]
    return (
        min(norms) > _MIN_COLOR and float((first * second).mean()) < _SWAPPED * norms[0] * norms[1]
    )


def tone_fault(hr: np.ndarray, lr: np.ndarray) -> str:
    """Return how contrast or brightness of LR differ too much from those of HR; `""` if neither.

    Both are reduced to at most 64 pixels per side. LR's contrast in a colour is the slope of a
    straight line through the (HR, LR) values, which noise hardly changes: a black LR has a slope of
    0, one at 1/16 of the brightness has 1/16.

    Measured on 104 photographs (Kodak, Sun-Hays 80) reduced to 1/4, and on 208 of their crops of
    192 pixels: gamma from 1/2.2 to 2.2, half to 1.5 times the brightness, 40 levels more or less,
    half the contrast, a white balance of 0.6 and 1.6, noise of sigma 50, blur of sigma 3, JPEG of
    quality 10, and blur, noise and JPEG together pass, except for 8 of the 416 crops made 1.5 times
    as bright or 40 levels darker, which lost a colour by it. Every LR that is black, white, gray or
    at 1/16 of the brightness is rejected.
    """
    first, second = (side.astype(np.float64) for side in _thumbnails(hr, lr))
    slopes: list[tuple[float, float]] = []  # with their error, of the colours that vary in HR
    for plane, colour in enumerate(("red", "green", "blue")):
        x, y = first[..., plane], second[..., plane]
        level, spread = float(y.mean() - x.mean()), float(x.std())
        if abs(level) > MAX_LEVEL:
            return (
                f"LR is {abs(level):.0f} gray levels {'brighter' if level > 0 else 'darker'} than "
                f"HR in {colour}, more than {MAX_LEVEL}"
            )
        if spread < _MIN_SPREAD:
            continue
        # A colour may be overexposed as a whole, but not missing.
        if y.std() < _FLAT and y.mean() < _WHITE:
            return f"LR is flat in {colour}, HR is not"
        slope = float(((x - x.mean()) * (y - y.mean())).mean()) / spread**2
        rest = y - y.mean() - slope * (x - x.mean())
        slopes.append((slope, _ERRORS * float(rest.std()) / (spread * math.sqrt(x.size))))
    if slopes and (
        all(slope + error < CONTRAST[0] for slope, error in slopes)
        or all(slope - error > CONTRAST[1] for slope, error in slopes)
    ):
        return (
            f"LR has {max(0.0, max(slopes)[0]):.2g} times the contrast of HR, not "
            f"{CONTRAST[0]:g} to {CONTRAST[1]:g} times"
        )
    return ""


def shift(hr: np.ndarray, lr: np.ndarray) -> tuple[int, int]:
    """Offset (rows, columns) of `lr` below and right of `hr` in LR pixels; (0, 0) unless clear.

    Both are uint8 RGB. `hr` is reduced to the size of `lr` by area averaging. Then the frequency
    band that survives blur and noise (difference of Gaussians of sigma 1 and 4) is compared by
    normalised cross-correlation within `MAX_SHIFT`.
    """
    height, width = lr.shape[:2]
    if min(height, width) < _MIN_SIDE:
        return 0, 0
    first, second = _band(cv2.resize(hr, (width, height), interpolation=cv2.INTER_AREA)), _band(lr)
    inner = first[MAX_SHIFT:-MAX_SHIFT, MAX_SHIFT:-MAX_SHIFT]
    if min(inner.std(), second.std()) < 0.5:  # almost flat, so any correlation is due to rounding
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
    """Both pictures at the same size of at most 64 pixels per side."""
    height, width = lr.shape[:2]
    factor = max(1.0, max(height, width) / 64)
    size = max(1, round(width / factor)), max(1, round(height / factor))
    return [cv2.resize(side, size, interpolation=cv2.INTER_AREA) for side in (hr, lr)]
