"""Degradation operators for one image on a CPU, with OpenCV, NumPy and libjpeg-turbo.

They compute the same as the DALI nodes of `base` and `noise`, up to rounding, in a fraction of the
time: DALI's filter takes as long for 3 taps as for 21. Images are (height, width, 3) in levels
0..255, as bytes or as float32 that is not clipped. All operators release the GIL.

A result is stored in the `Workspace` passed to the function, and is valid until the workspace is
used for the same purpose again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.data.degradations.kernels import Kernel
from pipeline.data.degradations.noise import GRAY, PHOTONS, NoiseKeys, normal_table, poisson_table
from pipeline.libraries import cv2

Levels = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Share of a kernel's absolute weight that may be dropped: an error of at most 0.2 levels in
# photographs, 0.006 on average.
TAIL = 2e-3
MAX_DIRECT_TAPS = 129  # largest number of taps that OpenCV filters without a Fourier transform
# Measured costs of filtering. In ns per value: one tap of a 2D kernel, one tap of a 1D kernel,
# adding another separable term, and a Fourier transform in both directions. In us: one call, and
# one SVD.
NS_DIRECT, NS_LINE, NS_ADD, NS_FOURIER = 0.038, 0.043, 0.1, 13.0
US_CALL, US_SVD = 5.0, 80.0
ONE_THREAD = 2**18  # multiplications in a matrix product up to which OpenBLAS uses one thread


class Workspace:
    """Buffers of one thread that are kept from image to image.

    The operating system must zero every new page, which costs more than most operators.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, np.dtype[Any]], NDArray[Any]] = {}
        self.seconds: dict[str, float] = {}  # time that each kind of step has taken so far

    def took(self, step: str, seconds: float) -> None:
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds

    def array(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: Any = np.float32,
        *,
        apart_from: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Return an uninitialised array in the buffer of the last one with this name and dtype.

        A buffer that shares memory with `apart_from` is not reused; the array then gets a separate
        one.
        """
        key, count = (name, np.dtype(dtype)), math.prod(shape)
        kept = self._kept.get(key)
        if kept is not None and apart_from is not None and np.may_share_memory(kept, apart_from):
            return self.array(f"{name} again", shape, dtype)
        if kept is None or kept.size < count:
            kept = self._kept[key] = np.empty(count, dtype)
        return kept[:count].reshape(shape)


# Filters.


class SeparableTerm(NamedTuple):
    """A kernel, or one term of it, as the outer product of a column and a row."""

    column: Kernel
    row: Kernel


def filtered(image: Levels | Bytes, kernel: Kernel, workspace: Workspace) -> Levels:
    """Filter `image` with `kernel`, which sums to 1, mirroring the borders.

    Tap [i, j] weighs the pixel i - k // 2 rows below. Up to `TAIL` of the kernel's weight may be
    dropped; the remaining taps are scaled up for it.
    """
    levels = _as_levels(image, workspace)
    kernel = trimmed(kernel)
    if kernel.size == 1:
        return levels
    out = workspace.array("filtered", levels.shape, apart_from=levels)
    whole = (
        NS_DIRECT * kernel.size if kernel.size <= MAX_DIRECT_TAPS else NS_FOURIER
    ) * levels.size / 1000 + US_CALL
    lines = separable_terms(kernel, levels.size, most=whole)
    if not lines:
        return cv2.filter2D(levels, cv2.CV_32F, kernel, dst=out, borderType=cv2.BORDER_REFLECT_101)
    across, part = (
        workspace.array("across", levels.shape),
        workspace.array("line", levels.shape) if len(lines) > 1 else out,
    )
    for i, (column, row) in enumerate(lines):  # two calls of filter2D are faster than sepFilter2D
        cv2.filter2D(levels, cv2.CV_32F, row[None], dst=across, borderType=cv2.BORDER_REFLECT_101)
        target = part if i else out
        cv2.filter2D(
            across, cv2.CV_32F, column[:, None], dst=target, borderType=cv2.BORDER_REFLECT_101
        )
        if i:
            cv2.add(out, part, dst=out)
    return out


def trimmed(kernel: Kernel) -> Kernel:
    """Cut rows and columns off the edges of a kernel of odd sides; the result sums to 1.

    Together they hold less than `TAIL` of its absolute weight.
    """
    weights = np.abs(kernel)
    allowed = TAIL / 2 * weights.sum()
    down, across = (_radius(weights.sum(axis), allowed) for axis in (1, 0))
    middle_y, middle_x = (side // 2 for side in kernel.shape)
    middle = kernel[
        middle_y - down : middle_y + down + 1, middle_x - across : middle_x + across + 1
    ]
    return middle / middle.sum()


def _radius(line: NDArray[np.float32], allowed: float) -> int:
    """Return the smallest radius around the middle such that at most `allowed` lies beyond it."""
    middle = len(line) // 2
    rings = line[middle:] + line[middle::-1]
    beyond = np.cumsum(rings[::-1])[::-1]  # from each ring on
    return int(np.count_nonzero(beyond[1:] > allowed))


def separable_terms(kernel: Kernel, values: int, most: float) -> list[SeparableTerm]:
    """Decompose a kernel into a sum of separable terms, up to `TAIL` of its weight.

    Returns an empty list if filtering `values` values with the terms takes longer than `most` us.
    """
    each = (NS_LINE * sum(kernel.shape) + NS_ADD) * values / 1000 + 3 * US_CALL
    allowed = TAIL * np.abs(kernel).sum()
    if each > most:
        return []
    column, row = kernel.sum(1), kernel.sum(0)
    # True for most kernels: isotropic Gaussians and boxes.
    if np.abs(kernel - np.outer(column, row)).sum() <= allowed:
        return [SeparableTerm(column, row)]
    if 2 * each + US_SVD > most:
        return []
    columns, weights, rows = np.linalg.svd(kernel.astype(np.float64))
    rest, lines = kernel.astype(np.float64), []
    for i in range(min(int((most - US_SVD) / each), len(weights))):
        column, row = columns[:, i] * weights[i], rows[i]
        lines.append(SeparableTerm(column.astype(np.float32), row.astype(np.float32)))
        rest -= np.outer(column, row)
        if np.abs(rest).sum() <= allowed:
            return lines
    return []


# Sizes.


def resized(
    image: Levels | Bytes, size: tuple[int, int], *, is_cubic: bool, workspace: Workspace
) -> Levels:
    """Resize `image` to `size` (height, width) without antialiasing, linearly or by Keys' cubic.

    The cubic has a = -0.5.
    """
    levels = _as_levels(image, workspace)
    if size == levels.shape[:2]:  # the sample points coincide with the pixels
        return levels
    if not is_cubic:
        out = workspace.array("resized", (*size, 3), apart_from=levels)
        return cv2.resize(levels, size[::-1], dst=out, interpolation=cv2.INTER_LINEAR)
    return _by_weights(levels, size, cubic_weights, workspace)  # OpenCV's own cubic has a = -0.75


def resampled(
    image: Levels | Bytes, size: tuple[int, int], kernel: str, workspace: Workspace
) -> Levels:
    """Resize `image` to `size` (height, width) with a kernel of `RESAMPLING`.

    Along a side that shrinks, the kernel is widened by the ratio of the sizes, for antialiasing.
    """
    levels = _as_levels(image, workspace)
    if size == levels.shape[:2]:
        return levels
    return _by_weights(levels, size, partial(resampling_weights, kernel), workspace)


Blocks = list[tuple[int, int, Levels]]
"""A banded matrix of weights as blocks of rows: (first output row, first input row, weights).

Small blocks stay close to the diagonal.
"""


def _by_weights(
    levels: Levels,
    size: tuple[int, int],
    weights: Callable[[int, int], Blocks],
    workspace: Workspace,
) -> Levels:
    """Resize rows and columns by the matrices that `weights(length, new length)` returns."""
    # Start with the direction that leaves fewer pixels for the other.
    down, across = (
        weights(length, new) for length, new in zip(levels.shape[:2], size, strict=True)
    )
    if size[0] * levels.shape[1] <= levels.shape[0] * size[1]:
        rows = _rows_resized(levels, size[0], down, "rows", workspace)
        turned = _rows_resized(
            _turned(rows, "turned", workspace), size[1], across, "rows", workspace
        )
        return _turned(turned, "resized", workspace, apart_from=levels)
    turned = _turned(levels, "turned", workspace)
    rows = _turned(_rows_resized(turned, size[1], across, "rows", workspace), "turned", workspace)
    return _rows_resized(rows, size[0], down, "resized", workspace, apart_from=levels)


def _turned(
    levels: Levels, name: str, workspace: Workspace, apart_from: Levels | None = None
) -> Levels:
    height, width = levels.shape[:2]
    return cv2.transpose(
        levels, dst=workspace.array(name, (width, height, 3), apart_from=apart_from)
    )


def _rows_resized(
    levels: Levels,
    size: int,
    blocks: Blocks,
    name: str,
    workspace: Workspace,
    apart_from: Levels | None = None,
) -> Levels:
    """Resize the rows of (height, width, 3) levels to (size, width, 3)."""
    height, width = levels.shape[:2]
    rows, out = (
        levels.reshape(height, width * 3),
        workspace.array(name, (size, width * 3), apart_from=apart_from),
    )
    columns = max(16, ONE_THREAD // blocks[0][2].size)
    for left in range(0, width * 3, columns):
        part, target = rows[:, left : left + columns], out[:, left : left + columns]
        for at, first, weights in blocks:
            np.matmul(
                weights,
                part[first : first + weights.shape[1]],
                out=target[at : at + len(weights)],
            )
    return out.reshape(size, width, 3)


@lru_cache(maxsize=256)
def cubic_weights(length: int, size: int) -> Blocks:
    """Return the weights of Keys' cubic (a = -0.5), with borders repeated."""
    centres = (np.arange(size) + 0.5) * (length / size) - 0.5
    places = np.floor(centres).astype(int)[:, None] + np.arange(-1, 3)
    weights = _keys(np.abs(centres[:, None] - places))
    return _blocks(places.clip(0, length - 1), weights, length)


def _keys(d: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Keys' cubic (a = -0.5) at the distances `d`, which must not exceed 2."""
    return np.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)


def _mitchell(d: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cubic of Mitchell and Netravali (SIGGRAPH 1988) with B = C = 1/3 at `d`."""
    near = (7 * d - 12) * d * d + 16 / 3
    return np.where(d < 1, near, ((-7 / 3 * d + 12) * d - 20) * d + 32 / 3) / 6


class Resampling(NamedTuple):
    """A kernel: its radius in pixels, its values within the radius, and its border handling."""

    radius: int
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    mirrors: bool  # borders are mirrored, as in MATLAB; otherwise left out, as in Pillow


RESAMPLING: dict[str, Resampling] = {
    "cubic_antialiased": Resampling(2, _keys, True),  # MATLAB's imresize
    "hermite": Resampling(1, lambda d: (2 * d - 3) * d * d + 1, False),
    "lanczos": Resampling(3, lambda d: np.sinc(d) * np.sinc(d / 3), False),  # Pillow's LANCZOS
    "mitchell": Resampling(2, _mitchell, False),
}


@lru_cache(maxsize=512)
def resampling_weights(kernel: str, length: int, size: int) -> Blocks:
    """Return the weights of a kernel of `RESAMPLING`, antialiased; each row sums to 1."""
    radius, value, mirrors = RESAMPLING[kernel]
    wide = max(1.0, length / size)
    centres = (np.arange(size) + 0.5) * (length / size) - 0.5
    reach = math.ceil(radius * wide)
    places = np.floor(centres).astype(int)[:, None] + np.arange(-reach, reach + 2)
    d = np.abs(centres[:, None] - places) / wide
    weights = np.where(d < radius, value(np.minimum(d, radius)), 0)
    if mirrors:
        places %= 2 * length
        places = np.minimum(places, 2 * length - 1 - places)
    else:
        weights[(places < 0) | (places >= length)] = 0
        places = places.clip(0, length - 1)
    return _blocks(places, weights / weights.sum(1, keepdims=True), length)


def _blocks(places: NDArray[np.intp], weights: NDArray[np.float64], length: int) -> Blocks:
    """Return the matrix whose row i has weights[i, t] in column places[i, t], as blocks."""
    size, taps = places.shape
    step, rows = 8 if length < 2 * size else 4, np.arange(size)
    whole = np.pad(places, ((0, -size % step), (0, 0)), "edge").reshape(-1, step * taps)
    starts = whole.min(1)
    reach = int((whole.max(1) - starts).max()) + 1
    starts = np.minimum(starts, length - reach)
    blocks = np.zeros((len(starts), step, reach), np.float32)
    for tap in range(taps):  # weights at the same place add up
        blocks[rows // step, rows % step, places[:, tap] - starts[rows // step]] += weights[:, tap]
    return [(i * step, int(start), blocks[i, : size - i * step]) for i, start in enumerate(starts)]


class Taps(NamedTuple):
    """Weighted sums along one axis: sum i adds weights[i, t] times the value at places[i, t]."""

    places: NDArray[np.intp]
    weights: NDArray[np.float32]


def cubic_taps(centres: NDArray[np.float64], length: int) -> Taps:
    """Return the taps of Keys' cubic (a = -0.5) at positions in pixels; borders are repeated."""
    places = np.floor(centres).astype(np.intp)[:, None] + np.arange(-1, 3)
    weights = _keys(np.abs(centres[:, None] - places))
    return Taps(places.clip(0, length - 1), weights.astype(np.float32))


def sampled(image: Levels, down: Taps | None, across: Taps | None) -> Levels:
    """Return sums of rows and columns, (len(down.places), len(across.places), channels) or 2D.

    None leaves a direction unchanged. If many pixels are summed, matrices as in `resampled` are
    faster.
    """
    if down is not None:
        image = _summed_rows(image, down)
    if across is not None:
        turned = cv2.transpose(np.ascontiguousarray(image))
        image = cv2.transpose(_summed_rows(turned, across))
    return image


def shifted(image: Levels, offset: tuple[float, float]) -> Levels:
    """Move (height, width, channels) or 2D levels down and to the right, with Keys' cubic.

    offset: in pixels, of any sign. Borders are repeated. Returns a new array, unless nothing moves.
    """
    down, across = (
        cubic_taps(np.arange(length) - distance, length) if distance else None
        for length, distance in zip(image.shape, offset, strict=False)
    )
    return sampled(image, down, across)


def _summed_rows(image: Levels, taps: Taps) -> Levels:
    weights = taps.weights.reshape(*taps.weights.shape, *[1] * (image.ndim - 1))
    total = image[taps.places[:, 0]]
    total *= weights[:, 0]
    for tap in range(1, taps.places.shape[1]):
        part = image[taps.places[:, tap]]
        part *= weights[:, tap]
        total += part
    return total


# Noise.


def with_gaussian(image: Levels, keys: NoiseKeys, sigma: float, workspace: Workspace) -> Levels:
    """Add noise of standard deviation `sigma` in place, with 3 channels or the same one in all."""
    z = standard_normal(keys, workspace)
    return cv2.scaleAdd(in_all_channels(z, workspace), sigma, image, dst=image)


def with_poisson(image: Levels, keys: NoiseKeys, scale: float, workspace: Workspace) -> Levels:
    """Add the noise of `noise.add_poisson` in place; keys with one channel use the gray image."""
    z = standard_normal(keys, workspace)
    seen = (
        image if z.ndim == 3 else cv2.transform(image, _GRAY, dst=workspace.array("gray", z.shape))
    )
    levels = rounded(seen, workspace)
    base, slope = _poisson_luts()
    counts, part = workspace.array("counts", z.shape), workspace.array("part", z.shape)
    cv2.scaleAdd(z, 1 / 6, cv2.LUT(levels, slope, dst=part), dst=counts)
    cv2.multiply(counts, z, dst=counts)
    cv2.add(counts, cv2.LUT(levels, base, dst=part), dst=counts)
    cv2.threshold(np.rint(counts, out=counts), 0, 0, cv2.THRESH_TOZERO, dst=counts)
    # Add scale * (counts / PHOTONS - levels).
    part[...] = levels
    cv2.scaleAdd(part, -PHOTONS, counts, dst=counts)
    return cv2.scaleAdd(in_all_channels(counts, workspace), scale / PHOTONS, image, dst=image)


def standard_normal(keys: NoiseKeys, workspace: Workspace) -> Levels:
    """Return the white noise of `noise.standard_normal` for a sample's keys.

    The shape is (height, width, 3), or (height, width) for one channel.
    """
    height, width, channels = len(keys.rows), *keys.columns.shape[1:]
    shape = (height, width, 3) if channels == 3 else (height, width)
    return cv2.LUT(quantiles(keys, workspace), _normal_lut(), dst=workspace.array("normal", shape))


def quantiles(keys: NoiseKeys, workspace: Workspace) -> NDArray[np.uint16]:
    """Return the upper 16 bits of a sample's words, (height, width, 3) or (height, width)."""
    height, width, channels = len(keys.rows), *keys.columns.shape[1:]
    words = np.multiply(
        keys.rows, keys.columns, out=workspace.array("words", (height, width, channels), np.uint32)
    )
    halves = words.view(np.uint16).reshape(height, width * channels, 2)
    upper = cv2.extractChannel(
        halves,
        int(sys.byteorder == "little"),
        dst=workspace.array("quantiles", (height, width * channels), np.uint16),
    )
    return upper.reshape((height, width, 3) if channels == 3 else (height, width))


def in_all_channels(plane: Levels, workspace: Workspace) -> Levels:
    """Return (height, width) values as three equal channels, and three channels unchanged."""
    if plane.ndim == 3:
        return plane
    return cv2.cvtColor(
        plane, cv2.COLOR_GRAY2RGB, dst=workspace.array("channels", (*plane.shape, 3))
    )


_GRAY = np.array([GRAY], np.float32)


@lru_cache(maxsize=1)
def _normal_lut() -> Levels:
    return np.array(normal_table(), np.float32)


@lru_cache(maxsize=1)
def _poisson_luts() -> tuple[Levels, Levels]:
    table = poisson_table()
    return np.array(table.base, np.float32), np.array(table.slope, np.float32)


# Bytes.


def rounded(image: Levels | Bytes, workspace: Workspace) -> Bytes:
    """Return the nearest levels, clipped to 0..255, as bytes."""
    if image.dtype == np.uint8:
        return image
    # Clip negative levels first, because convertScaleAbs would take their absolute value.
    _, positive = cv2.threshold(
        image, 0, 0, cv2.THRESH_TOZERO, dst=workspace.array("positive", image.shape)
    )
    return cv2.convertScaleAbs(positive, dst=workspace.array("bytes", image.shape, np.uint8))


def rounded_as(region: Levels | Bytes, image: Levels | Bytes, workspace: Workspace) -> Any:
    """Return the image that was made from a region: as bytes if the region is, else unchanged.

    In a run of 16 bits, whose regions are float32 levels, the caller rounds to these.
    """
    return rounded(image, workspace) if region.dtype == np.uint8 else image


def in_depth(image: Levels | Bytes, depth: int, workspace: Workspace) -> Bytes | NDArray[np.uint16]:
    """Return levels as pixels of `depth` bits, 8 or 16, clipped and rounded to the nearest."""
    if depth == 8:
        return rounded(image, workspace)
    out = workspace.array("deep", image.shape, np.uint16)
    if image.dtype == np.uint8:
        return np.multiply(image, np.uint16(257), out=out)
    scaled = np.multiply(image, np.float32(257), out=workspace.array("scaled", image.shape))
    np.clip(np.rint(scaled, out=scaled), 0, 65535, out=scaled)
    np.copyto(out, scaled, casting="unsafe")
    return out


def levels_of(pixels: Bytes | NDArray[np.uint16], workspace: Workspace) -> Levels | Bytes:
    """Return uint16 pixels as float32 levels that may be overwritten; uint8 pixels unchanged."""
    if pixels.dtype == np.uint8:
        return pixels
    return np.multiply(
        pixels, np.float32(1 / 257), out=workspace.array("region", pixels.shape), dtype=np.float32
    )


def through_jpeg(
    image: Levels | Bytes, quality: int, workspace: Workspace, subsampling: str = "420"
) -> Bytes:
    """Round the levels and compress them with JPEG by OpenCV; 4:2:0 as DALI does.

    `subsampling` is 444, 440, 422, 420 or 411.
    """
    pixels = rounded(image, workspace)
    pixels = cv2.cvtColor(
        pixels, cv2.COLOR_RGB2BGR, dst=workspace.array("blue first", image.shape, np.uint8)
    )
    sampling = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{subsampling}")
    _, data = cv2.imencode(
        ".jpg",
        pixels,
        [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling],
    )
    return simplejpeg.decode_jpeg(
        data, "RGB", buffer=workspace.array("decoded", image.shape, np.uint8)
    )


def _as_levels(image: Levels | Bytes, workspace: Workspace) -> Levels:
    if image.dtype == np.float32:
        return image
    levels = workspace.array("levels", image.shape)
    levels[...] = image
    return levels
