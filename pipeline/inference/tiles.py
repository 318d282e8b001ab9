"""The tiler: runs a network on images of any size, in overlapping tiles that fit into the memory.

Arrays of pixels go in and come out; the backend decides how and where they are computed.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from pipeline.cli import RunError, UserError
from pipeline.export.network_files import is_out_of_memory
from pipeline.inference.backends import Backend, Levels, NotFiniteError

ALIGNMENT = 16
"""Tiles start at multiples of it, so that attention windows have the same grid as in the whole
image. A few networks need a coarser grid."""
SMALLEST_TILE = 64
MAX_BATCH = 64
ENOUGH_BYTES = 512 << 20
"""Memory that a tile may take on a CPU, where larger tiles gain nothing except less overlap."""
SIDES_PER_HALO = 16
"""Ratio of a tile's side to its halo, if the memory allows it: overlap then costs 1.3 times the
work."""
USUAL_HALO = 32
"""Assumed halo until it is measured."""

Advance = Callable[[float], None]
"""Called with the number of LR pixels upscaled since the last call."""
MeasuredHalo = Callable[[np.ndarray | None], int | None]
"""Returns the halo in LR pixels, measured on an image (height, width, 3) if it is unknown; without
an image `None` if it is unknown."""


@dataclass(frozen=True)
class ImageTile:
    """A tile of image number `image`.

    `rows` and `columns` are what it fills, `seen_rows` and `seen_columns` what the network is
    shown, all in LR pixels.
    """

    image: int
    rows: slice
    columns: slice
    seen_rows: slice
    seen_columns: slice

    @property
    def seen_shape(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return (
            self.seen_rows.stop - self.seen_rows.start,
            self.seen_columns.stop - self.seen_columns.start,
        )

    @property
    def pixels(self) -> int:
        """Number of LR pixels that the tile fills."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


