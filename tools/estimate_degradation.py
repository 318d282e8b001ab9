"""Estimate the degradations of real LR images, and write them as a preset.

Each image is measured by itself (`tools.estimation.measurement`); the preset is made from
percentiles over all images (`tools.estimation.preset`).
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import numpy as np
import tyro

from pipeline.cli import RunError, UserError, counted, run
from pipeline.data.image_files import MANIFEST, BadNpyError, is_npy
from pipeline.data.image_headers import (
    FORMATS,
    BadImageError,
    ImageHeader,
    unread_note,
)
from pipeline.data.image_pixels import (
    decode_rgb,
    prepare_decoders,
)
from pipeline.files import write_atomically
from tools.estimation.measurement import Measurement, measure
from tools.estimation.preset import MARK, Spread, Summary, document, summary
from tools.files import printable, sampled, walk
from tools.images import check_max_megapixels, decode_file, read_image_file
from tools.parallel import ordered_map, progress, quiet_libraries, thread_count

NUM_SHOWN = 20


@dataclass(frozen=True)
class Options:
    """Estimate the degradations of real LR images, and write a preset that states the reasons.

    JPEG quality and chroma subsampling come from the tables of JPEG files. For JPEGs that were
    saved again as PNG, WebP or other formats, they come from traces in the pixels, as does the
    position of the block grid. The quality of WebP files comes from their quantisers. Also
    measured: luma and chroma noise, blur, earlier enlargements, subsampled chroma without JPEG,
    levels in use, black bars and interlaced lines. In large images, the middle 1024x1024 pixels are
    measured. docs/estimating-degradations.md says how reliable each number is.

    Example: python tools/estimate_degradation.py ~/old_photos --out old_photos.yaml
    """

    lr_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LR_DIR")]
    """Folder of the LR images (searched recursively)."""
    out: Path | None = None
    """The preset to write. Default: NAME.yaml in the current folder, NAME being LR_DIR's name."""
    json: Path | None = None
    """Also write the measurements of each image and each folder to this file."""
    sample: int | None = None
    """Measure this many randomly chosen images instead of all."""
    seed: int = 0
    """Seed of the random sample."""
    max_megapixels: float = 300
    """Skip images above this size without decoding them, because they could exhaust the memory."""
    threads: int = 0
    """Number of threads; 0 is one per core."""


def main(options: Options) -> int:
    """Measure the images, print the tables, and write the preset.

    Returns 0 if all images were measured, 1 if some could not be.
    """
    check_max_megapixels(options.max_megapixels)
    root = options.lr_dir.expanduser()
    names = _names(root, options)
    threads = thread_count(options.threads)
    out = (options.out or Path(f"{root.resolve().name or 'degradation'}.yaml")).expanduser()
    _check_target("--out", out)
    if options.json:
        _check_target("--json", options.json.expanduser())
    _check_is_ours(out)
    prepare_decoders()
    started = time.monotonic()
    images: list[Measurement] = []
    failed = 0
    with quiet_libraries(), progress(len(names), "file") as bar:

        def attempt(name: str) -> Measurement | str:
            return measure_file(root, name, options.max_megapixels)

        for name, result in zip(names, ordered_map(attempt, names, threads), strict=True):
            if isinstance(result, str):
                failed += 1
                if failed <= NUM_SHOWN:
                    print(f"not measured: {printable(name)}: {result}")
            else:
                images.append(result)
            bar.update()
    if failed > NUM_SHOWN:
        print(f"... and {failed - NUM_SHOWN} more were not measured")
    if not images:
        raise RunError(
            f"none of the images ({len(names)}) could be measured; the reasons are above"
        )
    seconds = time.monotonic() - started
    print(
        f"{counted(len(images), 'image')} in {seconds:.1f} s "
        f"({len(images) / max(seconds, 1e-3):.1f} images/s); {failed} not measured"
    )
    summaries = _summaries(images)
    for folder, found in summaries.items():
        _print(folder, found)
    whole = summaries[ALL]
    _write("--out", out, document(whole, printable(root.name or str(root))))
    print(f"\nwrote {out}: to train with it, add data.degradation={out} to the command")
    if options.json:
        _write("--json", options.json.expanduser(), _as_json(images, summaries, failed))
    return 1 if failed else 0


def _names(root: Path, options: Options) -> list[str]:
    """Return the images to measure, relative to `root`."""
    files = walk(root, MANIFEST)
    names = files.images
    if not names:
        raise UserError(
            f"{root}: no images below this folder{files.links_note()}; give the folder of the LR "
            "images"
        )
    if note := unread_note(files.unread):
        print(note)
    return sampled(names, options.sample, options.seed)


