"""The boxes of a comparison picture: from the command line, from a coordinates file, or where results differ most."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.cli import UserError

# Okabe and Ito, "Color Universal Design", 2008: told apart with every common kind of colour blindness.
COLOURS = ("#d55e00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#0072b2", "#e69f00", "#000000")
MAX_BOXES = len(COLOURS)
MIN_SIDE = 4
_WAY_OUT = "choose the boxes anew with --box, --auto or the mouse, and save them to another --coords file"


@dataclass(frozen=True)
class Box:
    """A rectangle of the first image, in its pixels, and the colour that it is drawn in."""

    x: int
    y: int
    width: int
    height: int
    colour: str

    @property
    def edges(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom; the last two are outside."""
        return self.x, self.y, self.x + self.width, self.y + self.height

    @property
    def rgb(self) -> tuple[int, int, int]:
        """The colour as three bytes."""
        return tuple(bytes.fromhex(self.colour[1:]))

    def __str__(self) -> str:
        return f"{self.x},{self.y},{self.width},{self.height}"


def parse_boxes(texts: Sequence[str], height: int, width: int) -> list[Box]:
    """Boxes of the command line (`X,Y,W,H` each) within an image of `height` x `width`, in the colours' order."""
    boxes = []
    for text in texts:
        numbers = re.fullmatch(r"\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(-?\d+)\s*", text)
        if not numbers:
            raise UserError(f"--box {text}: must be four whole numbers X,Y,W,H (left, top, width, height in pixels)")
        boxes.append(Box(*map(int, numbers.groups()), COLOURS[len(boxes) % MAX_BOXES]))
    _check(boxes, height, width, "--box", "choose a box inside the image")
    return boxes


def read_boxes(path: Path, height: int, width: int) -> list[Box]:
    """The boxes of a coordinates file that was made for an image of `height` x `width`."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError:  # broken JSON and broken UTF-8
        raise UserError(f"{path}: not a coordinates file (broken JSON); {_WAY_OUT}") from None
    try:
        size = content["height"], content["width"]
        boxes = [_stored_box(entry) for entry in content["boxes"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a coordinates file, which holds height, width and boxes of x, y, width, height "
                        f"and colour ({type(error).__name__}: {error}); {_WAY_OUT}") from None
    if size != (height, width):
        raise UserError(f"{path}: made for an image of {size[0]}x{size[1]}, not {height}x{width} (height x width); "
                        f"{_WAY_OUT}")
    _check(boxes, height, width, str(path), _WAY_OUT)
    return boxes


def _stored_box(entry: dict[str, Any]) -> Box:
    """A box of a coordinates file. Raises `TypeError` or `KeyError` with the field's name where it is not one."""
    for name in ("x", "y", "width", "height"):
        if type(entry[name]) is not int:
            raise TypeError(f"{name} must be a whole number, not {entry[name]!r}")
    if not (isinstance(entry["colour"], str) and re.fullmatch("#[0-9a-fA-F]{6}", entry["colour"])):
        raise TypeError(f"colour must be as #d55e00, not {entry['colour']!r}")
    return Box(**{name: entry[name] for name in ("x", "y", "width", "height", "colour")})


def format_boxes(boxes: Sequence[Box], height: int, width: int) -> bytes:
    """What a coordinates file holds: the size of the image that the boxes belong to, and the boxes."""
    entries = ",\n  ".join(json.dumps(asdict(box)) for box in boxes)
    return f'{{"height": {height}, "width": {width}, "boxes": [\n  {entries}\n]}}\n'.encode()


def _check(boxes: Sequence[Box], height: int, width: int, where: str, way_out: str) -> None:
    """Refuse boxes that leave the image, are too small to see, or are too many to tell their colours apart."""
    if not 1 <= len(boxes) <= MAX_BOXES:
        raise UserError(f"{where}: {len(boxes)} boxes; must be 1 to {MAX_BOXES}, more colours cannot be told apart")
    for box in boxes:
        if min(box.width, box.height) < MIN_SIDE:
            raise UserError(f"{where} {box}: a box must be at least {MIN_SIDE} pixels wide and high; {way_out}")
        left, top, right, bottom = box.edges
        if min(left, top) < 0 or right > width or bottom > height:
            raise UserError(f"{where} {box}: leaves the first image, which is {width} wide and {height} high; "
                            f"{way_out}")


def differing_boxes(images: Sequence[np.ndarray], count: int, side: int) -> list[Box]:
    """The `count` squares of `side` in which images of one size differ most, one after the other, without overlap.

    What counts is the mean variance of green over the images: uint8 RGB (height, width, 3), at least two of them.
    """
    if not 1 <= count <= MAX_BOXES:
        raise UserError(f"--auto {count}: must be 1 to {MAX_BOXES} boxes, more colours cannot be told apart")
    height, width = images[0].shape[:2]
    if not MIN_SIDE <= side <= min(height, width):
        raise UserError(f"--auto-size {side}: must be {MIN_SIDE} to {min(height, width)} pixels for this image")
    if len(images) < 2:
        raise UserError("--auto looks for where results differ and needs two images of the first image's size; "
                        "give --box X,Y,W,H")
    score = _variance_in_squares(images, side)
    boxes: list[Box] = []
    for colour in COLOURS[:count]:
        y, x = map(int, np.unravel_index(int(score.argmax()), score.shape))
        if score[y, x] < 0:
            raise UserError(f"--auto {count}: only {len(boxes)} squares of {side} pixels fit side by side where they "
                            "differ most; ask for fewer, or for smaller ones with --auto-size")
        if score[y, x] == 0:
            raise UserError(f"--auto {count}: the images differ in {len(boxes)} places only; ask for fewer, or give "
                            "--box X,Y,W,H")
        boxes.append(Box(x, y, side, side, colour))
        reach = side + side // 4  # some room between them, for their frames
        score[max(0, y - reach + 1) : y + reach, max(0, x - reach + 1) : x + reach] = -1
    return boxes


def _variance_in_squares(images: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Variance over the images, summed over the square of `side` whose left top corner is the pixel: float64, exact."""
    height, width = images[0].shape[:2]
    total, squares = np.zeros((height, width), np.int32), np.zeros((height, width), np.int32)
    for image in images:
        green = image[..., 1].astype(np.int32)
        total += green
        squares += green * green
    variance = len(images) * squares.astype(np.float64) - total.astype(np.float64) ** 2
    # Whole numbers far below 2^53: the running sums are exact, so that equal places are equal.
    sums = cv2.boxFilter(variance, cv2.CV_64F, (side, side), anchor=(0, 0), normalize=False)
    return sums[: height - side + 1, : width - side + 1].copy()
