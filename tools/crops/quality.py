"""Quality measures of a picture: detail, sharpness, entropy, and a hash to find copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from pipeline.libraries import cv2
from tools.crops.duplicates import perceptual_hash
from tools.crops.grid import halved

MIN_GRADIENT = 1.25  # gray levels per pixel; clear skies, plain walls and black bars are below
MIN_SHARPNESS = 0.52  # pictures enlarged 2 times or more, or blurred by sigma >= 1, are below

_BLOCK = 32  # side in pixels of the blocks in which sharpness is measured
# Rows measured at a time, chosen to fit into the cache; only every second band of a large picture
# is measured.
_BAND = 64
_LARGE = 1 << 19  # pixels of a large picture
_PERCENTILE = 90  # over the blocks, because one sharp subject makes a photograph sharp
# Mean |Laplacian| of the halved block: six times the effect of rounding to integers.
_MIN_DETAIL = 6.0
# Nearest-neighbour enlargement leaves steps only at every 2nd, 3rd or 4th column. The steps of the
# weakest phase are then 0.0 times those of the strongest, or 0.3 after JPEG of quality 80;
# photographs have 0.6 or more.
_MAX_PHASE = 0.35
_PERIODS = (2, 3, 4)
# In columns. Where the factor is not an integer, the weak phase changes along the picture, so each
# stretch is judged separately.
_STRETCH = 120


def crop_gates(pixels: np.ndarray) -> dict[str, float | str]:
    """Measure a crop, uint8 RGB (height, width, 3), at least 8 pixels per side.

    Floats have 4 significant digits. `gradient`: mean gradient magnitude of the luma in gray levels
    per pixel. `sharpness`: see `is_soft`; 0 for a single colour. `entropy`: bits per pixel of the
    luma histogram. `hash`: hex of `perceptual_hash`.
    """
    luma = _luma(pixels)
    half = halved(luma)
    return {
        "gradient": _rounded(_gradient(luma)),
        "sharpness": _rounded(_global_sharpness(luma, half)),
        "entropy": _rounded(_entropy(luma)),
        "hash": perceptual_hash(luma).hex(),
    }


def picture_gates(pixels: np.ndarray) -> dict[str, float | str]:
    """Measure a whole photograph or frame, uint8 RGB (height, width, 3).

    It must have at least 8 pixels per side. `source_sharpness`: see `is_soft`; 0 if no part has any
    detail. `source_hash`: hex of `perceptual_hash`.
    """
    luma = _luma(pixels)
    return {
        "source_sharpness": _rounded(_block_sharpness(luma)),
        "source_hash": perceptual_hash(luma).hex(),
    }


def file_gates(pixels: np.ndarray) -> dict[str, float | str]:
    """Measure `gradient`, `source_sharpness` and `hash` of an image without a manifest."""
    luma = _luma(pixels)
    return {
        "gradient": _rounded(_gradient(luma)),
        "source_sharpness": _rounded(_block_sharpness(luma)),
        "hash": perceptual_hash(luma).hex(),
    }


def is_flat(gates: Mapping[str, float | str], min_gradient: float = MIN_GRADIENT) -> bool:
    """Whether a crop has too little detail to learn from."""
    return float(gates["gradient"]) < min_gradient


def is_soft(
    gates: Mapping[str, float | str],
    min_sharpness: float = MIN_SHARPNESS,
    name: str = "source_sharpness",
) -> bool:
    """Whether a photograph (or, with `name="sharpness"`, a crop) is blurred or enlarged.

    Sharpness is the strength of the finest octave relative to the next one: high-pass filtered luma
    over that of the halved picture. Photographs have 0.55 to 1.6 regardless of contrast; 0.40 to
    0.48 after 2x enlargement (bicubic, bilinear, Lanczos), 0.3 to 0.4 after 3x or 4x or a Gaussian
    of sigma >= 1.5. A photograph is measured by its sharpest blocks that have detail, a crop as a
    whole. A photograph gets 0 if pixels are repeated (nearest-neighbour enlargement). 1.5x
    enlargement leaves 0.45 to 0.65, some of it above the default.
    """
    return float(gates[name]) < min_sharpness


def _luma(pixels: np.ndarray) -> np.ndarray:
    if min(pixels.shape[:2]) < 8:
        raise ValueError(
            f"{pixels.shape[0]}x{pixels.shape[1]}: sharpness needs at least 8 pixels per side"
        )
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _rounded(value: float) -> float:
    """Round to four significant digits.

    The values are short in JSON and do not depend on a machine's order of summation.
    """
    return float(f"{value:.4g}")


def _gradient(luma: np.ndarray) -> float:
    """Mean gradient magnitude in gray levels per pixel, within 4 %.

    Uses the alpha-max-plus-beta-min approximation, which needs no floats.
    """
    corner = luma[:-1, :-1]
    across, down = cv2.absdiff(luma[:-1, 1:], corner), cv2.absdiff(luma[1:, :-1], corner)
    largest, smallest = (
        cv2.sumElems(cv2.max(across, down))[0],
        cv2.sumElems(cv2.min(across, down))[0],
    )
    return (0.9604 * largest + 0.3978 * smallest) / corner.size


def _entropy(luma: np.ndarray) -> float:
    """Entropy of the luma histogram in bits, 0 (one colour) to 8.

    With 2^18 pixels or more, only every eighth row is counted.
    """
    rows = luma[:: 8 if luma.size >= 1 << 18 else 1]
    counts = cv2.calcHist([rows], [0], None, [256], [0, 256]).ravel().astype(np.float64)
    shares = counts[counts > 0] / rows.size
    return abs(float(-(shares * np.log2(shares)).sum()))


def _global_sharpness(luma: np.ndarray, half: np.ndarray) -> float:
    """Sharpness of the picture as a whole, dominated by its strongest edges."""
    coarse = _high_pass(half)
    return _high_pass(luma) / coarse if coarse else 0.0


def _high_pass(luma: np.ndarray) -> float:
    """Root mean square of the difference from a 3x3 mean."""
    return cv2.norm(luma, cv2.blur(luma, (3, 3)), cv2.NORM_L2) / luma.size**0.5


def _block_sharpness(luma: np.ndarray) -> float:
    """Sharpness of the sharpest blocks that have detail, with the noise floor subtracted."""
    if any(_is_repeated(steps, count) for steps, count in _steps(luma)):
        return 0.0
    if min(luma.shape) < 2 * _BLOCK:
        return _global_sharpness(luma, halved(luma))
    stride = _BAND if luma.size <= _LARGE else 2 * _BAND
    bands = [luma[top : top + _BAND] for top in range(0, luma.shape[0] - _BLOCK + 1, stride)]
    blocks = [(_blocks(band, _BLOCK), _blocks(halved(band), _BLOCK // 2)) for band in bands]
    fine, coarse = (
        np.concatenate([values.ravel() for values in kind]) for kind in zip(*blocks, strict=True)
    )
    noise = _noise(fine, coarse)  # uncorrelated, so squares add up; halving the picture halves it
    detail = np.sqrt(np.maximum(coarse**2 - (noise / 2) ** 2, 0))
    strong = detail > max(_MIN_DETAIL, noise)
    if not strong.any():
        return 0.0
    fine = np.sqrt(np.maximum(fine[strong] ** 2 - noise**2, 0))
    return _percentile(fine / detail[strong], _PERCENTILE)


def _blocks(luma: np.ndarray, side: int) -> np.ndarray:
    """Mean |Laplacian| of each block of `side` x `side` pixels: float64 (rows, columns)."""
    rows, columns = luma.shape[0] // side, luma.shape[1] // side
    magnitudes = np.abs(cv2.Laplacian(luma[: rows * side, : columns * side], cv2.CV_16S))
    # The sums are at most 32 * 1020.
    sums = np.add.reduce(magnitudes.reshape(rows, side, columns * side), axis=1, dtype=np.uint16)
    return sums.reshape(rows, columns, side).sum(axis=2, dtype=np.uint32) / side**2


def _noise(fine: np.ndarray, coarse: np.ndarray) -> float:
    """Noise floor of `fine`, estimated from blocks of pure noise; 0 if there are too few.

    In pure noise `fine` is twice `coarse`.
    """
    is_noise = fine > 1.3 * coarse
    if is_noise.mean() <= 0.02:
        return 0.0
    return min(_percentile(fine[is_noise], 10), 1.3 * float(fine.min()))


def _percentile(values: np.ndarray, percent: int) -> float:
    """Same as `np.percentile`, which takes at least 50 us and holds the GIL meanwhile."""
    values = np.sort(values)
    place = (len(values) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return float(values[low] + (values[high] - values[low]) * (place - low))


def _steps(luma: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the sums of differences between adjacent columns, then rows, and their pixel counts.

    Only a quarter of the pixels is used.
    """
    rows = luma[::4]
    yield (
        cv2.reduce(
            cv2.absdiff(rows[:, 1:], rows[:, :-1]), 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S
        ).ravel(),
        len(rows),
    )
    width = max(1, luma.shape[1] // 16)
    strips = [
        luma[:, left : left + width] for left in range(0, luma.shape[1] - width + 1, 4 * width)
    ]
    sums = [
        cv2.reduce(cv2.absdiff(strip[1:], strip[:-1]), 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel()
        for strip in strips
    ]
    yield np.add.reduce(sums), width * len(strips)


def _is_repeated(steps: np.ndarray, count: int) -> bool:
    """Whether columns (or rows) repeat their neighbours, as after nearest-neighbour enlargement.

    Also detects factors such as 1.5.
    """
    steps = np.minimum(steps, 2 * steps.mean())  # a single strong edge is no pattern
    stretch = min(_STRETCH, len(steps) // 12 * 12)
    if not stretch:
        return False
    stretches = steps[: len(steps) // stretch * stretch].reshape(-1, stretch)
    stretches = stretches[stretches.sum(axis=1) > stretch * count / 4]  # ignore black bars
    if not stretches.size:
        return False
    for period in _PERIODS:
        phases = stretches.reshape(-1, stretch // period, period).sum(axis=1)
        if _percentile(phases.min(axis=1) / phases.max(axis=1), 50) < _MAX_PHASE:
            return True
    return False
