"""Image files as tensors of bytes, for everything that measures or compares. Training reads its files elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipeline.cli import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"})


def read_image(path: Path) -> Tensor:
    """The image as uint8 RGB 1 x 3 x H x W: upright, gray repeated, alpha dropped, 16 bits rounded to 8."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits to 255
                gray = np.clip(np.asarray(image).astype(np.float64) / 257 + 0.5, 0, 255).astype(np.uint8)
                image = Image.fromarray(gray)
            array = np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {str(path)!r} cannot be read ({error}); replace or remove it") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"image {str(path)!r} is too large to be safe ({error}); cut it up") from error
    return torch.from_numpy(array).permute(2, 0, 1)[None].contiguous()
