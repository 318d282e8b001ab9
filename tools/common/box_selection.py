"""Draw boxes on an image with the mouse. The one window of the dataset tools: tkinter, loaded only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline.cli import UserError
from tools.compare.boxes import COLOURS, MAX_BOXES, MIN_SIDE, Box

if TYPE_CHECKING:
    import tkinter

_HELP = "drag a box   -   Enter: save   -   Backspace or u: take the last back   -   Escape: cancel"
_WAY_OUT = "give --box X,Y,W,H (repeatable), --auto N or an existing --coords FILE"
_IMAGE_SHARE, _PREVIEW_SHARE = (0.92, 0.6), (0.92, 0.27)  # of the screen's width and height; bars need the rest


def select_boxes(image: np.ndarray, preview: Callable[[Box], np.ndarray]) -> list[Box] | None:
    """The boxes that the user draws on `image` (uint8 RGB), in its pixels; None where they cancel.

    `preview` makes the picture (uint8 RGB) shown below the image for the box that is being drawn. Raises `UserError`
    where there is no display.
    """
    try:
        import tkinter
    except ImportError as error:
        raise UserError(f"boxes cannot be drawn: this Python has no tkinter ({error}); {_WAY_OUT}") from None
    try:
        root = tkinter.Tk()
    except tkinter.TclError as error:
        raise UserError(f"boxes cannot be drawn: {' '.join(str(error).split())}; {_WAY_OUT}") from None
    try:
        return _Window(root, image, preview).run()
    finally:
        root.destroy()


class _Window:
    """An image to draw on, and below it the preview of one box."""

    def __init__(self, root: tkinter.Tk, image: np.ndarray, preview: Callable[[Box], np.ndarray]) -> None:
        from tkinter import Canvas, Label

        self.root, self.preview = root, preview
        self.height, self.width = image.shape[:2]
        fitted, self.scale = self._fitted(image, _IMAGE_SHARE)
        self.photo = _photo(root, fitted)
        self.canvas = Canvas(root, width=fitted.shape[1], height=fitted.shape[0], highlightthickness=0,
                             cursor="crosshair")
        self.canvas.create_image(0, 0, anchor="nw", image=self.photo)
        self.canvas.pack(anchor="w")  # must not move under the pointer when what lies below becomes wider
        self.below = Label(root, text=_HELP)
        self.below.pack(anchor="w")
        self.boxes: list[Box] = []
        self.start: tuple[int, int] | None = None
        self.is_saved = False
        root.title(_HELP)
        self._bind()

    def _fitted(self, image: np.ndarray, share: tuple[float, float]) -> tuple[np.ndarray, float]:
        """The image, reduced where it is larger than that share of the screen, and by which factor (at most 1)."""
        height, width = image.shape[:2]
        scale = min(1.0, share[0] * self.root.winfo_screenwidth() / width,
                    share[1] * self.root.winfo_screenheight() / height)
        size = max(1, int(width * scale)), max(1, int(height * scale))
        return (cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image), scale

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
        """Wait for the user."""
        self._stay_awake()
        self.root.focus_force()
        self.root.mainloop()
        return self.boxes if self.is_saved else None

    def _stay_awake(self) -> None:
        """Give Python a turn now and then, so that CTRL+C in the terminal ends a window nobody touches."""
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
        """The box from where the button went down to the pointer; None where it is too small to be meant."""
        if self.start is None:
            return None
        (left, right), (top, bottom) = (
            sorted(min(max(0, round(place / self.scale)), limit) for place in places)
            for places, limit in (((self.start[0], event.x), self.width), ((self.start[1], event.y), self.height)))
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
    """uint8 RGB as a picture of Tk, by way of PPM: no codec in between, and Pillow's Tk part is not needed."""
    from tkinter import PhotoImage

    header = f"P6 {image.shape[1]} {image.shape[0]} 255\n".encode()
    return PhotoImage(master=root, data=header + np.ascontiguousarray(image).tobytes(), format="PPM")
