"""Halos: bright and dark lines along edges, as in over-sharpened video, scans and prints.

Unlike with `sharpen`, the threshold is subtracted from the difference, so that lines begin smoothly
above it. Lines may be restricted to one side of an edge, to brightness or to rows, and be limited.
"""

from __future__ import annotations

import math
from typing import Annotated

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
from pipeline.spec import Levels, Probability, Range, within


class HaloSpec(StepSpec):
    """Bright and dark lines along edges."""

    kind: shares_of("both", "bright", "dark") = Field(  # type: ignore[valid-type]
        {"both": 1.0},
        description="relative probability of lines on both sides of an edge, on its bright side "
        "(brighter still) or on its dark side (darker still)",
    )
    radius: Annotated[Range, within(0.5, 30)] = Field(
        (2.0, 5.0),
        description="range of the width of the lines in pixels; sigma of the blur is half of it",
    )
    amount: Annotated[Range, within(0, 20)] = Field(
        (0.5, 2.0), description="range of the factor of the image minus its blur, uniform"
    )
    threshold: Levels = Field(
        (4.0, 12.0),
        description="range of the difference in levels (0..255) above which lines begin",
    )
    overshoot: Levels | None = Field(
        None,
        description="range of the levels by which lines may exceed the extremes of the pixels "
        "within the radius; none: no limit. 0 steepens edges without adding lines",
    )
    luma: Probability = Field(
        0.5, description="probability of lines in brightness only, as in video"
    )
    horizontal: Probability = Field(
        0.0, description="probability of sharpening along rows only, as in analogue video"
    )


def draw(spec: HaloSpec, draws: Draws, canvas: Canvas) -> Parameters:
    drawn = {
        "kind": draws.choose(spec.kind),
        "radius": draws.between(spec.radius),
        "amount": draws.between(spec.amount),
        "threshold": draws.between(spec.threshold),
        "luma": draws.chance(spec.luma),
        "horizontal": draws.chance(spec.horizontal),
    }
    return (
        drawn if spec.overshoot is None else {**drawn, "overshoot": draws.between(spec.overshoot)}
    )


def apply(image: Image, drawn: Parameters, workspace: object) -> Image:
    from pipeline.data.degradations import host, kernels, noise
    from pipeline.libraries import cv2

    image, sigma = levels(image), drawn["radius"] / 2
    kernel = kernels.gaussian_kernel(2 * math.ceil(4 * sigma) + 1, sigma, sigma, 0)
    if drawn["horizontal"]:
        kernel = kernel.sum(0, keepdims=True)
    blurred = host.filtered(image, kernel, workspace)
    lines = cv2.subtract(
        image, blurred, dst=workspace.array("detail", image.shape, apart_from=image)
    )
    if drawn["luma"]:
        weights = np.tile(np.array(noise.GRAY, np.float32), (3, 1))
        lines = cv2.transform(
            lines, weights, dst=workspace.array("luma", image.shape, apart_from=image)
        )
    # Shrunk towards 0 by the threshold: max(d - t, 0) + min(d + t, 0).
    part = workspace.array("part", image.shape, apart_from=image)
    kind, threshold = drawn["kind"], drawn["threshold"]
    if kind == "bright":
        np.maximum(np.subtract(lines, threshold, out=lines), 0, out=lines)
    elif kind == "dark":
        np.minimum(np.add(lines, threshold, out=lines), 0, out=lines)
    else:
        np.clip(lines, -threshold, threshold, out=part)
        cv2.subtract(lines, part, dst=lines)
    if "overshoot" not in drawn:
        return cv2.scaleAdd(lines, drawn["amount"], image, dst=lines)
    cv2.scaleAdd(lines, drawn["amount"], image, dst=lines)
    reach = math.ceil(drawn["radius"])
    around = np.ones((1 if drawn["horizontal"] else 2 * reach + 1, 2 * reach + 1), np.uint8)
    for extreme, limit, sign in ((cv2.dilate, np.minimum, 1), (cv2.erode, np.maximum, -1)):
        extreme(image, around, dst=part, borderType=cv2.BORDER_REFLECT_101)
        limit(lines, np.add(part, sign * drawn["overshoot"], out=part), out=lines)
    return lines
