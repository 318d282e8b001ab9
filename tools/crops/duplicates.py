"""Near-duplicate pictures: a perceptual hash, and an index that searches millions of them."""

from __future__ import annotations

import numpy as np

from pipeline.libraries import cv2
from tools.crops.grid import halved

HASH_BYTES = 32
# In bits, of 256. Re-encoded, resized or slightly trimmed copies differ in 0 to 31, different
# photographs in 98 or more.
MAX_DISTANCE = 32

_SIDE = 64  # side in pixels to which a picture is reduced before hashing
_FREQUENCIES = 16  # DCT frequencies used per axis
_MIN_ONES = 64  # pictures with structure have 127 or 128
_NUM_CHUNKS = 16  # of 16 bits each
_EVERY_CHUNK = np.arange(_NUM_CHUNKS)
_UNINDEXED = 1024  # hashes compared one by one before they are indexed
_GROWTH = 16  # size ratio of one index level to the next


def _cosines() -> np.ndarray:
    """First 16 rows of the 64-point DCT-II (unnormalised), in integer 1024ths: float64 (16, 64)."""
    frequency, place = np.arange(_FREQUENCIES)[:, None], np.arange(_SIDE)[None]
    return np.rint(1024 * np.cos(np.pi * (2 * place + 1) * frequency / (2 * _SIDE)))


def _order() -> np.ndarray:
    """Order of the coefficients, from lowest to highest frequency: int (256,).

    Low frequencies hardly change between copies, so some chunk of 16 bits is usually equal even if
    30 bits differ.
    """
    row, column = np.divmod(np.arange(_FREQUENCIES**2), _FREQUENCIES)
    return np.lexsort((row, np.maximum(row, column)))


_COSINES = _cosines()
_ORDER = _order()


def perceptual_hash(pixels: np.ndarray) -> bytes:
    """Return a 32-byte hash that is similar for copies of a picture.

    `pixels` is uint8 RGB (height, width, 3) or luma (height, width). Each bit is the sign, relative
    to the median, of one of the 16x16 lowest DCT frequencies of the luma, reduced to 64x64 by area
    (C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010). The
    mean is excluded, so brightness does not matter; contrast does not either. All arithmetic is
    exact, so every machine gives the same bytes.
    """
    luma = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    while min(luma.shape) >= 2 * _SIDE:
        luma = halved(luma)  # much faster than one large reduction
    luma = cv2.resize(luma, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    # Integers below 2^53: exact.
    coefficients = (_COSINES @ luma.astype(np.float64) @ _COSINES.T).ravel()
    coefficients[0] = 0  # exclude the mean
    return np.packbits((coefficients > np.median(coefficients))[_ORDER]).tobytes()


def has_structure(hash: bytes) -> bool:
    """Whether a hash is meaningful.

    It is not for a single colour, stripes and the like, where most coefficients are equal.
    """
    return int.from_bytes(hash, "big").bit_count() >= _MIN_ONES


class NearDuplicates:
    """Remembers pictures by hash and finds the earlier picture that a new one is a copy of.

    Uses multi-index hashing (M. Norouzi et al., CVPR 2012): a candidate must share at least one of
    16 chunks of 16 bits. That is certain up to a distance of 15, and usual far beyond, because
    copies differ in the high frequencies first. Hashes without structure are neither stored nor
    found. Needs about 115 bytes per picture, plus any names that are not ints in ascending order.
    Not thread-safe; the same calls in the same order give the same answers.
    """

    def __init__(self, max_distance: int = MAX_DISTANCE) -> None:
        if not 0 <= max_distance < 128:
            raise ValueError(
                f"max_distance {max_distance}: must be 0 to 127; unrelated pictures differ in "
                "about 128 of 256 bits"
            )
        self.max_distance = max_distance
        self._names: list[str | int] = []
        self._hashes = np.empty((1024, HASH_BYTES // 8), np.uint64)
        # oldest and largest first; they cover the first `_num_indexed` hashes
        self._levels: list[_Level] = []
        self._num_indexed = 0

    def __len__(self) -> int:
        """Number of remembered pictures."""
        return len(self._names)

    def add(self, name: str | int, hash: bytes) -> str | int | None:
        """Return the nearest earlier picture within the distance; remember `name` if none is."""
        earlier = self.find(hash)
        if earlier is None and has_structure(hash):
            self._remember(name, hash)
        return earlier

    def find(self, hash: bytes) -> str | int | None:
        """Return the nearest remembered picture within the distance, or `None`.

        The earliest one wins a tie.
        """
        if not (self._names and has_structure(hash)):
            return None
        words, chunks = np.frombuffer(hash, np.uint64), np.frombuffer(hash, np.uint16)
        unindexed = self._hashes[self._num_indexed : len(self._names)]
        places = [level.candidates(chunks) for level in self._levels]
        hashes = [unindexed, *(self._hashes.take(found, axis=0) for found in places)]
        places.insert(0, np.arange(self._num_indexed, len(self._names), dtype=np.int32))
        distances = np.bitwise_count(np.concatenate(hashes) ^ words).sum(axis=1, dtype=np.uint16)
        if not len(distances) or (nearest := distances.min()) > self.max_distance:
            return None
        return self._names[int(np.concatenate(places)[distances == nearest].min())]

    def _remember(self, name: str | int, hash: bytes) -> None:
        if len(self._names) == len(self._hashes):
            self._hashes.resize(
                (int(len(self._hashes) * 1.5), self._hashes.shape[1]), refcheck=False
            )
        self._hashes[len(self._names)] = np.frombuffer(hash, np.uint64)
        self._names.append(name)
        if len(self._names) - self._num_indexed == _UNINDEXED:
            self._index()

    def _index(self) -> None:
        """Index the hashes added since the last call, merging levels that are still small.

        A level is merged until it is 16 times its class, so only 2 to 4 levels remain.
        """
        start, unit = self._num_indexed, _UNINDEXED
        while self._levels and self._levels[-1].count < _GROWTH * unit:
            start = self._levels.pop().start
            if len(self._names) - start < _GROWTH * unit:
                break
            unit *= _GROWTH
        self._levels.append(_Level(self._hashes[start : len(self._names)], start))
        self._num_indexed = len(self._names)


class _Level:
    """Index over consecutive hashes: positions sorted by value, for each of the 16 chunks."""

    def __init__(self, hashes: np.ndarray, start: int) -> None:
        self.start, self.count = start, len(hashes)
        chunks = hashes.view(np.uint16).T
        self._places = np.empty(chunks.shape, np.int32)
        self._bounds = np.zeros((_NUM_CHUNKS, 65537), np.int32)
        for chunk, places, bounds in zip(chunks, self._places, self._bounds, strict=True):
            chunk = np.ascontiguousarray(chunk)
            places[:] = np.argsort(chunk, kind="stable")
            np.cumsum(np.bincount(chunk, minlength=65536), out=bounds[1:])
        self._places += start

    def candidates(self, chunks: np.ndarray) -> np.ndarray:
        """Positions of the hashes that share a chunk with `chunks`, uint16 (16,).

        int32; a position may occur more than once.
        """
        firsts = self._bounds[_EVERY_CHUNK, chunks]
        lasts = self._bounds[_EVERY_CHUNK, chunks.astype(np.int32) + 1]
        found = [
            places[first:last]
            for places, first, last in zip(self._places, firsts, lasts, strict=True)
        ]
        return np.concatenate(found)
