"""Pixel statistics of a dataset: exact channel means and deviations, clipping, brightness.

Each image gives one histogram per channel (`histograms`). They are summed as integers (`Analysis`),
and moments and percentiles are computed from the sums (`summary`).
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import numpy as np
import tyro

from pipeline.cli import RunError, UserError, counted, run
from pipeline.data.image_files import MANIFEST, BadNpyError, read_file_list
from pipeline.data.image_headers import BadImageError
from pipeline.data.image_pixels import prepare_decoders
from pipeline.files import write_atomically
from pipeline.libraries import cv2
from tools.files import printable, sampled, walk
from tools.images import check_max_megapixels, decode_file
from tools.parallel import ordered_map, progress, quiet_libraries, thread_count

CHANNELS = ("red", "green", "blue")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
PERCENTILES = (1, 50, 99)
MAX_COUNT = 1 << 24  # cv2.calcHist counts in float32, which holds integers exactly up to here
NUM_SHOWN = 20


@dataclass(frozen=True)
class Options:
    """Compute exact channel means and standard deviations over all pixels of a dataset.

    Also reports range, clipping, and how much the brightness differs between images. The standard
    deviation is that of all pixels (population). Each image gives one histogram per channel, and
    these are summed as integers, so a million images need no more memory than one. Images are read
    as images_to_data.py reads photographs: 8 bits, upright, gray as RGB, transparency over white.

    Example: python tools/analyze_images.py --data-dir ~/dataset
    """

    data_dir: Path | None = None
    """Folder of the images (searched recursively), or, with --list, the folder that the names in
    the list are relative to; by default ~/dataset, or the folder of the list."""
    file_list: Annotated[Path | None, tyro.conf.arg(name="list")] = None
    """Analyze only the images of this file list, such as ~/dataset/training_file_list.txt."""
    sample: int | None = None
    """Analyze this many random images instead of all."""
    seed: int = 0
    """Seed of the random sample."""
    json: Path | None = None
    """Also write all numbers, with the histograms, to this file."""
    max_megapixels: float = 300
    """Skip larger images before decoding, because they could exhaust the memory."""
    threads: int = 0
    """Number of threads; 0 is one per core."""


def main(options: Options) -> int:
    """Analyze and print.

    Returns 0 if all images were read, 1 if some could not be read.
    """
    root, names = _images(options)
    check_max_megapixels(options.max_megapixels)
    prepare_decoders()
    started = time.monotonic()
    analysis, failed = Analysis(), 0
    with quiet_libraries(), progress(len(names), "file") as bar:

        def count(name: str) -> ImageCounts:
            return count_levels(root, name, options.max_megapixels)

        for image in ordered_map(count, names, thread_count(options.threads)):
            if image.reason:
                failed += 1
                if failed <= NUM_SHOWN:
                    print(f"could not be read: {printable(image.name)}: {image.reason}")
            else:
                analysis.add(image)
            bar.update()
    if failed > NUM_SHOWN:
        print(f"... and {failed - NUM_SHOWN} more could not be read")
    if not analysis.luma.count:
        raise RunError(
            f"none of the images ({len(names)}) could be read; examine them with `python "
            "tools/check_training_data.py`"
        )
    numbers = summary(analysis)
    _print(numbers, time.monotonic() - started, failed)
    if options.json:
        _write_json(
            options.json.expanduser(),
            {
                **numbers,
                "unreadable": failed,
                "histograms": dict(zip(CHANNELS, analysis.counts, strict=True)),
            },
        )
    return 1 if failed else 0


def _images(options: Options) -> tuple[Path, list[str]]:
    """Return (folder, names relative to it) of the images to analyze."""
    if options.file_list is not None:
        path = options.file_list.expanduser()
        root = (options.data_dir or path.parent).expanduser()
        names = read_file_list(path, root)
    else:
        root = (options.data_dir or Path("~/dataset")).expanduser()
        files = walk(root, MANIFEST)
        names = files.images
        if not names:
            raise UserError(
                f"{root}: no images below this folder{files.links_note()}; give another --data-dir"
            )
    return root, sampled(names, options.sample, options.seed)


def count_levels(root: Path, name: str, max_megapixels: float) -> ImageCounts:
    """Compute the histograms of one image; a bad one gives a result with a reason."""
    try:
        pixels = decode_file(root / name, max_megapixels=max_megapixels)
    except (BadImageError, BadNpyError) as error:
        return ImageCounts(name, reason=getattr(error, "reason", str(error)))
    except OSError as error:
        return ImageCounts(name, reason=error.strerror or str(error))
    return ImageCounts(name, *pixels.shape[:2], histograms(pixels))


@dataclass(frozen=True)
class ImageCounts:
    """Histograms of one image, int64 (3, 256); or the `reason` why there are none."""

    name: str
    height: int = 0
    width: int = 0
    counts: np.ndarray | None = None
    reason: str = ""


def histograms(pixels: np.ndarray) -> np.ndarray:
    """Count the levels of each channel exactly: int64 (channels, 256).

    `pixels` is uint8 (height, width, channels).
    """
    height, width, channels = pixels.shape
    rows = max(1, MAX_COUNT // width)
    counts = np.zeros((channels, 256), np.int64)
    for top in range(0, height, rows):
        band = pixels[top : top + rows]
        for channel in range(channels):
            counts[channel] += (
                cv2.calcHist([band], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
            )
    return counts


@dataclass
class Spread:
    """Running mean, standard deviation (Welford, 1962), minimum and maximum."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: tuple[float, str] = (math.inf, "")
    greatest: tuple[float, str] = (-math.inf, "")

    def add(self, value: float, name: str) -> None:
        """Add a number with the name it belongs to."""
        self.count += 1
        difference = value - self.mean
        self.mean += difference / self.count
        self.squares += difference * (value - self.mean)
        self.least, self.greatest = (
            min(self.least, (value, name)),
            max(self.greatest, (value, name)),
        )

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return math.sqrt(self.squares / self.count)


