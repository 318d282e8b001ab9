"""Measure how far the estimates of tools/estimate_degradation.py are from known degradations.

Photographs are halved, so that they are sharp and have full chroma whatever camera or codec they
come from, degraded with known parameters, and measured as if they had been saved as PNG. One row
per degradation: how many images were recognised, the mean absolute error, and the bias.
"""

from __future__ import annotations

import io
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cv2
import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

from pipeline.cli import UserError, counted, run
from pipeline.data.image_files import MANIFEST
from pipeline.data.image_headers import ImageHeader, read_header
from pipeline.data.image_pixels import decode_rgb, prepare_decoders
from tools.crops.grid import halved
from tools.estimation.measurement import Measurement, measure
from tools.files import walk
from tools.images import decode_file
from tools.parallel import ordered_map, progress, thread_count

Pixels = NDArray[np.uint8]
Degrade = Callable[[Pixels, np.random.Generator], Any]
"""(photograph, random generator) -> pixels, or the content of a file."""
Kind = Literal["jpeg", "webp", "chroma", "noise", "blur", "enlargement"]
KERNELS = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}
KERNELS |= {"Lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}
SUBSAMPLINGS = ("444", "422", "420")  # Pillow's numbers


@dataclass(frozen=True)
class Options:
    """Compare the estimates of tools/estimate_degradation.py with known degradations.

    Example: python benchmarks/estimation.py Kodak Sun-Hays80 --count 12
    """

    photos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOS")]
    """Folders of photographs of at least 600x400 pixels."""
    count: int = 12
    """Number of photographs from each folder: the last ones by name. The thresholds of the tool
    were chosen on the first 12 of Kodak and of Sun-Hays 80."""
    only: tuple[Kind, ...] = ("jpeg", "webp", "chroma", "noise", "blur", "enlargement")
    """Degradations to measure."""
    seed: int = 0
    """Seed of noise and of the parts that are cut off."""
    threads: int = 0
    """Number of threads; 0 is one per core."""


@dataclass(frozen=True)
class Case:
    """A degradation, its true value, and what the tool says about it."""

    label: str
    true: float
    degrade: Degrade
    estimate: Callable[[Measurement], float | None]
    """`None`: it was not recognised."""


@dataclass(frozen=True)
class Row:
    """The estimates for one case."""

    label: str
    true: float
    estimates: Sequence[float | None]

    def __str__(self) -> str:
        found = np.array([value for value in self.estimates if value is not None])
        share = f"{len(found) / len(self.estimates):.0%}".replace("%", " %")
        if not len(found):
            return f"| {self.label} | {self.true:g} | {share} | | | |"
        errors = found - self.true
        return (
            f"| {self.label} | {self.true:g} | {share} | {np.median(found):.2f} | "
            f"{np.abs(errors).mean():.2f} | {errors.mean():+.2f} |"
        )


def main(options: Options) -> int:
    """Measure and print."""
    if options.count < 1:
        raise UserError(f"--count {options.count}: must be at least 1")
    names = [
        folder / name
        for folder in options.photos
        for name in walk(folder, MANIFEST).images[-options.count :]
    ]
    if not names:
        raise UserError("no photographs; give folders of photographs")
    prepare_decoders()
    photographs = [halved(decode_file(name)) for name in names]
    small = min(min(photograph.shape[:2]) for photograph in photographs)
    if small < 200:
        raise UserError(f"a photograph has only {2 * small} pixels on a side; 400 are needed")
    cases = [case for kind in options.only for case in CASES[kind]()]
    print(f"{counted(len(photographs), 'photograph')}, halved; seed {options.seed}")
    print("| degradation | true | recognised | median | mean absolute error | bias |")
    print("|---|---|---|---|---|---|")
    started = time.monotonic()
    with progress(len(cases) * len(photographs), "image") as bar:

        def attempt(job: tuple[int, int]) -> float | None:
            case = cases[job[0]]
            rng = np.random.default_rng((options.seed, *job))
            made = case.degrade(photographs[job[1]], rng)
            if isinstance(made, bytes):
                header = read_header(made)
                return case.estimate(measure("", decode_rgb(made, header), header, made))
            pixels = np.ascontiguousarray(made)
            header = ImageHeader("png", *pixels.shape[:2])
            return case.estimate(measure("", pixels, header, b""))

        jobs = itertools.product(range(len(cases)), range(len(photographs)))
        estimates = ordered_map(attempt, jobs, thread_count(options.threads))
        for case in cases:
            values = []
            for value in itertools.islice(estimates, len(photographs)):
                values.append(value)
                bar.update()
            print(Row(case.label, case.true, values), flush=True)
    print(f"{len(cases) * len(photographs)} images in {time.monotonic() - started:.0f} s")
    return 0


def unchanged(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Return the photograph as it is."""
    return pixels


def jpeg(quality: int, subsampling: str = "420", *, is_cropped: bool = False) -> Degrade:
    """Return a degradation by JPEG; cropped: without up to 7 rows and columns."""

    def degrade(pixels: Pixels, rng: np.random.Generator) -> Pixels:
        file = io.BytesIO()
        Image.fromarray(pixels).save(
            file, "jpeg", quality=quality, subsampling=SUBSAMPLINGS.index(subsampling)
        )
        again = np.asarray(Image.open(file))
        top, left = rng.integers(0, 8, 2) if is_cropped else (0, 0)
        return again[top:, left:]

    return degrade


def webp_file(quality: int) -> Degrade:
    """Return a degradation by WebP that gives the file."""

    def degrade(pixels: Pixels, rng: np.random.Generator) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "webp", quality=quality)
        return file.getvalue()

    return degrade


def noise(sigma: float, *, is_gray: bool) -> Degrade:
    """Return a degradation by white noise, the same in all channels or independent."""

    def degrade(pixels: Pixels, rng: np.random.Generator) -> Pixels:
        shape = (*pixels.shape[:2], 1 if is_gray else 3)
        return rounded(pixels + rng.normal(0, sigma, shape))

    return degrade


def blur(sigma: float) -> Degrade:
    """Return a degradation by a Gaussian blur."""

    def degrade(pixels: Pixels, rng: np.random.Generator) -> Pixels:
        return cv2.GaussianBlur(pixels, (0, 0), sigma) if sigma else pixels

    return degrade


def enlarged(factor: float, kernel: str) -> Degrade:
    """Return a degradation by shrinking, by areas, and enlarging to the size before."""

    def degrade(pixels: Pixels, rng: np.random.Generator) -> Pixels:
        height, width = pixels.shape[:2]
        size = round(width / factor), round(height / factor)
        small = Image.fromarray(pixels).resize(size, Image.Resampling.BOX)
        return np.asarray(small.resize((width, height), KERNELS[kernel]))

    return degrade


def shrunk(factor: float) -> Degrade:
    """Return a degradation by shrinking with OpenCV's areas."""

    def degrade(pixels: Pixels, rng: np.random.Generator) -> Pixels:
        return cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)

    return degrade


def subsampled(kind: str, interpolation: int) -> Degrade:
    """Return a degradation by subsampling chroma (areas) and enlarging it again."""

    def degrade(pixels: Pixels, rng: np.random.Generator) -> Pixels:
        luma, *colors = cv2.split(cv2.cvtColor(pixels, cv2.COLOR_RGB2YCrCb))
        height, width = luma.shape
        size = width if kind == "444" else width // 2, height // 2 if kind == "420" else height
        again = [
            cv2.resize(
                cv2.resize(plane, size, interpolation=cv2.INTER_AREA),
                (width, height),
                interpolation=interpolation,
            )
            for plane in colors
        ]
        return cv2.cvtColor(cv2.merge([luma, *again]), cv2.COLOR_YCrCb2RGB)

    return degrade


def in_order(*steps: Degrade) -> Degrade:
    """Return a degradation by several, one after another."""

    def degrade(pixels: Pixels, rng: np.random.Generator) -> Pixels:
        for step in steps:
            pixels = step(pixels, rng)
        return pixels

    return degrade


def rounded(levels: NDArray[np.float64]) -> Pixels:
    """Clip and round levels to bytes."""
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def _quality(found: Measurement) -> float | None:
    return None if found.jpeg is None else found.jpeg.quality


def _luma_noise(found: Measurement) -> float | None:
    return found.luma_noise


def _chroma_noise(found: Measurement) -> float | None:
    return found.chroma_noise


def _visible_noise(found: Measurement) -> float | None:
    return found.luma_noise or None


def _blur(found: Measurement) -> float | None:
    return found.blur


def _factor(found: Measurement) -> float | None:
    return found.enlargement


def _jpeg_cases() -> Iterator[Case]:
    for quality in (30, 50, 70, 80, 90, 95):
        yield Case(
            f"JPEG {quality}, cropped: quality",
            quality,
            jpeg(quality, is_cropped=True),
            _quality,
        )
    yield Case("no JPEG (false alarms): quality", 100, unchanged, _quality)
    yield Case(
        "JPEG 75, then noise 3 (false alarms): quality",
        75,
        in_order(jpeg(75), noise(3, is_gray=False)),
        _quality,
    )
    for quality, kind in itertools.product((50, 85), SUBSAMPLINGS):
        yield Case(
            f"JPEG {quality}, {kind}: chroma right",
            1,
            jpeg(quality, kind),
            lambda found, kind=kind: 1.0 if found.subsampling == kind else None,
        )


def _webp_cases() -> Iterator[Case]:
    for quality in (20, 50, 75, 90):
        yield Case(
            f"WebP {quality}, not saved again: quality",
            quality,
            webp_file(quality),
            lambda found: found.webp_quality,
        )


def _chroma_cases() -> Iterator[Case]:
    kernels = {"linear": cv2.INTER_LINEAR, "nearest": cv2.INTER_NEAREST, "cubic": cv2.INTER_CUBIC}
    for kind, (name, kernel) in itertools.product(SUBSAMPLINGS, kernels.items()):
        if kind == "444" and name != "linear":
            continue
        label = "full chroma, no JPEG" if kind == "444" else f"chroma {kind}, {name}, no JPEG"
        yield Case(
            f"{label}: right",
            1,
            subsampled(kind, kernel),
            lambda found, kind=kind: 1.0 if found.subsampling == kind else None,
        )


def _noise_cases() -> Iterator[Case]:
    yield Case("no noise: luma noise", 0, unchanged, _luma_noise)
    yield Case("no noise: chroma noise", 0, unchanged, _chroma_noise)
    for sigma in (2, 5, 10, 20):
        yield Case(
            f"gray noise {sigma}: luma noise", sigma, noise(sigma, is_gray=True), _luma_noise
        )
    for sigma in (2, 5, 10, 20):
        # Cb and Cr, root mean square, of independent noise in R, G and B.
        yield Case(
            f"color noise {sigma}: chroma noise",
            round(0.640 * sigma, 2),
            noise(sigma, is_gray=False),
            _chroma_noise,
        )
    for quality, sigma in itertools.product((90, 75, 50), (4, 8, 15)):
        yield Case(
            f"gray noise {sigma}, then JPEG {quality}: luma noise",
            sigma,
            in_order(noise(sigma, is_gray=True), jpeg(quality)),
            _visible_noise,
        )
    yield Case("no noise, JPEG 75 (false alarms): luma noise", 0, jpeg(75), _visible_noise)
    yield Case(
        "gray noise 10, then blur 1: luma noise",
        10,
        in_order(noise(10, is_gray=True), blur(1)),
        _luma_noise,
    )


def _blur_cases() -> Iterator[Case]:
    for sigma in (0, 0.5, 1, 1.5, 2, 3, 4):
        yield Case(f"blur {sigma}", sigma, blur(sigma), _blur)
    for sigma in (0, 1, 2, 3):
        yield Case(f"blur {sigma}, then JPEG 50", sigma, in_order(blur(sigma), jpeg(50)), _blur)
    for sigma in (0, 1, 2, 3):
        added = noise(5, is_gray=True)
        yield Case(f"blur {sigma}, then noise 5", sigma, in_order(blur(sigma), added), _blur)
    for sigma in (0, 1, 2):
        steps = in_order(blur(sigma), noise(5, is_gray=True), jpeg(75))
        yield Case(f"blur {sigma}, then noise 5, then JPEG 75", sigma, steps, _blur)


def _enlargement_cases() -> Iterator[Case]:
    yield Case("not resized (false alarms): factor", 1, unchanged, _factor)
    yield Case("shrunk to 3/4 (false alarms): factor", 1, shrunk(0.75), _factor)
    yield Case("blur 2 (false alarms): factor", 1, blur(2), _factor)
    for factor, kernel in itertools.product((1.5, 2, 3, 4), KERNELS):
        yield Case(
            f"enlarged by {factor}, {kernel}: factor", factor, enlarged(factor, kernel), _factor
        )
    for factor in (1.5, 2, 3):
        added = noise(3, is_gray=True)
        yield Case(
            f"enlarged by {factor}, cubic, then noise 3: factor",
            factor,
            in_order(enlarged(factor, "cubic"), added),
            _factor,
        )
    for factor in (1.5, 2, 3):
        yield Case(
            f"enlarged by {factor}, cubic, then JPEG 75: factor",
            factor,
            in_order(enlarged(factor, "cubic"), jpeg(75)),
            _factor,
        )


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "jpeg": _jpeg_cases,
    "webp": _webp_cases,
    "chroma": _chroma_cases,
    "noise": _noise_cases,
    "blur": _blur_cases,
    "enlargement": _enlargement_cases,
}


if __name__ == "__main__":
    run(Options, main)
