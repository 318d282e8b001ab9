"""PNG (ISO 15948), including EXIF and XMP in its text chunks."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from pipeline.data.image_headers.base import (
    MAX_METADATA,
    BadImageError,
    Format,
    ImageHeader,
    Metadata,
    Read,
    exif_orientation,
    unpack,
    xmp_orientation,
)


def _parse(read: Read) -> ImageHeader:
    length, kind, width, height, depth, color = unpack(">I4sIIBB", read, 8)
    if (length, kind) != (13, b"IHDR") or color not in (0, 2, 3, 4, 6):
        raise BadImageError("broken PNG header")
    if depth not in (1, 2, 4, 8, 16):
        raise BadImageError(f"broken PNG header: {depth} bits per sample")
    at, pixels_at, found, has_transparency = 33, 0, Metadata(), color in (4, 6)
    while kind != b"IEND":  # EXIF may follow the pixels
        length, kind = _chunk_at(read, at)
        if kind == b"IDAT":
            pixels_at = pixels_at or at
        elif kind == b"tRNS":
            has_transparency = True
        elif kind in (b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt") and length <= MAX_METADATA:
            _take_metadata(found, kind, read(at + 8, length))
        at += 12 + length
    if len(read(at - 4, 4)) < 4:
        raise BadImageError("truncated: the PNG ends before its IEND chunk does")
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    return found.into(
        ImageHeader(
            "png",
            height,
            width,
            depth,
            channels,
            pixels_at=pixels_at,
            is_palette=color == 3,
            is_plain=depth == 8 and not has_transparency,
            is_for_dali=depth <= 8 and not has_transparency,
        )
    )


def _chunk_at(read: Read, at: int) -> tuple[int, bytes]:
    head = read(at, 8)
    if len(head) < 8:
        raise BadImageError("truncated: the PNG has no IEND chunk")
    if not head[4:].isalpha():
        raise BadImageError(f"damaged: no PNG chunk at byte {at}")
    return int.from_bytes(head[:4], "big"), head[4:]


def _take_metadata(found: Metadata, kind: bytes, content: bytes) -> None:
    if kind == b"eXIf":
        found.exif = exif_orientation(content)
        return
    keyword, _, rest = content.partition(b"\0")
    if kind == b"iCCP":
        found.profile = _inflated(rest[1:]) or None
    elif keyword == b"XML:com.adobe.xmp":
        found.other = xmp_orientation(rest if kind != b"zTXt" else _inflated(rest[1:]))
    elif keyword in (b"Raw profile type exif", b"Raw profile type APP1"):  # written by ImageMagick
        text = _inflated(rest[1:]) if kind == b"zTXt" else rest
        try:
            exif = bytes.fromhex("".join(text.decode("latin1").split("\n")[3:]))
        except ValueError:
            return
        found.other = exif_orientation(exif.removeprefix(b"Exif\0\0"))


def _inflated(data: bytes) -> bytes:
    """Decompress up to `MAX_METADATA` bytes; return b"" if the data is broken."""
    try:
        return zlib.decompressobj().decompress(data, MAX_METADATA)
    except zlib.error:
        return b""


def _check(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    if not thorough:  # reading the header has already walked all chunks
        return
    at = 8
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        (crc,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(data[at + 4 : end]) != crc:
            raise BadImageError(
                f"damaged: the CRC of the PNG chunk {kind.decode('latin1')!r} at byte {at} is wrong"
            )
        if kind == b"IEND":
            return
        at = end + 4


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, content) of every chunk of a complete PNG except the pixel chunks."""
    at = 8
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] != b"IDAT":
            yield data[at + 4 : at + 8], data[at + 8 : end]
        at = end + 4


PNG = Format("png", "PNG", (".png",), (b"\x89PNG\r\n\x1a\n",), _parse, _check)
