"""Inference: upscale pictures of any mode and size, and videos, with a network, in tiles.

`TorchBackend`, and torch with it, are imported on first access: upscaling with another backend
needs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.inference.pictures import Picture, encode_picture, read_picture
from pipeline.inference.sizes import TargetSize, upscale_picture
from pipeline.inference.tiles import Upscaler

if TYPE_CHECKING:
    from pipeline.inference.torch_backend import TorchBackend

__all__ = [
    "Picture",
    "TargetSize",
    "TorchBackend",
    "Upscaler",
    "encode_picture",
    "read_picture",
    "upscale_picture",
]


def __getattr__(name: str) -> Any:
    if name != "TorchBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.inference.torch_backend import TorchBackend

    return TorchBackend
