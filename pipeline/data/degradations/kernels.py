"""Blur kernels as float32 arrays (k, k) that sum to 1; pure functions without randomness.

The shapes are those of Real-ESRGAN (Wang et al., "Real-ESRGAN: Training Real-World Blind
Super-Resolution with Pure Synthetic Data", ICCVW 2021). With d = (x, y) the offset from the middle
in pixels, x along a row, and S = R(theta) diag(sigma_x^2, sigma_y^2) R(theta)^T, all of them are
functions of q = d^T S^-1 d.

DALI's `fn.filter` correlates: tap [i, j] weighs the pixel i - k // 2 rows below and j - k // 2
columns to the right. Only `offset_gaussian` is asymmetric, and its layout follows that rule.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Kernel = NDArray[np.float32]
Grid = NDArray[np.float64]


def gaussian_kernel(size: int, sigma_x: float, sigma_y: float, theta: float) -> Kernel:
    """exp(-q / 2), (size, size).

    Sigmas are above 0, in pixels; theta is in radians, from the x axis towards the y axis.
    """
    return _normalised(np.exp(-0.5 * _quadratic(size, sigma_x, sigma_y, theta)))


def generalized_kernel(
    size: int, sigma_x: float, sigma_y: float, theta: float, beta: float
) -> Kernel:
    """exp(-q^beta / 2): a Gaussian if beta is 1, more pointed below, flatter and steeper above."""
    return _normalised(np.exp(-0.5 * _quadratic(size, sigma_x, sigma_y, theta) ** beta))


def plateau_kernel(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> Kernel:
    """1 / (1 + q^beta): flat in the middle, with long tails."""
    return _normalised(1 / (1 + _quadratic(size, sigma_x, sigma_y, theta) ** beta))


def sinc_kernel(size: int, cutoff: float) -> Kernel:
    """Circular low-pass filter, cutoff J1(cutoff r) / (2 pi r), truncated to the square; it rings.

    `cutoff` is in radians per pixel, above 0 and at most pi.
    """
    from scipy.special import j1

    radii, places = _radii(size)
    values = np.empty_like(radii)
    values[0] = cutoff * cutoff / (4 * math.pi)  # the limit at r = 0
    values[1:] = cutoff / (2 * math.pi) * j1(cutoff * radii[1:]) / radii[1:]
    return _normalised(values[places])


def box_kernel(width: float) -> Kernel:
    """Mean of a square of `width` pixels, at least 1, with partial taps at its edges."""
    line = _box(width)
    return _normalised(np.outer(line, line))


def disc_kernel(radius: float) -> Kernel:
    """Mean of a disc of `radius` pixels, at least 0.5: the blur of a lens that is out of focus.

    Each tap is the area of the disc within its pixel, integrated along x exactly and along y over
    16 lines per pixel.
    """
    reach = math.ceil(radius - 0.5)
    lines = (np.arange(16 * (2 * reach + 1)) + 0.5) / 16 - reach - 0.5
    half = np.sqrt(np.maximum(radius * radius - lines * lines, 0))[:, None]
    x = np.arange(-reach, reach + 1)
    covered = np.maximum(np.minimum(x + 0.5, half) - np.maximum(x - 0.5, -half), 0)
    return _normalised(covered.reshape(2 * reach + 1, 16, -1).mean(1))


def motion_kernel(length: float, theta: float) -> Kernel:
    """Mean along a line of `length` pixels, at least 1, at `theta` radians from x towards y.

    With u and v the distances from its middle along and across the line, taps are min(1, (length +
    1) / 2 - |u|) (1 - |v|), clipped at 0: the line is antialiased and about one pixel thick.
    """
    reach = math.ceil((length - 1) / 2 + 1)
    line = np.arange(-reach, reach + 1)
    x, y = line[None], line[:, None]
    along = np.abs(math.cos(theta) * x + math.sin(theta) * y)
    across = np.abs(math.cos(theta) * y - math.sin(theta) * x)
    return _normalised(((length + 1) / 2 - along).clip(0, 1) * (1 - across).clip(0))


def line_sinc(cutoff: float, lobes: int) -> NDArray[np.float32]:
    """sin(cutoff x) / (pi x) in one dimension, truncated after `lobes` zeros on each side.

    `cutoff` is in radians per pixel, above 0 and at most pi.
    """
    reach = math.ceil(lobes * math.pi / cutoff) - 1
    return _normalised(np.sinc(cutoff / math.pi * np.arange(-reach, reach + 1)))


def delta_kernel(size: int = 1) -> Kernel:
    """Identity kernel, for samples that are not blurred."""
    _middle(size)
    kernel = np.zeros((size, size), np.float32)
    kernel[size // 2, size // 2] = 1
    return kernel


def offset_gaussian(sigma: float, scale: int) -> Kernel:
    """Gaussian of `sigma` pixels to blur with before decimation, aligned for DALI's nearest.

    Decimation takes the pixels scale // 2 + i scale. The centre of an LR pixel has the HR
    coordinate scale i + (scale - 1) / 2: that is the sampled pixel if the scale is odd, and half a
    pixel before it if even. For even scales, the kernel is therefore centred half a pixel before
    its middle. The side is 2 ceil(4 sigma) + 1 for odd scales and two more for even ones.
    """
    even = scale % 2 == 0
    radius = math.ceil(4 * sigma) + even
    squares = (np.arange(-radius, radius + 1) + 0.5 * even) ** 2
    # Keep the nearest tap at 1, because all taps would underflow for a tiny sigma.
    line = np.exp((squares.min() - squares) / (2 * sigma * sigma))
    return _normalised(np.outer(line, line))


def with_box(kernel: Kernel, ratio: float) -> Kernel:
    """Widen `kernel` so that linear sampling without antialiasing after it averages areas.

    `ratio` is input size / output size. Averaging `ratio` pixels has the variance (ratio^2 - 1) /
    12. Linear sampling at the fraction t between two pixels contributes t (1 - t) of it: 0 if the
    ratio is an odd integer, 1/4 if it is even, and 1/6 on average otherwise. The kernel is
    convolved along both axes with a box for the rest, of width b with b^2 = ratio^2 - 0, 3 or 2. If
    b is below 1, linear sampling is wide enough and the kernel is returned unchanged.
    """
    whole = float(ratio).is_integer()
    linear = (0 if ratio % 2 else 3) if whole else 2
    width = math.sqrt(max(ratio * ratio - linear, 1))
    if width == 1:
        return kernel
    box, size = _box(width), len(kernel)
    # A banded matrix: each row is one element shorter than what was written, which shifts the box
    # one column to the right per row.
    band = np.zeros((size, size + len(box)), np.float32)
    band[:, : len(box)] = box
    band = band.ravel()[: size * (size + len(box) - 1)].reshape(size, -1)
    return _normalised(band.T @ kernel @ band)


def _box(width: float) -> NDArray[np.float32]:
    """Return an odd number of equal taps, except for the outer two, which hold the rest of `width`.

    They sum to 1.
    """
    side = math.ceil((width - 1) / 2)
    box = np.full(2 * side + 1, 1 / width, np.float32)
    box[0] = box[-1] = (width - (2 * side - 1)) / 2 / width
    return box


def _quadratic(size: int, sigma_x: float, sigma_y: float, theta: float) -> Grid:
    """Return q = d^T S^-1 d on the grid of a kernel."""
    xx, xy, yy = _grid(size)
    cos, sin = math.cos(theta), math.sin(theta)
    along, across = 1 / (sigma_x * sigma_x), 1 / (sigma_y * sigma_y)
    quadratic = (cos * cos * along + sin * sin * across) * xx
    quadratic += (2 * cos * sin * (along - across)) * xy
    quadratic += (sin * sin * along + cos * cos * across) * yy
    # Far from the middle of a thin kernel, rounding can make the sum of three large terms negative.
    return np.maximum(quadratic, 0, out=quadratic)


def _middle(size: int) -> int:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"a kernel of side {size} has no centre; the side must be odd")
    return size // 2


@lru_cache(maxsize=64)
def _grid(size: int) -> tuple[Grid, Grid, Grid]:
    """Return x^2, x y and y^2 of the offsets from the middle."""
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
    """Return (distinct distances from the middle, ascending; index of each position's distance)."""
    xx, _, yy = _grid(size)
    squares, places = np.unique(xx + yy, return_inverse=True)
    radii, places = np.sqrt(squares), places.reshape(size, size)  # numpy 1 returns them flat
    radii.setflags(write=False)
    places.setflags(write=False)
    return radii, places


def _normalised(values: NDArray[np.floating]) -> Kernel:
    return (values / values.sum()).astype(np.float32)
