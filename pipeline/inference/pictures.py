"""Pictures of any kind as arrays that keep what they are: gray or colours, with or without alpha, 8
or 16 bits."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from pipeline.cli import UserError
from pipeline.data.image_headers import BadImageError, ImageHeader, read_header
from pipeline.data.image_pixels import decode_picture, over_white, to_8_bits
from pipeline.inference import png
from pipeline.inference.devices import free_bytes

# EXIF bytes: taken out of any picture, made upright, as the tags of a TIFF file. Always from the
# TIFF header on.


ORIENTATION = 0x0112
PREFIX = b"Exif\0\0"
_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
# Tags of a picture's first directory that say something of the picture, and not of how its pixels
# lie in the file: ImageDescription, Make, Model, Software, DateTime, Artist, Copyright
_DESCRIPTIVE = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_SHORT, _LONG = 3, 4


def exif_of(image: Image.Image) -> bytes | None:
    """The EXIF of an open picture as it lies in the file; of a TIFF file, whose tags are EXIF, what
    describes it."""
    if image.format == "TIFF":
        tags = descriptive_tags(image.getexif())
        return _exifto_8_bits(tags) if tags else None
    exif = image.info.get("exif")
    if exif is None and "Raw profile type exif" in image.info:  # ImageMagick's way in PNG
        exif = image.getexif().tobytes()
    return exif.removeprefix(PREFIX) or None if exif else None


def descriptive_tags(exif: Image.Exif) -> dict[int, Any]:
    """Tags and directories (as dicts) of an EXIF that hold for the picture in any file."""
    tags: dict[int, Any] = {tag: exif[tag] for tag in _DESCRIPTIVE if tag in exif}
    if str(tags.get(0x010E, "")).startswith(
        '{"shape"'
    ):  # tifffile's, of the file and not of the picture
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


def _exifto_8_bits(tags: dict[int, Any]) -> bytes:
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[tag] = value
    return exif.tobytes().removeprefix(PREFIX)


@dataclass(frozen=True)
class Picture:
    """A picture, upright."""

    pixels: np.ndarray
    """uint8 or uint16, (height, width, channels); 1 channel is gray, 2 gray and alpha, 3 RGB, 4 RGB
    and alpha."""
    icc_profile: bytes | None = None
    exif: bytes | None = None
    """From the TIFF header on; its orientation, if any, says "as it lies"."""
    num_frames: int = 1
    """Of the file; these are the pixels of the first."""


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width, upright, from the header. Raises `BadImageError` where there is none, or
    `OSError`."""
    with open(path, "rb") as file:
        return read_header(file, any_format=True).size


def read_picture(path: Path) -> Picture:
    """The picture in a file, with its profile and EXIF, turned upright. `UserError` for one that
    cannot be read whole."""
    try:
        data = path.read_bytes()
        header = read_header(data, any_format=True)
        _check_memory(header)
        image = decode_picture(data, header)
    except (BadImageError, OSError) as error:
        raise UserError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return Picture(image.pixels, image.profile, *_beside_pixels(data))


def _check_memory(header: ImageHeader) -> None:
    """Refuse what would fill the memory before anything of it is decoded."""
    needed = 2 * 8 * header.width * header.height  # up to 4 channels of 16 bits, and a copy
    if needed > free_bytes():
        raise UserError(
            f"{header.width}x{header.height} pixels need {needed / 2**30:.1f} GiB of memory to "
            "decode, "
            "more than is free; cut it up"
        )


def _beside_pixels(data: bytes) -> tuple[bytes | None, int]:
    """(EXIF, number of pictures) of a file whose first picture was read; of a JPEG XL, which Pillow
    lacks, nothing."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            exif = exif_of(image)
            frames = (
                1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            )  # a phone's JPEG and its preview
    except Exception:  # broken metadata, in whatever way: the pixels are whole
        return None, 1
    return None if exif is None else upright(exif), frames


# Pictures into files of the format that the name says, with their profile and EXIF.


WRITTEN = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"})
QUALITY = 95
_TIFF_LIMIT = 2**32 - 2**20  # offsets have 32 bits; the rest is for tags


def encode_picture(picture: Picture, suffix: str, png_level: int | None = None) -> bytes:
    """The file's bytes. PNG and TIFF hold everything; JPEG and WebP have 8 bits, JPEG no alpha (it
    goes over white).

    `png_level` is one of `png.LEVELS`; `None` is the fast one.
    """
    suffix = suffix.lower()
    if suffix == ".png":
        return _png(picture, png_level)
    if suffix in (".tif", ".tiff"):
        return _tiff(picture)
    pixels = to_8_bits(picture.pixels)
    options = {"icc_profile": picture.icc_profile} if picture.icc_profile else {}
    if suffix in (".jpg", ".jpeg"):
        image = Image.fromarray(_without_alpha(pixels))
        options |= {"format": "JPEG", "quality": QUALITY, "subsampling": 0, "optimize": True}
    elif suffix == ".webp":
        image = Image.fromarray(_squeezed(pixels)).convert(
            "RGBA" if pixels.shape[2] in (2, 4) else "RGB"
        )
        if pixels.shape[2] < 3:
            options = {}  # a profile of gray says nothing of RGB
        options |= {"format": "WEBP", "quality": QUALITY}
    else:
        raise UserError(f"cannot write {suffix!r}; choose from {', '.join(sorted(WRITTEN))}")
    if picture.exif is not None:
        options["exif"] = PREFIX + picture.exif
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def _png(picture: Picture, level: int | None) -> bytes:
    chunks = b""
    if picture.icc_profile is not None:
        chunks += png.chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc_profile))
    if picture.exif is not None:
        chunks += png.chunk(b"eXIf", picture.exif)
    return png.encode_png(picture.pixels, level, chunks)


def _tiff(picture: Picture) -> bytes:
    """Deflated, one strip; gray with alpha of 16 bits as RGBA, which more programs read."""
    pixels = picture.pixels
    if pixels.shape[2] == 2 and pixels.dtype == np.uint16:
        pixels = np.concatenate([np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1:]], axis=2)
    height, width, channels = pixels.shape
    differences = np.diff(pixels, axis=1, prepend=pixels.dtype.type(0)).astype(
        f"<u{pixels.itemsize}", copy=False
    )
    data = zlib.compress(differences.tobytes())
    if len(data) > _TIFF_LIMIT:
        raise UserError("is larger than a TIFF file can be (4 GiB); write .png")
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if picture.exif is not None:
        for tag, value in descriptive_tags(parsed(picture.exif)).items():
            tags[tag] = value
    for tag, value in {
        256: width,
        257: height,
        258: (8 * pixels.itemsize,) * channels,
        259: 8,
        262: 1 if channels < 3 else 2,
        273: 0,
        277: channels,
        278: height,
        279: len(data),
        284: 1,
        317: 2,
    }.items():
        tags[tag] = value
    if channels in (2, 4):
        tags[338] = 2  # alpha, colours not multiplied by it
    if picture.icc_profile is not None and channels == picture.pixels.shape[2]:
        tags.tagtype[34675] = 7
        tags[34675] = picture.icc_profile
    buffer = io.BytesIO()
    tags.save(buffer)
    buffer.write(data)
    return buffer.getvalue()


def _squeezed(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def _without_alpha(pixels: np.ndarray) -> np.ndarray:
    """Composited over white."""
    return _squeezed(
        pixels if pixels.shape[2] in (1, 3) else over_white(pixels[..., :-1], pixels[..., -1:])
    )
