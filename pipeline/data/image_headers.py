"""The size of an encoded image as DALI decodes it, from its header: PNG, JPEG, WebP, BMP, TIFF and JPEG 2000.

Sources: PNG (ISO 15948), JPEG (ITU-T T.81, table B.1), WebP (RFC 9649), TIFF 6.0, JPEG 2000 (ITU-T T.800, annexes A
and I), EXIF 2.3. Orientation is taken only from where DALI (nvImageCodec) takes it: the last EXIF, never XMP.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

MAX_PIXELS = 1 << 28
_MAX_EXIF = 1 << 16

Read = Callable[[int, int], bytes]  # (offset, count) -> so many bytes from there, or as many as there are

_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..15 without DHT, JPG and DAC
_JPEG_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}                # RST0..7 and TEM have no length
_JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_FOREIGN = {b"GIF8": "GIF", b"%PDF": "PDF", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"8BPS": "Photoshop",
            b"\x93NUMPY": "an .npy array", b"DDS ": "DDS", b"v/1\1": "OpenEXR"}
# What DALI 2.4 decodes: none, fax (2, 3, 4), LZW, JPEG, deflate (8, 32946), PackBits, Zstandard. JPEG 2000, JPEG XL,
# PNG and JPEG XR in a TIFF come out black, without an error.
_TIFF_COMPRESSIONS = frozenset((1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000))
_TIFF_COLORS = frozenset((0, 1, 2, 3, 5, 6))  # gray, RGB, palette, CMYK, YCbCr; CIELab and others come out wrong


class BrokenStreamError(Exception):
    """An encoded image that cannot be trained on; the message is the reason alone, without the path."""


class Header(NamedTuple):
    """What an image's header says, sides in pixels as stored; `pixels_at` is the byte where the pixels' code begins."""

    format: str           # PNG, JPEG, WebP, BMP, TIFF, JPEG 2000
    height: int
    width: int
    orientation: int = 1  # EXIF's, 1..8
    pixels_at: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as decoding gives it: turned as the orientation says."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def read_header(read: Read) -> Header:
    """The header of an image, whatever its name says.

    Raises `BrokenStreamError` where it is broken, of no format we train on, or of more than `MAX_PIXELS`.
    """
    head = read(0, 32)
    if not head:
        raise BrokenStreamError("empty file")
    try:
        header = _parser_of(head)(read)
    except struct.error:
        raise BrokenStreamError("truncated within the header") from None
    height, width = header.height, header.width
    if not (height > 0 and width > 0):
        raise BrokenStreamError(f"the {header.format} header says {height}x{width} pixels")
    if height * width > MAX_PIXELS:
        raise BrokenStreamError(f"the {header.format} header says {height}x{width} pixels, more than the "
                                f"{MAX_PIXELS >> 20} Mi that are decoded; cut it into crops")
    return header


def _parser_of(head: bytes) -> Callable[[Read], Header]:
    parsers = {b"\x89PNG\r\n\x1a\n": _png, b"\xff\xd8\xff": _jpeg, b"BM": _bmp, b"II*\0": _tiff, b"MM\0*": _tiff,
               b"II+\0": _tiff, b"MM\0+": _tiff, _JP2: _jp2, b"\xff\x4f\xff\x51": _jp2}
    for start, parser in parsers.items():
        if head.startswith(start):
            return parser
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _webp
    if head[4:8] == b"ftyp":
        raise BrokenStreamError(f"the content is HEIC, AVIF or video ({head[8:12]!r}), not a format we train on")
    name = next((name for start, name in _FOREIGN.items() if head.startswith(start)), None)
    if name:
        raise BrokenStreamError(f"the content is {name}, not an encoded image that we train on")
    what = f"its first bytes are {head[:8]!r}" if any(head) else "zero bytes where one should start"
    raise BrokenStreamError(f"not an image ({what})")


def _unpack(form: str, read: Read, at: int) -> tuple:
    return struct.unpack(form, read(at, struct.calcsize(form)))


def _exif_orientation(tiff: bytes) -> int:
    """As nvImageCodec reads it: the 16 bits where a SHORT stands, whatever type the tag claims."""
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
    except struct.error:  # broken metadata are no reason not to train on the pixels
        pass
    return 1


def _png(read: Read) -> Header:
    length, kind, width, height = _unpack(">I4sII", read, 8)
    if (length, kind) != (13, b"IHDR"):
        raise BrokenStreamError("broken PNG header")
    at, orientation, pixels_at = 33, 1, 0
    while kind != b"IEND":  # EXIF may follow the pixels
        length, kind = _png_chunk(read, at)
        if kind == b"IDAT" and not pixels_at:
            pixels_at = at
        if kind == b"eXIf":
            orientation = _exif_orientation(read(at + 8, min(length, _MAX_EXIF)))
        at += 12 + length
    if len(read(at - 4, 4)) < 4:
        raise BrokenStreamError("truncated: the PNG ends before its IEND chunk does")
    return Header("PNG", height, width, orientation, pixels_at)


def _png_chunk(read: Read, at: int) -> tuple[int, bytes]:
    head = read(at, 8)
    if len(head) < 8:
        raise BrokenStreamError("truncated: the PNG has no IEND chunk")
    if not head[4:].isalpha():
        raise BrokenStreamError(f"damaged: no PNG chunk at byte {at}")
    return int.from_bytes(head[:4], "big"), head[4:]


def _jpeg(read: Read) -> Header:
    at, height, width, orientation = 2, 0, 0, 1
    while True:
        fill, marker, length = _unpack(">BBH", read, at)
        if fill != 0xFF:
            raise BrokenStreamError(f"damaged: no JPEG marker at byte {at}")
        if marker == 0xFF or marker in _JPEG_BARE:  # any number of fill bytes may stand before a marker
            at += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9 or length < 2:
            raise BrokenStreamError("broken JPEG header")
        if marker == 0xDA:
            return Header("JPEG", height, width, orientation, at + 2 + length)
        if marker in _JPEG_FRAMES:
            height, width = _unpack(">HH", read, at + 5)
        elif marker == 0xE1 and read(at + 4, 6) == b"Exif\0\0":
            orientation = _exif_orientation(read(at + 10, length - 8))
        at += 2 + length


def _webp(read: Read) -> Header:
    size, kind = _unpack("<I4x4s", read, 4)
    if kind == b"VP8X":
        return _extended_webp(read, 8 + size)
    if kind == b"VP8 ":
        code, width, height = _unpack("<3sHH", read, 23)
        if code != b"\x9d\x01\x2a":
            raise BrokenStreamError("broken WebP frame header")
        return Header("WebP", height & 0x3FFF, width & 0x3FFF, pixels_at=12)
    if kind == b"VP8L":
        signature, bits = _unpack("<BI", read, 20)
        if signature != 0x2F:
            raise BrokenStreamError("broken WebP frame header")
        return Header("WebP", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, pixels_at=12)
    raise BrokenStreamError(f"unknown WebP chunk {kind!r}")


def _extended_webp(read: Read, end: int) -> Header:
    flags, width, height = _unpack("<B3x3s3s", read, 20)
    at, orientation, pixels_at = 12, 1, 0
    while at + 8 <= end and len(head := read(at, 8)) == 8:
        kind, length = struct.unpack("<4sI", head)
        if kind in (b"VP8 ", b"VP8L") and not pixels_at:
            pixels_at = at
        elif kind == b"EXIF" and flags & 8:
            orientation = _exif_orientation(read(at + 8, min(length, _MAX_EXIF)))
        at += 8 + length + length % 2
    sides = (int.from_bytes(side, "little") + 1 for side in (height, width))
    return Header("WebP", *sides, orientation, pixels_at)


def _bmp(read: Read) -> Header:
    start, head = _unpack("<II", read, 10)
    if head != 12 and head < 40:
        raise BrokenStreamError("broken BMP header")
    width, height = _unpack("<HH" if head == 12 else "<ii", read, 18)
    return Header("BMP", abs(height), width, pixels_at=start)


def _tiff(read: Read) -> Header:
    """The first image of a TIFF or BigTIFF file."""
    tags = tiff_tags(read)
    if not (tags.get(256) and tags.get(257)):
        raise BrokenStreamError("a TIFF without a size")
    compression, color = (tags.get(tag, (default,))[0] for tag, default in ((259, 1), (262, 1)))
    if compression not in _TIFF_COMPRESSIONS:
        raise BrokenStreamError(f"DALI does not decode TIFF's compression {compression}")
    if color not in _TIFF_COLORS:
        raise BrokenStreamError(f"DALI does not decode TIFF's colours of kind {color} (tag 262)")
    turned = tags.get(274, (1,))[0]
    return Header("TIFF", tags[257][0], tags[256][0], turned if 1 <= turned <= 8 else 1)


def tiff_tags(read: Read) -> dict[int, tuple[int, ...]]:
    """The tags of whole numbers of the first image: number -> values."""
    head = read(0, 4)
    order, is_big = "<" if head[:2] == b"II" else ">", b"+" in head
    slot, entry, start = ("Q", 20, 8) if is_big else ("I", 12, 4)
    (at,) = _unpack(order + slot, read, start)
    (count,) = _unpack(order + ("Q" if is_big else "H"), read, at)
    at += 8 if is_big else 2
    tags = {}
    for index in range(min(count, 4096)):
        place = at + index * entry
        tag, kind, length = _unpack(f"{order}HH{slot}", read, place)
        form = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        if not (form and length):
            continue
        size, value = struct.calcsize(form) * length, place + entry - struct.calcsize(slot)
        if size > struct.calcsize(slot):
            (value,) = _unpack(order + slot, read, value)
        raw = read(value, size)
        tags[tag] = struct.unpack(f"{order}{length}{form}", raw)
    return tags


def _jp2(read: Read) -> Header:
    """A JP2 file or a bare JPEG 2000 codestream."""
    at, kind = 0, b""
    if read(0, 2) != b"\xff\x4f":
        while kind != b"jp2c":
            length, kind = _unpack(">I4s", read, at)
            start = at + (16 if length == 1 else 8)
            if length == 1:
                (length,) = _unpack(">Q", read, at + 8)
            if length < 8 and kind != b"jp2c":
                raise BrokenStreamError("broken JPEG 2000 box")
            at = start if kind == b"jp2c" else at + length
    marker, right, bottom, left, top = _unpack(">I4xIIII", read, at)
    if marker != 0xFF4FFF51:
        raise BrokenStreamError("broken JPEG 2000 codestream")
    return Header("JPEG 2000", bottom - top, right - left, pixels_at=at)
