"""The images of a comparison: read, held against the first, cut and scored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cli import UserError
from tools.common.image_headers import BadImageError, read_header
from tools.compare.boxes import Box
from tools.images import MAX_MEGAPIXELS, check_megapixels, decode_photo

_ROWS = 256  # scored at once: whole photographs of int32 would fill the memory


@dataclass(frozen=True)
class Result:
    """An image (uint8 RGB) under its label; `ratio` is how many times smaller it is than the first."""

    label: str
    pixels: np.ndarray
    ratio: int

    def crop(self, box: Box) -> np.ndarray:
        """The pixels of a box in the first image's raster: where `ratio` is above 1, every pixel is a block."""
        left, top, right, bottom = box.edges
        rows, columns = np.arange(top, bottom) // self.ratio, np.arange(left, right) // self.ratio
        return np.ascontiguousarray(self.pixels[rows[:, None], columns])


def column_labels(paths: Sequence[Path], given: Sequence[str], is_ascii: bool) -> list[str]:
    """`given`, or else the files' names, with those of their folders where files are called alike."""
    if given and len(given) != len(paths):
        raise UserError(f"--labels: {len(given)} names for {len(paths)} images; give one each")
    labels = list(given) or _distinct_names(paths)
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: two images of this name; tell them apart with --labels")
    for label in labels:
        if is_ascii and not (label.isascii() and label.isprintable()):
            raise UserError(f"label {label!r}: the built-in font has ASCII letters only; give --labels, or --font FILE")
    return labels


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    names = [path.stem for path in paths]
    folders = [path.expanduser().resolve().parent.name for path in paths]
    if len(names) > 1 and len(set(names)) == 1:
        return folders
    counts = Counter(names)
    return [f"{folder}/{name}" if counts[name] > 1 else name for folder, name in zip(folders, names, strict=True)]


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 RGB (height, width, 3)."""
    path = path.expanduser()
    try:
        with open(path, "rb") as file:
            header = read_header(file)
            check_megapixels(header, MAX_MEGAPIXELS)
            file.seek(0)
            return decode_photo(file.read(), header)
    except (OSError, BadImageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: {reason}; give image files, such as hr.png bicubic.png vapsr.png") from error


def ratio_to_first(path: Path, image: np.ndarray, first: np.ndarray) -> int:
    """How many times smaller an image is than the first: a whole number, the same both ways."""
    ratio = first.shape[0] // image.shape[0]
    if ratio < 1 or (image.shape[0] * ratio, image.shape[1] * ratio) != first.shape[:2]:
        raise UserError(f"{path}: {image.shape[0]}x{image.shape[1]} and the first image's {first.shape[0]}x"
                        f"{first.shape[1]} (height x width) are no results of one photograph: every image must be as "
                        "large as the first, or smaller by a whole factor; name the largest first")
    return ratio


def psnr_y(one: np.ndarray, other: np.ndarray) -> float:
    """PSNR in dB of two uint8 RGB images on rounded BT.601 luma, as evaluate.py's `psnr_y`; infinite where equal."""
    error = 0
    for top in range(0, len(one), _ROWS):
        difference = _luma(one[top : top + _ROWS]) - _luma(other[top : top + _ROWS])
        error += int(np.square(difference).sum(dtype=np.int64))
    return math.inf if error == 0 else 10 * math.log10(255**2 * one.shape[0] * one.shape[1] / error)


def _luma(image: np.ndarray) -> np.ndarray:
    """BT.601 studio-range Y, 16 + (65.481 R + 128.553 G + 24.966 B) / 255, rounded, halves up: int32, exact.

    evaluate.py computes it in float64, which rounds 39 of the 2^24 colours, all of them halves, to the other side.
    """
    red, green, blue = (image[..., channel].astype(np.int32) for channel in range(3))
    return (65481 * red + 128553 * green + 24966 * blue + 127500) // 255000 + 16
