"""The PyTorch backend for networks of `pipeline.models`, in channels-last layout, on CPU or GPU.

On a GPU the host waits once per batch: for a single copy, which contains the levels and a flag for
finite values. The copy goes through pinned memory on its own stream, while the next batch is
computed.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.images import to_bytes, without_tf32
from pipeline.inference.backends import (
    DEEP,
    PROBE_SIDE,
    Levels,
    NotFiniteError,
    held_bytes,
    precision_of,
    window_pixels,
)
from pipeline.inference.devices import Device
from pipeline.libraries import keep_compiled_code_private, keep_freed_memory

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMPILED_AFTER = 64
"""Batches of one shape to run before compiling for it, which takes as long as hundreds of them."""


class TorchBackend:
    """Runs any generator in eval mode; see `backends.Backend`.

    Args:
        network: left unchanged; copies of it are moved to the device.
        device: the device to run on; a `torch.device` is accepted as well.
        precision: "auto", "fp32", "fp16" or "bf16"; see `backends.precision_of`.
        compiles: compile for frequent shapes (after `COMPILED_AFTER` batches).
    """

    window = None
    step = 0.0

    def __init__(
        self,
        network: nn.Module,
        device: Device | torch.device,
        precision: str = "auto",
        *,
        compiles: bool = False,
    ) -> None:
        self.scale: int = network.scale
        self.halo: int = network.receptive_radius
        self.grid: int = getattr(network, "tile_grid", 1)
        self.device = Device(device.type, device.index)
        self.network = network
        self.transfers = Transfers(torch.device(str(self.device)))
        self.in_flight = self.transfers.in_flight
        self._precision, self._compiles = precision, compiles
        self._ready: dict[str, nn.Module] = {}
        self._elements: dict[str, float] = {}
        self._max_pixels: dict[str, int] = {}
        self._shown: Counter[tuple[str, torch.Size]] = Counter()
        self._compiled: dict[tuple[str, torch.Size], Any] = {}

    def precision_for(self, *, is_deep: bool) -> str:
        """See `Backend`."""
        return precision_of(self._precision, self.device, is_deep=is_deep)

    def is_exact(self, precision: str) -> bool:
        """See `Backend`."""
        return precision == "fp32"

    def pixel_bytes(self, precision: str) -> float:
        """See `Backend`."""
        if precision not in self._elements:
            self._elements[precision] = elements_per_pixel(
                self._network_in(precision), self.transfers.device, DTYPES[precision]
            )
        return held_bytes(self._elements[precision], precision)

    def max_pixels(self, precision: str) -> int:
        """See `Backend`."""
        if precision not in self._max_pixels:
            self.pixel_bytes(precision)
            self._max_pixels[precision] = window_pixels(
                self._elements[precision], self.device, precision
            )
        return self._max_pixels[precision]

    def floats(self, images: np.ndarray) -> np.ndarray:
        """See `Backend`."""
        return self.forward(images, "fp32").float().cpu().numpy()

    def start(self, images: np.ndarray, precision: str, result: np.dtype) -> Levels:
        """See `Backend`. On a GPU it returns before the network has finished."""
        return begin(self.forward(images, precision), result, self.transfers)

    @torch.inference_mode()
    def forward(self, images: np.ndarray, precision: str) -> Tensor:
        """Upscale RGB (N, height, width, 3), uint8 or uint16, without clamping.

        Returns (N, 3, scale * height, scale * width) on the device.
        """
        lr = self.transfers.upload(images).permute(0, 3, 1, 2)  # already channels_last in memory
        lr = lr.contiguous(memory_format=torch.channels_last)
        with without_tf32():
            return self._network_for(lr.shape, precision)(lr)

    def _network_for(self, shape: torch.Size, precision: str) -> Any:
        """Return the network, compiled for `shape` if that is frequent enough."""
        network, key = self._network_in(precision), (precision, shape)
        if not self._compiles:
            return network
        self._shown[key] += 1
        if self._shown[key] > COMPILED_AFTER and key not in self._compiled:
            keep_compiled_code_private()
            self._compiled[key] = torch.compile(network, dynamic=False)
        return self._compiled.get(key, network)

    def _network_in(self, precision: str) -> nn.Module:
        """Return the network's copy in this precision on the device; it is made once."""
        if precision not in self._ready:
            if self.device.type == "cpu":
                keep_freed_memory()
            network = copy.deepcopy(self.network)
            self._ready[precision] = network.to(
                self.transfers.device, DTYPES[precision], memory_format=torch.channels_last
            ).eval()
        return self._ready[precision]


