"""A sheet of LR/HR pairs as training sees them, with what was drawn for each in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.config.specs import DataSpec
from pipeline.data.degradations.base import Parameters
from pipeline.data.source import Sample
from tools.compare.figure import BACKGROUND, FAINT, TEXT, magnified

GAP, BETWEEN = 14, 4  # pixels around a cell; between LR and HR
TEXT_WIDTH = 380  # at least, so that small crops have room for their words
LETTERS, LINE = 12, 16
MOST_LINES = 12  # of a cell, for the estimate of a sheet's size
ASPECT = 1.4  # of a sheet: a screen's, about


class Pair(NamedTuple):
    """One sample: what was drawn, under which name its file goes, and its pixels, uint8 RGB (height, width, 3)."""

    sample: Sample
    name: str
    hr: np.ndarray
    lr: np.ndarray


@dataclass(frozen=True)
class Cell:
    """Measures in pixels of a pair of crops of `crop` HR pixels, magnified as far as fits `panel`."""

    crop: int
    panel: int

    @property
    def side(self) -> int:
        return self.crop * max(1, self.panel // self.crop)

    @property
    def width(self) -> int:
        return max(2 * self.side + BETWEEN, TEXT_WIDTH)

    def sheet_pixels(self, count: int) -> int:
        """About how many pixels a sheet of `count` cells has; it will hardly have more."""
        return count * (self.width + GAP) * (self.side + GAP + MOST_LINES * LINE)


def sheet(title: str, pairs: Sequence[Pair], spec: DataSpec, scale: int, panel: int) -> Image.Image:
    """All pairs under a title: LR in blocks of the HR pixels' size, HR right of it, words below them."""
    cell, letters = Cell(spec.crop, panel), ImageFont.load_default(LETTERS)
    texts = [_wrapped(describe(pair, spec, scale), cell.width, letters) for pair in pairs]
    height = cell.side + GAP + LINE * max(map(len, texts))
    columns = min(len(pairs), max(1, round(math.sqrt(ASPECT * len(pairs) * height / (cell.width + GAP)))))
    rows = [range(first, min(first + columns, len(pairs))) for first in range(0, len(pairs), columns)]
    heights = [cell.side + 2 * GAP + LINE * max(len(texts[i]) for i in row) for row in rows]
    head = _wrapped([title], columns * (cell.width + GAP) - GAP, letters)
    size = columns * (cell.width + GAP) + GAP, 2 * GAP + LINE * len(head) + sum(heights)
    picture = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    _write(draw, GAP, GAP, head, letters)
    top = 2 * GAP + LINE * len(head)
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = GAP + column * (cell.width + GAP)
            picture.paste(Image.fromarray(side_by_side(pairs[i], scale, panel)), (left, top))
            _write(draw, left, top + cell.side + BETWEEN, texts[i], letters)
        top += row_height
    return picture


def side_by_side(pair: Pair, scale: int, panel: int) -> np.ndarray:
    """LR | HR, uint8 RGB, each pixel of either a block of whole pixels."""
    lr = pair.lr.repeat(scale, 0).repeat(scale, 1)
    left, right = (magnified(image, panel, smooth=False) for image in (lr, pair.hr))
    space = np.full((len(left), BETWEEN, 3), BACKGROUND, np.uint8)
    return np.concatenate([left, space, right], 1)


def describe(pair: Pair, spec: DataSpec, scale: int) -> list[str]:
    """Everything drawn for a sample, in words: which file first, then how it was turned and degraded."""
    sample = pair.sample
    turns = [word for is_so, word in ((sample.flip_vertical, "flipped vertically"),
                                      (sample.flip_horizontal, "flipped horizontally"),
                                      (sample.transpose, "transposed")) if is_so]
    crop = f"row {sample.top}, column {sample.left} | {', '.join(turns) or 'not turned'}"
    if sample.brightness != 1:
        crop += f" | brightness x{sample.brightness:.3f}"
    lines = [f"sample {sample.number}: {_ascii(pair.name)}", crop]
    if spec.degradation.name == "realesrgan":
        lines += _second_order_words(sample.degradation, scale)
    elif spec.degradation.name == "paired":
        lines.append(f"LR: {_ascii(str(sample.lr_path))}")
    else:
        numbers = "".join(f", {name} {_number(value)}" for name, value in sample.degradation.items())
        lines.append(f"{spec.degradation.name} to 1/{scale}{numbers}")
    if sample.noise_sigma:
        lines.append(f"noise on LR: sigma {sample.noise_sigma:.2f}")
    return lines + [f"instead of {_ascii(skip.path)}: {skip.reason}" for skip in sample.skipped]


def _second_order_words(drawn: Parameters, scale: int) -> list[str]:
    """A line for each round, in the order in which its steps were taken."""
    first, second, final = drawn["first"], drawn["second"], drawn["final"]
    end = f"{final['mode']} to 1/{scale}"
    if "sinc" in final:
        end += ", sinc {} px, cutoff {:.2f}".format(*final["sinc"])
    jpeg = f"JPEG {second['jpeg']}"
    return [f"1: {_round_words(first)} | JPEG {first['jpeg']}", f"2: {_round_words(second)}",
            "3: " + " | ".join([end, jpeg] if final["sinc_first"] else [jpeg, end])]


def _round_words(drawn: Parameters) -> str:
    height, width = drawn["size"]
    resize = "keep" if drawn["resize"] == "keep" else f"{drawn['resize']} to {drawn['factor']:.2f}"
    noise = {"gaussian": "Gaussian sigma", "poisson": "Poisson"}[drawn["noise"]]
    return " | ".join([_blur_words(drawn["blur"]), f"{resize}, {drawn['mode']}, {height}x{width}",
                       f"{noise} {drawn['level']:.2f}{', gray' if drawn['gray'] else ''}"])


def _blur_words(blur: Parameters) -> str:
    if blur["shape"] == "none":
        return "no blur"
    words = f"{'' if blur['shape'] == 'sinc' else 'blur '}{blur['shape']} {blur['size']} px"
    if "cutoff" in blur:
        return f"{words}, cutoff {blur['cutoff']:.2f}"
    words += f", sigma {blur['sigma'][0]:.2f}"
    if "theta" in blur:
        words += f"/{blur['sigma'][1]:.2f} at {math.degrees(blur['theta']):.0f} deg"
    return words + (f", beta {blur['beta']:.2f}" if "beta" in blur else "")


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _ascii(text: str) -> str:
    """What the built-in font can show."""
    return text.encode("ascii", "backslashreplace").decode()


def _wrapped(lines: Sequence[str], width: int, letters: ImageFont.FreeTypeFont) -> list[str]:
    """Lines no wider than `width` pixels, broken at spaces, or within a word that is wider; the rest is indented."""
    wrapped: list[str] = []
    for line in lines:
        begun = ""
        for word in line.split(" "):
            if begun.strip() and letters.getlength(f"{begun} {word}") > width:
                wrapped.append(begun)
                begun = "   "
            begun = f"{begun} {word}" if begun else word
            while letters.getlength(begun) > width:
                fits = next(end for end in range(len(begun) - 1, 0, -1) if letters.getlength(begun[:end]) <= width)
                wrapped.append(begun[:fits])
                begun = f"    {begun[fits:]}"
        wrapped.append(begun)
    return wrapped


def _write(draw: ImageDraw.ImageDraw, left: int, top: int, lines: Sequence[str],
           letters: ImageFont.FreeTypeFont) -> None:
    for number, line in enumerate(lines):
        draw.text((left, top + number * LINE), line, fill=FAINT if number else TEXT, font=letters)
