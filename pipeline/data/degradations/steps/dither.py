"""Reduction to few colours with dithering, as in GIF files, old games and indexed PNG files.

Palettes and Floyd-Steinberg's error diffusion are Pillow's; the other error diffusions are those of
ffmpeg's filter `paletteuse`.
"""

from __future__ import annotations

import math
from functools import lru_cache
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
    shares_of,
)
from pipeline.spec import Range, within

Bytes = NDArray[np.uint8]
ColorCount = Annotated[Range, within(2, 256)]

# Kinds of error diffusion -> names of ffmpeg.
DIFFUSIONS = {"atkinson": "atkinson", "burkes": "burkes", "sierra_lite": "sierra2_4a"}
MEDIAN_CUT_PIXELS = 4096  # maximum number of evenly spaced pixels used for median cut
KINDS = ("ordered", "floyd_steinberg", *DIFFUSIONS, "none")


class DitherSpec(StepSpec):
    """Reduction to few colours, with dithering."""

    kind: shares_of(*KINDS) = Field(  # type: ignore[valid-type]
        {"ordered": 1.0, "floyd_steinberg": 2.0},
        description="relative probability of each kind; none takes the nearest colour",
    )
    palette: shares_of("uniform", "median_cut", "octree") = Field(  # type: ignore[valid-type]
        {"uniform": 1.0, "median_cut": 1.0},
        description="relative probability of equally spaced levels per channel, or of a palette "
        "adapted to the image (median_cut, octree)",
    )
    levels: ColorCount = Field(
        (3, 8), description="range of the number of levels per channel of uniform palettes"
    )
    colors: ColorCount = Field(
        (16, 256),
        description="range of the number of colours of adapted palettes, uniform in its logarithm",
    )
    matrix: shares_of("2", "4", "8") = Field(  # type: ignore[valid-type]
        {"4": 1.0, "8": 1.0},
        description="relative probability of each side of the Bayer matrix of ordered dithering",
    )


def draw(spec: DitherSpec, draws: Draws, canvas: Canvas) -> Parameters:
    drawn: Parameters = {"kind": draws.choose(spec.kind), "palette": draws.choose(spec.palette)}
    place = draws.uniform()
    if drawn["palette"] == "uniform":
        low, high = (round(end) for end in spec.levels)
        drawn["levels"] = low + int(place * (high - low + 1))
    else:
        low, high = spec.colors
        drawn["colors"] = round(low * (high / low) ** place)
    if drawn["kind"] == "ordered":
        drawn["matrix"] = int(draws.choose(spec.matrix))
    return drawn


def apply(image: Image, drawn: Parameters, workspace: Any) -> Image:
    from pipeline.data.degradations import host

    pixels, kind = host.rounded(image, workspace), drawn["kind"]
    if drawn["palette"] == "uniform":
        return _with_levels(pixels, kind, drawn["levels"], drawn.get("matrix", 2))
    return _with_palette(pixels, kind, drawn)


def _with_levels(pixels: Bytes, kind: str, count: int, side: int) -> Bytes:
    values = np.rint(np.arange(count) * (255 / (count - 1))).astype(np.uint8)
    if kind in ("ordered", "none"):
        place = levels(pixels) * np.float32((count - 1) / 255)
        place += thresholds(side, *pixels.shape[:2]) if kind == "ordered" else np.float32(0.5)
        return values[place.astype(np.uint8)]
    grays = values[:, None].repeat(3, 1)
    planes = [
        _diffused(np.ascontiguousarray(pixels[..., channel, None].repeat(3, -1)), grays, kind)
        for channel in range(3)
    ]
    return np.stack([plane[..., 0] for plane in planes], -1)


def _with_palette(pixels: Bytes, kind: str, drawn: Parameters) -> Bytes:
    from PIL import Image as Pillow

    if drawn["palette"] == "octree":
        source, method = pixels, Pillow.Quantize.FASTOCTREE
    else:  # median cut takes 50 times as long
        step = math.ceil(math.sqrt(pixels.shape[0] * pixels.shape[1] / MEDIAN_CUT_PIXELS))
        source = np.ascontiguousarray(pixels[::step, ::step])
        method = Pillow.Quantize.MEDIANCUT
    indexed = Pillow.fromarray(source).quantize(drawn["colors"], method)
    palette = np.array(indexed.getpalette(), np.uint8).reshape(-1, 3)
    if kind == "ordered":
        # About the distance between neighbouring colours, if they were equally spaced.
        spread = 255 / drawn["colors"] ** (1 / 3)
        shifted = levels(pixels) + spread * (thresholds(drawn["matrix"], *pixels.shape[:2]) - 0.5)
        pixels = np.rint(shifted).clip(0, 255).astype(np.uint8)
    return _diffused(pixels, palette, kind)


@lru_cache(maxsize=64)
def thresholds(side: int, height: int, width: int) -> NDArray[np.float32]:
    """Return Bayer's matrix of `side` 2, 4 or 8, repeated: (height, width, 1), within 0..1."""
    matrix = np.zeros((1, 1))
    while len(matrix) < side:
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    repeated = np.tile((matrix + 0.5) / side**2, (-(-height // side), -(-width // side)))
    return repeated[:height, :width, None].astype(np.float32)


def _diffused(pixels: Bytes, palette: Bytes, kind: str) -> Bytes:
    """Return the pixels in colours of the palette, (colours, 3), with error diffusion by `kind`."""
    if kind in DIFFUSIONS:
        return _by_ffmpeg(pixels, palette, DIFFUSIONS[kind])
    from PIL import Image as Pillow

    colors = Pillow.new("P", (1, 1))
    colors.putpalette(palette.tobytes())
    is_diffused = kind == "floyd_steinberg"
    dither = Pillow.Dither.FLOYDSTEINBERG if is_diffused else Pillow.Dither.NONE
    return palette[np.asarray(Pillow.fromarray(pixels).quantize(palette=colors, dither=dither))]


def _by_ffmpeg(pixels: Bytes, palette: Bytes, dither: str) -> Bytes:
    import av
    import av.filter

    height, width = pixels.shape[:2]
    bgra = np.full((height, width, 4), 255, np.uint8)
    bgra[..., :3] = pixels[..., ::-1]
    table = np.full((256, 4), 255, np.uint8)
    table[:, :3] = palette[0, ::-1]  # the filter needs 256 colours, which may be equal
    table[: len(palette), :3] = palette[:, ::-1]
    graph = av.filter.Graph()
    graph.threads = 1
    chosen, sink = graph.add("paletteuse", f"dither={dither}"), graph.add("buffersink")
    arrays, inputs = (bgra, table.reshape(16, 16, 4)), []
    for i, array in enumerate(arrays):
        size = f"video_size={array.shape[1]}x{array.shape[0]}"
        inputs.append(graph.add("buffer", f"{size}:pix_fmt=bgra:time_base=1/1"))
        inputs[i].link_to(chosen, 0, i)
    chosen.link_to(sink)
    graph.configure()
    for source, array in zip(inputs, arrays, strict=True):
        frame = av.VideoFrame.from_ndarray(array, "bgra")
        frame.pts = 0
        source.push(frame)
        source.push(None)
    indexed = sink.pull()
    indices = np.frombuffer(indexed.planes[0], np.uint8).reshape(height, -1)[:, :width]
    colors = np.frombuffer(indexed.planes[1], np.uint8).reshape(256, 4)  # sorted by the filter
    return np.ascontiguousarray(colors[:, 2::-1])[indices]
