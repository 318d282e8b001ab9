"""Figures as in papers: a photograph with coloured boxes, and magnified crops of several results.

The results are labelled (`column_labels`), compared in size with the first (`ratio_to_first`) and
scored (`psnr_y`); `figure` assembles the picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.cli import UserError
from pipeline.libraries import cv2
from tools.compare.boxes import Box

BACKGROUND, TEXT, FAINT = (255, 255, 255), (20, 20, 20), (90, 90, 90)
ELLIPSIS = "…"


# --- The images of a comparison ---


@dataclass(frozen=True)
class Result:
    """An image (uint8 RGB) with its label; `ratio` is the first image's size relative to it."""

    label: str
    pixels: np.ndarray
    ratio: int

    def crop(self, box: Box) -> np.ndarray:
        """Pixels of a box in the first image's raster.

        If `ratio` is above 1, every pixel becomes a block.
        """
        left, top, right, bottom = box.edges
        rows, columns = np.arange(top, bottom) // self.ratio, np.arange(left, right) // self.ratio
        return np.ascontiguousarray(self.pixels[rows[:, None], columns])


def column_labels(paths: Sequence[Path], given: Sequence[str], is_ascii: bool) -> list[str]:
    """Return `given`, or the file names, with their folders if file names repeat."""
    if given and len(given) != len(paths):
        raise UserError(f"--labels: {len(given)} names for {len(paths)} images; give one per image")
    labels = list(given) or _distinct_names(paths)
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: two images have this name; give different ones with --labels")
    for label in labels:
        if not label.isprintable():
            raise UserError(
                f"label {label!r}: line breaks and bytes that are not UTF-8 cannot be drawn; give "
                "--labels"
            )
        if is_ascii and not label.isascii():
            raise UserError(
                f"label {label!r}: the built-in font only has ASCII letters; give --labels, or "
                "--font FILE"
            )
    return labels


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    names = [path.stem for path in paths]
    folders = [path.expanduser().resolve().parent.name for path in paths]
    if len(names) > 1 and len(set(names)) == 1:
        return folders
    counts = Counter(names)
    return [
        f"{folder}/{name}" if counts[name] > 1 else name
        for folder, name in zip(folders, names, strict=True)
    ]


def ratio_to_first(path: Path, image: np.ndarray, first: np.ndarray) -> int:
    """Size of the first image relative to an image: an integer, the same in both directions."""
    ratio = first.shape[0] // image.shape[0]
    if ratio < 1 or (image.shape[0] * ratio, image.shape[1] * ratio) != first.shape[:2]:
        raise UserError(
            f"{path}: {image.shape[0]}x{image.shape[1]} does not match the first image's "
            f"{first.shape[0]}x{first.shape[1]} (height x width): every image must have the size "
            "of the first or be smaller by an integer factor; put the largest first"
        )
    return ratio


def psnr_y(one: np.ndarray, other: np.ndarray) -> float:
    """Return evaluate.py's `psnr_y` of two uint8 RGB images, in dB; infinite if they are equal."""
    import torch

    from pipeline.metrics import psnr_ssim

    return psnr_ssim.psnr_y(
        *(
            torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
            for image in (one, other)
        )
    )


# --- The picture ---


