"""Interlaced video: two fields of alternate lines, from two moments, and how they were joined."""

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
    """Two fields, between which the image moves, in one frame."""

    kind: shares_of(*KINDS) = Field(  # type: ignore[valid-type]
        {"combing": 2.0, "blend": 1.0, "bob": 1.0},
        description="relative probability of alternate lines of two fields (combing), of the same "
        "blended with the lines around, or of one field whose missing lines are interpolated (bob) "
        "or repeated",
    )
    motion: Annotated[Range, within(0, 256)] = Field(
        (0.5, 8.0), description="range of the motion between fields in pixels, to either side"
    )
    vertical_motion: Annotated[Range, within(-64, 64)] = Field(
        (-0.5, 0.5), description="range of the motion between fields in pixels, downwards"
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
    lines = slice(drawn["parity"], None, 2)  # those that are replaced
    rows, last = np.arange(len(image))[lines], len(image) - 1
    # Beyond a border there is the line on the other side.
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