@dataclass
class Analysis:
    """Sums over all images so far."""

    counts: list[list[int]] = field(default_factory=lambda: [[0] * 256 for _ in CHANNELS])
    heights: tuple[int, int] = (sys.maxsize, 0)  # minimum and maximum
    widths: tuple[int, int] = (sys.maxsize, 0)
    luma: Spread = field(default_factory=Spread)  # of the images' mean luma
    means: tuple[Spread, ...] = field(default_factory=lambda: tuple(Spread() for _ in CHANNELS))

    def add(self, image: ImageCounts) -> None:
        """Add an image."""
        pixels = image.height * image.width
        sums = image.counts @ np.arange(256)
        for channel, spread, total, mine in zip(
            image.counts.tolist(), self.means, sums.tolist(), self.counts, strict=True
        ):
            mine[:] = [old + new for old, new in zip(mine, channel, strict=True)]
            spread.add(total / pixels, image.name)
        self.luma.add(float(np.dot(LUMA, sums / pixels)), image.name)
        self.heights = min(self.heights[0], image.height), max(self.heights[1], image.height)
        self.widths = min(self.widths[0], image.width), max(self.widths[1], image.width)

    @property
    def pixels(self) -> int:
        """Total number of pixels."""
        return sum(self.counts[0])


def summary(analysis: Analysis) -> dict[str, object]:
    """All reported numbers as JSON; levels are 0..255 unless the name ends with _01."""
    channels = {}
    for name, counts, spread in zip(CHANNELS, analysis.counts, analysis.means, strict=True):
        mean, std = moments(counts)
        levels = [level for level, count in enumerate(counts) if count]
        channels[name] = {
            "mean": mean,
            "std": std,
            "mean_01": mean / 255,
            "std_01": std / 255,
            "min": levels[0],
            "max": levels[-1],
            "percentiles": {str(percent): percentile(counts, percent) for percent in PERCENTILES},
            "share_at_0": counts[0] / analysis.pixels,
            "share_at_255": counts[255] / analysis.pixels,
            "std_of_image_means": spread.std,
        }
    luma = analysis.luma
    mean_luma = sum(
        weight * channels[name]["mean"] for weight, name in zip(LUMA, CHANNELS, strict=True)
    )
    return {
        "images": luma.count,
        "pixels": analysis.pixels,
        "height": list(analysis.heights),
        "width": list(analysis.widths),
        "channels": channels,
        "mean_luma": mean_luma,
        "std_of_image_mean_luma": luma.std,
        "darkest": {"name": luma.least[1], "mean_luma": luma.least[0]},
        "brightest": {"name": luma.greatest[1], "mean_luma": luma.greatest[0]},
    }


