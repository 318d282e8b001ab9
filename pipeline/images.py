"""Pixel conventions, in one place.

Bytes are uint8 RGB 0..255, floats are RGB in [0, 1]. Tensors are NCHW, arrays are HWC, sizes are
(height, width).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (height, width, channels) -> uint8 1 x channels x height x width."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def unit_range(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 0..255 -> `dtype` in [0, 1]; a floating point tensor is taken as [0, 1] already and
    only cast."""
    if images.dtype == torch.uint8:
        return images.to(dtype) / 255
    return images.to(dtype)


def to_bytes(images: Tensor) -> Tensor:
    """Floats in [0, 1] -> uint8 0..255, clamped and rounded to the nearest level (never
    truncated)."""
    return images.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)


def cubic_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased cubic resize (Keys, a = -0.5) of float NCHW images to `size` (height, width):
    MATLAB's `imresize`.

    Agrees with it on Set5 but for +-1 grey level after rounding. Values may leave [0, 1];
    `to_bytes` clamps them.
    """
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


@contextmanager
def without_tf32() -> Iterator[None]:
    """In here cuDNN convolves float32 in float32: its default, TF32, keeps 11 bits, which shows in
    a PSNR's digits.

    Benchmark mode is off, too: it would search again for every size of image.
    """
    with torch.backends.cudnn.flags(
        enabled=True,
        benchmark=False,
        deterministic=torch.backends.cudnn.deterministic,
        allow_tf32=False,
    ):
        yield


def crop_to_multiple(images: Tensor, scale: int) -> Tensor:
    """Cut NCHW images at the bottom and the right so that both sides are multiples of `scale`."""
    height, width = images.shape[-2:]
    return images[..., : height - height % scale, : width - width % scale]
