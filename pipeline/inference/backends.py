"""The backend interface for the tiler, and the backend for network files (ONNX Runtime, OpenVINO).

`Backend` is the interface: arrays of pixels go in and come out. `FileBackend` runs a network file
and needs no torch; `torch_backend.TorchBackend` runs a network of `pipeline.models`. The largest
input follows from the free memory and from what the largest layer reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.cli import RunError
from pipeline.export.network_files import NetworkFile
from pipeline.inference.devices import Device, free_bytes
from pipeline.inference.measurements import Measurements
from pipeline.libraries import cv2

DEEP = np.dtype(np.uint16)
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Precision -> bytes per number."""

Levels = Callable[[], np.ndarray]
"""Waits for a started batch and returns its pixels, (N, height, width, 3), or raises
`NotFiniteError`. To be called once."""


class NotFiniteError(Exception):
    """The network's output contains NaN or infinity."""


class Backend(Protocol):
    """A network that is ready to run on batches of images of the same size."""

    scale: int
    halo: int
    """Receptive radius: how many LR pixels away an input pixel can affect an output pixel."""
    grid: int
    """Tiles must start at multiples of it, beside those of `tiles.ALIGNMENT`."""
    device: Device
    window: tuple[int, int] | None
    """Height and width if the network takes images of one size only; `None`: any size."""
    in_flight: int
    """Number of batches that may be started before the result of an earlier one is fetched."""
    step: float
    """Distance between two output values, white being 1: 1/255 for uint8 outputs, 0 for floats."""

    def precision_for(self, *, is_deep: bool) -> str:
        """Return the precision, one of `ITEM_BYTES`, for 16-bit (`is_deep`) or 8-bit pictures."""

    def is_exact(self, precision: str) -> bool:
        """Whether `precision` is the best one; otherwise "fp32" is used where it overflows."""

    def pixel_bytes(self, precision: str) -> float:
        """Return the network's peak memory in bytes per LR pixel."""

    def max_pixels(self, precision: str) -> int:
        """Return how many LR pixels of a batch fit into the memory free at the first call."""

    def floats(self, images: np.ndarray) -> np.ndarray:
        """Upscale RGB (N, height, width, 3), uint8 or uint16, in the best precision, unclamped.

        Returns (N, 3, scale * height, scale * width) with white as 1.
        """

    def start(self, images: np.ndarray, precision: str, result: np.dtype) -> Levels:
        """Start upscaling a batch of RGB (N, height, width, 3), uint8 or uint16.

        The result is `scale` times larger, clamped and rounded to the type `result`.

        Raises:
            MemoryError: the memory does not suffice (torch raises its own error).
        """


def precision_of(asked: str, device: Device, *, is_deep: bool) -> str:
    """Return the precision to use: the requested one, or the default if that is "auto".

    The default is FP16 on a GPU, except for 16-bit pictures, of which it would keep only 11 bits.
    """
    if asked != "auto":
        return asked
    return "fp16" if device.type == "cuda" and not is_deep else "fp32"


# The memory that a network takes per pixel, from which the size of tiles is chosen.

PROBE_SIDE = 64
HELD_AT_ONCE = 3
"""A network's peak memory is at most about this many times what its largest layer reads and writes.
Measured on a CPU: PyTorch 1.3 to 2.7, ONNX Runtime 1.6 to 3.1, OpenVINO 1.1 to 2.9 (VapSR,
SRResNet, MSRResNet, Compact, RRDBNet)."""
SHARE = 0.5
"""Share of the free memory that the network may use."""
MAX_ELEMENTS = 2**31 - 1
"""Maximum number of elements of a tensor: many GPU kernels use 32-bit indices."""


def held_bytes(elements: float, precision: str) -> float:
    """Return bytes per LR pixel of a network whose largest layer handles `elements` per pixel."""
    return elements * ITEM_BYTES[precision] * HELD_AT_ONCE


def window_pixels(elements: float, device: Device, precision: str) -> int:
    """Return how many LR pixels fit into the free memory.

    `elements` is what the network's largest layer reads and writes per LR pixel.
    """
    by_memory = SHARE * free_bytes(device) / held_bytes(elements, precision)
    return max(1, int(min(by_memory, MAX_ELEMENTS / elements)))


# Network files: images are brought into the layout, type and size that the file takes.


@dataclass(frozen=True)
class FileFacts:
    """Facts about a network file that not every file declares."""

    scale: int
    halo: int
    """Receptive radius: how many LR pixels away an input pixel can affect an output pixel."""
    layout: str = "nchw"
    """"nchw" or "nhwc"."""
    white: int = 1
    """The value of white: 1 or 255."""
    multiple: int = 1
    """Height and width must be multiples of it."""
    batch: int | None = None
    """The only batch size that the file takes; `None`: any."""
    window: tuple[int, int] | None = None
    """Height and width if the file takes images of one size only; `None`: any size."""
    grid: int = 1
    """Tiles must start at multiples of it."""


