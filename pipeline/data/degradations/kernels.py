"""Blur kernels of degradations, as float32 arrays (k, k) that sum to 1. Pure functions: nothing in
here is random.

The shapes are those of Real-ESRGAN (Wang et al., "Real-ESRGAN: Training Real-World Blind
Super-Resolution with Pure Synthetic Data", ICCVW 2021): with d = (x, y) the offset from the middle
in pixels, x along a row, and S = R(theta) diag(sigma_x^2, sigma_y^2) R(theta)^T, all are functions
of q = d^T S^-1 d.

DALI's `fn.filter` correlates: tap [i, j] weighs the pixel i - k // 2 rows below and j - k // 2
columns to the right. Only `offset_gaussian` is not its own mirror image, and is laid out for that.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Kernel = NDArray[np.float32]
Grid = NDArray[np.float64]


def gaussian_kernel(size: int, sigma_x: float, sigma_y: float, theta: float) -> Kernel:
    """exp(-q / 2), (size, size). Sigmas above 0, in pixels; theta in radians, from the x axis
    towards the y axis."""
    return _normalised(np.exp(-0.5 * _quadratic(size, sigma_x, sigma_y, theta)))


def generalized_kernel(
    size: int, sigma_x: float, sigma_y: float, theta: float, beta: float
) -> Kernel:
    """exp(-q^beta / 2): the Gaussian at beta 1, more pointed below, flatter with steeper sides
    above."""
    return _normalised(np.exp(-0.5 * _quadratic(size, sigma_x, sigma_y, theta) ** beta))


def plateau_kernel(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> Kernel:
    """1 / (1 + q^beta): flat in the middle, with long tails."""
    return _normalised(1 / (1 + _quadratic(size, sigma_x, sigma_y, theta) ** beta))


def sinc_kernel(size: int, cutoff: float) -> Kernel:
    """The circular low-pass filter, cutoff J1(cutoff r) / (2 pi r), cut off at the square's sides:
    it rings.

    cutoff in radians a pixel, above 0 and up to pi.
    """
    from scipy.special import j1

    radii, places = _radii(size)
    values = np.empty_like(radii)
    values[0] = cutoff * cutoff / (4 * math.pi)  # the limit at r = 0
    values[1:] = cutoff / (2 * math.pi) * j1(cutoff * radii[1:]) / radii[1:]
    return _normalised(values[places])


def delta_kernel(size: int = 1) -> Kernel:
    """The kernel that changes nothing, for samples that are not blurred."""
    _middle(size)
    kernel = np.zeros((size, size), np.float32)
    kernel[size // 2, size // 2] = 1
    return kernel


def offset_gaussian(sigma: float, scale: int) -> Kernel:
    """A Gaussian of `sigma` pixels to be followed by taking the pixels scale // 2 + i scale, as
    DALI's nearest does.

    An LR pixel's centre lies at HR coordinate scale i + (scale - 1) / 2: on the pixel taken if the
    scale is odd, half a pixel before it if even. So there the kernel's centre lies half a pixel
    before its middle. Side 2 ceil(4 sigma) + 1 for odd scales, two more for even ones.
    """
    even = scale % 2 == 0
    radius = math.ceil(4 * sigma) + even
    squares = (np.arange(-radius, radius + 1) + 0.5 * even) ** 2
    # The nearest tap is held at 1, lest with a tiny sigma all of them vanish.
    line = np.exp((squares.min() - squares) / (2 * sigma * sigma))
    return _normalised(np.outer(line, line))


def with_box(kernel: Kernel, ratio: float) -> Kernel:
    """`kernel` widened so that linear sampling without antialias after it averages areas. ratio:
    input / output size.

    Averaging `ratio` pixels has the variance (ratio^2 - 1) / 12, and linear sampling brings a part
    of it along: with the sample point at the fraction t between two pixels t (1 - t), which is 0 if
    the ratio is an odd integer, 1/4 if even, and 1/6 on average otherwise. A box of the rest is
    what the kernel is convolved with along both axes: of width b with b^2 = ratio^2 - 0, 3 or 2.
    Below b = 1 linear sampling is wide enough and the kernel stays.
    """
    whole = float(ratio).is_integer()
    linear = (0 if ratio % 2 else 3) if whole else 2
    width = math.sqrt(max(ratio * ratio - linear, 1))
    if width == 1:
        return kernel
    box, size = _box(width), len(kernel)
    # Each row holds the box one column further right than the row above: rows of one less than what
    # was written.
    band = np.zeros((size, size + len(box)), np.float32)
    band[:, : len(box)] = box
    band = band.ravel()[: size * (size + len(box) - 1)].reshape(size, -1)
    return _normalised(band.T @ kernel @ band)


def _box(width: float) -> NDArray[np.float32]:
    """An odd number of equal taps but for the outermost two, which hold what of `width` is left.
    Sums to 1."""
    side = math.ceil((width - 1) / 2)
    box = np.full(2 * side + 1, 1 / width, np.float32)
    box[0] = box[-1] = (width - (2 * side - 1)) / 2 / width
    return box


def _quadratic(size: int, sigma_x: float, sigma_y: float, theta: float) -> Grid:
    """q = d^T S^-1 d on the grid of a kernel."""
    xx, xy, yy = _grid(size)
    cos, sin = math.cos(theta), math.sin(theta)
    along, across = 1 / (sigma_x * sigma_x), 1 / (sigma_y * sigma_y)
    quadratic = (cos * cos * along + sin * sin * across) * xx
    quadratic += (2 * cos * sin * (along - across)) * xy
    quadratic += (sin * sin * along + cos * cos * across) * yy
    # Far out on a thin kernel the sum of three large terms may come out a rounding error below 0.
    return np.maximum(quadratic, 0, out=quadratic)


def _middle(size: int) -> int:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"a kernel of side {size} has no middle; the side must be odd")
    return size // 2


@lru_cache(maxsize=64)
def _grid(size: int) -> tuple[Grid, Grid, Grid]:
    """x^2, x y and y^2 of the offsets from the middle."""
    line = np.arange(size, dtype=np.float64) - _middle(size)
    grid = (
        np.tile(line * line, (size, 1)),
        np.outer(line, line),
        np.tile((line * line)[:, None], (1, size)),
    )
    for part in grid:
        part.setflags(write=False)
    return grid


@lru_cache(maxsize=64)
def _radii(size: int) -> tuple[Grid, NDArray[np.intp]]:
    """(The different distances from the middle, rising from 0; which of them each place of the
    kernel has)."""
    xx, _, yy = _grid(size)
    squares, places = np.unique(xx + yy, return_inverse=True)
    radii, places = np.sqrt(squares), places.reshape(size, size)  # flat before numpy 2
    radii.setflags(write=False)
    places.setflags(write=False)
    return radii, places


def _normalised(values: NDArray[np.floating]) -> Kernel:
    return (values / values.sum()).astype(np.float32)