class SelfEnsemble:
    """Averages a network over all eight rotations and reflections of the image ("+" in papers).

    It takes eight times the work. The mean is taken over floats, so that values are rounded only
    once. See `Backend` for the methods.
    """

    window = None
    step = 0.0

    def __init__(self, backend: TorchBackend) -> None:
        self.scale, self.halo, self.grid = backend.scale, backend.halo, backend.grid
        self.device = backend.device
        self.in_flight = 0  # its eight uploads would overwrite the pinned buffers of another batch
        self.precision_for, self.is_exact = backend.precision_for, backend.is_exact
        self.pixel_bytes, self.max_pixels = backend.pixel_bytes, backend.max_pixels
        self._backend = backend

    def floats(self, images: np.ndarray) -> np.ndarray:
        """See `Backend`."""
        return self.forward(images, "fp32").cpu().numpy()

    def start(self, images: np.ndarray, precision: str, result: np.dtype) -> Levels:
        """See `Backend`."""
        return begin(self.forward(images, precision), result, self._backend.transfers)

    @torch.inference_mode()
    def forward(self, images: np.ndarray, precision: str) -> Tensor:
        """Upscale like `TorchBackend.forward`; the result is always float32."""
        total: Tensor | None = None
        for is_mirrored in (False, True):
            for turns in range(4):
                turned = np.rot90(images[:, :, ::-1] if is_mirrored else images, turns, (1, 2))
                output = self._backend.forward(np.ascontiguousarray(turned), precision).float()
                output = torch.rot90(output, -turns, (-2, -1))
                output = output.flip(-1) if is_mirrored else output
                total = output if total is None else total + output
        return total / 8


@torch.inference_mode()
def begin(sr: Tensor, result: np.dtype, transfers: Transfers) -> Levels:
    """Start copying SR, floats (N, 3, height, width), from the device as levels of `result`."""
    count, channels, height, width = sr.shape
    read = transfers.download(_packed(sr, result))

    def levels() -> np.ndarray:
        packed = read()
        if not packed[-1]:
            raise NotFiniteError
        return packed[:-1].view(result).reshape(count, height, width, channels)

    return levels


def _packed(sr: Tensor, result: np.dtype) -> Tensor:
    """Return the bytes of the clamped and rounded levels, followed by 1 if SR is finite, else 0.

    One tensor, so that a single copy brings everything to the host.
    """
    images = sr.permute(0, 2, 3, 1)
    if result == DEEP:  # not every device has uint16: take the lower halves of int32
        levels = images.float().mul(65535).round_().clamp_(0, 65535).to(torch.int32).contiguous()
        levels = levels.view(torch.int16)[..., ::2].contiguous()
    else:
        levels = to_bytes(images).contiguous()
    packed = torch.empty(levels.numel() * levels.itemsize + 1, dtype=torch.uint8, device=sr.device)
    packed[:-1] = levels.view(torch.uint8).flatten()
    # A sum keeps NaN and infinity, and sums over pictures are far below the largest float.
    packed[-1] = torch.isfinite(sr.sum(dtype=torch.float32))
    return packed


class Transfers:
    """Copies between host and device.

    On a GPU they go through two pinned buffers per direction, on their own stream. A `download`
    must be read before the second one after it starts, which overwrites its buffer.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_gpu = device.type == "cuda"
        self.in_flight = 1 if self._is_gpu else 0
        self._stream = torch.cuda.Stream(device) if self._is_gpu else None
        self._up, self._down = _PinnedPair(), _PinnedPair()

    def upload(self, images: np.ndarray) -> Tensor:
        """Copy images to the device in the same layout, as uint8 or as float32 in [0, 1].

        uint8 images are unchanged; uint16 images become floats.
        """
        is_deep = images.dtype == DEEP
        host = torch.from_numpy(
            np.ascontiguousarray(images).view(np.int16 if is_deep else np.uint8)
        )
        on_device = self._to_gpu(host) if self._is_gpu else host
        if not is_deep:
            return on_device
        return on_device.to(torch.int32).bitwise_and_(0xFFFF).to(torch.float32).div_(65535)

    def download(self, values: Tensor) -> Any:
        """Start copying a 1-D uint8 tensor; return a function that waits and returns the array."""
        if not self._is_gpu:
            return values.numpy
        slot = self._down.next(values.numel(), torch.uint8)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            slot.buffer.copy_(values, non_blocking=True)
            slot.done.record(self._stream)
        values.record_stream(self._stream)

        def read() -> np.ndarray:
            slot.done.synchronize()
            return slot.buffer.numpy()

        return read

    def _to_gpu(self, host: Tensor) -> Tensor:
        slot = self._up.next(host.numel(), host.dtype)
        slot.done.synchronize()  # wait for the copy out of this buffer, two uploads ago
        slot.buffer.copy_(host.flatten())
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            on_gpu = slot.buffer.to(self.device, non_blocking=True)
            slot.done.record(self._stream)
        current.wait_event(slot.done)
        on_gpu.record_stream(current)
        return on_gpu.view(host.shape)


class _Slot:
    """A pinned buffer, and an event for the end of the last copy into or out of it."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.buffer = self.memory
        self.done = torch.cuda.Event()


class _PinnedPair:
    """Two alternating buffers that grow on demand."""

    def __init__(self) -> None:
        self._slots: list[_Slot] = []

    def next(self, count: int, dtype: torch.dtype) -> _Slot:
        """Return the other slot, with a `buffer` of `count` numbers."""
        if len(self._slots) < 2:
            self._slots.append(_Slot())
        else:
            self._slots.reverse()
        slot, needed = self._slots[-1], count * dtype.itemsize
        if slot.memory.numel() < needed:
            slot.done.synchronize()
            slot.memory = torch.empty(needed, dtype=torch.uint8, pin_memory=True)
        slot.buffer = slot.memory[:needed].view(dtype)
        return slot


@torch.inference_mode()
def elements_per_pixel(network: nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    """Return the elements per LR pixel that the largest layer reads and writes."""
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