def lay_tiles(
    shape: tuple[int, int, int], halo: int, max_pixels: int, grid: int = ALIGNMENT
) -> list[ImageTile]:
    """Return tiles that fill `shape` (images, height, width) once, each extended by `halo` pixels.

    An image of at most `max_pixels` is a single tile. Larger ones are cut into roughly square tiles
    that see at most `max_pixels`, but fill at least `SMALLEST_TILE` squared, and start at multiples
    of `grid`. Tiles of equal size are adjacent, the largest first, so that smaller ones reuse the
    memory that these have freed.
    """
    count, height, width = shape
    halo = _aligned(halo, grid)
    side = max(_aligned(SMALLEST_TILE, grid), (math.isqrt(max_pixels) - 2 * halo) // grid * grid)
    if height * width <= max_pixels:
        side = max(height, width)
    tiles = [
        ImageTile(
            image, rows, columns, _widened(rows, halo, height), _widened(columns, halo, width)
        )
        for image in range(count)
        for rows in _pieces(height, side, grid)
        for columns in _pieces(width, side, grid)
    ]
    return sorted(tiles, key=lambda tile: tile.seen_shape, reverse=True)


def lay_windows(
    shape: tuple[int, int, int], halo: int, window: tuple[int, int], grid: int = 1
) -> list[ImageTile]:
    """Return tiles that fill `shape` once and see `window` (height, width) each.

    A side shorter than the window is seen as a whole. Tiles start at multiples of `grid`; if it is
    above 1, the last one may therefore see less than the window, which the backend fills by
    reflection.

    Raises:
        RunError: the window is too small for the overlap that the network needs.
    """
    count, height, width = shape
    try:
        rows, columns = (
            _windows(length, side, halo, grid)
            for length, side in zip((height, width), window, strict=True)
        )
    except ValueError as error:
        raise RunError(
            f"{width}x{height} pixels need tiles, but the network takes only images of "
            f"{window[1]}x{window[0]} and sees {halo} pixels in each direction; convert it for "
            "images of any size, or of a larger one"
        ) from error
    return sorted(
        (
            ImageTile(image, row[0], column[0], row[1], column[1])
            for image in range(count)
            for row in rows
            for column in columns
        ),
        key=lambda tile: tile.seen_shape,
    )


def _windows(length: int, side: int, halo: int, grid: int) -> list[tuple[slice, slice]]:
    """Return what each tile fills and what it sees along one side."""
    if length <= side:
        return [(slice(0, length), slice(0, length))]
    unit = math.lcm(ALIGNMENT, grid)
    step = (side - 2 * halo) // unit * unit
    if step <= 0:
        raise ValueError
    last = _aligned(length - side, grid)
    starts = [*range(0, last, step), last]
    edges = [0, *(start + halo for start in starts[1:]), length]
    return [
        (slice(*edges[place : place + 2]), slice(start, min(start + side, length)))
        for place, start in enumerate(starts)
    ]


def _aligned(length: int, grid: int) -> int:
    return -(-length // grid) * grid


def _pieces(length: int, side: int, grid: int) -> list[slice]:
    """Divide `length` at multiples of `grid` into similar pieces of at most `side`."""
    count = -(-length // side)
    step = length if count == 1 else _aligned(-(-length // count), grid)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _widened(piece: slice, halo: int, length: int) -> slice:
    return slice(max(0, piece.start - halo), min(length, piece.stop + halo))


class Upscaler:
    """Upscales arrays of any size with a network.

    Args:
        backend: the network in its backend.
        tile: maximum side of a tile in LR pixels, without its overlap; 0 chooses by the memory.
        most_pixels: without `tile`, the number of LR pixels that the network is shown at once,
            whatever memory is free; it is reduced only if the memory did not suffice. 0 chooses by
            the free memory.
        halo: overlap of the tiles of 8-bit pictures (see `reach.Reach`); `None` is the network's
            whole receptive field.

    Raises:
        UserError: `tile` is below `ALIGNMENT`, or the network takes images of one size only.
    """

    def __init__(
        self,
        backend: Backend,
        tile: int = 0,
        most_pixels: int = 0,
        halo: MeasuredHalo | None = None,
    ) -> None:
        if tile and tile < ALIGNMENT:
            raise UserError(
                f"--tile {tile} is below {ALIGNMENT} pixels; choose more, or 0 to choose by the "
                "free memory"
            )
        if tile and backend.window:
            raise UserError(
                f"--tile {tile}: the network takes only images of "
                f"{backend.window[1]}x{backend.window[0]}, so tiles have that size; omit --tile"
            )
        self.scale = backend.scale
        self._backend = backend
        self._tile, self._most_pixels, self._measured_halo = tile, most_pixels, halo
        self._grid = math.lcm(ALIGNMENT, backend.grid)
        self._reduced: dict[str, int] = {}  # after the memory did not suffice

    def precision_for(self, *, is_deep: bool) -> str:
        """Return the network's precision for 16-bit (`is_deep`) or 8-bit pictures."""
        return self._backend.precision_for(is_deep=is_deep)

    def max_pixels(self, precision: str) -> int:
        """Return the maximum number of LR pixels of a batch, over all its tiles."""
        return self._pixels_at_once(precision, self._expected_halo(is_deep=False))

    def __call__(
        self, images: np.ndarray, result: np.dtype, *, is_deep: bool, advance: Advance
    ) -> np.ndarray:
        """Upscale RGB images (N, height, width, 3), uint8 or uint16, by `scale`.

        Values are clamped and rounded to the type `result`, uint8 or uint16. Tiles of 16-bit
        pictures (`is_deep`) overlap by the whole receptive field, so that the result is the same as
        in one piece. Other tiles overlap by what was measured to change the result by at most half
        an 8-bit level.

        Args:
            images: the images.
            result: type of the result.
            is_deep: whether the pictures have 16 bits.
            advance: called with the number of LR pixels that were upscaled.

        Raises:
            RunError: the memory does not suffice for one tile, or the network gives NaN or
                infinity.
        """
        precision = self.precision_for(is_deep=is_deep)
        count, height, width, _ = images.shape
        large = np.empty((count, height * self.scale, width * self.scale, 3), result)
        waiting = self._lay(images, precision, is_deep=is_deep)
        while waiting:
            try:
                self._run(large, images, waiting, precision, advance)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                waiting = self._lay_smaller(waiting, images, precision, error, is_deep=is_deep)
        return large

    def _lay(self, images: np.ndarray, precision: str, *, is_deep: bool) -> list[ImageTile]:
        """Return the tiles of the images; the halo is measured only if one piece is not enough."""
        shape = images.shape[:3]
        window = self._backend.window
        if window:
            is_one = shape[1] <= window[0] and shape[2] <= window[1]
            halo = 0 if is_one else self._halo(images, is_deep=is_deep)
            return lay_windows(shape, halo, window, self._backend.grid)
        most = self._pixels_at_once(precision, self._expected_halo(is_deep=is_deep))
        if shape[1] * shape[2] <= most:
            return lay_tiles(shape, 0, most, self._grid)
        halo = self._halo(images, is_deep=is_deep)
        return lay_tiles(shape, halo, self._pixels_at_once(precision, halo), self._grid)

    def _halo(self, images: np.ndarray, *, is_deep: bool) -> int:
        """Return by how many LR pixels the tiles of these images overlap."""
        if is_deep or self._measured_halo is None:
            return self._backend.halo
        return min(self._backend.halo, self._measured_halo(images[0]))

    def _expected_halo(self, *, is_deep: bool) -> int:
        """Like `_halo`, before there is an image to measure it on."""
        if is_deep or self._measured_halo is None:
            return self._backend.halo
        return min(self._backend.halo, self._measured_halo(None) or USUAL_HALO)

    def _pixels_at_once(self, precision: str, halo: int) -> int:
        """Return how many LR pixels the network is shown at once, in tiles with this halo."""
        if self._tile:
            return (self._tile + 2 * _aligned(halo, self._grid)) ** 2
        if most := self._reduced.get(precision) or self._most_pixels:
            return most
        most = self._backend.max_pixels(precision)
        least = (SIDES_PER_HALO * _aligned(halo, self._grid)) ** 2
        if self._backend.device.type != "cpu" or most <= least:
            return most
        return min(most, max(least, int(ENOUGH_BYTES / self._backend.pixel_bytes(precision))))

    def _run(
        self,
        large: np.ndarray,
        images: np.ndarray,
        waiting: list[ImageTile],
        precision: str,
        advance: Advance,
    ) -> None:
        """Fill the tiles and remove those that are done from `waiting`.

        The next batch may be started before the result of the last one is fetched.
        """
        begun: deque[tuple[list[ImageTile], Levels]] = deque()

        def finish() -> None:
            batch, levels = begun.popleft()
            self._fill(large, batch, self._checked(levels, images, batch, precision, large.dtype))
            del waiting[: len(batch)]
            advance(sum(tile.pixels for tile in batch) / len(images))

        for batch in self._batches(list(waiting), precision):
            begun.append((batch, self._backend.start(_seen(images, batch), precision, large.dtype)))
            if len(begun) > self._backend.in_flight:
                finish()
        while begun:
            finish()

    def _batches(self, tiles: list[ImageTile], precision: str) -> Iterator[list[ImageTile]]:
        """Yield tiles of equal size, as many at once as the memory allows."""
        for (rows, columns), equal in groupby(tiles, key=lambda tile: tile.seen_shape):
            same_size = list(equal)
            step = max(1, min(MAX_BATCH, self.max_pixels(precision) // (rows * columns)))
            for start in range(0, len(same_size), step):
                yield same_size[start : start + step]

    def _checked(
        self,
        levels: Levels,
        images: np.ndarray,
        batch: list[ImageTile],
        precision: str,
        result: np.dtype,
    ) -> np.ndarray:
        """Return the pixels of a batch, computed again in FP32 if `precision` overflowed."""
        try:
            return levels()
        except NotFiniteError as error:
            if self._backend.is_exact(precision):
                raise RunError(
                    "the network gives NaN or infinity; its weights are broken"
                ) from error
        return self._checked(
            self._backend.start(_seen(images, batch), "fp32", result), images, batch, "fp32", result
        )

    def _fill(self, large: np.ndarray, tiles: list[ImageTile], pieces: np.ndarray) -> None:
        for tile, piece in zip(tiles, pieces, strict=True):
            top = (tile.rows.start - tile.seen_rows.start) * self.scale
            left = (tile.columns.start - tile.seen_columns.start) * self.scale
            rows, columns = (
                slice(part.start * self.scale, part.stop * self.scale)
                for part in (tile.rows, tile.columns)
            )
            large[tile.image, rows, columns] = piece[
                top : top + rows.stop - rows.start, left : left + columns.stop - columns.start
            ]

    def _lay_smaller(
        self,
        waiting: list[ImageTile],
        images: np.ndarray,
        precision: str,
        error: Exception,
        *,
        is_deep: bool,
    ) -> list[ImageTile]:
        """Return new tiles of half the size for all images, after the memory did not suffice."""
        halo = self._halo(images, is_deep=is_deep)
        largest = max(rows * columns for rows, columns in (tile.seen_shape for tile in waiting))
        side = _aligned(SMALLEST_TILE, self._grid)
        smallest = (side + 2 * _aligned(halo, self._grid)) ** 2
        if self._tile or self._backend.window or largest <= smallest:
            tile = "" if self._most_pixels else "a smaller --tile, "
            raise RunError(
                f"not enough memory for one tile; choose {tile}a smaller network or --device cpu"
            ) from error
        if self._backend.device.type == "cuda":
            sys.modules["torch"].cuda.empty_cache()
        self._reduced[precision] = min(largest, self.max_pixels(precision)) // 2
        return lay_tiles(images.shape[:3], halo, self._reduced[precision], self._grid)


def _seen(images: np.ndarray, tiles: list[ImageTile]) -> np.ndarray:
    """Return the network's input for tiles of equal size: (tiles, height, width, 3)."""
    return np.stack([images[tile.image, tile.seen_rows, tile.seen_columns] for tile in tiles])
