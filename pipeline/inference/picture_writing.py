"""Pictures into files of the format that the name says, with their profile and EXIF."""

from __future__ import annotations

import io
import struct
import zlib

import imagecodecs
import numpy as np
from PIL import Image, TiffImagePlugin

from pipeline.cli import UserError
from pipeline.inference.exif import PREFIX, descriptive_tags, parsed
from pipeline.inference.pictures import Picture

WRITTEN = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"})
QUALITY = 95
_PNG_START = 8 + 25  # signature and the chunk IHDR
_TIFF_LIMIT = 2**32 - 2**20  # offsets have 32 bits; the rest is for tags


def encode_picture(picture: Picture, suffix: str) -> bytes:
    """The file's bytes. PNG and TIFF hold everything; JPEG and WebP have 8 bits, JPEG no alpha (it goes over white)."""
    suffix = suffix.lower()
    if suffix == ".png":
        return _png(picture)
    if suffix in (".tif", ".tiff"):
        return _tiff(picture)
    pixels = _as_bytes(picture.pixels)
    options = {"icc_profile": picture.icc_profile} if picture.icc_profile else {}
    if suffix in (".jpg", ".jpeg"):
        image = Image.fromarray(_over_white(pixels))
        options |= {"format": "JPEG", "quality": QUALITY, "subsampling": 0, "optimize": True}
    elif suffix == ".webp":
        image = Image.fromarray(_squeezed(pixels)).convert("RGBA" if pixels.shape[2] in (2, 4) else "RGB")
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


def _png(picture: Picture) -> bytes:
    data = imagecodecs.png_encode(np.ascontiguousarray(_squeezed(picture.pixels)), level=6)
    chunks = b""
    if picture.icc_profile is not None:
        chunks += _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc_profile))
    if picture.exif is not None:
        chunks += _chunk(b"eXIf", picture.exif)
    return data[:_PNG_START] + chunks + data[_PNG_START:]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _tiff(picture: Picture) -> bytes:
    """Deflated, one strip; gray with alpha of 16 bits as RGBA, which more programs read."""
    pixels = picture.pixels
    if pixels.shape[2] == 2 and pixels.dtype == np.uint16:
        pixels = np.concatenate([np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1:]], axis=2)
    height, width, channels = pixels.shape
    differences = np.diff(pixels, axis=1, prepend=pixels.dtype.type(0)).astype(f"<u{pixels.itemsize}", copy=False)
    data = zlib.compress(differences.tobytes())
    if len(data) > _TIFF_LIMIT:
        raise UserError("is larger than a TIFF file can be (4 GiB); write .png")
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if picture.exif is not None:
        for tag, value in descriptive_tags(parsed(picture.exif)).items():
            tags[tag] = value
    for tag, value in {256: width, 257: height, 258: (8 * pixels.itemsize,) * channels, 259: 8,
                       262: 1 if channels < 3 else 2, 273: 0, 277: channels, 278: height, 279: len(data), 284: 1,
                       317: 2}.items():
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


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.dtype == np.uint8 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _over_white(pixels: np.ndarray) -> np.ndarray:
    """Without alpha: composited over white."""
    if pixels.shape[2] in (1, 3):
        return _squeezed(pixels)
    alpha = pixels[..., -1:].astype(np.uint32)
    return _squeezed(((pixels[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8))
