"""Convert a dataset to another storage format with identical pixels, verifying every file.

`Converter` converts single images and is thread-safe; `carry_over` writes the bookkeeping around
the images (manifests, settings, file lists) with the new names and sizes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import numpy as np
import tyro

from pipeline.cli import UserError, counted, run
from pipeline.data.image_files import (
    MANIFEST,
    TRAINING_LIST,
    VALIDATION_LIST,
    BadNpyError,
    read_file_list,
    write_file_list,
)
from pipeline.data.image_headers import BadImageError, unread_note
from pipeline.data.image_pixels import prepare_decoders
from pipeline.files import flush, parse_json, write_atomically
from tools.crops.cutting import REJECTS, SETTINGS
from tools.crops.dataset import refuse_nested
from tools.crops.manifest import CropRecord, ManifestIndex, format_line, iterate_lines
from tools.files import IMAGES, Files, lock_output, printable, scan, walk
from tools.images import check_max_megapixels, decode, decode_file, is_stored_as, parallel_encoder
from tools.parallel import ordered_map, progress, quiet_libraries, thread_count

PLACES = ("photos", "lr", "videos")
"""Entries of dataset.json that locate the sources, relative to the dataset."""
CLAIM = "conversion.json"
NUM_SHOWN = 20


@dataclass(frozen=True)
class Options:
    """Store the images of a dataset in another lossless format.

    npy is the fastest to read, jp2 and webp are the smallest. Every image below SOURCE becomes an
    image with the same name, except for the suffix, below OUT. Each new file is written, read back
    from disk, decoded, and compared with the pixels of its source (and those with the manifest's
    checksum) before it gets its name. Manifests, dataset.json, rejects.jsonl and the two file lists
    are copied with the new names and sizes. Images of 16 bits keep them (uint16 in .npy), but not
    as webp, which holds 8. Images that RGB cannot hold exactly (transparency, CMYK, colours other
    than sRGB, animations, 10 or 12 bits) are reported and skipped, never reduced. SOURCE is not
    changed unless --remove-source is given. Run the same command again to continue a run that was
    stopped or killed; existing files are compared again, and remade if damaged. The tool that made
    the dataset can continue in OUT with the new --format, except in JPEG 2000, which those tools do
    not write. Images of OUT whose source no longer exists are listed and kept.

    Example: python tools/convert_dataset.py ~/dataset ~/dataset_webp --to webp
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The dataset: a folder of crops and their manifests, or of any PNG, JPEG, WebP, BMP, TIFF,
    JPEG 2000 and .npy images (searched recursively; links to folders are not followed)."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the converted dataset; new, or started by an earlier run of the same conversion."""
    to: Literal["npy", "png", "webp", "jp2"]
    """The format to convert to."""
    remove_source: bool = False
    """Delete each source image once its converted file, new or from an earlier run, holds the same
    pixels and is safely on disk, so that there is never more than one copy of the dataset.
    Manifests and lists are deleted last, and only if nothing failed."""
    max_megapixels: float = 300
    """Skip larger images before decoding, because they could exhaust the memory."""
    threads: int = 0
    """Number of threads; 0 is one per core."""


def main(options: Options) -> int:
    """Convert, copy the bookkeeping, and report.

    Returns 0 if everything is converted, 1 if some images could not be.
    """
    source, out = options.source.expanduser(), options.out.expanduser()
    _check_options(options, source, out)
    files = walk(source, MANIFEST)
    if not files.images and not (out / CLAIM).exists():
        raise UserError(
            f"{source}: no images below this folder{files.links_note()}; give the folder of a "
            "dataset"
        )
    _refuse_collisions(files.images, options.to)
    lists = read_bookkeeping(files)
    prepare_decoders()
    started, cpu = time.monotonic(), _cpu_seconds()
    threads = thread_count(options.threads)
    with (
        _claimed(out, source, options) as sources_were_removed,
        contextlib.closing(ManifestIndex(source, files.manifests)) as index,
        quiet_libraries(),
        parallel_encoder(options.to, threads) as encode,
    ):
        converter = Converter(
            source,
            out,
            options.to,
            index,
            encode,
            removes=options.remove_source,
            max_megapixels=options.max_megapixels,
        )
        totals = _convert_all(converter, files.images, threads)
        wall = time.monotonic() - started
        lost = carry_over(files, lists, out, options.to)
    _report(totals, files, out, wall, _cpu_seconds() - cpu)
    if lost:
        print(
            f"omitted from the manifests and lists because the converted file is missing: {lost} "
            "entries"
        )
    if not sources_were_removed:
        _report_surplus(files.images, out, options.to)
    if options.remove_source and not (totals.failed or lost):
        remove_bookkeeping(files)
    return 1 if totals.failed or lost else 0


