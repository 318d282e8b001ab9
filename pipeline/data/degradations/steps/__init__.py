"""The steps of degradation chains: one file per step, one row in `STEPS`."""

from __future__ import annotations

from pipeline.data.degradations.steps import (
    banding,
    blur,
    chroma,
    dither,
    halftone,
    halo,
    noise,
    resize,
    ringing,
    sharpen,
)
from pipeline.data.degradations.steps.base import Step

STEPS: dict[str, Step] = {
    "banding": Step(banding.BandingSpec, banding.draw, banding.apply),
    "blur": Step(blur.BlurSpec, blur.draw, blur.apply),
    "chroma": Step(chroma.ChromaSpec, chroma.draw, chroma.apply),
    "dither": Step(dither.DitherSpec, dither.draw, dither.apply),
    "halftone": Step(halftone.HalftoneSpec, halftone.draw, halftone.apply),
    "halo": Step(halo.HaloSpec, halo.draw, halo.apply),
    "noise": Step(noise.NoiseSpec, noise.draw, noise.apply),
    "resize": Step(resize.ResizeSpec, resize.draw, resize.apply),
    "ringing": Step(ringing.RingingSpec, ringing.draw, ringing.apply),
    "sharpen": Step(sharpen.SharpenSpec, sharpen.draw, sharpen.apply),
}
