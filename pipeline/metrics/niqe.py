"""NIQE: how far an image's statistics are from those of natural photographs, without an HR.

Mittal, Soundararajan and Bovik, "Making a 'Completely Blind' Image Quality Analyzer", IEEE Signal
Processing Letters 2013. An image of luma is normalized by its local mean and deviation (MSCN), cut
into blocks of 96x96 pixels, and described by 18 features per block: shape and scale of a
generalized Gaussian of the coefficients, and of asymmetric ones of the products of neighbours in
four directions. The same blocks at half the size give 18 more. The score is the distance of two
multivariate Gaussians: of the image's blocks, and of those of natural photographs, which are
parameters read from a file. Lower is better; sharp photographs score about 2 to 5.

Luma is BT.601 studio-range Y rounded to levels, as in the authors' MATLAB code and in BasicSR
1.4.2, whose values it reaches to 1e-3 on photographs with the same parameters. Where whole blocks
are of one colour, BasicSR takes the rounding of float32 for a texture, and the values differ.
Implementations that do not round luma, or resize in another way, differ in the first or second
decimal.

Computed in float64 by NumPy on the host; no result depends on the number of threads.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.ndimage import correlate1d
from scipy.special import gamma
from torch import Tensor

from pipeline.cli import UserError
from pipeline.files import read_regular_file, write_atomically
from pipeline.images import as_bytes
from pipeline.metrics.psnr_ssim import luma

BLOCK = 96  # pixels; half of it at the half size
NUM_FEATURES = 36
SHARPNESS = 0.75  # of an image's sharpest block: blurrier ones are not natural statistics
Floats = NDArray[np.float64]

_REACH = np.arange(-3, 4)
WINDOW = np.exp(-((_REACH / (7 / 6)) ** 2) / 2)
WINDOW /= WINDOW.sum()  # Gaussian of 7 pixels, along each axis
# Of Keys' cubic kernel (a = -0.5) at half the size, antialiased: at distances 0.25, 0.75, ... of
# its own unit, as MATLAB's imresize weighs the 8 pixels around each new one.
_DISTANCES = np.abs(np.arange(-3.5, 4)) / 2
HALVING = np.where(
    _DISTANCES <= 1,
    1.5 * _DISTANCES**3 - 2.5 * _DISTANCES**2 + 1,
    -0.5 * _DISTANCES**3 + 2.5 * _DISTANCES**2 - 4 * _DISTANCES + 2,
)
HALVING /= HALVING.sum()
# The shape of an asymmetric generalized Gaussian has no closed form: it is looked up in the
# ratio of squared mean and variance of these shapes, which grows with the shape.
SHAPES = np.arange(0.2, 10.001, 0.001)
RATIOS = gamma(2 / SHAPES) ** 2 / (gamma(1 / SHAPES) * gamma(3 / SHAPES))
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
# Names of mean and covariance: ours and BasicSR's, and those of the authors' MATLAB release.
NAMES = (("mu_pris_param", "cov_pris_param"), ("mu_prisparam", "cov_prisparam"))
WAY_OUT = (
    "make one from a folder of sharp photographs with `python tools/fit_niqe.py FOLDER -o "
    "niqe.npz`, or name BasicSR's niqe_pris_params.npz or the authors' modelparameters.mat"
)


class NiqeMetric:
    """NIQE of SR; HR is not looked at.

    Args:
        network: "natural": the statistics are those of natural photographs.
        weights: file with their mean and covariance, see `read_parameters`.
        device: not used; NIQE is computed on the host.

    Raises `UserError` if the file is missing or is not one of NIQE's parameters.
    """

    smallest_side = 2 * BLOCK  # in pixels: a covariance needs several blocks

    def __init__(
        self,
        network: str = "natural",
        weights: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if network != "natural":
            raise ValueError(f"network {network!r} is not 'natural'")
        if weights is None:
            raise UserError(f"NIQE needs a file of parameters: {WAY_OUT}")
        self.mean, self.covariance = read_parameters(weights)

    def __call__(self, sr: Tensor, hr: Tensor | None = None) -> float:
        """Return the mean over RGB (N, 3, H, W) images, uint8 or uint16; see `niqe`.

        16 bits are rounded to 8, because the natural parameters are those of 8 bits.
        """
        planes = luma(as_bytes(sr.cpu()), rounded=True)[:, 0].numpy()
        return sum(niqe(plane, self.mean, self.covariance) for plane in planes) / len(planes)


def niqe(plane: Floats, mean: Floats, covariance: Floats) -> float:
    """Return the distance of an image from the natural parameters, 0 or more.

    `plane` is luma (height, width) in levels of 0..255, at least 2 blocks each way. It is infinite
    for an image with fewer than two blocks that are not of one colour.
    """
    features = block_features(plane)
    # Blocks of one colour have no distribution. They count in no feature, as in BasicSR.
    whole = features[~np.isnan(features).any(axis=1)]
    if len(whole) < 2:
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        difference = np.nanmean(features, axis=0) - mean
    inverse = np.linalg.pinv((covariance + _covariance(whole)) / 2)
    return math.sqrt(max(0.0, float(np.einsum("i,ij,j", difference, inverse, difference))))


def block_features(plane: Floats) -> Floats:
    """Return the features of each whole block of a luma plane, (blocks, 36).

    Features are NaN where a block, at one of the sizes, is of one colour.
    """
    return _features(_whole_blocks(plane))


def sharp_features(plane: Floats) -> Floats:
    """Return the features of the sharp blocks of a photograph's luma, (blocks, 36).

    Sharp is a block whose mean local deviation is more than `SHARPNESS` of the largest.
    """
    plane = _whole_blocks(plane)
    sharpness = _blocks(_normalized(plane)[1], BLOCK).mean(axis=(1, 2))
    features = _features(plane)[sharpness > SHARPNESS * sharpness.max(initial=0)]
    return features[~np.isnan(features).any(axis=1)]


def fit(features: Iterable[Floats]) -> tuple[Floats, Floats]:
    """Return mean (36) and covariance (36, 36) of the sharp blocks of natural photographs.

    Raises `UserError` if there are too few blocks for a covariance that can be inverted.
    """
    blocks = np.concatenate([np.empty((0, NUM_FEATURES)), *features])
    if len(blocks) < 2 * NUM_FEATURES:
        raise UserError(
            f"NIQE's {NUM_FEATURES} features need at least {2 * NUM_FEATURES} sharp blocks of "
            f"{BLOCK}x{BLOCK} pixels, but the images have {len(blocks)}; add larger or more images"
        )
    return blocks.mean(axis=0), _covariance(blocks)


def write_parameters(path: Path, mean: Floats, covariance: Floats) -> None:
    """Write parameters as .npz with the names of BasicSR's file, which BasicSR reads as well."""
    content = io.BytesIO()
    np.savez(
        content,
        mu_pris_param=mean[None],
        cov_pris_param=covariance,
        gaussian_window=np.outer(WINDOW, WINDOW),
    )
    write_atomically(path, content.getvalue())


