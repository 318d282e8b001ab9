"""What the tiler needs of whatever computes: PyTorch, or a file in ONNX Runtime or OpenVINO."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Backend(Protocol):
    """A network, ready to run on batches of images of one size."""

    scale: int
    halo: int
    """How many LR pixels away an output pixel still sees."""
    device: torch.device
    window: tuple[int, int] | None
    """Height and width of the only images that it takes; `None`: any."""

    def dtype_for(self, *, is_deep: bool) -> torch.dtype:
        """What it computes in for pictures of 16 bits (`is_deep`), or of 8."""

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Whether it has nothing better than `dtype` for what `dtype` cannot hold."""

    def max_pixels(self, dtype: torch.dtype) -> int:
        """How many LR pixels, over all images of a batch, the free memory is enough for; as asked the first time."""

    def __call__(self, images: np.ndarray, dtype: torch.dtype) -> Tensor:
        """RGB (N, height, width, 3), uint8 or uint16 -> floats (N, 3, scale * height, scale * width), white is 1.

        Not clamped, on any device. `MemoryError` or `torch.OutOfMemoryError` where the memory does not suffice.
        """


def dtype_of(precision: str, device: torch.device, *, is_deep: bool) -> torch.dtype:
    """FP16 for "fp16"; for "auto" on a GPU, but not for 16-bit pictures, of which it would keep 11 bits; else FP32."""
    is_half = precision == "fp16" or (precision == "auto" and device.type == "cuda" and not is_deep)
    return torch.float16 if is_half else torch.float32


