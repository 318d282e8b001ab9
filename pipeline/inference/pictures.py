"""Pictures of any kind as arrays that keep what they are: gray or colours, with or without alpha, 8 or 16 bits."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import torch
from PIL import Image, ImageCms, TiffImagePlugin

from pipeline.cli import UserError
from pipeline.inference.backends import free_bytes

# EXIF bytes: taken out of any picture, made upright, as the tags of a TIFF file. Always from the TIFF header on.


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
        return _exif_as_bytes(tags) if tags else None
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


def _exif_as_bytes(tags: dict[int, Any]) -> bytes:
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[tag] = value
    return exif.tobytes().removeprefix(PREFIX)


SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".jp2", ".gif",
                      ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".avif"})
_PROFILE_SPACES = {1: b"GRAY", 2: b"GRAY", 3: b"RGB ", 4: b"RGB "}
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB = 0, 1, 2
_TURNS = {2: (0, False, True), 3: (2, False, False), 4: (0, True, False), 5: (1, False, True),
          6: (3, False, False), 7: (3, False, True), 8: (1, False, False)}
"""EXIF orientation -> quarter turns to the left, then whether rows and columns are reversed."""


@dataclass(frozen=True)
class Picture:
    """A picture, upright."""

    pixels: np.ndarray
    """uint8 or uint16, (height, width, channels); 1 channel is gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha."""
    icc_profile: bytes | None = None
    exif: bytes | None = None
    """From the TIFF header on; its orientation, if any, says "as it lies"."""
    num_frames: int = 1
    """Of the file; these are the pixels of the first."""


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width as stored, from the header. Raises what Pillow does where there is none."""
    with Image.open(path) as image:
        return image.height, image.width


def read_picture(path: Path) -> Picture:
    """The picture in a file, with its profile and EXIF, turned upright. `UserError` for one that cannot be read whole.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image)
            turn = _orientation(image)
            profile, exif = image.info.get("icc_profile"), exif_of(image)
            pixels = _deep_pixels(image, data) if _is_deep(image, data) else _byte_pixels(image)
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a phone's JPEG and its preview
    except UserError:
        raise
    except Exception as error:  # decoders meet hostile bytes and raise whatever they like
        reason = "not enough memory to decode it" if isinstance(error, MemoryError) else " ".join(str(error).split())
        raise UserError(f"cannot be read: {reason[:200] or type(error).__name__}") from error
    if profile is not None and profile[16:20] != _PROFILE_SPACES[pixels.shape[2]]:
        profile = None  # of CMYK, say, of which nothing is left
    return Picture(_turned(pixels, turn), profile, None if exif is None else upright(exif), frames)


def _check_size(image: Image.Image) -> None:
    """Refuse what would fill the memory before anything of it is decoded."""
    needed = 2 * 8 * image.width * image.height  # up to 4 channels of 16 bits, and a copy
    if needed > free_bytes(torch.device("cpu")):
        raise UserError(f"{image.width}x{image.height} pixels need {needed / 2**30:.1f} GiB of memory to decode, more "
                        "than is free; cut it up")


def _orientation(image: Image.Image) -> int:
    """EXIF's, or XMP's. The pixels of a TIFF come turned already: by Pillow, and by `_deep_tiff`."""
    return 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)


def _is_deep(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":
        return data[24] == 16
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,))) == 16
    return image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I")


def _deep_pixels(image: Image.Image, data: bytes) -> np.ndarray:
    """16 bits a sample, all of them: Pillow has no such colours."""
    if image.format == "PNG":
        pixels = imagecodecs.png_decode(data)
    elif image.format == "TIFF":
        pixels = _deep_tiff(image, data)
    else:
        pixels = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.dtype != np.uint16 or pixels.shape[:2] != (image.height, image.width) or pixels.shape[2] > 4:
        raise UserError(f"16 bits a sample are read as gray or RGB, with or without alpha; this is {pixels.dtype} "
                        f"{pixels.shape}")
    clear = image.info.get("transparency")
    if image.format == "PNG" and clear is not None and pixels.shape[2] in (1, 3):
        is_clear = (pixels == np.array(clear)).all(axis=2, keepdims=True)
        pixels = np.concatenate([pixels, np.where(is_clear, 0, 65535).astype(np.uint16)], axis=2)
    return pixels


def _deep_tiff(image: Image.Image, data: bytes) -> np.ndarray:
    tags = image.tag_v2
    kind, planes = tags.get(262), tags.get(284, 1)
    if kind not in (_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB) or tags.get(339, (1,))[0] != 1:
        raise UserError("16 bits a sample are read as unsigned gray or RGB only, with or without alpha")
    pixels = imagecodecs.tiff_decode(data)
    if planes == 2 and pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0)
    if kind == _MIN_IS_WHITE:
        pixels = 65535 - pixels
    if tags.get(338, (0,))[0] == 1 and pixels.ndim == 3 and pixels.shape[2] == 4:  # multiplied by alpha
        alpha = pixels[..., 3:].astype(np.float32)
        colours = pixels[..., :3] * (65535 / np.maximum(alpha, 1))
        pixels = np.concatenate([np.clip(np.rint(colours), 0, 65535).astype(np.uint16), pixels[..., 3:]], axis=2)
    return _turned(pixels, tags.get(ORIENTATION, 1))


def _byte_pixels(image: Image.Image) -> np.ndarray:
    """8 bits a sample, with the fewest channels that hold all of it."""
    image.load()  # raises where it is cut off
    has_alpha = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    if image.mode in ("1", "L", "LA", "La"):
        mode = "LA" if has_alpha else "L"
        if image.mode == "La" or "transparency" in image.info:
            image = image.convert("RGBA")
    elif image.mode in ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
        mode = "RGBA" if has_alpha else "RGB"
    else:
        raise UserError(f"pixels of mode {image.mode!r} are not read; convert it to 8 or 16 bits")
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        image = _by_profile(image)
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], -1)


def _by_profile(image: Image.Image) -> Image.Image:
    """Inks to sRGB as their profile says; a broken profile is passed over."""
    try:
        inks = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        return ImageCms.profileToProfile(image, inks, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1..8; others mean upright)."""
    turns, rows, columns = _TURNS.get(orientation, (0, False, False))
    if rows or columns:
        pixels = pixels[:: -1 if rows else 1, :: -1 if columns else 1]
    return np.ascontiguousarray(np.rot90(pixels, turns))


# Pictures into files of the format that the name says, with their profile and EXIF.


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