def _check_target(flag: str, path: Path) -> None:
    """Raise `UserError` if no file can be written there, before the work begins."""
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; give a file, such as {path / 'lr'}")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: no such folder {path.parent}; make it, or choose another")


def _check_is_ours(out: Path) -> None:
    """Raise `UserError` if the preset would overwrite a file that this tool has not written."""
    try:
        with open(out, "rb") as file:
            begins = file.read(len(MARK))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be read: {error.strerror}; choose another file"
        ) from error
    if begins != MARK.encode():
        raise UserError(
            f"--out {out}: exists and was not written by this tool; choose another file"
        )


def measure_file(root: Path, name: str, max_megapixels: float) -> Measurement | str:
    """Return the measurement of an image file, or the reason why it cannot be measured."""
    try:
        if is_npy(name):
            pixels = decode_file(root / name, max_megapixels=max_megapixels)
            header, data = ImageHeader("npy", *pixels.shape[:2]), b""
        else:
            header, data = read_image_file(root / name, max_megapixels)
            pixels = decode_rgb(data, header)
        return measure(name, pixels, header, data)
    except (BadImageError, BadNpyError) as error:
        return str(getattr(error, "reason", error))
    except ValueError as error:  # too small
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


ALL = "."


def _summaries(images: Sequence[Measurement]) -> dict[str, Summary]:
    """Return the summary of all images and, if several folders hold images, of each folder."""
    folders: dict[str, list[Measurement]] = defaultdict(list)
    for image in images:
        folders[str(PurePosixPath(image.name).parent)].append(image)
    if len(folders) == 1:
        return {ALL: summary(images)}
    parts = {f"{folder}/": summary(part) for folder, part in sorted(folders.items())[:NUM_SHOWN]}
    return {**parts, ALL: summary(images)}


def _print(folder: str, found: Summary) -> None:
    """Print the table of a folder."""
    title = "all images" if folder == ALL else printable(folder)
    print(f"\n{title}: {counted(found.count, 'image')}")
    print(f"{'':34}{'images':>8}{'10 %':>9}{'median':>9}{'90 %':>9}")
    rows: list[tuple[str, Spread | None, int]] = [
        ("quality of JPEG files", found.jpeg_files, 0),
        ("quality of JPEGs saved again", found.jpeg_traces, 0),
        ("quality of WebP files", found.webp, 0),
        ("noise of luma, levels", found.luma_noise, 1),
        ("noise of chroma, levels", found.chroma_noise, 1),
        ("blur, sigma in pixels", found.blur, 2),
        ("earlier enlargement, factor", found.enlargement, 2),
        ("levels in use of 256", found.levels, 0),
    ]
    for label, values, digits in rows:
        if values is None:
            print(f"{label:34}{0:8d}{'-':>9}{'-':>9}{'-':>9}")
        else:
            numbers = (values.low, values.median, values.high)
            print(f"{label:34}{values.count:8d}" + "".join(f"{n:9.{digits}f}" for n in numbers))
    counts = {
        "chroma of JPEGs": found.jpeg_subsamplings,
        "chroma subsampled, no JPEG": found.subsampled,
        "lossy files, not JPEG": {
            form.title: found.lossy_formats[form.name]
            for form in FORMATS
            if form.name in found.lossy_formats
        },
        "JPEG grid not at the corner": {"": found.cropped_grids},
        "black bars": {"": found.bars},
        "interlaced lines": {"": found.combed},
    }
    for label, kinds in counts.items():
        text = ", ".join(f"{kind}: {count}" for kind, count in kinds.items() if kind)
        print(f"{label:34}{sum(kinds.values()):8d}{'   ' + text if text else ''}")
    if found.noise_known < found.count:
        print(
            f"noise unknown: {found.count - found.noise_known} images, where JPEG hides less than "
            f"about {found.visible_noise:.1f} levels"
        )


def _as_json(images: Sequence[Measurement], summaries: dict[str, Summary], failed: int) -> str:
    numbers = {
        "folders": {folder: asdict(found) for folder, found in summaries.items()},
        "not_measured": failed,
        "images": [asdict(image) for image in images],
    }
    return json.dumps(numbers, indent=1, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: object) -> object:
    """Convert a NumPy scalar to a Python number, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _write(flag: str, path: Path, text: str) -> None:
    try:
        write_atomically(path, text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(
            f"{flag} {path}: cannot be written: {error.strerror}; choose another file"
        ) from error


if __name__ == "__main__":
    run(Options, main)
