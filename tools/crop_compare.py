"""Comparison figures as in papers: the same boxes cut from several results of one photograph."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import numpy as np
import tyro
from PIL import Image, ImageFont

from pipeline.cli import UserError, run
from pipeline.data.image_pixels import prepare_decoders, read_rgb
from pipeline.files import write_atomically
from tools.compare.boxes import (
    Box,
    differing_boxes,
    format_boxes,
    parse_boxes,
    read_boxes,
    select_boxes,
)
from tools.compare.figure import (
    FigureColumn,
    Result,
    Style,
    annotated,
    column_labels,
    figure,
    magnified,
    psnr_y,
    ratio_to_first,
    strip,
)
from tools.images import encode
from tools.parallel import ordered_map, progress, quiet_libraries, thread_count

COORDINATES = "boxes.json"
PREVIEW_PANEL = 160


@dataclass(frozen=True)
class Options:
    """Cut the same boxes from several results of one photograph and show them side by side.

    The crops are magnified. Draw the boxes with the mouse (needs a display), or give them with
    --box, --coords or --auto. OUT/annotated.png is the first image with the boxes,
    OUT/comparison.png the crops: one row per box, one column per image. OUT/crops holds every crop
    as a separate file, OUT/boxes.json the boxes for later use. Images that are smaller by an
    integer factor, such as the LR input, are cut at the same place and shown in larger blocks.

    Example: python tools/crop_compare.py hr.png lr.png bicubic.png vapsr.png --auto 2 --reference
    --out comparison
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """The images, in column order. Boxes are in pixels of the first one, on which they are also
    drawn."""
    coords: Path | None = None
    """Coordinates file (JSON): read if it exists, otherwise the chosen boxes are saved there."""
    box: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A box as X,Y,W,H: left, top, width and height in pixels of the first image. Repeat it for
    more boxes."""
    auto: int = 0
    """Choose this many boxes where the full-size images differ most."""
    auto_size: int | None = None
    """Side of these boxes in pixels; by default 1/8 of the image's shorter side."""
    out: Path = Path("comparison")
    """Output folder."""
    labels: tuple[str, ...] = ()
    """Names of the columns; by default the file names."""
    layout: Literal["strip", "figure"] = "strip"
    """strip: only the crops. figure: the annotated photograph to the left of the crops."""
    zoom: Literal["nearest", "cubic"] = "nearest"
    """How to magnify crops; nearest shows the pixels as they are."""
    panel: int = 240
    """Longest side of a magnified crop in pixels; the factor is an integer, at least 1."""
    columns: int | None = None
    """Start a new row of results after this many; by default one row, or two in a figure with a
    single box."""
    reference: bool = False
    """Write the PSNR-Y against the first image below every crop, and that of the whole images
    above."""
    border: int = 0
    """Pixels cut from every border for the PSNR-Y of whole images; the evaluation cuts as many
    pixels as the scale, and none at x1."""
    font: Path | None = None
    """TrueType font for labels beyond ASCII."""


def main(options: Options) -> int:
    """Make the figures.

    Returns 0 if done, 130 if cancelled in the window.
    """
    _check_options(options)
    prepare_decoders()
    labels = column_labels(options.images, options.labels, is_ascii=options.font is None)
    pixels = []
    with quiet_libraries(), progress(len(options.images), "image") as bar:
        for image in ordered_map(
            read_rgb, [path.expanduser() for path in options.images], thread_count(0)
        ):
            pixels.append(image)
            bar.update()
    results = [
        Result(label, image, ratio_to_first(path, image, pixels[0]))
        for label, path, image in zip(labels, options.images, pixels, strict=True)
    ]
    style = Style(options.panel, options.font.expanduser() if options.font else None)
    boxes = _boxes(options, results, style)
    if boxes is None:
        print("cancelled; nothing written", file=sys.stderr)
        return 130
    scores = _scores(results, boxes, options.border) if options.reference else None
    columns = _columns(results, boxes, scores, options)
    if options.layout == "figure":
        picture = figure(results[0].pixels, boxes, columns, style, options.columns)
    else:
        picture = strip(boxes, columns, style, options.columns)
    _write(options, results, boxes, columns, picture)
    _report(options.out.expanduser(), results, boxes, scores)
    return 0


def _check_options(options: Options) -> None:
    """Raise `UserError` for options that cannot work, before an image is read."""
    if not options.images:
        raise UserError(
            "no images; give several results of one photograph, such as hr.png bicubic.png "
            "vapsr.png"
        )
    if not 32 <= options.panel <= 4096:
        raise UserError(f"--panel {options.panel}: must be 32 to 4096 pixels")
    if options.columns is not None and options.columns < 1:
        raise UserError(f"--columns {options.columns}: must be at least 1; omit it for one row")
    if options.border < 0:
        raise UserError(
            f"--border {options.border}: must be at least 0; evaluate.py uses the scale, or 0 at x1"
        )
    replays = options.coords is not None and options.coords.expanduser().exists()
    ways = [
        name
        for name, given in (
            (f"--coords {options.coords} (which exists)", replays),
            ("--box", options.box),
            ("--auto", options.auto),
        )
        if given
    ]
    if len(ways) > 1:
        raise UserError(
            f"{' and '.join(ways)}: give the boxes in only one of these ways"
            + (", or give another --coords file to save to" if replays else "")
        )
    out = options.out.expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: not a folder; choose another --out")
    if options.font:
        try:
            ImageFont.truetype(str(options.font.expanduser()), 12)
        except OSError:
            raise UserError(
                f"--font {options.font}: not a readable font; give a TrueType file (.ttf)"
            ) from None


