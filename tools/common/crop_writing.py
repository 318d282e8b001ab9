"""One photograph to its crops on disk: what images_to_data.py does on every thread."""

from __future__ import annotations

import hashlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from pipeline.cli import UserError
from tools.common.crop_grid import Crop, cover_grid, crop_grid, pyramid
from tools.common.image_headers import BadImageError, read_header
from tools.common.manifest import CropRecord
from tools.common.photo_decoding import check_megapixels, decode_photo

_OURS = re.compile(r"x\d+_\d+_\d+\.(npy|png|webp)(\.tmp)?")


@dataclass(frozen=True)
class CropSettings:
    """What decides the bytes of a dataset; see images_to_data.py for each."""

    size: int
    format: str
    seed: int
    cover: bool
    keep_lossy_size: bool
    num_scales: int | None
    max_megapixels: float


@dataclass(frozen=True)
class PhotoResult:
    """What became of one photograph: its crops, or the reason why there are none."""

    photo: str
    records: tuple[CropRecord, ...] = ()
    pixels: int = 0
    reason: str = ""
    is_bad: bool = False  # it could not be read or decoded (rather than being too small)


def make_crops(photo: str, photos: Path, out: Path, settings: CropSettings) -> PhotoResult:
    """Decode `photos/photo` and write its crops below `out/photo/`. Bad photographs are a result, not an exception.

    Raises `UserError` where the crops cannot be written (disk full, no permission).
    """
    try:
        with open(photos / photo, "rb") as file:
            status = os.fstat(file.fileno())
            header = read_header(file)
            check_megapixels(header, settings.max_megapixels)
            first = 2 if header.is_lossy and not settings.keep_lossy_size else 1
            if min(header.height, header.width) // first < settings.size:
                return PhotoResult(photo, reason=_too_small(header.height, header.width, first, settings.size))
            file.seek(0)
            pixels = decode_photo(file.read(), header)
    except BadImageError as error:
        return PhotoResult(photo, reason=str(error), is_bad=True)
    except OSError as error:
        return PhotoResult(photo, reason=f"could not be read: {error.strerror or error}", is_bad=True)
    try:
        crops = _write_crops(photo, pixels, first, out, settings)
    except OSError as error:
        raise UserError(f"{out}: a crop of {photo} cannot be written: {error.strerror or error}; make room or mend "
                        "the permissions, then run the same command again: it goes on where it stopped") from error
    records = tuple(CropRecord(path, photo, scale, crop.top, crop.left, settings.size, size, digest, status.st_size,
                               status.st_mtime_ns, len(crops)) for path, scale, crop, size, digest in crops)
    return PhotoResult(photo, records, pixels.shape[0] * pixels.shape[1])


def _too_small(height: int, width: int, first: int, size: int) -> str:
    """Why a photograph of this size gives no crop."""
    halved = f" ({height // 2}x{width // 2} after halving a lossy photo)" if first == 2 else ""
    return f"too small: {height}x{width}{halved} holds no crop of {size}x{size}"


def _write_crops(photo: str, pixels: np.ndarray, first: int, out: Path,
                 settings: CropSettings) -> list[tuple[str, int, Crop, int, str]]:
    """(Path relative to `out`, scale, crop, bytes, sha256 of the pixels) of every crop written."""
    folder = out / photo
    folder.mkdir(parents=True, exist_ok=True)
    remove_crops(folder)  # of an earlier state of the photograph, or of a run that was killed here
    written = []
    for scale, reduced in pyramid(pixels, settings.size, first, settings.num_scales):
        height, width = reduced.shape[:2]
        if settings.cover:
            crops = cover_grid(height, width, settings.size)
        else:
            crops = crop_grid(height, width, settings.size, f"{settings.seed}/{scale}/{photo}")
        for crop in crops:
            window = reduced[crop.top : crop.top + settings.size, crop.left : crop.left + settings.size]
            window = np.ascontiguousarray(window)
            name = f"x{scale}_{crop.row:03d}_{crop.column:03d}.{settings.format}"
            content = encode(window, settings.format)
            temporary = folder / f"{name}.tmp"
            temporary.write_bytes(content)
            os.replace(temporary, folder / name)
            written.append((f"{photo}/{name}", scale, crop, len(content), hashlib.sha256(window).hexdigest()))
    return written


def remove_crops(folder: Path) -> None:
    """Delete the crops and half-written crops in a photograph's folder, and nothing else."""
    for entry in list(os.scandir(folder)):
        if _OURS.fullmatch(entry.name):
            os.unlink(entry.path)


def encode(pixels: np.ndarray, form: str) -> bytes:
    """uint8 RGB (height, width, 3) as the content of an npy, png or (lossless) webp file, bit-exact in each."""
    if form == "npy":
        file = io.BytesIO()
        np.lib.format.write_array(file, pixels, version=(1, 0))
        return file.getvalue()
    if form == "png":
        is_done, content = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        assert is_done
        return content.tobytes()
    file = io.BytesIO()
    # Method 0 encodes 10 times faster than the default, for files 10 % larger; PNG's are larger still.
    Image.fromarray(pixels).save(file, "webp", lossless=True, method=0, quality=20)
    return file.getvalue()
