"""Whether all of an encoded image is there, as far as its structure tells without decoding.

DALI fills in what is missing of some files, and says nothing. What can be told of that in microseconds is told here.
And one kind of good file that DALI refuses is made fit for it.
"""

from __future__ import annotations

import struct

from pipeline.data.image_headers import BrokenStreamError, Header, tiff_tags

# LZW, JPEG, deflate, Zstandard: their first code, and their end code, marker or checksum, are never all zeros.
_TIFF_CODED = frozenset((5, 7, 8, 32946, 50000))


def check_complete(data: memoryview, header: Header) -> None:
    """Raise `BrokenStreamError` where the image `data`, whose header was read, is cut short.

    PNG: up to its IEND chunk, when the header is read; DALI checks its checksums. JPEG and JPEG 2000: the marker at the
    end. WebP: the RIFF length. BMP: the length of its rows. TIFF: where the strips or tiles of its first image end, and
    that compressed ones do not start or end in zeros. Bytes after the end are fine. Any other damage of the pixels'
    code passes, DALI too: `check_training_data.py` tells most of it. Zeros tell nothing in WebP, whose lossless code
    of a black area is zeros, and of uncompressed pixels.
    """
    check = {"JPEG": _check_jpeg, "WebP": _check_webp, "BMP": _check_bmp, "TIFF": _check_tiff,
             "JPEG 2000": _check_jp2}.get(header.format)
    if check:
        try:
            check(data, header)
        except struct.error:
            raise BrokenStreamError("truncated within the header") from None


def make_readable(data: memoryview, header: Header) -> None:
    """Count the padding of a WebP's odd chunks to the chunks, in place, if EXIF is among them: so that DALI reads it.

    nvImageCodec 0.9 forgets the padding on its way to the EXIF, loses its way, and DALI raises. The pixels stay the
    same. `data` must have passed `check_complete`.
    """
    if header.format != "WebP" or data[12:16] != b"VP8X" or not data[20] & 8:
        return
    at, end = 12, struct.unpack_from("<I", data, 4)[0] + 8
    while at + 8 <= end:
        (length,) = struct.unpack_from("<I", data, at + 4)
        length += length % 2
        if at + 8 + length <= end:
            struct.pack_into("<I", data, at + 4, length)
        at += 8 + length


def _check_jpeg(data: memoryview, header: Header) -> None:
    if not _holds(data[header.pixels_at :], b"\xff\xd9"):
        raise BrokenStreamError("truncated: the JPEG has no end-of-image marker")


def _holds(code: memoryview, marker: bytes) -> bool:
    """Whether the pixels' code, in which the marker cannot occur, is followed by it; mostly the file ends with it."""
    return marker in bytes(code[-64:]) or marker in bytes(code)


def _check_webp(data: memoryview, header: Header) -> None:
    promised = struct.unpack_from("<I", data, 4)[0] + 8
    if len(data) < promised:
        raise BrokenStreamError(f"truncated: {len(data)} of {promised} bytes")
    if header.pixels_at:
        end = header.pixels_at + 8 + struct.unpack_from("<I", data, header.pixels_at + 4)[0]
        if end > promised:
            raise BrokenStreamError("damaged: a WebP chunk is longer than the file")


def _check_bmp(data: memoryview, header: Header) -> None:
    (head,) = struct.unpack_from("<I", data, 14)
    bits, compression, size = (*struct.unpack_from("<H", data, 24), 0, 0) if head == 12 else \
        struct.unpack_from("<HII", data, 28)
    if compression in (0, 3, 6):  # otherwise run lengths, and `size` says how many bytes
        size = (header.width * bits + 31) // 32 * 4 * header.height  # of one byte less, DALI makes garbage
    if len(data) < header.pixels_at + size:
        raise BrokenStreamError(f"truncated: {len(data)} of {header.pixels_at + size} bytes")


def _check_tiff(data: memoryview, header: Header) -> None:
    tags = tiff_tags(lambda at, count: bytes(data[at : at + count]))
    compression = tags.get(259, (1,))[0]
    for starts, sizes in ((273, 279), (324, 325)):
        for start, size in zip(tags.get(starts, ()), tags.get(sizes, ()), strict=False):
            if start + size > len(data):
                raise BrokenStreamError(f"truncated: {len(data)} of at least {start + size} bytes")
            if compression in _TIFF_CODED and size and not (
                    any(data[start : start + min(size, 4)]) and any(data[start + max(0, size - 16) : start + size])):
                raise BrokenStreamError(f"damaged: zeros instead of the TIFF's pixels, about byte {start}")


def _check_jp2(data: memoryview, header: Header) -> None:
    if not _holds(data[header.pixels_at :], b"\xff\xd9"):
        raise BrokenStreamError("truncated: the JPEG 2000 codestream does not reach its end")
