"""Noise as a pure function of keys drawn on the host; DALI's random operators keep state instead.

A sample's keys are odd 32-bit words, one per row and one per column and channel. The product of a
row's and a column's key modulo 2^32 gives one word per pixel. These words are uniformly distributed
and pairwise independent, so the noise is white. The host draws only height + 3 width words instead
of 3 height width, and the device does one multiplication per pixel. The upper 16 bits of a word
index a table of 65,536 quantiles of the standard normal distribution (up to 4.4 standard
deviations), which on a CPU takes an eighth of the time of the Box-Muller transform.

The graph functions run on the device of their keys and return HWC float32.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

QUANTILES = 65536  # the most that fn.lookup_table accepts
# Weights of red, green and blue in torchvision's rgb_to_grayscale, which Real-ESRGAN uses.
GRAY = (
    0.2989,
    0.587,
    0.114,
)
# Counts per level: Real-ESRGAN's value for photographs with more than 128 different levels.
PHOTONS = 256 / 255


class NoiseKeys(NamedTuple):
    """Keys of a sample's noise, uint32: rows (height, 1, 1) and columns (1, width, channels)."""

    rows: NDArray[np.uint32]
    columns: NDArray[np.uint32]


def noise_keys(words: tuple[int, int], height: int, width: int, channels: int) -> NoiseKeys:
    """Return the keys of (height, width, channels) normals from two 64-bit `words`.

    The words must differ between all noise fields. The generator is Philox, as in `sampling`.
    `channels` is 3, or 1 for the same noise in all channels.
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
    """Return a DALI node of white noise, (height, width, channels) float32, mean 0 and variance 1.

    `rows` and `columns` are nodes of `NoiseKeys`.
    """
    from nvidia.dali import fn, types

    quantile = rows * columns // types.Constant(2**32 // QUANTILES, dtype=types.UINT32)
    return fn.lookup_table(
        quantile, keys=list(range(QUANTILES)), values=list(normal_table()), dtype=types.FLOAT
    )


def add_gaussian(image: Any, z: Any, sigma: Any) -> Any:
    """Return a DALI node of `image` plus noise of standard deviation `sigma`, not clipped.

    image: (height, width, 3), levels 0..255; z: a `standard_normal` with 3 channels, or 1 for gray
    noise; sigma: in levels, a scalar per sample or a number.
    """
    return image + z * sigma


def add_poisson(image: Any, z: Any, scale: Any, *, gray: Any = False) -> Any:
    """Return a DALI node of `image` plus `scale` times its photon noise, not clipped.

    This is the Poisson noise of Real-ESRGAN with 256 counts for the whole range: the expected count
    of a level, rounded and clipped to 0..255, is 256/255 times the level, and the difference
    between the drawn and the expected count, in levels, is added. The count is the Poisson quantile
    at `z` by the Cornish-Fisher expansion, rounded; its mean is within 0.01 and its variance within
    0.04 counts of the Poisson distribution's.

    image: (height, width, 3) float32 of levels; z: a `standard_normal` with 3 channels, or 1 with
    `gray`; scale: a scalar per sample or a number; gray: whether the counts are those of the gray
    image and all channels get the same noise, a bool, or in a pipeline with `enable_conditionals` a
    node with a bool per sample.
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
    # Rounds, and clips negative counts to 0.
    counts = fn.cast(base + z * (slope + z * (1 / 6)), dtype=types.UINT16)
    return image + (counts * (1 / PHOTONS) - levels) * scale


@lru_cache(maxsize=1)
def normal_table() -> tuple[float, ...]:
    """Return the mean of a standard normal within each of its 65,536 quantile bins, ascending.

    The table is antisymmetric and scaled to a variance of 1.
    """
    normal = NormalDist()
    edges = [normal.inv_cdf(i / QUANTILES) for i in range(QUANTILES // 2 + 1, QUANTILES)]
    densities = np.array([normal.pdf(0), *(normal.pdf(edge) for edge in edges), 0.0])
    upper = (densities[:-1] - densities[1:]) * QUANTILES
    upper /= math.sqrt((upper * upper).mean())
    return (*(-upper[::-1]).tolist(), *upper.tolist())


class PoissonTable(NamedTuple):
    """For each level 0..255: the count at z is base + slope z + z^2 / 6, rounded."""

    base: tuple[float, ...]
    slope: tuple[float, ...]


@lru_cache(maxsize=1)
def poisson_table() -> PoissonTable:
    """Return the coefficients of lambda + sqrt(lambda) z + (z^2 - 1) / 6 for every level.

    The slope compensates the variance that z^2 / 6 and rounding add, 1/18 + 1/12. Level 0 never has
    a count.
    """
    lambdas = [PHOTONS * level for level in range(1, 256)]
    never = -256.0
    return PoissonTable(
        (never, *(mean - 1 / 6 for mean in lambdas)),
        (0.0, *(math.sqrt(mean - 1 / 18 - 1 / 12) for mean in lambdas)),
    )