@dataclass(frozen=True)
class Style:
    """Dimensions of a comparison figure in pixels, and its font.

    Without a font, the one built into Pillow is used.
    """

    panel: int = 240  # longest side of a magnified crop
    font: Path | None = None

    @property
    def frame(self) -> int:
        """Width of the coloured frame around a crop."""
        return max(2, self.panel // 60)

    @property
    def gap(self) -> int:
        """Distance between crops."""
        return max(4, self.panel // 24)

    def letters(self, scale: float = 1.0) -> ImageFont.FreeTypeFont:
        """The font in a size that suits the crops."""
        size = max(10, round(self.panel / 11 * scale))
        return (
            ImageFont.truetype(str(self.font), size) if self.font else ImageFont.load_default(size)
        )


@dataclass(frozen=True)
class FigureColumn:
    """One result: its label, a note below it, and a magnified crop with a caption per box.

    An empty note is not drawn.
    """

    label: str
    note: str
    crops: Sequence[np.ndarray]  # uint8 RGB
    captions: Sequence[str]


def figure(
    image: np.ndarray,
    boxes: Sequence[Box],
    columns: Sequence[FigureColumn],
    style: Style,
    wrap: int | None = None,
) -> Image.Image:
    """Draw the annotated photograph on the left, as high as the grid of crops on the right.

    With one box and at least three results, the crops are in two rows, as is common in papers;
    `wrap` overrides this.
    """
    if wrap is None and len(boxes) == 1 and len(columns) > 2:
        wrap = -(-len(columns) // 2)
    crops = strip(boxes, columns, style, wrap)
    room = crops.height - 2 * style.gap
    scale = min(room / image.shape[0], 2 * crops.width / image.shape[1])
    photo = annotated(image, boxes, scale, line=style.frame)
    sheet = Image.new("RGB", (style.gap + photo.width + crops.width, crops.height), BACKGROUND)
    sheet.paste(photo, (style.gap, style.gap + (room - photo.height) // 2))
    sheet.paste(crops, (style.gap + photo.width, 0))
    return sheet


def magnified(crop: np.ndarray, panel: int, smooth: bool) -> np.ndarray:
    """Magnify a crop by the largest integer factor that fits `panel` (at least 1).

    Every pixel becomes a block of the same size; `smooth` uses cubic interpolation instead.
    """
    factor = max(1, panel // max(crop.shape[:2]))
    size = crop.shape[1] * factor, crop.shape[0] * factor
    return cv2.resize(
        crop, size, interpolation=cv2.INTER_CUBIC if smooth and factor > 1 else cv2.INTER_NEAREST
    )


def annotated(
    image: np.ndarray, boxes: Sequence[Box], scale: float = 1.0, line: int | None = None
) -> Image.Image:
    """Draw the boxes around their pixels on the photograph (uint8 RGB), resized by `scale`.

    Lines are `line` pixels wide, by default 1/200 of the longer side, with a white hairline that
    separates them from a background of the same colour. They are outside of the box, except at the
    edge of the image.
    """
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    picture = Image.fromarray(image)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    line = line or max(2, round(max(height, width) / 200))
    draw = ImageDraw.Draw(picture)
    for box in boxes:
        left, top, right, bottom = (round(edge * scale) for edge in box.edges)
        for grown, colour, thickness in ((line + 1, (255, 255, 255), 1), (line, box.rgb, line)):
            outer = (
                max(0, left - grown),
                max(0, top - grown),
                min(width, right + grown) - 1,
                min(height, bottom + grown) - 1,
            )
            draw.rectangle(outer, outline=colour, width=thickness)
    return picture


def strip(
    boxes: Sequence[Box], columns: Sequence[FigureColumn], style: Style, wrap: int | None = None
) -> Image.Image:
    """Arrange crops in a grid: one row per box, one column per result, `wrap` columns at most.

    Further results follow in another grid below.
    """
    wrap = min(wrap or len(columns), len(columns))
    grids = [
        _grid(boxes, columns[start : start + wrap], style) for start in range(0, len(columns), wrap)
    ]
    height = sum(grid.height for grid in grids) + style.gap * (len(grids) - 1)
    sheet = Image.new("RGB", (max(grid.width for grid in grids), height), BACKGROUND)
    top = 0
    for grid in grids:
        sheet.paste(grid, (0, top))
        top += grid.height + style.gap
    return sheet


def _grid(boxes: Sequence[Box], columns: Sequence[FigureColumn], style: Style) -> Image.Image:
    """Draw the labels, and below them the crops of every box in coloured frames with captions."""
    frame, gap, letters, small = style.frame, style.gap, style.letters(), style.letters(0.8)
    cell = max(crop.shape[1] for column in columns for crop in column.crops) + 2 * frame
    head = _line_height(letters) + (
        _line_height(small) if any(column.note for column in columns) else 0
    )
    foot = _line_height(small) if any(any(column.captions) for column in columns) else 0
    rows = [
        max(column.crops[row].shape[0] for column in columns) + 2 * frame + foot
        for row in range(len(boxes))
    ]
    size = len(columns) * (cell + gap) + gap, gap + head + sum(rows) + len(rows) * gap
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, column in enumerate(columns):
        left, top = gap + index * (cell + gap), gap
        _write(draw, left, top, cell, column.label, letters, TEXT)
        if column.note:
            _write(draw, left, top + _line_height(letters), cell, column.note, small, FAINT)
        top += head
        for box, crop, caption, row in zip(boxes, column.crops, column.captions, rows, strict=True):
            framed = cv2.copyMakeBorder(
                crop, frame, frame, frame, frame, cv2.BORDER_CONSTANT, value=box.rgb
            )
            sheet.paste(Image.fromarray(framed), (left + (cell - framed.shape[1]) // 2, top))
            if caption:
                _write(draw, left, top + framed.shape[0], cell, caption, small, TEXT)
            top += row + gap
    return sheet


def _line_height(letters: ImageFont.FreeTypeFont) -> int:
    ascent, descent = letters.getmetrics()
    return round((ascent + descent) * 1.15)


def _write(
    draw: ImageDraw.ImageDraw,
    left: int,
    top: int,
    width: int,
    text: str,
    letters: ImageFont.FreeTypeFont,
    colour: tuple[int, int, int],
) -> None:
    """Draw a line of text in the middle of a cell, with its middle elided if it is too long."""
    kept = len(text)
    shown = text
    while kept > 2 and draw.textlength(shown, font=letters) > width:
        kept -= 1
        shown = text[: -(-kept // 2)] + ELLIPSIS + text[len(text) - kept // 2 :]
    draw.text((left + width / 2, top), shown, fill=colour, font=letters, anchor="ma")
