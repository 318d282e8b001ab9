"""What computes: a network by PyTorch, or in a file by ONNX Runtime or OpenVINO, behind one interface for the tiler.

`Backend` is the interface. `TorchBackend` runs any generator, `SelfEnsemble` one in all eight symmetries, `FileBackend`
a network file. How much they may be shown at once follows from the free memory and from what their hungriest layer
reads and writes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from pipeline.cli import RunError
from pipeline.export.network_files import NetworkFile
from pipeline.images import without_tf32


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


# How much memory is free, and how much a network takes for a pixel: what the size of tiles is chosen from.

PROBE_SIDE = 64
HELD_AT_ONCE = 3
"""A network holds at most about this many times what its hungriest layer reads and writes. Measured on a CPU: PyTorch
1.3 to 2.7, ONNX Runtime 1.6 to 3.1, OpenVINO 1.1 to 2.9 (VapSR, SRResNet, MSRResNet, Compact, RRDBNet)."""
SHARE = 0.5
"""Of the free memory, for the network's own use."""
MAX_ELEMENTS = 2**31 - 1
"""Of one tensor: 32-bit indices in many GPU kernels."""
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on the device now; on a CPU those that the container may still take, if it is in one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _free_in_container())


def max_window_pixels(network: nn.Module, device: torch.device, dtype: torch.dtype) -> int:
    """How many LR pixels the network can take at once, by its largest layer on a small image and the free memory."""
    return window_pixels(_elements_per_pixel(network, device, dtype), device, dtype)


def window_pixels(elements: float, device: torch.device, dtype: torch.dtype) -> int:
    """How many LR pixels fit into the free memory, where the hungriest layer handles `elements` for each of them."""
    by_memory = SHARE * free_bytes(device) / (elements * dtype.itemsize * HELD_AT_ONCE)
    return max(1, int(min(by_memory, MAX_ELEMENTS / elements)))


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


# A network of `pipeline.models` by PyTorch, channels last.

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
        with without_tf32():
            return self._in(dtype)(lr)

    def _in(self, dtype: torch.dtype) -> nn.Module:
        """The network in this precision on the device; made once."""
        if dtype not in self._ready:
            network = copy.deepcopy(self.network)
            self._ready[dtype] = network.to(self.device, dtype, memory_format=torch.channels_last).eval()
        return self._ready[dtype]


class SelfEnsemble:
    """A network's mean over the image turned and mirrored in all eight ways ("+" in papers): eight times the work.

    The mean is of floats, so that whoever rounds it rounds once. See `Backend` for the methods.
    """

    window = None

    def __init__(self, backend: TorchBackend) -> None:
        self.scale, self.halo, self.device = backend.scale, backend.halo, backend.device
        self.dtype_for, self.is_exact, self.max_pixels = backend.dtype_for, backend.is_exact, backend.max_pixels
        self._backend = backend

    def __call__(self, images: np.ndarray, dtype: torch.dtype) -> Tensor:
        """See `Backend`; always float32."""
        total: Tensor | None = None
        for is_mirrored in (False, True):
            for turns in range(4):
                turned = np.rot90(images[:, :, ::-1] if is_mirrored else images, turns, (1, 2))
                output = self._backend(np.ascontiguousarray(turned), dtype).float()
                output = torch.rot90(output, -turns, (-2, -1))
                output = output.flip(-1) if is_mirrored else output
                total = output if total is None else total + output
        return total / 8


# A network in a file, in a backend that is not PyTorch: images in the layout, type and sizes that it takes.

@dataclass(frozen=True)
class FileFacts:
    """What a file does not always say by itself."""

    scale: int
    halo: int
    """How many LR pixels away an output pixel still sees."""
    layout: str = "nchw"
    white: int = 1
    """The value of white: 1 or 255."""
    multiple: int = 1
    """Height and width must be a multiple of it."""
    batch: int | None = None
    window: tuple[int, int] | None = None
    """Height and width, of a file that takes one size only."""


