"""How many crops each photograph of a manifest gave, in a few bytes a photograph."""

from __future__ import annotations

import json
import posixpath
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tools.dataset.sampling import path_key

NUM_LARGEST = 10


@dataclass
class PhotoCounts:
    """The photographs and films of one source."""

    photographs: int = 0  # films included
    films: int = 0
    training: int = 0     # photographs of which a crop stands in the list
    validation: int = 0
    in_both: int = 0      # validation sees what was trained on
    by_size: Counter[int] = field(default_factory=Counter)  # n -> photographs with 2^n to 2^(n+1) - 1 crops
    largest: list[tuple[int, str]] = field(default_factory=list)  # (crops, photograph), the largest first


class PhotoRuns:
    """Crops in the order of a manifest, whose photographs' crops follow one another: 23 bytes a run of them."""

    def __init__(self) -> None:
        self._photo: str | None = None
        self._keys, self._places, self._counts = array("Q"), array("Q"), array("L")
        self._flags = array("B")  # 1: a film; 2: in the training list; 4: in the validation list

    def add(self, photo: str, is_film: bool, in_training: bool, in_validation: bool, offset: int) -> None:
        """Count a crop, whose line starts at `offset` in its manifest."""
        if photo != self._photo:
            self._photo = photo
            self._keys.append(path_key(photo))
            self._places.append(offset)
            self._counts.append(0)
            self._flags.append(0)
        self._counts[-1] += 1
        self._flags[-1] |= is_film | in_training << 1 | in_validation << 2

    def summary(self, manifest: Path, folder: str) -> PhotoCounts:
        """The numbers by photograph. `manifest` is read for the largest ones' names; `folder` is put before them."""
        if not self._keys:
            return PhotoCounts()
        _, first, photo_of_run = np.unique(np.frombuffer(self._keys, np.uint64), return_index=True, return_inverse=True)
        counts = np.bincount(photo_of_run, np.frombuffer(self._counts, f"u{self._counts.itemsize}")).astype(np.int64)
        flags = np.zeros(len(counts), np.uint8)
        np.bitwise_or.at(flags, photo_of_run, np.frombuffer(self._flags, np.uint8))
        exponents, numbers = np.unique(np.frexp(counts)[1] - 1, return_counts=True)
        order = np.lexsort((first, -counts))[:NUM_LARGEST]
        names = _photos_at(manifest, [self._places[int(first[at])] for at in order])
        return PhotoCounts(
            len(counts), int((flags & 1 > 0).sum()), int((flags & 2 > 0).sum()), int((flags & 4 > 0).sum()),
            int((flags & 6 == 6).sum()), Counter(dict(zip(exponents.tolist(), numbers.tolist(), strict=True))),
            [(int(counts[at]), posixpath.join(folder, name)) for at, name in zip(order, names, strict=True)])


def _photos_at(manifest: Path, offsets: list[int]) -> list[str]:
    """The photographs that the lines at these offsets name."""
    names = []
    with open(manifest, "rb") as file:
        for offset in offsets:
            file.seek(offset)
            names.append(json.loads(file.readline())["photo"])
    return names
