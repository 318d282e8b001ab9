"""Inference: pictures of any mode and size, and videos, through a network in tiles."""

from __future__ import annotations

from pipeline.inference.backends import TorchBackend
from pipeline.inference.pictures import Picture, encode_picture, read_picture
from pipeline.inference.sizes import TargetSize, upscale_picture
from pipeline.inference.tiles import Upscaler

__all__ = ["Picture", "TargetSize", "TorchBackend", "Upscaler", "encode_picture", "read_picture", "upscale_picture"]
