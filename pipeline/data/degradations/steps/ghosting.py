"""Ghosting: a faint, displaced copy of the image."""

from __future__ import annotations

import math
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
from pipeline.spec import Angle, Probability, Range, within


class GhostingSpec(StepSpec):
    """A faint, displaced copy of the image."""

    kind: shares_of("echo", "blend") = Field(  # type: ignore[valid-type]
        {"echo": 1.0, "blend": 1.0},
        description="relative probability of a copy displaced to the right, as with analogue "
        "aerials and cables, or in any direction, as with blended frames",
    )
    strength: Annotated[Range, within(0, 1)] = Field(
        (0.1, 0.4), description="range of the weight of the copy in the result"
    )
    distance: Annotated[Range, within(0, 256)] = Field(
        (2.0, 20.0), description="range of the displacement of the copy in pixels"
    )
    angle: Angle = Field(
        (0, 360),
        description="range of the direction of blend in degrees, from the x axis (right) towards "
        "the y axis (down)",
    )
    negative: Probability = Field(0.2, description="probability of an echo with inverted levels")


def draw(spec: GhostingSpec, draws: Draws, canvas: Canvas) -> Parameters:
    kind = draws.choose(spec.kind)
    strength, distance = draws.between(spec.strength), draws.between(spec.distance)
    if kind == "echo":
        sign = -1 if draws.chance(spec.negative) else 1
        return {"kind": kind, "strength": sign * strength, "offset": [0.0, distance]}
    angle = math.radians(draws.between(spec.angle))
    offset = [distance * math.sin(angle), distance * math.cos(angle)]
    return {"kind": kind, "strength": strength, "offset": offset}


def apply(image: Image, drawn: Parameters, workspace: Any) -> Image:
    from pipeline.data.degradations import host

    image, strength = levels(image), drawn["strength"]
    # The mean stays the same: receivers control their gain, and blended frames are averaged.
    copy = host.shifted(image, (drawn["offset"][0], drawn["offset"][1]))
    return image * np.float32(1 - strength) + copy * np.float32(strength)