def read_parameters(file: str) -> tuple[Floats, Floats]:
    """Return mean (36) and covariance (36, 36) of natural photographs from a file.

    It is .npz as `tools/fit_niqe.py` writes it or as in BasicSR, or the authors' .mat. Raises
    `UserError` if it is missing, or not such a file.
    """
    path = Path(file).expanduser()
    try:
        content = io.BytesIO(read_regular_file(path))
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): {WAY_OUT}") from error
    try:
        if path.suffix == ".mat":
            found = loadmat(content)
        else:
            with np.load(content, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
        names = next(pair for pair in NAMES if pair[0] in found)
        mean, covariance = (np.asarray(found[name], np.float64) for name in names)
        mean = mean.reshape(NUM_FEATURES)
        covariance = covariance.reshape(NUM_FEATURES, NUM_FEATURES)
    # What the two readers raise for other files is nearly anything.
    except Exception as error:
        raise UserError(f"{file} does not hold NIQE's parameters: {WAY_OUT}") from error
    is_symmetric = np.allclose(covariance, covariance.T)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all() and is_symmetric):
        raise UserError(f"{file}: mean or covariance is not finite or not symmetric: {WAY_OUT}")
    return mean, covariance


def _covariance(rows: Floats) -> Floats:
    # Not `np.cov`: BLAS rounds differently with another number of threads.
    centred = rows - rows.mean(axis=0)
    return np.einsum("ni,nj->ij", centred, centred) / (len(rows) - 1)


