"""JPEG quality, from the tables of a file or from pixels that were saved again.

A JPEG file holds its quantisation tables. libjpeg makes them from a quality of 1..100 by scaling
the example tables of ITU-T T.81, annex K. Pixels that were decoded and saved in another format keep
a trace: on the block grid, every DCT coefficient of the luma lies near a multiple of its
quantisation step (Fan and de Queiroz, "Identification of Bitmap Compression History", 2003). The
estimated steps and grid are those under which the coefficients are most likely.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# ITU-T T.81, tables K.1 and K.2, row by row.
LUMA_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
CHROMA_TABLE = np.full((8, 8), 99)
CHROMA_TABLE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

SUBSAMPLINGS = {
    (1, 1): "444",
    (2, 1): "422",
    (1, 2): "440",
    (2, 2): "420",
    (4, 1): "411",
    (4, 2): "410",
}
"""(horizontal, vertical) ratio of luma to chroma samples -> name."""

# Standard deviation from rounding the decoded luma and R, G and B:
# sqrt(1/12 + (.299^2 + .587^2 + .114^2) / 12).
ROUNDING = 0.35
_MAX_STEP = 128  # larger steps leave nothing but zeros in ordinary images
_NUM_BLOCKS = 4096  # maximum number of blocks used
_PER_FREQUENCY = 400  # maximum number of nonzero coefficients used per frequency
_MIN_NONZERO = 60  # coefficients; with fewer, there is no estimate
# Share of coefficients that need not be multiples: where R, G or B was clipped, or something was
# pasted.
_OUTLIERS = 0.05
# Gain in nats per coefficient over arbitrary coefficients. It stays below 0.02 on any grid for
# photographs that were never JPEGs.
_MIN_GAIN = 0.06


@dataclass(frozen=True)
class JpegTables:
    """The compression of a JPEG file."""

    quality: int
    """1..100: the quality whose tables equal those of the file, or are nearest to them."""
    is_standard: bool
    """Whether the tables are exactly those of libjpeg for this quality."""
    subsampling: str
    """"444", "422", "440", "420", "411", "410", "gray", or "other"."""
    luma: NDArray[np.int64]
    """Quantisation steps of the luma, (8, 8)."""


@dataclass(frozen=True)
class JpegTrace:
    """A JPEG compression found in pixels."""

    quality: int
    """1..100."""
    offset: tuple[int, int]
    """(row, column), 0..7 each, of the first whole block."""
    gain: float
    """Log-likelihood ratio of quantised over arbitrary coefficients, in nats per nonzero one."""
    luma: NDArray[np.int64]
    """Quantisation steps of the luma for this quality, (8, 8)."""


@cache
def table(quality: int, *, is_chroma: bool = False) -> NDArray[np.int64]:
    """Return libjpeg's quantisation steps for a quality of 1..100, baseline, (8, 8)."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = CHROMA_TABLE if is_chroma else LUMA_TABLE
    steps = np.clip((base * scale + 50) // 100, 1, 255)
    steps.setflags(write=False)
    return steps


def quality_of(
    luma: NDArray[np.int64], chroma: NDArray[np.int64] | None = None
) -> tuple[int, bool]:
    """Return the quality whose tables are nearest, and whether they are equal.

    The distance is the mean absolute difference between the logarithms of the steps. It matters for
    encoders with their own tables (Photoshop, mozjpeg, cameras).
    """
    given = {False: luma} if chroma is None else {False: luma, True: chroma}
    distances = [
        sum(
            float(np.abs(np.log(np.maximum(steps, 1) / table(quality, is_chroma=is_chroma))).mean())
            for is_chroma, steps in given.items()
        )
        for quality in range(1, 101)
    ]
    best = int(np.argmin(distances))
    return best + 1, distances[best] == 0


def read_tables(data: bytes) -> JpegTables | None:
    """Read the quality and the chroma subsampling of a JPEG file; `None` if it has no tables."""
    with Image.open(io.BytesIO(data), formats=["jpeg"]) as image:
        tables = {number: np.array(steps) for number, steps in image.quantization.items()}
        layers = [(across, down, number) for _, across, down, number in image.layer]
    if not layers or any(number not in tables for _, _, number in layers):
        return None
    luma = tables[layers[0][2]].reshape(8, 8).astype(np.int64)
    chroma = None
    subsampling = "gray" if len(layers) == 1 else "other"
    if len(layers) == 3:
        chroma = tables[layers[1][2]].reshape(8, 8).astype(np.int64)
        ratios = {(layers[0][0] / across, layers[0][1] / down) for across, down, _ in layers[1:]}
        subsampling = SUBSAMPLINGS.get(ratios.pop(), "other") if len(ratios) == 1 else "other"
    return JpegTables(*quality_of(luma, chroma), subsampling, luma)


@cache
def _dct_matrix() -> NDArray[np.float32]:
    """Return the orthonormal DCT-II of 8 samples, (frequency, sample)."""
    frequency, sample = np.mgrid[:8, :8]
    matrix = np.cos((2 * sample + 1) * frequency * np.pi / 16) / 2
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def block_dct(luma: NDArray[np.float32], offset: tuple[int, int]) -> NDArray[np.float32]:
    """Return the DCT of all whole 8x8 blocks from `offset` on, (rows, columns, 8, 8)."""
    top, left = offset
    rows, columns = (luma.shape[0] - top) // 8, (luma.shape[1] - left) // 8
    blocks = luma[top : top + 8 * rows, left : left + 8 * columns]
    blocks = blocks.reshape(rows, 8, columns, 8).swapaxes(1, 2)
    matrix = _dct_matrix()
    return matrix @ blocks @ matrix.T


def find_trace(
    luma: NDArray[np.float32], clipped: NDArray[np.bool_] | None = None
) -> JpegTrace | None:
    """Find the traces of a JPEG compression in pixels; `None` if there are none.

    `luma` is that of ITU-R BT.601, full range, float32 (height, width), levels 0..255, not rounded.
    Blocks with pixels that are `clipped` in R, G or B are left out if enough others remain. Images
    with fewer than 32 pixels per side give `None`.
    """
    if min(luma.shape) < 32:
        return None
    best: JpegTrace | None = None
    for offset in _likely_grids(luma):
        trace = _explain(luma, offset, clipped)
        if trace is not None and (best is None or trace.gain > best.gain):
            best = trace
    return best


def _likely_grids(luma: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Return the three grids with the most zero coefficients, and that of an uncropped image."""
    height = min(luma.shape[0], 8 * 40 + 7)
    width = min(luma.shape[1], 8 * 40 + 7)
    top, left = ((luma.shape[0] - height) // 16) * 8, ((luma.shape[1] - width) // 16) * 8
    part = luma[top : top + height, left : left + width]
    zeros = np.zeros((8, 8))
    for row in range(8):
        for column in range(8):
            blocks = block_dct(part, (row, column))
            # Uniform blocks (sky, borders, clipped lights) have zeros on every grid.
            is_flat = np.abs(blocks).max(axis=(2, 3), initial=0, where=_IS_AC) < 1
            zeros[row, column] = (np.abs(blocks[~is_flat]) < 0.5).mean() if (~is_flat).any() else 0
    order = np.argsort(zeros, axis=None)[::-1][:3]
    grids = [(int(place) // 8, int(place) % 8) for place in order]
    return grids if (0, 0) in grids else [*grids, (0, 0)]


_IS_AC = np.ones((8, 8), bool)
_IS_AC[0, 0] = False


def whole_blocks(
    blocks: NDArray[np.float32], clipped: NDArray[np.bool_] | None, offset: tuple[int, int]
) -> NDArray[np.float32]:
    """Return the blocks of `block_dct`, (blocks, 64), without those that have clipped pixels.

    Returns all blocks if an eighth or less would remain.
    """
    rows, columns = blocks.shape[:2]
    blocks = blocks.reshape(-1, 64)
    if clipped is None:
        return blocks
    top, left = offset
    part = clipped[top : top + 8 * rows, left : left + 8 * columns]
    is_whole = ~part.reshape(rows, 8, columns, 8).any(axis=(1, 3)).ravel()
    return blocks[is_whole] if 8 * is_whole.sum() > len(blocks) else blocks


def _explain(
    luma: NDArray[np.float32], offset: tuple[int, int], clipped: NDArray[np.bool_] | None
) -> JpegTrace | None:
    """Return the most likely quality on a grid; `None` if the coefficients are not quantised."""
    blocks = whole_blocks(block_dct(luma, offset), clipped, offset)
    blocks = blocks[:: max(1, len(blocks) // _NUM_BLOCKS)]
    steps = np.arange(1, _MAX_STEP + 1, dtype=np.float32)
    gains = np.zeros((64, _MAX_STEP), np.float32)
    counts = np.zeros(64, int)
    for frequency in range(1, 64):
        levels = blocks[:, frequency]
        # Zero is a multiple of every step, so only other coefficients distinguish steps.
        levels = np.abs(levels[np.abs(levels) > 3 * ROUNDING])[:_PER_FREQUENCY]
        counts[frequency] = len(levels)
        if len(levels):
            gains[frequency] = step_gains(levels, steps)
    total = int(counts.sum())
    if total < _MIN_NONZERO:
        return None
    luma_tables = np.stack([table(quality).ravel() for quality in range(1, 101)])
    within = np.minimum(luma_tables, _MAX_STEP) - 1
    by_quality = gains[np.arange(64), within].sum(axis=1)
    best = int(np.argmax(by_quality))
    free = gains.max(axis=1)
    quality, gain = best + 1, float(by_quality[best]) / total
    is_standard = gain > 0.6 * float(free.sum()) / total
    if not is_standard:
        # Tables of another encoder: use the steps of the frequencies where they are certain.
        is_certain = (counts >= 20) & (free > 0.3 * counts)
        if is_certain.sum() < 5:
            return None
        found = np.argmax(gains, axis=1) + 1
        ratios = np.log(found[is_certain] / luma_tables[:, is_certain])
        quality = int(np.argmin(np.abs(ratios).mean(axis=1))) + 1
        gain = float(free[is_certain].sum()) / total
    if gain < _MIN_GAIN:
        return None
    return JpegTrace(quality, offset, gain, table(quality))


def step_gains(levels: NDArray[np.float32], steps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return, for each step, the log-likelihood of `levels` as its multiples with rounding noise.

    It is relative to levels that are uniformly distributed. For steps of a few times the noise or
    less, the two cannot be distinguished, and the result is 0.
    """
    distance = levels[:, None] - steps * np.rint(levels[:, None] / steps)
    density = np.zeros_like(distance)
    for turn in (-1, 0, 1):  # neighbouring multiples matter where the step is small
        density += np.exp(-0.5 * ((distance + turn * steps) / ROUNDING) ** 2)
    density *= steps / (ROUNDING * np.sqrt(2 * np.pi, dtype=np.float32))
    # The nearest multiple must not be zero: these levels are not.
    density[np.rint(levels[:, None] / steps) == 0] = 0
    return np.log(_OUTLIERS + (1 - _OUTLIERS) * density).sum(axis=0)
