"""A network of `pipeline.models` by PyTorch, channels last."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.inference.backends import dtype_of
from pipeline.inference.memory import max_window_pixels

DEEP = np.dtype(np.uint16)


class TorchBackend:
    """Any generator, in eval mode.

    Args:
        network: it stays as it is; copies of it go to the device.
        device: where it computes.
        precision: "auto", "fp16" or "fp32"; see `dtype_of`.
    """

    window = None

    def __init__(self, network: nn.Module, device: torch.device, precision: str = "auto") -> None:
        self.scale: int = network.scale
        self.halo: int = network.receptive_radius
        self.device = device
        self.network = network
        self._precision = precision
        self._ready: dict[torch.dtype, nn.Module] = {}
        self._max_pixels: dict[torch.dtype, int] = {}

    def dtype_for(self, *, is_deep: bool) -> torch.dtype:
        """See `Backend`."""
        return dtype_of(self._precision, self.device, is_deep=is_deep)

    def is_exact(self, dtype: torch.dtype) -> bool:
        """See `Backend`."""
        return dtype == torch.float32

    def max_pixels(self, dtype: torch.dtype) -> int:
        """See `Backend`."""
        if dtype not in self._max_pixels:
            self._max_pixels[dtype] = max_window_pixels(self._in(dtype), self.device, dtype)
        return self._max_pixels[dtype]

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, dtype: torch.dtype) -> Tensor:
        """See `Backend`."""
        if images.dtype == DEEP:
            images = images.astype(np.float32) / 65535
        lr = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)  # is channels_last as it lies in memory
        lr = lr.contiguous(memory_format=torch.channels_last)
        # TF32 keeps 11 bits; benchmark mode searches anew for every size of tile.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            return self._in(dtype)(lr)

    def _in(self, dtype: torch.dtype) -> nn.Module:
        """The network in this precision on the device; made once."""
        if dtype not in self._ready:
            network = copy.deepcopy(self.network)
            self._ready[dtype] = network.to(self.device, dtype, memory_format=torch.channels_last).eval()
        return self._ready[dtype]
