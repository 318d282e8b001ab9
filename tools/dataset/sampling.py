"""Summaries of millions of crops in little memory: samples by hash, lowest values, histograms."""

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

MAX_KINDS = 64  # of scales, sizes, decoders... counted separately; real datasets have a handful


def path_key(path: str) -> int:
    """64-bit key of a path in a dataset, the same on every machine."""
    return bytes_key(path.encode("utf-8", "surrogateescape"))


def bytes_key(content: bytes, salt: bytes = b"") -> int:
    """`path_key` of a path in UTF-8; another salt gives unrelated keys."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=salt).digest(), "little")


class KeySet:
    """A set of path keys, 8 bytes each; add all keys before the first lookup."""

    def __init__(self) -> None:
        self._keys = array("Q")
        self._is_sorted = True

    def add(self, key: int) -> None:
        """Add a key; duplicates have no effect."""
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
    """Counts by kind; after `MAX_KINDS` kinds, further ones are counted together as "other"."""

    def add(self, kind: str, count: int = 1) -> str:
        """Count a kind; return the kind it was counted as."""
        if kind not in self and len(self) >= MAX_KINDS:
            kind = "other"
        self[kind] = self.get(kind, 0) + count
        return kind

    def merge(self, others: dict[str, int]) -> None:
        """Add the counts of another tally."""
        for kind, count in others.items():
            self.add(kind, count)

    def by_count(self) -> list[tuple[str, int]]:
        """(kind, count), most frequent first."""
        return sorted(self.items(), key=lambda entry: (-entry[1], entry[0]))


class HashSample(Generic[Item]):
    """A uniform sample of named items, those with the lowest hash of name and seed, in any order.

    Merging the samples of two parts of a dataset gives the sample of the whole.
    """

    def __init__(self, size: int, seed: int) -> None:
        """`size`: maximum number of items."""
        self._size, self._salt = size, f"{seed}".encode()[:64]
        # (-rank, -number, item): the first one is replaced next
        self._heap: list[tuple[int, int, Item]] = []
        self._number = 0

    def add(self, name: str, item: Item) -> None:
        """Offer an item."""
        rank = -bytes_key(name.encode("utf-8", "surrogateescape"), self._salt)
        self._number -= 1  # of two items with the same name, the first is kept
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (rank, self._number, item))
        elif self._heap and rank > self._heap[0][0]:
            heapq.heapreplace(self._heap, (rank, self._number, item))

    def __iter__(self) -> Iterator[Item]:
        """The sample, in hash order."""
        return (item for _, _, item in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1])))

    def __len__(self) -> int:
        return len(self._heap)


class LowestOfGroups(Generic[Item]):
    """The items with the lowest values, at most one per group.

    Grouping prevents one soft video from filling the page.
    """

    def __init__(self, size: int) -> None:
        """`size`: maximum number of items."""
        self._size = size
        self._best: dict[str, tuple[float, str, Item]] = {}
        self._limit = math.inf

    def add(self, group: str, value: float, name: str, item: Item) -> None:
        """Offer an item; the lower name wins a tie."""
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
        """(value, item), lowest first."""
        return (
            (value, item)
            for value, _, item in sorted(self._best.values(), key=lambda entry: entry[:2])
        )


class Histogram:
    """Counts in fixed bins; values outside the edges count in the outermost bins."""

    def __init__(self, edges: Sequence[float], threshold: float | None = None) -> None:
        """`edges` are ascending, one more than the bins.

        `under` is the exact number of values below `threshold`.
        """
        self.edges, self.threshold = list(edges), threshold
        self.counts = [0] * (len(self.edges) - 1)
        self.below = self.above = self.under = 0

    def add(self, value: float) -> None:
        """Count a value; NaN is ignored."""
        if math.isnan(value):
            return
        self.below += value < self.edges[0]
        self.above += value > self.edges[-1]
        self.under += self.threshold is not None and value < self.threshold
        self.counts[min(max(bisect_right(self.edges, value) - 1, 0), len(self.counts) - 1)] += 1

    def coarser(self, bins: int) -> Histogram:
        """Merge every `bins` adjacent bins; the number of bins must be a multiple of it."""
        result = Histogram(self.edges[::bins], self.threshold)
        result.counts = [
            sum(self.counts[at : at + bins]) for at in range(0, len(self.counts), bins)
        ]
        result.below, result.above, result.under = self.below, self.above, self.under
        return result

    def merge(self, other: Histogram) -> None:
        """Add the counts of a histogram with the same edges."""
        self.counts = [
            mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)
        ]
        self.below, self.above = self.below + other.below, self.above + other.above
        self.under += other.under

    @property
    def total(self) -> int:
        """Number of counted values."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """The value below which this share of all lies, to within a bin; NaN without values."""
        left = share * self.total
        for low, high, count in zip(self.edges, self.edges[1:], self.counts, strict=False):
            if count and left <= count:
                return low + (high - low) * left / count
            left -= count
        return math.nan
