"""The files of a batch on the host: opened, judged, and read as far as a sample needs them.

Of an `.npy` just the rows of a region are read; of an encoded file all bytes, to be decoded in the graph. Where a cache
is asked for, the host decodes, and keeps what fits.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.decoding import BadFileError, HostDecoder, read_encoded
from pipeline.data.image_files import NpyLayout, is_npy, npy_layout, read_npy

Bytes = NDArray[np.uint8]
Region = tuple[int, int, int, int]  # top, left, height, width in a file's pixels


FAULTS_OF_A_FILE = frozenset({errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO})
"""Errors that do not come from the disk or the network."""


class Opened(NamedTuple):
    """One side of a file that can be read: its size, and one of what its pixels can be taken from."""

    height: int
    width: int
    layout: NpyLayout | None = None
    stream: Bytes | None = None  # of an encoded file
    pixels: Bytes | None = None  # from the cache


class Part(NamedTuple):
    """A region of a file: its pixels, or the stream that holds them."""

    region: Region
    pixels: Bytes | None = None
    stream: Bytes | None = None


_NO_PIXELS = np.zeros((1, 1, 3), np.uint8)
_NO_BYTES = np.zeros(1, np.uint8)
NOTHING = Part((0, 0, 0, 0))


class ImageFiles:
    """The files of one side of the dataset, HR or LR, and the arrays that bring them into the graph."""

    def __init__(self, name: str, paths: Sequence[str], cache: ImageCache | None) -> None:
        self.paths, self.cache = paths, cache
        self.encoded = np.array([not is_npy(path) for path in paths])
        any_encoded = bool(self.encoded.any()) and cache is None
        all_encoded = any_encoded and bool(self.encoded.all())
        self.has_pixels, self.has_streams = not all_encoded, any_encoded
        self.columns = [name] if self.has_pixels else []
        if any_encoded:
            self.columns += [f"{name}_{of}" for of in ("stream", "corner", "shape")]
        if self.has_pixels and self.has_streams:
            self.columns.append(f"{name}_is_pixels")
        self._rows = bytearray()  # those of a region, before its columns are cut
        self._places: dict[int, Bytes] = {}  # by the sample's place in its batch; DALI copies what it is given at once

    def open(self, file: int) -> Opened:
        """Raises `BadFileError` for a file that cannot be trained on, `OSError` where the disk is at fault."""
        path = self.paths[file]
        try:
            return self._open(path, file)
        except OSError as error:
            if error.errno in FAULTS_OF_A_FILE:
                raise BadFileError(path, str(error.strerror)) from error
            error.filename = error.filename or path
            raise

    def _open(self, path: str, file: int) -> Opened:
        if not self.encoded[file]:
            layout = npy_layout(path)
            return Opened(layout.height, layout.width, layout=layout)
        if self.cache:
            image = self.cache.image(path)
            return Opened(*image.shape[:2], pixels=image)
        encoded = read_encoded(path)
        return Opened(encoded.height, encoded.width, stream=encoded.stream)

    def part(self, file: int, opened: Opened, region: Region, place: int) -> Part:
        """What is fed of the file for a region of it; its pixels are good until the next one for that place."""
        if opened.stream is not None:
            return Part(region, stream=opened.stream)
        top, left, height, width = region
        if opened.layout:
            if len(self._rows) < height * opened.layout.width * 3:
                self._rows = bytearray(height * opened.layout.width * 3)
            pixels = read_npy(self.paths[file], opened.layout, region, self._rows)
        else:
            pixels = opened.pixels[top:top + height, left:left + width]
        kept = self._places.get(place)
        if kept is None or kept.shape != pixels.shape:
            kept = self._places[place] = np.empty(pixels.shape, np.uint8)
        kept[...] = pixels
        return Part(region, pixels=kept)

    def arrays(self, parts: Sequence[Part]) -> list[Any]:
        """The columns."""
        columns: list[Any] = []
        if self.has_pixels:
            columns.append([_NO_PIXELS if part.pixels is None else part.pixels for part in parts])
        if self.has_streams:
            columns.append([_NO_BYTES if part.stream is None else part.stream for part in parts])
            columns += [np.array([part.region[:2] for part in parts], np.int32),
                        np.array([part.region[2:] for part in parts], np.int32)]
        if self.has_pixels and self.has_streams:
            columns.append(np.array([part.stream is None for part in parts]))
        return columns


class ImageCache:
    """Decoded images in memory, up to `capacity` bytes; what does not fit any more is decoded each time it is needed.

    Nothing is thrown out: each file comes once an epoch, so that no image is likelier to come soon than another.
    """

    def __init__(self, capacity: float, threads: int, batch: int) -> None:
        self.room, self._decoder = capacity, HostDecoder(threads, batch)
        self._kept: dict[str, Bytes | BadFileError] = {}
        self._passing: dict[str, Bytes | BadFileError] = {}

    def load(self, paths: Sequence[str]) -> None:
        """Decode, several at once, those of `paths` that are not here."""
        paths = [path for path in dict.fromkeys(paths) if path not in self._kept]
        self._passing = dict(zip(paths, self._decoder.decode(paths), strict=True))
        for path, image in self._passing.items():
            size = 0 if isinstance(image, BadFileError) else image.nbytes
            if size <= self.room:
                self._kept[path] = image
                self.room -= size

    def image(self, path: str) -> Bytes:
        """HWC bytes. Raises the `BadFileError` of a file that cannot be decoded."""
        if path not in self._kept and path not in self._passing:
            self.load([path])
        image = self._kept[path] if path in self._kept else self._passing[path]
        if isinstance(image, BadFileError):
            raise image
        return image

    def close(self) -> None:
        self._decoder.close()
