"""Boxes of a comparison figure: from the command line, a file, the differences, or the mouse.

`select_boxes` lets the user draw them with the mouse. It opens the only window of the dataset tools
and imports tkinter only then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.cli import UserError
from pipeline.files import parse_json
from pipeline.libraries import cv2

# Okabe and Ito, "Color Universal Design", 2008: distinguishable with all common kinds of colour
# blindness.
COLOURS = ("#d55e00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#0072b2", "#e69f00", "#000000")
MAX_BOXES = len(COLOURS)
MIN_SIDE = 4
_WAY_OUT = (
    "choose the boxes again with --box, --auto or the mouse, and save them to another --coords file"
)
_HELP = "drag a box   -   Enter: save   -   Backspace or u: undo the last   -   Escape: cancel"
_SELECTION_WAY_OUT = "give --box X,Y,W,H (repeatable), --auto N or an existing --coords FILE"
# Shares of the screen's width and height; task bar and title bar need the rest.
_IMAGE_SHARE, _PREVIEW_SHARE = (0.92, 0.6), (0.92, 0.27)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the first image, and the colour it is drawn in."""

    x: int
    y: int
    width: int
    height: int
    colour: str

    @property
    def edges(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom; the last two are exclusive."""
        return self.x, self.y, self.x + self.width, self.y + self.height

    @property
    def rgb(self) -> tuple[int, int, int]:
        """The colour as three bytes."""
        return tuple(bytes.fromhex(self.colour[1:]))

    def __str__(self) -> str:
        return f"{self.x},{self.y},{self.width},{self.height}"


def parse_boxes(texts: Sequence[str], height: int, width: int) -> list[Box]:
    """Parse boxes of the command line (`X,Y,W,H` each) in an image of `height` x `width`.

    They get the colours in order. Raises `UserError` for invalid boxes.
    """
    boxes = []
    for text in texts:
        numbers = re.fullmatch(r"\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(-?\d+)\s*", text)
        if not numbers:
            raise UserError(
                f"--box {text}: must be four integers X,Y,W,H (left, top, width, height in pixels)"
            )
        boxes.append(Box(*map(int, numbers.groups()), COLOURS[len(boxes) % MAX_BOXES]))
    _check(boxes, height, width, "--box", "choose a box inside the image")
    return boxes


def read_boxes(path: Path, height: int, width: int) -> list[Box]:
    """Read the boxes of a coordinates file for an image of `height` x `width`.

    Raises `UserError` if the file does not fit.
    """
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError:  # broken JSON or broken UTF-8
        raise UserError(f"{path}: not a coordinates file (broken JSON); {_WAY_OUT}") from None
    try:
        size = content["height"], content["width"]
        boxes = [_stored_box(entry) for entry in content["boxes"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a coordinates file, which has height, width and boxes of x, y, width, "
            f"height and colour ({type(error).__name__}: {error}); {_WAY_OUT}"
        ) from None
    if size != (height, width):
        raise UserError(
            f"{path}: made for an image of {size[0]}x{size[1]}, not {height}x{width} (height x "
            "width); "
            f"{_WAY_OUT}"
        )
    _check(boxes, height, width, str(path), _WAY_OUT)
    return boxes


def _stored_box(entry: dict[str, Any]) -> Box:
    """Parse a box of a coordinates file.

    Raises `TypeError` or `KeyError` with the name of a bad field.
    """
    for name in ("x", "y", "width", "height"):
        if type(entry[name]) is not int:
            raise TypeError(f"{name} must be an integer, not {entry[name]!r}")
    if not (isinstance(entry["colour"], str) and re.fullmatch("#[0-9a-fA-F]{6}", entry["colour"])):
        raise TypeError(f"colour must be like #d55e00, not {entry['colour']!r}")
    return Box(**{name: entry[name] for name in ("x", "y", "width", "height", "colour")})


def format_boxes(boxes: Sequence[Box], height: int, width: int) -> bytes:
    """Format a coordinates file: the size of the image that the boxes belong to, and the boxes."""
    entries = ",\n  ".join(json.dumps(asdict(box)) for box in boxes)
    return f'{{"height": {height}, "width": {width}, "boxes": [\n  {entries}\n]}}\n'.encode()


def _check(boxes: Sequence[Box], height: int, width: int, where: str, way_out: str) -> None:
    """Raise `UserError` for boxes outside the image, too small to see, or too many.

    Too many boxes would need colours that cannot be told apart.
    """
    if not 1 <= len(boxes) <= MAX_BOXES:
        raise UserError(
            f"{where}: {len(boxes)} boxes; must be 1 to {MAX_BOXES}, because more colours cannot "
            "be told apart"
        )
    for box in boxes:
        if min(box.width, box.height) < MIN_SIDE:
            raise UserError(
                f"{where} {box}: a box must be at least {MIN_SIDE} pixels wide and high; {way_out}"
            )
        left, top, right, bottom = box.edges
        if min(left, top) < 0 or right > width or bottom > height:
            raise UserError(
                f"{where} {box}: extends beyond the first image, which is {width} wide and "
                f"{height} high; {way_out}"
            )


def differing_boxes(images: Sequence[np.ndarray], count: int, side: int) -> list[Box]:
    """Choose the `count` squares of `side` pixels in which the images differ most, without overlap.

    The measure is the mean variance of green over the images: at least two uint8 RGB images
    (height, width, 3) of equal size.
    """
    if not 1 <= count <= MAX_BOXES:
        raise UserError(
            f"--auto {count}: must be 1 to {MAX_BOXES} boxes, because more colours cannot be told "
            "apart"
        )
    height, width = images[0].shape[:2]
    if not MIN_SIDE <= side <= min(height, width):
        raise UserError(
            f"--auto-size {side}: must be {MIN_SIDE} to {min(height, width)} pixels for this image"
        )
    if len(images) < 2:
        raise UserError(
            "--auto looks for differences between results and needs two images of the first "
            "image's size; give --box X,Y,W,H"
        )
    score = _variance_in_squares(images, side)
    boxes: list[Box] = []
    for colour in COLOURS[:count]:
        y, x = map(int, np.unravel_index(int(score.argmax()), score.shape))
        if score[y, x] < 0:
            raise UserError(
                f"--auto {count}: only {len(boxes)} squares of {side} pixels fit next to each "
                "other where the images differ most; use fewer, or smaller ones with --auto-size"
            )
        if score[y, x] == 0:
            raise UserError(
                f"--auto {count}: the images differ in only {len(boxes)} places; use fewer, or "
                "give --box X,Y,W,H"
            )
        boxes.append(Box(x, y, side, side, colour))
        reach = side + side // 4  # some space between them for their frames
        score[max(0, y - reach + 1) : y + reach, max(0, x - reach + 1) : x + reach] = -1
    return boxes


def _variance_in_squares(images: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Variance over the images, summed over the square of `side` below and right of each pixel.

    float64, exact.
    """
    height, width = images[0].shape[:2]
    total, squares = np.zeros((height, width), np.int32), np.zeros((height, width), np.int32)
    for image in images:
        green = image[..., 1].astype(np.int32)
        total += green
        squares += green * green
    variance = len(images) * squares.astype(np.float64) - total.astype(np.float64) ** 2
    # Integers far below 2^53, so the running sums are exact and equal places get equal values.
    sums = cv2.boxFilter(variance, cv2.CV_64F, (side, side), anchor=(0, 0), normalize=False)
    return sums[: height - side + 1, : width - side + 1].copy()


# --- With the mouse ---


def select_boxes(image: np.ndarray, preview: Callable[[Box], np.ndarray]) -> list[Box] | None:
    """Let the user draw boxes on `image` (uint8 RGB), in its pixels; `None` if they cancel.

    `preview` makes the picture (uint8 RGB) shown below the image for the box being drawn. Raises
    `UserError` if there is no display.
    """
    try:
        import tkinter
    except ImportError as error:
        raise UserError(
            f"boxes cannot be drawn: this Python has no tkinter ({error}); {_SELECTION_WAY_OUT}"
        ) from None
    try:
        root = tkinter.Tk()
    except tkinter.TclError as error:
        raise UserError(
            f"boxes cannot be drawn: {' '.join(str(error).split())}; {_SELECTION_WAY_OUT}"
        ) from None
    try:
        return _Window(root, image, preview).run()
    finally:
        root.destroy()


class _Window:
    """An image to draw on, with a preview of one box below."""

    def __init__(
        self, root: tkinter.Tk, image: np.ndarray, preview: Callable[[Box], np.ndarray]
    ) -> None:
        from tkinter import Canvas, Label

        self.root, self.preview = root, preview
        self.height, self.width = image.shape[:2]
        fitted, self.scale = self._fitted(image, _IMAGE_SHARE)
        self.photo = _photo(root, fitted)
        self.canvas = Canvas(
            root,
            width=fitted.shape[1],
            height=fitted.shape[0],
            highlightthickness=0,
            cursor="crosshair",
        )
        self.canvas.create_image(0, 0, anchor="nw", image=self.photo)
        # The canvas must not move under the pointer when the preview below becomes wider.
        self.canvas.pack(anchor="w")
        self.below = Label(root, text=_HELP)
        self.below.pack(anchor="w")
        self.boxes: list[Box] = []
        self.start: tuple[int, int] | None = None
        self.is_saved = False
        root.title(_HELP)
        self._bind()

    def _fitted(self, image: np.ndarray, share: tuple[float, float]) -> tuple[np.ndarray, float]:
        """Reduce a larger image to that share of the screen; also returns the factor."""
        height, width = image.shape[:2]
        scale = min(
            1.0,
            share[0] * self.root.winfo_screenwidth() / width,
            share[1] * self.root.winfo_screenheight() / height,
        )
        size = max(1, int(width * scale)), max(1, int(height * scale))
        return (
            cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
        ), scale

    def _bind(self) -> None:
        """Connect mouse and keys."""
        self.canvas.bind("<ButtonPress-1>", self._press)
        self.canvas.bind("<B1-Motion>", self._drag)
        self.canvas.bind("<ButtonRelease-1>", self._release)
        for key in ("<Return>", "<KP_Enter>"):
            self.root.bind(key, self._save)
        for key in ("<BackSpace>", "u"):
            self.root.bind(key, self._undo)
        self.root.bind("<Escape>", lambda _: self.root.quit())
        self.root.protocol("WM_DELETE_WINDOW", self.root.quit)

    def run(self) -> list[Box] | None:
        """Wait for the user; returns the boxes, or `None` if cancelled."""
        self._stay_awake()
        self.root.focus_force()
        self.root.mainloop()
        return self.boxes if self.is_saved else None

    def _stay_awake(self) -> None:
        """Run Python code periodically, so that CTRL+C in the terminal ends an idle window."""
        self.root.after(200, self._stay_awake)

    def _press(self, event: tkinter.Event) -> None:
        if len(self.boxes) < MAX_BOXES:
            self.start = event.x, event.y
        else:
            self.root.bell()

    def _drag(self, event: tkinter.Event) -> None:
        box = self._drawn(event)
        self._redraw([*self.boxes, box] if box else self.boxes)

    def _release(self, event: tkinter.Event) -> None:
        box = self._drawn(event)
        self.start = None
        if box:
            self.boxes.append(box)
        self._redraw(self.boxes)

    def _drawn(self, event: tkinter.Event) -> Box | None:
        """The box between button press and pointer; `None` if it is too small to be intended."""
        if self.start is None:
            return None
        (left, right), (top, bottom) = (
            sorted(min(max(0, round(place / self.scale)), limit) for place in places)
            for places, limit in (
                ((self.start[0], event.x), self.width),
                ((self.start[1], event.y), self.height),
            )
        )
        if min(right - left, bottom - top) < MIN_SIDE:
            return None
        return Box(left, top, right - left, bottom - top, COLOURS[len(self.boxes)])

    def _undo(self, _: tkinter.Event) -> None:
        if self.boxes:
            self.boxes.pop()
        self._redraw(self.boxes)

    def _save(self, _: tkinter.Event) -> None:
        if not self.boxes:
            self.root.bell()
            return
        self.is_saved = True
        self.root.quit()

    def _redraw(self, boxes: Sequence[Box]) -> None:
        """Show the boxes, and the preview of the last one."""
        self.canvas.delete("box")
        for box in boxes:
            edges = [edge * self.scale for edge in box.edges]
            self.canvas.create_rectangle(*edges, outline=box.colour, width=3, tags="box")
        if boxes:
            preview, _ = self._fitted(self.preview(boxes[-1]), _PREVIEW_SHARE)
            self.shown = _photo(self.root, preview)  # Tk keeps no reference of its own
            self.below.configure(image=self.shown)
        else:
            self.below.configure(image="", text=_HELP)


def _photo(root: tkinter.Tk, image: np.ndarray) -> tkinter.PhotoImage:
    """Convert uint8 RGB to a Tk image via PPM, which needs no codec and no Tk part of Pillow."""
    from tkinter import PhotoImage

    header = f"P6 {image.shape[1]} {image.shape[0]} 255\n".encode()
    return PhotoImage(
        master=root, data=header + np.ascontiguousarray(image).tobytes(), format="PPM"
    )


if TYPE_CHECKING:
    import tkinter
