"""Which crop the k-th sample of a run is: a pure function of the seed and k.

An epoch has as many samples as there are files, times the multiplier; sample k belongs to epoch k
// length. Without weights an epoch is one permutation of all its entries, so that every file comes
exactly `multiplier` times. With weights each folder fills its share of the epoch, going round and
round through permutations of its own files. Where a sample is cut, how it is turned and degraded
come from counter-based random words of (seed, k). No rank, world size, batch size, thread or
history enters: a run's position in the data is one integer, and any sample can be made again from
its number. The generator is Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC11), used as raw 64-bit words, whose stream numpy guarantees to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ORDER, DRAWS, FOLDER_ORDER, REPLACEMENT, DEGRADATION = 1, 2, 3, 4, 5  # which stream of the seed
VALIDATION = 6  # degradations of whole validation images, by their place in the list
WORDS = 4  # random words a sample: Philox makes four per counter

Words = NDArray[np.uint64]


class Draws(NamedTuple):
    """What is random about samples first .. first + n - 1, each array of length n."""

    samples: NDArray[np.int64]  # their numbers
    files: NDArray[np.int64]  # index into the training files of all folders, one after another
    top: Words  # 32-bit fractions of the room there is, see `anchor`
    left: Words
    flip_vertical: NDArray[np.int32]  # 0 or 1
    flip_horizontal: NDArray[np.int32]
    transpose: NDArray[np.int32]  # after the flips, height and width change places
    brightness: NDArray[np.float64]  # (n, 2) in [0, 1): whether, and how much


class Sampler:
    """Draws of any samples of a run over folders of `folder_sizes` files."""

    def __init__(
        self,
        folder_sizes: Sequence[int],
        seed: int,
        *,
        multiplier: int = 1,
        weights: Sequence[float] = (),
        augment: bool = True,
    ) -> None:
        self.folder_sizes, self.seed, self.augment = tuple(folder_sizes), seed, augment
        self.num_files = sum(self.folder_sizes)
        self.epoch_length = self.num_files * multiplier
        if not self.folder_sizes or min(self.folder_sizes) < 1:
            raise ValueError("there are no files to sample from")
        if weights and len(weights) != len(self.folder_sizes):
            raise ValueError(f"{len(weights)} weights for {len(self.folder_sizes)} folders")
        self.quotas = quotas(self.epoch_length, weights) if weights else ()
        self._starts = np.cumsum([0, *self.folder_sizes])

    def draw(self, first: int, count: int) -> Draws:
        """The draws of samples first .. first + count - 1."""
        samples = np.arange(first, first + count, dtype=np.int64)
        epochs, entries = np.divmod(samples, self.epoch_length)
        files = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            files[chosen] = self._epoch_files(int(epoch), entries[chosen])
        words = random_words(self.seed, DRAWS, first, count, WORDS)
        symmetry = (words[:, 2] >> np.uint64(61)).astype(np.int32) * np.int32(self.augment)
        return Draws(
            samples,
            files,
            words[:, 0] >> np.uint64(32),
            words[:, 1] >> np.uint64(32),
            symmetry & 1,
            symmetry >> 1 & 1,
            symmetry >> 2,
            uniforms(words[:, 3:]),
        )

    def degradation_words(self, first: int, count: int, per_sample: int) -> Words:
        """(count, per_sample) words, a multiple of 4 a sample, for what its degradation draws."""
        return random_words(self.seed, DEGRADATION, first, count, per_sample)

    def replacement(self, sample: int, attempt: int) -> int:
        """The file to take instead when those of `attempt` (0, 1, …) earlier choices for a sample
        were bad.

        From the same folder, evenly, so that shares stay what they are.
        """
        file = int(self.draw(sample, 1).files[0])
        folder = int(np.searchsorted(self._starts, file, side="right")) - 1
        word = np.random.Philox(
            key=[self.seed, REPLACEMENT], counter=[sample, attempt, 0, 0]
        ).random_raw(1)[0]
        return int(self._starts[folder] + int(word) % self.folder_sizes[folder])

    def _epoch_files(self, epoch: int, entries: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self.quotas:
            return epoch_order(self.epoch_length, self.seed, epoch)[entries] % self.num_files
        return weighted_epoch(self.folder_sizes, self.quotas, self.seed, epoch)[entries]


def random_words(seed: int, stream: int, first: int, count: int, per_sample: int) -> Words:
    """(count, per_sample) random words of samples first .. first + count - 1; `per_sample` is a
    multiple of 4."""
    counter = first * (per_sample // WORDS)
    words = np.random.Philox(key=[seed, stream], counter=[counter, 0, 0, 0]).random_raw(
        per_sample * count
    )
    return words.reshape(count, per_sample)


def uniforms(words: Words) -> NDArray[np.float64]:
    """Two numbers in [0, 1) of each word, multiples of 2**-32: (…, n) words give (…, 2 n)
    numbers."""
    return np.ascontiguousarray(words).view("<u4").astype(np.float64) * 2.0**-32


@lru_cache(maxsize=2)
def epoch_order(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of 0 .. length - 1, uniform over all of them."""
    words = np.random.Philox(key=[seed, ORDER], counter=[0, epoch, 0, 0]).random_raw(length)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


@lru_cache(maxsize=2)
def weighted_epoch(
    folder_sizes: tuple[int, ...], shares: tuple[int, ...], seed: int, epoch: int
) -> NDArray[np.int64]:
    """The files of one epoch, `shares[i]` of them from folder i, in random order.

    A folder's files come one permutation after another, across epochs: none comes twice before all
    came once.
    """
    folders = np.repeat(np.arange(len(shares)), shares)[epoch_order(sum(shares), seed, epoch)]
    files = np.empty(len(folders), np.int64)
    start = 0
    for folder, (size, share) in enumerate(zip(folder_sizes, shares, strict=True)):
        positions = np.arange(epoch * share, (epoch + 1) * share)
        rounds, entries = np.divmod(positions, size)
        orders = _folder_orders(size, seed, folder, int(rounds[0]), int(rounds[-1]) + 1)
        files[folders == folder] = start + orders[rounds - rounds[0], entries]
        start += size
    files.setflags(write=False)
    return files


def _folder_orders(size: int, seed: int, folder: int, first: int, stop: int) -> NDArray[np.int64]:
    """Permutations number `first` to `stop` - 1 of a folder's files, one a row."""
    padded = -(-size // WORDS)
    philox = np.random.Philox(key=[seed, FOLDER_ORDER], counter=[first * padded, folder, 0, 0])
    words = philox.random_raw((stop - first) * padded * WORDS).reshape(stop - first, -1)
    return np.argsort(words[:, :size], axis=1, kind="stable")


def quotas(length: int, weights: Sequence[float]) -> tuple[int, ...]:
    """`length` split by `weights`, to the nearest whole numbers that add up, none below 1."""
    exact = np.array(weights, float) * length / sum(weights)
    shares = np.floor(exact).astype(int)
    for i in np.argsort(shares - exact, kind="stable")[: length - shares.sum()]:
        shares[i] += 1
    while shares.min() < 1 < shares.max():
        shares[shares.argmin()] += 1
        shares[shares.argmax()] -= 1
    return tuple(shares.tolist())


def anchor(fraction: int, length: int, crop: int, grid: int) -> int:
    """First row (or column) of a crop of `crop` pixels in `length`, a multiple of `grid`, all
    equally likely.

    The grid is the scale, so that a crop's LR pixels lie where those of the whole photograph's LR
    lie.
    """
    places = (length - crop) // grid + 1
    return (int(fraction) * places >> 32) * grid
