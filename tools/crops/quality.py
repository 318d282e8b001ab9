"""What a picture is worth to training, in numbers: detail, sharpness, entropy, and a hash to find
its copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from pipeline.libraries import cv2
from tools.crops.duplicates import perceptual_hash
from tools.crops.grid import halved

MIN_GRADIENT = 1.25  # grey levels a pixel: below lie clear skies, plain walls and black bars
MIN_SHARPNESS = (
    0.52  # below lie pictures that were enlarged 2 times or more, or blurred by sigma >= 1
)

_BLOCK = 32  # pixels a side of the blocks that sharpness is measured in
# rows that are measured at a time, which fit into the cache; of large pictures every second band
_BAND = 64
_LARGE = 1 << 19  # pixels
_PERCENTILE = 90  # of the blocks: one sharp subject makes a photograph sharp
_MIN_DETAIL = (
    6.0  # mean |Laplacian| of the halved block: six times what rounding to whole levels makes
)
# Nearest-neighbour enlargement leaves steps at every 2nd, 3rd or 4th column alone: the steps of the
# weakest phase are 0.0 of the strongest one's, 0.3 after JPEG of quality 80; in photographs 0.6 or
# more.
_MAX_PHASE = 0.35
_PERIODS = (2, 3, 4)
# columns; which phase is weak may change over a picture where the factor is not a whole number
_STRETCH = 120


def crop_gates(pixels: np.ndarray) -> dict[str, float | str]:
    """Measures of a crop, uint8 RGB (height, width, 3), at least 8 pixels a side; floats of 4
    significant digits.

    `gradient`: mean gradient magnitude of the luma, grey levels a pixel. `sharpness`: as `is_soft`
    explains; 0 where there is nothing but one colour. `entropy`: bits a pixel of the luma
    histogram. `hash`: hex of `perceptual_hash`.
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
    """Measures of a whole photograph or frame, uint8 RGB (height, width, 3), at least 8 pixels a
    side.

    `source_sharpness`: as `is_soft` explains; 0 where no part has any detail. `source_hash`: hex of
    `perceptual_hash`.
    """
    luma = _luma(pixels)
    return {
        "source_sharpness": _rounded(_block_sharpness(luma)),
        "source_hash": perceptual_hash(luma).hex(),
    }


def file_gates(pixels: np.ndarray) -> dict[str, float | str]:
    """What decides whether an image of no manifest is good: `gradient`, `source_sharpness` and
    `hash`, in one go."""
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

    Sharpness is how strong the finest octave is against the next one: high-pass filtered luma over
    that of the halved picture. Photographs have 0.55 to 1.6, whatever their contrast; 0.40 to 0.48
    after enlarging 2 times (bicubic, bilinear, Lanczos), 0.3 to 0.4 after 3 or 4 times or a
    Gaussian of sigma >= 1.5. A photograph counts as sharp as its sharpest blocks that have detail;
    a crop is measured as a whole. A photograph has 0 where pixels are repeated (nearest-neighbour
    enlargement). Enlarging 1.5 times leaves 0.45 to 0.65, some of it above the default.
    """
    return float(gates[name]) < min_sharpness


def _luma(pixels: np.ndarray) -> np.ndarray:
    if min(pixels.shape[:2]) < 8:
        raise ValueError(
            f"{pixels.shape[0]}x{pixels.shape[1]}: sharpness needs at least 8 pixels a side"
        )
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _rounded(value: float) -> float:
    """Four significant digits: short in JSON, and the same on machines that sum in another
    order."""
    return float(f"{value:.4g}")


def _gradient(luma: np.ndarray) -> float:
    """Mean gradient magnitude in grey levels a pixel, within 4 %: alpha max plus beta min, which
    needs no floats."""
    corner = luma[:-1, :-1]
    across, down = cv2.absdiff(luma[:-1, 1:], corner), cv2.absdiff(luma[1:, :-1], corner)
    largest, smallest = (
        cv2.sumElems(cv2.max(across, down))[0],
        cv2.sumElems(cv2.min(across, down))[0],
    )
    return (0.9604 * largest + 0.3978 * smallest) / corner.size


def _entropy(luma: np.ndarray) -> float:
    """Bits of the luma histogram, of every eighth row where there are 2^18 pixels: 0 (one colour)
    to 8."""
    rows = luma[:: 8 if luma.size >= 1 << 18 else 1]
    counts = cv2.calcHist([rows], [0], None, [256], [0, 256]).ravel().astype(np.float64)
    shares = counts[counts > 0] / rows.size
    return abs(float(-(shares * np.log2(shares)).sum()))


def _global_sharpness(luma: np.ndarray, half: np.ndarray) -> float:
    """Sharpness of the picture as a whole; its strongest edges count most."""
    coarse = _high_pass(half)
    return _high_pass(luma) / coarse if coarse else 0.0


def _high_pass(luma: np.ndarray) -> float:
    """Root mean square of what a 3x3 mean takes away."""
    return cv2.norm(luma, cv2.blur(luma, (3, 3)), cv2.NORM_L2) / luma.size**0.5


def _block_sharpness(luma: np.ndarray) -> float:
    """Sharpness of the sharpest blocks that have detail, the noise floor taken off."""
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
    """Mean |Laplacian| of each block of `side` x `side` pixels; float64 (rows, columns)."""
    rows, columns = luma.shape[0] // side, luma.shape[1] // side
    magnitudes = np.abs(cv2.Laplacian(luma[: rows * side, : columns * side], cv2.CV_16S))
    sums = np.add.reduce(
        magnitudes.reshape(rows, side, columns * side), axis=1, dtype=np.uint16
    )  # at most 32 * 1020
    return sums.reshape(rows, columns, side).sum(axis=2, dtype=np.uint32) / side**2


def _noise(fine: np.ndarray, coarse: np.ndarray) -> float:
    """The noise floor of `fine`, told by blocks where nothing but noise is: there, it is twice
    `coarse`; else 0."""
    is_noise = fine > 1.3 * coarse
    if is_noise.mean() <= 0.02:
        return 0.0
    return min(_percentile(fine[is_noise], 10), 1.3 * float(fine.min()))


def _percentile(values: np.ndarray, percent: int) -> float:
    """`np.percentile`, which takes 50 us for any number of values and holds Python's lock
    meanwhile."""
    values = np.sort(values)
    place = (len(values) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return float(values[low] + (values[high] - values[low]) * (place - low))


def _steps(luma: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """How much each column, then each row, differs from the last: (sums, of how many pixels), of a
    quarter of them."""
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
    """Whether columns (or rows) repeat their neighbours, as after nearest-neighbour enlargement
    (also by 1.5)."""
    steps = np.minimum(steps, 2 * steps.mean())  # a single strong edge is no pattern
    stretch = min(_STRETCH, len(steps) // 12 * 12)
    if not stretch:
        return False
    stretches = steps[: len(steps) // stretch * stretch].reshape(-1, stretch)
    stretches = stretches[stretches.sum(axis=1) > stretch * count / 4]  # leaves out black bars
    if not stretches.size:
        return False
    for period in _PERIODS:
        phases = stretches.reshape(-1, stretch // period, period).sum(axis=1)
        if _percentile(phases.min(axis=1) / phases.max(axis=1), 50) < _MAX_PHASE:
            return True
    return False
