"""Formats with short headers: WebP (RFC 9649), BMP, JPEG 2000 (ITU-T T.800), Netpbm and others.

JPEG 2000 follows annexes A and I. Pillow reads the headers of AVIF, GIF and TGA. The row of each
format follows its parser.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from dataclasses import replace

from pipeline.data.image_headers.base import (
    MAX_METADATA,
    MAX_PARTS,
    BadImageError,
    Format,
    ImageHeader,
    Metadata,
    Read,
    exif_orientation,
    is_followed_by,
    no_image,
    unpack,
    xmp_orientation,
)

# WebP


def _webp(read: Read) -> ImageHeader:
    size, kind = unpack("<I4x4s", read, 4)
    if kind == b"VP8X":
        return _extended_webp(read, 8 + size)
    if kind == b"VP8 ":
        code, width, height = unpack("<3sHH", read, 23)
        if code != b"\x9d\x01\x2a":
            raise BadImageError("broken WebP frame header")
        return ImageHeader(
            "webp", height & 0x3FFF, width & 0x3FFF, is_lossy=True, is_for_dali=True, pixels_at=12
        )
    if kind == b"VP8L":
        signature, bits = unpack("<BI", read, 20)
        if signature != 0x2F:
            raise BadImageError("broken WebP frame header")
        has_alpha = bool(bits >> 28 & 1)
        return ImageHeader(
            "webp",
            (bits >> 14 & 0x3FFF) + 1,
            (bits & 0x3FFF) + 1,
            channels=4 if has_alpha else 3,
            is_plain=not has_alpha,
            is_for_dali=not has_alpha,
            pixels_at=12,
        )
    raise BadImageError(f"unknown WebP chunk {kind!r}")


def _extended_webp(read: Read, end: int) -> ImageHeader:
    flags, width, height = unpack("<B3x3s3s", read, 20)
    at, pixels_at, found, is_lossy = 12, 0, Metadata(), False
    for _ in range(MAX_PARTS):
        if at + 8 > end or len(head := read(at, 8)) < 8:
            break
        kind, length = struct.unpack("<4sI", head)
        if kind in (b"VP8 ", b"VP8L", b"ANMF") and not pixels_at:
            pixels_at, is_lossy = at, kind != b"VP8L"
        elif kind == b"EXIF" and flags & 8:
            content = read(at + 8, min(length, MAX_METADATA))
            found.exif = exif_orientation(content)
            # DALI does not find EXIF data after this prefix.
            found.other = exif_orientation(content.removeprefix(b"Exif\0\0"))
        elif kind == b"XMP " and length <= MAX_METADATA:
            found.other = max(found.other, xmp_orientation(read(at + 8, length)))
        elif kind == b"ICCP" and length <= MAX_METADATA:
            found.profile = read(at + 8, length)
        at += 8 + length + length % 2
    if not pixels_at:
        raise struct.error
    is_simple = not flags & 0x12  # 0x10: alpha, 0x02: animation
    header = ImageHeader(
        "webp",
        int.from_bytes(height, "little") + 1,
        int.from_bytes(width, "little") + 1,
        channels=3 if is_simple else 4,
        is_lossy=is_lossy,
        is_plain=is_simple,
        is_for_dali=is_simple,
        pixels_at=pixels_at,
    )
    return found.into(header)


def _check_webp(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    check_riff_length(data, len(data))
    at, end = 12, struct.unpack_from("<I", data, 4)[0] + 8
    while at < end:
        at += 8 + struct.unpack_from("<I", data, at + 4)[0]
        if at > end:
            raise BadImageError("damaged: a WebP chunk is longer than the file")
        at += at % 2


def check_riff_length(data: bytes | memoryview, file_size: int) -> None:
    """Raise `BadImageError` if a WebP file of `file_size` bytes is shorter than it should be.

    `data` holds at least the first 8 bytes of the file, which give its length.
    """
    promised = struct.unpack_from("<I", data, 4)[0] + 8
    if promised > file_size:
        raise BadImageError(f"truncated: {file_size} of {promised} bytes")


def make_readable(data: memoryview, header: ImageHeader) -> None:
    """Change the chunk lengths of a WebP with EXIF in place, so that DALI can read it.

    Padding bytes are counted into chunks of odd length. nvImageCodec 0.9 skips the wrong number of
    bytes after such chunks while searching for EXIF, and DALI raises. The pixels stay the same.
    `data` must have passed `check_complete`.
    """
    if header.format != "webp" or data[12:16] != b"VP8X" or not data[20] & 8:
        return
    at, end = 12, struct.unpack_from("<I", data, 4)[0] + 8
    while at + 12 <= end:
        (length,) = struct.unpack_from("<I", data, at + 4)
        length += length % 2
        if at + 8 + length <= end:
            struct.pack_into("<I", data, at + 4, length)
        at += 8 + length


WEBP = Format(
    "webp",
    "WebP",
    (".webp",),
    (),
    _webp,
    _check_webp,
    is_start=lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP",
)


# BMP


def _bmp(read: Read) -> ImageHeader:
    start, length = unpack("<II", read, 10)
    if length == 12:
        width, height, _, bits = unpack("<HHHH", read, 18)
        compression = 0
    elif length >= 40:
        width, height, _, bits, compression = unpack("<iiHHI", read, 18)
    else:
        raise BadImageError("broken BMP header")
    # DALI's pixels differ for 16 bits and for alpha.
    is_for_dali = bits in (1, 4, 8, 24) or (bits == 32 and compression == 0)
    return ImageHeader(
        "bmp",
        abs(height),
        width,
        channels=max(1, bits // 8),
        is_plain=False,
        is_for_dali=is_for_dali,
        pixels_at=start,
    )


def _check_bmp(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    (head,) = struct.unpack_from("<I", data, 14)
    bits, compression, size = (
        (*struct.unpack_from("<H", data, 24), 0, 0)
        if head == 12
        else struct.unpack_from("<HII", data, 28)
    )
    if compression in (0, 3, 6):  # otherwise run-length coded, and `size` is given
        # If even one byte is missing, DALI returns garbage.
        size = (header.width * bits + 31) // 32 * 4 * header.height
    if len(data) < header.pixels_at + size:
        raise BadImageError(f"truncated: {len(data)} of {header.pixels_at + size} bytes")


BMP = Format("bmp", "BMP", (".bmp",), (b"BM",), _bmp, _check_bmp)


# JPEG 2000

_JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_J2K = b"\xff\x4f\xff\x51"
SYCC = 18  # enumerated colour spaces: 16 is sRGB, 17 gray, 18 sYCC


def _jp2(read: Read) -> ImageHeader:
    """Parse a JP2 file or a bare JPEG 2000 codestream."""
    if read(0, 4) == _J2K:
        return _codestream(read, 0, is_plain=True, color=0, profile=None)
    at, is_plain, is_palette, color, profile, num_boxes = 12, True, False, 0, None, 0
    while True:
        length, kind = unpack(">I4s", read, at)
        start = at + (16 if length == 1 else 8)
        if length == 1:
            (length,) = unpack(">Q", read, at + 8)
        if kind == b"jp2c":
            return replace(
                _codestream(read, start, is_plain, color, profile), is_palette=is_palette
            )
        if kind in (b"pclr", b"cdef"):  # a palette; channel definitions, i.e. alpha
            is_plain, is_palette = False, is_palette or kind == b"pclr"
        if kind == b"colr":
            method, _, _, value = unpack(">BBBI", read, start)
            if method == 1:
                color = value
                is_plain &= color in (16, 17)
            elif method in (2, 3):
                profile = read(start + 3, min(max(length - 11, 0), MAX_METADATA))
        if kind == b"jp2h":  # a superbox: continue with the boxes in it
            length = start - at
        num_boxes += 1
        if length < start - at or num_boxes > MAX_PARTS:
            raise BadImageError("broken JPEG 2000 box")
        at += length


def _codestream(
    read: Read, at: int, is_plain: bool, color: int, profile: bytes | None
) -> ImageHeader:
    """Parse the SIZ and COD segments of the JPEG 2000 codestream at byte `at`."""
    pixels_at = at
    marker, siz, size, _, right, bottom, left, top = unpack(">HHHHIIII", read, at)
    tile_width, tile_height, tile_left, tile_top, channels = unpack(">IIIIH", read, at + 24)
    # Decoders divide by the sizes of tiles and samples, and some of them do not check these.
    is_tiled = (
        tile_left <= left < tile_left + tile_width and tile_top <= top < tile_top + tile_height
    )
    if (marker, siz) != (0xFF4F, 0xFF51) or not is_tiled or size != 38 + 3 * channels:
        raise BadImageError("broken JPEG 2000 codestream")
    components = [unpack(">BBB", read, at + 42 + 3 * number) for number in range(min(channels, 16))]
    if any(not (across and down) for _, across, down in components):
        raise BadImageError("broken JPEG 2000 codestream")
    depths = {depth for depth, _, _ in components}
    depth = (depths.pop() if len(depths) == 1 else 0xFF) + 1
    if depth > 16:
        raise BadImageError(
            "a JPEG 2000 image with signed samples, mixed depths or more than 16 bits per sample "
            "is not supported; save it with 8 or 16 bits"
        )
    at += 4 + size
    for _ in range(MAX_PARTS):
        marker, length = unpack(">HH", read, at)
        if marker == 0xFF52:  # COD; its tenth byte is the wavelet: 0 is 9-7, irreversible
            wavelet = unpack(">10B", read, at + 4)[9]
            is_plain &= depth == 8 and channels in (1, 3)
            # Not for DALI: it accepts damaged files, and dies of some.
            return ImageHeader(
                "jp2",
                bottom - top,
                right - left,
                depth,
                channels,
                is_lossy=wavelet == 0,
                is_plain=is_plain,
                pixels_at=pixels_at,
                profile=profile,
                tags={0: (color,)},
            )
        # 0xFF90 is SOT: the tiles start without a COD segment before them.
        if marker >> 8 != 0xFF or marker == 0xFF90 or length < 2:
            break
        at += 2 + length
    raise BadImageError("broken JPEG 2000 codestream")


def _check_jp2(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    if not is_followed_by(data[header.pixels_at :], b"\xff\xd9"):
        raise BadImageError("truncated: the JPEG 2000 codestream is incomplete")


JPEG_2000 = Format("jp2", "JPEG 2000", (".jp2",), (_JP2, _J2K), _jp2, _check_jp2)


# Netpbm

_PNM = re.compile(
    rb"P([1-6])" + 2 * rb"(?:\s|#[^\n]*\n)+(\d+)" + rb"(?:(?:\s|#[^\n]*\n)+(\d+))?(?:#[^\n]*\n)*\s"
)


_BITMAP = re.compile(rb"P[14]" + 2 * rb"(?:\s|#[^\n]*\n)+\d+" + rb"(?:#[^\n]*\n)*\s")


def _pnm(read: Read) -> ImageHeader:
    """Parse a bitmap, graymap or pixmap; `tags[0]` is (kind, maximum value).

    The maximum value determines the depth.
    """
    head = read(0, 4096)
    match = _PNM.match(head)
    if match is None:
        raise BadImageError("broken PNM header")
    kind, width, height = (int(match[number][:9]) for number in (1, 2, 3))
    end, most = match.end(), int((match[4] or b"1")[:9])
    if kind in (1, 4):  # bitmaps have no maximum value; the match took pixels for it
        match = _BITMAP.match(head)
        if match is None:
            raise BadImageError("broken PNM header")
        end, most = match.end(), 1
    elif match[4] is None:
        raise BadImageError("broken PNM header")
    if not 0 < most < 65536:
        raise BadImageError(f"a PNM file with the maximum value {most}; it must be 1 to 65535")
    channels = 3 if kind in (3, 6) else 1
    return ImageHeader(
        "pnm",
        height,
        width,
        8 if most < 256 else 16,
        channels,
        is_plain=False,
        pixels_at=end,
        tags={0: (kind, most)},
    )


def _check_pnm(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    kind, most = header.tags[0]
    if kind < 4:  # plain text, which its decoder checks
        return
    row = (
        (header.width + 7) // 8
        if kind == 4
        else header.width * header.channels * (2 if most > 255 else 1)
    )
    if len(data) < header.pixels_at + row * header.height:
        raise BadImageError(
            f"truncated: {len(data)} of {header.pixels_at + row * header.height} bytes"
        )


PNM = Format(
    "pnm",
    "PNM",
    (".ppm", ".pgm", ".pbm", ".pnm"),
    tuple(
        b"P%d%b" % (kind, space) for kind in range(1, 7) for space in (b" ", b"\n", b"\r", b"\t")
    ),
    _pnm,
    _check_pnm,
)


# AVIF, GIF and TGA


def _by_pillow(name: str) -> Callable[[Read], ImageHeader]:
    def parse(read: Read) -> ImageHeader:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(read(0, 1 << 31)), formats=[name]) as image:
                orientation = image.getexif().get(0x0112, 1)
                return ImageHeader(
                    name,
                    image.height,
                    image.width,
                    channels=len(image.getbands()),
                    is_lossy=name == "avif",
                    is_plain=False,
                    orientation=orientation if 1 <= orientation <= 8 else 1,
                    profile=image.info.get("icc_profile"),
                )
        except Exception as error:  # decoders raise all kinds of errors for hostile bytes
            if name == "tga":
                raise no_image(read(0, 32)) from error
            raise BadImageError(f"broken {name.upper()} header, or truncated") from error

    return parse


def _is_avif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and (head[8:12] in (b"avif", b"avis") or b"avif" in head[16:])


AVIF = Format("avif", "AVIF", (".avif",), (), _by_pillow("avif"), is_start=_is_avif)
GIF = Format(
    "gif", "GIF", (".gif",), (b"GIF87a", b"GIF89a"), _by_pillow("gif"), is_for_datasets=False
)
# TGA has no magic bytes.
TGA = Format("tga", "TGA", (".tga",), (), _by_pillow("tga"), is_for_datasets=False)
