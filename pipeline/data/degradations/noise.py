"""Noise as a pure function of keys drawn on the host. DALI's own random operators keep a state from
batch to batch.

A sample's keys are odd 32-bit words, one a row and one for each column and channel. The product of
a row's and a column's key modulo 2^32 is a word for every pixel: evenly distributed, and any two of
them independent, so the noise is white. That costs height + 3 width words on the host instead of 3
height width, and one multiplication on the device. Its upper 16 bits look up a standard normal in a
table of 65,536 quantiles (up to 4.4 standard deviations), which on a CPU takes an eighth of the
time of Box and Muller's logarithm and cosine.

The graph functions run on the device of the keys they are given, and return HWC float32.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

QUANTILES = 65536  # as many as fn.lookup_table takes
GRAY = (
    0.2989,
    0.587,
    0.114,
)  # of red, green and blue, as torchvision's rgb_to_grayscale, which Real-ESRGAN uses
PHOTONS = (
    256 / 255
)  # a level, in counts: Real-ESRGAN's, of a photograph that has more than 128 different levels


class NoiseKeys(NamedTuple):
    """What a sample's noise is made of: rows (height, 1, 1) and columns (1, width, channels), odd
    uint32."""

    rows: NDArray[np.uint32]
    columns: NDArray[np.uint32]


def noise_keys(words: tuple[int, int], height: int, width: int, channels: int) -> NoiseKeys:
    """The keys of (height, width, channels) normals, from two 64-bit `words`, different for every
    noise that is made.

    Philox, as `sampling` uses it. channels: 3, or 1 for the same noise in all.
    """
    count = height + width * channels
    keys = (
        np.random.Philox(key=np.array(words, np.uint64))
        .random_raw((count + 1) // 2)
        .view(np.uint32)
    )
    keys |= np.uint32(1)
    return NoiseKeys(
        keys[:height].reshape(height, 1, 1), keys[height:count].reshape(1, width, channels)
    )


def standard_normal(rows: Any, columns: Any) -> Any:
    """DALI node (height, width, channels) float32: white noise, mean 0 and variance 1, of nodes of
    `NoiseKeys`."""
    from nvidia.dali import fn, types

    quantile = rows * columns // types.Constant(2**32 // QUANTILES, dtype=types.UINT32)
    return fn.lookup_table(
        quantile, keys=list(range(QUANTILES)), values=list(normal_table()), dtype=types.FLOAT
    )


def add_gaussian(image: Any, z: Any, sigma: Any) -> Any:
    """DALI node: `image` and noise of the standard deviation `sigma`. Nothing is clipped.

    image: (height, width, 3), levels 0..255; z: a `standard_normal`, of 3 channels or of 1 for gray
    noise; sigma: in levels, a scalar for each sample, or a number.
    """
    return image + z * sigma


def add_poisson(image: Any, z: Any, scale: Any, *, gray: Any = False) -> Any:
    """DALI node: `image` and `scale` times what counting photons would add to it. Nothing is
    clipped.

    The Poisson noise of Real-ESRGAN with 256 counts for the whole range: each level, rounded and
    clipped to 0..255, expects 256/255 counts, and what comes more or less of them is added. The
    number of counts is Poisson's quantile at `z` by Cornish and Fisher's expansion, rounded: mean
    within 0.01 and variance within 0.04 counts of Poisson's.

    image: (height, width, 3) float32 of levels; z: a `standard_normal`, of 3 channels, or of 1 with
    `gray`; scale: a scalar for each sample, or a number; gray: the counts are those of the gray
    image, and all channels get the same noise: a bool, or a node of one for each sample in a
    pipeline with `enable_conditionals`.
    """
    from nvidia.dali import fn, types

    if gray:
        seen = fn.coord_transform(image, M=list(GRAY))
    else:
        seen = image
    levels = fn.cast(seen, dtype=types.UINT8)  # rounds and clips
    table = poisson_table()
    base = fn.lookup_table(
        levels, keys=list(range(256)), values=list(table.base), dtype=types.FLOAT
    )
    slope = fn.lookup_table(
        levels, keys=list(range(256)), values=list(table.slope), dtype=types.FLOAT
    )
    counts = fn.cast(
        base + z * (slope + z * (1 / 6)), dtype=types.UINT16
    )  # rounds, and none below 0
    return image + (counts * (1 / PHOTONS) - levels) * scale


@lru_cache(maxsize=1)
def normal_table() -> tuple[float, ...]:
    """The means of a standard normal between its 65,536-quantiles, scaled to a variance of 1. Odd,
    and rising."""
    normal = NormalDist()
    edges = [normal.inv_cdf(i / QUANTILES) for i in range(QUANTILES // 2 + 1, QUANTILES)]
    densities = np.array([normal.pdf(0), *(normal.pdf(edge) for edge in edges), 0.0])
    upper = (densities[:-1] - densities[1:]) * QUANTILES
    upper /= math.sqrt((upper * upper).mean())
    return (*(-upper[::-1]).tolist(), *upper.tolist())


class PoissonTable(NamedTuple):
    """For each level 0..255: the number of counts at z is base + slope z + z^2 / 6, rounded."""

    base: tuple[float, ...]
    slope: tuple[float, ...]


@lru_cache(maxsize=1)
def poisson_table() -> PoissonTable:
    """The coefficients of the expansion lambda + sqrt(lambda) z + (z^2 - 1) / 6 for every level.

    The slope makes up for what z^2 / 6 and rounding add to the variance, 1/18 + 1/12, and level 0
    never has a count.
    """
    lambdas = [PHOTONS * level for level in range(1, 256)]
    never = -256.0
    return PoissonTable(
        (never, *(mean - 1 / 6 for mean in lambdas)),
        (0.0, *(math.sqrt(mean - 1 / 18 - 1 / 12) for mean in lambdas)),
    )
