"""Pictures of any kind as arrays that keep what they are: gray or colours, with or without alpha, 8 or 16 bits."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import torch
from PIL import Image, ImageCms

from pipeline.cli import UserError
from pipeline.inference.exif import ORIENTATION, exif_of, upright
from pipeline.inference.memory import free_bytes

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
