"""What the pixels of a dataset are like: exact mean and standard deviation of each channel, clipping, brightness."""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from pipeline.cli import RunError, UserError, run
from pipeline.data.image_files import MANIFEST, BadNpyError, read_file_list
from pipeline.files import write_atomically
from tools.common.image_formats import decode_file
from tools.common.image_headers import BadImageError
from tools.common.level_statistics import CHANNELS, PERCENTILES, Analysis, ImageCounts, histograms, summary
from tools.files import walk
from tools.images import MAX_MEGAPIXELS, prepare_decoders
from tools.parallel import ordered_map, progress, quiet_libraries, thread_count

NUM_SHOWN = 20


@dataclass(frozen=True)
class Options:
    """Mean and standard deviation of each channel over all pixels of a dataset, exactly, and what else a look at the
    histograms tells: range, clipping, and how much brightness differs between images.

    The standard deviation is that of all pixels (population). Each image becomes one histogram a channel and these are
    added up in whole numbers, so that a million images need no more memory than one. Images are read as
    images_to_data.py reads photographs: 8 bits, upright, gray as RGB, transparency over white.

    Example: python tools/analyze_images.py --data-dir ~/dataset
    """

    data_dir: Path | None = None
    """Folder of the images (searched in depth), or, with --list, the folder that the list's names are relative to; by
    default ~/dataset, or the folder of the list."""
    file_list: Annotated[Path | None, tyro.conf.arg(name="list")] = None
    """Analyze the images of this file list only, such as ~/dataset/training_file_list.txt."""
    sample: int | None = None
    """Analyze so many images, drawn at random, instead of all."""
    seed: int = 0
    """Another seed draws another sample."""
    json: Path | None = None
    """Write all numbers, with the histograms, to this file too."""
    max_megapixels: float = 300
    """Skip larger images before they are decoded: they could fill the memory."""
    threads: int = 0
    """Number of threads; 0 is one a core."""


def main(options: Options) -> int:
    """Analyze and print. 0: good; 1: some images could not be read."""
    root, names = _images(options)
    if not 0 < options.max_megapixels <= MAX_MEGAPIXELS:
        raise UserError(f"--max-megapixels {options.max_megapixels:g}: must be above 0 and at most {MAX_MEGAPIXELS}")
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
                    print(f"could not be read: {_shown(image.name)}: {image.reason}")
            else:
                analysis.add(image)
            bar.update()
    if failed > NUM_SHOWN:
        print(f"... and {failed - NUM_SHOWN} more could not be read")
    if not analysis.luma.count:
        raise RunError(f"none of the {len(names)} images could be read; look into them with "
                       "`python tools/check_training_data.py`")
    numbers = summary(analysis)
    _print(numbers, time.monotonic() - started, failed)
    if options.json:
        _write_json(options.json.expanduser(), {**numbers, "unreadable": failed, "histograms": dict(
            zip(CHANNELS, analysis.counts, strict=True))})
    return 1 if failed else 0


def _images(options: Options) -> tuple[Path, list[str]]:
    """(Folder, names relative to it) of the images to analyze."""
    if options.file_list is not None:
        path = options.file_list.expanduser()
        root = (options.data_dir or path.parent).expanduser()
        names = read_file_list(path, root)
    else:
        root = (options.data_dir or Path("~/dataset")).expanduser()
        files = walk(root, MANIFEST)
        names = files.images
        if not names:
            raise UserError(f"{root}: no images below this folder{files.links_note()}; give another --data-dir")
    if options.sample is not None:
        if options.sample < 1:
            raise UserError(f"--sample {options.sample}: must be at least 1; leave it away for all images")
        if options.sample < len(names):
            print(f"a sample of {options.sample} of {len(names)} images (seed {options.seed})")
            names = sorted(random.Random(options.seed).sample(names, options.sample))
    return root, names


def count_levels(root: Path, name: str, max_megapixels: float) -> ImageCounts:
    """The histograms of one image. Bad images are a result, not an exception."""
    try:
        pixels = decode_file(root / name, max_megapixels=max_megapixels)
    except (BadImageError, BadNpyError) as error:
        return ImageCounts(name, reason=getattr(error, "reason", str(error)))
    except OSError as error:
        return ImageCounts(name, reason=error.strerror or str(error))
    return ImageCounts(name, *pixels.shape[:2], histograms(pixels))


def _print(numbers: dict, seconds: float, failed: int) -> None:
    """The table."""
    images, pixels, channels = numbers["images"], numbers["pixels"], numbers["channels"]
    print(f"{images} images, {pixels / 1e6:.1f} megapixels in {seconds:.1f} s ({images / max(seconds, 1e-3):.0f} "
          f"images/s, {pixels / 1e6 / max(seconds, 1e-3):.0f} MPix/s); {failed} could not be read")
    sides = {name: f"{low}" if low == high else f"{low} to {high}" for name in ("height", "width")
             for low, high in [numbers[name]]}
    print(f"height {sides['height']}, width {sides['width']} pixels\n")
    print(f"{'':7}{'mean':>9}{'std':>9}{'min':>5}{'1 %':>5}{'50 %':>5}{'99 %':>5}{'max':>5}{'at 0':>10}{'at 255':>10}"
          f"{'std of image means':>20}")
    for name, row in channels.items():
        percentiles = "".join(f"{row['percentiles'][str(percent)]:5d}" for percent in PERCENTILES)
        print(f"{name:7}{row['mean']:9.4f}{row['std']:9.4f}{row['min']:5d}{percentiles}{row['max']:5d}"
              f"{row['share_at_0']:10.4%}{row['share_at_255']:10.4%}{row['std_of_image_means']:20.2f}")
    print(f"\nin [0, 1]: mean {[round(row['mean_01'], 6) for row in channels.values()]}, "
          f"std {[round(row['std_01'], 6) for row in channels.values()]}")
    print(f"mean luma {numbers['mean_luma']:.2f}, of the images {numbers['darkest']['mean_luma']:.2f} "
          f"({_shown(numbers['darkest']['name'])}) to {numbers['brightest']['mean_luma']:.2f} "
          f"({_shown(numbers['brightest']['name'])})")


def _write_json(path: Path, numbers: dict[str, object]) -> None:
    try:
        write_atomically(path, (json.dumps(numbers, indent=1, ensure_ascii=False) + "\n").encode(
            "utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}; choose another file") from error


def _shown(name: str) -> str:
    """A file name that any terminal can show."""
    return name if name.isprintable() else ascii(name)


if __name__ == "__main__":
    run(Options, main)