def _check_options(options: Options, source: Path, out: Path) -> None:
    """Raise `UserError` for options that cannot work, before anything is written."""
    check_max_megapixels(options.max_megapixels)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give the folder of a dataset")
    refuse_nested(
        source,
        out,
        "a dataset cannot be converted into itself; choose an OUT beside it (--remove-source "
        "limits the disk space needed)",
    )


def _refuse_collisions(names: list[str], form: str) -> None:
    """Raise `UserError` if two images would end up in one file."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(converted_name(name, form), name)
        if other is not name:
            raise UserError(
                f"{printable(other)} and {printable(name)} would both become "
                f"{printable(converted_name(name, form))}; rename or move one of them; nothing was "
                "written"
            )


@contextmanager
def _claimed(out: Path, source: Path, options: Options) -> Iterator[bool]:
    """Lock `out` for this process and this conversion.

    Yields whether sources were or will be removed. The first line of the file identifies the
    conversion; a second one says that a run used --remove-source.
    """
    claim = json.dumps(
        {
            "tool": "convert_dataset",
            "to": options.to,
            "source": os.path.relpath(source.resolve(), out.resolve()),
        }
    )
    way_out = "choose a new OUT, or empty it"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / CLAIM).exists() and any(out.iterdir()):
            raise UserError(
                f"{out}: contains files of something other than this conversion; {way_out}"
            )
        file = open(out / CLAIM, "a+", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written: {error.strerror}; choose another OUT"
        ) from error
    with file:
        lock_output(file, out, "convert_dataset")
        file.seek(0)
        lines = file.read().splitlines()
        if lines and lines[0] != claim:
            raise UserError(f"{out}: started as {lines[0]}, not {claim}; {way_out}")
        if not lines:
            file.write(claim + "\n")
        if options.remove_source and len(lines) < 2:
            file.write(json.dumps({"remove_source": True}) + "\n")
        file.flush()
        _remove_half_written(out)
        yield options.remove_source or len(lines) > 1


def _remove_half_written(out: Path) -> None:
    """Delete temporary files left by a killed run."""
    for folder, _, names in os.walk(out):
        for name in names:
            if name.startswith(".") and name.endswith(".tmp"):
                os.unlink(os.path.join(folder, name))


def _convert_all(converter: Converter, names: list[str], threads: int) -> ConversionTotals:
    """Convert the images on threads and print those that could not be converted."""
    totals = ConversionTotals()
    with progress(len(names), "file") as bar:
        for result in ordered_map(converter, names, threads):
            if result.reason:
                totals.failed += 1
                if totals.failed <= NUM_SHOWN:
                    print(f"not converted: {printable(result.name)}: {result.reason}")
            else:
                totals.files += result.is_new
                totals.already += not result.is_new
            totals.pixels += result.pixels
            totals.bytes_before += result.bytes_before
            totals.bytes_after += result.bytes_after
            bar.update()
            bar.set_postfix(failed=totals.failed, refresh=False)
    if totals.failed > NUM_SHOWN:
        print(f"... and {totals.failed - NUM_SHOWN} more not converted")
    return totals


@dataclass
class ConversionTotals:
    """Totals of a run, for its report."""

    files: int = 0
    already: int = 0
    failed: int = 0
    pixels: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


def _cpu_seconds() -> float:
    """CPU time of this process and of its encoding processes that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _report(totals: ConversionTotals, files: Files, out: Path, wall: float, cpu: float) -> None:
    """Print what was done, how fast, and what was left out."""
    print(
        f"{counted(totals.files, 'image')} converted and verified in {out}; already there: "
        f"{totals.already}; {totals.failed} could not be converted"
    )
    if totals.files:
        before, after, megapixels = (
            totals.bytes_before / 1e6,
            totals.bytes_after / 1e6,
            totals.pixels / 1e6,
        )
        print(
            f"{before:.1f} MB before, {after:.1f} MB after: {after / before:.3f} of it, "
            f"{after / 3 / megapixels:.3f} of the raw pixels"
        )
        # CPU time is counted in hundredths of a second.
        wall, cpu = max(wall, 0.01), max(cpu, 0.01)
        print(
            f"{megapixels:.1f} megapixels in {wall:.1f} s: {totals.files / wall:.0f} files/s, "
            f"{megapixels / wall:.1f} MPix/s, {megapixels / cpu:.1f} MPix per core-second"
        )
    if files.unread:
        print(unread_note(files.unread))
    if files.linked_folders:
        print(
            f"links to folders were not followed: {', '.join(map(printable, files.linked_folders))}"
        )