class FileBackend:
    """One network in up to two files, of FP32 and of FP16.

    Args:
        load: gives the file for a precision; called once for each.
        dtype: the precision for 16-bit pictures (`True`) and for others.
        exact: the best precision there is.
        device: where the files run.
    """

    def __init__(self, load: Callable[[torch.dtype], NetworkFile], facts: FileFacts, device: torch.device,
                 dtype: Callable[[bool], torch.dtype], exact: torch.dtype) -> None:
        self.scale, self.halo, self.window, self.device = facts.scale, facts.halo, facts.window, device
        self._load, self._facts, self._dtype, self._exact = load, facts, dtype, exact
        self._files: dict[torch.dtype, NetworkFile] = {}
        self._max_pixels: dict[torch.dtype, int] = {}

    def dtype_for(self, *, is_deep: bool) -> torch.dtype:
        """See `Backend`."""
        return self._dtype(is_deep)

    def is_exact(self, dtype: torch.dtype) -> bool:
        """See `Backend`."""
        return dtype == self._exact

    def max_pixels(self, dtype: torch.dtype) -> int:
        """See `Backend`."""
        if dtype not in self._max_pixels:
            height, width = self.window or (PROBE_SIDE, PROBE_SIDE)
            probe = np.zeros((self._facts.batch or 1, height, width, 3), np.uint8)
            file = self._file(dtype)
            elements = file.most_elements(to_input(probe, self._facts, file.dtype).shape) / (probe.size / 3)
            self._max_pixels[dtype] = window_pixels(elements, self.device, dtype)
        return self._max_pixels[dtype]

    def __call__(self, images: np.ndarray, dtype: torch.dtype) -> Tensor:
        """See `Backend`."""
        count, height, width, _ = images.shape
        step = self._facts.batch or count
        images = _continued(images, self._sizes(height, width), -(-count // step) * step)
        file = self._file(dtype)
        pieces = [from_output(file(to_input(images[start : start + step], self._facts, file.dtype)), self._facts)
                  for start in range(0, len(images), step)]
        sr = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        expected = (len(images), 3, images.shape[1] * self.scale, images.shape[2] * self.scale)
        if sr.shape != expected:
            raise RunError(f"the network turns {images.shape} into {tuple(sr.shape)}, and {expected} is right")
        return sr[:count, :, : height * self.scale, : width * self.scale]

    def _sizes(self, height: int, width: int) -> tuple[int, int]:
        multiple = self._facts.multiple
        return self.window or (-(-height // multiple) * multiple, -(-width // multiple) * multiple)

    def _file(self, dtype: torch.dtype) -> NetworkFile:
        if dtype not in self._files:
            self._files[dtype] = self._load(dtype)
        return self._files[dtype]


def to_input(images: np.ndarray, facts: FileFacts, kind: np.dtype) -> np.ndarray:
    """RGB images (N, height, width, 3), uint8 or uint16, as an input of the type `kind`."""
    highest = np.iinfo(images.dtype).max
    if kind == np.uint8:
        images = images if highest == 255 else ((images + np.uint32(128)) // 257).astype(np.uint8)
    else:
        images = (images.astype(np.float32) * np.float32(facts.white / highest)).astype(kind)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if facts.layout == "nchw" else images)


def from_output(output: np.ndarray, facts: FileFacts) -> Tensor:
    """An output as floats (N, 3, height, width), white is 1."""
    images = torch.from_numpy(output)
    images = images if facts.layout == "nchw" else images.permute(0, 3, 1, 2)
    return images / facts.white if facts.white != 1 else images


def _continued(images: np.ndarray, size: tuple[int, int], count: int) -> np.ndarray:
    """`count` images of at least that size: mirrored at the bottom and the right, the last one repeated."""
    below, right = (wanted - side for wanted, side in zip(size, images.shape[1:3], strict=True))
    if below or right:
        images = np.pad(images, ((0, 0), (0, below), (0, right), (0, 0)), "reflect")
    return np.pad(images, ((0, count - len(images)), (0, 0), (0, 0), (0, 0)), "edge") if count > len(images) else images
