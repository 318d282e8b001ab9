"""Synthetic images of several kinds, for experiments and tests without photographs."""

from __future__ import annotations

import os
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import numpy as np
import tyro

from pipeline.cli import UserError, counted, run
from pipeline.data.image_pixels import prepare_decoders
from pipeline.libraries import cv2
from tools.images import WEBP_MAX_SIDE, encode
from tools.parallel import ordered_map, progress, thread_count

ImageKind = Literal["noise", "gradient", "edges", "text", "texture", "leaves", "zone"]
MAX_SIDE = 16384
MAX_LEAVES = 200_000  # a second of work
FONTS = (
    "FONT_HERSHEY_SIMPLEX",
    "FONT_HERSHEY_DUPLEX",
    "FONT_HERSHEY_TRIPLEX",
    "FONT_HERSHEY_COMPLEX",
)
"""Names of OpenCV fonts."""


@dataclass(frozen=True)
class Options:
    """Make synthetic images, reproducible by seed, for trying out tools and training.

    Kinds: noise (independent pixels), gradient (smooth, almost no detail), edges (polygons and
    lines), text, texture (amplitude 1/f, like photographs, but without edges), leaves (dead leaves:
    overlapping discs of all sizes, the closest to a photograph), zone (a zone plate with all
    frequencies up to the finest). They alternate: OUT/00000_noise.png, OUT/00001_gradient.png...
    They are no substitute for photographs in training.

    Example: python tools/make_test_images.py ~/test_images --count 70 --size 768 1024
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the images; an existing file with other content is never replaced."""
    count: int = 7
    """Number of images."""
    size: tuple[int, int] = (512, 512)
    """Height and width in pixels."""
    kinds: tuple[ImageKind, ...] = (
        "noise",
        "gradient",
        "edges",
        "text",
        "texture",
        "leaves",
        "zone",
    )
    """The kinds, in alternation."""
    format: Literal["npy", "png", "webp", "jp2"] = "png"
    """File format, always lossless."""
    seed: int = 0
    """Seed of the images; image k does not depend on their number."""
    threads: int = 0
    """Number of threads; 0 is one per core."""


def main(options: Options) -> int:
    """Make the images and print where they are."""
    _check_options(options)
    out = options.out.expanduser()
    prepare_decoders()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with progress(options.count, "image") as bar:
            written = 0
            for is_new in ordered_map(
                lambda number: _write(out, number, options),
                range(options.count),
                thread_count(options.threads),
            ):
                written += is_new
                bar.update()
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written: {error.strerror}; choose another OUT"
        ) from error
    print(
        f"{counted(written, 'image')} of {options.size[0]}x{options.size[1]} written to {out}; "
        f"already there: {options.count - written}"
    )
    return 0


def _check_options(options: Options) -> None:
    """Raise `UserError` for options that cannot work, before anything is written."""
    limit = WEBP_MAX_SIDE if options.format == "webp" else MAX_SIDE
    if not all(1 <= side <= limit for side in options.size):
        raise UserError(
            f"--size {options.size[0]} {options.size[1]}: both sides must be 1 to {limit} pixels"
        )
    if options.count < 1:
        raise UserError(f"--count {options.count}: must be at least 1")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: must be at least 0")
    if not options.kinds:
        raise UserError(f"--kinds: name at least one of {', '.join(KINDS)}")


def _write(out: Path, number: int, options: Options) -> bool:
    """Write image `number` unless it already exists; returns whether it was written."""
    kind = options.kinds[number % len(options.kinds)]
    path = out / f"{number:05d}_{kind}.{options.format}"
    content = encode(make_image(kind, options.size, options.seed, number), options.format)
    if path.exists():
        if path.read_bytes() != content:
            raise UserError(
                f"{path}: a different file with this name exists; choose another OUT, or move it "
                "away"
            )
        return False
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def make_image(kind: str, size: tuple[int, int], seed: int, number: int) -> np.ndarray:
    """Create an image: uint8 RGB (*size, 3).

    A pure function of its arguments (and of the versions of numpy and OpenCV).
    """
    random = np.random.default_rng([seed, list(KINDS).index(kind), number])
    return KINDS[kind](*size, random)