class FileBackend:
    """One network in up to two files, for FP32 and FP16; see `Backend`.

    Args:
        load: returns the file for a precision; called once for each.
        facts: the format of the files.
        device: the device that the files run on.
        precision: returns the precision for 16-bit pictures (`True`) and for others.
        exact: the best available precision.
        measured: keeps how much memory the network takes.
    """

    in_flight = 0

    def __init__(
        self,
        load: Callable[[str], NetworkFile],
        facts: FileFacts,
        device: Device,
        precision: Callable[[bool], str],
        exact: str,
        measured: Measurements,
    ) -> None:
        self.scale, self.halo, self.grid = facts.scale, facts.halo, facts.grid
        self.window, self.device = facts.window, device
        self._load, self._facts, self._precision, self._exact = load, facts, precision, exact
        self._files: dict[str, NetworkFile] = {}
        self._max_pixels: dict[str, int] = {}
        self._measured = measured

    @property
    def step(self) -> float:
        """See `Backend`."""
        return 1 / 255 if self._file(self._exact).dtype == np.uint8 else 0.0

    def precision_for(self, *, is_deep: bool) -> str:
        """See `Backend`."""
        return self._precision(is_deep)

    def is_exact(self, precision: str) -> bool:
        """See `Backend`."""
        return precision == self._exact

    def pixel_bytes(self, precision: str) -> float:
        """See `Backend`."""
        return held_bytes(self._elements(precision), precision)

    def max_pixels(self, precision: str) -> int:
        """See `Backend`."""
        if precision not in self._max_pixels:
            self._max_pixels[precision] = window_pixels(
                self._elements(precision), self.device, precision
            )
        return self._max_pixels[precision]

    def floats(self, images: np.ndarray) -> np.ndarray:
        """See `Backend`."""
        return self._run(images, self._exact)

    def start(self, images: np.ndarray, precision: str, result: np.dtype) -> Levels:
        """See `Backend`. The network runs when the result is fetched."""
        return lambda: to_levels(self._run(images, precision), result)

    def _run(self, images: np.ndarray, precision: str) -> np.ndarray:
        count, height, width, _ = images.shape
        step = self._facts.batch or count
        images = _padded(images, self._sizes(height, width), -(-count // step) * step)
        file = self._file(precision)
        pieces = [
            from_output(
                file(to_input(images[start : start + step], self._facts, file.dtype)), self._facts
            )
            for start in range(0, len(images), step)
        ]
        sr = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        expected = (len(images), 3, images.shape[1] * self.scale, images.shape[2] * self.scale)
        if sr.shape != expected:
            raise RunError(
                f"the network turns {images.shape} into {sr.shape}, but {expected} is expected"
            )
        return sr[:count, :, : height * self.scale, : width * self.scale]

    def _elements(self, precision: str) -> float:
        """Return the elements per LR pixel that the largest operator reads and writes."""
        file = self._file(precision)

        def measure() -> float:
            height, width = self.window or (PROBE_SIDE, PROBE_SIDE)
            probe = np.zeros((self._facts.batch or 1, height, width, 3), np.uint8)
            return file.most_elements(to_input(probe, self._facts, file.dtype).shape) / (
                probe.size / 3
            )

        return self._measured.once(f"elements of {precision} by {file.title}", measure)

    def _sizes(self, height: int, width: int) -> tuple[int, int]:
        multiple = self._facts.multiple
        return self.window or (-(-height // multiple) * multiple, -(-width // multiple) * multiple)

    def _file(self, precision: str) -> NetworkFile:
        if precision not in self._files:
            self._files[precision] = self._load(precision)
        return self._files[precision]


def to_input(images: np.ndarray, facts: FileFacts, kind: np.dtype) -> np.ndarray:
    """Convert RGB images (N, height, width, 3), uint8 or uint16, to an input of type `kind`."""
    highest = np.iinfo(images.dtype).max
    if kind == np.uint8:
        images = images if highest == 255 else ((images + np.uint32(128)) // 257).astype(np.uint8)
    else:
        images = (images.astype(np.float32) * np.float32(facts.white / highest)).astype(
            kind, copy=False
        )
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if facts.layout == "nchw" else images)


def from_output(output: np.ndarray, facts: FileFacts) -> np.ndarray:
    """Convert an output to floats (N, 3, height, width) with white as 1."""
    images = output if facts.layout == "nchw" else output.transpose(0, 3, 1, 2)
    return images / np.float32(facts.white) if facts.white != 1 else images


_BAND_PIXELS = 1 << 15
"""Pixels of an image that are processed together; they fit into the processor's cache."""


def to_levels(sr: np.ndarray, result: np.dtype) -> np.ndarray:
    """Convert floats (N, 3, height, width) to levels of `result` (N, height, width, 3).

    White is 1. Values are clamped and rounded, halves to the even level, as in `images.to_bytes`.

    Raises:
        NotFiniteError: there is NaN or infinity among the values.
    """
    count, channels, height, width = sr.shape
    highest = np.float32(np.iinfo(result).max)
    levels = np.empty((count, height, width, channels), result)
    rows = max(1, _BAND_PIXELS // width)
    for image, large in zip(sr, levels, strict=True):
        for top in range(0, height, rows):
            band = np.multiply(image[:, top : top + rows], highest, dtype=np.float32)
            if not np.isfinite(band.sum()) and not np.isfinite(band).all():
                raise NotFiniteError
            np.rint(band, out=band)
            np.clip(band, 0, highest, out=band)
            cv2.merge(list(band.astype(result)), large[top : top + rows])
    return levels


def _padded(images: np.ndarray, size: tuple[int, int], count: int) -> np.ndarray:
    """Extend images to `size` by reflection at the bottom and the right, and to `count` images.

    Missing images are copies of the last one.
    """
    below, right = (wanted - side for wanted, side in zip(size, images.shape[1:3], strict=True))
    if below or right:
        images = np.pad(images, ((0, 0), (0, below), (0, right), (0, 0)), "reflect")
    return (
        np.pad(images, ((0, count - len(images)), (0, 0), (0, 0), (0, 0)), "edge")
        if count > len(images)
        else images
    )
