"""Shared by the parsers of all formats: the header they return, errors, reading, EXIF, XMP and ICC.

Sources: EXIF 2.3, ICC.1.
"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import BinaryIO

MAX_METADATA = 1 << 24  # bytes of EXIF, XMP or ICC data that are read
_FAR = 1 << 62  # larger offsets count as beyond the end of the file
MAX_PARTS = 1 << 16  # boxes, chunks and segments before the pixels; reading more would take seconds
Read = Callable[[int, int], bytes]
"""(offset, count) -> up to `count` bytes from `offset`; fewer at the end of the file."""


class BadImageError(ValueError):
    """An image that cannot be used; the message is only the reason, without the path."""


class NoEndError(BadImageError):
    """A JPEG without an end-of-image marker; only decoding shows whether pixels are missing."""


@dataclass(frozen=True)
class ImageHeader:
    """The content of an image's header.

    `height` and `width` are in pixels as stored, before any rotation.
    """

    format: str  # name in `FORMATS`: png, jpeg, webp, bmp, tiff, jp2, avif, jxl, pnm
    height: int
    width: int
    depth: int = 8  # bits per sample
    channels: int = 3  # as stored; a palette counts as 1
    is_lossy: bool = False  # the pixels went through a lossy codec
    # Gray or RGB with 8 bits and no transparency, which the fast decoders read.
    is_plain: bool = True
    orientation: int = 1  # 1..8, from the last EXIF, or from XMP if there is none
    is_for_dali: bool = False  # DALI decodes it correctly, EXIF rotation included
    pixels_at: int = 0  # byte offset of the encoded pixels
    profile: bytes | None = field(default=None, repr=False)  # ICC profile of the colours
    is_palette: bool = False  # the single channel holds palette indices
    # Display name of the format, filled in by `read_header`.
    title: str = field(default="", repr=False)
    # Tags of a TIFF; other formats store values under small numbers of their own.
    tags: Mapping[int, tuple[int, ...]] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the decoded image, after the rotation."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    @property
    def pixel_depth(self) -> int:
        """Bits per value, 8 or 16, that `image_pixels.decode_picture` keeps of the samples."""
        if self.depth <= 8 or self.format not in ("png", "tiff", "jp2", "jxl", "pnm"):
            return 8
        return 8 if self.format == "tiff" and self.colors not in ("gray", "RGB") else 16

    @property
    def colors(self) -> str:
        """Colour model of the samples: gray, RGB (also for palettes), CMYK, YCbCr or LAB.

        JPEG and similar codecs that store YCbCr count as RGB.
        """
        if self.format == "tiff":
            return {0: "gray", 1: "gray", 5: "CMYK", 6: "YCbCr", 8: "LAB"}.get(
                self.tags.get(262, (1,))[0], "RGB"
            )
        if self.format == "jpeg" and self.channels == 4:
            return "CMYK"
        return "gray" if self.channels <= 2 and not self.is_palette else "RGB"


@dataclass(frozen=True)
class Format:
    """A format of image files."""

    name: str
    title: str
    suffixes: tuple[str, ...]
    starts: tuple[bytes, ...]  # possible first bytes of a file
    parse: Callable[[Read], ImageHeader]
    check: Callable[[memoryview, ImageHeader, bool], None] | None = None  # see `check_complete`
    # Test of a file's first 32 bytes, for formats that `starts` cannot describe.
    is_start: Callable[[bytes], bool] | None = None
    is_for_datasets: bool = True  # False: only upscale.py reads it


def reader_of(source: Read | BinaryIO | bytes | memoryview) -> Read:
    """Return a `Read` for `source`: an image's content, a file open for reading, or a `Read`.

    Offsets and counts come from the file, and may be far beyond its end or what a file can have.
    """
    if callable(source):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return lambda at, count: bytes(source[at : at + count])

    def read(at: int, count: int) -> bytes:
        if at > _FAR:
            return b""
        try:
            source.seek(at)
        except OSError as error:
            if error.errno != errno.EINVAL:  # more than this file system allows
                raise
            return b""
        return source.read(count)

    return read


def unpack(form: str, read: Read, at: int) -> tuple:
    """Unpack the `struct` format `form` at byte `at`; raises `struct.error` beyond the end."""
    return struct.unpack(form, read(at, struct.calcsize(form)))


def no_image(head: bytes) -> BadImageError:
    """Return the error for a file that starts with `head` and is not an image."""
    what = f"its first bytes are {head[:8]!r}" if any(head) else "zero bytes where one should start"
    return BadImageError(f"not an image ({what})")


def is_followed_by(code: memoryview, marker: bytes) -> bool:
    """Return whether `marker` occurs after the encoded pixels, which cannot contain it.

    Usually the file ends with it, so the last 64 bytes are searched first.
    """
    return marker in bytes(code[-64:]) or marker in bytes(code)


def exif_orientation(tiff: bytes) -> int:
    """Return the orientation, 1..8, in EXIF data that starts with a TIFF header; default 1.

    As in DALI, the value is read as a 16-bit SHORT whatever type the tag claims.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    try:
        (count,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, value = struct.unpack_from(order + "H6xH", tiff, entry)
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # broken metadata must not prevent reading the pixels
        pass
    return 1


_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|=\'|>)([1-8])")


def xmp_orientation(xmp: bytes) -> int:
    """Return the orientation, 1..8, in an XMP packet; 1 if there is none."""
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else 1


@dataclass
class Metadata:
    """Metadata collected while parsing a header."""

    exif: int = 1  # orientation from EXIF
    other: int = 1  # orientation from XMP or a text chunk, which DALI ignores
    profile: bytes | None = None

    @property
    def orientation(self) -> int:
        """EXIF's orientation if it rotates the image, otherwise the other one."""
        return self.exif if self.exif > 1 else self.other

    def into(self, header: ImageHeader) -> ImageHeader:
        """Return `header` with the orientation and the profile.

        The image is not for DALI if DALI would rotate it differently.
        """
        return replace(
            header,
            orientation=self.orientation,
            profile=self.profile,
            is_for_dali=header.is_for_dali and self.orientation == self.exif,
        )