def _noise(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    return random.integers(0, 256, (height, width, 3), np.uint8)


def _gradient(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Four colours at the corners, smooth in between."""
    corners = random.uniform(0, 255, (2, 2, 3))
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[:, None]
    top, bottom = ((1 - x) * row[0] + x * row[1] for row in corners)
    return np.rint((1 - y) * top + y * bottom).astype(np.uint8)


def _edges(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Antialiased polygons and lines in flat colours."""
    pixels = np.full((height, width, 3), _colour(random), np.uint8)
    for _ in range(24):
        points = random.uniform(-0.1, 1.1, (int(random.integers(3, 7)), 2)) * (width, height)
        cv2.fillPoly(pixels, [np.rint(points).astype(np.int32)], _colour(random), cv2.LINE_AA)
        start, end = np.rint(random.uniform(0, 1, (2, 2)) * (width, height)).astype(int).tolist()
        cv2.line(pixels, start, end, _colour(random), int(random.integers(1, 5)), cv2.LINE_AA)
    return pixels


def _text(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Lines of random letters and digits in several sizes."""
    pixels = np.full((height, width, 3), 255 - random.integers(0, 40, 3), np.uint8)
    letters, baseline = list(string.ascii_letters + string.digits + " " * 10), 0
    while baseline < height:
        scale = float(random.uniform(0.4, 1.6))
        baseline += int(30 * scale)
        line = "".join(random.choice(letters, max(1, int(width / (14 * scale)))))
        cv2.putText(
            pixels,
            line,
            (4, baseline),
            getattr(cv2, FONTS[random.integers(len(FONTS))]),
            scale,
            random.integers(0, 120, 3).tolist(),
            1 + (scale > 1),
            cv2.LINE_AA,
        )
    return pixels


def _texture(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Noise with the 1/f spectrum of natural images (Field, 1987), in correlated colours."""
    spectrum = np.fft.rfft2(random.standard_normal((3, height, width), np.float32))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no mean; it is set below
    planes = np.fft.irfft2(spectrum / frequency, s=(height, width))
    planes /= np.maximum(planes.std(axis=(1, 2), keepdims=True), 1e-9)
    luma, *chroma = planes  # most of a photograph's contrast is common to its channels
    colours = np.stack(
        [
            luma + 0.25 * chroma[0],
            luma - 0.1 * chroma[0] + 0.1 * chroma[1],
            luma + 0.25 * chroma[1],
        ],
        -1,
    )
    return np.clip(
        np.rint(random.uniform(90, 160, 3) + random.uniform(25, 50) * colours), 0, 255
    ).astype(np.uint8)


def _leaves(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Dead leaves: occluding discs with a radius density of r^-3 (Lee, Mumford and Huang, 2001)."""
    pixels = np.full((height, width, 3), _colour(random), np.uint8)
    largest = max(height, width) / 4
    smallest = min(2.0, largest / 2)
    area = 2 * np.pi * smallest**2 * np.log(largest / smallest)  # mean area of a disc
    # Enough to hide all but 2 % of the background.
    count = min(MAX_LEAVES, int(4 * height * width / area) + 50)
    draws = random.uniform(0, 1, count)
    radii = 1 / np.sqrt(draws / smallest**2 + (1 - draws) / largest**2)
    centres = random.uniform(0, 1, (count, 2)) * (width, height)
    for radius, centre in zip(radii, centres, strict=True):
        # In sixteenths of a pixel.
        x, y, r = np.rint([*(centre * 16), radius * 16]).astype(int).tolist()
        cv2.circle(pixels, (x, y), max(1, r), _colour(random), -1, cv2.LINE_AA, 4)
    return pixels


def _zone(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """A zone plate: rings whose frequency rises to half a cycle per pixel at the farther edge."""
    y, x = np.ogrid[:height, :width]
    centre = random.uniform(0.3, 0.7, 2) * (height, width)
    radius = max(height, width, 2)
    phase = np.pi * ((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * radius)
    waves = np.cos(phase[..., None] + random.uniform(0, 2 * np.pi, 3) * 0.2)
    return np.rint(127.5 + 127.5 * waves).astype(np.uint8)


def _colour(random: np.random.Generator) -> list[int]:
    return random.integers(0, 256, 3).tolist()


KINDS: dict[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "noise": _noise,
    "gradient": _gradient,
    "edges": _edges,
    "text": _text,
    "texture": _texture,
    "leaves": _leaves,
    "zone": _zone,
}


if __name__ == "__main__":
    run(Options, main)
