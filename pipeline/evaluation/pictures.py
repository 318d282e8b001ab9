"""Side-by-side pictures: bicubic, the network and the original, whole and magnified where they differ most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.evaluation.scoring import Compared

PANEL = 448
"""Width of a column, in pixels."""
ZOOM = 4
"""A pixel of the image is a block of this side in the magnified part, wherever the image is large enough."""
GAP = 16
BACKGROUND, TEXT, FAINT, FRAME = (250, 250, 250), (24, 24, 24), (110, 110, 110), (230, 60, 40)


def write_picture(compared: Compared, folder: str | Path, model_name: str) -> Path:
    """Write `<folder>/<image name>.png` with columns bicubic, `model_name` and HR; return where it is.

    Top: the whole images. Below: the square where bicubic is furthest from HR, framed red above, magnified without
    smoothing. Under each its PSNR-Y and SSIM-Y.
    """
    height, width = compared.hr.shape[-2:]
    side = min(PANEL // ZOOM, height, width)
    top, left = _most_different(compared.hr, compared.bicubic, side)
    score = compared.score
    columns = ((compared.bicubic, "bicubic", _caption(score.bicubic)),
               (compared.sr, model_name, _caption(score.model)),
               (compared.hr, "HR (original)", score.name))
    fit = min(PANEL / width, PANEL / height)
    whole = (max(1, round(width * fit)), max(1, round(height * fit)))
    titles = 64
    sheet = Image.new("RGB", (3 * PANEL + 4 * GAP, whole[1] + PANEL + titles + 3 * GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, (pixels, title, caption) in enumerate(columns):
        x = GAP + index * (PANEL + GAP)
        image = Image.fromarray(np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy()))
        inset = x + (PANEL - whole[0]) // 2
        sheet.paste(image.resize(whole, Image.Resampling.LANCZOS), (inset, GAP))
        box = [inset + left * fit, GAP + top * fit, inset + (left + side) * fit, GAP + (top + side) * fit]
        draw.rectangle([round(edge) for edge in box], outline=FRAME, width=2)
        crop = image.crop((left, top, left + side, top + side)).resize((PANEL, PANEL), Image.Resampling.NEAREST)
        below = GAP + whole[1] + GAP
        sheet.paste(crop, (x, below))
        _write_centred(draw, x, below + PANEL + 8, title, 24, TEXT)
        _write_centred(draw, x, below + PANEL + 40, caption, 18, FAINT)
    path = Path(folder) / f"{score.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _most_different(hr: Tensor, bicubic: Tensor, side: int) -> tuple[int, int]:
    """Top and left of the square of `side` in which |HR - bicubic| is largest on average."""
    difference = (hr.float() - bicubic.float()).abs().mean(dim=1, keepdim=True)
    stride = max(1, side // 8)
    means = F.avg_pool2d(difference, side, stride)[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    return row * stride, column * stride


def _caption(metrics: dict[str, float]) -> str:
    return f"{metrics['psnr_y']:.2f} dB PSNR-Y   {metrics['ssim_y']:.4f} SSIM-Y"


def _write_centred(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, size: int,
                   colour: tuple[int, int, int]) -> None:
    font = ImageFont.load_default(size)
    while draw.textlength(text, font=font) > PANEL and len(text) > 4:  # long file names lose their middle
        middle = len(text) // 2
        text = text[: middle - 2] + "…" + text[middle + 1 :]
    draw.text((x + PANEL / 2, y), text, fill=colour, font=font, anchor="ma")
