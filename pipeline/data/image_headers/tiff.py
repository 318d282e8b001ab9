"""TIFF 6.0 and BigTIFF."""

from __future__ import annotations

import struct

from pipeline.data.image_headers.base import (
    MAX_METADATA,
    MAX_PARTS,
    BadImageError,
    Format,
    ImageHeader,
    Read,
    reader_of,
    unpack,
)

_COMPRESSIONS = frozenset((1, 2, 3, 4, 5, 7, 8, 32773, 32946, 34925, 50000, 50001))
# Codes of libtiff: none, fax (2, 3, 4), LZW, JPEG, deflate (8, 32946), PackBits, LZMA, Zstandard,
# WebP.
# LZW, JPEG, deflate, Zstandard: their data never starts with four zero bytes or ends in 16.
_CODED = frozenset((5, 7, 8, 32946, 50000))
# Size, bits, compression, colours, positions of strips and tiles, orientation, channels, planes,
# meanings of extra channels and of the numbers, profile.
_TAGS = frozenset(
    (256, 257, 258, 259, 262, 273, 274, 277, 279, 284, 322, 324, 325, 338, 339, 34675)
)
_DEPTHS = {
    0: (1, 2, 4, 8, 16),
    1: (1, 2, 4, 8, 16),
    2: (8, 16),
    3: (1, 2, 4, 8),
    5: (8,),
    6: (8,),
    8: (8,),
}
"""Photometric interpretation -> bits per sample that are read.

0 and 1: gray; 2: RGB; 3: palette; 5: CMYK; 6: YCbCr; 8: CIELab.
"""


def _parse(read: Read) -> ImageHeader:
    """Parse the first image of a TIFF or BigTIFF file."""
    tags = tiff_tags(read)
    if not (tags.get(256) and tags.get(257)):
        raise BadImageError("a TIFF without width and height")
    compression, kind, channels, planes = (
        tags.get(tag, (default,))[0] for tag, default in ((259, 1), (262, 1), (277, 1), (284, 1))
    )
    depths = {*tags.get(258, (1,))}
    depth = depths.pop() if len(depths) == 1 else 0
    if {*tags.get(339, (1,))} - {1, 4}:
        raise BadImageError(
            "TIFF samples must be unsigned integers; the white level of floats and signed "
            "numbers is unknown: save it with 8 or 16 bits"
        )
    if compression not in _COMPRESSIONS and compression != 6:
        raise BadImageError(
            f"TIFF compression {compression} is not supported; save it with LZW or deflate"
        )
    if kind not in _DEPTHS:
        raise BadImageError(
            f"TIFF colours of kind {kind} (tag 262) are not supported; save it as RGB"
        )
    if depth not in _DEPTHS[kind]:
        what = {0: "gray", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELab"}[
            kind
        ]
        raise BadImageError(
            f"a {what} TIFF with {depth or 'mixed'} bits per sample; only "
            f"{', '.join(map(str, _DEPTHS[kind]))} bits are supported: save it with 8 or 16"
        )
    turned = tags.get(274, (1,))[0]
    is_common = depth == 8 and (kind, channels) in ((1, 1), (2, 3)) and 338 not in tags
    # Not for DALI, which fails for some sizes of tiles and dies of some damaged files.
    return ImageHeader(
        "tiff",
        tags[257][0],
        tags[256][0],
        depth,
        channels,
        is_lossy=compression in (6, 7, 50001),
        is_plain=is_common and planes == 1,
        orientation=turned if 1 <= turned <= 8 else 1,
        profile=bytes(tags[34675]) if 34675 in tags else None,
        is_palette=kind == 3,
        tags=tags,
    )


def tiff_tags(read: Read) -> dict[int, tuple[int, ...]]:
    """Return the tags of the first image that are needed to read it: number -> values."""
    head = read(0, 4)
    order, is_big = "<" if head[:2] == b"II" else ">", b"+" in head
    slot, entry, start = ("Q", 20, 8) if is_big else ("I", 12, 4)
    (at,) = unpack(order + slot, read, start)
    (count,) = unpack(order + ("Q" if is_big else "H"), read, at)
    at += 8 if is_big else 2
    tags = {}
    for index in range(min(count, 4096)):
        place = at + index * entry
        tag, kind, length = unpack(f"{order}HH{slot}", read, place)
        form = {1: "B", 3: "H", 4: "I", 7: "B", 16: "Q"}.get(kind)
        # Of several equal tags, libtiff takes the first as well.
        if not (form and length and tag in _TAGS) or tag in tags:
            continue
        size, value = struct.calcsize(form) * length, place + entry - struct.calcsize(slot)
        if size > MAX_METADATA:
            raise BadImageError("broken TIFF header")
        if size > struct.calcsize(slot):
            (value,) = unpack(order + slot, read, value)
        tags[tag] = struct.unpack(f"{order}{length}{form}", read(value, size))
    return tags


def tiff_page_count(data: bytes) -> int:
    """Return the number of images (directories) in a TIFF file."""
    read = reader_of(data)
    order, is_big = "<" if data[:2] == b"II" else ">", data[2:4].strip(b"\0") == b"+"
    slot, entry, start = ("Q", 20, 8) if is_big else ("I", 12, 4)
    seen, at = set(), unpack(order + slot, read, start)[0]
    while at and at not in seen and len(seen) < MAX_PARTS:
        seen.add(at)
        count, size = unpack(order + ("Q" if is_big else "H"), read, at)[0], 8 if is_big else 2
        (at,) = unpack(order + slot, read, at + size + count * entry)
    return len(seen)


def _check(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    tags = header.tags or tiff_tags(reader_of(data))
    compression = tags.get(259, (1,))[0]
    for starts, sizes in ((273, 279), (324, 325)):
        for start, size in zip(tags.get(starts, ()), tags.get(sizes, ()), strict=False):
            if start + size > len(data):
                raise BadImageError(f"truncated: {len(data)} of at least {start + size} bytes")
            if (
                compression in _CODED
                and size
                and not (
                    any(data[start : start + min(size, 4)])
                    and any(data[start + max(0, size - 16) : start + size])
                )
            ):
                raise BadImageError(
                    f"damaged: zeros instead of the TIFF's pixels near byte {start}"
                )


TIFF = Format(
    "tiff", "TIFF", (".tif", ".tiff"), (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _parse, _check
)
