"""What an image file says of itself, read without decoding: its format, its size, its kind, and whether it is whole.

`FORMATS` is the one table of formats, and of the suffixes that folders are searched for; what a file is, is decided by
its content. `read_header` refuses what no command reads, so that all of them refuse it with the same words.

Sources: PNG (ISO 15948), JPEG (ITU-T T.81, table B.1), WebP (RFC 9649), TIFF 6.0, JPEG 2000 (ITU-T T.800, annexes A
and I), JPEG XL (ISO 18181-1 and -2), Netpbm, EXIF 2.3, ICC.1. AVIF's header is Pillow's business.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import BinaryIO

MAX_PIXELS = 1 << 28  # that training decodes
_MAX_METADATA = 1 << 24

Read = Callable[[int, int], bytes]
"""(offset, count) -> that many bytes from there, or as many as there are."""


class BadImageError(ValueError):
    """An image that cannot be used; the message is the reason alone, without the path."""


class NoEndError(BadImageError):
    """A JPEG without its end-of-image marker. All its pixels may be there: only decoding shows."""


@dataclass(frozen=True)
class ImageHeader:
    """What an image's header says. `height` and `width` are in pixels as stored, before any rotation."""

    format: str              # the name of a row of `FORMATS`: png, jpeg, webp, bmp, tiff, jp2, avif, jxl, pnm
    height: int
    width: int
    depth: int = 8           # bits a sample
    channels: int = 3        # as stored: a palette counts as 1
    is_lossy: bool = False   # the pixels went through a lossy codec
    is_plain: bool = True    # gray or RGB of 8 bits without transparency, which the fast decoders read
    orientation: int = 1     # EXIF's, 1..8, of the last EXIF; where there is none XMP's
    is_for_dali: bool = False  # DALI decodes it to the right pixels, turned as EXIF says
    pixels_at: int = 0       # byte where the pixels' code begins
    profile: bytes | None = field(default=None, repr=False)  # ICC's, of the colours
    is_palette: bool = False  # the one channel holds numbers of colours
    tags: Mapping[int, tuple[int, ...]] = field(default_factory=dict, repr=False)  # of a TIFF; of others under 0

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as decoding gives it: turned as the orientation says."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    @property
    def colors(self) -> str:
        """What the samples are: gray, RGB (a palette's too), CMYK, YCbCr or LAB; JPEG's and the like count as RGB."""
        if self.format == "tiff":
            return {0: "gray", 1: "gray", 5: "CMYK", 6: "YCbCr", 8: "LAB"}.get(self.tags.get(262, (1,))[0], "RGB")
        if self.format == "jpeg" and self.channels == 4:
            return "CMYK"
        return "gray" if self.channels <= 2 and not self.is_palette else "RGB"

    @property
    def title(self) -> str:
        """The format's name for people."""
        return _BY_NAME[self.format].title if self.format in _BY_NAME else self.format


@dataclass(frozen=True)
class Format:
    """A kind of image file."""

    name: str
    title: str
    suffixes: tuple[str, ...]
    starts: tuple[bytes, ...]                    # its content begins with one of them
    parse: Callable[[Read], ImageHeader]
    check: Callable[[memoryview, ImageHeader, bool], None] | None = None  # see `check_complete`
    is_for_datasets: bool = True                 # False: only upscale.py reads it


def read_header(source: Read | BinaryIO | bytes | memoryview, *, any_format: bool = False) -> ImageHeader:
    """The header of an image, whatever its name says. `source`: its content, a file open for reading, or a `Read`.

    Raises `BadImageError` where the header is broken, or the image is of a format or a kind that is not read; formats
    that only upscale.py reads are taken with `any_format`.
    """
    read = _reader(source)
    head = read(0, 32)
    if not head:
        raise BadImageError("empty file")
    form = _format_of(head, any_format)
    if not (form.is_for_datasets or any_format):
        raise BadImageError(f"the content is {form.title}, which is not read; save it as PNG")
    try:
        header = form.parse(read)
    except struct.error:
        raise BadImageError("truncated within the header") from None
    if not (header.height > 0 and header.width > 0):
        raise BadImageError(f"the {form.title} header says {header.height}x{header.width} pixels")
    return header


def check_max_pixels(header: ImageHeader) -> None:
    """Raise `BadImageError` where an image has more pixels than training decodes."""
    if header.height * header.width > MAX_PIXELS:
        raise BadImageError(f"the {header.title} header says {header.height}x{header.width} pixels, more than the "
                            f"{MAX_PIXELS >> 20} Mi that are decoded; cut it into crops")


def check_file_size(header: ImageHeader, num_bytes: int) -> None:
    """Refuse, before a byte of it is read, a file of far more bytes than its pixels could need (a sparse one, say).

    Sixteen bytes a pixel are RGBA of 32 bits uncompressed; 64 MiB are left for metadata. Raises `BadImageError`.
    """
    if num_bytes > 16 * header.height * header.width + (64 << 20):
        raise BadImageError(f"{num_bytes} bytes for {header.height}x{header.width} pixels: the file is not what its "
                            "header says")


