"""Pictures of what each degradation step does, for docs/degradations.md.

One picture per step: a part of a photograph as it is, and after each kind of the step at a setting
that is easy to see.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from pipeline.cli import UserError, nearest, run
from pipeline.data.degradations.host import Workspace, rounded
from pipeline.data.degradations.steps import STEPS
from pipeline.data.degradations.steps.base import NUMBERS, Canvas, Draws
from pipeline.files import write_atomically
from pipeline.libraries import cv2
from tools.show_batch import blocks, step_words

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "degradations"
MAX_BYTES = 60_000
FACTOR, GAP, LETTERS, LINE = 2, 8, 12, 16
COLUMNS = {5: 5, 6: 3}  # number of panels -> of those in a row, if not 4
# Parts of skimage.data.astronaut, a photograph by NASA in the public domain, as (top, left,
# reduction): a face, and a badge, whose colors have clear edges.
FACE, BADGE, SIDE = (30, 84, 2), (352, 142, 1), 64
OF_BADGE = ("chroma", "color", "shift")
MARGIN = 20  # pixels around the part that are degraded with it

Section = Mapping[str, Any]
# Step -> its sections in a recipe, one per panel, completed from NEUTRAL, which captions omit. A
# step that is not here is drawn three times with its defaults.
SHOWN: dict[str, Sequence[Section]] = {
    "banding": [
        {"kind": "rgb", "levels": 6},
        {"kind": "luma", "levels": 6},
        {"kind": "rgb", "bits": 4},
    ],
    "blur": [
        {"kind": "gaussian", "sigma": 2},
        {"kind": "anisotropic", "sigma": [0.5, 4], "angle": 30},
        {"kind": "generalized", "sigma": 2, "beta_generalized": 0.6},
        {"kind": "sinc", "cutoff": 1.1},
        {"kind": "lens", "radius": 3},
        {"kind": "motion", "length": 9, "angle": 30},
        {"kind": "median", "median_radius": 2},
    ],
    "chroma": [
        {"kind": "420", "up": "nearest"},
        {"kind": "422", "up": "nearest"},
        {"kind": "411", "up": "nearest"},
        {"kind": "410", "up": "nearest"},
        {"kind": "410", "siting": "center", "decoded_siting": "top_left"},
        {"kind": "444", "decoded_matrix": "bt709"},
        {"kind": "444", "range": "limited", "decoded_range": "full"},
    ],
    "color": [
        {"black": -50},
        {"white": 330},
        {"gamma": 1.6},
        {"temperature": 0.2},
        {"hue": 30},
        {"saturation": 0.3},
        {"saturation": 1.6},
    ],
    "compress": [
        {"codec": "jpeg", "quality": 12},
        {"codec": "webp", "quality": 4},
        {"codec": "avif", "quality": 12},
        {"codec": "jp2", "quality": 24},
        {"codec": "mpeg2", "quality": 24},
        {"codec": "h264", "quality": 42},
        {"codec": "hevc", "quality": 42},
    ],
    "dither": [
        {"kind": "ordered", "palette": "uniform", "levels": 3, "matrix": 4},
        {"kind": "floyd_steinberg", "palette": "uniform", "levels": 3},
        {"kind": "none", "palette": "median_cut", "colors": 8},
        {"kind": "ordered", "palette": "median_cut", "colors": 8, "matrix": 8},
        {"kind": "floyd_steinberg", "palette": "median_cut", "colors": 8},
    ],
    "ghosting": [
        {"kind": "echo", "strength": 0.4, "distance": 12},
        {"kind": "echo", "strength": 0.4, "distance": 12, "negative": True},
        {"kind": "blend", "strength": 0.5, "distance": 5, "angle": 30},
    ],
    "halftone": [
        {"kind": "cmyk", "cell": 4},
        {"kind": "cmyk", "shape": "lines", "cell": 4},
        {"kind": "gray", "cell": 4},
        {"kind": "rgb", "cell": 4},
    ],
    "halo": [
        {"kind": "both", "radius": 4, "amount": 2},
        {"kind": "bright", "radius": 4, "amount": 2},
        {"kind": "dark", "radius": 4, "amount": 2},
        {"kind": "both", "radius": 4, "amount": 2, "horizontal": True},
    ],
    "interlace": [
        {"kind": kind, "motion": 6} for kind in ("combing", "blend", "bob", "line_doubling")
    ],
    "noise": [
        {"kind": "gaussian", "sigma": 25},
        {"kind": "gaussian", "sigma": 25, "gray": True},
        {"kind": "gaussian", "space": "ycc", "sigma": 3, "chroma_sigma": 25},
        {"kind": "poisson", "poisson_scale": 2},
        {"kind": "salt_and_pepper", "amount": 0.04},
        {"kind": "perlin", "sigma": 20, "feature_size": 16},
        {"kind": "grain", "sigma": 25, "grain_size": 0.8},
    ],
    "pixelate": [{"block": 2}, {"block": 4}, {"block": 6}],
    "resize": [
        {"kind": kind, "factor": 0.4}
        for kind in (
            "nearest",
            "area",
            "linear",
            "cubic_antialiased",
            "lanczos",
            "mitchell",
            "hermite",
        )
    ],
    "ringing": [
        {"kind": "horizontal", "cutoff": 1.2, "lobes": 6},
        {"kind": "both", "cutoff": 1.2, "lobes": 6},
    ],
    "scanlines": [
        {"strength": 0.5, "period": 2},
        {"strength": 0.3, "period": 3},
        {"strength": 0.5, "period": 4},
    ],
    "sharpen": [
        {"kind": "unsharp", "sigma": 1, "amount": 1.5},
        {"kind": "unsharp", "sigma": 2, "amount": 1.5},
        {"kind": "usm", "sigma": 2, "amount": 1.5},
    ],
    "shift": [
        {"kind": "channels", "distance": 2, "angle": 0},
        {"kind": "radial", "scale": 0.02},
        {"kind": "chroma", "distance": 3, "angle": 0},
    ],
}
NEUTRAL: dict[str, Section] = {
    "color": {"gamma": 1, "temperature": 0, "contrast": 1, "brightness": 0, "saturation": 1},
    "ghosting": {"negative": 0},
    "halo": {"luma": 0, "threshold": 6},
    "noise": {"gray": 0},
    "halftone": {"shape": "dots", "rotation": 0},
    "interlace": {"vertical_motion": 0},
}


@dataclass(frozen=True)
class Options:
    """Draw the pictures of docs/degradations.md: what each degradation step does.

    Example: python -m benchmarks.degradation_pictures blur noise
    """

    steps: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[STEP ...]")
    ] = ()
    """Steps to draw. Default: all."""
    out: Path = OUT
    """Folder of the pictures, STEP.jpg."""


def main(options: Options) -> None:
    """Write the pictures."""
    for name in options.steps:
        if name not in STEPS:
            raise UserError(
                f"no step named {name!r}{nearest(name, STEPS)}; there are {', '.join(STEPS)}"
            )
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.steps or STEPS:
        content = encoded(picture(name))
        write_atomically(options.out / f"{name}.jpg", content)
        print(f"{options.out / name}.jpg: {len(content) / 1000:.0f} kB")


def picture(name: str) -> Image.Image:
    """Draw the part of the photograph as it is, and after each setting of a step."""
    import skimage.data

    top, left, reduction = BADGE if name in OF_BADGE else FACE
    photo = skimage.data.astronaut()
    if reduction > 1:
        size = photo.shape[1] // reduction, photo.shape[0] // reduction
        photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    rows, columns = (slice(place - MARGIN, place + SIDE + MARGIN) for place in (top, left))
    region = np.ascontiguousarray(photo[rows, columns])
    panels = [(cut(region), "before")]
    step = STEPS[name]
    sections = SHOWN.get(name) or [{}] * 3
    for number, section in enumerate(sections):
        spec = step.Spec.model_validate({**NEUTRAL.get(name, {}), **section})
        numbers = np.random.default_rng(number).random(NUMBERS).tolist()
        drawn = step.draw(spec, Draws(iter(numbers)), Canvas(region.shape[:2], region.shape[:2], 2))
        workspace = Workspace()
        after = rounded(step.apply(region.copy(), drawn, workspace), workspace)
        panels.append((cut(after), caption(section, drawn)))
    return grid(panels)


def cut(image: np.ndarray) -> np.ndarray:
    """Return the part without its margins, enlarged to blocks: (FACTOR * SIDE) x as much."""
    length = SIDE + 2 * MARGIN
    return blocks(image, [MARGIN / length] * 2, [SIDE / length] * 2, FACTOR * SIDE)


def caption(section: Section, drawn: Mapping[str, Any]) -> str:
    """Return what a recipe says of the step, with what was drawn from its ranges."""
    if not section:
        return step_words(drawn)
    words = [str(section[key]).replace("_", " ") for key in ("kind", "codec") if key in section]
    for key, value in section.items():
        if key in ("kind", "codec") or value == 0:
            continue
        shown = drawn.get(key, value) if isinstance(value, Sequence) else value
        if isinstance(shown, list | tuple):
            shown = " and ".join(f"{one:.2g}" for one in shown)
        name = "beta" if key.startswith("beta_") else key.replace("_", " ")
        words.append(name if value is True else f"{name} {str(shown).replace('_', ' ')}")
    return ", ".join(words)


def grid(panels: Sequence[tuple[np.ndarray, str]]) -> Image.Image:
    """Draw panels, (FACTOR * SIDE) x as much, in rows with their captions below."""
    side, letters = FACTOR * SIDE, ImageFont.load_default(LETTERS)
    columns = COLUMNS.get(len(panels), min(4, len(panels)))
    texts = [wrapped(text, side, letters) for _, text in panels]
    rows = [
        range(first, min(first + columns, len(panels))) for first in range(0, len(panels), columns)
    ]
    heights = [side + LINE * max(len(texts[i]) for i in row) + 2 * GAP for row in rows]
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, GAP + sum(heights)), "white")
    draw, top = ImageDraw.Draw(sheet), GAP
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = GAP + column * (side + GAP)
            sheet.paste(Image.fromarray(panels[i][0]), (left, top))
            for number, line in enumerate(texts[i]):
                draw.text((left, top + side + 2 + number * LINE), line, "black", letters)
        top += height
    return sheet


def wrapped(text: str, width: int, letters: ImageFont.FreeTypeFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if letters.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def encoded(sheet: Image.Image) -> bytes:
    """Return a JPEG of at most MAX_BYTES, of the best quality that allows, 90 at most."""
    for quality in range(90, 40, -5):
        file = io.BytesIO()
        # 4:2:0, because every pixel of the photograph is a block of 2x2 on the chroma grid.
        sheet.save(file, "JPEG", quality=quality, subsampling=2, optimize=True, progressive=True)
        if file.tell() <= MAX_BYTES:
            return file.getvalue()
    raise AssertionError("the picture is too large; show fewer panels")


if __name__ == "__main__":
    run(Options, main)