def _report_surplus(sources: list[str], out: Path, form: str) -> None:
    """Print the converted images whose source has since been quarantined or deleted."""
    expected = {converted_name(name, form) for name in sources}
    count = 0
    for kind, name in scan(out, MANIFEST):
        if kind in IMAGES and name.endswith(f".{form}") and name not in expected:
            count += 1
            if count <= NUM_SHOWN:
                print(f"no longer has a source: {printable(name)}")
    if count > NUM_SHOWN:
        print(f"... and {count - NUM_SHOWN} more without a source")
    if count:
        print(
            f"images in {out} that no longer have a source: {count}; they are kept, as are their "
            "lines in lists and manifests: delete them if they were removed on purpose"
        )


# --- One image ---


@dataclass(frozen=True)
class Converted:
    """Result of converting one image; `reason` says why it was not converted."""

    name: str
    reason: str = ""
    is_new: bool = False  # False: an earlier run converted it
    pixels: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


def converted_name(name: str, form: str) -> str:
    """Name of an image stored as `form`."""
    return f"{posixpath.splitext(name)[0]}.{form}"


class Converter:
    """Converts images; thread-safe."""

    def __init__(
        self,
        source: Path,
        out: Path,
        form: str,
        index: ManifestIndex,
        encode: Callable[[np.ndarray], bytes],
        *,
        removes: bool,
        max_megapixels: float,
    ) -> None:
        """Convert from the folder `source`, with its manifests in `index`, to `out`.

        `encode` turns RGB pixels into the content of a file of format `form`; `removes`
        deletes sources once converted.
        """
        self._source, self._out, self._form, self._index, self._encode = (
            source,
            out,
            form,
            index,
            encode,
        )
        self._removes, self._max_megapixels = removes, max_megapixels

    def __call__(self, name: str) -> Converted:
        """Convert one image; a bad one gives a result with a reason.

        Raises `UserError` if nothing can be written.
        """
        try:
            return self._convert(name)
        except (BadImageError, BadNpyError) as error:
            return Converted(name, getattr(error, "reason", str(error)))
        except OSError as error:
            return Converted(name, f"could not be read: {error.strerror or error}")

    def _convert(self, name: str) -> Converted:
        """Convert one image, unless an earlier run has done so."""
        path, target = self._source / name, self._out / converted_name(name, self._form)
        status, record = path.stat(), self._index.get(name)
        if target.exists() and self._is_done(path, target, status, record):
            self._remove(path, target, status)
            return Converted(name)
        pixels = self._pixels(path, record)
        data = path.read_bytes() if is_stored_as(path, self._form) else self._encode(pixels)
        try:
            reason = self._write(target, data, pixels, status)
        except OSError as error:
            raise UserError(
                f"{target}: cannot be written: {error.strerror}; free disk space or fix its "
                "permissions, then run the same command again; it continues where it stopped"
            ) from error
        if reason:
            return Converted(name, reason)
        self._remove(path, target, status)
        return Converted(
            name, "", True, pixels.shape[0] * pixels.shape[1], status.st_size, len(data)
        )

    def _is_done(
        self, path: Path, target: Path, status: os.stat_result, record: CropRecord | None
    ) -> bool:
        """Whether an existing file holds the pixels of its source; timestamps alone are no proof.

        If the source is kept and has the size and time that the manifest and the file recorded, the
        manifest's checksum stands for its pixels. Before a source is removed, it is always read.
        """
        try:
            if not is_stored_as(target, self._form):
                return False
            held = decode_file(target, max_megapixels=self._max_megapixels, depth=None)
        except (BadImageError, BadNpyError):  # damaged since it was verified, so it is remade
            return False
        if (
            not self._removes
            and record is not None
            and (status.st_mtime_ns, status.st_size) == (target.stat().st_mtime_ns, record.bytes)
        ):
            return hashlib.sha256(held).hexdigest() == record.sha256
        is_same = np.array_equal(self._pixels(path, record), held)
        # Replacing it could destroy the only copy of an image removed earlier.
        if self._removes and not is_same:
            raise BadImageError(
                f"{target} exists with other pixels; delete it if it is outdated, or rename the "
                "source"
            )
        return is_same

    def _pixels(self, path: Path, record: CropRecord | None) -> np.ndarray:
        """Decode a source exactly, and check it against the checksum in its manifest."""
        pixels = decode_file(path, max_megapixels=self._max_megapixels, exact=True, depth=None)
        if record is not None and hashlib.sha256(pixels).hexdigest() != record.sha256:
            raise BadImageError(
                "the pixels differ from those that the manifest recorded (bit rot, or the file "
                "was changed)"
            )
        return pixels

    def _write(self, target: Path, data: bytes, pixels: np.ndarray, status: os.stat_result) -> str:
        """Write, read back and compare a file, then name it; returns what went wrong."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                # Drop the pages, so that reading back uses the disk, not the page cache.
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                is_same = np.array_equal(decode(temporary.read_bytes(), self._form), pixels)
            except BadImageError as error:
                return f"the converted file cannot be read back ({error}); is the disk failing?"
            if not is_same:
                return (
                    "the converted file has different pixels when read back; is the disk failing?"
                )
            # The time stamp shows the next run what is done.
            os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return ""

    def _remove(self, path: Path, target: Path, status: os.stat_result) -> None:
        """Delete a source whose pixels are in `target`, if requested and if it is unchanged."""
        if not self._removes:
            return
        if os.path.samefile(path, target):  # a link within OUT may lead back to SOURCE
            raise BadImageError(f"{target} is the same file, not a copy; not removed")
        now = path.stat()
        if (now.st_mtime_ns, now.st_size) != (status.st_mtime_ns, status.st_size):
            raise BadImageError("it changed during the conversion; not removed")
        try:
            flush(target.parent)
            path.unlink()
        except OSError as error:
            raise UserError(
                f"{path}: converted, but cannot be removed: {error.strerror}; fix its "
                "permissions, or omit --remove-source"
            ) from error


# --- The bookkeeping ---


def read_bookkeeping(files: Files) -> dict[str, list[str]]:
    """Read the file lists of a dataset: name of the list -> entries.

    Also reads all settings, so that errors appear now and not after hours of work.
    """
    for name in files.manifests:
        _read_settings((files.root / name).with_name(SETTINGS))
    return {
        name: read_file_list(files.root / name, files.root)
        for name in (TRAINING_LIST, VALIDATION_LIST)
        if (files.root / name).exists()
    }


def carry_over(files: Files, lists: Mapping[str, list[str]], out: Path, form: str) -> int:
    """Write manifests, settings and lists below `out`.

    Returns how many of their entries have no converted file.
    """
    lost = 0
    for name in files.manifests:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        lost += _carry_manifest(files.root / name, out / name, form)
        _carry_settings(
            (files.root / name).with_name(SETTINGS), (out / name).with_name(SETTINGS), form
        )
        rejects = (files.root / name).with_name(REJECTS)
        if rejects.exists():
            write_atomically((out / name).with_name(REJECTS), rejects.read_bytes())
    for name, entries in lists.items():
        names = [converted_name(entry, form) for entry in entries]
        kept = [entry for entry in names if (out / entry).exists()]
        write_file_list(out / name, kept)
        lost += len(names) - len(kept)
    return lost


def _carry_manifest(source: Path, target: Path, form: str) -> int:
    """Stream a manifest with the new names and sizes.

    Returns how many of its crops have no converted file.
    """
    lost = 0
    temporary = target.with_name(f".{target.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for _, record in iterate_lines(source):
            path = converted_name(record.path, form)
            try:
                size = (target.parent / path).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                lost += 1
                continue
            lr = record.lr and converted_name(record.lr, form)
            file.write(format_line(replace(record, path=path, lr=lr, bytes=size)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    return lost


def _read_settings(path: Path) -> dict[str, object]:
    """Contents of dataset.json; empty if it does not exist."""
    if not path.exists():
        return {}
    try:
        settings = parse_json(path.read_text("utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not the settings of a dataset; restore it, or move it away")
    return settings


def _carry_settings(source: Path, target: Path, form: str) -> None:
    """Write dataset.json with the new format.

    The tool that made the dataset can then continue there. It cannot after a conversion to JPEG
    2000, because no such tool writes that format.
    """
    settings = _read_settings(source)
    if not settings:
        return
    if "format" in settings:
        settings["format"] = form
    for key in PLACES:
        place = settings.get(key)
        if isinstance(place, str) and not os.path.isabs(place):
            settings[key] = os.path.relpath(
                source.parent.resolve() / place, target.parent.resolve()
            )
    write_atomically(target, (json.dumps(settings, indent=1) + "\n").encode("utf-8"))


def remove_bookkeeping(files: Files) -> None:
    """Delete the copied bookkeeping and empty folders; all other files stay."""
    for name in files.manifests:
        for carried in (MANIFEST, SETTINGS, REJECTS):
            (files.root / name).with_name(carried).unlink(missing_ok=True)
    for name in (TRAINING_LIST, VALIDATION_LIST):
        (files.root / name).unlink(missing_ok=True)
    for folder, _, _ in os.walk(files.root, topdown=False):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(folder)


if __name__ == "__main__":
    run(Options, main)
