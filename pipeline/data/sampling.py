"""Which crop the k-th sample of a run is: a pure function of the seed and k.

Sample k belongs to epoch k // N and is entry k % N of that epoch's permutation of the N files, so every file is seen
exactly once an epoch. Where it is cut and how it is turned come from counter-based random words of (seed, k). No rank,
world size, batch size, thread or history enters: a run's position in the data is one integer, and any sample can be
made again from its number. The generator is Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC11), used as raw 64-bit words, whose stream numpy guarantees to keep.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ORDER, DRAWS = 1, 2  # which stream of the seed
WORDS = 4  # random words a sample: Philox makes four per counter


class Draws(NamedTuple):
    """What is random about samples first .. first + n - 1, each array of length n."""

    files: NDArray[np.int64]  # index into the training list
    top: NDArray[np.uint64]  # 32-bit fractions of the room there is, see `anchor`
    left: NDArray[np.uint64]
    flip_vertical: NDArray[np.int32]  # 0 or 1
    flip_horizontal: NDArray[np.int32]
    transpose: NDArray[np.int32]  # after the flips, height and width change places


class Sampler:
    """Draws of any samples of a run over `num_files` files."""

    def __init__(self, num_files: int, seed: int, *, augment: bool = True) -> None:
        if num_files < 1:
            raise ValueError("there are no files to sample from")
        self.num_files, self.seed, self.augment = num_files, seed, augment

    def draw(self, first: int, count: int) -> Draws:
        """The draws of samples first .. first + count - 1."""
        numbers = np.arange(first, first + count, dtype=np.int64)
        epochs, entries = np.divmod(numbers, self.num_files)
        files = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            files[chosen] = epoch_order(self.num_files, self.seed, int(epoch))[entries[chosen]]
        words = np.random.Philox(key=[self.seed, DRAWS], counter=[first, 0, 0, 0]).random_raw(WORDS * count)
        words = words.reshape(count, WORDS)
        symmetry = (words[:, 2] >> np.uint64(61)).astype(np.int32) * np.int32(self.augment)
        return Draws(files, words[:, 0] >> np.uint64(32), words[:, 1] >> np.uint64(32),
                     symmetry & 1, symmetry >> 1 & 1, symmetry >> 2)


@lru_cache(maxsize=2)
def epoch_order(num_files: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of 0 .. num_files - 1, uniform over all of them."""
    words = np.random.Philox(key=[seed, ORDER], counter=[0, epoch, 0, 0]).random_raw(num_files)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


def anchor(fraction: int, length: int, crop: int, grid: int) -> int:
    """First row (or column) of a crop of `crop` pixels in `length`, a multiple of `grid`, all equally likely.

    The grid is the scale, so that a crop's LR pixels lie where those of the whole photograph's LR lie.
    """
    places = (length - crop) // grid + 1
    return (int(fraction) * places >> 32) * grid
