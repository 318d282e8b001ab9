"""JPEG XL (ISO 18181-1 and -2): the start of its codestream and the boxes before it."""

from __future__ import annotations

import struct
from dataclasses import replace

from pipeline.data.image_headers.base import (
    MAX_PARTS,
    BadImageError,
    Format,
    ImageHeader,
    Read,
    unpack,
)

# `tags` of a JPEG XL: premultiplied alpha; linear light.
JXL_PREMULTIPLIED, JXL_LINEAR = (
    1,
    2,
)
_SRGB, _LINEAR = 13, 8  # codes of transfer functions
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


class _Bits:
    """Reader of the bits of a JPEG XL header, least significant bit of each byte first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._length, self._at = int.from_bytes(data, "little"), 8 * len(data), 0

    def __call__(self, count: int) -> int:
        self._at += count
        if self._at > self._length:
            raise struct.error
        return self._value >> (self._at - count) & ((1 << count) - 1)

    def choice(self, *ways: tuple[int, int]) -> int:
        """Read a number in one of four encodings, each given as (bits, offset)."""
        bits, offset = ways[self(2)]
        return offset + self(bits)


def _size(bits: _Bits) -> tuple[int, int]:
    is_small = bits(1)

    def side() -> int:
        return 8 * (bits(5) + 1) if is_small else bits.choice((9, 1), (13, 1), (18, 1), (30, 1))

    height, ratio = side(), bits(3)
    if ratio == 0:
        return height, side()
    across, down = _RATIOS[ratio]
    return height, height * across // down


def _depth(bits: _Bits) -> int:
    if bits(1):
        raise BadImageError(
            "a JPEG XL with floating-point samples, whose white level is unknown; save it with 8 "
            "or 16 bits"
        )
    depth = bits.choice((0, 8), (0, 10), (0, 12), (6, 1))
    if depth > 16:
        raise BadImageError(
            f"a JPEG XL with {depth} bits per sample; at most 16 bits are supported"
        )
    return depth


def _parse(read: Read) -> ImageHeader:
    """Parse the start of a JPEG XL codestream, bare or in a container.

    The orientation is in the codestream; libjxl applies it when decoding.
    """
    at, has_jpeg, num_boxes = 0, False, 0
    while read(at, 2) != b"\xff\x0a":
        length, kind = unpack(">I4s", read, at)
        start = at + (16 if length == 1 else 8)
        if kind in (b"jxlc", b"jxlp"):
            at = start + 4 * (kind == b"jxlp")
            if read(at, 2) != b"\xff\x0a":
                raise BadImageError("broken JPEG XL codestream")
            break
        has_jpeg |= kind == b"jbrd"  # data for reconstructing the original JPEG
        if length == 1:
            (length,) = unpack(">Q", read, at + 8)
        num_boxes += 1
        if length < start - at or num_boxes > MAX_PARTS:
            raise BadImageError("broken JPEG XL box")
        at += length
    bits = _Bits(read(at + 2, 256))
    height, width = _size(bits)
    header = ImageHeader("jxl", height, width, is_lossy=True, is_plain=False, pixels_at=at)
    if bits(1):  # all defaults: 8 bits, sRGB, lossy
        return header
    orientation = 1
    if bits(1):
        orientation = 1 + bits(3)
        if bits(1):  # the intrinsic display size
            _size(bits)
        if bits(1):
            raise BadImageError("a JPEG XL with a preview is not supported; save it as PNG")
        if bits(1):  # an animation's rate and loop count
            bits.choice((0, 100), (0, 1000), (10, 1), (30, 1))
            bits.choice((0, 1), (0, 1001), (8, 1), (10, 1))
            bits.choice((0, 0), (3, 0), (16, 0), (32, 0))
            bits(1)
    depth = _depth(bits)
    bits(1)
    is_associated = _alpha(bits)
    is_xyb = bits(1)
    is_gray, is_linear = _colors(bits)
    channels = (1 if is_gray else 3) + (is_associated is not None)
    return replace(
        header,
        depth=depth,
        channels=channels,
        is_lossy=bool(is_xyb) or has_jpeg,
        orientation=orientation,
        tags={JXL_PREMULTIPLIED: (is_associated or 0,), JXL_LINEAR: (is_linear,)},
    )


def _alpha(bits: _Bits) -> bool | None:
    """Return whether alpha is premultiplied; None if there is no alpha channel."""
    found = None
    for _ in range(bits.choice((0, 0), (0, 1), (4, 2), (12, 1))):
        if bits(1):  # all defaults: 8-bit alpha
            found = False
            continue
        kind = bits.choice((0, 0), (0, 1), (4, 2), (6, 18))
        _depth(bits)
        bits.choice((0, 0), (0, 3), (0, 4), (3, 1))
        bits(8 * bits.choice((0, 0), (4, 0), (5, 16), (10, 48)))  # its name
        if kind != 0:
            raise BadImageError(
                "a JPEG XL with channels other than colour and alpha is not supported; save it as "
                "PNG"
            )
        found = bool(bits(1))
    return found


def _colors(bits: _Bits) -> tuple[bool, bool]:
    """Return (is gray, is linear light).

    Raises `BadImageError` for colour spaces other than sRGB.
    """
    if bits(1):
        return False, False
    has_profile = bits(1)
    space = bits.choice((0, 0), (0, 1), (4, 2), (6, 18))
    if not has_profile and space in (0, 1):
        white = bits.choice((0, 0), (0, 1), (4, 2), (6, 18))
        primaries = bits.choice((0, 0), (0, 1), (4, 2), (6, 18)) if space == 0 and white != 2 else 1
        transfer = 0 if bits(1) else bits.choice((0, 0), (0, 1), (4, 2), (6, 18))
        if white == 1 and primaries == 1 and transfer in (_SRGB, _LINEAR):
            return space == 1, transfer == _LINEAR
    raise BadImageError(
        "a JPEG XL in a colour space other than sRGB is not supported; convert it to sRGB"
    )


JPEG_XL = Format("jxl", "JPEG XL", (".jxl",), (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"), _parse)