def _boxes(options: Options, results: Sequence[Result], style: Style) -> list[Box] | None:
    """The boxes from the source that the options specify; `None` if the user cancelled."""
    first = results[0].pixels
    height, width = first.shape[:2]
    if options.box:
        return parse_boxes(options.box, height, width)
    if options.auto:
        side = options.auto_size or max(16, min(height, width) // 8)
        return differing_boxes(
            [result.pixels for result in results if result.ratio == 1], options.auto, side
        )
    if options.coords and options.coords.expanduser().exists():
        return read_boxes(options.coords.expanduser(), height, width)

    def preview(box: Box) -> np.ndarray:
        crops = [
            FigureColumn(
                result.label, "", [magnified(result.crop(box), PREVIEW_PANEL, smooth=False)], [""]
            )
            for result in results
        ]
        return np.asarray(strip([box], crops, Style(PREVIEW_PANEL, style.font)))

    return select_boxes(first, preview)


def _scores(
    results: Sequence[Result], boxes: Sequence[Box], border: int
) -> list[list[float] | None]:
    """PSNR-Y in dB against the first image: of the whole image, then of the boxes.

    `None` for the first image and for smaller ones.
    """
    first = results[0]
    height, width = first.pixels.shape[:2]
    if 2 * border >= min(height, width):
        raise UserError(
            f"--border {border}: nothing is left of {height}x{width} pixels; use a smaller one"
        )
    inner = (slice(border, height - border), slice(border, width - border))
    scores: list[list[float] | None] = []
    for result in results:
        if result is first or result.ratio > 1:
            scores.append(None)
            continue
        pairs = [(result.pixels[inner], first.pixels[inner])]
        pairs += [(result.crop(box), first.crop(box)) for box in boxes]
        scores.append([psnr_y(one, other) for one, other in pairs])
    return scores


def _columns(
    results: Sequence[Result],
    boxes: Sequence[Box],
    scores: Sequence[list[float] | None] | None,
    options: Options,
) -> list[FigureColumn]:
    """Columns of the figure, one per result."""
    largest = max(max(box.width, box.height) for box in boxes)
    # Small boxes are magnified to about the size of a large one.
    panel = max(options.panel, largest)
    columns = []
    for index, result in enumerate(results):
        crops = [
            magnified(result.crop(box), panel, options.zoom == "cubic" and result.ratio == 1)
            for box in boxes
        ]
        note, captions = "", [""] * len(boxes)
        if scores:
            score = scores[index]
            if score:
                note, *captions = [_decibels(value) for value in score]
            elif index == 0:
                note = "PSNR-Y"
            else:
                note = f"1/{result.ratio} size"
        columns.append(FigureColumn(result.label, note, crops, captions))
    return columns


def _decibels(value: float) -> str:
    return f"{value:.2f} dB" if math.isfinite(value) else "identical"


def _write(
    options: Options,
    results: Sequence[Result],
    boxes: Sequence[Box],
    columns: Sequence[FigureColumn],
    picture: Image.Image,
) -> None:
    """Write all files, and delete crops of an earlier run that are not among them."""
    out = options.out.expanduser()
    files = {
        out / "annotated.png": _png(annotated(results[0].pixels, boxes)),
        out / "comparison.png": _png(picture),
    }
    for number, column in enumerate(columns, 1):
        name = re.sub(r"[^\w.-]+", "_", column.label)
        for box, crop in enumerate(column.crops, 1):
            files[out / "crops" / f"box{box}_{number}_{name}.png"] = encode(crop, "png")
    coordinates = format_boxes(boxes, *results[0].pixels.shape[:2])
    files[out / COORDINATES] = coordinates
    if options.coords and not options.coords.expanduser().exists():
        files[options.coords.expanduser()] = coordinates
    earlier = (
        set((out / "crops").glob("box[1-8]_*_*.png")) if (out / COORDINATES).is_file() else set()
    )
    try:
        (out / "crops").mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            write_atomically(path, content)
        for path in earlier - files.keys():
            path.unlink()
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: cannot be written: {error.strerror}; choose another --out "
            "or --coords"
        ) from error


def _png(picture: Image.Image) -> bytes:
    return encode(np.asarray(picture), "png")


def _report(
    out: Path,
    results: Sequence[Result],
    boxes: Sequence[Box],
    scores: Sequence[list[float] | None] | None,
) -> None:
    """Print what was written, and the scores."""
    print(
        f"written to {out}: comparison.png, annotated.png, {COORDINATES} and crops/ with "
        f"{len(boxes) * len(results)} "
        "crops"
    )
    for number, box in enumerate(boxes, 1):
        print(f"box {number}: {box} ({box.colour})")
    if not scores or not any(scores):
        return
    shown: list[tuple[str, Callable[[list[float]], float]]] = [("whole", lambda score: score[0])]
    shown += [
        (f"box {number}", lambda score, number=number: score[number])
        for number in range(1, len(boxes) + 1)
    ]
    width = max(len(result.label) for result in results)
    print("PSNR-Y".ljust(width), *(name.rjust(9) for name, _ in shown))
    for result, score in zip(results, scores, strict=True):
        if score:
            print(result.label.ljust(width), *(f"{value(score):9.3f}" for _, value in shown))


if __name__ == "__main__":
    run(Options, main)
