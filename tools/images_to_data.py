"""Photographs to training crops: every photo is cut, at full and at halved sizes, into crops of one size."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from pipeline.cli import UserError, run
from pipeline.data.image_files import MANIFEST
from pipeline.files import write_atomically
from tools.common.crop_writing import CropSettings, PhotoResult, make_crops, remove_crops
from tools.common.dataset_walk import walk
from tools.common.manifest import CropRecord, format_lines, parse_line
from tools.common.parallel import ordered_map, progress, quiet_libraries, thread_count
from tools.common.photo_decoding import MAX_MEGAPIXELS, prepare_decoders

SETTINGS = "dataset.json"
SKIPPED = "skipped.txt"
NUM_SHOWN = 20
# A change of what the same settings produce must raise this, so that one dataset never holds both.
LAYOUT_VERSION = 1


@dataclass(frozen=True)
class Options:
    """Cut photographs into training crops of one size.

    PNG, JPEG, WebP, BMP, TIFF and JPEG 2000 files below PHOTOS become OUT/<photo>/x<scale>_<row>_<column>.npy: uint8
    RGB, upright, transparency over white. Crops do not overlap; they are cut from the photo at full size, at 1/2,
    1/4... while one fits. Lossy photos (JPEG, lossy WebP and JPEG 2000) start at 1/2, which hides their artefacts.
    A run that was stopped or killed goes on where it was when started again; finished photos are not touched.

    Example: python tools/images_to_data.py ~/Pictures/DIV2K ~/dataset/DIV2K
    """

    photos: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOS")]
    """Folder of the photographs (searched in depth; links to folders are not followed), or one photograph."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the crops, one for each source of photographs, such as ~/dataset/DIV2K."""
    size: int = 512
    """Height and width of a crop in pixels; training cuts its smaller random HR crops out of it."""
    format: Literal["npy", "png", "webp"] = "npy"
    """How crops are stored, always lossless: npy is read fastest by far, webp is smallest (0.44 of npy)."""
    seed: int = 0
    """Decides where the gaps between the crops lie. Same seed and photo, same bytes, on any number of threads."""
    cover: bool = False
    """Cover every pixel: as few crops as that takes, overlapping evenly, instead of crops with random gaps."""
    keep_lossy_size: bool = False
    """Cut lossy photos at full size too, with their compression artefacts."""
    num_scales: int | None = None
    """At most so many sizes of each photo (1: only the largest); by default as many as hold a crop."""
    max_megapixels: float = 300
    """Skip larger photos before they are decoded: they could fill the memory."""
    threads: int = 0
    """Number of threads; 0 is one a core."""


@dataclass
class Totals:
    """What a run did, for its report."""

    photos: int = 0
    already: int = 0
    crops: int = 0
    pixels: int = 0
    skipped: int = 0
    bad: int = 0


def main(options: Options) -> int:
    """Make the crops. 0: done; 1: done, but some photos could not be decoded, or there is no crop at all."""
    photos, names = _photographs(options)
    out = options.out.expanduser()
    _check_options(options, photos, out)
    prepare_decoders()
    started, cpu = time.monotonic(), time.process_time()
    settings = CropSettings(options.size, options.format, options.seed, options.cover, options.keep_lossy_size,
                            options.num_scales, options.max_megapixels)
    with _claimed(out, _recorded_settings(settings, photos, out)):
        finished = _mend_manifest(out, photos)
        todo = [name for name in names if name not in finished]
        totals = Totals(already=len(names) - len(todo))
        skipped = _make_all(todo, photos, out, settings, thread_count(options.threads), totals)
        _write_skipped(out, skipped)
    _report(totals, out, skipped, time.monotonic() - started,
            time.process_time() - cpu)
    gone = sum(not (photos / name).exists() for name in finished.difference(names))
    if gone:
        print(f"{gone} photos of earlier runs are no longer in {photos}; their crops in {out} stay")
    return 1 if totals.bad or not (totals.crops or finished) else 0


