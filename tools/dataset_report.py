"""Write an HTML page about a dataset: numbers, histograms, a contact sheet, rejects."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

from pipeline.cli import UserError, run
from pipeline.data.image_pixels import prepare_decoders
from pipeline.files import write_atomically
from tools.dataset.sampling import HashSample
from tools.dataset.sources import SampledImage
from tools.dataset.statistics import Statistics, gather, total
from tools.parallel import thread_count
from tools.report.page import PlainImages, View, render
from tools.report.tiles import SIDE, Thumbnail, make_tiles

MAX_SAMPLES = 500

# Views of the contact sheet by gate: title, explanation, whether pixels are shown at full
# resolution.
_LOWEST = {
    "source_sharpness": (
        "The softest pictures",
        "Lowest sharpness of the whole photograph or frame, one crop of each; the centre "
        f"{SIDE}x{SIDE} pixels at full resolution. If some look blurred, use a higher "
        "--min-sharpness.",
        True,
    ),
    "sharpness": (
        "The softest crops",
        f"Lowest sharpness of the crop itself, one of each photograph; the centre {SIDE}x{SIDE} "
        "pixels at full resolution. Parts of sharp photographs that are out of focus are kept.",
        True,
    ),
    "gradient": (
        "The flattest crops",
        "Lowest gradient, one crop of each photograph. If some are empty, use a higher "
        "--min-gradient.",
        False,
    ),
}


@dataclass(frozen=True)
class Options:
    """Write an HTML page about the contents of a dataset.

    It shows numbers by source, histograms of the quality gates with their thresholds, random crops,
    the softest and flattest crops that were kept, how evenly photographs and videos are
    represented, what was rejected and why, and what the training and validation lists contain. The
    page is a single file with embedded pictures; it needs neither network nor JavaScript, and can
    be mailed.
    Images in no manifest are measured now, --samples of them. The dataset is not changed.

    Example: python tools/dataset_report.py --data-dir ~/dataset --out report.html
    """

    data_dir: Path = Path("~/dataset")
    """The dataset: the folder that contains the sources."""
    out: Path = Path("report.html")
    """The page to write."""
    samples: int = 48
    """Random images for the contact sheet, and half as many for each of three extremes; 0 shows
    none. 48 make a page of 0.7 MB, 500 one of 7 MB."""
    seed: int = 0
    """Seed of the random images."""
    threads: int = 0
    """Number of threads that decode images; 0 is one per core."""


def main(options: Options) -> int:
    """Write the page."""
    if not 0 <= options.samples <= MAX_SAMPLES:
        raise UserError(
            f"--samples {options.samples}: must be 0 to {MAX_SAMPLES}, because the pictures are "
            "embedded in the page"
        )
    out, threads = options.out.expanduser(), thread_count(options.threads)
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise UserError(
            f"--out {out}: {what}; give the name of a file in an existing folder, such as "
            "report.html"
        )
    prepare_decoders()
    statistics = gather(options.data_dir.expanduser(), options.samples, options.seed)
    page = make_page(statistics, threads)
    try:
        write_atomically(out, page)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written: {error.strerror or error}; give another --out"
        ) from error
    print(
        f"{total(statistics.sources, 'images')} images of {len(statistics.sources)} sources in "
        f"{out} ({len(page) / 1e6:.2f} MB)"
    )
    return 0


def make_page(statistics: Statistics, threads: int) -> bytes:
    """Build the page in UTF-8; decodes the images that it shows."""
    samples = statistics.samples
    drawn_plain = list(samples.plain)
    plain = list(make_tiles(statistics.root, drawn_plain, threads))
    for image, tile in zip(drawn_plain, plain, strict=True):
        samples.add(image, tile.gates)
    drawn: HashSample[SampledImage] = HashSample(samples.size, samples.seed)
    for image in [*samples.recorded, *drawn_plain]:
        drawn.add(image.path, image)
    lowest = {name: list(samples.lowest[name]) for name in _LOWEST}
    tiles = {tile.path: tile for tile in plain}
    wanted = [*drawn, *(image for entries in lowest.values() for _, image in entries)]
    missing = [image for image in wanted if image.path not in tiles]
    tiles.update((tile.path, tile) for tile in make_tiles(statistics.root, missing, threads))
    views = [
        _random_view(drawn, tiles),
        *(_lowest_view(name, entries, tiles) for name, entries in lowest.items()),
    ]
    return render(
        statistics,
        [view for view in views if view.tiles],
        PlainImages(plain, total(statistics.plain, "images")),
    )


def _random_view(images: Iterable[SampledImage], tiles: dict[str, Thumbnail]) -> View:
    entries: list[dict[str, object]] = [
        {"tile": tiles[image.path], "value": ""} for image in images
    ]
    return View(
        "Random images",
        f"{len(entries)} of all images, drawn uniformly and reduced.",
        entries,
        is_detail=False,
    )


def _lowest_view(
    name: str, images: list[tuple[float, SampledImage]], tiles: dict[str, Thumbnail]
) -> View:
    title, explanation, is_detail = _LOWEST[name]
    return View(
        title,
        explanation,
        [{"tile": tiles[image.path], "value": f"{value:.3g}"} for value, image in images],
        is_detail,
    )


if __name__ == "__main__":
    run(Options, main)
