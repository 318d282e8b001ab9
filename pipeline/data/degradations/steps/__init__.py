"""The steps of degradation chains: one file per step, one row in `STEPS`."""

from __future__ import annotations

from pipeline.data.degradations.steps import blur, chroma, noise, resize
from pipeline.data.degradations.steps.base import Step

STEPS: dict[str, Step] = {
    "blur": Step(blur.BlurSpec, blur.draw, blur.apply),
    "chroma": Step(chroma.ChromaSpec, chroma.draw, chroma.apply),
    "noise": Step(noise.NoiseSpec, noise.draw, noise.apply),
    "resize": Step(resize.ResizeSpec, resize.draw, resize.apply),
}