def moments(counts: list[int]) -> tuple[float, float]:
    """(mean, population standard deviation) of a histogram's levels, rounded only at the end."""
    total = sum(counts)
    first = sum(level * count for level, count in enumerate(counts))
    second = sum(level * level * count for level, count in enumerate(counts))
    return float(Fraction(first, total)), math.sqrt(
        Fraction(second * total - first * first, total * total)
    )


def percentile(counts: list[int], percent: int) -> int:
    """Lowest level that at least `percent` % of the pixels do not exceed."""
    total = sum(counts)
    return next(
        level for level, below in enumerate(accumulate(counts)) if below * 100 >= percent * total
    )


def _print(numbers: dict, seconds: float, failed: int) -> None:
    """Print the table."""
    images, pixels, channels = numbers["images"], numbers["pixels"], numbers["channels"]
    print(
        f"{counted(images, 'image')}, {pixels / 1e6:.1f} megapixels in {seconds:.1f} s "
        f"({images / max(seconds, 1e-3):.0f} "
        f"images/s, {pixels / 1e6 / max(seconds, 1e-3):.0f} MPix/s); {failed} could not be read"
    )
    sides = {
        name: f"{low}" if low == high else f"{low} to {high}"
        for name in ("height", "width")
        for low, high in [numbers[name]]
    }
    print(f"height {sides['height']}, width {sides['width']} pixels\n")
    print(
        f"{'':7}{'mean':>9}{'std':>9}{'min':>5}{'1 %':>5}{'50 %':>5}{'99 %':>5}{'max':>5}"
        f"{'at 0':>10}{'at 255':>10}{'std of image means':>20}"
    )
    for name, row in channels.items():
        percentiles = "".join(f"{row['percentiles'][str(percent)]:5d}" for percent in PERCENTILES)
        print(
            f"{name:7}{row['mean']:9.4f}{row['std']:9.4f}{row['min']:5d}{percentiles}{row['max']:5d}"
            f"{row['share_at_0']:10.4%}{row['share_at_255']:10.4%}{row['std_of_image_means']:20.2f}"
        )
    print(
        f"\nin [0, 1]: mean {[round(row['mean_01'], 6) for row in channels.values()]}, "
        f"std {[round(row['std_01'], 6) for row in channels.values()]}"
    )
    print(
        f"mean luma {numbers['mean_luma']:.2f}, per image {numbers['darkest']['mean_luma']:.2f} "
        f"({printable(numbers['darkest']['name'])}) to {numbers['brightest']['mean_luma']:.2f} "
        f"({printable(numbers['brightest']['name'])})"
    )


def _write_json(path: Path, numbers: dict[str, object]) -> None:
    try:
        write_atomically(
            path,
            (json.dumps(numbers, indent=1, ensure_ascii=False) + "\n").encode(
                "utf-8", "surrogateescape"
            ),
        )
    except OSError as error:
        raise UserError(
            f"--json {path}: cannot be written: {error.strerror}; choose another file"
        ) from error


if __name__ == "__main__":
    run(Options, main)
