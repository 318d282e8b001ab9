"""Averages of weights whose length is chosen after training.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2024), section 3
and appendix C. A power-function average after t updates weights the network after update s with

    w(s) = (s/t)^(gamma+1) - (s'/t)^(gamma+1),    s' the sampled update before s,

so its width stays the same share of the run, `sigma_rel`, however long the run gets, and the
initial weights count for nothing. A run keeps two of them, of the `WIDTHS`. An average of any other
width is a sum of their states at several steps; least squares find the factors. Here are the
weights w and the factors; `ema.py` updates the averages, `checkpoint/averages.py` stores them.

After a million updates, the average of width 0.05 moves by a 56,000th of the way to the weights.
When these hardly change any more, float32 rounds such moves away. So of a long run not every update
is sampled, but one of each block of 2, 4, 8…, 4,096 or more in each doubling of the run: in a
simulation of 600,000 updates, that reduced the error of averages of weights at rest from 3e-4 to
2e-6, and left that of others at 4e-5. Which update of its block varies like the multiples of the
golden ratio: weights that swing to and fro must not always be met on the same side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WIDTHS = (0.05, 0.10)
"""sigma_rel of the two averages that a run keeps."""
WIDEST = 12**-0.5
"""sigma_rel of the plain mean of all updates."""
LARGEST_ERROR = 0.1
"""Largest relative error of a reconstructed average's weights w; larger ones are refused."""
GOLDEN = 0x9E3779B1  # 2^32 divided by the golden ratio
SAMPLED_BITS = 13  # blocks of several updates begin at update 2^13


def exponent(sigma_rel: float) -> float:
    """Return gamma of the power-function average of relative width `sigma_rel`, above 0.

    `sigma_rel` is the standard deviation of the weights w, as a share of t. Raises `ValueError`
    above `WIDEST`.
    """
    if not 0 < sigma_rel <= WIDEST * (1 + 1e-9):
        raise ValueError(f"sigma_rel {sigma_rel} is not above 0 and at most {WIDEST:.4f}")
    # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic in gamma
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return max(0.0, float(roots.real.max()))


def sampled(update: int) -> int:
    """Return the newest sampled update up to `update`; 0 before the first."""
    block = 1 << max(0, update.bit_length() - SAMPLED_BITS)
    first = update - update % block
    own = first + ((first // block * GOLDEN & 0xFFFFFFFF) * block >> 32)
    return own if own <= update else sampled(first - 1)


def kept_share(update: int, gamma: float) -> float:
    """Return which share of the average the sampled `update` (1, 2, …) keeps."""
    return (sampled(update - 1) / update) ** (gamma + 1)


def coefficients(
    ends: Sequence[int], widths: Sequence[float], end: int, wanted: Sequence[float]
) -> list[tuple[np.ndarray, float]]:
    """Return the factors of stored averages whose sums are nearest to the averages at `end`.

    Args:
        ends: updates at which the averages were stored, at most `end`.
        widths: their sigma_rel.
        end: update at which the wanted averages end.
        wanted: their sigma_rel.

    Returns:
        For each, the factors, float64 with the sum 1, and the relative error: the square root of
        the integral of the squared difference of the weights w, divided by that of the squared
        wanted ones.
    """
    updates = [0, last := sampled(end)]
    while updates[-1]:
        updates.append(last := sampled(last - 1))
    times = np.array(updates[:0:-1], dtype=np.float64)  # 0, the sampled updates
    spans = np.sqrt(np.diff(times))

    def density(until: int, sigma_rel: float) -> np.ndarray:
        reached = np.minimum(times / sampled(until), 1.0) ** (exponent(sigma_rel) + 1)
        return np.diff(reached) / spans

    basis = np.stack([density(*stored) for stored in zip(ends, widths, strict=True)])
    targets = np.stack([density(end, width) for width in wanted])
    # Scaled to unit length, because late averages are narrow and early ones long.
    lengths = np.linalg.norm(basis, axis=1)
    basis /= lengths[:, None]
    # The factors' sum is fixed by a Lagrange multiplier, so that weights that do not change are
    # reconstructed exactly.
    count, scale = len(basis), np.linalg.norm(1 / lengths)
    matrix = np.zeros((count + 1, count + 1))
    matrix[:count, :count] = basis @ basis.T
    matrix[:count, count] = matrix[count, :count] = 1 / lengths / scale
    right = np.vstack([basis @ targets.T, np.full(len(wanted), 1 / scale)])
    factors = np.linalg.lstsq(matrix, right, rcond=1e-13)[0][:count].T
    errors = np.linalg.norm(factors @ basis - targets, axis=1) / np.linalg.norm(targets, axis=1)
    return list(zip(factors / lengths, map(float, errors), strict=True))


def is_snapshot_step(step: int, total_steps: int, most: int) -> bool:
    """Whether the averages are stored at `step`: about `most` times in a run of `total_steps`.

    Spaced by a fixed share of the steps so far, 1/16 to 1/32 if `most` is 48, because that is how
    the averages' length grows; in the first quarter of the run, evenly.
    """
    per_doubling = 1 << max(0, (most // 3).bit_length() - 1)
    spacing = 1 << max(0, (step // per_doubling).bit_length() - 1)
    return step > 0 and step % max(spacing, total_steps // (4 * per_doubling), 1) == 0
