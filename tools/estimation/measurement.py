"""All measurements of one image: file and pixels in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.image_headers import ImageHeader
from tools.estimation import chroma, jpeg, levels, noise, sharpness, webp

MIN_SIDE = 64  # pixels; smaller images have too little detail to measure
MAX_SIDE = 1024  # pixels; of the middle part that is measured
Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Jpeg:
    """A JPEG compression: of the file itself, or found in the pixels of another format."""

    quality: int
    subsampling: str | None
    """"444", "422", "440", "420", "411", "410", "gray", "other"; `None`: unknown."""
    offset: tuple[int, int]
    """(row, column) of the first whole block, 0..7 each."""
    is_file: bool
    is_standard: bool = True
    """Whether the file's tables are libjpeg's; the quality is the nearest one otherwise."""


@dataclass(frozen=True)
class Measurement:
    """The measurements of one image. Levels are 0..255; lengths are in pixels of the image."""

    name: str
    height: int
    width: int
    format: str
    is_lossy: bool
    """Whether the file's own codec is lossy."""
    depth: int
    """Bits per sample of the file."""
    jpeg: Jpeg | None
    webp_quality: int | None
    """0..100, of a lossy WebP file."""
    subsampling: str | None
    """Chroma subsampling by any codec; "gray" for an image without colour; `None`: unknown."""
    luma_noise: float
    """Standard deviation of white noise in Y, from before the JPEG compression if there is one."""
    visible_noise: float
    """The weakest noise that the JPEG compression leaves visible; 0 without one."""
    chroma_noise: float | None
    """Standard deviation of noise in Cb and Cr; `None` if a codec hides it or the image is gray."""
    enlargement: float | None
    """Factor of an earlier enlargement; `None`: not found."""
    is_repeated: bool
    """Whether the enlargement repeated pixels (nearest neighbour)."""
    blur: float | None
    """Sigma of a Gaussian blur, in pixels from before the enlargement; `None`: too few edges."""
    levels: int | None
    """Number of levels in use, out of 256; `None`: unknown."""
    bars: tuple[int, int, int, int]
    """Heights and widths of black bars: top, bottom, left, right."""
    combed: float
    """Share of blocks with combing, as in interlaced frames."""


def measure(name: str, pixels: NDArray[np.uint8], header: ImageHeader, data: bytes) -> Measurement:
    """Measure one image.

    `pixels` is the decoded image, uint8 RGB (height, width, 3), upright; `data` is its file. Raises
    `ValueError` if a side is shorter than `MIN_SIDE` without black bars.
    """
    height, width = pixels.shape[:2]
    bars = levels.black_bars(_luma(pixels))
    top, left, part = _middle(pixels, bars)
    if min(part.shape[:2]) < MIN_SIDE:
        raise ValueError(f"{height}x{width}: too small to measure; the least is {MIN_SIDE} pixels")
    luma = _luma(part)
    blue, red = (part[..., 2] - luma) / 1.772, (part[..., 0] - luma) / 1.402
    clipped = ((part == 0) | (part == 255)).any(axis=2)
    is_gray = max(float(np.abs(blue).max()), float(np.abs(red).max())) < 2

    compression, trace = None, None
    tables = jpeg.read_tables(data) if header.format == "jpeg" and header.is_lossy else None
    if tables is not None:
        steps = tables.luma.T if header.orientation >= 5 else tables.luma
        # A rotation may shift the blocks.
        origin = (0, 0) if header.orientation == 1 else _grid_of(luma)
        grid = ((origin[0] - top) % 8, (origin[1] - left) % 8)
        compression = Jpeg(
            tables.quality, tables.subsampling, origin, True, is_standard=tables.is_standard
        )
    else:
        trace = jpeg.find_trace(luma, clipped)
        if trace is not None:
            steps, grid = trace.luma, trace.offset
            found = "gray" if is_gray else chroma.after_jpeg(blue, red, trace, clipped)
            offset = (grid[0] + top) % 8, (grid[1] + left) % 8
            compression = Jpeg(trace.quality, found, offset, False)
    remaining = noise.white_noise(luma)
    if compression is None:
        luma_noise, visible, borders = remaining, 0.0, None
    else:
        borders = grid
        luma_noise, visible = noise.noise_below_jpeg(jpeg.block_dct(luma, grid), steps)
    enlargement = sharpness.find_enlargement(luma, remaining, borders)
    # Noise from before a JPEG compression is no longer white, but strong noise still makes edges.
    at_edges = max(remaining, luma_noise)
    if enlargement is None:
        small = [luma, blue, red]
        edge = sharpness.edge_sigma(luma, at_edges, borders)
    else:
        small = [sharpness.reduced(plane, enlargement.factor) for plane in (luma, blue, red)]
        edge = sharpness.edge_sigma(small[0], at_edges)
    quality = webp.quality_of(data) if header.format == "webp" and header.is_lossy else None
    subsampling, chroma_noise = "gray" if is_gray else None, None
    if compression is not None:
        subsampling = compression.subsampling
    elif quality is not None:
        subsampling = "420"  # VP8 has no other
    elif not is_gray:
        # Measured at the size before the enlargement, which interpolates chroma too.
        subsampling = chroma.in_turns(*small[1:])
        chroma_noise = _chroma_noise(blue, red, subsampling)
    return Measurement(
        name=name,
        height=height,
        width=width,
        format=header.format,
        is_lossy=header.is_lossy,
        depth=header.depth,
        jpeg=compression,
        webp_quality=quality,
        subsampling=subsampling,
        luma_noise=luma_noise,
        visible_noise=visible,
        chroma_noise=chroma_noise,
        enlargement=None if enlargement is None else enlargement.factor,
        is_repeated=enlargement is not None and enlargement.is_repeated,
        blur=None if edge is None else sharpness.blur_sigma(edge),
        levels=levels.used_levels(part),
        bars=bars,
        combed=levels.combed_share(luma),
    )


def _luma(pixels: NDArray[np.uint8]) -> Plane:
    """Return the luma of ITU-R BT.601, full range, not rounded."""
    return pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def _middle(
    pixels: NDArray[np.uint8], bars: tuple[int, int, int, int]
) -> tuple[int, int, NDArray[np.uint8]]:
    """Return (top, left, pixels) of the middle part without the bars."""
    starts, ends = [], []
    for side, first, last in zip(pixels.shape[:2], bars[::2], bars[1::2], strict=True):
        start, end = first, side - last
        spare = max(0, end - start - MAX_SIDE)
        starts.append(start + spare // 2)
        ends.append(end - spare + spare // 2)
    return starts[0], starts[1], pixels[starts[0] : ends[0], starts[1] : ends[1]]


def _grid_of(luma: Plane) -> tuple[int, int]:
    trace = jpeg.find_trace(luma)
    return (0, 0) if trace is None else trace.offset


def _chroma_noise(blue: Plane, red: Plane, subsampling: str) -> float:
    """Return the RMS of the noise in Cb and Cr, at the size in which chroma was stored."""
    across, down = {"444": (1, 1), "422": (2, 1), "440": (1, 2), "420": (2, 2)}[subsampling]
    squares = [
        noise.white_noise(chroma.reduced(plane, across, down, is_smooth=False)) ** 2
        for plane in (blue, red)
    ]
    return float(np.sqrt(np.mean(squares)))