def check_complete(data: bytes | memoryview, header: ImageHeader, *, thorough: bool = True) -> None:
    """Raise `BadImageError` where the encoded image `data`, whose header was read, is cut short or damaged.

    PNG: the chunks up to IEND, and where `thorough` their CRCs. JPEG: the end-of-image marker (`NoEndError`); where
    `thorough` every segment up to this image's own (not a thumbnail's), and that its restart markers count on. WebP:
    the RIFF length and its chunks. JPEG 2000: the end of the codestream. BMP: the length of its rows. TIFF: where the
    strips or tiles of its first image end, and that compressed ones do not start or end in zeros. Bytes after the end
    are fine. Any other damage shows when the pixels are decoded, or (lossy WebP, JPEG 2000, uncompressed pixels) never.
    """
    check = _BY_NAME[header.format].check
    if check is None:
        return
    try:
        check(memoryview(data), header, thorough)
    except (struct.error, IndexError):
        raise BadImageError("truncated") from None


def starts_as_image(head: bytes) -> bool:
    """Whether a file that starts so is an image; Netpbm's, which begin with one letter and one digit, go by name."""
    try:
        form = _format_of(head, any_format=False)
    except BadImageError:
        return False
    return form.is_for_datasets and form.name not in ("pnm",)


def can_check(header: ImageHeader) -> bool:
    """Whether `check_complete` tells anything of such an image."""
    return _BY_NAME[header.format].check is not None


def _reader(source: Read | BinaryIO | bytes | memoryview) -> Read:
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


_FAR = 1 << 62  # beyond which no file can be positioned


# What is none of `FORMATS`, by its content and by its name: so that a message can say what it is.
_FOREIGN = {b"%PDF": "PDF", b"\x1a\x45\xdf\xa3": "Matroska or WebM", b"8BPS": "Photoshop", b"DDS ": "DDS",
            b"\x93NUMPY": "an .npy array", b"v/1\1": "OpenEXR", b"II\xbc\1": "JPEG XR"}
UNREAD_SUFFIXES = {
    ".heic": "HEIC", ".heif": "HEIC", ".hif": "HEIC", ".gif": "GIF", ".tga": "TGA", ".psd": "Photoshop",
    ".exr": "OpenEXR", ".hdr": "Radiance HDR", ".jxr": "JPEG XR", ".dds": "DDS", ".j2k": "JPEG 2000 (as .j2k)",
    ".svg": "SVG", **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"), "raw")}
"""Suffixes of images that the datasets' tools do not read -> what they are called; those files are counted and named.
"""


def unread_note(names: Iterable[str], *, but: Collection[str] = ()) -> str:
    """A line on those of `names` that are images of other formats (with no suffix of `but`), `""` if there are none."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        is_hidden = os.path.basename(name).startswith(".")
        if suffix_of(name) in UNREAD_SUFFIXES and suffix_of(name) not in but and not is_hidden:
            kinds.setdefault(UNREAD_SUFFIXES[suffix_of(name)], []).append(name if name.isprintable() else ascii(name))
    found = [f"{len(of_kind)} {kind} ({', '.join(of_kind[:3])}{', …' if len(of_kind) > 3 else ''})"
             for kind, of_kind in sorted(kinds.items())]
    return f"not read: {', '.join(found)}; save them as PNG to use them" if found else ""


def _format_of(head: bytes, any_format: bool) -> Format:
    for form in FORMATS:
        if form.starts and head.startswith(form.starts):
            return form
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _BY_NAME["webp"]
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"avif", b"avis") or b"avif" in head[16:]:
            return _BY_NAME["avif"]
        raise BadImageError(f"the content is HEIC or video ({head[8:12]!r}), which is not read; save it as PNG")
    if name := next((name for start, name in _FOREIGN.items() if head.startswith(start)), ""):
        raise BadImageError(f"the content is {name}, not an image format that is read; save it as PNG")
    if any_format and any(head):
        return _BY_NAME["tga"]  # which begins with nothing of its own
    raise _no_image(head)


def _no_image(head: bytes) -> BadImageError:
    what = f"its first bytes are {head[:8]!r}" if any(head) else "zero bytes where one should start"
    return BadImageError(f"not an image ({what})")


def _unpack(form: str, read: Read, at: int) -> tuple:
    return struct.unpack(form, read(at, struct.calcsize(form)))


# Metadata that several formats carry.


def _exif_orientation(tiff: bytes) -> int:
    """As DALI reads it: the 16 bits where a SHORT stands, whatever type the tag claims; 1 where there is none."""
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


def _xmp_orientation(xmp: bytes) -> int:
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else 1


@dataclass
class _Metadata:
    """What is gathered on the way to the pixels."""

    exif: int = 1        # orientation by EXIF
    other: int = 1       # by XMP or a text chunk, which DALI does not look at
    profile: bytes | None = None

    @property
    def orientation(self) -> int:
        return self.exif if self.exif > 1 else self.other

    def into(self, header: ImageHeader) -> ImageHeader:
        return replace(header, orientation=self.orientation, profile=self.profile,
                       is_for_dali=header.is_for_dali and self.orientation == self.exif)


# PNG


def _png(read: Read) -> ImageHeader:
    length, kind, width, height, depth, color = _unpack(">I4sIIBB", read, 8)
    if (length, kind) != (13, b"IHDR") or color not in (0, 2, 3, 4, 6):
        raise BadImageError("broken PNG header")
    if depth not in (1, 2, 4, 8, 16):
        raise BadImageError(f"broken PNG header: {depth} bits a sample")
    at, pixels_at, found, has_transparency = 33, 0, _Metadata(), color in (4, 6)
    while kind != b"IEND":  # EXIF may follow the pixels
        length, kind = _png_chunk(read, at)
        if kind == b"IDAT":
            pixels_at = pixels_at or at
        elif kind == b"tRNS":
            has_transparency = True
        elif kind in (b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt") and length <= _MAX_METADATA:
            _take_png_metadata(found, kind, read(at + 8, length))
        at += 12 + length
    if len(read(at - 4, 4)) < 4:
        raise BadImageError("truncated: the PNG ends before its IEND chunk does")
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    return found.into(ImageHeader("png", height, width, depth, channels, pixels_at=pixels_at, is_palette=color == 3,
                                  is_plain=depth == 8 and not has_transparency,
                                  is_for_dali=depth <= 8 and not has_transparency))


def _png_chunk(read: Read, at: int) -> tuple[int, bytes]:
    head = read(at, 8)
    if len(head) < 8:
        raise BadImageError("truncated: the PNG has no IEND chunk")
    if not head[4:].isalpha():
        raise BadImageError(f"damaged: no PNG chunk at byte {at}")
    return int.from_bytes(head[:4], "big"), head[4:]


def _take_png_metadata(found: _Metadata, kind: bytes, content: bytes) -> None:
    if kind == b"eXIf":
        found.exif = _exif_orientation(content)
        return
    keyword, _, rest = content.partition(b"\0")
    if kind == b"iCCP":
        found.profile = _inflated(rest[1:]) or None
    elif keyword == b"XML:com.adobe.xmp":
        found.other = _xmp_orientation(rest if kind != b"zTXt" else _inflated(rest[1:]))
    elif keyword in (b"Raw profile type exif", b"Raw profile type APP1"):  # ImageMagick's way
        text = _inflated(rest[1:]) if kind == b"zTXt" else rest
        try:
            exif = bytes.fromhex("".join(text.decode("latin1").split("\n")[3:]))
        except ValueError:
            return
        found.other = _exif_orientation(exif.removeprefix(b"Exif\0\0"))


def _inflated(data: bytes) -> bytes:
    """Decompressed, up to a limit; empty where it is broken."""
    try:
        return zlib.decompressobj().decompress(data, _MAX_METADATA)
    except zlib.error:
        return b""


def _check_png(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    if not thorough:  # all chunks were seen when the header was read
        return
    at = 8
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        (crc,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(data[at + 4 : end]) != crc:
            raise BadImageError(f"damaged: the CRC of the PNG chunk {kind.decode('latin1')!r} at byte {at} is wrong")
        if kind == b"IEND":
            return
        at = end + 4


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(Name, content) of every chunk of a complete PNG but those that hold pixels."""
    at = 8
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] != b"IDAT":
            yield data[at + 4 : at + 8], data[at + 8 : end]
        at = end + 4


