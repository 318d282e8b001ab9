"""Inference: pictures of any mode and size, and videos, through a network in tiles."""

from __future__ import annotations

from pipeline.inference.picture_writing import encode_picture
from pipeline.inference.pictures import Picture, read_picture
from pipeline.inference.sizes import Target, upscale_picture
from pipeline.inference.tiles import Upscaler
from pipeline.inference.torch_backend import TorchBackend

__all__ = ["Picture", "Target", "TorchBackend", "Upscaler", "encode_picture", "read_picture", "upscale_picture"]
