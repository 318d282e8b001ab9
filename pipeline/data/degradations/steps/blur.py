"""Blur with a kernel of `pipeline.data.degradations.kernels`, mirroring the borders."""

from __future__ import annotations

import math

from pydantic import Field

from pipeline.data.degradations.steps.base import (
    Canvas,
    Draws,
    Image,
    Parameters,
    StepSpec,
    shares_of,
)
from pipeline.spec import Sigma


class BlurSpec(StepSpec):
    """Blur by a kernel."""

    kind: shares_of("gaussian") = Field(  # type: ignore[valid-type]
        {"gaussian": 1.0}, description="relative probability of each kind"
    )
    sigma: Sigma = Field(
        (0.2, 3.0), description="range of the standard deviation in pixels, uniform"
    )


def draw(spec: BlurSpec, draws: Draws, canvas: Canvas) -> Parameters:
    return {"kind": draws.choose(spec.kind), "sigma": draws.between(spec.sigma)}


def apply(image: Image, drawn: Parameters, workspace: object) -> Image:
    from pipeline.data.degradations import host, kernels

    side = 2 * math.ceil(4 * drawn["sigma"]) + 1
    return host.filtered(
        image, kernels.gaussian_kernel(side, drawn["sigma"], drawn["sigma"], 0), workspace
    )
