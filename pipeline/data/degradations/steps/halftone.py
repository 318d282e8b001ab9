"""Halftone: tones as dots or lines of ink, as in print.

Each ink has a screen: a periodic function of the position, rotated by the ink's angle. A pixel is
covered with ink where the screen's rank, the share of a cell with lower values, exceeds one minus
the tone. The edges are antialiased over about a pixel, such that a uniform tone keeps its mean.
Means are of levels, not of light, because the steps that follow average levels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.degradations.steps.base import (
    LUMA,
    Canvas,
    Draws,
    Image,
    Parameters,
    StepSpec,
    levels,
    shares_of,
)
from pipeline.libraries import cv2
from pipeline.spec import Angle, Number, Range, within

Floats = NDArray[np.float32]

RANKS = 65536  # entries of the table of ranks, the most that OpenCV looks up


class HalftoneSpec(StepSpec):
    """Tones as dots or lines of ink."""

    kind: shares_of("gray", "rgb", "cmyk") = Field(  # type: ignore[valid-type]
        {"cmyk": 1.0},
        description="relative probability of black ink for luma (gray), red, green and blue light "
        "on black (rgb), or four inks on white (cmyk)",
    )
    shape: shares_of("dots", "lines") = Field(  # type: ignore[valid-type]
        {"dots": 1.0}, description="relative probability of each shape"
    )
    cell: Annotated[Range, within(2, 64)] = Field(
        (3.0, 6.0),
        description="range of the distance between dots or lines in pixels: the resolution of the "
        "scan in dpi, divided by that of the screen in lines per inch",
    )
    angles: tuple[Number, Number, Number, Number] = Field(
        (15.0, 75.0, 0.0, 45.0),
        description="angles of the screens of cyan, magenta, yellow and black in degrees; red, "
        "green and blue use the first three, gray the last",
    )
    rotation: Angle = Field(
        (-5.0, 5.0), description="range of an angle in degrees that is added to all angles"
    )
    gcr: Annotated[Range, within(0, 1)] = Field(
        (0.5, 1.0),
        description="range of the share of the gray component that black ink replaces (cmyk)",
    )


def draw(spec: HalftoneSpec, draws: Draws, canvas: Canvas) -> Parameters:
    kind, shape = draws.choose(spec.kind), draws.choose(spec.shape)
    cell, rotation, gcr = (draws.between(bounds) for bounds in (spec.cell, spec.rotation, spec.gcr))
    angles = {"gray": spec.angles[3:], "rgb": spec.angles[:3], "cmyk": spec.angles}[kind]
    return {
        "kind": kind,
        "shape": shape,
        "cell": cell,
        "angles": [angle + rotation for angle in angles],
        "phases": [[draws.uniform(), draws.uniform()] for _ in angles],
        **({"gcr": gcr} if kind == "cmyk" else {}),
    }


def apply(image: Image, drawn: Parameters, workspace: Any) -> Image:
    cell, kind = drawn["cell"], drawn["kind"]
    ramps = _ramps(drawn["shape"], cell)
    light = levels(image).clip(0, 255) / np.float32(255)

    def covered(tone: Floats, ink: int) -> Floats:
        screen = _screen(
            tone.shape, drawn["shape"], cell, drawn["angles"][ink], drawn["phases"][ink]
        )
        return inked(tone, screen, ramps)

    if kind == "gray":
        luma = cv2.transform(light, np.array([LUMA["bt601"]], np.float32))
        planes = [1 - covered(1 - luma, 0)] * 3
    elif kind == "rgb":
        planes = [covered(light[..., channel], channel) for channel in range(3)]
    else:
        # Ideal inks: each absorbs one of red, green and blue, black all of them.
        channels = cv2.split(light)
        black = drawn["gcr"] * (1 - np.maximum(np.maximum(*channels[:2]), channels[2]))
        uncovered = 1 - covered(black, 3)
        rest = np.maximum(1 - black, np.float32(1e-6))
        planes = [
            (1 - covered((1 - channel / rest).clip(0, 1), ink)) * uncovered
            for ink, channel in enumerate(channels)
        ]
    return cv2.merge(planes) * np.float32(255)


def _screen(
    shape: tuple[int, ...], form: str, cell: float, angle: float, phase: list[float]
) -> Floats:
    """Return the rank of each pixel within its cell, 0..1: highest where ink begins."""
    cos, sin = (function(math.radians(angle)) / cell for function in (math.cos, math.sin))
    height, width = shape[:2]
    y, x = np.arange(height) + 0.5, np.arange(width) + 0.5
    # Cells per pixel along the two sides of a cell, as the row's part and the column's.
    across, down = (y * sin + phase[0], x * cos), (y * cos + phase[1], -x * sin)
    if form == "lines":
        place = (down[0][:, None] + down[1]).astype(np.float32)
        return np.abs(2 * (place - np.floor(place)) - 1)
    # The sum of two waves, by the addition theorem: cos(a + b) = cos a cos b - sin a sin b.
    spot = np.zeros((height, width), np.float32)
    for row, column in (across, down):
        turns_y, turns_x = 2 * np.pi * row, 2 * np.pi * column
        spot += np.cos(turns_y).astype(np.float32)[:, None] * np.cos(turns_x).astype(np.float32)
        spot -= np.sin(turns_y).astype(np.float32)[:, None] * np.sin(turns_x).astype(np.float32)
    spot *= np.float32((RANKS - 1) / 4)
    spot += np.float32(RANKS / 2)
    return cv2.LUT(spot.clip(0, RANKS - 1).astype(np.uint16), _ranks())


@lru_cache(maxsize=1)
def _ranks() -> Floats:
    """Return the share of a cell where (cos x + cos y + 2) / 4 is lower, for `RANKS` values."""
    # A quarter of a cell is enough, by symmetry. The values are those between the samples.
    wave = np.cos((np.arange(1024) + 0.5) * (np.pi / 1024))
    values = np.sort(((wave[:, None] + wave + 2) / 4).ravel())
    edges = np.arange(RANKS) / (RANKS - 1)
    return (np.searchsorted(values, edges) / values.size).astype(np.float32)


class Ramps(NamedTuple):
    """For `RANKS` tones from 0 to 1: a pixel's covered share is slope rank + start, within 0..1."""

    slope: Floats
    start: Floats


