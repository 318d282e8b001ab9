"""Bytes in, bytes out: a network as other programs want to run it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.images import to_bytes

LAYOUTS = ("nchw", "nhwc")


class ByteNetwork(nn.Module):
    """A generator between uint8 images: normalisation, the network, clamping and rounding in one module.

    It computes in the dtype of the network's weights, whatever that is; `half()` and `bfloat16()` work as on the
    network itself. Its tensors are the network's own, named with "network." in front.

    Args:
        network: any generator of `pipeline.models`.
        layout: "nchw" or "nhwc", of the input and of the output; nhwc is how images lie in files and in cameras.

    Raises:
        ValueError: another layout; in `forward` images that are not bytes.
    """

    def __init__(self, network: nn.Module, layout: str = "nchw") -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is neither 'nchw' nor 'nhwc'")
        self.network = network
        self.layout = layout

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB 0..255 in -> uint8 RGB in the same layout, `scale` times as high and wide.

        Values are clamped and rounded to the nearest level, never truncated.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"the images are {images.dtype}, but must be torch.uint8")
        if self.layout == "nchw":
            return to_bytes(self.network(images))
        return to_bytes(self.network(images.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).contiguous()
