"""Cut photographs into training crops of one size, at full and reduced resolution."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import tyro

from pipeline.cli import UserError, run
from pipeline.data.image_files import MANIFEST
from pipeline.data.image_headers import FORMAT_TITLES, BadImageError, unread_note
from pipeline.data.image_pixels import prepare_decoders
from tools.crops.cutting import CropSettings, Reject, Unit, cut_picture, make_folder, open_picture
from tools.crops.dataset import Clock, Stamp, UnitResult, cut_all, open_dataset, refuse_nested
from tools.crops.leakage import BenchmarkIndex
from tools.crops.options import CropOptions, open_benchmark, with_depth
from tools.files import name_fault, walk
from tools.images import check_max_megapixels
from tools.parallel import thread_count


@dataclass(frozen=True, kw_only=True)
class Options(CropOptions):
    """Cut photographs into training crops of one size.

    PNG, JPEG, WebP, BMP, TIFF, JPEG 2000, AVIF, JPEG XL and PNM files below PHOTOS become
    OUT/<photo>/x<scale>_<row>_<column>.npy: RGB, upright, sRGB, transparency over white.
    Crops do not overlap; they are cut from the photo at full size, at 1/2, 1/4... as long as one
    fits. Lossy photos (JPEG, AVIF, lossy WebP, JPEG 2000 and JPEG XL) start at 1/2, which hides
    their artefacts. Flat crops, blurred or upscaled sizes, and near-duplicates of earlier photos
    are omitted; OUT/rejects.jsonl lists them. Run the same command again to continue a run that was
    stopped or killed; finished photos are not touched.

    Example: python tools/images_to_data.py ~/Pictures/DIV2K ~/dataset/DIV2K
    """

    photos: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOS")]
    """Folder of the photographs (searched recursively; links to folders are not followed), or one
    photograph."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Output folder of the crops, one per source of photographs, such as ~/dataset/DIV2K."""
    depth: Literal[8, 16] = 8
    """Bits per value of the crops. 16 keeps those of photographs that have more than 8: their crops
    are uint16, or PNG of 16 bits. The others stay at 8."""
    max_megapixels: float = 300
    """Reject larger photos before decoding, because they could exhaust the memory."""


def main(options: Options) -> int:
    """Make the crops.

    Returns 0 if done, 1 if done but some photos could not be decoded or no crop was made.
    """
    photos, names, unread = _photographs(options)
    out = options.out.expanduser()
    check_max_megapixels(options.max_megapixels)
    settings, threads = with_depth(options.settings(), options.depth), thread_count(options.threads)
    refuse_nested(options.photos.expanduser(), out)
    prepare_decoders()
    cutter = PhotoCutter(
        photos, out, settings, options.max_megapixels, open_benchmark(settings.against)
    )
    clock = Clock()
    # A relative path, so that photographs and crops can be moved together.
    with open_dataset(
        out,
        settings,
        cutter.stamp,
        "images_to_data",
        photos=os.path.relpath(photos.resolve(), out.resolve()),
    ) as dataset:
        todo = [name for name in names if not dataset.is_finished(name)]
        dataset.totals.already = len(names) - len(todo)
        cut_all(dataset, todo, cutter, threads, len(todo), "photo")
        gone = dataset.num_finished - dataset.totals.already
    clock.report(dataset.totals, out, "photo")
    if unread:
        print(unread_note(unread))
    if gone and options.photos.expanduser().is_dir():
        print(f"photos of earlier runs no longer in {photos}: {gone}; their crops in {out} stay")
    return 1 if dataset.totals.bad or dataset.is_empty else 0


def _photographs(options: Options) -> tuple[Path, list[str], list[str]]:
    """Return (folder, photographs to cut, unsupported images), both relative to the folder."""
    source = options.photos.expanduser()
    if source.is_file():
        return source.parent, [source.name], []
    if not source.is_dir():
        raise UserError(f"{source}: no such folder or file; give the folder of the photographs")
    files = walk(source, MANIFEST)
    if not files.encoded:
        raise UserError(
            f"{source}: no images ({FORMAT_TITLES}) below this folder{files.links_note()}; give "
            "the folder "
            "of the photographs"
        )
    return source, files.encoded, files.unread


class PhotoCutter:
    """Decodes and cuts photographs; thread-safe."""

    def __init__(
        self,
        photos: Path,
        out: Path,
        settings: CropSettings,
        max_megapixels: float,
        benchmark: BenchmarkIndex | None,
    ) -> None:
        self._photos, self._out, self._settings = photos, out, settings
        self._max_megapixels, self._benchmark = max_megapixels, benchmark

    def stamp(self, name: str) -> Stamp | None:
        """Size and modification time of a photograph; `None` if it is gone."""
        try:
            status = (self._photos / name).stat()
        except OSError:
            # Deleted after cutting to save space, or unreachable; its crops are still good.
            return None
        return status.st_size, status.st_mtime_ns

    def __call__(self, name: str) -> UnitResult:
        """Decode a photograph and write its crops; a bad one gives a reject, not an exception."""
        unit = Unit(name, name, 0, 0)
        if fault := name_fault(name):
            return UnitResult(
                unit._replace(photo=ascii(name), folder=ascii(name)),
                rejects=[Reject("decode", fault)],
            )
        try:
            unit = unit._replace(
                **dict(zip(("bytes", "mtime_ns"), self.stamp(name) or (0, 0), strict=True))
            )
            with open(self._photos / name, "rb") as file:
                picture = open_picture(file, self._settings, self._max_megapixels)
        except BadImageError as error:
            return UnitResult(unit, rejects=[Reject("decode", str(error))])
        except OSError as error:
            return UnitResult(
                unit, rejects=[Reject("decode", f"could not be read: {error.strerror or error}")]
            )
        if isinstance(picture, Reject):
            return UnitResult(unit, rejects=[picture])
        make_folder(self._out, unit.folder)
        return UnitResult(
            unit, [cut_picture(picture, unit, self._out, self._settings, self._benchmark)]
        )


if __name__ == "__main__":
    run(Options, main)
