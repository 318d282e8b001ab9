"""The steps of degradation chains: one file per step, one row in `STEPS`."""

from __future__ import annotations

from pipeline.data.degradations.steps import banding, blur, chroma, dither, noise, resize
from pipeline.data.degradations.steps.base import Step

STEPS: dict[str, Step] = {
    "banding": Step(banding.BandingSpec, banding.draw, banding.apply),
    "blur": Step(blur.BlurSpec, blur.draw, blur.apply),
    "chroma": Step(chroma.ChromaSpec, chroma.draw, chroma.apply),
    "dither": Step(dither.DitherSpec, dither.draw, dither.apply),
    "noise": Step(noise.NoiseSpec, noise.draw, noise.apply),
    "resize": Step(resize.ResizeSpec, resize.draw, resize.apply),
}
