"""Size and kind of an image from its header, without decoding: PNG, JPEG, WebP, BMP, TIFF and JPEG 2000.

Sources: PNG (ISO 15948), JPEG (ITU-T T.81, table B.1), WebP (RFC 9649), TIFF 6.0, JPEG 2000 (ITU-T T.800,
annexes A and I).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

_PNG = b"\x89PNG\r\n\x1a\n"
_JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..15 without DHT, JPG and DAC
_JPEG_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}                # RST0..7 and TEM have no length
_FOREIGN = {b"GIF8": "GIF", b"%PDF": "PDF", b"\x1a\x45\xdf\xa3": "Matroska or WebM", b"\xff\x0a": "JPEG XL",
            b"8BPS": "Photoshop", b"\x93NUMPY"[:4]: "an .npy array"}


class BadImageError(ValueError):
    """An image that cannot be used; the message is the reason alone, without the path."""


@dataclass(frozen=True)
class ImageHeader:
    """What an image's header says. `height` and `width` are in pixels as stored, before any EXIF rotation."""

    format: str            # png, jpeg, webp, bmp, tiff, jp2
    height: int
    width: int
    depth: int = 8         # bits a sample; 0 where the components differ
    channels: int = 3      # as stored: a palette counts as 1
    is_lossy: bool = False # the pixels went through a lossy codec
    is_plain: bool = True  # gray or RGB without transparency, which every decoder reads alike


def read_header(file: BinaryIO) -> ImageHeader:
    """The header of the image in `file` (seekable, at its start), whatever its name says.

    Raises `BadImageError` where the header is broken or of no known format.
    """
    head = file.read(32)
    if not head:
        raise BadImageError("empty file")
    file.seek(0)
    try:
        header = _reader_of(head)(file)
    except struct.error:
        raise BadImageError("truncated within the header") from None
    if not (header.height > 0 and header.width > 0):
        raise BadImageError(f"the header says {header.height}x{header.width} pixels")
    return header


def _reader_of(head: bytes) -> Callable[[BinaryIO], ImageHeader]:
    """The function that reads a header which starts with the bytes `head`."""
    if head.startswith(_PNG):
        return _png
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _webp
    if head[:2] == b"BM":
        return _bmp
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff
    if head.startswith((_JP2, b"\xff\x4f\xff\x51")):
        return _jp2
    if head[4:8] == b"ftyp":
        raise BadImageError(f"the content is HEIC, AVIF or video ({head[8:12]!r}), not a format we read")
    name = next((name for start, name in _FOREIGN.items() if head.startswith(start)), None)
    if name:
        raise BadImageError(f"the content is {name}, not a format we read")
    if not any(head):
        raise BadImageError("zero bytes where an image should start")
    raise BadImageError(f"not an image (its first bytes are {head[:8]!r})")


def _unpack(form: str, file: BinaryIO) -> tuple:
    """`struct.unpack` of the next bytes of `file`."""
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _png(file: BinaryIO) -> ImageHeader:
    file.seek(8)
    length, kind, width, height, depth, color = _unpack(">I4sIIBB", file)
    if (length, kind) != (13, b"IHDR") or color not in (0, 2, 3, 4, 6):
        raise BadImageError("broken PNG header")
    file.seek(33)
    has_transparency = color in (4, 6)
    while True:
        length, kind = _unpack(">I4s", file)
        if kind in (b"IDAT", b"IEND"):
            break
        has_transparency |= kind == b"tRNS"
        file.seek(length + 4, 1)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    return ImageHeader("png", height, width, depth, channels, is_plain=depth == 8 and not has_transparency)


def _jpeg(file: BinaryIO) -> ImageHeader:
    file.seek(2)
    while True:
        fill, marker = _unpack(">BB", file)
        if fill != 0xFF:
            raise BadImageError("broken JPEG header")
        while marker == 0xFF:  # any number of fill bytes may stand before a marker
            (marker,) = _unpack(">B", file)
        if marker in _JPEG_BARE:
            continue
        if marker in (0xD9, 0xDA):
            raise BadImageError("a JPEG without a frame header")
        (length,) = _unpack(">H", file)
        if length < 2:
            raise BadImageError("broken JPEG header")
        if marker in _JPEG_FRAMES:
            depth, height, width, channels = _unpack(">BHHB", file)
            is_usual = channels == 1 or (channels == 3 and _is_usual_sampling(*_unpack(">xBxxBxxBx", file)))
            return ImageHeader("jpeg", height, width, depth, channels, is_lossy=marker not in (0xC3, 0xC7, 0xCB, 0xCF),
                               is_plain=depth == 8 and is_usual)
        file.seek(length - 2, 1)


def _is_usual_sampling(luma: int, blue: int, red: int) -> bool:
    """Whether the sampling factors (0xHV: horizontal, vertical) of Y, Cb and Cr are ones that simplejpeg knows.

    4:4:4, 4:2:2, 4:2:0, 4:4:0 or 4:1:1, the first, second and fourth of them in unusual spellings too.
    """
    if blue != red:
        return False
    if blue == luma:
        return (luma >> 4) * (luma & 15) in (1, 2, 3)
    return (luma, blue) in ((0x21, 0x11), (0x22, 0x11), (0x12, 0x11), (0x41, 0x11), (0x22, 0x12), (0x22, 0x21))


