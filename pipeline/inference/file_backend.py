"""A network in a file, in a runtime that is not PyTorch: images in the layout, type and sizes that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.cli import RunError
from pipeline.export.runtimes import NetworkFile
from pipeline.inference.memory import PROBE_SIDE, window_pixels


@dataclass(frozen=True)
class Facts:
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

    def __init__(self, load: Callable[[torch.dtype], NetworkFile], facts: Facts, device: torch.device,
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
            elements = file.most_elements(fed(probe, self._facts, file.dtype).shape) / (probe.size / 3)
            self._max_pixels[dtype] = window_pixels(elements, self.device, dtype)
        return self._max_pixels[dtype]

    def __call__(self, images: np.ndarray, dtype: torch.dtype) -> Tensor:
        """See `Backend`."""
        count, height, width, _ = images.shape
        step = self._facts.batch or count
        images = _continued(images, self._sizes(height, width), -(-count // step) * step)
        file = self._file(dtype)
        pieces = [taken(file(fed(images[start : start + step], self._facts, file.dtype)), self._facts)
                  for start in range(0, len(images), step)]
        sr = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        expected = (len(images), 3, images.shape[1] * self.scale, images.shape[2] * self.scale)
        if sr.shape != expected:
            raise RunError(f"the network makes {tuple(sr.shape)} of {images.shape} where {expected} is right")
        return sr[:count, :, : height * self.scale, : width * self.scale]

    def _sizes(self, height: int, width: int) -> tuple[int, int]:
        multiple = self._facts.multiple
        return self.window or (-(-height // multiple) * multiple, -(-width // multiple) * multiple)

    def _file(self, dtype: torch.dtype) -> NetworkFile:
        if dtype not in self._files:
            self._files[dtype] = self._load(dtype)
        return self._files[dtype]


def fed(images: np.ndarray, facts: Facts, kind: np.dtype) -> np.ndarray:
    """RGB images (N, height, width, 3), uint8 or uint16, as an input of the type `kind`."""
    highest = np.iinfo(images.dtype).max
    if kind == np.uint8:
        images = images if highest == 255 else ((images + np.uint32(128)) // 257).astype(np.uint8)
    else:
        images = (images.astype(np.float32) * np.float32(facts.white / highest)).astype(kind)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if facts.layout == "nchw" else images)


def taken(output: np.ndarray, facts: Facts) -> Tensor:
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
