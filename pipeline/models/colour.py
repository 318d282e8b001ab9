"""Generators that work in a colour space other than RGB: YCbCr, Oklab, or luma alone."""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.colour_spaces import (
    at_least_float32,
    oklab_to_rgb,
    rgb_to_oklab,
    rgb_to_ycbcr,
    ycbcr_to_rgb,
)
from pipeline.images import unit_range
from pipeline.models.vapsr import bicubic_kernel, cubic_upscale

SPACES = ("rgb", "ycbcr", "oklab", "y")
Network = TypeVar("Network", bound=nn.Module)


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
            luma = at_least_float32(sr).mean(dim=1, keepdim=True)
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


def _laid_out_as(model: Tensor, images: Tensor) -> Tensor:
    """Return `images` in channels_last if `model` is.

    The memory format of its input determines how fast a network runs.
    """
    is_channels_last = (
        model.is_contiguous(memory_format=torch.channels_last) and not model.is_contiguous()
    )
    return images.contiguous(memory_format=torch.channels_last) if is_channels_last else images
