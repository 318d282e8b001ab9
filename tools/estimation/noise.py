"""Noise level, separated from texture: of white noise, and of noise from before a JPEG."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.libraries import cv2

Plane = NDArray[np.float32]

_SIDE = 7  # of a patch, in pixels
_MAX_PATCHES = 50_000
_ROUNDS = 8  # of the selection of patches; it settles after about three
_CONFIDENCE = 0.9999  # share of the patches of pure noise that count as flat
# With fewer flat patches, the covariance of 49 pixels would be unreliable.
_MIN_PATCHES = 4 * _SIDE**2

_FREQUENCY = np.add.outer(np.arange(8), np.arange(8)).ravel()
_LOW = np.flatnonzero((_FREQUENCY >= 1) & (_FREQUENCY <= 2))  # where texture shows most
_MIDDLE = np.flatnonzero((_FREQUENCY >= 4) & (_FREQUENCY <= 8))
# Shares of the blocks that are flattest in the low frequencies. Noise is the same in both shares;
# the remaining texture grows with the share.
_FLATTEST = (0.03, 0.2)
_MAX_GROWTH = 1.5
_MIN_BLOCKS, _MAX_BLOCKS = 30, 400
_SIGMAS = np.geomspace(0.25, 64, 100)
# Relative to the smallest of the middle steps. Weaker noise is rounded to zero nearly everywhere,
# and the remaining texture looks like noise.
_VISIBLE = 0.25


def white_noise(plane: Plane) -> float:
    """Return the standard deviation of white noise, in the levels of `plane`, (height, width).

    Liu, Tanaka and Okutomi, "Single-Image Noise Level Estimation for Blind Denoising", 2013: the
    smallest eigenvalue of the covariance of patches without texture is the variance of the noise;
    these patches are selected iteratively, given the noise found so far. Noise that was blurred,
    enlarged or compressed afterwards is no longer white and is found only in part. `plane` has
    levels 0..255 (Cb and Cr: around 0) and at least 16 pixels per side.
    """
    from scipy.special import gammaincinv

    patches = np.lib.stride_tricks.sliding_window_view(plane, (_SIDE, _SIDE))
    height, width = patches.shape[:2]
    stride = max(1, int(np.ceil(np.sqrt(height * width / _MAX_PATCHES))))
    patches = patches[::stride, ::stride].reshape(-1, _SIDE**2)
    texture = _texture(plane)[::stride, ::stride].ravel()
    # Clipped patches (black bars, blown highlights) have no noise.
    is_whole = ~((patches == plane.min()) | (patches == plane.max())).any(axis=1)
    if is_whole.sum() >= _MIN_PATCHES:
        patches, texture = patches[is_whole], texture[is_whole]
    variance = _least_variance(patches)
    # The sum of the squared slopes of pure noise has roughly a gamma distribution.
    inside = (_SIDE - 2) ** 2
    limit = 2 * float(gammaincinv(inside / 2, _CONFIDENCE))
    for _ in range(_ROUNDS):
        is_flat = texture < variance * limit
        if is_flat.sum() < _MIN_PATCHES:
            count = min(len(texture), _MIN_PATCHES) - 1
            is_flat = texture <= np.partition(texture, count)[count]
        before, variance = variance, _least_variance(patches[is_flat])
        if abs(variance - before) <= 1e-3 * before:
            break
    return float(np.sqrt(variance))


def _texture(plane: Plane) -> Plane:
    """Return, for each patch, the sum over its inner pixels of the squared slopes."""
    slope = np.array([[-0.5, 0, 0.5]], np.float32)
    squares = cv2.filter2D(plane, -1, slope) ** 2 + cv2.filter2D(plane, -1, slope.T) ** 2
    sums = cv2.boxFilter(squares, -1, (_SIDE - 2, _SIDE - 2), normalize=False)
    margin = _SIDE // 2
    return sums[margin:-margin, margin:-margin]


def _least_variance(patches: NDArray[np.float32]) -> float:
    covariance = np.cov(patches.astype(np.float32), rowvar=False)
    return max(float(np.linalg.eigvalsh(covariance)[0]), 0.0)


def noise_below_jpeg(blocks: NDArray[np.float32], steps: NDArray[np.int64]) -> tuple[float, float]:
    """Return the standard deviation of white luma noise from before a JPEG compression.

    Also returns the weakest noise that would be visible. If the noise is weaker or cannot be
    distinguished from texture, the first number is 0. Blocks without texture are found by their low
    frequencies. The noise is the one under which the quantised coefficients of the middle
    frequencies are most likely. `blocks` is the DCT of the luma on the JPEG's own grid, (rows,
    columns, 8, 8); `steps` are its quantisation steps, (8, 8).
    """
    from scipy.special import ndtr

    levels, step = blocks.reshape(-1, 64), steps.ravel().astype(np.float64)
    visible = _VISIBLE * float(np.percentile(step[_MIDDLE], 10))
    mean = levels[:, 0] / 8
    levels = levels[(mean > 8) & (mean < 247)]  # near black and white, noise is clipped
    if len(levels) < _MIN_BLOCKS:
        return 0.0, visible
    order = np.argsort((levels[:, _LOW] ** 2).sum(axis=1), kind="stable")
    found = []
    for share in _FLATTEST:
        count = max(_MIN_BLOCKS, int(share * len(order)))
        chosen = order[:count][:: max(1, count // _MAX_BLOCKS)]
        multiples = np.abs(np.rint(levels[chosen][:, _MIDDLE] / step[_MIDDLE]))
        below, above = (multiples - 0.5) * step[_MIDDLE], (multiples + 0.5) * step[_MIDDLE]
        likelihoods = [
            np.log(np.maximum(ndtr(above / sigma) - ndtr(below / sigma), 1e-4)).sum()
            for sigma in _SIGMAS
        ]
        found.append(float(_SIGMAS[int(np.argmax(likelihoods))]))
    is_noise = visible <= found[0] and found[1] < _MAX_GROWTH * found[0]
    return (found[0] if is_noise else 0.0), visible
