"""Colour space conversions, and generators that work in a colour space other than RGB.

RGB is sRGB in [0, 1], NCHW. YCbCr is full-range ITU-R BT.601 as in JPEG (JFIF 1.02): all three
planes are in [0, 1], and gray has 0.5 in both chroma planes. Oklab is that of Björn Ottosson, "A
perceptual color space for image processing", 2020, with the matrices of 2021,
https://bottosson.github.io/posts/oklab: lightness in [0, 1], a and b within 0.4 of 0.

All conversions are differentiable with finite gradients everywhere, extend smoothly to values
outside [0, 1], keep the shape, and compute in float32 (in float64 for float64 input), because half
precision would cause banding in dark tones.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.images import unit_range
from pipeline.models.vapsr import bicubic_kernel, cubic_upscale

SPACES = ("rgb", "ycbcr", "oklab", "y")
Network = TypeVar("Network", bound=nn.Module)
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
    red, _, blue = _at_least_float32(images).unbind(1)
    luma = _mix(images, (LUMA,))[:, 0]
    return torch.stack((luma, (blue - luma) / CB_RANGE + 0.5, (red - luma) / CR_RANGE + 0.5), dim=1)


def ycbcr_to_rgb(images: Tensor) -> Tensor:
    """Invert `rgb_to_ycbcr`; colours outside the RGB gamut give values outside [0, 1]."""
    luma, cb, cr = _at_least_float32(images).unbind(1)
    red, blue = luma + CR_RANGE * (cr - 0.5), luma + CB_RANGE * (cb - 0.5)
    return torch.stack((red, (luma - LUMA[0] * red - LUMA[2] * blue) / LUMA[1], blue), dim=1)


def rgb_to_oklab(images: Tensor) -> Tensor:
    """Convert float NCHW sRGB in [0, 1] to Oklab.

    L is in [0, 1]; a (green to red) and b (blue to yellow) are centred at 0.
    """
    return _mix(_cube_root(_mix(_to_linear(_at_least_float32(images)), RGB_TO_LMS)), LMS_TO_OKLAB)


def oklab_to_rgb(images: Tensor) -> Tensor:
    """Invert `rgb_to_oklab`; colours outside the sRGB gamut give values outside [0, 1]."""
    return _from_linear(_mix(_cube(_mix(images, OKLAB_TO_LMS)), LMS_TO_RGB))


class InColourSpace:
    """Mixin that `in_colour_space` adds to a generator's class to convert its input and output."""

    colour_space: str
    chroma_scale: int
    chroma_kernel: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Upscale NCHW RGB, uint8 or float in [0, 1], to float RGB in the weights' dtype."""
        rgb = unit_range(images, torch.promote_types(images.dtype, torch.float32))
        if self.colour_space == "oklab":
            sr = super().forward(_laid_out_as(images, rgb_to_oklab(rgb)))
            upscaled = oklab_to_rgb(sr)
        elif self.colour_space == "ycbcr":
            sr = super().forward(_laid_out_as(images, rgb_to_ycbcr(rgb)))
            upscaled = ycbcr_to_rgb(sr)
        else:
            ycbcr = rgb_to_ycbcr(rgb)
            sr = super().forward(_laid_out_as(images, ycbcr[:, :1].repeat(1, 3, 1, 1)))
            luma = _at_least_float32(sr).mean(dim=1, keepdim=True)
            chroma = cubic_upscale(ycbcr, self.chroma_kernel, self.chroma_scale)[:, 1:]
            upscaled = ycbcr_to_rgb(torch.cat((luma, chroma), dim=1))
        return _laid_out_as(images, upscaled.to(sr.dtype))


def in_colour_space(network: Network, space: str, scale: int | None = None) -> Network:
    """Make the generator `network` work in `space`, one of `SPACES`, and return the same object.

    Its input and output are RGB as before. `scale` is its upscaling factor; `None` uses its
    attribute `scale`.

    "ycbcr" and "oklab": the network gets the three planes instead of red, green and blue. "y": the
    network gets luma three times, the three outputs are averaged, and the chroma is upscaled with
    the cubic kernel.

    The network's class becomes a new subclass whose `forward` converts before and after. Tensor
    names, attributes and `isinstance` therefore stay the same, and the conversion is compiled with
    the network; a wrapping module would add a prefix to every name. Deep copies and state dicts
    work. Pickling the whole module does not, because the class is created at run time.

    The tensors do not reveal the space. `SavedNetwork.params` has to carry it ("colour_space":
    "oklab"): a file without a description is assumed to hold an RGB network.

    Raises:
        ValueError: an unknown space, or a network that already works in another space.
    """
    if space not in SPACES:
        raise ValueError(f"colour_space {space!r} is not one of {', '.join(map(repr, SPACES))}")
    if isinstance(network, InColourSpace):
        raise ValueError(f"the network already works in {network.colour_space!r}")
    if space == "rgb":
        return network
    if space == "y":
        network.chroma_scale = network.scale if scale is None else scale
        network.register_buffer(
            "chroma_kernel", bicubic_kernel(network.chroma_scale), persistent=False
        )
    network.__class__ = _subclass(type(network), space)
    return network


@cache
def _subclass(network_class: type[nn.Module], space: str) -> type[nn.Module]:
    return type(
        f"{network_class.__name__}_{space}",
        (InColourSpace, network_class),
        {
            "colour_space": space,
            "__module__": network_class.__module__,
            "__doc__": network_class.__doc__,
        },
    )


def _at_least_float32(images: Tensor) -> Tensor:
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _mix(images: Tensor, rows: Rows) -> Tensor:
    """Multiply each pixel's colour by a matrix.

    Plain arithmetic is used because convolutions may run in TF32.
    """
    first, second, third = _at_least_float32(images).unbind(1)
    return torch.stack([row[0] * first + row[1] * second + row[2] * third for row in rows], dim=1)


def _laid_out_as(model: Tensor, images: Tensor) -> Tensor:
    """Return `images` in channels_last if `model` is.

    The memory format of its input determines how fast a network runs.
    """
    is_channels_last = (
        model.is_contiguous(memory_format=torch.channels_last) and not model.is_contiguous()
    )
    return images.contiguous(memory_format=torch.channels_last) if is_channels_last else images


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
