"""PSNR and SSIM in the conventions of super-resolution papers, in float64 on RGB images.

Images are uint8, or uint16 for 16 bits, whose pixel v has the level v / 257; all values below are
in levels, and a PSNR's peak is 255 levels, which is 65535 in 16 bits. Where uint8 images are
rounded to integers, uint16 images are rounded to 1/257 of a level, as MATLAB does.

Y is BT.601 luma in studio range, as in MATLAB's `rgb2ycbcr`. The papers measure on Y rounded to
uint8 (MATLAB's output for uint8 images): `psnr_y`, `ssim_y`. BasicSR measures on unrounded Y, which
gives 0.01-0.02 dB more: `psnr_y_float`, `ssim_y_float`. SSIM is that of Wang et al., "Image Quality
Assessment: From Error Visibility to Structural Similarity", IEEE TIP 2004: Gaussian window 11x11
with sigma 1.5 within the image, K1 = 0.01, K2 = 0.03.

No result depends on the number of threads, to the last bit: sums over pixels are NumPy's, which
uses one thread.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CONVENTION = (
    "PSNR and SSIM on BT.601 studio-range Y rounded to uint8, as in the papers; "
    "*_float on unrounded Y, as in BasicSR; `scale` pixels cut from every border, none at x1"
)
DATA_RANGE = 255.0
WINDOW, SIGMA = 11, 1.5
BAND = 256
"""Number of rows that PSNR-Y processes at a time."""


def luma(images: Tensor, rounded: bool) -> Tensor:
    """Convert RGB (N, 3, H, W) to BT.601 studio-range Y, float64 (N, 1, H, W) in 16..235.

    With `rounded`, Y is rounded to the steps of the images' type, halves up.
    """
    if images.dtype == torch.uint16:
        return _deep_luma(images, rounded)
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    # Exact, in units of 1/255000, so that halves round correctly.
    y = 65481 * red + 128553 * green + 24966 * blue
    if rounded:
        return (torch.div(y + 127500, 255000, rounding_mode="floor") + 16).to(torch.float64)
    return y.to(torch.float64) / 255000 + 16


def _deep_luma(images: Tensor, rounded: bool) -> Tensor:
    red, green, blue = images.to(torch.int64).split(1, dim=1)
    y = 65481 * red + 128553 * green + 24966 * blue  # in units of 1/255000 of a uint16 step
    if rounded:
        y = torch.div(y + 127500, 255000, rounding_mode="floor") * 255000
    return (y.to(torch.float64) / 255000 + 16 * 257) / 257


def levels(images: Tensor) -> Tensor:
    """Return the levels of uint8 or uint16 images, or of floats in 0..255, as float64."""
    return images.to(torch.float64) / (257 if images.dtype == torch.uint16 else 1)


def mean_of(values: Tensor) -> float:
    """Return the mean of a float64 tensor, independent of the number of threads."""
    return values.mean().item() if values.device.type != "cpu" else float(values.numpy().mean())


def psnr(first: Tensor, second: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of two tensors of the same shape and type.

    They are images, or floats in 0..255. It is infinite if they are equal.
    """
    error = mean_of((levels(first) - levels(second)).square())
    return math.inf if error == 0 else 10 * math.log10(DATA_RANGE**2 / error)


def ssim(first: Tensor, second: Tensor) -> float:
    """Return the mean structural similarity of two NCHW tensors, at least 11x11.

    They are images, or floats in 0..255. Only windows within the images count.
    """
    # One channel at a time, because float64 maps of a whole RGB photograph take gigabytes.
    planes = zip(first.flatten(0, 1), second.flatten(0, 1), strict=True)
    return float(
        sum(_ssim_of_plane(levels(a), levels(b)) for a, b in planes)
        / (first.shape[0] * first.shape[1])
    )


def psnr_y(sr: Tensor, hr: Tensor) -> float:
    """Return the PSNR in dB on Y rounded to the images' type; infinite for equal images.

    The images are RGB (N, 3, H, W) of the same shape and type. Rows are processed in bands, because
    int32 and float64 planes of a whole photograph would fill the memory. Sums of squared integers
    are exact in float64, so for uint8 the bands do not change the value.
    """
    total = 0.0
    for top in range(0, sr.shape[-2], BAND):
        first, second = (
            luma(images[..., top : top + BAND, :], rounded=True) for images in (sr, hr)
        )
        total += float((first - second).square().sum())
    error = total / (sr.shape[0] * sr.shape[-2] * sr.shape[-1])
    return math.inf if error == 0 else 10 * math.log10(DATA_RANGE**2 / error)


def ssim_y(sr: Tensor, hr: Tensor) -> float:
    """Return the SSIM on Y rounded to uint8."""
    return ssim(luma(sr, rounded=True), luma(hr, rounded=True))


def psnr_y_float(sr: Tensor, hr: Tensor) -> float:
    """Return the PSNR in dB on unrounded Y."""
    return psnr(luma(sr, rounded=False), luma(hr, rounded=False))


def ssim_y_float(sr: Tensor, hr: Tensor) -> float:
    """Return the SSIM on unrounded Y."""
    return ssim(luma(sr, rounded=False), luma(hr, rounded=False))


psnr_rgb, ssim_rgb = psnr, ssim


def _ssim_of_plane(a: Tensor, b: Tensor) -> float:
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    mean_a, mean_b, square_a, square_b, product = _blur(torch.stack((a, b, a * a, b * b, a * b)))
    variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    similarity = (
        (2 * mean_a * mean_b + c1)
        * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    )
    return mean_of(similarity)


def _blur(planes: Tensor) -> Tensor:
    """Apply the Gaussian window to float64 NHW along both axes, only where it fits completely."""
    weights = [math.exp(-((index - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for index in range(WINDOW)]
    for axis in (-2, -1):
        length = planes.shape[axis] - WINDOW + 1
        blurred = planes.narrow(axis, 0, length) * (weights[0] / sum(weights))
        for start, weight in enumerate(weights[1:], 1):
            blurred.add_(planes.narrow(axis, start, length), alpha=weight / sum(weights))
        planes = blurred
    return planes
