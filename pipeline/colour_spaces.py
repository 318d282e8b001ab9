"""Conversions between sRGB, YCbCr and Oklab.

RGB is sRGB in [0, 1], NCHW. YCbCr is full-range ITU-R BT.601 as in JPEG (JFIF 1.02): all three
planes are in [0, 1], and gray has 0.5 in both chroma planes. Oklab is that of Björn Ottosson, "A
perceptual color space for image processing", 2020, with the matrices of 2021,
https://bottosson.github.io/posts/oklab: lightness in [0, 1], a and b within 0.4 of 0.

All conversions are differentiable with finite gradients everywhere, extend smoothly to values
outside [0, 1], keep the shape, and compute in float32 (in float64 for float64 input), because half
precision would cause banding in dark tones.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rows = tuple[tuple[float, float, float], ...]

LUMA = (0.299, 0.587, 0.114)
# Ranges of B - Y and R - Y: 2 * (1 - weight of the colour in luma).
CB_RANGE, CR_RANGE = (
    1.772,
    1.402,
)

RGB_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
LMS_TO_OKLAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
OKLAB_TO_LMS = (
    (1.0, 0.3963377774, 0.2158037573),
    (1.0, -0.1055613458, -0.0638541728),
    (1.0, -0.0894841775, -1.2914855480),
)
LMS_TO_RGB = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)
SRGB_KNEE, LINEAR_KNEE = 0.04045, 0.0031308  # sRGB's transfer curve is linear below
BLACK = 1e-6
"""Below this, the cube root is replaced by a line, because its gradient is infinite at black.

The darkest byte colour other than black is 15 times larger.
"""


def rgb_to_ycbcr(images: Tensor) -> Tensor:
    """Convert float NCHW RGB in [0, 1] to full-range YCbCr in [0, 1], chroma centred at 0.5."""
    red, _, blue = at_least_float32(images).unbind(1)
    luma = _mix(images, (LUMA,))[:, 0]
    return torch.stack((luma, (blue - luma) / CB_RANGE + 0.5, (red - luma) / CR_RANGE + 0.5), dim=1)


def ycbcr_to_rgb(images: Tensor) -> Tensor:
    """Invert `rgb_to_ycbcr`; colours outside the RGB gamut give values outside [0, 1]."""
    luma, cb, cr = at_least_float32(images).unbind(1)
    red, blue = luma + CR_RANGE * (cr - 0.5), luma + CB_RANGE * (cb - 0.5)
    return torch.stack((red, (luma - LUMA[0] * red - LUMA[2] * blue) / LUMA[1], blue), dim=1)


def rgb_to_oklab(images: Tensor) -> Tensor:
    """Convert float NCHW sRGB in [0, 1] to Oklab.

    L is in [0, 1]; a (green to red) and b (blue to yellow) are centred at 0.
    """
    return _mix(_cube_root(_mix(_to_linear(at_least_float32(images)), RGB_TO_LMS)), LMS_TO_OKLAB)


def oklab_to_rgb(images: Tensor) -> Tensor:
    """Invert `rgb_to_oklab`; colours outside the sRGB gamut give values outside [0, 1]."""
    return _from_linear(_mix(_cube(_mix(images, OKLAB_TO_LMS)), LMS_TO_RGB))


def at_least_float32(images: Tensor) -> Tensor:
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _mix(images: Tensor, rows: Rows) -> Tensor:
    """Multiply each pixel's colour by a matrix.

    Plain arithmetic is used because convolutions may run in TF32.
    """
    first, second, third = at_least_float32(images).unbind(1)
    return torch.stack([row[0] * first + row[1] * second + row[2] * third for row in rows], dim=1)


# `torch.where` computes both branches. The argument of the branch not taken is clamped into its
# range, because otherwise its gradient would be NaN instead of 0.


def _to_linear(srgb: Tensor) -> Tensor:
    return torch.where(
        srgb <= SRGB_KNEE, srgb / 12.92, ((srgb.clamp(min=SRGB_KNEE) + 0.055) / 1.055) ** 2.4
    )


def _from_linear(linear: Tensor) -> Tensor:
    curve = 1.055 * linear.clamp(min=LINEAR_KNEE) ** (1 / 2.4) - 0.055
    return torch.where(linear <= LINEAR_KNEE, 12.92 * linear, curve)


def _cube_root(values: Tensor) -> Tensor:
    size = values.abs()
    return torch.where(
        size < BLACK, values * BLACK ** (-2 / 3), values.sign() * size.clamp(min=BLACK) ** (1 / 3)
    )


def _cube(values: Tensor) -> Tensor:
    return torch.where(
        values.abs() < BLACK ** (1 / 3), values * BLACK ** (2 / 3), values * values * values
    )
