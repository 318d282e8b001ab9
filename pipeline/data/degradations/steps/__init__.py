"""The steps of degradation chains: one file per step, one row in `STEPS`."""

from __future__ import annotations

from pipeline.data.degradations.steps import (
    banding,
    blur,
    chroma,
    color,
    compress,
    dither,
    ghosting,
    halftone,
    halo,
    interlace,
    noise,
    pixelate,
    resize,
    ringing,
    scanlines,
    sharpen,
    shift,
)
from pipeline.data.degradations.steps.base import Step

STEPS: dict[str, Step] = {
    "banding": Step(banding.BandingSpec, banding.draw, banding.apply),
    "blur": Step(blur.BlurSpec, blur.draw, blur.apply, nodes=blur.NODES),
    "chroma": Step(chroma.ChromaSpec, chroma.draw, chroma.apply),
    "color": Step(color.ColorSpec, color.draw, color.apply, nodes=color.NODES),
    "compress": Step(
        compress.CompressSpec,
        compress.draw,
        compress.apply,
        compress.check,
        compress.NODES,
        compress.versions,
    ),
    "dither": Step(dither.DitherSpec, dither.draw, dither.apply),
    "ghosting": Step(ghosting.GhostingSpec, ghosting.draw, ghosting.apply),
    "halftone": Step(halftone.HalftoneSpec, halftone.draw, halftone.apply),
    "halo": Step(halo.HaloSpec, halo.draw, halo.apply),
    "interlace": Step(interlace.InterlaceSpec, interlace.draw, interlace.apply),
    "noise": Step(noise.NoiseSpec, noise.draw, noise.apply, nodes=noise.NODES),
    "pixelate": Step(pixelate.PixelateSpec, pixelate.draw, pixelate.apply),
    "resize": Step(resize.ResizeSpec, resize.draw, resize.apply, nodes=resize.NODES),
    "ringing": Step(ringing.RingingSpec, ringing.draw, ringing.apply),
    "scanlines": Step(scanlines.ScanlinesSpec, scanlines.draw, scanlines.apply),
    "sharpen": Step(sharpen.SharpenSpec, sharpen.draw, sharpen.apply, nodes=sharpen.NODES),
    "shift": Step(shift.ShiftSpec, shift.draw, shift.apply),
}
