"""Read, check and decode encoded images on the host.

DALI raises for a whole batch without naming a file, and does not report some kinds of damage. Every
stream is therefore checked as it is read, and when a batch fails, its files are decoded one by one
to find the bad ones.

For unusual images (16 bits, transparency, CMYK, colours other than sRGB, …) DALI's pixels differ
from those of the tools and the evaluation, or are wrong. Such images are decoded here by
`image_pixels`, which all commands share, and DALI gets the pixels. A run in 16 bits decodes all its
files so.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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

MAX_BYTES = 1 << 31  # bytes of a file; `MAX_PIXELS` need less, and sparse files must fail early

Bytes = NDArray[np.uint8]


class EncodedImage(NamedTuple):
    """An encoded image for DALI, its format, and its size in pixels after applying EXIF."""

    # All bytes of the file, or a pixmap (PPM) of what `image_pixels` decoded.
    stream: Bytes
    format: str
    height: int
    width: int
    profile: str = ""  # profile from which the pixels were converted to sRGB, or ""


def encoded_size(path: str) -> tuple[int, int]:
    """Return (height, width) of an encoded image after applying EXIF; reads only headers.

    Raises `BadFileError` if the file is missing, not an image or too large to decode. Raises
    `OSError` for disk and permission errors, which say nothing about the file itself.
    """
    with _opened(path) as (descriptor, size):
        header = read_header(
            lambda at, count: os.pread(descriptor, min(count, size - at), at) if at < size else b""
        )
        check_max_pixels(header)
    return header.size


def read_encoded(path: str) -> EncodedImage:
    """Read a file for DALI, with its decoded size, after all checks that need no decoding.

    Raises the errors of `encoded_size`, and `BadFileError` if the file is truncated (see
    `check_complete`) or is of an unusual kind and cannot be decoded. The chunk lengths of some WebP
    files are corrected for DALI; their pixels stay the same (see `make_readable`).
    """
    with _opened(path) as (descriptor, size):
        return _for_dali(_whole(descriptor, size))


@contextmanager
def _opened(path: str) -> Iterator[tuple[int, int]]:
    """Open a regular file and yield (descriptor, size in bytes).

    A `BadImageError` raised inside becomes a `BadFileError`.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise MissingFileError(path) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a regular file")
        yield descriptor, status.st_size
    except BadImageError as error:
        raise BadFileError(path, str(error)) from None
    except OSError as error:
        error.filename = error.filename or path  # reads through a descriptor do not set it
        raise
    finally:
        os.close(descriptor)


def _whole(descriptor: int, size: int) -> Bytes:
    """Read all bytes of a file."""
    if size > MAX_BYTES:
        raise BadImageError(f"a file of {size} bytes; at most {MAX_BYTES} are read")
    # NumPy allocates in huge pages, which costs half as much as `bytes`.
    stream, length = np.empty(size, np.uint8), 0
    while length < size and (count := os.readv(descriptor, [stream[length:]])):
        length += count
    return stream[:length]  # the file may have been truncated meanwhile


def _for_dali(stream: Bytes) -> EncodedImage:
    """Prepare the content of a file for DALI, so that it decodes to the right pixels.

    Raises `BadImageError` if the content is incomplete or cannot be decoded.
    """
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
    """Write uint8 RGB (height, width, 3) as PPM, which DALI decodes by copying."""
    start = b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0])
    stream = np.empty(len(start) + pixels.size, np.uint8)
    stream[: len(start)] = np.frombuffer(start, np.uint8)
    stream[len(start) :] = pixels.reshape(-1)
    return stream


