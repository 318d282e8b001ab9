"""JPEG (ITU-T T.81, table B.1), and repairs of intact JPEGs that a strict decoder rejects."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import replace

from pipeline.data.image_headers.base import (
    BadImageError,
    Format,
    ImageHeader,
    Metadata,
    NoEndError,
    Read,
    exif_orientation,
    is_followed_by,
    unpack,
    xmp_orientation,
)

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..15 without DHT, JPG and DAC
_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}  # RST0..7 and TEM have no length
_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)
# Markers within and after entropy-coded data: 0xFF followed by neither a stuffed zero nor a fill
# byte.
_MARKER = re.compile(rb"\xff[^\x00\xff]")
# Markers that may end entropy-coded data: DHT, DAC, EOI, SOS, DQT, DNL, DRI, APPn and COM.
_AFTER_SCAN = frozenset((0xC4, 0xCC, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE))
END_OF_JPEG = b"\xff\xd9"


def _parse(read: Read) -> ImageHeader:
    at, frame, found, profile = 2, None, Metadata(), {}
    while True:
        fill, marker = unpack(">BB", read, at)
        if fill != 0xFF:
            raise BadImageError(f"damaged: no JPEG marker at byte {at}")
        if marker == 0xFF or marker in _BARE:  # fill bytes may precede a marker
            at += 1 if marker == 0xFF else 2
            continue
        if marker in (0xD9, 0xDA):
            break
        (length,) = unpack(">H", read, at + 2)
        if length < 2:
            raise BadImageError("broken JPEG header")
        if marker in _FRAMES:
            frame = _frame(read, at + 4, marker)
        elif marker in (0xE1, 0xE2):
            content = read(at + 4, length - 2)
            if content.startswith(b"Exif\0\0"):
                found.exif = exif_orientation(content[6:])
            elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                found.other = xmp_orientation(content)
            elif content.startswith(b"ICC_PROFILE\0") and len(content) > 14:
                profile[content[12]] = content[14:]
        at += 2 + length
    if frame is None:
        raise BadImageError("a JPEG without a frame header")
    if marker == 0xDA:
        at += 2 + unpack(">H", read, at + 2)[0]
    found.profile = b"".join(profile[part] for part in sorted(profile)) or None
    return found.into(replace(frame, pixels_at=at))


def _frame(read: Read, at: int, marker: int) -> ImageHeader:
    depth, height, width, channels = unpack(">BHHB", read, at)
    if depth != 8:
        raise BadImageError(
            f"a JPEG with {depth} bits per sample; only 8 bits are supported: "
            "save it as a 16-bit PNG"
        )
    is_usual = channels == 1 or (
        channels == 3 and _is_usual_sampling(*unpack(">xBxxBxxBx", read, at + 6))
    )
    return ImageHeader(
        "jpeg",
        height,
        width,
        depth,
        channels,
        is_lossy=marker not in _LOSSLESS,
        is_plain=is_usual,
        is_for_dali=channels in (1, 3) and marker in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA),
        tags={0: (marker,)},
    )


def _is_usual_sampling(luma: int, blue: int, red: int) -> bool:
    """Return whether simplejpeg supports these sampling factors (0xHV) of Y, Cb and Cr.

    These are 4:4:4, 4:2:2, 4:2:0, 4:4:0 and 4:1:1, the first, second and fourth of them also in
    unusual notations. H is the horizontal and V the vertical factor.
    """
    if blue != red:
        return False
    if blue == luma:
        return (luma >> 4) * (luma & 15) in (1, 2, 3)
    return (luma, blue) in (
        (0x21, 0x11),
        (0x22, 0x11),
        (0x12, 0x11),
        (0x41, 0x11),
        (0x22, 0x12),
        (0x22, 0x21),
    )


_NO_END = "truncated: the JPEG has no end-of-image marker"


def _check(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    if thorough:
        for _ in _segments(data):
            pass
    elif not is_followed_by(data[header.pixels_at :], END_OF_JPEG):
        raise NoEndError(_NO_END)


def _segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of the segments of a JPEG, up to end-of-image (0xD9).

    Markers without content are left out. Raises `BadImageError` if the JPEG is truncated or
    damaged.
    """
    at, has_restarts, has_scan = 2, False, False
    while True:
        if has_scan and at + 1 >= len(data):
            raise NoEndError(_NO_END)
        if data[at] != 0xFF:
            raise BadImageError(f"damaged: no JPEG marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker == 0xD9:
            yield marker, at, at + 2
            return
        elif marker in _BARE:
            at += 2
        else:
            end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
            yield marker, at, end
            if marker == 0xDD:
                has_restarts = data[at + 4 : at + 6] != b"\0\0"
            has_scan |= marker == 0xDA
            at = _end_of_scan(data, end, has_restarts) if marker == 0xDA else end


def _end_of_scan(data: bytes | memoryview, at: int, has_restarts: bool) -> int:
    """Return where the entropy-coded data from byte `at` on ends: at a marker allowed there."""
    for restarts, match in enumerate(_MARKER.finditer(data, at)):
        at, marker = match.start(), data[match.start() + 1]
        if marker in _AFTER_SCAN:
            return at
        if not has_restarts or marker != 0xD0 + restarts % 8:
            raise BadImageError(
                f"damaged: the marker 0x{marker:02x} within the JPEG's pixels, at byte {at}"
            )
    raise NoEndError(_NO_END)


def with_end(data: bytes, header: ImageHeader) -> bytes | None:
    """Append the missing end-of-image marker to a JPEG; None if that could hide missing pixels.

    A strict decoder can then tell whether all pixels are there. This requires that one scan holds
    all of them: a progressive JPEG could miss whole scans.
    """
    start = header.pixels_at
    scan = data[:start].rfind(b"\xff\xda")
    if header.tags[0][0] not in (0xC0, 0xC1) or scan < 0 or data[scan + 4] != header.channels:
        return None
    code = data[start:]
    return data[:start] + (code[:-1] if code.endswith(b"\xff") else code) + END_OF_JPEG


# Start of a harmless libjpeg warning -> (segment, start of its content, offset, replacement bytes).
# 1 is YCbCr, which libjpeg assumes anyway.
_PATCHES = {
    "Warning: unknown JFIF revision": (0xE0, b"JFIF\0", 5, b"\1\2"),
    "Unknown Adobe color transform": (
        0xEE,
        b"Adobe",
        11,
        b"\1",
    ),
    "Invalid SOS parameters for sequential": (0xDA, b"", -3, b"\0\x3f\0"),
}
_EXTRANEOUS = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")


def without_harmless_defect(data: bytes, warning: str) -> bytes | None:
    """Return the complete JPEG `data` without the harmless defect behind a libjpeg `warning`.

    Cameras and old software write such files, whose pixels are intact: zeros between the last pixel
    and the end-of-image marker, an unknown JFIF version or Adobe colour transform, and meaningless
    spectral limits in sequential JPEGs. The result decodes to the same pixels without that warning.
    Returns None if the defect is not harmless.
    """
    # Only zeros are harmless: after damage, leftover pixel data ends up here.
    if match := _EXTRANEOUS.fullmatch(warning):
        (*_, (_, end, _)), length = _segments(data), int(match[1])
        return (
            data[: end - length] + data[end:] if data[end - length : end] == bytes(length) else None
        )
    for start, patch in _PATCHES.items():
        if warning.startswith(start):
            return _patched(data, *patch)
    return None


def _patched(data: bytes, marker: int, start: bytes, offset: int, value: bytes) -> bytes | None:
    """Write `value` at `offset` into every segment `marker` whose content starts with `start`.

    `offset` counts from the start of the content or, if negative, from the segment's end. Returns
    None if nothing changes.
    """
    patched = bytearray(data)
    for kind, at, end in _segments(data):
        where = end + offset if offset < 0 else at + 4 + offset
        if kind == marker and data[at + 4 : end].startswith(start) and where + len(value) <= end:
            patched[where : where + len(value)] = value
    return bytes(patched) if patched != data else None


JPEG = Format(
    "jpeg", "JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), (b"\xff\xd8\xff",), _parse, _check
)
