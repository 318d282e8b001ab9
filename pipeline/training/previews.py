"""Previews: the same pictures, upscaled during training, which show what the network has learnt.

<log dir>/samples/<picture>/step-00000400.png       bicubic | SR | HR, side by side, with PSNR

At x1, the first is the input itself. In a run of 16 bits the sheets have 16 bits as well.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.cli import UserError
from pipeline.config.recipe import Recipe
from pipeline.data.dataset import Dataset
from pipeline.data.dataset import Image as ImageFile
from pipeline.data.image_files import is_encoded, is_npy
from pipeline.data.image_pixels import in_depth, to_8_bits
from pipeline.files import write_atomically
from pipeline.images import border_of, depth_of
from pipeline.metrics import METRICS, load_measures, measure
from pipeline.training.validation import ValidationPair, enlarged_input, read_pair

PREVIEWS_DIR = "samples"  # the name that existing run folders use
ENLARGED = 320  # pixels; smaller pictures are enlarged up to this by a whole factor
GAP, CAPTION = 8, 28  # pixels between and around panels; height of the caption below them
BACKGROUND, TEXT = (250, 250, 250), (24, 24, 24)
FONT_SIZES = range(16, 7, -1)  # the largest one that fits is used
FROM_LIST, MOST_NAMED = 3, 16  # default number of validation images; limit without previews.count
TOO_SMALL = "name a larger picture in previews.files"


def read_previews(recipe: Recipe, dataset: Dataset) -> list[ValidationPair]:
    """Read the recipe's preview pictures, LR and HR.

    Pictures larger than `previews.side` are cropped to their centre. Raises `UserError` for one
    that cannot be read, is too small, or has no LR.
    """
    spec = recipe.previews
    if spec.count == 0:
        return []
    if spec.files:
        if any(recipe.data.degradation.paired_folders):
            raise UserError(
                "previews.files: this recipe reads LR files, so its previews are taken from the "
                "validation list; omit previews.files"
            )
        images = _named(spec.files)[: spec.count]
        if spec.count is None and len(images) > MOST_NAMED:
            raise UserError(
                f"previews.files: {len(images)} images are too many to upscale repeatedly; name at "
                f"most {MOST_NAMED}, or set previews.count"
            )
        chosen = list(range(len(images)))
    else:
        images = dataset.validation
        count = min(len(images), FROM_LIST if spec.count is None else spec.count)
        # Evenly spaced, because neighbours in the list may be crops of the same photograph.
        chosen = [i * len(images) // count for i in range(count)]
    way_out = TOO_SMALL if spec.files else ""
    return [
        _middle(read_pair(images[i], i, recipe, way_out), spec.side, recipe.scale) for i in chosen
    ]


def _named(names: Sequence[str]) -> list[ImageFile]:
    found: list[Path] = []
    for path in (Path(name).expanduser() for name in names):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        images = [file for file in inside if is_npy(file) or is_encoded(file)]
        if not images or not images[0].is_file():
            what = "no such file" if not path.exists() else "not an image that training can read"
            raise UserError(
                f"previews.files: {path}: {what}; name images (PNG, JPEG, WebP, …) or a folder of "
                "images"
            )
        found += images
    return [ImageFile(path.name, str(path), None) for path in found]


def _middle(pair: ValidationPair, side: int, scale: int) -> ValidationPair:
    height, width = pair.lr.shape[-2:]
    most = max(1, side // scale)
    top, left = (max(0, whole - most) // 2 for whole in (height, width))
    inside = (..., slice(top, top + most), slice(left, left + most))
    large = (
        ...,
        slice(top * scale, (top + most) * scale),
        slice(left * scale, (left + most) * scale),
    )
    return ValidationPair(pair.name, pair.hr[large].contiguous(), pair.lr[inside].contiguous())


class Previews:
    """The preview sheets of a run.

    Sheets of steps after `step` belong to lost work; they are deleted.
    """

    def __init__(
        self, folder: Path, pairs: Sequence[ValidationPair], scale: int, step: int
    ) -> None:
        self.pairs = list(pairs)
        self._border = border_of(scale)
        self._folders = _folders(folder, [pair.name for pair in pairs])
        title = "bicubic" if scale > 1 else "input"
        self._inputs = [self._captioned(enlarged_input(pair), pair, title) for pair in pairs]
        for sheet in folder.glob("*/step-*.png"):
            number = re.fullmatch(r"step-(\d+)", sheet.stem)
            if number and int(number[1]) > step:
                with suppress(OSError):
                    sheet.unlink()

    def write(self, step: int, outputs: Sequence[Tensor]) -> None:
        """Write a sheet for each picture.

        `outputs`: the network's output for each, pixels (1, 3, height, width) of its pair's type,
        on the CPU. Raises `OSError` if a file cannot be written.
        """
        for pair, before, sr, folder in zip(
            self.pairs, self._inputs, outputs, self._folders, strict=True
        ):
            panels = [before, self._captioned(sr, pair, f"step {step}"), (pair.hr, "HR")]
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"step-{step:08d}.png", _sheet(panels))

    def _captioned(self, image: Tensor, pair: ValidationPair, name: str) -> tuple[Tensor, str]:
        score = measure(image, pair.hr, self._border, load_measures([METRICS["psnr_y"]]))["psnr_y"]
        return image, f"{name}  {METRICS['psnr_y'].limited(score):.2f} dB"


def _folders(root: Path, names: Sequence[str]) -> list[Path]:
    """Return a folder for each name, all different."""
    folders: list[Path] = []
    for name in names:
        plain = re.sub(r"[^\w.-]+", "-", str(Path(name).with_suffix(""))).strip("-.") or "picture"
        folder, number = root / plain, 2
        while folder in folders:
            folder, number = root / f"{plain}-{number}", number + 1
        folders.append(folder)
    return folders


@functools.cache
def _fonts() -> list[ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    return [ImageFont.load_default(size) for size in FONT_SIZES]


def _sheet(panels: Sequence[tuple[Tensor, str]]) -> bytes:
    """Encode a PNG of the panels side by side, each with its caption.

    Small panels are enlarged by a whole factor, without interpolation.
    """
    height, width = panels[0][0].shape[-2:]
    zoom = max(1, ENLARGED // max(height, width))
    height, width = height * zoom, width * zoom
    sheet = Image.new(
        "RGB", (len(panels) * (width + GAP) + GAP, height + GAP + CAPTION), BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    places: list[tuple[int, np.ndarray]] = []  # left edge and pixels of each panel
    for number, (pixels, caption) in enumerate(panels):
        x = GAP + number * (width + GAP)
        places.append((x, _enlarged(pixels, zoom)))
        sheet.paste(Image.fromarray(to_8_bits(places[-1][1])), (x, GAP))
        font = next(
            (font for font in _fonts() if draw.textlength(caption, font=font) <= width),
            _fonts()[-1],
        )
        draw.text(
            (x + width / 2, height + GAP + CAPTION / 2), caption, fill=TEXT, font=font, anchor="mm"
        )
    if depth_of(panels[0][0]) == 16:
        deep = in_depth(np.asarray(sheet), 16)
        for x, image in places:
            deep[GAP : GAP + height, x : x + width] = image
        return imagecodecs.png_encode(deep, level=1)
    written = io.BytesIO()
    sheet.save(written, format="PNG", compress_level=1)
    return written.getvalue()


def _enlarged(image: Tensor, zoom: int) -> np.ndarray:
    """Return an image (1, 3, height, width) as an array, each pixel as a block of `zoom` pixels."""
    pixels = image[0].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(pixels.repeat(zoom, 0).repeat(zoom, 1))


def every_nth(count: int, most: int) -> int:
    """Return the smallest n for which taking every n-th of `count` gives at most `most`."""
    return count // (most + 1) + 1