def _photographs(options: Options) -> tuple[Path, list[str]]:
    """(Folder, names relative to it) of the photographs to cut."""
    source = options.photos.expanduser()
    if source.is_file():
        return source.parent, [source.name]
    if not source.is_dir():
        raise UserError(f"{source}: no such folder or file; give the folder of the photographs")
    files = walk(source, MANIFEST)
    if not files.encoded:
        raise UserError(f"{source}: no PNG, JPEG, WebP, BMP, TIFF or JPEG 2000 files below this folder"
                        f"{files.links_note()}; give the folder of the photographs")
    return source, files.encoded


def _check_options(options: Options, photos: Path, out: Path) -> None:
    """Refuse what cannot work before anything is written."""
    if not 32 <= options.size <= 8192:
        raise UserError(f"--size {options.size}: a crop must have 32 to 8192 pixels a side; 512 suits most networks")
    if options.num_scales is not None and options.num_scales < 1:
        raise UserError(f"--num-scales {options.num_scales}: must be at least 1; leave it away for all sizes")
    if not 0 < options.max_megapixels <= MAX_MEGAPIXELS:
        raise UserError(f"--max-megapixels {options.max_megapixels:g}: must be above 0 and at most {MAX_MEGAPIXELS}")
    inner, outer = photos.resolve(), out.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"{out} and {photos}: crops and photographs must not lie in one another, or a second run would "
                        "cut its own crops; choose an OUT beside the photographs")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: not a folder; choose another OUT")


def _recorded_settings(settings: CropSettings, photos: Path, out: Path) -> dict[str, object]:
    """What a dataset remembers of how it was made: all that decides its bytes, and where its photographs lie."""
    recorded = {"layout_version": LAYOUT_VERSION, **asdict(settings)}
    del recorded["max_megapixels"]  # decides which photos are skipped, not what a crop holds
    recorded["photos"] = os.path.relpath(photos.resolve(), out.resolve())  # both may move together
    return recorded


