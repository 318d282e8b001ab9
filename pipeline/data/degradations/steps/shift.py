"""Displacement of the image, of colour channels or of chroma, by fractions of a pixel."""

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
    to_ycc,
)
from pipeline.libraries import cv2
from pipeline.spec import Angle, Range, within


class ShiftSpec(StepSpec):
    """Displacement, interpolated with Keys' cubic; borders are repeated."""

    kind: shares_of("image", "channels", "radial", "chroma") = Field(  # type: ignore[valid-type]
        {"channels": 1.0, "radial": 1.0},
        description="relative probability of moving the image, red and blue separately (channels), "
        "or chroma, or of scaling red and blue around the centre (radial)",
    )
    distance: Annotated[Range, within(0, 64)] = Field(
        (0.1, 1.0), description="range of the distance in pixels"
    )
    angle: Angle = Field(
        (0, 360),
        description="range of the direction in degrees, from x (right) towards y (down)",
    )
    scale: Annotated[Range, within(-0.1, 0.1)] = Field(
        (-0.004, 0.004),
        description="range of the relative difference in size from green, of red and blue (radial)",
    )


def draw(spec: ShiftSpec, draws: Draws, canvas: Canvas) -> Parameters:
    kind = draws.choose(spec.kind)
    if kind == "radial":
        return {"kind": kind, "scales": [draws.between(spec.scale), draws.between(spec.scale)]}
    offsets = []
    for _ in range(2 if kind == "channels" else 1):
        distance, angle = draws.between(spec.distance), math.radians(draws.between(spec.angle))
        offsets.append([distance * math.sin(angle), distance * math.cos(angle)])
    return {"kind": kind, "offsets": offsets}  # down and to the right; of red, then of blue


def apply(image: Image, drawn: Parameters, workspace: Any) -> Image:
    from pipeline.data.degradations import host

    image, kind = levels(image), drawn["kind"]
    offsets = [(down, right) for down, right in drawn.get("offsets", [])]
    if kind == "image":
        return host.shifted(image, offsets[0])
    if kind == "chroma":
        ycc = cv2.transform(image, to_ycc().astype(np.float32))
        ycc[..., 1:] = host.shifted(ycc[..., 1:], offsets[0])
        return cv2.transform(ycc, np.linalg.inv(to_ycc()).astype(np.float32))
    for i, channel in enumerate((0, 2)):
        if kind == "channels":
            image[..., channel] = host.shifted(image[..., channel], offsets[i])
            continue
        down, across = (
            host.cubic_taps(
                (np.arange(length) - (length - 1) / 2) / (1 + drawn["scales"][i])
                + (length - 1) / 2,
                length,
            )
            for length in image.shape[:2]
        )
        image[..., channel] = host.sampled(image[..., channel], down, across)
    return image
