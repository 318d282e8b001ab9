"""Read and write pictures, keeping their mode, bit depth, colour profile and EXIF."""

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
from pipeline.files import open_regular_file, read_regular_file
from pipeline.inference import png
from pipeline.inference.devices import free_bytes

# EXIF as bytes that start with the TIFF header: read from any picture, and written into TIFF files.

ORIENTATION = 0x0112
PREFIX = b"Exif\0\0"
_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
# Tags of the first directory that describe the picture and not how its pixels are stored:
# ImageDescription, Make, Model, Software, DateTime, Artist, Copyright
_DESCRIPTIVE = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_SHORT, _LONG = 3, 4


def exif_of(image: Image.Image) -> bytes | None:
    """Return the EXIF bytes of an open picture, as stored in the file.

    For a TIFF file, whose tags themselves are EXIF, return those that describe the picture.
    """
    if image.format == "TIFF":
        tags = descriptive_tags(image.getexif())
        return _exif_bytes(tags) if tags else None
    exif = image.info.get("exif")
    if exif is None and "Raw profile type exif" in image.info:  # how ImageMagick stores it in PNG
        exif = image.getexif().tobytes()
    return exif.removeprefix(PREFIX) or None if exif else None


def descriptive_tags(exif: Image.Exif) -> dict[int, Any]:
    """Return the tags and directories (as dicts) that describe the picture in any file format."""
    tags: dict[int, Any] = {tag: exif[tag] for tag in _DESCRIPTIVE if tag in exif}
    if str(tags.get(0x010E, "")).startswith('{"shape"'):  # tifffile's description of the file
        del tags[0x010E]
    directories = {tag: dict(exif.get_ifd(tag)) for tag in (_EXIF_IFD, _GPS_IFD)}
    return {**tags, **{tag: values for tag, values in directories.items() if values}}


def parsed(exif: bytes) -> Image.Exif:
    """Parse EXIF bytes with Pillow."""
    read = Image.Exif()
    read.load(PREFIX + exif)
    return read


def upright(exif: bytes) -> bytes:
    """Return the same EXIF bytes with the orientation, if there is one, set to 1 (upright)."""
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
    except struct.error:  # damaged: no program will find an orientation
        return exif


def _exif_bytes(tags: dict[int, Any]) -> bytes:
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[tag] = value
    return exif.tobytes().removeprefix(PREFIX)


@dataclass(frozen=True)
class Picture:
    """An upright picture with its metadata."""

    pixels: np.ndarray
    """uint8 or uint16, (height, width, channels); 1 channel is gray, 2 gray and alpha, 3 RGB, 4 RGB
    and alpha."""
    icc_profile: bytes | None = None
    exif: bytes | None = None
    """EXIF bytes from the TIFF header on; the orientation, if any, is 1 (upright)."""
    num_frames: int = 1
    """Number of pictures in the file, of which this is the first."""


def picture_size(path: Path) -> tuple[int, int]:
    """Read height and width of the upright picture from the header.

    Raises:
        BadImageError: there is no valid header.
        OSError: the file cannot be read.
    """
    with open_regular_file(path) as file:
        return read_header(file, any_format=True).size


def read_picture(path: Path) -> Picture:
    """Read the picture in a file with its profile and EXIF, and turn it upright.

    Raises:
        UserError: the file cannot be read completely, or does not fit into the memory.
    """
    try:
        data = read_regular_file(path)
        header = read_header(data, any_format=True)
        _check_memory(header)
        image = decode_picture(data, header)
    except (BadImageError, OSError) as error:
        raise UserError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return Picture(image.pixels, image.profile, *_beside_pixels(data))


def _check_memory(header: ImageHeader) -> None:
    """Raise `UserError` for a picture that would fill the memory, before it is decoded."""
    needed = 2 * 8 * header.width * header.height  # up to 4 channels of 16 bits, and a copy
    if needed > free_bytes():
        raise UserError(
            f"{header.width}x{header.height} pixels need {needed / 2**30:.1f} GiB of memory to "
            "decode, more than is free; split the image"
        )


def _beside_pixels(data: bytes) -> tuple[bytes | None, int]:
    """Return (EXIF, number of pictures) of a file; (None, 1) for JPEG XL, which Pillow lacks."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            exif = exif_of(image)
            # MPO is a phone's JPEG with its preview.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception:  # broken metadata of any kind: the pixels have been read without error
        return None, 1
    return None if exif is None else upright(exif), frames


# Writing: the suffix decides the format; profile and EXIF are kept.


WRITTEN = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"})
QUALITY = 95
_TIFF_LIMIT = 2**32 - 2**20  # offsets have 32 bits; 1 MiB is left for tags


def encode_picture(picture: Picture, suffix: str, png_level: int | None = None) -> bytes:
    """Encode a picture in the format of `suffix`; return the file's content.

    PNG and TIFF keep everything. JPEG and WebP have 8 bits, and JPEG has no alpha: the picture is
    composited over white.

    Args:
        picture: the picture with its metadata.
        suffix: one of `WRITTEN`.
        png_level: one of `png.LEVELS`; `None` is the fast `png.DEFAULT_LEVEL`.

    Raises:
        UserError: the suffix is not supported, or the picture is too large for TIFF.
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
            options = {}  # a gray profile does not describe RGB
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
    """Encode as TIFF: deflate with horizontal prediction, in one strip.

    16-bit gray with alpha becomes RGBA, which more programs can read.
    """
    pixels = picture.pixels
    if pixels.shape[2] == 2 and pixels.dtype == np.uint16:
        pixels = np.concatenate([np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1:]], axis=2)
    height, width, channels = pixels.shape
    differences = np.diff(pixels, axis=1, prepend=pixels.dtype.type(0)).astype(
        f"<u{pixels.itemsize}", copy=False
    )
    data = zlib.compress(differences.tobytes())
    if len(data) > _TIFF_LIMIT:
        raise UserError("is larger than a TIFF file can be (4 GiB); use .png")
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
        tags[338] = 2  # unassociated alpha: colours are not premultiplied
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
    """Composite over white."""
    return _squeezed(
        pixels if pixels.shape[2] in (1, 3) else over_white(pixels[..., :-1], pixels[..., -1:])
    )
