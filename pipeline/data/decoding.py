"""Encoded images on the host: read with the checks that need no decoding, decoded by DALI on the
CPU, judged.

DALI raises for a whole batch and names no file, and of some damage it says nothing at all. So every
stream is checked as it is read, and where a batch fails its files are decoded one by one to find
the culprit.

Of unusual kinds (16 bits, transparency, CMYK, other colours than sRGB's...) DALI makes other pixels
than the tools and the evaluation, or wrong ones. Those are decoded here by the one decoder of all
commands (`image_pixels`), and DALI is given the pixels.
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

from pipeline.data.image_files import BadFileError, MissingFileError, is_npy, npy_layout
from pipeline.data.image_headers import (
    BadImageError,
    NoEndError,
    check_complete,
    check_max_pixels,
    make_readable,
    read_header,
)
from pipeline.data.image_pixels import decode_rgb, foreign_profile

MAX_BYTES = 1 << 31  # of a file: more than `MAX_PIXELS` need; a sparse file is not worth the memory

Bytes = NDArray[np.uint8]


class EncodedImage(NamedTuple):
    """An encoded image for DALI, its file's format, and the sides in pixels that it decodes to, its
    EXIF applied."""

    stream: Bytes  # all bytes of the file; or a pixmap (PPM) of what the one decoder made of it
    format: str
    height: int
    width: int
    profile: str = ""  # that the pixels were converted to sRGB from; empty where they were not


def encoded_size(path: str) -> tuple[int, int]:
    """(height, width) of an encoded image as decoding gives it, its EXIF orientation applied. Reads
    only headers.

    Raises `BadFileError` when the file is missing, no image or too large to decode; `OSError` when
    the disk or the permissions stand in the way, since that says nothing about the file.
    """
    with _opened(path) as (descriptor, size):
        header = read_header(
            lambda at, count: os.pread(descriptor, min(count, size - at), at) if at < size else b""
        )
        check_max_pixels(header)
    return header.size


def read_encoded(path: str) -> EncodedImage:
    """The file for DALI, and the size of what it decodes to, after all checks that need no
    decoding.

    Raises as `encoded_size` does, `BadFileError` also where the file is cut short (see
    `check_complete`), and where an image of an unusual kind cannot be decoded. Of some WebP files
    the lengths of chunks are changed, not the pixels (see `make_readable`).
    """
    with _opened(path) as (descriptor, size):
        return _for_dali(_whole(descriptor, size))


@contextmanager
def _opened(path: str) -> Iterator[tuple[int, int]]:
    """(Descriptor, size in bytes) of a plain file; a `BadImageError` within becomes a
    `BadFileError`."""
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_NONBLOCK
        )  # a named pipe must not keep us waiting
    except FileNotFoundError:
        raise MissingFileError(path) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a plain file")
        yield descriptor, status.st_size
    except BadImageError as error:
        raise BadFileError(path, str(error)) from None
    except OSError as error:
        error.filename = error.filename or path  # reading from a descriptor does not name it
        raise
    finally:
        os.close(descriptor)


def _whole(descriptor: int, size: int) -> Bytes:
    """All bytes of a file."""
    if size > MAX_BYTES:
        raise BadImageError(f"a file of {size} bytes, more than the {MAX_BYTES} that are read")
    stream, length = (
        np.empty(size, np.uint8),
        0,
    )  # numpy's memory comes in huge pages, at half the cost of bytes'
    while length < size and (count := os.readv(descriptor, [stream[length:]])):
        length += count
    return stream[:length]  # somebody may have made it shorter meanwhile


def _for_dali(stream: Bytes) -> EncodedImage:
    """The content of a file, found complete, as DALI decodes it to the right pixels. Raises
    `BadImageError`."""
    data = memoryview(stream)
    header = read_header(data)
    check_max_pixels(header)
    is_for_dali, profile = header.is_for_dali, foreign_profile(header)
    try:
        check_complete(data, header, thorough=False)
    except NoEndError:
        is_for_dali = False  # DALI would not notice missing pixels
    if is_for_dali and not profile:
        make_readable(data, header)
        return EncodedImage(stream, header.title, *header.size)
    pixels = decode_rgb(data.tobytes(), header)
    return EncodedImage(_pixmap(pixels), header.title, *pixels.shape[:2], profile)


def _pixmap(pixels: Bytes) -> Bytes:
    """uint8 RGB (height, width, 3) as the content of a PPM file, which DALI decodes by copying."""
    start = b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0])
    stream = np.empty(len(start) + pixels.size, np.uint8)
    stream[: len(start)] = np.frombuffer(start, np.uint8)
    stream[len(start) :] = pixels.reshape(-1)
    return stream


def decoding_fault(path: str) -> str:
    """Why training cannot read the image file `path`, of any kind, in one line; empty if it can.

    Raises `OSError` when the disk or the permissions stand in the way.
    """
    if not is_npy(path):
        with HostDecoder(threads=1, batch=1) as decoder:
            (image,) = decoder.decode([path])
        return image.reason if isinstance(image, BadFileError) else ""
    try:
        npy_layout(path)
    except BadFileError as error:
        return error.reason
    return ""


class HostDecoder:
    """Decodes files on the CPU, `batch` at a time on `threads` threads, in a DALI pipeline that is
    kept between calls.

    The pixels are to the bit those of `fn.decoders.image` on the CPU in any graph. Not for several
    threads at once. Close it when done: that ends its threads.
    """

    def __init__(self, threads: int, batch: int) -> None:
        self._threads, self._batch = threads, batch
        self.profiles: dict[
            str, str
        ] = {}  # path -> profile that its colours were converted to sRGB from
        self._pipeline: Any = None
        self._closed = False

    def __enter__(self) -> HostDecoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def decode(self, paths: Sequence[str]) -> list[Bytes | BadFileError]:
        """The image of each path, in order: RGB (height, width, 3), upright, in memory of its own,
        or what is wrong.

        Raises `OSError` when the disk or the permissions stand in the way, `MemoryError` when they
        do not fit.
        """
        if self._closed:
            raise ValueError("the decoder is closed")
        images: list[Bytes | BadFileError] = []
        for first in range(0, len(paths), self._batch):
            images += self._decode_batch(paths[first : first + self._batch])
        return images

    def decode_content(self, data: bytes) -> Bytes:
        """The image of a file's content; raises `BadImageError`, and `MemoryError` where it does
        not fit."""
        file = _for_dali(np.frombuffer(bytearray(data), np.uint8))
        image = _judged("", file, (self._run([file]) or [None])[0])
        if isinstance(image, BadFileError):
            raise BadImageError(image.reason)
        return image

    def close(self) -> None:
        """End the threads and free the buffers. Closing twice does nothing."""
        self._pipeline = None
        self._closed = True

    def _decode_batch(self, paths: Sequence[str]) -> list[Bytes | BadFileError]:
        files = [_read_or_error(path) for path in paths]
        self.profiles |= {
            path: file.profile
            for path, file in zip(paths, files, strict=True)
            if isinstance(file, EncodedImage) and file.profile
        }
        whole = [file for file in files if isinstance(file, EncodedImage)]
        images: Sequence[Bytes | None] | None = self._run(whole)
        if images is None:
            images = [(self._run([file]) or [None])[0] for file in whole]
        judged = iter(images)
        return [
            _judged(path, file, next(judged)) if isinstance(file, EncodedImage) else file
            for path, file in zip(paths, files, strict=True)
        ]

    def _run(self, files: list[EncodedImage]) -> list[Bytes] | None:
        """The images, in copies that DALI makes; `None` where it raises, which is the end of its
        pipeline too."""
        if not files:
            return []
        if self._pipeline is None:
            self._pipeline = _decoding_pipeline(self._threads, self._batch)
        try:
            self._pipeline.feed_input("streams", [file.stream for file in files])
            (images,) = self._pipeline.run()
            return [images.at(i) for i in range(len(files))]
        except (
            Exception
        ) as error:  # RuntimeError for most files, IndexError or MemoryError for some
            self._pipeline = None
            if isinstance(error, MemoryError) or "bad_alloc" in str(error):
                raise MemoryError(
                    f"not enough memory to decode {len(files)} images at once"
                ) from error
            return None


def _read_or_error(path: str) -> EncodedImage | BadFileError:
    try:
        return read_encoded(path)
    except BadFileError as error:
        return error


def _judged(path: str, file: EncodedImage, image: Bytes | None) -> Bytes | BadFileError:
    """The image, unless DALI raised (`None`) or decoded it to another size than what crops are
    drawn from."""
    if image is None:
        return BadFileError(
            path,
            f"its {file.format} data cannot be decoded (damaged, or a kind that DALI does not "
            "read)",
        )
    if image.shape != (file.height, file.width, 3):
        return BadFileError(
            path,
            f"decoded to {'x'.join(map(str, image.shape))} where its {file.format} header says "
            f"{file.height}x{file.width}x3",
        )
    return image


def _decoding_pipeline(threads: int, batch: int) -> Any:
    """A pipeline of one decoder, run in the calling thread so that errors come out where they
    belong."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=None,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    def graph() -> Any:
        streams = fn.external_source(name="streams", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(streams, device="cpu", output_type=types.RGB)

    pipeline = graph()
    pipeline.build()
    return pipeline
