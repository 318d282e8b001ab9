"""A network over images of any size: in tiles that overlap by all it sees, as large as the memory allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from pipeline.cli import RunError, UserError
from pipeline.export.network_files import is_out_of_memory
from pipeline.images import to_bytes
from pipeline.inference.backends import DEEP, Backend

ALIGNMENT = 16
"""Tiles begin at multiples of it, so that the windows of attention lie as in the whole image."""
SMALLEST_TILE = 64
MAX_BATCH = 64

Advance = Callable[[float], None]
"""Called with the number of LR pixels upscaled since the last call."""


@dataclass(frozen=True)
class ImageTile:
    """A piece of the image `image`: rows and columns of the LR image that it fills, and those that it looks at."""

    image: int
    rows: slice
    columns: slice
    seen_rows: slice
    seen_columns: slice

    @property
    def seen_shape(self) -> tuple[int, int]:
        """Height and width of what the network is shown."""
        return (self.seen_rows.stop - self.seen_rows.start, self.seen_columns.stop - self.seen_columns.start)

    @property
    def pixels(self) -> int:
        """How many LR pixels it fills."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


def lay_tiles(shape: tuple[int, int, int], halo: int, max_pixels: int) -> list[ImageTile]:
    """Tiles that fill `shape` (images, height, width) once, each looking `halo` pixels further; equal sizes together.

    One tile an image if that has no more than `max_pixels`; otherwise about square ones that look at no more, as far
    as the halo leaves room: a tile fills at least `SMALLEST_TILE` squared.
    """
    count, height, width = shape
    halo = _aligned(halo)
    side = max(SMALLEST_TILE, (math.isqrt(max_pixels) - 2 * halo) // ALIGNMENT * ALIGNMENT)
    if height * width <= max_pixels:
        side = max(height, width)
    tiles = [ImageTile(image, rows, columns, _widened(rows, halo, height), _widened(columns, halo, width))
             for image in range(count) for rows in _pieces(height, side) for columns in _pieces(width, side)]
    return sorted(tiles, key=lambda tile: tile.seen_shape)


def lay_windows(shape: tuple[int, int, int], halo: int, window: tuple[int, int]) -> list[ImageTile]:
    """Tiles that fill `shape` once and look at exactly `window` (height, width) each, or at the whole of a shorter
    side. `RunError` where a window is no larger than what the network sees around a pixel."""
    count, height, width = shape
    try:
        rows, columns = (_windows(length, side, halo) for length, side in zip((height, width), window, strict=True))
    except ValueError as error:
        raise RunError(f"{width}x{height} pixels need tiles, but the network takes images of {window[1]}x{window[0]} "
                       f"only and sees {halo} pixels far; convert it for images of any size") from error
    return sorted((ImageTile(image, row[0], column[0], row[1], column[1])
                   for image in range(count) for row in rows for column in columns), key=lambda tile: tile.seen_shape)


def _windows(length: int, side: int, halo: int) -> list[tuple[slice, slice]]:
    """Of one side: what each tile fills, and what it looks at."""
    if length <= side:
        return [(slice(0, length), slice(0, length))]
    step = (side - 2 * halo) // ALIGNMENT * ALIGNMENT
    if step <= 0:
        raise ValueError
    starts = [*range(0, length - side, step), length - side]
    edges = [0, *(start + halo for start in starts[1:]), length]
    return [(slice(*edges[place : place + 2]), slice(start, start + side)) for place, start in enumerate(starts)]


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _pieces(length: int, side: int) -> list[slice]:
    """`length` in pieces of about equal size, of `side` at most; all but the last one end at multiples."""
    count = -(-length // side)
    step = length if count == 1 else _aligned(-(-length // count))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _widened(piece: slice, halo: int, length: int) -> slice:
    return slice(max(0, piece.start - halo), min(length, piece.stop + halo))


class Upscaler:
    """A network, ready to upscale arrays of any size.

    Args:
        backend: the network and what computes it.
        tile: LR pixels that a tile fills at most, along a side; 0 chooses from the free memory. `UserError` for less
            than `ALIGNMENT`, and where the network takes images of one size only.
        most_pixels: without `tile`, how many LR pixels the network is shown at once, whatever memory is free; fewer
            only after the memory did not suffice. 0 asks the free memory.
    """

    def __init__(self, backend: Backend, tile: int = 0, most_pixels: int = 0) -> None:
        if tile and tile < ALIGNMENT:
            raise UserError(f"--tile {tile} is below {ALIGNMENT} pixels; choose more, or 0 to fill the free memory")
        if tile and backend.window:
            raise UserError(f"--tile {tile}: the network takes images of {backend.window[1]}x{backend.window[0]} only, "
                            "so tiles have that size; leave --tile out")
        self.scale = backend.scale
        self._backend = backend
        self._tile, self._most_pixels = tile, most_pixels
        self._reduced: dict[torch.dtype, int] = {}  # after the memory did not suffice

    def dtype_for(self, *, is_deep: bool) -> torch.dtype:
        """The precision of the network for pictures of 16 bits (`is_deep`), or of 8."""
        return self._backend.dtype_for(is_deep=is_deep)

    def max_pixels(self, dtype: torch.dtype) -> int:
        """How many LR pixels the network is shown at once, over all tiles of a batch."""
        if self._tile:
            return (self._tile + 2 * _aligned(self._backend.halo)) ** 2
        return self._reduced.get(dtype) or self._most_pixels or self._backend.max_pixels(dtype)

    def __call__(self, images: np.ndarray, result: np.dtype, *, is_deep: bool, advance: Advance) -> np.ndarray:
        """RGB images (N, height, width, 3), uint8 or uint16, `scale` times larger as `result`, one of these types.

        Clamped and rounded. Tiles look at as much around them as the network sees, so it is the same as in one piece.
        """
        dtype = self.dtype_for(is_deep=is_deep)
        count, height, width, _ = images.shape
        large = np.empty((count, height * self.scale, width * self.scale, 3), result)
        waiting = self._laid((count, height, width), dtype)
        while waiting:
            try:
                for batch in self._batches(waiting, dtype):
                    self._fill(large, images, batch, dtype)
                    waiting = waiting[len(batch):]
                    advance(sum(tile.pixels for tile in batch) / count)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                waiting = self._laid_smaller(waiting, (count, height, width), dtype, error)
        return large

    def _laid(self, shape: tuple[int, int, int], dtype: torch.dtype) -> list[ImageTile]:
        if self._backend.window:
            return lay_windows(shape, self._backend.halo, self._backend.window)
        return lay_tiles(shape, self._backend.halo, self.max_pixels(dtype))

    def _batches(self, tiles: list[ImageTile], dtype: torch.dtype) -> Iterator[list[ImageTile]]:
        """Tiles of one size, as many at once as the memory allows."""
        for (rows, columns), equal in groupby(tiles, key=lambda tile: tile.seen_shape):
            same_size = list(equal)
            step = max(1, min(MAX_BATCH, self.max_pixels(dtype) // (rows * columns)))
            for start in range(0, len(same_size), step):
                yield same_size[start : start + step]

    def _fill(self, large: np.ndarray, images: np.ndarray, tiles: list[ImageTile], dtype: torch.dtype) -> None:
        seen = np.stack([images[tile.image, tile.seen_rows, tile.seen_columns] for tile in tiles])
        pieces = self._run(seen, large.dtype, dtype)
        for tile, piece in zip(tiles, pieces, strict=True):
            top = (tile.rows.start - tile.seen_rows.start) * self.scale
            left = (tile.columns.start - tile.seen_columns.start) * self.scale
            rows, columns = (slice(part.start * self.scale, part.stop * self.scale)
                             for part in (tile.rows, tile.columns))
            large[tile.image, rows, columns] = piece[top : top + rows.stop - rows.start,
                                                     left : left + columns.stop - columns.start]

    @torch.inference_mode()
    def _run(self, seen: np.ndarray, result: np.dtype, dtype: torch.dtype) -> np.ndarray:
        sr = self._backend(seen, dtype)
        if not self._backend.is_exact(dtype) and not torch.isfinite(sr).all():  # beyond FP16's range
            sr = self._backend(seen, torch.float32)
        if not torch.isfinite(sr).all():
            raise RunError("the network gives NaN or infinity; its weights are broken")
        return _levels(sr, result).permute(0, 2, 3, 1).cpu().numpy().astype(result, copy=False)

    def _laid_smaller(self, waiting: list[ImageTile], shape: tuple[int, int, int], dtype: torch.dtype,
                      error: Exception) -> list[ImageTile]:
        """All tiles again, of half the pixels, after the memory did not suffice; raises any other error again."""
        if not is_out_of_memory(error):
            raise error
        largest = max(rows * columns for rows, columns in (tile.seen_shape for tile in waiting))
        smallest = (SMALLEST_TILE + 2 * _aligned(self._backend.halo)) ** 2
        if self._tile or self._backend.window or largest <= smallest:
            tile = "" if self._most_pixels else "a smaller --tile, "
            raise RunError(f"the memory does not suffice for one tile; choose {tile}a smaller network or --device cpu"
                           ) from error
        if self._backend.device.type == "cuda":
            torch.cuda.empty_cache()
        self._reduced[dtype] = min(largest, self.max_pixels(dtype)) // 2
        return lay_tiles(shape, self._backend.halo, self._reduced[dtype])


def _levels(sr: Tensor, result: np.dtype) -> Tensor:
    """Floats in [0, 1] to the levels of `result`, clamped and rounded; of 16 bits as int32, which every device has."""
    if result != DEEP:
        return to_bytes(sr)
    return sr.float().mul(65535).round_().clamp_(0, 65535).to(torch.int32)
