"""The operators of degradations on a CPU: OpenCV, NumPy and libjpeg-turbo, for one image at a time.

They compute what the DALI nodes of `base` and `noise` compute, up to rounding, in a fraction of the
time: DALI's filter takes as long for 3 taps as for 21. Images are (height, width, 3), levels
0..255, float32 that is not clipped or bytes. All of them let other threads run meanwhile.

What a function returns lies in the `Room` that it was given, and is good until the room is used for
the same again.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.data.degradations.kernels import Kernel
from pipeline.data.degradations.noise import GRAY, PHOTONS, NoiseKeys, normal_table, poisson_table
from pipeline.libraries import cv2

Levels = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# share of a kernel's absolute weight that may be missing: 0.2 levels in photographs, 0.006 on
# average
TAIL = 2e-3
MOST_DIRECT = 129  # taps; of more, OpenCV makes a Fourier transform
# What filtering costs, measured: ns a value of each tap of a square, of each tap of a line, of
# adding a further pair of lines, and of a Fourier transform there and back; us of each call, and of
# finding several lines.
NS_DIRECT, NS_LINE, NS_ADD, NS_FOURIER = 0.038, 0.043, 0.1, 13.0
US_CALL, US_SVD = 5.0, 80.0


class Room:
    """Memory of one thread that is kept from image to image: the kernel must zero every new page,
    which costs more than most operators."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, np.dtype[Any]], NDArray[Any]] = {}

    def array(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: Any = np.float32,
        *,
        apart_from: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """An array of any content; the one that was had under this name and type before is
        overwritten, unless it is the one to be `apart_from`: then the new one has a place of its
        own."""
        key, count = (name, np.dtype(dtype)), math.prod(shape)
        kept = self._kept.get(key)
        if kept is not None and apart_from is not None and np.may_share_memory(kept, apart_from):
            return self.array(f"{name} again", shape, dtype)
        if kept is None or kept.size < count:
            kept = self._kept[key] = np.empty(count, dtype)
        return kept[:count].reshape(shape)


# Filters.


class Lines(NamedTuple):
    """A kernel, or a part of it, as a column times a row."""

    column: Kernel
    row: Kernel


def filtered(image: Levels | Bytes, kernel: Kernel, room: Room) -> Levels:
    """`image` under a kernel that sums to 1 (tap [i, j] weighs the pixel i - k // 2 rows below),
    the outermost pixels being mirrored. Of its weight `TAIL` may be missing, made up for by the
    rest."""
    levels = _as_levels(image, room)
    kernel = trimmed(kernel)
    if kernel.size == 1:
        return levels
    out = room.array("filtered", levels.shape, apart_from=levels)
    whole = (
        NS_DIRECT * kernel.size if kernel.size <= MOST_DIRECT else NS_FOURIER
    ) * levels.size / 1000 + US_CALL
    lines = as_lines(kernel, levels.size, most=whole)
    if not lines:
        return cv2.filter2D(levels, cv2.CV_32F, kernel, dst=out, borderType=cv2.BORDER_REFLECT_101)
    across, part = (
        room.array("across", levels.shape),
        room.array("line", levels.shape) if len(lines) > 1 else out,
    )
    for i, (column, row) in enumerate(lines):  # twice filter2D is faster than sepFilter2D
        cv2.filter2D(levels, cv2.CV_32F, row[None], dst=across, borderType=cv2.BORDER_REFLECT_101)
        target = part if i else out
        cv2.filter2D(
            across, cv2.CV_32F, column[:, None], dst=target, borderType=cv2.BORDER_REFLECT_101
        )
        if i:
            cv2.add(out, part, dst=out)
    return out


def trimmed(kernel: Kernel) -> Kernel:
    """The middle of a kernel of odd sides: rows and columns at its edge are left out while all of
    them hold less than `TAIL` of its absolute weight. Sums to 1."""
    weights = np.abs(kernel)
    allowed = TAIL / 2 * weights.sum()
    down, across = (_radius(weights.sum(axis), allowed) for axis in (1, 0))
    middle_y, middle_x = (side // 2 for side in kernel.shape)
    middle = kernel[
        middle_y - down : middle_y + down + 1, middle_x - across : middle_x + across + 1
    ]
    return middle / middle.sum()


def _radius(line: NDArray[np.float32], allowed: float) -> int:
    """How far from the middle the line must be kept, for at most `allowed` to lie beyond."""
    middle = len(line) // 2
    rings = line[middle:] + line[middle::-1]
    beyond = np.cumsum(rings[::-1])[::-1]  # from each ring on
    return int(np.count_nonzero(beyond[1:] > allowed))


def as_lines(kernel: Kernel, values: int, most: float) -> list[Lines]:
    """The kernel as a sum of columns times rows, up to `TAIL` of its weight; none if it costs more
    than `most` us to filter so many values with it."""
    each = (NS_LINE * sum(kernel.shape) + NS_ADD) * values / 1000 + 3 * US_CALL
    allowed = TAIL * np.abs(kernel).sum()
    if each > most:
        return []
    column, row = kernel.sum(1), kernel.sum(0)
    if (
        np.abs(kernel - np.outer(column, row)).sum() <= allowed
    ):  # of most kernels: round Gaussians, boxes
        return [Lines(column, row)]
    if 2 * each + US_SVD > most:
        return []
    columns, weights, rows = np.linalg.svd(kernel.astype(np.float64))
    rest, lines = kernel.astype(np.float64), []
    for i in range(min(int((most - US_SVD) / each), len(weights))):
        column, row = columns[:, i] * weights[i], rows[i]
        lines.append(Lines(column.astype(np.float32), row.astype(np.float32)))
        rest -= np.outer(column, row)
        if np.abs(rest).sum() <= allowed:
            return lines
    return []


# Sizes.


def resized(image: Levels | Bytes, size: tuple[int, int], *, is_cubic: bool, room: Room) -> Levels:
    """`image` in another size (height, width) by sampling without antialias, linearly or by Keys'
    cubic, a = -0.5."""
    levels = _as_levels(image, room)
    if size == levels.shape[:2]:  # the sample points are the pixels
        return levels
    if not is_cubic:
        out = room.array("resized", (*size, 3), apart_from=levels)
        return cv2.resize(levels, size[::-1], dst=out, interpolation=cv2.INTER_LINEAR)
    # OpenCV's cubic is another one (a = -0.75). First the direction that leaves less to do.
    if size[0] * levels.shape[1] <= levels.shape[0] * size[1]:
        turned = _turned(_rows_resized(levels, size[0], "rows", room), "turned", room)
        return _turned(
            _rows_resized(turned, size[1], "rows", room), "resized", room, apart_from=levels
        )
    turned = _rows_resized(_turned(levels, "turned", room), size[1], "rows", room)
    return _rows_resized(
        _turned(turned, "turned", room), size[0], "resized", room, apart_from=levels
    )


def _turned(levels: Levels, name: str, room: Room, apart_from: Levels | None = None) -> Levels:
    height, width = levels.shape[:2]
    return cv2.transpose(levels, dst=room.array(name, (width, height, 3), apart_from=apart_from))


def _rows_resized(
    levels: Levels, size: int, name: str, room: Room, apart_from: Levels | None = None
) -> Levels:
    """(size, width, 3) of (height, width, 3)."""
    height, width = levels.shape[:2]
    rows, out = (
        levels.reshape(height, width * 3),
        room.array(name, (size, width * 3), apart_from=apart_from),
    )
    for at, first, weights in cubic_weights(height, size):
        np.matmul(weights, rows[first : first + weights.shape[1]], out=out[at : at + len(weights)])
    return out.reshape(size, width, 3)


@lru_cache(maxsize=256)
def cubic_weights(length: int, size: int) -> list[tuple[int, int, Levels]]:
    """Of Keys' cubic with a = -0.5, the outermost pixels being repeated: (first row out, first row
    in, weights) of some rows at a time, so few that the matrices stay next to the diagonal and BLAS
    takes no threads for them."""
    centres = (np.arange(size) + 0.5) * (length / size) - 0.5
    places = np.floor(centres).astype(int)[:, None] + np.arange(-1, 3)
    d = np.abs(centres[:, None] - places)
    weights = np.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)
    places = places.clip(0, length - 1)
    step, rows = 8 if length < 2 * size else 4, np.arange(size)
    starts = places[::step, 0]
    reach = int((places[np.minimum(rows[::step] + step, size) - 1, 3] - starts).max()) + 1
    starts = np.minimum(starts, length - reach)
    blocks = np.zeros((len(starts), step, reach), np.float32)
    for tap in range(4):  # those that are repeated at the border add up
        blocks[rows // step, rows % step, places[:, tap] - starts[rows // step]] += weights[:, tap]
    return [(i * step, int(start), blocks[i, : size - i * step]) for i, start in enumerate(starts)]


# Noise.


def with_gaussian(image: Levels, keys: NoiseKeys, sigma: float, room: Room) -> Levels:
    """`image`, changed in place: noise of standard deviation `sigma` is added, of 3 channels or the
    same in all."""
    z = standard_normal(keys, room)
    return cv2.scaleAdd(_in_all_channels(z, room), sigma, image, dst=image)


def with_poisson(image: Levels, keys: NoiseKeys, scale: float, room: Room) -> Levels:
    """`image`, changed in place: as `noise.add_poisson`, of the gray image where the keys are those
    of one channel."""
    z = standard_normal(keys, room)
    seen = image if z.ndim == 3 else cv2.transform(image, _GRAY, dst=room.array("gray", z.shape))
    levels = rounded(seen, room)
    base, slope = _poisson_luts()
    counts, part = room.array("counts", z.shape), room.array("part", z.shape)
    cv2.scaleAdd(z, 1 / 6, cv2.LUT(levels, slope, dst=part), dst=counts)
    cv2.multiply(counts, z, dst=counts)
    cv2.add(counts, cv2.LUT(levels, base, dst=part), dst=counts)
    cv2.threshold(np.rint(counts, out=counts), 0, 0, cv2.THRESH_TOZERO, dst=counts)
    # What is added is scale * (counts / PHOTONS - levels).
    part[...] = levels
    cv2.scaleAdd(part, -PHOTONS, counts, dst=counts)
    return cv2.scaleAdd(_in_all_channels(counts, room), scale / PHOTONS, image, dst=image)


def standard_normal(keys: NoiseKeys, room: Room) -> Levels:
    """White noise of a sample's keys, as `noise.standard_normal`: (height, width, 3), or (height,
    width) of one channel."""
    height, width, channels = len(keys.rows), *keys.columns.shape[1:]
    shape = (height, width, 3) if channels == 3 else (height, width)
    words = np.multiply(
        keys.rows, keys.columns, out=room.array("words", (height, width, channels), np.uint32)
    )
    halves = words.view(np.uint16).reshape(height, width * channels, 2)
    upper = cv2.extractChannel(
        halves,
        int(sys.byteorder == "little"),
        dst=room.array("quantiles", (height, width * channels), np.uint16),
    )
    return cv2.LUT(upper.reshape(shape), _normal_lut(), dst=room.array("normal", shape))


def _in_all_channels(plane: Levels, room: Room) -> Levels:
    if plane.ndim == 3:
        return plane
    return cv2.cvtColor(plane, cv2.COLOR_GRAY2RGB, dst=room.array("channels", (*plane.shape, 3)))


_GRAY = np.array([GRAY], np.float32)


@lru_cache(maxsize=1)
def _normal_lut() -> Levels:
    return np.array(normal_table(), np.float32)


@lru_cache(maxsize=1)
def _poisson_luts() -> tuple[Levels, Levels]:
    table = poisson_table()
    return np.array(table.base, np.float32), np.array(table.slope, np.float32)


# Bytes.


def rounded(image: Levels | Bytes, room: Room) -> Bytes:
    """The nearest levels, clipped to 0..255."""
    if image.dtype == np.uint8:
        return image
    # Negative ones first, of which convertScaleAbs would take the amount.
    _, positive = cv2.threshold(
        image, 0, 0, cv2.THRESH_TOZERO, dst=room.array("positive", image.shape)
    )
    return cv2.convertScaleAbs(positive, dst=room.array("bytes", image.shape, np.uint8))


def through_jpeg(image: Levels | Bytes, quality: int, room: Room) -> Bytes:
    """Levels rounded and through JPEG, 4:2:0, by OpenCV as DALI does it."""
    pixels = rounded(image, room)
    pixels = cv2.cvtColor(
        pixels, cv2.COLOR_RGB2BGR, dst=room.array("blue first", image.shape, np.uint8)
    )
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return simplejpeg.decode_jpeg(data, "RGB", buffer=room.array("decoded", image.shape, np.uint8))


def _as_levels(image: Levels | Bytes, room: Room) -> Levels:
    if image.dtype == np.float32:
        return image
    levels = room.array("levels", image.shape)
    levels[...] = image
    return levels
