"""What an image file says of itself, read without decoding: its format, its size, its kind, and
whether it is whole.

`FORMATS` is the one table of formats and of the suffixes that folders are searched for. The content
of a file decides what it is. `read_header` refuses what no command reads, so that all commands
refuse it with the same words. The parser of a format and its row stand in the file of its name, or
in `others`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import BinaryIO

from pipeline.data.image_headers.base import (
    BadImageError,
    Format,
    ImageHeader,
    NoEndError,
    Read,
    no_image,
    reader_of,
)
from pipeline.data.image_headers.jpeg import END_OF_JPEG, JPEG, with_end, without_sloppiness
from pipeline.data.image_headers.jpegxl import JPEG_XL, JXL_LINEAR, JXL_PREMULTIPLIED
from pipeline.data.image_headers.others import (
    AVIF,
    BMP,
    GIF,
    JPEG_2000,
    PNM,
    SYCC,
    TGA,
    WEBP,
    check_riff_length,
    make_readable,
)
from pipeline.data.image_headers.png import PNG, png_chunks
from pipeline.data.image_headers.tiff import TIFF, tiff_page_count, tiff_tags

__all__ = [
    "END_OF_JPEG",
    "FORMATS",
    "FORMAT_TITLES",
    "IMAGE_SUFFIXES",
    "JXL_LINEAR",
    "JXL_PREMULTIPLIED",
    "MAX_PIXELS",
    "SYCC",
    "UNREAD_SUFFIXES",
    "UPSCALED_SUFFIXES",
    "BadImageError",
    "Format",
    "ImageHeader",
    "NoEndError",
    "Read",
    "can_check",
    "check_complete",
    "check_file_size",
    "check_max_pixels",
    "check_riff_length",
    "make_readable",
    "png_chunks",
    "read_header",
    "starts_as_image",
    "suffix_of",
    "tiff_page_count",
    "tiff_tags",
    "unread_note",
    "with_end",
    "without_sloppiness",
]

MAX_PIXELS = 1 << 28  # that training decodes

FORMATS = (PNG, JPEG, WEBP, BMP, TIFF, JPEG_2000, AVIF, JPEG_XL, PNM, GIF, TGA)
"""Every format that is read. To read another one, write its parser and its row in a file here, name
the row in this table, and add its decoder to `image_pixels`."""
_BY_NAME = {form.name: form for form in FORMATS}

IMAGE_SUFFIXES = frozenset(
    suffix for form in FORMATS if form.is_for_datasets for suffix in form.suffixes
)
"""Of image files that every command reads."""
UPSCALED_SUFFIXES = frozenset(suffix for form in FORMATS for suffix in form.suffixes)
"""Of image files that upscale.py reads."""
FORMAT_TITLES = ", ".join(form.title for form in FORMATS if form.is_for_datasets)


def read_header(
    source: Read | BinaryIO | bytes | memoryview, *, any_format: bool = False
) -> ImageHeader:
    """The header of an image, whatever its name says. `source`: its content, a file open for
    reading, or a `Read`.

    Raises `BadImageError` where the header is broken, or the image is of a format or a kind that is
    not read; formats that only upscale.py reads are taken with `any_format`.
    """
    read = reader_of(source)
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
    return replace(header, title=form.title)


def check_max_pixels(header: ImageHeader) -> None:
    """Raise `BadImageError` where an image has more pixels than training decodes."""
    if header.height * header.width > MAX_PIXELS:
        raise BadImageError(
            f"the {header.title} header says {header.height}x{header.width} pixels, more than the "
            f"{MAX_PIXELS >> 20} Mi that are decoded; cut it into crops"
        )


def check_file_size(header: ImageHeader, num_bytes: int) -> None:
    """Refuse, before a byte of it is read, a file of far more bytes than its pixels could need (a
    sparse one, say).

    Sixteen bytes a pixel are RGBA of 32 bits uncompressed; 64 MiB are left for metadata. Raises
    `BadImageError`.
    """
    if num_bytes > 16 * header.height * header.width + (64 << 20):
        raise BadImageError(
            f"{num_bytes} bytes for {header.height}x{header.width} pixels: the file is not what "
            "its "
            "header says"
        )


def check_complete(data: bytes | memoryview, header: ImageHeader, *, thorough: bool = True) -> None:
    """Raise `BadImageError` where the encoded image `data`, whose header was read, is cut short or
    damaged.

    PNG: the chunks up to IEND, and where `thorough` their CRCs. JPEG: the end-of-image marker
    (`NoEndError`); where `thorough` every segment up to this image's own (not a thumbnail's), and
    that its restart markers count on. WebP: the RIFF length and its chunks. JPEG 2000: the end of
    the codestream. BMP: the length of its rows. TIFF: where the strips or tiles of its first image
    end, and that compressed ones do not start or end in zeros. Bytes after the end are fine. Any
    other damage shows when the pixels are decoded, or (lossy WebP, JPEG 2000, uncompressed pixels)
    never.
    """
    check = _BY_NAME[header.format].check
    if check is None:
        return
    try:
        check(memoryview(data), header, thorough)
    except (struct.error, IndexError):
        raise BadImageError("truncated") from None


def starts_as_image(head: bytes) -> bool:
    """Whether a file that starts so is an image; Netpbm's, which begin with one letter and one
    digit, go by name."""
    try:
        form = _format_of(head, any_format=False)
    except BadImageError:
        return False
    return form.is_for_datasets and form.name not in ("pnm",)


def can_check(header: ImageHeader) -> bool:
    """Whether `check_complete` tells anything of such an image."""
    return _BY_NAME[header.format].check is not None


def _format_of(head: bytes, any_format: bool) -> Format:
    if form := next((form for form in FORMATS if head.startswith(form.starts)), None):
        return form
    if form := next(
        (form for form in FORMATS if form.is_start is not None and form.is_start(head)), None
    ):
        return form
    if head[4:8] == b"ftyp":
        raise BadImageError(
            f"the content is HEIC or video ({head[8:12]!r}), which is not read; save it as PNG"
        )
    if name := next((name for start, name in _FOREIGN.items() if head.startswith(start)), ""):
        raise BadImageError(
            f"the content is {name}, not an image format that is read; save it as PNG"
        )
    if any_format and any(head):
        return TGA  # which begins with nothing of its own
    raise no_image(head)


# What is none of `FORMATS`, by its content and by its name: so that a message can say what it is.
_FOREIGN = {
    b"%PDF": "PDF",
    b"\x1a\x45\xdf\xa3": "Matroska or WebM",
    b"8BPS": "Photoshop",
    b"DDS ": "DDS",
    b"\x93NUMPY": "an .npy array",
    b"v/1\1": "OpenEXR",
    b"II\xbc\1": "JPEG XR",
}
UNREAD_SUFFIXES = {
    ".heic": "HEIC",
    ".heif": "HEIC",
    ".hif": "HEIC",
    ".gif": "GIF",
    ".tga": "TGA",
    ".psd": "Photoshop",
    ".exr": "OpenEXR",
    ".hdr": "Radiance HDR",
    ".jxr": "JPEG XR",
    ".dds": "DDS",
    ".j2k": "JPEG 2000 (as .j2k)",
    ".svg": "SVG",
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"), "raw"),
}
"""Suffixes of images that the datasets' tools do not read -> what they are called; those files are
counted and named.
"""


def unread_note(names: Iterable[str], *, but: Collection[str] = ()) -> str:
    """A line on those of `names` that are images of other formats (with no suffix of `but`), `""`
    if there are none."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        is_hidden = os.path.basename(name).startswith(".")
        if suffix_of(name) in UNREAD_SUFFIXES and suffix_of(name) not in but and not is_hidden:
            kinds.setdefault(UNREAD_SUFFIXES[suffix_of(name)], []).append(
                name if name.isprintable() else ascii(name)
            )
    found = [
        f"{len(of_kind)} {kind} ({', '.join(of_kind[:3])}{', …' if len(of_kind) > 3 else ''})"
        for kind, of_kind in sorted(kinds.items())
    ]
    return f"not read: {', '.join(found)}; save them as PNG to use them" if found else ""


def suffix_of(name: str | os.PathLike[str]) -> str:
    """The suffix in small letters."""
    return os.path.splitext(os.fspath(name))[1].lower()
