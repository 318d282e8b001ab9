"""Open, check and read the files of a batch on the host.

`READERS` is the table of file kinds. For an `.npy` file, only the rows of a region are read; for an
encoded file, all bytes are read and the graph decodes them. With a cache, the host decodes encoded
files and keeps what fits. In a run of 16 bits the host always decodes them, so that a cache of no
bytes serves it.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.dataset import LazySequence
from pipeline.data.decoding import BadFileError, EncodedImage, HostDecoder, read_encoded
from pipeline.data.image_files import NpyLayout, is_npy, npy_layout, read_npy
from pipeline.data.image_pixels import Pixels, in_depth

Bytes = NDArray[np.uint8]
Region = tuple[int, int, int, int]  # top, left, height, width in a file's pixels


FAULTS_OF_A_FILE = frozenset(
    {errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR, errno.ENXIO}
)
"""Error numbers caused by the file itself, and not by the disk or the network."""


class Part(NamedTuple):
    """A region of a file: its pixels, or the stream that contains them."""

    region: Region
    pixels: Pixels | None = None
    stream: Bytes | None = None


class OpenedFile(Protocol):
    """An opened file: one side (HR or LR) of a sample."""

    height: int
    width: int
    profile: str
    """Colour profile from which the file was converted to sRGB; empty if it was not converted."""

    def part(self, region: Region) -> Part:
        """Read a region, in the file's own depth.

        Its pixels are valid until the next part of any file is read.
        """


class Reader(Protocol):
    """Reader of one kind of file."""

    is_decoded_in_graph: bool
    """Whether its parts are streams that the graph decodes."""

    def reads(self, path: str) -> bool:
        """Return whether a file is of this kind, judged by the suffix of its name."""

    def open(self, path: str) -> OpenedFile:
        """Open a file.

        Raises `BadFileError` if it cannot be used for training, and `OSError` if the disk is at
        fault.
        """


class NpyReader:
    """Reads regions of arrays; only their rows are read."""

    is_decoded_in_graph = False

    def __init__(self) -> None:
        self._rows = bytearray()  # whole rows of a region, before the columns are cropped

    def reads(self, path: str) -> bool:
        return is_npy(path)

    def open(self, path: str) -> OpenedFile:
        return _OpenNpy(path, npy_layout(path), self)

    def row_buffer(self, size: int) -> bytearray:
        """Return the row buffer shared by all files, with at least `size` bytes."""
        if len(self._rows) < size:
            self._rows = bytearray(size)
        return self._rows


class _OpenNpy:
    def __init__(self, path: str, layout: NpyLayout, reader: NpyReader) -> None:
        self._path, self._layout, self._reader = path, layout, reader
        self.height, self.width, self.profile = layout.height, layout.width, ""

    def part(self, region: Region) -> Part:
        buffer = self._reader.row_buffer(region[2] * self._layout.row_bytes)
        return Part(region, pixels=read_npy(self._path, self._layout, region, buffer))


class EncodedReader:
    """Reads image files of any format as streams, which the graph decodes."""

    is_decoded_in_graph = True

    def reads(self, path: str) -> bool:
        return True  # last in the table: the content decides the format

    def open(self, path: str) -> OpenedFile:
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
    """Reads image files of any format, decoded on the host and cached."""

    is_decoded_in_graph = False

    def __init__(self, cache: ImageCache) -> None:
        self._cache = cache

    def reads(self, path: str) -> bool:
        return True

    def open(self, path: str) -> OpenedFile:
        return _OpenPixels(self._cache.image(path), self._cache.profiles.get(path, ""))


class _OpenPixels:
    def __init__(self, pixels: Pixels, profile: str) -> None:
        self._pixels, self.profile, (self.height, self.width) = pixels, profile, pixels.shape[:2]

    def part(self, region: Region) -> Part:
        top, left, height, width = region
        return Part(region, pixels=self._pixels[top : top + height, left : left + width])


READERS: tuple[type[Reader], ...] = (NpyReader, EncodedReader)
"""The kinds of files for training; the first that accepts a file's name reads it."""


_NO_BYTES = np.zeros(1, np.uint8)
NO_PART = Part((0, 0, 0, 0))