def decoding_fault(path: str) -> str:
    """Return in one line why training cannot read the image file `path`; "" if it can.

    Works for all kinds of files. Raises `OSError` for disk and permission errors.
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
    """Decodes files on the CPU in a DALI pipeline that is kept between calls.

    Decodes `batch` files at a time on `threads` threads. The pixels equal those of
    `fn.decoders.image` on the CPU in any graph. With a `depth` of 16 the pixels are uint16, decoded
    by `image_pixels` and not by DALI; 8-bit files are scaled by 257. Not thread-safe. Close it when
    done, which ends its threads.
    """

    def __init__(self, threads: int, batch: int, depth: int = 8) -> None:
        self._threads, self._batch, self.depth = threads, batch, depth
        # Path -> profile from which its colours were converted to sRGB.
        self.profiles: dict[str, str] = {}
        self._pipeline: Any = None
        self._pool: ThreadPoolExecutor | None = None
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

    def decode(self, paths: Sequence[str]) -> list[Any]:
        """Decode the files at `paths`, in order.

        Returns for each file its image, RGB (height, width, 3) of the decoder's depth, upright, in
        its own memory, or a `BadFileError`. Raises `OSError` for disk and permission errors, and
        `MemoryError` if the images do not fit into memory.
        """
        if self._closed:
            raise ValueError("the decoder is closed")
        if self.depth == 16:
            return self._decode_deep(paths)
        images: list[Bytes | BadFileError] = []
        for first in range(0, len(paths), self._batch):
            images += self._decode_batch(paths[first : first + self._batch])
        return images

    def decode_content(self, data: bytes) -> Bytes:
        """Decode the content of a file; raises `BadImageError` or `MemoryError`."""
        file = _for_dali(np.frombuffer(bytearray(data), np.uint8))
        image = _checked_image("", file, (self._run([file]) or [None])[0])
        if isinstance(image, BadFileError):
            raise BadImageError(image.reason)
        return image

    def close(self) -> None:
        """End the threads and free the buffers; may be called twice."""
        self._pipeline = None
        if self._pool:
            self._pool.shutdown(wait=True)
        self._closed = True

    def _decode_deep(self, paths: Sequence[str]) -> list[Any]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decoder")
        images = []
        for path, (image, profile) in zip(paths, self._pool.map(_deep, paths), strict=True):
            if profile:
                self.profiles[path] = profile
            images.append(image)
        return images

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
        checked = iter(images)
        return [
            _checked_image(path, file, next(checked)) if isinstance(file, EncodedImage) else file
            for path, file in zip(paths, files, strict=True)
        ]

    def _run(self, files: list[EncodedImage]) -> list[Bytes] | None:
        """Decode and copy the images; None if DALI raises, after which its pipeline is unusable."""
        if not files:
            return []
        if self._pipeline is None:
            self._pipeline = _decoding_pipeline(self._threads, self._batch)
        try:
            self._pipeline.feed_input("streams", [file.stream for file in files])
            (images,) = self._pipeline.run()
            return [images.at(i) for i in range(len(files))]
        # DALI raises RuntimeError for most bad files, IndexError or MemoryError for some.
        except Exception as error:
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


def _deep(path: str) -> tuple[NDArray[np.uint16] | BadFileError, str]:
    """Decode a file to uint16 RGB, or to its error; also return the profile it was converted from.

    Raises `OSError` for disk and permission errors.
    """
    try:
        with _opened(path) as (descriptor, size):
            data = _whole(descriptor, size)
            header = read_header(memoryview(data))
            check_max_pixels(header)
            return decode_rgb(data.tobytes(), header, 16), foreign_profile(header)
    except BadFileError as error:
        return error, ""


def _checked_image(path: str, file: EncodedImage, image: Bytes | None) -> Bytes | BadFileError:
    """Return the decoded image, or an error if DALI raised (`None`) or the size is wrong.

    Crops are drawn from the size in the header, so a different decoded size is an error.
    """
    if image is None:
        return BadFileError(
            path,
            f"its {file.format} data cannot be decoded (it is damaged, or of a kind that DALI "
            "cannot read)",
        )
    if image.shape != (file.height, file.width, 3):
        return BadFileError(
            path,
            f"decoded to {'x'.join(map(str, image.shape))}, but its {file.format} header says "
            f"{file.height}x{file.width}x3",
        )
    return image


def _decoding_pipeline(threads: int, batch: int) -> Any:
    """Build a pipeline of one decoder, run in the calling thread so that errors surface there."""
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
