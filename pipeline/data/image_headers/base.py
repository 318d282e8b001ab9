"""What the parsers of all formats share: the header that they return, the errors, reading, and
EXIF, XMP and ICC.

Sources: EXIF 2.3, ICC.1.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import BinaryIO

MAX_METADATA = 1 << 24  # bytes of EXIF, XMP or a profile that are looked at
_FAR = 1 << 62  # beyond which no file can be positioned

Read = Callable[[int, int], bytes]
"""(offset, count) -> that many bytes from there, or as many as there are."""


class BadImageError(ValueError):
    """An image that cannot be used; the message is the reason alone, without the path."""


class NoEndError(BadImageError):
    """A JPEG without its end-of-image marker. All its pixels may be there: only decoding shows."""


@dataclass(frozen=True)
class ImageHeader:
    """What an image's header says. `height` and `width` are in pixels as stored, before any
    rotation."""

    format: str  # the name of a row of `FORMATS`: png, jpeg, webp, bmp, tiff, jp2, avif, jxl, pnm
    height: int
    width: int
    depth: int = 8  # bits a sample
    channels: int = 3  # as stored: a palette counts as 1
    is_lossy: bool = False  # the pixels went through a lossy codec
    is_plain: bool = (
        True  # gray or RGB of 8 bits without transparency, which the fast decoders read
    )
    orientation: int = 1  # EXIF's, 1..8, of the last EXIF; where there is none XMP's
    is_for_dali: bool = False  # DALI decodes it to the right pixels, turned as EXIF says
    pixels_at: int = 0  # byte where the pixels' code begins
    profile: bytes | None = field(default=None, repr=False)  # ICC's, of the colours
    is_palette: bool = False  # the one channel holds numbers of colours
    title: str = field(
        default="", repr=False
    )  # the format's name for people, which `read_header` fills in
    tags: Mapping[int, tuple[int, ...]] = field(
        default_factory=dict, repr=False
    )  # of a TIFF; of others under 0

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as decoding gives it: turned as the orientation says."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    @property
    def colors(self) -> str:
        """What the samples are: gray, RGB (a palette's too), CMYK, YCbCr or LAB; JPEG's and the
        like count as RGB."""
        if self.format == "tiff":
            return {0: "gray", 1: "gray", 5: "CMYK", 6: "YCbCr", 8: "LAB"}.get(
                self.tags.get(262, (1,))[0], "RGB"
            )
        if self.format == "jpeg" and self.channels == 4:
            return "CMYK"
        return "gray" if self.channels <= 2 and not self.is_palette else "RGB"


@dataclass(frozen=True)
class Format:
    """A kind of image file."""

    name: str
    title: str
    suffixes: tuple[str, ...]
    starts: tuple[bytes, ...]  # its content begins with one of them
    parse: Callable[[Read], ImageHeader]
    check: Callable[[memoryview, ImageHeader, bool], None] | None = None  # see `check_complete`
    is_start: Callable[[bytes], bool] | None = (
        None  # of its first 32 bytes, where `starts` cannot tell
    )
    is_for_datasets: bool = True  # False: only upscale.py reads it


def reader_of(source: Read | BinaryIO | bytes | memoryview) -> Read:
    """How to read `source`: the content of an image, a file open for reading, or a `Read`."""
    if callable(source):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return lambda at, count: bytes(source[at : at + count])

    def read(at: int, count: int) -> bytes:
        if at > _FAR:
            return b""
        source.seek(at)
        return source.read(count)

    return read


def unpack(form: str, read: Read, at: int) -> tuple:
    """The values of the `struct` format `form` at byte `at`. Raises `struct.error` where the file
    ends before."""
    return struct.unpack(form, read(at, struct.calcsize(form)))


def no_image(head: bytes) -> BadImageError:
    """The error for a file that begins with `head`, which is no image."""
    what = f"its first bytes are {head[:8]!r}" if any(head) else "zero bytes where one should start"
    return BadImageError(f"not an image ({what})")


def is_followed_by(code: memoryview, marker: bytes) -> bool:
    """Whether the pixels' code, in which the marker cannot occur, is followed by it; mostly the
    file ends with it."""
    return marker in bytes(code[-64:]) or marker in bytes(code)


def exif_orientation(tiff: bytes) -> int:
    """The orientation, 1..8, in EXIF that begins with a TIFF header.

    As DALI reads it: the 16 bits where a SHORT stands, whatever type the tag claims; 1 where there
    is none.
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
    except struct.error:  # broken metadata are no reason not to read the pixels
        pass
    return 1


_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|=\'|>)([1-8])")


def xmp_orientation(xmp: bytes) -> int:
    """The orientation, 1..8, in an XMP packet; 1 where there is none."""
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else 1


@dataclass
class Metadata:
    """What is gathered on the way to the pixels."""

    exif: int = 1  # orientation by EXIF
    other: int = 1  # by XMP or a text chunk, which DALI does not look at
    profile: bytes | None = None

    @property
    def orientation(self) -> int:
        """EXIF's, if it turns the image; else the other."""
        return self.exif if self.exif > 1 else self.other

    def into(self, header: ImageHeader) -> ImageHeader:
        """`header` with the orientation and the profile; not for DALI where that would turn it
        otherwise."""
        return replace(
            header,
            orientation=self.orientation,
            profile=self.profile,
            is_for_dali=header.is_for_dali and self.orientation == self.exif,
        )
