"""The files of a batch on the host: opened, judged, and read as far as a sample needs them.

`READERS` is the table of the kinds of file. Of an `.npy` just the rows of a region are read; of an
encoded file all bytes, to be decoded in the graph. Where a cache is asked for, the host decodes,
and keeps what fits.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.dataset import Made
from pipeline.data.decoding import BadFileError, EncodedImage, HostDecoder, read_encoded
from pipeline.data.image_files import NpyLayout, is_npy, npy_layout, read_npy

Bytes = NDArray[np.uint8]
Region = tuple[int, int, int, int]  # top, left, height, width in a file's pixels


FAULTS_OF_A_FILE = frozenset(
    {errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO}
)
"""Errors that do not come from the disk or the network."""


class Part(NamedTuple):
    """A region of a file: its pixels, or the stream that holds them."""

    region: Region
    pixels: Bytes | None = None
    stream: Bytes | None = None


class Opened(Protocol):
    """One side of a sample: a file that can be read."""

    height: int
    width: int
    profile: str
    """Of the file's colours, where they were converted to sRGB; empty where they were not."""

    def part(self, region: Region) -> Part:
        """What is fed of the file for a region of it. Pixels are good until the next part of any
        file is read."""


class Reader(Protocol):
    """A kind of file."""

    is_decoded_in_graph: bool
    """Whether its parts are streams, which the graph decodes."""

    def reads(self, path: str) -> bool:
        """Whether a file is of this kind, by its name's suffix."""

    def open(self, path: str) -> Opened:
        """Raises `BadFileError` for a file that cannot be trained on, `OSError` where the disk is
        at fault."""


class NpyReader:
    """Crops as arrays: of a region just its rows are read."""

    is_decoded_in_graph = False

    def __init__(self) -> None:
        self._rows = bytearray()  # those of a region, before its columns are cut

    def reads(self, path: str) -> bool:
        return is_npy(path)

    def open(self, path: str) -> Opened:
        return _OpenNpy(path, npy_layout(path), self)

    def room(self, size: int) -> bytearray:
        """Memory for rows, the same for all files."""
        if len(self._rows) < size:
            self._rows = bytearray(size)
        return self._rows


class _OpenNpy:
    def __init__(self, path: str, layout: NpyLayout, reader: NpyReader) -> None:
        self._path, self._layout, self._reader = path, layout, reader
        self.height, self.width, self.profile = layout.height, layout.width, ""

    def part(self, region: Region) -> Part:
        room = self._reader.room(region[2] * self.width * 3)
        return Part(region, pixels=read_npy(self._path, self._layout, region, room))


class EncodedReader:
    """Image files of any format; the graph decodes them."""

    is_decoded_in_graph = True

    def reads(self, path: str) -> bool:
        return True  # the last of the table: what a file is, its content says

    def open(self, path: str) -> Opened:
        return _OpenStream(read_encoded(path))


class _OpenStream:
    def __init__(self, image: EncodedImage) -> None:
        self._image, self.height, self.width, self.profile = (
            image,
            image.height,
            image.width,
            image.profile,
        )

    def part(self, region: Region) -> Part:
        return Part(region, stream=self._image.stream)


class CachedReader:
    """Image files of any format, decoded on the host and kept."""

    is_decoded_in_graph = False

    def __init__(self, cache: ImageCache) -> None:
        self._cache = cache

    def reads(self, path: str) -> bool:
        return True

    def open(self, path: str) -> Opened:
        return _OpenPixels(self._cache.image(path), self._cache.profiles.get(path, ""))


class _OpenPixels:
    def __init__(self, pixels: Bytes, profile: str) -> None:
        self._pixels, self.profile, (self.height, self.width) = pixels, profile, pixels.shape[:2]

    def part(self, region: Region) -> Part:
        top, left, height, width = region
        return Part(region, pixels=self._pixels[top : top + height, left : left + width])


READERS: tuple[type[Reader], ...] = (NpyReader, EncodedReader)
"""The kinds of file that are trained on; the first that reads a file's name counts."""


_NO_PIXELS = np.zeros((1, 1, 3), np.uint8)
_NO_BYTES = np.zeros(1, np.uint8)
NOTHING = Part((0, 0, 0, 0))


class ImageFiles:
    """The files of one side of the dataset, HR or LR, and the arrays that bring them into the
    graph."""

    def __init__(self, name: str, paths: Sequence[str], cache: ImageCache | None) -> None:
        self.paths = paths
        self.readers = [
            CachedReader(cache) if cache and kind.is_decoded_in_graph else kind()
            for kind in READERS
        ]
        suffixes = (
            paths.suffixes()
            if isinstance(paths, Made)
            else {path[path.rfind(".") :] for path in paths}
        )
        streamed = [reader.is_decoded_in_graph for reader in {*map(self._reader, suffixes)}]
        self.has_pixels, self.has_streams = not streamed or not all(streamed), any(streamed)
        self.columns = [name] if self.has_pixels else []
        if self.has_streams:
            self.columns += [f"{name}_{of}" for of in ("stream", "corner", "shape")]
        if self.has_pixels and self.has_streams:
            self.columns.append(f"{name}_is_pixels")
        self._places: dict[
            int, Bytes
        ] = {}  # by the sample's place in its batch; DALI copies what it is given at once

    def is_cached(self, file: int) -> bool:
        """Whether a file's pixels come from the cache."""
        return isinstance(self._reader(self.paths[file]), CachedReader)

    def open(self, file: int) -> Opened:
        """Raises `BadFileError` for a file that cannot be trained on, `OSError` where the disk is
        at fault."""
        path = self.paths[file]
        try:
            return self._reader(path).open(path)
        except OSError as error:
            if error.errno in FAULTS_OF_A_FILE:
                raise BadFileError(path, str(error.strerror)) from error
            error.filename = error.filename or path
            raise

    def _reader(self, path: str) -> Reader:
        return next(reader for reader in self.readers if reader.reads(path))

    def part(self, opened: Opened, region: Region, place: int) -> Part:
        """What is fed of the file for a region of it; its pixels are good until the next one for
        that place."""
        part = opened.part(region)
        if part.pixels is None:
            return part
        kept = self._places.get(place)
        if kept is None or kept.shape != part.pixels.shape:
            kept = self._places[place] = np.empty(part.pixels.shape, np.uint8)
        kept[...] = part.pixels
        return Part(region, pixels=kept)

    def arrays(self, parts: Sequence[Part]) -> list[Any]:
        """The columns."""
        columns: list[Any] = []
        if self.has_pixels:
            columns.append([_NO_PIXELS if part.pixels is None else part.pixels for part in parts])
        if self.has_streams:
            columns.append([_NO_BYTES if part.stream is None else part.stream for part in parts])
            columns += [
                np.array([part.region[:2] for part in parts], np.int32),
                np.array([part.region[2:] for part in parts], np.int32),
            ]
        if self.has_pixels and self.has_streams:
            columns.append(np.array([part.stream is None for part in parts]))
        return columns


class ImageCache:
    """Decoded images in memory, up to `capacity` bytes; what does not fit any more is decoded each
    time it is needed.

    Nothing is thrown out: each file comes once an epoch, so that no image is likelier to come soon
    than another.
    """

    def __init__(self, capacity: float, threads: int, batch: int) -> None:
        self.room, self._decoder = capacity, HostDecoder(threads, batch)
        self._kept: dict[str, Bytes | BadFileError] = {}
        self._passing: dict[str, Bytes | BadFileError] = {}

    @property
    def profiles(self) -> dict[str, str]:
        """Path -> profile that its colours were converted to sRGB from."""
        return self._decoder.profiles

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
