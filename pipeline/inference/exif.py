"""EXIF bytes: taken out of any picture, made upright, as the tags of a TIFF file. Always from the TIFF header on."""

from __future__ import annotations

import struct
from typing import Any

from PIL import Image

ORIENTATION = 0x0112
PREFIX = b"Exif\0\0"
_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
# Tags of a picture's first directory that say something of the picture, and not of how its pixels lie in the file:
# ImageDescription, Make, Model, Software, DateTime, Artist, Copyright
_DESCRIPTIVE = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_SHORT, _LONG = 3, 4


def exif_of(image: Image.Image) -> bytes | None:
    """The EXIF of an open picture as it lies in the file; of a TIFF file, whose tags are EXIF, what describes it."""
    if image.format == "TIFF":
        tags = descriptive_tags(image.getexif())
        return _as_bytes(tags) if tags else None
    exif = image.info.get("exif")
    if exif is None and "Raw profile type exif" in image.info:  # ImageMagick's way in PNG
        exif = image.getexif().tobytes()
    return exif.removeprefix(PREFIX) or None if exif else None


def descriptive_tags(exif: Image.Exif) -> dict[int, Any]:
    """Tags and directories (as dicts) of an EXIF that hold for the picture in any file."""
    tags: dict[int, Any] = {tag: exif[tag] for tag in _DESCRIPTIVE if tag in exif}
    if str(tags.get(0x010E, "")).startswith('{"shape"'):  # tifffile's, of the file and not of the picture
        del tags[0x010E]
    directories = {tag: dict(exif.get_ifd(tag)) for tag in (_EXIF_IFD, _GPS_IFD)}
    return {**tags, **{tag: values for tag, values in directories.items() if values}}


def parsed(exif: bytes) -> Image.Exif:
    """EXIF bytes as Pillow reads them."""
    read = Image.Exif()
    read.load(PREFIX + exif)
    return read


def upright(exif: bytes) -> bytes:
    """The same bytes, but that the orientation, where there is one, says "as it lies"."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return exif
    try:
        start = struct.unpack_from(f"{order}I", exif, 4)[0]
        count = struct.unpack_from(f"{order}H", exif, start)[0]
        changed = bytearray(exif)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, at)
            if tag == ORIENTATION and kind in (_SHORT, _LONG):
                struct.pack_into(f"{order}H" if kind == _SHORT else f"{order}I", changed, at + 8, 1)
        return bytes(changed)
    except struct.error:  # damaged: no program finds an orientation there
        return exif


def _as_bytes(tags: dict[int, Any]) -> bytes:
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[tag] = value
    return exif.tobytes().removeprefix(PREFIX)
