"""Interlaced video: two fields of alternate lines, captured at different times, in one frame."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from pipeline.data.degradations.steps.base import (
    Canvas,
    Draws,
    Image,
    Parameters,
    StepSpec,
    levels,
    shares_of,
)
from pipeline.spec import Range, within

KINDS = ("combing", "blend", "bob", "line_doubling")


class InterlaceSpec(StepSpec):
    """One frame of two fields, between which the image moves."""

    kind: shares_of(*KINDS) = Field(  # type: ignore[valid-type]
        {"combing": 2.0, "blend": 1.0, "bob": 1.0},
        description="relative probability of alternate lines of two fields (combing), the same "
        "with each line blended with its neighbours (blend), or one field whose missing lines are "
        "interpolated (bob) or repeated (line_doubling)",
    )
    motion: Annotated[Range, within(0, 256)] = Field(
        (0.5, 8.0), description="range of the motion between fields in pixels, to the left or right"
    )
    vertical_motion: Annotated[Range, within(-64, 64)] = Field(
        (-0.5, 0.5), description="range of the downward motion between fields in pixels"
    )


def draw(spec: InterlaceSpec, draws: Draws, canvas: Canvas) -> Parameters:
    kind, parity = draws.choose(spec.kind), int(draws.chance(0.5))
    if kind in ("bob", "line_doubling"):
        return {"kind": kind, "parity": parity}
    right = draws.between(spec.motion) * (1 if draws.chance(0.5) else -1)
    return {"kind": kind, "parity": parity, "offset": [draws.between(spec.vertical_motion), right]}


def apply(image: Image, drawn: Parameters, workspace: Any) -> Image:
    from pipeline.data.degradations import host

    image, kind = levels(image), drawn["kind"]
    lines = slice(drawn["parity"], None, 2)  # the lines that are replaced
    rows, last = np.arange(len(image))[lines], len(image) - 1
    # At a border, use the neighbour on the other side twice.
    above = np.where(rows > 0, rows - 1, 1)
    below = np.where(rows < last, rows + 1, last - 1)
    if kind == "bob":
        image[lines] = (image[above] + image[below]) * np.float32(0.5)
    elif kind == "line_doubling":
        image[lines] = image[above]
    else:
        image[lines] = host.shifted(image, (drawn["offset"][0], drawn["offset"][1]))[lines]
        if kind == "blend":
            around = np.pad(image, ((1, 1), (0, 0), (0, 0)), "edge")
            image *= np.float32(0.5)
            image += np.float32(0.25) * (around[:-2] + around[2:])
    return image
