"""Side-by-side pictures: bicubic, the models and the original, whole and magnified.

At x1 the input takes the place of bicubic. The magnified part is where it differs most from the
original.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.evaluation.scoring import Views
from pipeline.files import write_atomically

PANEL = 448
"""Width of a column, in pixels."""
ZOOM = 4
"""Magnification of the lower part, if the image is large enough."""
GAP = 16
BACKGROUND, TEXT, FAINT, FRAME = (250, 250, 250), (24, 24, 24), (110, 110, 110), (230, 60, 40)


@dataclass(frozen=True)
class Column:
    """An image of the sheet, with its title and caption."""

    pixels: Tensor
    title: str
    caption: str


def write_views(views: Views, folder: str | Path) -> Path:
    """Write `<folder>/<image name>.png` with a column each for bicubic, every model and HR.

    At x1 the input takes the place of bicubic. The top row shows the whole images. Below is the
    square where the first differs most from HR, framed in red above and magnified without
    smoothing, then PSNR-Y and SSIM-Y of the image. Returns the file's path.
    """
    scores = views.scores
    columns = [
        Column(pixels, method, _caption(scores.methods[method]))
        for method, pixels in views.pixels.items()
        if method != "nearest"
    ]
    columns.append(Column(views.hr, "HR (original)", scores.name))
    path = Path(folder) / f"{scores.name}.png"
    height, width = columns[-1].pixels.shape[-2:]
    side = min(PANEL // ZOOM, height, width)
    top, left = most_different(columns[-1].pixels, columns[0].pixels, side)
    fit = min(PANEL / width, PANEL / height)
    whole = (max(1, round(width * fit)), max(1, round(height * fit)))
    titles = 64
    size = (len(columns) * (PANEL + GAP) + GAP, whole[1] + PANEL + titles + 3 * GAP)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, column in enumerate(columns):
        x = GAP + index * (PANEL + GAP)
        image = Image.fromarray(np.ascontiguousarray(column.pixels[0].permute(1, 2, 0).numpy()))
        inset = x + (PANEL - whole[0]) // 2
        sheet.paste(image.resize(whole, Image.Resampling.LANCZOS), (inset, GAP))
        box = [
            inset + left * fit,
            GAP + top * fit,
            inset + (left + side) * fit,
            GAP + (top + side) * fit,
        ]
        draw.rectangle([round(edge) for edge in box], outline=FRAME, width=2)
        crop = image.crop((left, top, left + side, top + side)).resize(
            (PANEL, PANEL), Image.Resampling.NEAREST
        )
        below = GAP + whole[1] + GAP
        sheet.paste(crop, (x, below))
        _write_centred(draw, x, below + PANEL + 8, column.title, 24, TEXT)
        _write_centred(draw, x, below + PANEL + 40, column.caption, 18, FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = io.BytesIO()
    sheet.save(encoded, "png")
    write_atomically(path, encoded.getvalue())
    return path


def most_different(first: Tensor, second: Tensor, side: int) -> tuple[int, int]:
    """Return top and left of the `side` x `side` square with the largest mean |first - second|."""
    return largest_square((first.float() - second.float()).abs().mean(dim=1, keepdim=True), side)


def largest_square(values: Tensor, side: int) -> tuple[int, int]:
    """Return top and left of the `side` x `side` square with the largest mean of a map.

    The map is 1 x 1 x H x W. The square is searched for in steps of an eighth of its side.
    """
    stride = max(1, side // 8)
    means = F.avg_pool2d(values, side, stride)[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    return row * stride, column * stride


def _caption(metrics: dict[str, float]) -> str:
    return f"{metrics['psnr_y']:.2f} dB PSNR-Y   {metrics['ssim_y']:.4f} SSIM-Y"


def _write_centred(
    draw: ImageDraw.ImageDraw, x: int, y: int, text: str, size: int, colour: tuple[int, int, int]
) -> None:
    font = ImageFont.load_default(size)
    # The name of an image may contain line breaks and bytes that are not UTF-8.
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    while draw.textlength(text, font=font) > PANEL and len(text) > 4:  # shorten in the middle
        middle = len(text) // 2
        text = text[: middle - 2] + "…" + text[middle + 1 :]
    draw.text((x + PANEL / 2, y), text, fill=colour, font=font, anchor="ma")
