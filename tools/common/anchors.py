"""Anchors: points of a picture that are found again in its copies and parts, and a table to look them up in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

RADIUS = 16  # of the patch around an anchor, in pixels: 33 x 33

_CELLS, _FREQUENCIES = 11, 8  # the patch is reduced to 11x11 means of 3x3 pixels; its 8x8 lowest frequencies count
_MAX_BITS = 10                # of 63, that the hashes of two patches may differ in
_NUM_CHUNKS = 4               # of a hash, 16 bits each: one of them must be equal
_MIN_STRENGTH = 1.0           # grey levels
_NEIGHBOURS = np.ones((13, 13), np.uint8)


def _basis() -> np.ndarray:
    """DCT-II of a patch's row of 33 pixels, each 3 of them being one cell: float32 (8, 33)."""
    frequency, cell = np.arange(_FREQUENCIES)[:, None], np.arange(_CELLS).repeat(3)[None]
    return np.cos(np.pi * (2 * cell + 1) * frequency / (2 * _CELLS)).astype(np.float32)


def _order() -> np.ndarray:
    """Coefficients from the lowest frequencies to the highest: int (64,)."""
    row, column = np.divmod(np.arange(_FREQUENCIES**2), _FREQUENCIES)
    return np.lexsort((row, np.maximum(row, column)))


_BASIS, _ORDER = _basis(), _order()
# A mirrored patch has the opposite sign at odd horizontal frequencies.
_MIRROR = np.packbits((np.arange(_FREQUENCIES**2) % 2)[_ORDER]).view(np.uint64)[0]


class Anchors(NamedTuple):
    """Rows and columns, int32 (count,), and uint64 (count,) hashes of what lies around."""

    rows: np.ndarray
    columns: np.ndarray
    hashes: np.ndarray


NO_ANCHORS = Anchors(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.uint64))


class Match(NamedTuple):
    """Where a picture may lie in another one: its upper left corner there, and an anchor that says so."""

    picture: int
    is_mirrored: bool
    top: int
    left: int
    row: int  # of the anchor, in the picture in question (mirrored where the match is)
    column: int


def find_anchors(luma: np.ndarray, count: int | None = None) -> Anchors:
    """The points of uint8 luma (height, width) where a spot differs most from what surrounds it, the `count` strongest.

    Found by content alone, so a crop has the same anchors as the picture it was cut from, apart from its borders.
    """
    height, width = luma.shape
    if min(height, width) <= 2 * RADIUS:
        return NO_ANCHORS
    spot, around = cv2.boxFilter(luma, cv2.CV_32F, (5, 5)), cv2.boxFilter(luma, cv2.CV_32F, (13, 13))
    strength = cv2.absdiff(spot, around)
    is_peak = (strength == cv2.dilate(strength, _NEIGHBOURS)) & (strength > _MIN_STRENGTH)
    inner = is_peak[RADIUS : height - RADIUS, RADIUS : width - RADIUS]
    rows, columns = np.divmod(np.flatnonzero(inner), inner.shape[1])
    rows, columns = rows + RADIUS, columns + RADIUS
    if count is not None and len(rows) > count:
        strongest = np.argsort(-strength[rows, columns], kind="stable")[:count]
        rows, columns = rows[strongest], columns[strongest]
    return Anchors(rows.astype(np.int32), columns.astype(np.int32), _patch_hashes(luma, rows, columns))


def _patch_hashes(luma: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The signs of the 63 lowest frequencies (but the mean) of the patch around each point: uint64 (count,)."""
    patches = np.lib.stride_tricks.sliding_window_view(luma, (2 * RADIUS + 1, 2 * RADIUS + 1))
    bits = np.empty((len(rows), _FREQUENCIES**2), bool)
    for start in range(0, len(rows), 1024):
        part = slice(start, start + 1024)
        pixels = patches[rows[part] - RADIUS, columns[part] - RADIUS].astype(np.float32)
        bits[part] = (_BASIS @ pixels @ _BASIS.T).reshape(-1, _FREQUENCIES**2)[:, _ORDER] > 0
    bits[:, 0] = False  # the mean
    return np.packbits(bits, axis=1).view(np.uint64).ravel()


class AnchorTable:
    """The anchors of many pictures, looked up by hash. Read-only, so any number of threads may use it."""

    def __init__(self, anchors: Sequence[Anchors]) -> None:
        """`anchors[i]` belong to the picture number i."""
        self._picture = np.repeat(np.arange(len(anchors), dtype=np.int32), [len(found.rows) for found in anchors])
        self._rows, self._columns, self._hashes = map(np.concatenate, zip(NO_ANCHORS, *anchors, strict=True))
        chunks = np.ascontiguousarray(_chunks(self._hashes).T)
        self._places = [np.argsort(chunk, kind="stable").astype(np.int32) for chunk in chunks]
        self._bounds = [np.cumsum(np.bincount(chunk.astype(np.int32) + 1, minlength=65537)) for chunk in chunks]

    def matches(self, anchors: Anchors, width: int) -> list[Match]:
        """Where a picture of that width, with those anchors, may lie: what most anchors agree on comes first."""
        ours, theirs, is_mirrored, bits = self._pairs(anchors.hashes)
        if not len(ours):
            return []
        rows = anchors.rows[ours]
        columns = np.where(is_mirrored, width - 1 - anchors.columns[ours], anchors.columns[ours])
        picture, top, left = self._picture[theirs], self._rows[theirs] - rows, self._columns[theirs] - columns
        place = 2 * picture.astype(np.int64) + is_mirrored
        for shift in (top, left):  # whole pixels in +-2^17; to 4 pixels, as an anchor may move a little
            place = (place << 16) + ((shift + (1 << 17)) >> 2)
        _, group, votes = np.unique(place, return_inverse=True, return_counts=True)
        order = np.lexsort((group, bits, -votes[group]))
        _, firsts = np.unique(group[order], return_index=True)
        best = order[np.sort(firsts)]
        columns_of_best = (values[best].tolist() for values in (picture, is_mirrored, top, left, rows, columns))
        return [Match(*match) for match in zip(*columns_of_best, strict=True)]

    def _pairs(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(Our anchor, theirs, whether mirrored, bits that differ) of all pairs that look alike, each pair once."""
        hashes, count, total = np.concatenate([hashes, hashes ^ _MIRROR]), len(hashes), len(self._hashes)
        pairs = []
        for chunks, places, bounds in zip(_chunks(hashes).T.astype(np.int32), self._places, self._bounds, strict=True):
            firsts, lasts = bounds[chunks], bounds[chunks + 1]
            ends = np.cumsum(lasts - firsts)  # of each hash's share in the list of candidates
            found = np.arange(ends[-1] if count else 0) + np.repeat(lasts - ends, lasts - firsts)
            pairs.append(np.repeat(np.arange(2 * count) * total, lasts - firsts) + places[found])
        pairs = np.concatenate(pairs)
        ours, theirs = np.divmod(pairs, total)
        alike = np.bitwise_count(hashes[ours] ^ self._hashes[theirs]) <= _MAX_BITS
        ours, theirs = np.divmod(np.unique(pairs[alike]), total)
        return ours % max(count, 1), theirs, ours >= count, np.bitwise_count(hashes[ours] ^ self._hashes[theirs])


def _chunks(hashes: np.ndarray) -> np.ndarray:
    """uint64 (count,) as uint16 (count, 4)."""
    return hashes.view(np.uint16).reshape(-1, _NUM_CHUNKS)
