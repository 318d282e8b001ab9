"""What computes, behind one interface for the tiler; here a network in a file, by ONNX Runtime or
OpenVINO.

`Backend` is the interface: arrays of pixels in, arrays of pixels out, whatever lies between.
`FileBackend` runs a network file and needs no torch; `torch_backend.TorchBackend` runs a network of
`pipeline.models`. How much they may be shown at once follows from the free memory and from what
their hungriest layer reads and writes.
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
"""Precisions, and the bytes of one of their numbers."""

Levels = Callable[[], np.ndarray]
"""Waits for a batch that was begun: its pixels, (N, height, width, 3). May raise `NotFiniteError`;
called once."""


class NotFiniteError(Exception):
    """The network gave NaN or infinity."""


class Backend(Protocol):
    """A network, ready to run on batches of images of one size."""

    scale: int
    halo: int
    """How many LR pixels away an output pixel still sees."""
    device: Device
    window: tuple[int, int] | None
    """Height and width of the only images that it takes; `None`: any."""
    in_flight: int
    """How many batches may be begun besides the one whose result is waited for."""
    step: float
    """Between two values that it gives: 1/255 for files that give bytes; 0 for floats."""

    def precision_for(self, *, is_deep: bool) -> str:
        """What it computes in, one of `ITEM_BYTES`, for pictures of 16 bits (`is_deep`), or of
        8."""

    def is_exact(self, precision: str) -> bool:
        """Whether it has nothing better than `precision` for what that cannot hold; the better one
        is "fp32"."""

    def pixel_bytes(self, precision: str) -> float:
        """Bytes that the network holds at most for every LR pixel it is shown, by its hungriest
        layer."""

    def max_pixels(self, precision: str) -> int:
        """How many LR pixels, over all images of a batch, the free memory is enough for; as asked
        the first time."""

    def floats(self, images: np.ndarray) -> np.ndarray:
        """RGB (N, height, width, 3), uint8 or uint16 -> (N, 3, scale * height, scale * width),
        white is 1.

        In the best precision, not clamped.
        """

    def start(self, images: np.ndarray, precision: str, result: np.dtype) -> Levels:
        """Begin a batch: RGB (N, height, width, 3), uint8 or uint16 -> as `result`, `scale` times
        larger, clamped and rounded. `MemoryError`, or an error of torch, where the memory does not
        suffice."""


def precision_of(asked: str, device: Device, *, is_deep: bool) -> str:
    """What was asked for; for "auto" FP16 on a GPU, but not for 16-bit pictures, of which it would
    keep 11 bits."""
    if asked != "auto":
        return asked
    return "fp16" if device.type == "cuda" and not is_deep else "fp32"


# How much memory a network takes for a pixel: what the size of tiles is chosen from.

PROBE_SIDE = 64
HELD_AT_ONCE = 3
"""A network holds at most about this many times what its hungriest layer reads and writes. Measured
on a CPU: PyTorch 1.3 to 2.7, ONNX Runtime 1.6 to 3.1, OpenVINO 1.1 to 2.9 (VapSR, SRResNet,
MSRResNet, Compact, RRDBNet)."""
SHARE = 0.5
"""Of the free memory, for the network's own use."""
MAX_ELEMENTS = 2**31 - 1
"""Of one tensor: 32-bit indices in many GPU kernels."""


def held_bytes(elements: float, precision: str) -> float:
    """Bytes for every LR pixel, where the hungriest layer handles `elements` for each of them."""
    return elements * ITEM_BYTES[precision] * HELD_AT_ONCE


def window_pixels(elements: float, device: Device, precision: str) -> int:
    """How many LR pixels fit into the free memory, where the hungriest layer handles `elements` for
    each of them."""
    by_memory = SHARE * free_bytes(device) / held_bytes(elements, precision)
    return max(1, int(min(by_memory, MAX_ELEMENTS / elements)))


# A network in a file: images in the layout, type and sizes that it takes.


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
    """One network in up to two files, of FP32 and of FP16; see `Backend`.

    Args:
        load: gives the file for a precision; called once for each.
        device: where the files run.
        precision: the precision for 16-bit pictures (`True`) and for others.
        exact: the best precision there is.
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
        self.scale, self.halo, self.window, self.device = (
            facts.scale,
            facts.halo,
            facts.window,
            device,
        )
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
        """See `Backend`. It computes when its result is taken."""
        return lambda: to_levels(self._run(images, precision), result)

    def _run(self, images: np.ndarray, precision: str) -> np.ndarray:
        count, height, width, _ = images.shape
        step = self._facts.batch or count
        images = _continued(images, self._sizes(height, width), -(-count // step) * step)
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
                f"the network turns {images.shape} into {sr.shape}, and {expected} is right"
            )
        return sr[:count, :, : height * self.scale, : width * self.scale]

    def _elements(self, precision: str) -> float:
        """What the hungriest operator reads and writes for every LR pixel."""
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
    """RGB images (N, height, width, 3), uint8 or uint16, as an input of the type `kind`."""
    highest = np.iinfo(images.dtype).max
    if kind == np.uint8:
        images = images if highest == 255 else ((images + np.uint32(128)) // 257).astype(np.uint8)
    else:
        images = (images.astype(np.float32) * np.float32(facts.white / highest)).astype(
            kind, copy=False
        )
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if facts.layout == "nchw" else images)


def from_output(output: np.ndarray, facts: FileFacts) -> np.ndarray:
    """An output as floats (N, 3, height, width), white is 1."""
    images = output if facts.layout == "nchw" else output.transpose(0, 3, 1, 2)
    return images / np.float32(facts.white) if facts.white != 1 else images


_BAND_PIXELS = 1 << 15
"""Of an image that are worked on together, so that they stay in the processor's cache."""


def to_levels(sr: np.ndarray, result: np.dtype) -> np.ndarray:
    """Floats (N, 3, height, width), white is 1, as levels of `result` (N, height, width, 3),
    clamped and rounded.

    Halves go to the even level, as in `images.to_bytes`. `NotFiniteError` for NaN and infinity.
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


def _continued(images: np.ndarray, size: tuple[int, int], count: int) -> np.ndarray:
    """`count` images of at least that size: mirrored at the bottom and the right, the last one
    repeated."""
    below, right = (wanted - side for wanted, side in zip(size, images.shape[1:3], strict=True))
    if below or right:
        images = np.pad(images, ((0, 0), (0, below), (0, right), (0, 0)), "reflect")
    return (
        np.pad(images, ((0, count - len(images)), (0, 0), (0, 0), (0, 0)), "edge")
        if count > len(images)
        else images
    )