def inked(tone: Floats, rank: Floats, ramps: Ramps) -> Floats:
    """Return the share of each pixel that is covered, (height, width) 0..1, for tones 0..1."""
    index = (tone * np.float32(RANKS - 1) + np.float32(0.5)).astype(np.uint16)
    share = cv2.multiply(rank, cv2.LUT(index, ramps.slope))
    share += cv2.LUT(index, ramps.start)
    return share.clip(0, 1, out=share)


@lru_cache(maxsize=16)
def _ramps(form: str, cell: float) -> Ramps:
    """Return the ramps at the edges of ink: in a field of one tone, the mean share is the tone."""
    tone = np.arange(RANKS, dtype=np.float32) / np.float32(RANKS - 1)
    margin = np.minimum(tone, 1 - tone)
    # Over one pixel, the rank changes by the length of the edges per cell, divided by the area of
    # the cell: two lines; or a circle with the tone's area, around ink or around a hole.
    if form == "lines":
        width = np.full_like(tone, 2 / cell)
    else:
        width = np.sqrt(margin) * np.float32(2 * math.sqrt(math.pi) / cell)
    width = width.clip(1e-4, 1)
    # The ramp has this width around the rank `edge`. Near white and black, where it does not fit
    # into the ranks, the edge is moved so that the mean stays the tone.
    half = width / 2
    offset = np.where(margin < half, np.sqrt(2 * margin * width) - half, margin)
    edge = np.where(tone < 0.5, 1 - offset, offset)
    return Ramps(1 / width, np.float32(0.5) - edge / width)
