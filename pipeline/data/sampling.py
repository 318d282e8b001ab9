"""Map the k-th sample of a run to a crop, as a pure function of the seed and k.

An epoch has as many samples as there are files, times the multiplier; sample k belongs to epoch k
// length. Without weights, an epoch is one permutation of all its entries, so every file
occurs exactly `multiplier` times. With weights, each folder fills its share of the epoch by cycling
through permutations of its own files.

The crop position, symmetry and degradation come from counter-based random words of (seed, k). They
do not depend on rank, world size, batch size, threads or history: a run's position in the data is
one integer, and any sample can be reproduced from its number. The generator is Philox (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC11), used as raw 64-bit words, whose stream
NumPy guarantees to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ORDER, DRAWS, FOLDER_ORDER, REPLACEMENT, DEGRADATION = 1, 2, 3, 4, 5  # streams of the seed
VALIDATION = 6  # stream for degradations of whole validation images, by their position in the list
FILES = 7  # stream for degradations that are written to files, by a hash of the file's name
MIXING = 8  # stream for how samples are mixed with each other
WORDS = 4  # random words per sample: Philox makes four per counter

Words = NDArray[np.uint64]


class Draws(NamedTuple):
    """The random choices for samples first .. first + n - 1, as arrays of length n."""

    samples: NDArray[np.int64]  # their numbers
    files: NDArray[np.int64]  # index into the training files of all folders, one after another
    top: Words  # 32-bit fractions of the possible positions, see `anchor`
    left: Words
    flip_vertical: NDArray[np.int32]  # 0 or 1
    flip_horizontal: NDArray[np.int32]
    transpose: NDArray[np.int32]  # applied after the flips
    brightness: NDArray[np.float64]  # (n, 2) in [0, 1): for the probability, and for the factor


class Sampler:
    """Random choices for any samples of a run over folders of `folder_sizes` files."""

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
        """Return the draws of samples first .. first + count - 1."""
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
        """Return (count, per_sample) random words for degradations.

        `per_sample` must be a multiple of 4.
        """
        return random_words(self.seed, DEGRADATION, first, count, per_sample)

    def folder_of(self, file: int) -> int:
        """Return the position of a file's folder among the folders."""
        return int(np.searchsorted(self._starts, file, side="right")) - 1

    def replacement(self, sample: int, attempt: int) -> int:
        """Return the next file to try for a sample after `attempt` + 1 bad ones.

        `attempt` counts from 0. Drawn uniformly from the same folder, so that the shares of the
        folders stay the same.
        """
        folder = self.folder_of(int(self.draw(sample, 1).files[0]))
        word = np.random.Philox(
            key=[self.seed, REPLACEMENT], counter=[sample, attempt, 0, 0]
        ).random_raw(1)[0]
        return int(self._starts[folder] + int(word) % self.folder_sizes[folder])

    def _epoch_files(self, epoch: int, entries: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self.quotas:
            return epoch_order(self.epoch_length, self.seed, epoch)[entries] % self.num_files
        return weighted_epoch(self.folder_sizes, self.quotas, self.seed, epoch)[entries]


def random_words(seed: int, stream: int, first: int, count: int, per_sample: int) -> Words:
    """Return (count, per_sample) random words of samples first .. first + count - 1.

    `per_sample` must be a multiple of 4.
    """
    counter = first * (per_sample // WORDS)
    words = np.random.Philox(key=[seed, stream], counter=[counter, 0, 0, 0]).random_raw(
        per_sample * count
    )
    return words.reshape(count, per_sample)


def uniforms(words: Words) -> NDArray[np.float64]:
    """Return two numbers in [0, 1) per word, multiples of 2**-32.

    (…, n) words give (…, 2 n) numbers.
    """
    return np.ascontiguousarray(words).view("<u4").astype(np.float64) * 2.0**-32


@lru_cache(maxsize=2)
def epoch_order(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return a uniformly drawn permutation of 0 .. length - 1."""
    words = np.random.Philox(key=[seed, ORDER], counter=[0, epoch, 0, 0]).random_raw(length)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


@lru_cache(maxsize=2)
def weighted_epoch(
    folder_sizes: tuple[int, ...], shares: tuple[int, ...], seed: int, epoch: int
) -> NDArray[np.int64]:
    """Return the files of one epoch in random order, `shares[i]` of them from folder i.

    Each folder cycles through permutations of its files across epochs: no file is repeated before
    all files of its folder have occurred.
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
    """Return permutations number `first` to `stop` - 1 of a folder's files, one per row."""
    padded = -(-size // WORDS)
    philox = np.random.Philox(key=[seed, FOLDER_ORDER], counter=[first * padded, folder, 0, 0])
    words = philox.random_raw((stop - first) * padded * WORDS).reshape(stop - first, -1)
    return np.argsort(words[:, :size], axis=1, kind="stable")


def quotas(length: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Split `length` in proportion to `weights` into integers of at least 1 with that sum."""
    exact = np.array(weights, float) * length / sum(weights)
    shares = np.floor(exact).astype(int)
    for i in np.argsort(shares - exact, kind="stable")[: length - shares.sum()]:
        shares[i] += 1
    while shares.min() < 1 < shares.max():
        shares[shares.argmin()] += 1
        shares[shares.argmax()] -= 1
    return tuple(shares.tolist())


def anchor(fraction: int, length: int, crop: int, grid: int) -> int:
    """Return the first row (or column) of a crop of `crop` pixels in `length` pixels.

    It is a multiple of `grid`; `fraction` (32 bits) selects one of the possible positions, all
    equally likely. The grid is the scale, so that the crop's LR pixels coincide with those of the
    whole photograph's LR.
    """
    places = (length - crop) // grid + 1
    return (int(fraction) * places >> 32) * grid
