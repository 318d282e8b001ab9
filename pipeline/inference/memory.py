"""How much memory is free, and how much a network takes for a pixel: what the size of tiles is chosen from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PROBE_SIDE = 64
HELD_AT_ONCE = 3
"""A network holds at most about so many times what its hungriest layer reads and writes. Measured on a CPU: PyTorch 1.3
to 2.7, ONNX Runtime 1.6 to 3.1, OpenVINO 1.1 to 2.9 (VapSR, SRResNet, MSRResNet, Compact, RRDBNet)."""
SHARE = 0.5
"""Of the free memory, for the network's own use."""
MAX_ELEMENTS = 2**31 - 1
"""Of one tensor: 32-bit indices in many GPU kernels."""
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on the device now; on a CPU those that the container may still take, if it is in one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_free_in_machine(), _free_in_container())


def max_window_pixels(network: nn.Module, device: torch.device, dtype: torch.dtype) -> int:
    """How many LR pixels the network can take at once, by its largest layer on a small image and the free memory."""
    return window_pixels(_elements_per_pixel(network, device, dtype), device, dtype)


def window_pixels(elements: float, device: torch.device, dtype: torch.dtype) -> int:
    """How many LR pixels fit into the free memory, where the hungriest layer handles `elements` for each of them."""
    by_memory = SHARE * free_bytes(device) / (elements * dtype.itemsize * HELD_AT_ONCE)
    return max(1, int(min(by_memory, MAX_ELEMENTS / elements)))


def _free_in_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 4 << 30


def _free_in_container() -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        cached = [line.split()[1] for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
                  if line.startswith("inactive_file ")]
        return (int(limit) if limit != "max" else 1 << 62) - used + int(cached[0])
    except (OSError, ValueError, IndexError):
        return 1 << 62  # no limit that can be read


@torch.inference_mode()
def _elements_per_pixel(network: nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    """What the layer that reads and writes most reads and writes, in elements for every pixel of the LR image."""
    largest = 0

    def measure(_: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal largest
        tensors = [value for value in (*inputs, output) if isinstance(value, Tensor)]
        largest = max(largest, sum(tensor.numel() for tensor in tensors))

    hooks = [module.register_forward_hook(measure) for module in network.modules()]
    try:
        network(torch.zeros((1, 3, PROBE_SIDE, PROBE_SIDE), dtype=dtype, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return max(1, largest / PROBE_SIDE**2)
