"""Read an image's format, size and kind from its header, and check that it is complete.

`FORMATS` is the single table of formats and of the suffixes that folders are searched for. The
content of a file decides its format. `read_header` rejects what no command reads, so that all
commands report it in the same words. The parser of each format and its row in the table are in the
module of that name, or in `others`.
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
from pipeline.data.image_headers.jpeg import END_OF_JPEG, JPEG, with_end, without_harmless_defect
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
    "without_harmless_defect",
]

MAX_PIXELS = 1 << 28  # the most that training decodes

FORMATS = (PNG, JPEG, WEBP, BMP, TIFF, JPEG_2000, AVIF, JPEG_XL, PNM, GIF, TGA)
"""All formats that are read.

To add one, write its parser and its row in a module here, add the row to this table, and add its
decoder to `image_pixels`.
"""
_BY_NAME = {form.name: form for form in FORMATS}

IMAGE_SUFFIXES = frozenset(
    suffix for form in FORMATS if form.is_for_datasets for suffix in form.suffixes
)
"""Suffixes of the image files that every command reads."""
UPSCALED_SUFFIXES = frozenset(suffix for form in FORMATS for suffix in form.suffixes)
"""Suffixes of the image files that upscale.py reads."""
FORMAT_TITLES = ", ".join(form.title for form in FORMATS if form.is_for_datasets)


def read_header(
    source: Read | BinaryIO | bytes | memoryview, *, any_format: bool = False
) -> ImageHeader:
    """Return the header of an image, whatever the file's name.

    `source` is the image's content, a file open for reading, or a `Read` function. With
    `any_format`, formats that only upscale.py reads are accepted too. Raises `BadImageError` if the
    header is broken or the format or kind of image is not supported.
    """
    read = reader_of(source)
    head = read(0, 32)
    if not head:
        raise BadImageError("empty file")
    form = _format_of(head, any_format)
    if not (form.is_for_datasets or any_format):
        raise BadImageError(f"the content is {form.title}, which is not supported; save it as PNG")
    try:
        header = form.parse(read)
    except struct.error:
        raise BadImageError("truncated within the header") from None
    if not (header.height > 0 and header.width > 0):
        raise BadImageError(f"the {form.title} header says {header.height}x{header.width} pixels")
    return replace(header, title=form.title)


def check_max_pixels(header: ImageHeader) -> None:
    """Raise `BadImageError` if an image has more pixels than training decodes."""
    if header.height * header.width > MAX_PIXELS:
        raise BadImageError(
            f"the {header.title} header says {header.height}x{header.width} pixels, more than the "
            f"limit of {MAX_PIXELS >> 20} Mi; cut it into crops"
        )


def check_file_size(header: ImageHeader, num_bytes: int) -> None:
    """Reject, before reading it, a file with far more bytes than its pixels can need (e.g. sparse).

    The limit is 16 bytes per pixel, as for uncompressed RGBA of 32 bits, plus 64 MiB for metadata.
    Raises `BadImageError`.
    """
    if num_bytes > 16 * header.height * header.width + (64 << 20):
        raise BadImageError(
            f"{num_bytes} bytes for {header.height}x{header.width} pixels: the file does not "
            "match its header"
        )


def check_complete(data: bytes | memoryview, header: ImageHeader, *, thorough: bool = True) -> None:
    """Raise `BadImageError` if the encoded image `data` is truncated or damaged.

    PNG: checks the chunks up to IEND and, with `thorough`, their CRCs. JPEG: checks the
    end-of-image marker (`NoEndError`) and, with `thorough`, every segment up to this image's own
    end (not that of a thumbnail) and the sequence of restart markers. WebP: checks the RIFF length
    and the chunks. JPEG 2000: the end of the codestream. BMP: the length of the rows. TIFF: that
    the strips or tiles of the first image lie within the file and, if compressed, do not start or
    end with zeros. Bytes after the end are accepted. Other damage is detected when the pixels are
    decoded, or never (lossy WebP, JPEG 2000, uncompressed pixels).
    """
    check = _BY_NAME[header.format].check
    if check is None:
        return
    try:
        check(memoryview(data), header, thorough)
    except (struct.error, IndexError):
        raise BadImageError("truncated") from None


def starts_as_image(head: bytes) -> bool:
    """Return whether a file with these first bytes is an image.

    Netpbm files, which start with one letter and one digit, are recognised only by name.
    """
    try:
        form = _format_of(head, any_format=False)
    except BadImageError:
        return False
    return form.is_for_datasets and form.name not in ("pnm",)


def can_check(header: ImageHeader) -> bool:
    """Return whether `check_complete` checks images of this format."""
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
            f"the content is HEIC or video ({head[8:12]!r}), which is not supported; save it as PNG"
        )
    if name := next((name for start, name in _FOREIGN.items() if head.startswith(start)), ""):
        raise BadImageError(
            f"the content is {name}, which is not a supported image format; save it as PNG"
        )
    if any_format and any(head):
        return TGA  # which has no magic bytes
    raise no_image(head)


# Kinds of files that are not in `FORMATS`, by content and by name, so that messages can name them.
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
"""Suffixes of images that the dataset tools do not read -> name of the format.

Such files are counted and named in the tools' output.
"""


def unread_note(names: Iterable[str], *, but: Collection[str] = ()) -> str:
    """Return a line about those of `names` that are images of unsupported formats.

    Returns "" if there are none. Suffixes in `but` are not reported.
    """
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
    """Return the suffix in lower case."""
    return os.path.splitext(os.fspath(name))[1].lower()
