"""Whether the bytes of an encoded image are all there, checked without decoding.

Decoders forgive too much: they fill the missing half of a JPEG with gray and say nothing, or only print a line.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

from tools.common.image_headers import BadImageError, ImageHeader

# Markers within and after entropy-coded data: 0xFF followed by anything but a stuffed zero or a fill byte.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff]")
# What may follow entropy-coded data: DHT, DAC, EOI, SOS, DQT, DNL, DRI, application data, comments.
_AFTER_SCAN = frozenset((0xC4, 0xCC, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE))
_EXTRANEOUS = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
# How a harmless warning of libjpeg begins -> (segment, what its content starts with, where to put what instead).
_PATCHES = {
    "Warning: unknown JFIF revision": (0xE0, b"JFIF\0", 5, b"\1\2"),
    "Unknown Adobe color transform": (0xEE, b"Adobe", 11, b"\1"),  # YCbCr, which libjpeg takes it for
    "Invalid SOS parameters for sequential": (0xDA, b"", -3, b"\0\x3f\0"),
}


def check_file_size(header: ImageHeader, num_bytes: int) -> None:
    """Refuse, before a byte of it is read, a file of far more bytes than its pixels could need (a sparse one, say).

    Sixteen bytes a pixel are RGBA of 32 bits uncompressed; 64 MiB are left for metadata. Raises `BadImageError`.
    """
    if num_bytes > 16 * header.height * header.width + (64 << 20):
        raise BadImageError(f"{num_bytes} bytes for {header.height}x{header.width} pixels: the file is not what its "
                            "header says")


def check_complete(data: bytes | memoryview, header: ImageHeader) -> None:
    """Raise `BadImageError` where the encoded image `data` (its header read already) is cut short or damaged.

    PNG: every chunk's CRC, up to IEND. JPEG: every segment, up to the end-of-image marker of this image (not of a
    thumbnail), and that its restart markers count on; what lies between them shows damage only when decoded. WebP:
    the RIFF length and its chunks. JPEG 2000: the end of the codestream. BMP: the length of its rows, unless they are
    compressed. TIFF: the strips or tiles of its first image. A memoryview is enough for PNG, JPEG and WebP.
    """
    check = {"png": _check_png, "jpeg": _check_jpeg, "webp": _check_webp, "jp2": _check_jp2, "bmp": _check_bmp,
             "tiff": _check_tiff}[header.format]
    try:
        check(data)
    except (struct.error, IndexError):
        raise BadImageError("truncated") from None


def check_riff_length(data: bytes, file_size: int) -> None:
    """Raise `BadImageError` where a WebP file of `file_size` bytes is shorter than its first bytes `data` promise."""
    promised = struct.unpack_from("<I", data, 4)[0] + 8
    if promised > file_size:
        raise BadImageError(f"truncated: {file_size} of {promised} bytes")


def _check_png(data: bytes) -> None:
    view, at = memoryview(data), 8
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        (crc,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(view[at + 4 : end]) != crc:
            raise BadImageError(f"damaged: the CRC of the PNG chunk {kind.decode('latin1')!r} at byte {at} is wrong")
        if kind == b"IEND":
            return
        at = end + 4


def _check_jpeg(data: bytes | memoryview) -> None:
    for _ in _jpeg_segments(data):
        pass


def _jpeg_segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """(Marker, where it stands, where its segment ends) of the segments of a JPEG, the last being end-of-image (0xD9).

    Markers without content are left out. Raises `BadImageError` where the JPEG is cut short or damaged.
    """
    at, has_restarts = 2, False
    while True:
        if data[at] != 0xFF:
            raise BadImageError(f"damaged: no JPEG marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker == 0xD9:
            yield marker, at, at + 2
            return
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:
            at += 2
        else:
            end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
            yield marker, at, end
            if marker == 0xDD:
                has_restarts = data[at + 4 : at + 6] != b"\0\0"
            at = _end_of_scan(data, end, has_restarts) if marker == 0xDA else end


def _end_of_scan(data: bytes | memoryview, at: int, has_restarts: bool) -> int:
    """Where the entropy-coded data of a JPEG that starts at byte `at` ends: at a marker that may stand there."""
    for restarts, match in enumerate(_JPEG_MARKER.finditer(data, at)):
        at, marker = match.start(), data[match.start() + 1]
        if marker in _AFTER_SCAN:
            return at
        if not has_restarts or marker != 0xD0 + restarts % 8:
            raise BadImageError(f"damaged: the marker 0x{marker:02x} within the JPEG's pixels, at byte {at}")
    raise BadImageError("truncated: the JPEG has no end-of-image marker")


def without_sloppiness(data: bytes, warning: str) -> bytes | None:
    """The complete JPEG `data` without that of which libjpeg gives the `warning`, where it does no harm; else `None`.

    Cameras and old software write such files, and their pixels are whole: zeros between the last pixel and the
    end-of-image marker, a JFIF version or an Adobe colour transform that does not exist, and, in sequential JPEGs,
    spectral limits that mean nothing. What comes back decodes to the same pixels, without that warning.
    """
    if match := _EXTRANEOUS.fullmatch(warning):  # only zeros: after damage, pixels that came too late stand there
        (*_, (_, end, _)), length = _jpeg_segments(data), int(match[1])
        return data[: end - length] + data[end:] if data[end - length : end] == bytes(length) else None
    for start, patch in _PATCHES.items():
        if warning.startswith(start):
            return _patched(data, *patch)
    return None


def _patched(data: bytes, marker: int, start: bytes, offset: int, value: bytes) -> bytes | None:
    """`data` with `value` at byte `offset` of the content of every JPEG segment `marker` that starts with `start`.

    An offset below 0 counts from the segment's end. `None` where that changes nothing.
    """
    patched = bytearray(data)
    for kind, at, end in _jpeg_segments(data):
        where = end + offset if offset < 0 else at + 4 + offset
        if kind == marker and data[at + 4 : end].startswith(start) and where + len(value) <= end:
            patched[where : where + len(value)] = value
    return bytes(patched) if patched != data else None


def _check_webp(data: bytes) -> None:
    check_riff_length(data, len(data))
    at, end = 12, struct.unpack_from("<I", data, 4)[0] + 8
    while at < end:
        at += 8 + struct.unpack_from("<I", data, at + 4)[0]
        if at > end:
            raise BadImageError("damaged: a WebP chunk is longer than the file")
        at += at % 2


def _check_jp2(data: bytes) -> None:
    at, end = 0, len(data)
    if not data.startswith(b"\xff\x4f"):
        while True:
            length, kind = struct.unpack_from(">I4s", data, at)
            if length == 1:
                length = struct.unpack_from(">Q", data, at + 8)[0]
            if kind == b"jp2c":
                end = at + length if length else len(data)
                break
            if length < 8:
                raise BadImageError("broken JPEG 2000 box")
            at += length
    if end > len(data) or data[:end].rstrip(b"\0")[-2:] != b"\xff\xd9":
        raise BadImageError("truncated: the JPEG 2000 codestream does not reach its end")


def _check_bmp(data: bytes) -> None:
    start, head = struct.unpack_from("<II", data, 10)
    width, height, _, bits, compression = (*struct.unpack_from("<HHHH", data, 18), 0) if head == 12 else \
        struct.unpack_from("<iiHHI", data, 18)
    if compression not in (0, 3, 6):  # run lengths: their decoder notices
        return
    promised = start + (width * bits + 31) // 32 * 4 * abs(height)
    if len(data) < promised:
        raise BadImageError(f"truncated: {len(data)} of {promised} bytes")


def _check_tiff(data: bytes) -> None:
    order, is_big = "<" if data[:2] == b"II" else ">", data[2:4].strip(b"\0") == b"+"
    offset, entry, slot = ("Q", "HHQ8s", 8) if is_big else ("I", "HHI4s", 4)
    (at,) = struct.unpack_from(order + offset, data, 8 if is_big else 4)
    (count,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, at)
    at += 8 if is_big else 2
    arrays = {}
    for index in range(min(count, 4096)):
        tag, kind, length, raw = struct.unpack_from(order + entry, data, at + index * struct.calcsize("=" + entry))
        form = {3: "H", 4: "I", 16: "Q"}.get(kind)
        if tag in (273, 279, 324, 325) and form:  # strips and tiles: where they start, how long they are
            size = length * struct.calcsize("=" + form)
            where = struct.unpack(order + offset, raw)[0] if size > slot else -1
            source = data[where : where + size] if size > slot else raw[:size]
            arrays[tag] = struct.unpack(f"{order}{length}{form}", source)
    for starts, sizes in ((273, 279), (324, 325)):
        ends = [start + size for start, size in zip(arrays.get(starts, ()), arrays.get(sizes, ()), strict=False)]
        if max(ends, default=0) > len(data):
            raise BadImageError(f"truncated: {len(data)} of at least {max(ends)} bytes")
