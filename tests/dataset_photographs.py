"""Real photographs for tests, from installed packages, and common manipulations of them."""

from __future__ import annotations

import io
from functools import cache

import cv2
import numpy as np
from PIL import Image

from pipeline.data.image_headers import read_header
from pipeline.data.image_pixels import decode_rgb
from tools.crops.grid import halved
from tools.make_demo_dataset import DATASET, HELD_OUT, _read


@cache
def photographs() -> dict[str, np.ndarray]:
    """Name -> uint8 RGB pixels of ordinary photographs, read-only; lossy ones are halved, as for
    training."""
    pictures = {}
    for photograph in DATASET + HELD_OUT:
        data = _read(photograph)
        header = read_header(io.BytesIO(data))
        pixels = decode_rgb(data, header)
        pictures[photograph.name] = halved(pixels) if header.is_lossy else pixels
        pictures[photograph.name].setflags(write=False)
    return pictures


def resized(
    pixels: np.ndarray, factor: float, kind: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Resize the picture by `factor`."""
    height, width = (round(side * factor) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), kind))


def enlarged(
    pixels: np.ndarray, factor: float, kind: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Reduce by `factor` and enlarge again: a picture with less detail than its size suggests."""
    return resized(resized(pixels, 1 / factor), factor, kind)


def blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(pixels, (0, 0), sigma)


def recompressed(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Encode as JPEG and decode."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))


def brightened(pixels: np.ndarray, levels: int) -> np.ndarray:
    return np.clip(pixels.astype(int) + levels, 0, 255).astype(np.uint8)


def crops(pixels: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut the picture into square crops on a regular grid."""
    height, width = pixels.shape[:2]
    return [
        np.ascontiguousarray(pixels[top : top + size, left : left + size])
        for top in range(0, height - size + 1, size)
        for left in range(0, width - size + 1, size)
    ]
