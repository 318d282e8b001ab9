"""One image, and the bookkeeping around it, from one storage format to another: what convert_dataset.py does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.cli import UserError
from pipeline.data.image_files import (
    MANIFEST,
    TRAINING_LIST,
    VALIDATION_LIST,
    BadNpyError,
    read_file_list,
    write_file_list,
)
from pipeline.files import flush, write_atomically
from tools.common.dataset_files import REJECTS, SETTINGS
from tools.common.image_formats import decode, decode_file, is_stored_as
from tools.common.image_headers import BadImageError
from tools.crops.manifest import CropRecord, ManifestIndex, format_line, iterate_lines
from tools.files import Files

PLACES = ("photos", "lr", "videos")
"""The entries of dataset.json that say where the sources lie, relative to the dataset."""


@dataclass(frozen=True)
class Converted:
    """What became of one image; `reason` says why it was not converted."""

    name: str
    reason: str = ""
    is_new: bool = False  # False: an earlier run had converted it
    pixels: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


def converted_name(name: str, form: str) -> str:
    """The name of an image once it is stored as `form`."""
    return f"{posixpath.splitext(name)[0]}.{form}"


class Converter:
    """Converts images on any number of threads."""

    def __init__(self, source: Path, out: Path, form: str, index: ManifestIndex,
                 encode: Callable[[np.ndarray], bytes], *, removes: bool, max_megapixels: float) -> None:
        """From the folder `source`, whose manifests `index` knows, to `out`; `removes`: deletes what is converted.

        `encode` makes a file's content, of the format `form`, out of uint8 RGB pixels.
        """
        self._source, self._out, self._form, self._index, self._encode = source, out, form, index, encode
        self._removes, self._max_megapixels = removes, max_megapixels

    def __call__(self, name: str) -> Converted:
        """Convert one image. Bad images are a result; `UserError` where nothing can be written."""
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
            raise UserError(f"{target}: cannot be written: {error.strerror}; make room or mend the permissions, then "
                            "run the same command again: it goes on where it stopped") from error
        if reason:
            return Converted(name, reason)
        self._remove(path, target, status)
        return Converted(name, "", True, pixels.shape[0] * pixels.shape[1], status.st_size, len(data))

    def _is_done(self, path: Path, target: Path, status: os.stat_result, record: CropRecord | None) -> bool:
        """Whether an existing file holds the pixels of its source: looked up in the pixels, for stamps prove little.

        Where the source stays, and has the size and the time that the manifest and the file remember, the manifest's
        checksum stands for its pixels. Before a source is removed it is always read itself.
        """
        try:
            if not is_stored_as(target, self._form):
                return False
            held = decode_file(target, max_megapixels=self._max_megapixels)
        except (BadImageError, BadNpyError):  # damaged since it was verified: made again
            return False
        if not self._removes and record is not None and \
                (status.st_mtime_ns, status.st_size) == (target.stat().st_mtime_ns, record.bytes):
            return hashlib.sha256(held).hexdigest() == record.sha256
        is_same = np.array_equal(self._pixels(path, record), held)
        if self._removes and not is_same:  # replacing it could destroy the only copy of an image removed earlier
            raise BadImageError(f"{target} exists and holds other pixels; delete it if it is outdated, or rename the "
                                "source")
        return is_same

    def _pixels(self, path: Path, record: CropRecord | None) -> np.ndarray:
        """The pixels of a source: all that its file holds, and what its manifest recorded."""
        pixels = decode_file(path, max_megapixels=self._max_megapixels, exact=True)
        if record is not None and hashlib.sha256(pixels).hexdigest() != record.sha256:
            raise BadImageError("its pixels are not those that the manifest recorded (bit rot, or somebody changed it)")
        return pixels

    def _write(self, target: Path, data: bytes, pixels: np.ndarray, status: os.stat_result) -> str:
        """Write, read back, compare, and only then name the file; returns what went wrong with the comparison."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):  # so that what is read back comes from the disk, not from memory
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                is_same = np.array_equal(decode(temporary.read_bytes(), self._form), pixels)
            except BadImageError as error:
                return f"the converted file cannot be read back ({error}); is the disk failing?"
            if not is_same:
                return "the converted file does not hold the same pixels when read back; is the disk failing?"
            os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))  # tells the next run what is done
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return ""

    def _remove(self, path: Path, target: Path, status: os.stat_result) -> None:
        """Delete a source whose pixels were found in `target`, if asked to, and if it is still the same file."""
        if not self._removes:
            return
        if os.path.samefile(path, target):  # a link within OUT leads back to SOURCE
            raise BadImageError(f"{target} is the same file, not a copy; not removed")
        now = path.stat()
        if (now.st_mtime_ns, now.st_size) != (status.st_mtime_ns, status.st_size):
            raise BadImageError("it changed while it was converted; not removed")
        try:
            flush(target.parent)
            path.unlink()
        except OSError as error:
            raise UserError(f"{path}: converted, but cannot be removed: {error.strerror}; mend the permissions, or "
                            "leave --remove-source away") from error


def read_bookkeeping(files: Files) -> dict[str, list[str]]:
    """The file lists of a dataset: name of the list -> its entries. Refuses now what would fail after hours of work."""
    for name in files.manifests:
        _read_settings((files.root / name).with_name(SETTINGS))
    return {name: read_file_list(files.root / name, files.root) for name in (TRAINING_LIST, VALIDATION_LIST)
            if (files.root / name).exists()}


def carry_over(files: Files, lists: Mapping[str, list[str]], out: Path, form: str) -> int:
    """Write manifests, settings and lists below `out`; returns how many of their entries have no converted file."""
    lost = 0
    for name in files.manifests:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        lost += _carry_manifest(files.root / name, out / name, form)
        _carry_settings((files.root / name).with_name(SETTINGS), (out / name).with_name(SETTINGS), form)
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
    """Stream a manifest with the new names and sizes; returns how many crops have no converted file."""
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
    """What dataset.json holds; empty where there is none."""
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not the settings of a dataset; restore it, or move it away")
    return settings


def _carry_settings(source: Path, target: Path, form: str) -> None:
    """Write dataset.json with the new format, so that the tool that made the dataset can go on in the new one.

    Not after a conversion to JPEG 2000, which no such tool writes: they refuse the format there.
    """
    settings = _read_settings(source)
    if not settings:
        return
    if "format" in settings:
        settings["format"] = form
    for key in PLACES:
        place = settings.get(key)
        if isinstance(place, str) and not os.path.isabs(place):
            settings[key] = os.path.relpath(source.parent.resolve() / place, target.parent.resolve())
    write_atomically(target, (json.dumps(settings, indent=1) + "\n").encode("utf-8"))


def remove_bookkeeping(files: Files) -> None:
    """Delete what was carried over, and the folders that are empty now; whatever else lies there stays."""
    for name in files.manifests:
        for carried in (MANIFEST, SETTINGS, REJECTS):
            (files.root / name).with_name(carried).unlink(missing_ok=True)
    for name in (TRAINING_LIST, VALIDATION_LIST):
        (files.root / name).unlink(missing_ok=True)
    for folder, _, _ in os.walk(files.root, topdown=False):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(folder)
