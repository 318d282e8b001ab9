"""Encoded images on the host: read with the checks that need no decoding, decoded by DALI on the CPU, judged.

DALI raises for a whole batch and names no file, and of some damage it says nothing at all. So every stream is checked
as it is read (`encoded_streams`), and where a batch fails its files are decoded one by one to find the culprit.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.encoded_streams import check_complete, make_readable
from pipeline.data.image_files import BadFileError, MissingFileError, is_npy, npy_layout
from pipeline.data.image_headers import BrokenStreamError, Header, read_header

MAX_BYTES = 1 << 31  # of a file: more than `MAX_PIXELS` need; a sparse file is not worth the memory

Bytes = NDArray[np.uint8]


class EncodedImage(NamedTuple):
    """All bytes of an encoded file, its format, and the sides in pixels that it decodes to, its EXIF applied."""

    stream: Bytes
    format: str
    height: int
    width: int


def encoded_size(path: str) -> tuple[int, int]:
    """(height, width) of an encoded image as decoding gives it, its EXIF orientation applied. Reads only headers.

    Raises `BadFileError` when the file is missing, no image or too large to decode; `OSError` when the disk or the
    permissions stand in the way, since that says nothing about the file.
    """
    with _opened(path) as (descriptor, size):
        return read_header(lambda at, count: os.pread(descriptor, min(count, size - at), at) if at < size else b"").size


def read_encoded(path: str) -> EncodedImage:
    """The file's bytes, and the size of what they decode to, after all checks that need no decoding.

    Raises as `encoded_size` does, `BadFileError` also where the file is cut short (see `check_complete`). Of some WebP
    files the lengths of chunks are changed, not the pixels (see `make_readable`).
    """
    with _opened(path) as (descriptor, size):
        stream, header = _checked(descriptor, size)
    return EncodedImage(stream, header.format, *header.size)


def read_stream(path: str) -> Bytes:
    """The bytes of `read_encoded`: uint8 of shape (length,), in memory of their own."""
    return read_encoded(path).stream


@contextmanager
def _opened(path: str) -> Iterator[tuple[int, int]]:
    """(Descriptor, size in bytes) of a plain file; a `BrokenStreamError` within becomes a `BadFileError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe must not keep us waiting
    except FileNotFoundError:
        raise MissingFileError(path) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BrokenStreamError("not a plain file")
        yield descriptor, status.st_size
    except BrokenStreamError as error:
        raise BadFileError(path, str(error)) from None
    except OSError as error:
        error.filename = error.filename or path  # reading from a descriptor does not name it
        raise
    finally:
        os.close(descriptor)


def _checked(descriptor: int, size: int) -> tuple[Bytes, Header]:
    """All bytes of a file, found complete, and its header."""
    if size > MAX_BYTES:
        raise BrokenStreamError(f"a file of {size} bytes, more than the {MAX_BYTES} that are read")
    stream, length = np.empty(size, np.uint8), 0  # numpy's memory comes in huge pages, at half the cost of bytes'
    while length < size and (count := os.readv(descriptor, [stream[length:]])):
        length += count
    stream = stream[:length]  # somebody may have made it shorter meanwhile
    data = memoryview(stream)
    header = read_header(lambda at, count: bytes(data[at : at + count]))
    check_complete(data, header)
    make_readable(data, header)
    return stream, header


def decoding_fault(path: str) -> str:
    """Why training cannot read the image file `path`, of any kind, in one line; empty if it can.

    Raises `OSError` when the disk or the permissions stand in the way.
    """
    if not is_npy(path):
        with HostDecoder(threads=1, batch=1) as decoder:
            image, = decoder.decode([path])
        return image.reason if isinstance(image, BadFileError) else ""
    try:
        npy_layout(path)
    except BadFileError as error:
        return error.reason
    return ""


class HostDecoder:
    """Decodes files on the CPU, `batch` at a time on `threads` threads, in a DALI pipeline that is kept between calls.

    The pixels are to the bit those of `fn.decoders.image` on the CPU in any graph. Not for several threads at once.
    Close it when done: that ends its threads.
    """

    def __init__(self, threads: int, batch: int) -> None:
        self._threads, self._batch = threads, batch
        self._pipeline: Any = None
        self._closed = False

    def __enter__(self) -> HostDecoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def decode(self, paths: Sequence[str]) -> list[Bytes | BadFileError]:
        """The image of each path, in order: RGB (height, width, 3), upright, in memory of its own, or what is wrong.

        Raises `OSError` when the disk or the permissions stand in the way, `MemoryError` when they do not fit.
        """
        if self._closed:
            raise ValueError("the decoder is closed")
        images: list[Bytes | BadFileError] = []
        for first in range(0, len(paths), self._batch):
            images += self._decode_batch(paths[first : first + self._batch])
        return images

    def close(self) -> None:
        """End the threads and free the buffers. Closing twice does nothing."""
        self._pipeline = None
        self._closed = True

    def _decode_batch(self, paths: Sequence[str]) -> list[Bytes | BadFileError]:
        files = [_read_or_error(path) for path in paths]
        whole = [file for file in files if isinstance(file, EncodedImage)]
        images: Sequence[Bytes | None] | None = self._run(whole)
        if images is None:
            images = [(self._run([file]) or [None])[0] for file in whole]
        judged = iter(images)
        return [_judged(path, file, next(judged)) if isinstance(file, EncodedImage) else file
                for path, file in zip(paths, files, strict=True)]

    def _run(self, files: list[EncodedImage]) -> list[Bytes] | None:
        """The images, in copies that DALI makes; `None` where it raises, which is the end of its pipeline too."""
        if not files:
            return []
        if self._pipeline is None:
            self._pipeline = _decoding_pipeline(self._threads, self._batch)
        try:
            self._pipeline.feed_input("streams", [file.stream for file in files])
            images, = self._pipeline.run()
            return [images.at(i) for i in range(len(files))]
        except Exception as error:  # RuntimeError for most files, IndexError or MemoryError for some
            self._pipeline = None
            if isinstance(error, MemoryError) or "bad_alloc" in str(error):
                raise MemoryError(f"not enough memory to decode {len(files)} images at once") from error
            return None


def _read_or_error(path: str) -> EncodedImage | BadFileError:
    try:
        return read_encoded(path)
    except BadFileError as error:
        return error


def _judged(path: str, file: EncodedImage, image: Bytes | None) -> Bytes | BadFileError:
    """The image, unless DALI raised (`None`) or decoded it to another size than what crops are drawn from."""
    if image is None:
        return BadFileError(path, f"its {file.format} data cannot be decoded (damaged, or a kind that DALI does not "
                                  "read)")
    if image.shape != (file.height, file.width, 3):
        return BadFileError(path, f"decoded to {'x'.join(map(str, image.shape))} where its {file.format} header says "
                                  f"{file.height}x{file.width}x3")
    return image


def _decoding_pipeline(threads: int, batch: int) -> Any:
    """A pipeline of one decoder, run in the calling thread so that errors come out where they belong."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=1, exec_async=False,
                  exec_pipelined=False)
    def graph() -> Any:
        streams = fn.external_source(name="streams", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(streams, device="cpu", output_type=types.RGB)

    pipeline = graph()
    pipeline.build()
    return pipeline
