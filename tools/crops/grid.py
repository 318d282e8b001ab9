"""Crop positions: a jittered grid without overlap, or a covering grid.

Both are pure functions of seed, photo and scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.libraries import cv2


class Crop(NamedTuple):
    """A square crop: grid cell, and top-left corner in pixels of the (reduced) photograph."""

    row: int
    column: int
    top: int
    left: int


def crop_grid(height: int, width: int, size: int, key: str) -> list[Crop]:
    """Place floor(height/size) x floor(width/size) crops without overlap and with random gaps.

    `key` seeds the gaps: the same key and size give the same crops on every machine and numpy
    version.
    """
    rows, columns = height // size, width // size
    if not (rows and columns):
        return []
    draws = _draws(key, rows + rows * columns)
    tops = _with_gaps(draws[:rows], height, size)
    lefts = [
        _with_gaps(draws[rows + row * columns :][:columns], width, size) for row in range(rows)
    ]
    return [
        Crop(row, column, tops[row], lefts[row][column])
        for row in range(rows)
        for column in range(columns)
    ]


def cover_grid(height: int, width: int, size: int) -> list[Crop]:
    """Place ceil(height/size) x ceil(width/size) crops that cover every pixel evenly."""
    if height < size or width < size:
        return []
    tops, lefts = _spread(height, size), _spread(width, size)
    return [
        Crop(row, column, top, left)
        for row, top in enumerate(tops)
        for column, left in enumerate(lefts)
    ]


def _draws(key: str, count: int) -> np.ndarray:
    """Return `count` uniform 64-bit numbers derived from `key`.

    SHAKE-256 is used because its output never changes, unlike that of numpy's generators.
    """
    return np.frombuffer(
        hashlib.shake_256(key.encode("utf-8", "surrogateescape")).digest(8 * count), "<u8"
    )


def _with_gaps(draws: np.ndarray, length: int, size: int) -> list[int]:
    """Return the start of one crop per draw along a side.

    The slack is spread before, between and after the crops.
    """
    slack = length - len(draws) * size
    gaps = sorted(int(draw) % (slack + 1) for draw in draws)
    return [gap + index * size for index, gap in enumerate(gaps)]


def _spread(length: int, size: int) -> list[int]:
    """Return the starts of ceil(length/size) crops along a side, evenly from edge to edge."""
    last = -(-length // size) - 1
    return (
        [(index * (length - size) + last // 2) // last for index in range(last + 1)]
        if last
        else [0]
    )


def halved(pixels: np.ndarray) -> np.ndarray:
    """Halve the size by the rounded mean of 2x2 pixels; an odd last row or column is dropped."""
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    return cv2.resize(
        pixels[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA
    )


def pyramid(
    pixels: np.ndarray, size: int, first: int, count: int | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (reduction, pixels) at 1/`first`, 1/(2 `first`)... while a crop still fits.

    `first` is a power of two; `count` limits the number of sizes.
    """
    reduction, made = 1, 0
    while min(pixels.shape[:2]) >= size and (count is None or made < count):
        if reduction >= first:
            yield reduction, pixels
            made += 1
        if min(pixels.shape[:2]) < 2 * size:
            return
        pixels = halved(pixels)
        reduction *= 2