def _whole_blocks(plane: Floats) -> Floats:
    height, width = (side - side % BLOCK for side in plane.shape)
    return np.asarray(plane[:height, :width], np.float64)


def _features(plane: Floats) -> Floats:
    """Return the features of a plane of whole blocks."""
    small = _halved(plane)
    return np.concatenate(
        [
            _scale_features(_blocks(_normalized(pixels)[0], size))
            for pixels, size in ((plane, BLOCK), (small, BLOCK // 2))
        ],
        axis=1,
    )


def _normalized(plane: Floats) -> tuple[Floats, Floats]:
    """Return the mean-subtracted, contrast-normalized plane (MSCN), and the local deviation."""
    mean = _blurred(plane)
    deviation = np.sqrt(np.abs(_blurred(plane**2) - mean**2))
    coefficients = (plane - mean) / (deviation + 1)
    # Rounding leaves traces where all is of one colour, which would be taken for a texture.
    coefficients[np.abs(coefficients) < 1e-9] = 0
    return coefficients, deviation


def _blurred(plane: Floats) -> Floats:
    return correlate1d(correlate1d(plane, WINDOW, 0, mode="nearest"), WINDOW, 1, mode="nearest")


def _halved(plane: Floats) -> Floats:
    """Halve height and width, both even, like MATLAB's imresize (cubic, antialiased)."""
    for _ in range(2):  # each time along the first axis
        padded = np.pad(plane, ((3, 3), (0, 0)), mode="symmetric")
        length = len(plane)
        plane = sum(
            weight * padded[start : start + length : 2] for start, weight in enumerate(HALVING)
        ).T
    return plane


def _blocks(plane: Floats, size: int) -> Floats:
    """Cut a plane into (blocks, size, size)."""
    rows, columns = (side // size for side in plane.shape)
    return plane.reshape(rows, size, columns, size).swapaxes(1, 2).reshape(-1, size, size)


def _scale_features(blocks: Floats) -> Floats:
    """Return the 18 features of each block of one size, (blocks, 18)."""
    shape, left, right = _fitted(blocks)
    features = [shape, (left + right) / 2]
    for shift in NEIGHBOURS:
        shape, left, right = _fitted(blocks * np.roll(blocks, shift, axis=(1, 2)))
        mean = (right - left) * gamma(2 / shape) / gamma(1 / shape)
        features += [shape, mean, left, right]
    return np.stack(features, axis=1)


def _fitted(blocks: Floats) -> tuple[Floats, Floats, Floats]:
    """Fit an asymmetric generalized Gaussian to each block: shape, left and right scale.

    NaN where a block has no values below or above 0.
    """
    values = blocks.reshape(len(blocks), -1)
    squares = values**2
    with np.errstate(divide="ignore", invalid="ignore"):
        left, right = (
            np.sqrt(np.where(side, squares, 0).sum(axis=1) / side.sum(axis=1))
            for side in (values < 0, values > 0)
        )
        skew = left / right
        ratio = np.abs(values).mean(axis=1) ** 2 / squares.mean(axis=1)
        ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    place = np.searchsorted((RATIOS[1:] + RATIOS[:-1]) / 2, ratio)  # of the nearest ratio
    shape = np.where(np.isnan(ratio), np.nan, SHAPES[np.minimum(place, len(SHAPES) - 1)])
    scale = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, left * scale, right * scale
