"""Cut pairs of HR and LR photographs into aligned pairs of training crops.

`PairCutter` decodes and cuts one pair at a time. It first checks that both sides show the same
content at the same position and brightness, see tools/crops/pairs.py.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import numpy as np
import tyro

from pipeline.cli import UserError, run
from pipeline.data.image_files import MANIFEST
from pipeline.data.image_headers import FORMAT_TITLES, BadImageError, read_header, unread_note
from pipeline.data.image_pixels import (
    check_megapixels,
    prepare_decoders,
    to_8_bits,
)
from pipeline.data.pair_matching import NamePair, match_pairs, outside, split_marked
from tools.crops.cutting import (
    CropSettings,
    CutPicture,
    Reject,
    SourcePicture,
    Unit,
    crop_places,
    discard,
    find_leak,
    flat_crop,
    make_folder,
    read_picture,
    soft_picture,
    too_small,
    write_crop,
)
from tools.crops.dataset import Clock, Stamp, UnitResult, cut_all, open_dataset, refuse_nested
from tools.crops.leakage import BenchmarkIndex
from tools.crops.manifest import CropRecord
from tools.crops.options import CropOptions, open_benchmark, with_depth
from tools.crops.pairs import correlation, has_swapped_colors, shift, tone_fault
from tools.crops.quality import crop_gates, is_flat, is_soft, picture_gates
from tools.files import name_fault, printable, walk
from tools.images import check_max_megapixels
from tools.parallel import thread_count


@dataclass(frozen=True, kw_only=True)
class Options(CropOptions):
    """Cut HR photographs and their LR versions into pairs of crops.

    Pairs are matched by name: DIV2K's 0001.png and 0001x4.png, img_HR.png and img_LR.png (also in
    one folder, given twice), or equal names in both folders; matches in the same subfolder take
    precedence. The HR side must be SCALE times the LR side (up to SCALE - 1 extra rows and columns
    of HR are cut off). Crops are cut on the LR grid: OUT/<photo>/x1_<row>_<column>.npy is HR,
    ..._lr<scale>.npy beside it is LR, and pixel (y, x) of LR corresponds to HR from (SCALE y, SCALE
    x) on. Nothing is resized. Pairs with different content (another photo, flipped, shifted, red
    and blue swapped) are rejected.

    Example: python tools/pairs_to_data.py DIV2K_train_HR DIV2K_train_LR_bicubic/X4 --scale 4 --out
    ~/dataset/DIV2K_x4
    """

    hr: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="HR_DIR")]
    """Folder of the HR photographs, searched recursively."""
    lr: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LR_DIR")]
    """Folder of the LR photographs, searched recursively."""
    scale: int
    """Size of HR relative to LR: 1, 2, 3, 4, 8..."""
    out: Path | None = None
    """Output folder of the crops; by default ~/dataset/pairs_x<scale>."""
    min_correlation: float = 0.9
    """Reject pairs whose LR and reduced HR thumbnails correlate less than this; -1 accepts all
    pairs, even shifted and colour-swapped ones."""
    depth: Literal[8, 16] = 8
    """Bits per value of the crops. 16 keeps those of photographs that have more than 8: their crops
    are uint16, or PNG of 16 bits. The others stay at 8."""
    max_megapixels: float = 300
    """Reject larger photos before decoding, because they could exhaust the memory."""
    keep_lossy_size: tyro.conf.Suppress[bool] = True
    num_scales: tyro.conf.Suppress[int | None] = 1


def main(options: Options) -> int:
    """Make the pairs of crops.

    Returns 0 if done, 1 if done but some files have no partner or do not match it.
    """
    _check_options(options)
    hr, lr = options.hr.expanduser(), options.lr.expanduser()
    out = (options.out or Path(f"~/dataset/pairs_x{options.scale}")).expanduser()
    pairs, unpaired = _find_pairs(hr, lr, options.scale)
    for folder in (hr, lr):
        refuse_nested(folder, out)
    settings, threads = with_depth(options.settings(), options.depth), thread_count(options.threads)
    prepare_decoders()
    cutter = PairCutter(hr, lr, out, settings, options, {pair.hr: pair for pair in pairs})
    clock = Clock()
    places = {
        key: os.path.relpath(folder.resolve(), out.resolve())
        for key, folder in (("photos", hr), ("lr", lr))
    }
    with open_dataset(
        out,
        settings,
        cutter.stamp,
        "pairs_to_data",
        pair_scale=options.scale,
        min_correlation=options.min_correlation,
        **places,
    ) as dataset:
        todo = [pair.hr for pair in pairs if not dataset.is_finished(pair.hr)]
        dataset.totals.already = len(pairs) - len(todo)
        cut_all(dataset, todo, cutter, threads, len(todo), "pair")
    clock.report(dataset.totals, out, "pair")
    for name in unpaired[:20]:
        print(f"no partner: {printable(name)}")
    if unpaired:
        print(f"files omitted because no name matches theirs: {len(unpaired)}")
    return 1 if dataset.totals.bad or unpaired or dataset.is_empty else 0


def _check_options(options: Options) -> None:
    if not 1 <= options.scale <= 16:
        raise UserError(f"--scale {options.scale}: must be 1 to 16")
    if options.size % options.scale:
        down = options.size - options.size % options.scale
        raise UserError(
            f"--size {options.size}: must be a multiple of the scale {options.scale}, such as "
            f"{down}, so that pairs stay aligned"
        )
    if not -1 <= options.min_correlation < 1:
        raise UserError(
            f"--min-correlation {options.min_correlation:g}: must be at least -1 and below 1"
        )
    check_max_megapixels(options.max_megapixels)


def _find_pairs(hr: Path, lr: Path, scale: int) -> tuple[list[NamePair], list[str]]:
    """Return (pairs, files without a partner); raises `UserError` if there is no pair."""
    hr_names, lr_names = _images(hr), _images(lr)
    first, second = hr.resolve(), lr.resolve()
    if first == second:
        hr_names, lr_names = split_marked(hr_names, scale)
    elif second.is_relative_to(first):
        hr_names = outside(hr_names, second.relative_to(first).as_posix())
    elif first.is_relative_to(second):
        lr_names = outside(lr_names, first.relative_to(second).as_posix())
    pairs, unpaired = match_pairs(hr_names, lr_names, scale)
    if not pairs:
        names = (
            f"img_HR.png and img_LR.png in one folder, or img_HR.png and img_x{scale}.png"
            if first == second
            else f"0001.png and 0001x{scale}.png"
        )
        raise UserError(
            f"{hr}, {lr}: no HR file has an LR file with a matching name (such as {names}); give "
            "the folders of the pairs"
        )
    return pairs, unpaired


def _images(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; give the folders of the HR and of the LR photographs"
        )
    files = walk(folder, MANIFEST)
    if not files.encoded:
        raise UserError(
            f"{folder}: no images ({FORMAT_TITLES}) below this folder{files.links_note()}"
        )
    if files.unread:
        print(f"{folder}: {unread_note(files.unread)}")
    return files.encoded


class PairCutter:
    """Decodes and cuts pairs; thread-safe."""

    def __init__(
        self,
        hr: Path,
        lr: Path,
        out: Path,
        settings: CropSettings,
        options: Options,
        pairs: dict[str, NamePair],
    ) -> None:
        self._hr, self._lr, self._out, self._settings, self._options = (
            hr,
            lr,
            out,
            settings,
            options,
        )
        self._pairs = pairs
        self._benchmark: BenchmarkIndex | None = open_benchmark(settings.against)

    def stamp(self, name: str) -> Stamp | None:
        """Total size and newest modification time of a pair's files; `None` if one is gone."""
        pair = self._pairs.get(name)
        try:
            first = (self._hr / name).stat()
            second = (self._lr / pair.lr).stat() if pair else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        if second is None:
            return None
        return first.st_size + second.st_size, max(first.st_mtime_ns, second.st_mtime_ns)

    def __call__(self, name: str) -> UnitResult:
        """Decode both sides and write their crops; a bad pair gives a reject, not an exception."""
        for side in (name, self._pairs[name].lr):
            if fault := name_fault(side):
                unit = Unit(ascii(name), ascii(name), *(self.stamp(name) or (0, 0)))
                return UnitResult(unit, rejects=[Reject("decode", f"{side!a}: {fault}")])
        unit = Unit(name, name, *(self.stamp(name) or (0, 0)))
        try:
            hr_picture, lr_picture = (
                _decode(path, self._options.max_megapixels, self._settings.depth)
                for path in (self._hr / name, self._lr / self._pairs[name].lr)
            )
        except BadImageError as error:
            return UnitResult(unit, rejects=[Reject("decode", str(error))])
        except OSError as error:
            return UnitResult(
                unit, rejects=[Reject("decode", f"could not be read: {error.strerror or error}")]
            )
        hr_8_bits = to_8_bits(hr_picture.pixels)
        reject = self._misfit(hr_8_bits, to_8_bits(lr_picture.pixels))
        if reject:
            return UnitResult(unit, rejects=[reject])
        gates = {"source_sha256": hr_picture.sha256, **picture_gates(hr_8_bits)}
        reject = self._refused(hr_8_bits, gates)
        if reject:
            return UnitResult(unit, rejects=[reject])
        make_folder(self._out, unit.folder)
        return UnitResult(unit, [self._cut(unit, hr_picture, lr_picture, gates)])

    def _misfit(self, hr: np.ndarray, lr: np.ndarray) -> Reject | None:
        """Reject two pictures that are not a pair."""
        scale = self._options.scale
        if tuple(side // scale for side in hr.shape[:2]) != lr.shape[:2]:
            sizes = f"HR of {hr.shape[0]}x{hr.shape[1]} and LR of {lr.shape[0]}x{lr.shape[1]}"
            wanted = f"{hr.shape[0] // scale}x{hr.shape[1] // scale}"
            return Reject("pair", f"{sizes} do not match: at --scale {scale}, LR must be {wanted}")
        if self._options.min_correlation == -1:
            return None
        hr = hr[: lr.shape[0] * scale, : lr.shape[1] * scale]
        likeness = correlation(hr, lr)
        if likeness < self._options.min_correlation:
            return Reject(
                "pair",
                f"HR and LR differ in content (correlation {likeness:.2f}, below "
                f"{self._options.min_correlation:g}; --min-correlation)",
            )
        if fault := tone_fault(hr, lr):
            return Reject("pair", f"{fault} (--min-correlation -1 accepts it)")
        down, right = shift(hr, lr)
        if down or right:
            return Reject(
                "pair",
                f"LR is shifted relative to HR by {down} rows and {right} columns of LR "
                "(--min-correlation -1 accepts it)",
            )
        if has_swapped_colors(hr, lr):
            return Reject(
                "pair", "red and blue are swapped in HR or in LR (--min-correlation -1 accepts it)"
            )
        return None

    def _refused(self, hr: np.ndarray, gates: dict[str, float | str]) -> Reject | None:
        """Reject a matching pair that is not good enough."""
        if min(hr.shape[:2]) // self._options.scale * self._options.scale < self._settings.size:
            return too_small(hr.shape[0], hr.shape[1], 1, self._settings.size)
        if is_soft(gates, self._settings.min_sharpness):
            return soft_picture(gates, self._settings, "HR")
        return find_leak(hr, self._benchmark)

    def _cut(
        self,
        unit: Unit,
        hr_picture: SourcePicture,
        lr_picture: SourcePicture,
        source: dict[str, float | str],
    ) -> CutPicture:
        hr, lr = hr_picture.pixels, lr_picture.pixels
        scale, size = self._options.scale, self._settings.size
        result = CutPicture(
            pixels=hr.shape[0] * hr.shape[1], profile=hr_picture.profile or lr_picture.profile
        )
        for crop in crop_places(*lr.shape[:2], size // scale, self._settings, f"1/{unit.photo}"):
            top, left = crop.top * scale, crop.left * scale
            hr_window = np.ascontiguousarray(hr[top : top + size, left : left + size])
            lr_window = np.ascontiguousarray(
                lr[crop.top :, crop.left :][: size // scale, : size // scale]
            )
            gates = crop_gates(to_8_bits(hr_window))
            if is_flat(gates, self._settings.min_gradient):
                result.rejects.append(flat_crop(gates, self._settings, 1, top, left))
                continue
            # A small part is only found in the crops.
            if leak := find_leak(hr_window, self._benchmark):
                discard(result.records, self._out)
                return CutPicture(rejects=[leak], pixels=result.pixels)
            name = f"{unit.folder}/x1_{crop.row:03d}_{crop.column:03d}"
            lr_record = self._write(
                unit, f"{name}_lr{scale}", lr_window, crop.top, crop.left, lr_picture.decoder
            )
            hr_record = self._write(unit, name, hr_window, top, left, hr_picture.decoder)
            result.records.append(replace(hr_record, gates={**gates, **source}, lr=lr_record.path))
            result.records.append(replace(lr_record, role="lr"))
        return result

    def _write(
        self, unit: Unit, stem: str, window: np.ndarray, top: int, left: int, decoder: str
    ) -> CropRecord:
        name = f"{stem}.{self._settings.format}"
        num_bytes = write_crop(self._out, name, unit, window, self._settings.format)
        return CropRecord(
            name,
            unit.photo,
            1,
            top,
            left,
            window.shape[0],
            num_bytes,
            hashlib.sha256(window).hexdigest(),
            decoder,
            {},
            unit.bytes,
            unit.mtime_ns,
            0,
        )


def _decode(path: Path, max_megapixels: float, depth: int) -> SourcePicture:
    """Decode one side of a pair.

    Raises `BadImageError` (with the file's name) or `OSError`.
    """
    with open(path, "rb") as file:
        try:
            header = read_header(file)
            check_megapixels(header, max_megapixels)
            return read_picture(file, header, depth)
        except BadImageError as error:
            raise BadImageError(f"{printable(path.name)}: {error}") from None


if __name__ == "__main__":
    run(Options, main)
