"""Many crops in little memory: samples drawn by hash, the lowest values, counts in fixed bins."""

from __future__ import annotations

import hashlib
import heapq
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")

MAX_KINDS = 64  # of scales, sizes, decoders... that are counted apart; a real dataset has a handful


def path_key(path: str) -> int:
    """64 bits that stand for a path of a dataset, the same on every machine."""
    return bytes_key(path.encode("utf-8", "surrogateescape"))


def bytes_key(content: bytes, salt: bytes = b"") -> int:
    """`path_key` of a path that is UTF-8 already; another salt gives other numbers."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=salt).digest(), "little")


class KeySet:
    """A set of path keys, 8 bytes each: filled first, then asked."""

    def __init__(self) -> None:
        self._keys = array("Q")
        self._is_sorted = True

    def add(self, key: int) -> None:
        """Take in a key; a second time changes nothing."""
        self._keys.append(key)
        self._is_sorted = False

    def __contains__(self, key: int) -> bool:
        self._sort()
        at = bisect_left(self._keys, key)
        return at < len(self._keys) and self._keys[at] == key

    def __len__(self) -> int:
        self._sort()
        return len(self._keys)

    def _sort(self) -> None:
        if not self._is_sorted:
            self._keys = array("Q", np.unique(np.frombuffer(self._keys, np.uint64)).tobytes())
            self._is_sorted = True


class Tally(dict[str, int]):
    """How often each kind occurs; after `MAX_KINDS` of them the further ones are counted together,
    as "other"."""

    def add(self, kind: str, count: int = 1) -> str:
        """Count a kind; returns the kind that it counts as."""
        if kind not in self and len(self) >= MAX_KINDS:
            kind = "other"
        self[kind] = self.get(kind, 0) + count
        return kind

    def merge(self, others: dict[str, int]) -> None:
        """Count what another tally counted."""
        for kind, count in others.items():
            self.add(kind, count)

    def by_count(self) -> list[tuple[str, int]]:
        """(Kind, count), the most frequent first."""
        return sorted(self.items(), key=lambda entry: (-entry[1], entry[0]))


class HashSample(Generic[Item]):
    """A uniform sample of named things: those whose hash with the seed is least, whatever order
    they come in.

    The samples of two parts of a dataset, put together and drawn from again, are the sample of the
    whole.
    """

    def __init__(self, size: int, seed: int) -> None:
        """`size`: the most that are kept."""
        self._size, self._salt = size, f"{seed}".encode()[:64]
        self._heap: list[
            tuple[int, int, Item]
        ] = []  # (-rank, -number, item): the first is the one to go
        self._number = 0

    def add(self, name: str, item: Item) -> None:
        """Offer a thing."""
        rank = -bytes_key(name.encode("utf-8", "surrogateescape"), self._salt)
        self._number -= 1  # of two things with one name, the first counts
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (rank, self._number, item))
        elif self._heap and rank > self._heap[0][0]:
            heapq.heapreplace(self._heap, (rank, self._number, item))

    def __iter__(self) -> Iterator[Item]:
        """The sample, in the order of its hashes."""
        return (item for _, _, item in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1])))

    def __len__(self) -> int:
        return len(self._heap)


class LowestOfGroups(Generic[Item]):
    """The things of least value, at most one of each group, so that one soft film does not fill the
    page."""

    def __init__(self, size: int) -> None:
        """`size`: the most that are kept."""
        self._size = size
        self._best: dict[str, tuple[float, str, Item]] = {}
        self._limit = math.inf

    def add(self, group: str, value: float, name: str, item: Item) -> None:
        """Offer a thing; of equal values the first name counts."""
        if value > self._limit or not self._size:
            return
        if group in self._best and (value, name) >= self._best[group][:2]:
            return
        self._best[group] = (value, name, item)
        if len(self._best) > self._size:
            del self._best[max(self._best, key=lambda group: self._best[group][:2])]
        if len(self._best) == self._size:
            self._limit = max(entry[0] for entry in self._best.values())

    def __iter__(self) -> Iterator[tuple[float, Item]]:
        """(Value, thing), the lowest first."""
        return (
            (value, item)
            for value, _, item in sorted(self._best.values(), key=lambda entry: entry[:2])
        )


class Histogram:
    """Counts in fixed bins; what lies below the first edge or above the last counts in the outer
    bins."""

    def __init__(self, edges: Sequence[float], threshold: float | None = None) -> None:
        """`edges`: ascending, one more than there are bins. `under` counts, exactly, what lies
        below `threshold`."""
        self.edges, self.threshold = list(edges), threshold
        self.counts = [0] * (len(self.edges) - 1)
        self.below = self.above = self.under = 0

    def add(self, value: float) -> None:
        """Count a value; NaN does not count."""
        if math.isnan(value):
            return
        self.below += value < self.edges[0]
        self.above += value > self.edges[-1]
        self.under += self.threshold is not None and value < self.threshold
        self.counts[min(max(bisect_right(self.edges, value) - 1, 0), len(self.counts) - 1)] += 1

    def coarser(self, bins: int) -> Histogram:
        """The same counts with every `bins` bins put together; their number must be a multiple of
        it."""
        result = Histogram(self.edges[::bins], self.threshold)
        result.counts = [
            sum(self.counts[at : at + bins]) for at in range(0, len(self.counts), bins)
        ]
        result.below, result.above, result.under = self.below, self.above, self.under
        return result

    def merge(self, other: Histogram) -> None:
        """Count what a histogram with the same edges counted."""
        self.counts = [
            mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)
        ]
        self.below, self.above = self.below + other.below, self.above + other.above
        self.under += other.under

    @property
    def total(self) -> int:
        """How many values were counted."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """The value that this share of all lies below, to within a bin; NaN where nothing was
        counted."""
        left = share * self.total
        for low, high, count in zip(self.edges, self.edges[1:], self.counts, strict=False):
            if count and left <= count:
                return low + (high - low) * left / count
            left -= count
        return math.nan
