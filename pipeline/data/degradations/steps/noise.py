"""Noise on an image, as a pure function of a seed.

Gaussian and Poisson noise are those of `pipeline.data.degradations.noise`.
"""

from __future__ import annotations

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
from pipeline.spec import Factor, Levels, Probability


class NoiseSpec(StepSpec):
    """Noise, added to levels that are neither clipped nor rounded."""

    kind: shares_of("gaussian", "poisson") = Field(  # type: ignore[valid-type]
        {"gaussian": 1.0}, description="relative probability of each kind"
    )
    sigma: Levels = Field(
        (1.0, 30.0),
        description="range of the standard deviation of Gaussian noise, in levels (0..255)",
    )
    poisson_scale: Factor = Field((0.05, 3.0), description="range of the factor of Poisson noise")
    gray: Probability = Field(0.4, description="probability of the same noise in all channels")


def draw(spec: NoiseSpec, draws: Draws, canvas: Canvas) -> Parameters:
    kind = draws.choose(spec.kind)
    bounds = spec.sigma if kind == "gaussian" else spec.poisson_scale
    return {
        "kind": kind,
        "level": draws.between(bounds),
        "gray": draws.chance(spec.gray),
        "words": draws.words(),
    }


def apply(image: Image, drawn: Parameters, workspace: object) -> Image:
    from pipeline.data.degradations import host, noise

    first, second = drawn["words"]
    keys = noise.noise_keys((first, second), *image.shape[:2], 1 if drawn["gray"] else 3)
    add = host.with_poisson if drawn["kind"] == "poisson" else host.with_gaussian
    return add(levels(image), keys, drawn["level"], workspace)