# JPEG


_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..15 without DHT, JPG and DAC
_JPEG_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}                # RST0..7 and TEM have no length
_JPEG_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)
# Markers within and after entropy-coded data: 0xFF followed by anything but a stuffed zero or a fill byte.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff]")
# What may follow entropy-coded data: DHT, DAC, EOI, SOS, DQT, DNL, DRI, application data, comments.
_AFTER_SCAN = frozenset((0xC4, 0xCC, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE))
END_OF_JPEG = b"\xff\xd9"


def _jpeg(read: Read) -> ImageHeader:
    at, frame, found, profile = 2, None, _Metadata(), {}
    while True:
        fill, marker = _unpack(">BB", read, at)
        if fill != 0xFF:
            raise BadImageError(f"damaged: no JPEG marker at byte {at}")
        if marker == 0xFF or marker in _JPEG_BARE:  # any number of fill bytes may stand before a marker
            at += 1 if marker == 0xFF else 2
            continue
        if marker in (0xD9, 0xDA):
            break
        (length,) = _unpack(">H", read, at + 2)
        if length < 2:
            raise BadImageError("broken JPEG header")
        if marker in _JPEG_FRAMES:
            frame = _jpeg_frame(read, at + 4, marker)
        elif marker in (0xE1, 0xE2):
            content = read(at + 4, length - 2)
            if content.startswith(b"Exif\0\0"):
                found.exif = _exif_orientation(content[6:])
            elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                found.other = _xmp_orientation(content)
            elif content.startswith(b"ICC_PROFILE\0") and len(content) > 14:
                profile[content[12]] = content[14:]
        at += 2 + length
    if frame is None:
        raise BadImageError("a JPEG without a frame header")
    if marker == 0xDA:
        at += 2 + _unpack(">H", read, at + 2)[0]
    found.profile = b"".join(profile[part] for part in sorted(profile)) or None
    return found.into(replace(frame, pixels_at=at))


def _jpeg_frame(read: Read, at: int, marker: int) -> ImageHeader:
    depth, height, width, channels = _unpack(">BHHB", read, at)
    if depth != 8:
        raise BadImageError(f"a JPEG of {depth} bits a sample; JPEGs of 8 bits are read: save it as PNG of 16 bits")
    is_usual = channels == 1 or (channels == 3 and _is_usual_sampling(*_unpack(">xBxxBxxBx", read, at + 6)))
    return ImageHeader("jpeg", height, width, depth, channels, is_lossy=marker not in _JPEG_LOSSLESS,
                       is_plain=is_usual, is_for_dali=channels in (1, 3) and marker in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA),
                       tags={0: (marker,)})