def _webp(file: BinaryIO) -> ImageHeader:
    file.seek(12)
    kind, length = _unpack("<4sI", file)
    start = file.tell()
    if kind == b"VP8 ":
        _, code, width, height = _unpack("<3s3sHH", file)
        if code != b"\x9d\x01\x2a":
            raise BadImageError("broken WebP frame header")
        return ImageHeader("webp", height & 0x3FFF, width & 0x3FFF, is_lossy=True)
    if kind == b"VP8L":
        signature, bits = _unpack("<BI", file)
        if signature != 0x2F:
            raise BadImageError("broken WebP frame header")
        has_alpha = bits >> 28 & 1
        return ImageHeader("webp", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, is_plain=not has_alpha,
                           channels=4 if has_alpha else 3)
    if kind != b"VP8X":
        raise BadImageError(f"unknown WebP chunk {kind!r}")
    flags, width, height = _unpack("<B3x3s3s", file)
    file.seek(start + length + length % 2)
    while kind not in (b"VP8 ", b"VP8L", b"ANMF"):
        kind, length = _unpack("<4sI", file)
        file.seek(length + length % 2, 1)
    is_simple = not flags & 0x12  # 0x10: alpha, 0x02: animation
    return ImageHeader("webp", int.from_bytes(height, "little") + 1, int.from_bytes(width, "little") + 1,
                       channels=3 if is_simple else 4, is_lossy=kind != b"VP8L", is_plain=is_simple)


def _bmp(file: BinaryIO) -> ImageHeader:
    file.seek(14)
    (length,) = _unpack("<I", file)
    if length == 12:
        width, height, _, bits = _unpack("<HHHH", file)
    elif length >= 40:
        width, height, _, bits = _unpack("<iiHH", file)
    else:
        raise BadImageError("broken BMP header")
    return ImageHeader("bmp", abs(height), width, channels=max(1, bits // 8), is_plain=False)


def _tiff(file: BinaryIO) -> ImageHeader:
    """The first image of a TIFF or BigTIFF file."""
    head = file.read(4)
    order, is_big = "<" if head[:2] == b"II" else ">", head[2:].strip(b"\0") == b"+"
    file.seek(8 if is_big else 4)
    (start,) = _unpack(order + ("Q" if is_big else "I"), file)
    file.seek(start)
    (count,) = _unpack(order + ("Q" if is_big else "H"), file)
    tags = {}
    for _ in range(min(count, 4096)):
        tag, kind, values = _unpack(order + ("HHQ" if is_big else "HHI"), file)
        raw = file.read(8 if is_big else 4)
        tags[tag] = _tiff_value(file, order, kind, values, raw)
    if not (tags.get(256) and tags.get(257)):
        raise BadImageError("a TIFF without a size")
    if tags.get(339, 1) != 1:
        raise BadImageError("TIFF samples must be unsigned whole numbers, not floats or signed")
    # 6, 7: JPEG; 33003, 33005, 34712: JPEG 2000; 50001: WebP
    return ImageHeader("tiff", tags[257], tags[256], tags.get(258, 1), tags.get(277, 1),
                       is_lossy=tags.get(259, 1) in (6, 7, 33003, 33005, 34712, 50001),
                       is_plain=tags.get(258) == 8 and tags.get(262) in (1, 2) and 338 not in tags)


def _tiff_value(file: BinaryIO, order: str, kind: int, count: int, raw: bytes) -> int:
    """The first value of a TIFF tag of a whole-number type, else 0."""
    form = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
    if form is None or count == 0:
        return 0
    if struct.calcsize(form) * count > len(raw):
        here = file.tell()
        file.seek(struct.unpack(order + ("Q" if len(raw) == 8 else "I"), raw)[0])
        raw = file.read(8)
        file.seek(here)
    return struct.unpack_from(order + form, raw)[0]


def _jp2(file: BinaryIO) -> ImageHeader:
    """A JP2 file or a bare JPEG 2000 codestream."""
    if file.read(4) == b"\xff\x4f\xff\x51":
        file.seek(0)
        return _codestream(file, is_plain=True)
    file.seek(12)
    is_plain = True
    while True:
        start = file.tell()
        length, kind = _unpack(">I4s", file)
        if length == 1:
            (length,) = _unpack(">Q", file)
        if kind == b"jp2c":
            return _codestream(file, is_plain)
        if kind in (b"pclr", b"cdef"):  # a palette; channel meanings, that is: alpha
            is_plain = False
        if kind == b"colr":
            method, _, _, color = _unpack(">BBBI", file)
            is_plain &= method != 1 or color in (16, 17)  # sRGB, gray
        if kind == b"jp2h":  # its boxes follow one by one
            continue
        if length < 8:
            raise BadImageError("broken JPEG 2000 box")
        file.seek(start + length)


def _codestream(file: BinaryIO, is_plain: bool) -> ImageHeader:
    """The SIZ and COD segments of the JPEG 2000 codestream that starts here."""
    marker, siz, size, _, right, bottom, left, top = _unpack(">HHHHIIII", file)
    if (marker, siz) != (0xFF4F, 0xFF51):
        raise BadImageError("broken JPEG 2000 codestream")
    file.seek(16, 1)  # the tile grid
    (channels,) = _unpack(">H", file)
    depths = {(_unpack(">BBB", file)[0] & 0x7F) + 1 for _ in range(min(channels, 16))}
    file.seek(size - 38 - 3 * min(channels, 16), 1)
    while True:
        marker, length = _unpack(">HH", file)
        if marker == 0xFF52:  # COD; its tenth byte is the wavelet: 0 is 9-7, irreversible
            wavelet = _unpack(">10B", file)[9]
            depth = depths.pop() if len(depths) == 1 else 0
            return ImageHeader("jp2", bottom - top, right - left, depth, channels, is_lossy=wavelet == 0,
                               is_plain=is_plain and depth == 8 and channels in (1, 3))
        if marker >> 8 != 0xFF or marker == 0xFF90 or length < 2:  # SOT: the tiles start, no COD was seen
            raise BadImageError("broken JPEG 2000 codestream")
        file.seek(length - 2, 1)
