"""Blur and earlier enlargement.

Blur is measured at edges, by blurring them again (Zhuo and Sim, "Defocus Map Estimation from a
Single Image", 2011): the less an edge loses, the softer it was. Enlargement is found by its
period: interpolated pixels vary less, periodically with the grid of the original pixels (Gallagher,
"Detection of Linear and Cubic Interpolation in JPEG Compressed Images", 2005).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.libraries import cv2

Plane = NDArray[np.float32]

# Standard deviations of the two blurs in pixels, for sharp edges and for soft edges.
_BLURS = ((0.6, 1.2), (1.2, 2.4))
_SOFT = 1.8  # above it, edges are measured again with the larger blurs
_SOFT_FACTOR = 1.08  # corrects the larger blurs, which measure too little
_BORDER = 8
_STRONGEST = 0.15  # share of the edges that are measured
_MIN_STEP = 4.0  # minimum slope of an edge, in levels per pixel
# Standard deviation measured in sharp photographs, from pixels, lens and antialiasing.
SHARP = 0.40

_NUM_FREQUENCIES = 4096
_TREND = 17  # pixels of the moving average that removes the variation of the content
_LOWEST = 0.155  # cycles per pixel; the content's own variation is below
_MIN_PEAK = 45.0  # power relative to neighbouring frequencies; photographs have up to 20
# Peak of first differences that are alternately small and large. It suffices if the detail lost by
# halving is that of a twofold enlargement, 0.38 to 0.5; for a blur of one pixel it is 0.55 to 0.7.
_MIN_TURNS, _MAX_TURNS_LOSS = 10.0, 0.52
# Threshold of the differences along an axis, relative to their 90th percentile; repeated pixels
# have differences of 0.
_REPEATED = 0.05
_LEAST = 0.02  # added to differences before taking their logarithm
# Detail lost by reducing and enlarging, relative to that lost by blurring: 0.5 to 0.6 if the image
# was enlarged by this factor, 0.69 to 1 if by the other factor with the same period.
_MAX_LOSS = 0.65
# The same for factors up to 2: 0.4 to 0.77 after an enlargement, 0.85 to 1.04 after shrinking.
_MAX_SMALL_LOSS = 0.81


def edge_sigma(
    luma: Plane, noise: float = 0.0, grid: tuple[int, int] | None = None
) -> float | None:
    """Return the standard deviation of the Gaussian that edges were blurred with, in pixels.

    `None` if there are too few edges. The result includes the softness of sharp photographs, about
    `SHARP`; `blur_sigma` removes it. `luma` is float32 (height, width), levels 0..255; `noise`
    is its noise level. `grid` is the offset of the JPEG blocks, whose borders are not edges.
    """
    sigma = _edge_sigma(luma, noise, grid, *_BLURS[0])
    if sigma is None or sigma > _SOFT:  # the noise may hide soft edges from the small blurs
        soft = _edge_sigma(luma, noise, grid, *_BLURS[1])
        return sigma if soft is None else soft * _SOFT_FACTOR
    return sigma


def blur_sigma(edge: float) -> float:
    """Return the sigma of the blur that gives a sharp photograph edges of this `edge_sigma`."""
    return float(np.sqrt(max(edge**2 - SHARP**2, 0.0)))


def _edge_sigma(
    luma: Plane, noise: float, grid: tuple[int, int] | None, fine: float, coarse: float
) -> float | None:
    across, down = _gradient(luma, fine)
    strength = np.hypot(across, down)
    is_across = np.abs(across) > np.abs(down)
    middle = strength[1:-1, 1:-1]
    is_edge = np.zeros(luma.shape, bool)
    is_edge[1:-1, 1:-1] = np.where(
        is_across[1:-1, 1:-1],
        (middle >= strength[1:-1, :-2]) & (middle >= strength[1:-1, 2:]),
        (middle >= strength[:-2, 1:-1]) & (middle >= strength[2:, 1:-1]),
    )
    is_edge[:_BORDER] = is_edge[-_BORDER:] = False
    is_edge[:, :_BORDER] = is_edge[:, -_BORDER:] = False
    if grid is not None:
        for axis, offset in enumerate(grid):
            place = (np.arange(luma.shape[axis]) - offset) % 8
            at_border = np.expand_dims((place == 7) | (place == 0), 1 - axis)
            is_edge &= ~(at_border & (is_across == (axis == 1)))
    if is_edge.sum() < 100:
        return None
    strengths = strength[is_edge]
    # A blurred gradient of noise has about 0.3 / fine^2 of its standard deviation.
    least = max(np.quantile(strengths, 1 - _STRONGEST), _MIN_STEP / 2, 6 * noise * 0.3 / fine**2)
    chosen = strengths >= least
    if chosen.sum() < 30:
        return None
    again = np.hypot(*(part[is_edge][chosen] for part in _gradient(luma, coarse)))
    ratios = np.maximum(strengths[chosen] / np.maximum(again, 1e-3), 1.0001) ** 2
    variance = float(np.median((coarse**2 - ratios * fine**2) / (ratios - 1)))
    return float(np.sqrt(max(variance, 0.0)))


def _gradient(luma: Plane, sigma: float) -> tuple[Plane, Plane]:
    blurred = cv2.GaussianBlur(luma, (0, 0), sigma)
    return (
        cv2.Sobel(blurred, cv2.CV_32F, 1, 0, ksize=1) / 2,
        cv2.Sobel(blurred, cv2.CV_32F, 0, 1, ksize=1) / 2,
    )


@dataclass(frozen=True)
class Enlargement:
    """An earlier enlargement."""

    factor: float
    """Factor by which height and width were enlarged; at least 1.2."""
    is_repeated: bool
    """Whether pixels were repeated (nearest neighbour) and not interpolated."""


def find_enlargement(
    luma: Plane, noise: float = 0.0, grid: tuple[int, int] | None = None
) -> Enlargement | None:
    """Find an earlier enlargement by a factor of at least 1.2; `None` if there is none.

    `luma` is float32 (height, width), not rounded; `noise` its noise level. With the `grid` of JPEG
    blocks, periods that divide 8 pixels (factors 2, 4, 4/3, 8/5 and 8/3) are ignored, because JPEG
    causes them itself, and so are repeated pixels.
    """
    if min(luma.shape) < 64:
        return None
    if grid is None:
        repeated = _repetition(luma, noise)
        if repeated >= 1.2:
            return Enlargement(repeated, is_repeated=True)
    frequency, peak = _peak(luma, 2, grid)
    if peak < _MIN_PEAK:
        frequency, peak = _peak(luma, 1, grid)
        if frequency < 0.49 or peak < _MIN_TURNS:
            return None
        if peak < _MIN_PEAK and _loss(luma, 2.0, noise) > _MAX_TURNS_LOSS:
            return None
    # Two factors have the same period; a fourfold enlargement may also show half its period.
    small, large = (2.0, 4.0) if frequency > 0.49 else (1 / (1 - frequency), 1 / frequency)
    if _loss(luma, large, noise) < _MAX_LOSS:
        return Enlargement(large, is_repeated=False)
    # An image that was shrunk, for example to 3/4, also has a period, but has fine detail too.
    if _loss(luma, small, noise) < _MAX_SMALL_LOSS:
        return Enlargement(small, is_repeated=False)
    return None


def _repetition(luma: Plane, noise: float) -> float:
    """Return the factor of an enlargement by repeating pixels (nearest neighbour), else 1."""
    factors = []
    for axis in (1, 0):
        squares = np.diff(luma, axis=axis) ** 2
        squares = np.minimum(squares, np.quantile(squares[::7, ::7], 0.98) + 1e-6)
        steps = squares.mean(axis=1 - axis, dtype=np.float64) - 2 * noise**2
        doubt = 8 * noise**2 / np.sqrt(luma.shape[1 - axis])
        is_step = steps > max(_REPEATED * np.quantile(steps, 0.9), doubt)
        if steps.max() <= 0 or not is_step.any():
            return 1.0
        distances = np.diff(np.flatnonzero(is_step))
        if len(distances) < 8:
            return 1.0
        typical = np.quantile(distances, 0.9)
        if typical > 2 * distances.mean():  # an image with large uniform areas
            return 1.0
        factors.append(float(distances[distances <= typical].mean()))
    return factors[0] if abs(factors[0] - factors[1]) < 0.05 * factors[0] else 1.0


def _peak(luma: Plane, order: int, grid: tuple[int, int] | None) -> tuple[float, float]:
    """Return (frequency, height relative to neighbouring frequencies) of the highest peak."""
    power = _power(luma, order, 1, grid) + _power(luma, order, 0, grid)
    frequencies = np.arange(len(power)) / _NUM_FREQUENCIES
    width = _NUM_FREQUENCIES // 16
    padded = np.pad(power, width, mode="reflect")
    around = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * width + 1), axis=1)
    heights = np.where(frequencies > _LOWEST, power / np.maximum(around, 1e-12), 0)
    if grid is not None:
        eighths = np.abs(frequencies * 8 - np.rint(frequencies * 8)) < 0.05
        heights[eighths] = 0
    best = int(np.argmax(heights))
    return float(frequencies[best]), float(heights[best])


def _power(luma: Plane, order: int, axis: int, grid: tuple[int, int] | None) -> NDArray[np.float64]:
    """Return the power spectrum of the log of the mean |difference| along an axis."""
    differences = np.abs(np.diff(luma, n=order, axis=axis))
    # Limit strong edges, which are not periodic.
    differences = np.minimum(differences, np.quantile(differences[::7, ::7], 0.95) + 1e-6)
    levels = np.log(differences.mean(axis=1 - axis, dtype=np.float64) + _LEAST)
    trend = np.convolve(
        np.pad(levels, _TREND // 2, mode="reflect"), np.ones(_TREND) / _TREND, "valid"
    )
    levels = levels - trend
    if grid is not None:
        for phase in range(8):
            levels[phase::8] -= levels[phase::8].mean()
    window = np.hanning(len(levels))
    if len(levels) > _NUM_FREQUENCIES:
        levels, window = levels[:_NUM_FREQUENCIES], np.hanning(_NUM_FREQUENCIES)
    return np.abs(np.fft.rfft(levels * window, _NUM_FREQUENCIES)) ** 2 / (window**2).sum()


def _loss(luma: Plane, factor: float, noise: float) -> float:
    """Return how much detail is lost by reducing by `factor` and enlarging again.

    The result is relative to what a blur of similar strength removes. The share of the noise is
    subtracted from both.
    """
    white = np.random.default_rng(0).standard_normal((256, 256), np.float32)
    by_reducing = _lost_by_reducing(luma, factor) - noise**2 * _lost_by_reducing(white, factor)
    by_blurring = _lost_by_blurring(luma, factor) - noise**2 * _lost_by_blurring(white, factor)
    return float(np.sqrt(max(by_reducing, 0.0) / max(by_blurring, 1e-6)))


def _lost_by_reducing(luma: Plane, factor: float) -> float:
    """Return the mean square of the lost detail, for the nearby size that loses least."""
    height, width = luma.shape
    rows, columns = round(height / factor), round(width / factor)
    losses = []
    for size in itertools.product(
        range(max(1, columns - 1), columns + 2), range(max(1, rows - 1), rows + 2)
    ):
        small = cv2.resize(luma, size, interpolation=cv2.INTER_AREA)
        again = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
        losses.append(_mean_square(luma - again))
    return min(losses)


def _lost_by_blurring(luma: Plane, factor: float) -> float:
    return _mean_square(luma - cv2.GaussianBlur(luma, (0, 0), factor / 2))


def _mean_square(plane: Plane) -> float:
    return float(np.mean(plane[_BORDER:-_BORDER, _BORDER:-_BORDER] ** 2))


def reduced(luma: Plane, factor: float) -> Plane:
    """Undo an enlargement: return `luma` at 1/`factor` of its size, by area averaging."""
    height, width = luma.shape
    size = max(1, round(width / factor)), max(1, round(height / factor))
    return cv2.resize(luma, size, interpolation=cv2.INTER_AREA)