class ImageFiles:
    """The files of one side of the dataset (HR or LR), and their arrays for the graph.

    All pixels have `depth` bits, 8 or 16, whatever the files have; with 16, a cache is needed.
    """

    def __init__(
        self, name: str, paths: Sequence[str], cache: ImageCache | None, depth: int = 8
    ) -> None:
        self.paths, self._depth = paths, depth
        self._dtype = np.uint8 if depth == 8 else np.uint16
        self._no_pixels = np.zeros((1, 1, 3), self._dtype)
        self.readers = [
            CachedReader(cache) if cache and kind.is_decoded_in_graph else kind()
            for kind in READERS
        ]
        suffixes = (
            paths.suffixes()
            if isinstance(paths, LazySequence)
            else {path[path.rfind(".") :] for path in paths if path}
        )
        streamed = [reader.is_decoded_in_graph for reader in {*map(self._reader, suffixes)}]
        # A sample without a file on this side, whose path is "", gets a dummy in place of pixels.
        is_partial = not isinstance(paths, LazySequence) and "" in paths
        self.has_pixels = not streamed or not all(streamed) or is_partial
        self.has_streams = any(streamed)
        self.columns = [name] if self.has_pixels else []
        if self.has_streams:
            self.columns += [f"{name}_{of}" for of in ("stream", "corner", "shape")]
        if self.has_pixels and self.has_streams:
            self.columns.append(f"{name}_is_pixels")
        # One buffer per sample of a batch: DALI copies its input immediately, so they can be
        # reused.
        self._places: dict[int, Pixels] = {}

    def is_cached(self, file: int) -> bool:
        """Return whether a file's pixels come from the cache."""
        return isinstance(self._reader(self.paths[file]), CachedReader)

    def open(self, file: int) -> OpenedFile:
        """Open a file by its index.

        Raises `BadFileError` if it cannot be used for training, and `OSError` if the disk is at
        fault.
        """
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

    def part(self, opened: OpenedFile, region: Region, place: int) -> Part:
        """Read a region of a file; its pixels stay valid until the next part for the same `place`.

        `place` is the sample's position in its batch.
        """
        part = opened.part(region)
        if part.pixels is None:
            return part
        kept = self._places.get(place)
        if kept is None or kept.shape != part.pixels.shape:
            kept = self._places[place] = np.empty(part.pixels.shape, self._dtype)
        kept[...] = in_depth(part.pixels, self._depth)
        return Part(region, pixels=kept)

    def arrays(self, parts: Sequence[Part]) -> list[Any]:
        """Return the arrays of `columns` for the parts of a batch."""
        columns: list[Any] = []
        if self.has_pixels:
            columns.append(
                [self._no_pixels if part.pixels is None else part.pixels for part in parts]
            )
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
    """Decoded images in memory, up to `capacity` bytes; the rest is decoded whenever it is needed.

    Nothing is evicted: every file occurs once per epoch, so no image is more likely to be needed
    soon than another.
    """

    def __init__(self, capacity: float, threads: int, batch: int, depth: int = 8) -> None:
        self.free_bytes, self._decoder = capacity, HostDecoder(threads, batch, depth)
        self._kept: dict[str, Pixels | BadFileError] = {}
        self._uncached: dict[str, Pixels | BadFileError] = {}

    @property
    def profiles(self) -> dict[str, str]:
        """Path -> profile from which the image's colours were converted to sRGB."""
        return self._decoder.profiles

    def load(self, paths: Sequence[str]) -> None:
        """Decode, as one batch, those of `paths` that are not cached."""
        paths = [path for path in dict.fromkeys(paths) if path not in self._kept]
        self._uncached = dict(zip(paths, self._decoder.decode(paths), strict=True))
        for path, image in self._uncached.items():
            size = 0 if isinstance(image, BadFileError) else image.nbytes
            if size <= self.free_bytes:
                self._kept[path] = image
                self.free_bytes -= size

    def image(self, path: str) -> Pixels:
        """Return an image, RGB (height, width, 3) of the cache's depth.

        Raises the `BadFileError` of a file that cannot be decoded.
        """
        if path not in self._kept and path not in self._uncached:
            self.load([path])
        image = self._kept[path] if path in self._kept else self._uncached[path]
        if isinstance(image, BadFileError):
            raise image
        return image

    def close(self) -> None:
        self._decoder.close()