def _is_usual_sampling(luma: int, blue: int, red: int) -> bool:
    """Whether the sampling factors (0xHV: horizontal, vertical) of Y, Cb and Cr are ones that simplejpeg knows.

    4:4:4, 4:2:2, 4:2:0, 4:4:0 or 4:1:1, the first, second and fourth of them in unusual spellings too.
    """
    if blue != red:
        return False
    if blue == luma:
        return (luma >> 4) * (luma & 15) in (1, 2, 3)
    return (luma, blue) in ((0x21, 0x11), (0x22, 0x11), (0x12, 0x11), (0x41, 0x11), (0x22, 0x12), (0x22, 0x21))


_NO_END = "truncated: the JPEG has no end-of-image marker"


def _check_jpeg(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    if thorough:
        for _ in _jpeg_segments(data):
            pass
    elif not _holds(data[header.pixels_at :], END_OF_JPEG):
        raise NoEndError(_NO_END)


def _holds(code: memoryview, marker: bytes) -> bool:
    """Whether the pixels' code, in which the marker cannot occur, is followed by it; mostly the file ends with it."""
    return marker in bytes(code[-64:]) or marker in bytes(code)


def _jpeg_segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """(Marker, where it stands, where its segment ends) of the segments of a JPEG, the last being end-of-image (0xD9).

    Markers without content are left out. Raises `BadImageError` where the JPEG is cut short or damaged.
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
        elif marker in _JPEG_BARE:
            at += 2
        else:
            end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
            yield marker, at, end
            if marker == 0xDD:
                has_restarts = data[at + 4 : at + 6] != b"\0\0"
            has_scan |= marker == 0xDA
            at = _end_of_scan(data, end, has_restarts) if marker == 0xDA else end


def _end_of_scan(data: bytes | memoryview, at: int, has_restarts: bool) -> int:
    """Where the entropy-coded data of a JPEG that starts at byte `at` ends: at a marker that may stand there."""
    for restarts, match in enumerate(_JPEG_MARKER.finditer(data, at)):
        at, marker = match.start(), data[match.start() + 1]
        if marker in _AFTER_SCAN:
            return at
        if not has_restarts or marker != 0xD0 + restarts % 8:
            raise BadImageError(f"damaged: the marker 0x{marker:02x} within the JPEG's pixels, at byte {at}")
    raise NoEndError(_NO_END)


def with_end(data: bytes, header: ImageHeader) -> bytes | None:
    """A JPEG without an end-of-image marker with one, where a strict decoder then tells whether all pixels are there.

    That is, where one scan holds all of the pixels: of a progressive JPEG, scans may be missing. `None` where not.
    """
    start = header.pixels_at
    scan = data[: start].rfind(b"\xff\xda")
    if header.tags[0][0] not in (0xC0, 0xC1) or scan < 0 or data[scan + 4] != header.channels:
        return None
    code = data[start:]
    return data[:start] + (code[:-1] if code.endswith(b"\xff") else code) + END_OF_JPEG


# How a harmless warning of libjpeg begins -> (segment, what its content starts with, where to put what instead).
_PATCHES = {
    "Warning: unknown JFIF revision": (0xE0, b"JFIF\0", 5, b"\1\2"),
    "Unknown Adobe color transform": (0xEE, b"Adobe", 11, b"\1"),  # YCbCr, which libjpeg takes it for
    "Invalid SOS parameters for sequential": (0xDA, b"", -3, b"\0\x3f\0"),
}
_EXTRANEOUS = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")


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


# WebP


def _webp(read: Read) -> ImageHeader:
    size, kind = _unpack("<I4x4s", read, 4)
    if kind == b"VP8X":
        return _extended_webp(read, 8 + size)
    if kind == b"VP8 ":
        code, width, height = _unpack("<3sHH", read, 23)
        if code != b"\x9d\x01\x2a":
            raise BadImageError("broken WebP frame header")
        return ImageHeader("webp", height & 0x3FFF, width & 0x3FFF, is_lossy=True, is_for_dali=True, pixels_at=12)
    if kind == b"VP8L":
        signature, bits = _unpack("<BI", read, 20)
        if signature != 0x2F:
            raise BadImageError("broken WebP frame header")
        has_alpha = bool(bits >> 28 & 1)
        return ImageHeader("webp", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, channels=4 if has_alpha else 3,
                           is_plain=not has_alpha, is_for_dali=not has_alpha, pixels_at=12)
    raise BadImageError(f"unknown WebP chunk {kind!r}")


def _extended_webp(read: Read, end: int) -> ImageHeader:
    flags, width, height = _unpack("<B3x3s3s", read, 20)
    at, pixels_at, found, is_lossy = 12, 0, _Metadata(), False
    while at + 8 <= end and len(head := read(at, 8)) == 8:
        kind, length = struct.unpack("<4sI", head)
        if kind in (b"VP8 ", b"VP8L", b"ANMF") and not pixels_at:
            pixels_at, is_lossy = at, kind != b"VP8L"
        elif kind == b"EXIF" and flags & 8:
            content = read(at + 8, min(length, _MAX_METADATA))
            found.exif = _exif_orientation(content)
            found.other = _exif_orientation(content.removeprefix(b"Exif\0\0"))  # DALI misses it behind this prefix
        elif kind == b"XMP " and length <= _MAX_METADATA:
            found.other = max(found.other, _xmp_orientation(read(at + 8, length)))
        elif kind == b"ICCP" and length <= _MAX_METADATA:
            found.profile = read(at + 8, length)
        at += 8 + length + length % 2
    if not pixels_at:
        raise struct.error
    is_simple = not flags & 0x12  # 0x10: alpha, 0x02: animation
    header = ImageHeader("webp", int.from_bytes(height, "little") + 1, int.from_bytes(width, "little") + 1,
                         channels=3 if is_simple else 4, is_lossy=is_lossy, is_plain=is_simple, is_for_dali=is_simple,
                         pixels_at=pixels_at)
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
    """Raise `BadImageError` where a WebP file of `file_size` bytes is shorter than its first bytes `data` promise."""
    promised = struct.unpack_from("<I", data, 4)[0] + 8
    if promised > file_size:
        raise BadImageError(f"truncated: {file_size} of {promised} bytes")


def make_readable(data: memoryview, header: ImageHeader) -> None:
    """Count the padding of a WebP's odd chunks to the chunks, in place, if EXIF is among them: so that DALI reads it.

    nvImageCodec 0.9 forgets the padding on its way to the EXIF, loses its way, and DALI raises. The pixels stay the
    same. `data` must have passed `check_complete`.
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


# BMP


def _bmp(read: Read) -> ImageHeader:
    start, length = _unpack("<II", read, 10)
    if length == 12:
        width, height, _, bits = _unpack("<HHHH", read, 18)
        compression = 0
    elif length >= 40:
        width, height, _, bits, compression = _unpack("<iiHHI", read, 18)
    else:
        raise BadImageError("broken BMP header")
    is_for_dali = bits in (1, 4, 8, 24) or (bits == 32 and compression == 0)  # 16 bits, and alpha, differ
    return ImageHeader("bmp", abs(height), width, channels=max(1, bits // 8), is_plain=False, is_for_dali=is_for_dali,
                       pixels_at=start)


def _check_bmp(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    (head,) = struct.unpack_from("<I", data, 14)
    bits, compression, size = (*struct.unpack_from("<H", data, 24), 0, 0) if head == 12 else \
        struct.unpack_from("<HII", data, 28)
    if compression in (0, 3, 6):  # otherwise run lengths, and `size` says how many bytes
        size = (header.width * bits + 31) // 32 * 4 * header.height  # of one byte less, DALI makes garbage
    if len(data) < header.pixels_at + size:
        raise BadImageError(f"truncated: {len(data)} of {header.pixels_at + size} bytes")


# TIFF


_TIFF_COMPRESSIONS = frozenset((1, 2, 3, 4, 5, 7, 8, 32773, 32946, 34925, 50000, 50001))
# libtiff's: none, fax (2, 3, 4), LZW, JPEG, deflate (8, 32946), PackBits, LZMA, Zstandard, WebP
_TIFF_FOR_DALI = frozenset((1, 5, 8, 32773, 32946, 50000))
# LZW, JPEG, deflate, Zstandard: their first code, and their end code, marker or checksum, are never all zeros.
_TIFF_CODED = frozenset((5, 7, 8, 32946, 50000))
# Size, bits, compression, colours, where strips and tiles lie, orientation, channels, planes, what further channels and
# the numbers mean, profile.
_TIFF_TAGS = frozenset((256, 257, 258, 259, 262, 273, 274, 277, 279, 284, 322, 324, 325, 338, 339, 34675))
_TIFF_DEPTHS = {0: (1, 2, 4, 8, 16), 1: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 5: (8,), 6: (8,), 8: (8,)}
"""Photometric interpretation (0, 1: gray; 2: RGB; 3: palette; 5: CMYK; 6: YCbCr; 8: CIELab) -> bits that are read."""


def _tiff(read: Read) -> ImageHeader:
    """The first image of a TIFF or BigTIFF file."""
    tags = tiff_tags(read)
    if not (tags.get(256) and tags.get(257)):
        raise BadImageError("a TIFF without a size")
    compression, kind, channels, planes = (tags.get(tag, (default,))[0]
                                           for tag, default in ((259, 1), (262, 1), (277, 1), (284, 1)))
    depths = {*tags.get(258, (1,))}
    depth = depths.pop() if len(depths) == 1 else 0
    if {*tags.get(339, (1,))} - {1, 4}:
        raise BadImageError("TIFF samples must be unsigned whole numbers, not floats or signed ones, whose white is "
                            "not known; save it with 8 or 16 bits")
    if compression not in _TIFF_COMPRESSIONS and compression != 6:
        raise BadImageError(f"TIFF's compression {compression} is not read; save it with LZW or deflate")
    if kind not in _TIFF_DEPTHS:
        raise BadImageError(f"TIFF's colours of kind {kind} (tag 262) are not read; save it as RGB")
    if depth not in _TIFF_DEPTHS[kind]:
        what = {0: "gray", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELab"}[kind]
        raise BadImageError(f"a {what} TIFF of {depth or 'mixed'} bits a sample; only "
                            f"{', '.join(map(str, _TIFF_DEPTHS[kind]))} bits are read: save it with 8 or 16")
    turned = tags.get(274, (1,))[0]
    is_easy = 322 not in tags or (planes == 1 and turned == 1)  # tiles of some sizes fail in DALI otherwise
    is_common = depth == 8 and (kind, channels) in ((1, 1), (2, 3)) and 338 not in tags
    return ImageHeader("tiff", tags[257][0], tags[256][0], depth, channels,
                       is_lossy=compression in (6, 7, 50001), is_plain=is_common and planes == 1,
                       orientation=turned if 1 <= turned <= 8 else 1,
                       is_for_dali=is_common and compression in _TIFF_FOR_DALI and is_easy,
                       profile=bytes(tags[34675]) if 34675 in tags else None, is_palette=kind == 3, tags=tags)


def tiff_tags(read: Read) -> dict[int, tuple[int, ...]]:
    """The tags of the first image that reading it takes: number -> values."""
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
        form = {1: "B", 3: "H", 4: "I", 7: "B", 16: "Q"}.get(kind)
        if not (form and length and tag in _TIFF_TAGS):
            continue
        size, value = struct.calcsize(form) * length, place + entry - struct.calcsize(slot)
        if size > _MAX_METADATA:
            raise BadImageError("broken TIFF header")
        if size > struct.calcsize(slot):
            (value,) = _unpack(order + slot, read, value)
        tags[tag] = struct.unpack(f"{order}{length}{form}", read(value, size))
    return tags


def tiff_page_count(data: bytes) -> int:
    """How many images a TIFF file holds, each in a directory that says where the next one stands."""
    read = _reader(data)
    order, is_big = "<" if data[:2] == b"II" else ">", data[2:4].strip(b"\0") == b"+"
    slot, entry, start = ("Q", 20, 8) if is_big else ("I", 12, 4)
    seen, at = set(), _unpack(order + slot, read, start)[0]
    while at and at not in seen:
        seen.add(at)
        count, size = _unpack(order + ("Q" if is_big else "H"), read, at)[0], 8 if is_big else 2
        (at,) = _unpack(order + slot, read, at + size + count * entry)
    return len(seen)


def _check_tiff(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    tags = header.tags or tiff_tags(_reader(data))
    compression = tags.get(259, (1,))[0]
    for starts, sizes in ((273, 279), (324, 325)):
        for start, size in zip(tags.get(starts, ()), tags.get(sizes, ()), strict=False):
            if start + size > len(data):
                raise BadImageError(f"truncated: {len(data)} of at least {start + size} bytes")
            if compression in _TIFF_CODED and size and not (
                    any(data[start : start + min(size, 4)]) and any(data[start + max(0, size - 16) : start + size])):
                raise BadImageError(f"damaged: zeros instead of the TIFF's pixels, about byte {start}")


# JPEG 2000


_JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_J2K = b"\xff\x4f\xff\x51"
SYCC = 18  # of the enumerated colours; 16 is sRGB, 17 gray


def _jp2(read: Read) -> ImageHeader:
    """A JP2 file or a bare JPEG 2000 codestream."""
    if read(0, 4) == _J2K:
        return _codestream(read, 0, is_plain=True, color=0, profile=None)
    at, is_plain, is_palette, color, profile = 12, True, False, 0, None
    while True:
        length, kind = _unpack(">I4s", read, at)
        start = at + (16 if length == 1 else 8)
        if length == 1:
            (length,) = _unpack(">Q", read, at + 8)
        if kind == b"jp2c":
            return replace(_codestream(read, start, is_plain, color, profile), is_palette=is_palette)
        if kind in (b"pclr", b"cdef"):  # a palette; channel meanings, that is: alpha
            is_plain, is_palette = False, is_palette or kind == b"pclr"
        if kind == b"colr":
            method, _, _, value = _unpack(">BBBI", read, start)
            if method == 1:
                color = value
                is_plain &= color in (16, 17)
            elif method in (2, 3):
                profile = read(start + 3, min(max(length - 11, 0), _MAX_METADATA))
        if kind == b"jp2h":  # its boxes follow one by one
            at = start
            continue
        if length < 8:
            raise BadImageError("broken JPEG 2000 box")
        at += length


def _codestream(read: Read, at: int, is_plain: bool, color: int, profile: bytes | None) -> ImageHeader:
    """The SIZ and COD segments of the JPEG 2000 codestream that starts at byte `at`."""
    pixels_at = at
    marker, siz, size, _, right, bottom, left, top = _unpack(">HHHHIIII", read, at)
    if (marker, siz) != (0xFF4F, 0xFF51):
        raise BadImageError("broken JPEG 2000 codestream")
    (channels,) = _unpack(">H", read, at + 40)
    depths = {_unpack(">B", read, at + 42 + 3 * component)[0] for component in range(min(channels, 16))}
    depth = (depths.pop() if len(depths) == 1 else 0xFF) + 1
    if depth > 16:
        raise BadImageError("a JPEG 2000 image of signed, mixed or more than 16 bits a sample is not read; save it "
                            "with 8 or 16 bits")
    at += 4 + size
    while True:
        marker, length = _unpack(">HH", read, at)
        if marker == 0xFF52:  # COD; its tenth byte is the wavelet: 0 is 9-7, irreversible
            wavelet = _unpack(">10B", read, at + 4)[9]
            is_plain &= depth == 8 and channels in (1, 3)
            return ImageHeader("jp2", bottom - top, right - left, depth, channels, is_lossy=wavelet == 0,
                               is_plain=is_plain, is_for_dali=is_plain, pixels_at=pixels_at, profile=profile,
                               tags={0: (color,)})
        if marker >> 8 != 0xFF or marker == 0xFF90 or length < 2:  # SOT: the tiles start, no COD was seen
            raise BadImageError("broken JPEG 2000 codestream")
        at += 2 + length


def _check_jp2(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    if not _holds(data[header.pixels_at :], b"\xff\xd9"):
        raise BadImageError("truncated: the JPEG 2000 codestream does not reach its end")


# AVIF, GIF and TGA, whose headers Pillow reads


def _by_pillow(name: str) -> Callable[[Read], ImageHeader]:
    def parse(read: Read) -> ImageHeader:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(read(0, 1 << 31)), formats=[name]) as image:
                orientation = image.getexif().get(0x0112, 1)
                return ImageHeader(name, image.height, image.width, channels=len(image.getbands()),
                                   is_lossy=name == "avif", is_plain=False,
                                   orientation=orientation if 1 <= orientation <= 8 else 1,
                                   profile=image.info.get("icc_profile"))
        except Exception as error:  # decoders meet hostile bytes and raise whatever they like
            if name == "tga":
                raise _no_image(read(0, 32)) from error
            raise BadImageError(f"broken {name.upper()} header, or truncated") from error

    return parse


# JPEG XL


_JXL_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


class _Bits:
    """The bits of a JPEG XL header, the lowest of each byte first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._length, self._at = int.from_bytes(data, "little"), 8 * len(data), 0

    def __call__(self, count: int) -> int:
        self._at += count
        if self._at > self._length:
            raise struct.error
        return self._value >> (self._at - count) & ((1 << count) - 1)

    def choice(self, *ways: tuple[int, int]) -> int:
        """One of four ways to write a number, as (bits, what is added to them)."""
        bits, offset = ways[self(2)]
        return offset + self(bits)


def _jxl_size(bits: _Bits) -> tuple[int, int]:
    is_small = bits(1)

    def side() -> int:
        return 8 * (bits(5) + 1) if is_small else bits.choice((9, 1), (13, 1), (18, 1), (30, 1))

    height, ratio = side(), bits(3)
    if ratio == 0:
        return height, side()
    across, down = _JXL_RATIOS[ratio]
    return height, height * across // down


def _jxl_depth(bits: _Bits) -> int:
    if bits(1):
        raise BadImageError("a JPEG XL of floating point numbers, whose white is not known; save it with 8 or 16 bits")
    depth = bits.choice((0, 8), (0, 10), (0, 12), (6, 1))
    if depth > 16:
        raise BadImageError(f"a JPEG XL of {depth} bits a sample; 8 and 16 bits are read")
    return depth


def _jxl(read: Read) -> ImageHeader:
    """The first bits of a JPEG XL codestream, in a container or bare. libjxl turns the pixels as the header says."""
    at, has_jpeg = 0, False
    while read(at, 2) != b"\xff\x0a":
        length, kind = _unpack(">I4s", read, at)
        start = at + (16 if length == 1 else 8)
        if kind in (b"jxlc", b"jxlp"):
            at = start + 4 * (kind == b"jxlp")
            if read(at, 2) != b"\xff\x0a":
                raise BadImageError("broken JPEG XL codestream")
            break
        has_jpeg |= kind == b"jbrd"  # what is needed to make the JPEG of it again
        at += _unpack(">Q", read, at + 8)[0] if length == 1 else length
        if length == 0 or 1 < length < 8:
            raise BadImageError("broken JPEG XL box")
    bits = _Bits(read(at + 2, 256))
    height, width = _jxl_size(bits)
    header = ImageHeader("jxl", height, width, is_lossy=True, is_plain=False, pixels_at=at)
    if bits(1):  # all as usual: 8 bits, sRGB, lossy
        return header
    orientation = 1
    if bits(1):
        orientation = 1 + bits(3)
        if bits(1):  # the size that it shall be shown at
            _jxl_size(bits)
        if bits(1):
            raise BadImageError("a JPEG XL with a preview is not read; save it as PNG")
        if bits(1):  # an animation: its rate and its loops
            bits.choice((0, 100), (0, 1000), (10, 1), (30, 1))
            bits.choice((0, 1), (0, 1001), (8, 1), (10, 1))
            bits.choice((0, 0), (3, 0), (16, 0), (32, 0))
            bits(1)
    depth = _jxl_depth(bits)
    bits(1)
    is_associated = _jxl_alpha(bits)
    is_xyb = bits(1)
    is_gray, is_linear = _jxl_colors(bits)
    channels = (1 if is_gray else 3) + (is_associated is not None)
    return replace(header, depth=depth, channels=channels, is_lossy=bool(is_xyb) or has_jpeg,
                   orientation=orientation, tags={JXL_PREMULTIPLIED: (is_associated or 0,), JXL_LINEAR: (is_linear,)})


JXL_PREMULTIPLIED, JXL_LINEAR = 1, 2  # `tags` of a JPEG XL: colours are multiplied by alpha; levels are linear light
_JXL_SRGB, _JXL_LINEAR = 13, 8        # its names of transfer functions


def _jxl_alpha(bits: _Bits) -> bool | None:
    """Whether the colours are multiplied by the alpha channel; `None` where there is none."""
    found = None
    for _ in range(bits.choice((0, 0), (0, 1), (4, 2), (12, 1))):
        if bits(1):  # as usual: alpha of 8 bits
            found = False
            continue
        kind = bits.choice((0, 0), (0, 1), (4, 2), (6, 18))
        _jxl_depth(bits)
        bits.choice((0, 0), (0, 3), (0, 4), (3, 1))
        bits(8 * bits.choice((0, 0), (4, 0), (5, 16), (10, 48)))  # its name
        if kind != 0:
            raise BadImageError("a JPEG XL with channels other than colours and alpha is not read; save it as PNG")
        found = bool(bits(1))
    return found


def _jxl_colors(bits: _Bits) -> tuple[bool, bool]:
    """Whether it is gray, and linear. Raises `BadImageError` for colours whose profile cannot be had."""
    if bits(1):
        return False, False
    has_profile = bits(1)
    space = bits.choice((0, 0), (0, 1), (4, 2), (6, 18))
    if not has_profile and space in (0, 1):
        white = bits.choice((0, 0), (0, 1), (4, 2), (6, 18))
        primaries = bits.choice((0, 0), (0, 1), (4, 2), (6, 18)) if space == 0 and white != 2 else 1
        transfer = 0 if bits(1) else bits.choice((0, 0), (0, 1), (4, 2), (6, 18))
        if white == 1 and primaries == 1 and transfer in (_JXL_SRGB, _JXL_LINEAR):
            return space == 1, transfer == _JXL_LINEAR
    raise BadImageError("a JPEG XL of other colours than sRGB is not read; convert it to sRGB")


# Netpbm


_PNM = re.compile(rb"P([1-6])" + 2 * rb"(?:\s|#[^\n]*\n)+(\d+)" + rb"(?:(?:\s|#[^\n]*\n)+(\d+))?(?:#[^\n]*\n)*\s")


def _pnm(read: Read) -> ImageHeader:
    """A bitmap, graymap or pixmap; its depth is that of its greatest value, which `tags[0]` holds."""
    head = read(0, 4096)
    match = _PNM.match(head)
    if match is None:
        raise BadImageError("broken PNM header")
    kind, width, height = (int(match[number][:9]) for number in (1, 2, 3))
    end, most = match.end(), int((match[4] or b"1")[:9])
    if kind in (1, 4):  # no greatest value: what looked like it are pixels
        end, most = re.match(rb"P[14]" + 2 * rb"(?:\s|#[^\n]*\n)+\d+" + rb"\s", head).end(), 1
    elif match[4] is None:
        raise BadImageError("broken PNM header")
    if not 0 < most < 65536:
        raise BadImageError(f"a PNM file whose greatest value is {most}; it must be 1 to 65535")
    channels = 3 if kind in (3, 6) else 1
    return ImageHeader("pnm", height, width, 8 if most < 256 else 16, channels, is_plain=False, pixels_at=end,
                       tags={0: (kind, most)})


def _check_pnm(data: memoryview, header: ImageHeader, thorough: bool) -> None:
    kind, most = header.tags[0]
    if kind < 4:  # written in letters: its decoder notices
        return
    row = (header.width + 7) // 8 if kind == 4 else header.width * header.channels * (2 if most > 255 else 1)
    if len(data) < header.pixels_at + row * header.height:
        raise BadImageError(f"truncated: {len(data)} of {header.pixels_at + row * header.height} bytes")


FORMATS = (
    Format("png", "PNG", (".png",), (b"\x89PNG\r\n\x1a\n",), _png, _check_png),
    Format("jpeg", "JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), (b"\xff\xd8\xff",), _jpeg, _check_jpeg),
    Format("webp", "WebP", (".webp",), (), _webp, _check_webp),
    Format("bmp", "BMP", (".bmp",), (b"BM",), _bmp, _check_bmp),
    Format("tiff", "TIFF", (".tif", ".tiff"), (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _tiff, _check_tiff),
    Format("jp2", "JPEG 2000", (".jp2",), (_JP2, _J2K), _jp2, _check_jp2),
    Format("avif", "AVIF", (".avif",), (), _by_pillow("avif")),
    Format("jxl", "JPEG XL", (".jxl",), (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"), _jxl),
    Format("pnm", "PNM", (".ppm", ".pgm", ".pbm", ".pnm"),
           tuple(b"P%d%b" % (kind, space) for kind in range(1, 7) for space in (b" ", b"\n", b"\r", b"\t")), _pnm,
           _check_pnm),
    Format("gif", "GIF", (".gif",), (b"GIF87a", b"GIF89a"), _by_pillow("gif"), is_for_datasets=False),
    Format("tga", "TGA", (".tga",), (), _by_pillow("tga"), is_for_datasets=False),
)
"""Every format that is read. To read another one, add its row here and its decoder to `image_pixels`."""
_BY_NAME = {form.name: form for form in FORMATS}

IMAGE_SUFFIXES = frozenset(suffix for form in FORMATS if form.is_for_datasets for suffix in form.suffixes)
"""Of image files that every command reads."""
UPSCALED_SUFFIXES = frozenset(suffix for form in FORMATS for suffix in form.suffixes)
"""Of image files that upscale.py reads."""
FORMAT_TITLES = ", ".join(form.title for form in FORMATS if form.is_for_datasets)


def suffix_of(name: str | os.PathLike[str]) -> str:
    """The suffix in small letters."""
    return os.path.splitext(os.fspath(name))[1].lower()
