"""Scan lines of a cathode-ray tube: dark gaps between the lines."""

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
)
from pipeline.spec import Range, within


class ScanlinesSpec(StepSpec):
    """Rows darkened by a sine wave."""

    strength: Annotated[Range, within(0, 1)] = Field(
        (0.1, 0.5), description="range of the share of brightness that the darkest rows lose"
    )
    period: Annotated[Range, within(2, 256)] = Field(
        (2.0, 4.0), description="range of the distance between lines in pixels"
    )


def draw(spec: ScanlinesSpec, draws: Draws, canvas: Canvas) -> Parameters:
    return {
        "strength": draws.between(spec.strength),
        "period": draws.between(spec.period),
        "phase": draws.uniform(),
    }


def apply(image: Image, drawn: Parameters, workspace: Any) -> Image:
    turns = np.arange(image.shape[0]) / drawn["period"] + drawn["phase"]
    gains = 1 - drawn["strength"] * (0.5 - 0.5 * np.cos(2 * np.pi * turns))
    return levels(image) * gains[:, None, None].astype(np.float32)
