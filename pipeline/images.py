"""Pixel conventions and conversions.

Bytes are uint8 RGB 0..255, pixels of 16 bits are uint16 RGB 0..65535, floats are RGB in [0, 1].
Levels are in units of 1/255 of white in any type: a uint16 pixel v has the level v / 257. Tensors
are NCHW, arrays are HWC, sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert (height, width, channels) to (1, channels, height, width), uint8 or uint16."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def unit_range(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert uint8 or uint16 to `dtype` in [0, 1]; cast floats, assumed to be in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.to(dtype) / 255
    if images.dtype == torch.uint16:
        # 65535 is more than FP16 holds.
        return (images.to(torch.promote_types(dtype, torch.float32)) / 65535).to(dtype)
    return images.to(dtype)


def to_bytes(images: Tensor) -> Tensor:
    """Convert floats in [0, 1] to uint8 0..255, clamped and rounded to the nearest level."""
    return images.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)


def border_of(scale: int) -> int:
    """Return how many pixels of every border are not measured: `scale`, as in papers; 0 at x1."""
    return scale if scale > 1 else 0


def as_bytes(images: Tensor) -> Tensor:
    """Convert uint8 or uint16 images to uint8, rounded to the nearest level."""
    return images if images.dtype == torch.uint8 else to_bytes(unit_range(images, torch.float32))


def to_pixels(images: Tensor, depth: int) -> Tensor:
    """Convert floats in [0, 1] to pixels of `depth` bits, clamped and rounded: uint8 or uint16."""
    if depth == 8:
        return to_bytes(images)
    return images.float().mul(65535).round_().clamp_(0, 65535).to(torch.int32).to(torch.uint16)


def depth_of(images: Tensor) -> int:
    """Return the bits per value of uint8 or uint16 images."""
    return 16 if images.dtype == torch.uint16 else 8


def cubic_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize float NCHW images to `size` (height, width) like MATLAB's cubic `imresize`.

    Antialiased; the kernel is Keys' with a = -0.5. On Set5 it agrees with `imresize` to within one
    gray level after rounding. Values may leave [0, 1]; `to_bytes` clamps them.
    """
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Make cuDNN compute float32 convolutions in float32 within this block.

    Its default, TF32, keeps 11 bits, which changes a PSNR's digits. Benchmark mode is off as well,
    because it would search again for every image size.
    """
    with torch.backends.cudnn.flags(
        enabled=True,
        benchmark=False,
        deterministic=torch.backends.cudnn.deterministic,
        allow_tf32=False,
    ):
        yield


def crop_to_multiple(images: Tensor, scale: int) -> Tensor:
    """Crop NCHW images at the bottom and right so that both sides are multiples of `scale`."""
    height, width = images.shape[-2:]
    return images[..., : height - height % scale, : width - width % scale]
