"""Quantisation to few levels without dithering: bands in skies and shadows."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

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
from pipeline.spec import Range, within


class BandingSpec(StepSpec):
    """Quantisation to few levels, equally spaced from black to white."""

    kind: shares_of("rgb", "luma") = Field(  # type: ignore[valid-type]
        {"rgb": 1.0, "luma": 1.0},
        description="relative probability of quantising every channel, or luma (BT.601) only",
    )
    levels: Annotated[Range, within(2, 65536)] = Field(
        (16, 64), description="range of the number of levels, uniform in its logarithm"
    )
    bits: Annotated[Range, within(1, 16)] | None = Field(
        None, description="range of the number of bits, instead of levels; n bits are 2^n levels"
    )

    @model_validator(mode="after")
    def _one_of_the_two(self) -> BandingSpec:
        # The default may be written out, as in the recipe that a run keeps.
        if self.bits and self.levels != BandingSpec.model_fields["levels"].default:
            raise ValueError("give levels or bits, not both")
        return self


def draw(spec: BandingSpec, draws: Draws, canvas: Canvas) -> Parameters:
    kind = draws.choose(spec.kind)
    if spec.bits:
        return {"kind": kind, "levels": 2 ** draws.integer(spec.bits)}
    low, high = spec.levels
    return {"kind": kind, "levels": round(low * (high / low) ** draws.uniform())}


def apply(image: Image, drawn: Parameters, workspace: Any) -> Image:
    image, step = levels(image), np.float32(255 / (drawn["levels"] - 1))
    if drawn["kind"] == "rgb":
        return _quantised(image, step)
    luma = cv2.transform(image, np.array([LUMA["bt601"]], np.float32))
    image += (_quantised(luma.copy(), step) - luma)[..., None]
    return image


def _quantised(values: Image, step: np.float32) -> Image:
    """Clip to 0..255 and round to multiples of `step`, in place."""
    values.clip(0, 255, out=values)
    values /= step
    np.rint(values, out=values)
    values *= step
    return values
