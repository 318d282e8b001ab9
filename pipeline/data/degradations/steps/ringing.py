"""Ringing: ripples beside edges after a sharp frequency cutoff, as in analogue video."""

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
    shares_of,
)
from pipeline.spec import Range, within


class RingingSpec(StepSpec):
    """A sharp frequency cutoff: a sinc filter along rows, or along rows and columns."""

    kind: shares_of("horizontal", "both") = Field(  # type: ignore[valid-type]
        {"horizontal": 1.0, "both": 1.0},
        description="relative probability of filtering along rows only, as in analogue video, or "
        "along rows and columns",
    )
    cutoff: Annotated[Range, within(0.1, 3.1416)] = Field(
        (1.2, 2.4), description="range of the cutoff in radians per pixel, at most pi, uniform"
    )
    lobes: Annotated[Range, within(1, 16)] = Field(
        (3.0, 8.0), description="range of the number of ripples on each side of an edge, integer"
    )


def draw(spec: RingingSpec, draws: Draws, canvas: Canvas) -> Parameters:
    return {
        "kind": draws.choose(spec.kind),
        "cutoff": min(draws.between(spec.cutoff), math.pi),
        "lobes": draws.integer(spec.lobes),
    }


def apply(image: Image, drawn: Parameters, workspace: object) -> Image:
    from pipeline.data.degradations import host, kernels

    line = kernels.line_sinc(drawn["cutoff"], drawn["lobes"])
    column = line if drawn["kind"] == "both" else np.ones(1, np.float32)
    return host.filtered(image, np.outer(column, line), workspace)