@contextmanager
def _claimed(out: Path, settings: dict[str, object]) -> Iterator[None]:
    """Hold `out` for this process alone, and hold it to the settings it was begun with."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / SETTINGS, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; choose another OUT") from error
    with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another images_to_data.py is writing there; wait for it or stop it") from None
        _agree(file, out, settings)
        yield


def _agree(file: IO[str], out: Path, settings: dict[str, object]) -> None:
    """Write the settings into a new dataset.json; refuse others than an existing one holds."""
    text = file.read()
    if not text:
        if (out / MANIFEST).exists():
            raise UserError(f"{out / SETTINGS}: missing or empty beside a {MANIFEST}; restore it or choose another OUT")
        file.write(json.dumps(settings, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
        return
    try:
        recorded = json.loads(text)
    except ValueError:
        recorded = None
    if not isinstance(recorded, dict):
        raise UserError(f"{out / SETTINGS}: not the settings of a dataset; restore it, or choose another OUT")
    for name in sorted({*recorded, *settings}):
        old, new = recorded.get(name), settings.get(name)
        if old != new:
            moved = f", or mend 'photos' in {out / SETTINGS} if they only moved" if name == "photos" else ""
            raise UserError(f"{out}: begun with {name} = {json.dumps(old)}, now {name} = {json.dumps(new)}; "
                            f"use the same settings or another OUT{moved}")


def _mend_manifest(out: Path, photos: Path) -> set[str]:
    """The photographs whose crops are all there; the others' lines are taken out of the manifest, their crops deleted.

    Torn lines, missing or shortened crops, and photographs that changed since are all found here.
    """
    path = out / MANIFEST
    if not path.exists():
        return set()
    text = path.read_text("utf-8", errors="replace")
    by_photo: dict[str, list[CropRecord]] = {}
    for line in text.split("\n"):
        record = parse_line(line)
        if record is not None:
            by_photo.setdefault(record.photo, []).append(record)
    kept = {photo: records for photo, records in by_photo.items() if _is_finished(records, out, photos / photo)}
    for photo in by_photo.keys() - kept.keys():
        if (out / photo).is_dir():
            remove_crops(out / photo)
    mended = "".join(format_lines(records) for records in kept.values())
    if mended != text:
        write_atomically(path, mended.encode("utf-8"))
    return set(kept)


def _is_finished(records: list[CropRecord], out: Path, photo: Path) -> bool:
    """Whether all crops of a photograph are on disk in full, and the photograph is still the same (or gone)."""
    first = records[0]
    try:
        status = photo.stat()
        if (status.st_size, status.st_mtime_ns) != (first.photo_bytes, first.photo_mtime_ns):
            return False
    except (FileNotFoundError, NotADirectoryError):
        pass  # deleted after cutting, to save room: its crops are still good
    if len({record.path for record in records}) != first.photo_crops or len(records) != first.photo_crops:
        return False
    try:
        return all((out / record.path).stat().st_size == record.bytes for record in records)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _make_all(todo: list[str], photos: Path, out: Path, settings: CropSettings, threads: int,
              totals: Totals) -> list[PhotoResult]:
    """Cut the photographs on threads and append to the manifest in their order; returns the ones skipped."""
    skipped = []
    with quiet_libraries(), open(out / MANIFEST, "a", encoding="utf-8") as manifest, \
            progress(len(todo), "photo") as bar:
        for result in ordered_map(lambda name: _one(name, photos, out, settings), todo, threads):
            if result.reason:
                skipped.append(result)
                totals.bad += result.is_bad
                totals.skipped += 1
            else:
                _append(manifest, result)
                totals.photos += 1
                totals.crops += len(result.records)
                totals.pixels += result.pixels
            bar.update()
            bar.set_postfix(crops=totals.crops, skipped=totals.skipped, refresh=False)
        os.fsync(manifest.fileno())
    return skipped


def _append(manifest: IO[str], result: PhotoResult) -> None:
    """Add a photograph to the manifest: only now, with all its crops on disk, and whole."""
    try:
        manifest.write(format_lines(result.records))
        manifest.flush()
    except OSError as error:
        raise UserError(f"{manifest.name}: cannot be written: {error.strerror}; make room, then run the same command "
                        "again: it goes on where it stopped") from error


def _one(name: str, photos: Path, out: Path, settings: CropSettings) -> PhotoResult:
    """`make_crops`, but for names that a list of files could not hold later."""
    if not name.isprintable() or "�" in name:
        return PhotoResult(name, reason="its name holds control characters or is not UTF-8; rename it", is_bad=True)
    return make_crops(name, photos, out, settings)


def _write_skipped(out: Path, skipped: list[PhotoResult]) -> None:
    """skipped.txt: the photographs without crops and why; no file where there are none."""
    path = out / SKIPPED
    if skipped:
        lines = "".join(f"{_shown(result.photo)}: {result.reason}\n" for result in skipped)
        write_atomically(path, lines.encode("utf-8"))
    else:
        path.unlink(missing_ok=True)


def _shown(name: str) -> str:
    """A file name that any terminal and any UTF-8 file can hold."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8") if name.isprintable() else ascii(name)


def _report(totals: Totals, out: Path, skipped: list[PhotoResult], wall: float, cpu: float) -> None:
    """Say what was done, how fast, and what was skipped."""
    print(f"{totals.photos} photos cut into {totals.crops} crops in {out}; {totals.already} photos were there already, "
          f"{totals.skipped} skipped")
    if totals.crops:
        megapixels = totals.pixels / 1e6
        print(f"{megapixels:.1f} megapixels in {wall:.1f} s: {totals.crops / wall:.0f} crops/s, "
              f"{megapixels / cpu:.1f} MPix and {totals.crops / cpu:.0f} crops per core-second")
    for result in skipped[:NUM_SHOWN]:
        print(f"skipped {_shown(result.photo)}: {result.reason}")
    if len(skipped) > NUM_SHOWN:
        print(f"... and {len(skipped) - NUM_SHOWN} more in {out / SKIPPED}")


if __name__ == "__main__":
    run(Options, main)
