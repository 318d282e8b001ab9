"""Pixelation: blocks of one colour, as in small images that were enlarged and in censored areas."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
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


class PixelateSpec(StepSpec):
    """Square blocks of one colour, the mean of their pixels."""

    block: Annotated[Range, within(1, 256)] = Field(
        (2, 6), description="range of the side of a block in pixels, uniform over integers"
    )


def draw(spec: PixelateSpec, draws: Draws, canvas: Canvas) -> Parameters:
    block = draws.integer(spec.block)
    # The first row and column of blocks may be cut by the border.
    return {"block": block, "offset": [draws.integer((0, block - 1)) for _ in range(2)]}


def apply(image: Image, drawn: Parameters, workspace: Any) -> Image:
    starts = [
        _starts(length, drawn["block"], offset)
        for length, offset in zip(image.shape[:2], drawn["offset"], strict=True)
    ]
    counts = [
        np.diff(start, append=length) for start, length in zip(starts, image.shape, strict=False)
    ]
    sums = np.add.reduceat(np.add.reduceat(levels(image), starts[0], axis=0), starts[1], axis=1)
    sums /= np.outer(*counts).astype(np.float32)[..., None]
    return sums.repeat(counts[0], axis=0).repeat(counts[1], axis=1)


def _starts(length: int, block: int, offset: int) -> NDArray[np.intp]:
    """Return the first pixel of each block; `offset` pixels of the first block are cut off."""
    starts = np.arange(-offset, length, block)
    starts[0] = 0
    return starts
