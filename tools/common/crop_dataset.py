"""The folder that crops are written to: claimed, held to its settings, mended after a kill, its manifest kept."""

from __future__ import annotations

import fcntl
import filecmp
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

from pipeline.cli import UserError
from pipeline.data.image_files import MANIFEST
from tools.common.crop_report import Totals
from tools.common.crop_writing import CropSettings, CutPicture, Reject, Unit, discard, remove_crops
from tools.common.dataset_files import FINAL_GATES, REJECTS, SETTINGS, reject_groups, reject_line
from tools.common.manifest import CropRecord, format_lines, parse_line
from tools.common.near_duplicates import NearDuplicates
from tools.common.parallel import ordered_map, progress, quiet_libraries

# A change of what the same settings produce must raise this, so that one dataset never holds both.
LAYOUT_VERSION = 2

Stamp = tuple[int, int]  # size and modification time of a source's file


@dataclass
class UnitResult:
    """What became of a unit: its pictures, or the reason why there are none."""

    unit: Unit
    pictures: list[CutPicture] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)  # of the unit as a whole


class CropDataset:
    """A folder of crops while a tool writes it. Made by `open_dataset`."""

    def __init__(self, out: Path, settings: CropSettings, stamp_of: Callable[[str], Stamp | None]) -> None:
        """`stamp_of(photo)` is the stamp of a source now, `None` where it is gone (its crops stay)."""
        self.out, self.settings, self.totals = out, settings, Totals()
        distance = settings.max_hash_distance
        self._duplicates = None if distance is None else NearDuplicates(distance)
        self._photo_of_sha256: dict[bytes, str] = {}
        self._finished: set[str] = set()
        self._is_empty = True
        self._stamp_of = stamp_of
        self._mend_manifest()
        self._mend_rejects()
        self._manifest: IO[str] = open(out / MANIFEST, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._rejects: IO[str] = open(out / REJECTS, "a", encoding="utf-8")    # noqa: SIM115

    def is_finished(self, folder: str) -> bool:
        """Whether an earlier run has dealt with the unit of this folder."""
        return folder in self._finished

    @property
    def num_finished(self) -> int:
        """How many units earlier runs have dealt with."""
        return len(self._finished)

    @property
    def is_empty(self) -> bool:
        """Whether there is not a single crop, of this run or an earlier one."""
        return self._is_empty and not self.totals.crops

    def close(self) -> None:
        """Make what was written durable."""
        for file in (self._rejects, self._manifest):
            os.fsync(file.fileno())
            file.close()
        for name in (REJECTS, MANIFEST):
            if (self.out / name).stat().st_size == 0:
                (self.out / name).unlink()

    def add(self, result: UnitResult) -> None:
        """Write down what became of a unit: only now, with all its crops on disk, and whole."""
        unit, records = result.unit, []
        rejects = list(result.rejects)
        for picture in result.pictures:
            self.totals.pixels += picture.pixels
            twin = self._refuse_twin(picture)
            rejects += [twin] if twin else picture.rejects
            records += picture.records
        lines = "".join(reject_line(unit, reject, is_whole=not records) for reject in rejects)
        records = [replace(record, folder_crops=len(records)) for record in records]
        try:
            self._rejects.write(lines)
            self._rejects.flush()
            self._manifest.write(format_lines(records))
            self._manifest.flush()
        except OSError as error:
            raise UserError(f"{self.out}: the manifest cannot be written: {error.strerror}; make room, then run the "
                            "same command again: it goes on where it stopped") from error
        if not records:
            _remove_empty(self.out, unit.folder)
        self.totals.count(unit, rejects, len(records))

    def _refuse_twin(self, picture: CutPicture) -> Reject | None:
        """The reason why a picture is the twin of an earlier one; its crops are deleted then."""
        if self._duplicates is None or not picture.records:
            return None
        record = picture.records[0]
        reject = self._twin(record)
        if reject is not None:
            discard(picture.records, self.out)
            picture.records.clear()
        return reject

    def _twin(self, record: CropRecord) -> Reject | None:
        sha256, name = _source_sha256(record), _source_name(record)
        if sha256 in self._photo_of_sha256:
            return Reject("duplicate", f"the same file as {self._photo_of_sha256[sha256]}", time=record.time)
        twin = self._duplicates.add(name, bytes.fromhex(str(record.gates["source_hash"])))
        if twin is not None:
            return Reject("near-duplicate", f"nearly the same picture as {twin} (--keep-duplicates)", time=record.time)
        if sha256:
            self._photo_of_sha256[sha256] = name
        return None

    def _mend_manifest(self) -> None:
        """Keep the units whose crops are all there; drop the others' lines and delete their crops.

        Torn lines, missing or shortened crops, and sources that changed since are all found here.
        """
        with _mending(self.out / MANIFEST) as (old, new):
            for folder, records in _by_folder(old):
                if folder not in self._finished and self._is_whole(records):
                    self._finished.add(folder)
                    self._is_empty = False
                    self._remember(records)
                    new.write(format_lines(records))
                elif folder not in self._finished and (self.out / folder).is_dir():
                    remove_crops(self.out / folder)

    def _is_whole(self, records: list[CropRecord]) -> bool:
        """Whether all crops of a unit are on disk in full, and its source is still the same (or gone)."""
        first = records[0]
        if self._stamp_of(first.photo) not in (None, (first.photo_bytes, first.photo_mtime_ns)):
            return False
        if len({record.path for record in records}) != first.folder_crops or len(records) != first.folder_crops:
            return False
        try:
            return all((self.out / record.path).stat().st_size == record.bytes for record in records)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _remember(self, records: list[CropRecord]) -> None:
        """Take the pictures of a finished unit among those that later ones must not repeat."""
        if self._duplicates is None:
            return
        for name, record in {_source_name(record): record for record in records if record.role != "lr"}.items():
            self._duplicates.add(name, bytes.fromhex(str(record.gates["source_hash"])))
            if sha256 := _source_sha256(record):
                self._photo_of_sha256[sha256] = name

    def _mend_rejects(self) -> None:
        """Keep the rejects of finished units and those that stand until their source changes."""
        kept = set()
        with _mending(self.out / REJECTS) as (old, new):
            for folder, lines in reject_groups(old):
                is_settled = all(values["whole"] and values["gate"] in FINAL_GATES for values in lines) \
                    and self._stamp_of(lines[0]["photo"]) in (None, _stamp(lines[0]))
                if folder not in kept and (folder in self._finished or is_settled):
                    kept.add(folder)
                    new.writelines(json.dumps(values, ensure_ascii=False) + "\n" for values in lines)
        self._finished |= kept


@contextmanager
def _mending(path: Path) -> Iterator[tuple[Iterable[bytes], IO[str]]]:
    """(Lines of `path`, where those to keep are written): its new content, unless nothing was to be mended."""
    mended = path.with_name(f".{path.name}.tmp")
    try:
        if not path.exists():
            path.touch()
        with open(path, "rb") as old, open(mended, "w", encoding="utf-8") as new:
            yield old, new
            new.flush()
            os.fsync(new.fileno())
        if not filecmp.cmp(path, mended, shallow=False):
            os.replace(mended, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be mended: {error.strerror or error}; make room or mend the permissions, then "
                        "run the same command again") from error
    finally:
        mended.unlink(missing_ok=True)


def _by_folder(lines: Iterable[bytes]) -> Iterator[tuple[str, list[CropRecord]]]:
    """The records of each unit: its lines follow one another. Torn and foreign lines are left out."""
    records: list[CropRecord] = []
    for record in filter(None, map(parse_line, lines)):
        folder = record.path.rpartition("/")[0]
        if records and folder != records[0].path.rpartition("/")[0]:
            yield records[0].path.rpartition("/")[0], records
            records = []
        records.append(record)
    if records:
        yield records[0].path.rpartition("/")[0], records


def _stamp(values: dict) -> Stamp:
    """The stamp in a line of rejects.jsonl."""
    return values["photo_bytes"], values["photo_mtime_ns"]


def _source_sha256(record: CropRecord) -> bytes:
    """The hash of the file that a picture came in, empty where it has none of its own."""
    return bytes.fromhex(str(record.gates.get("source_sha256", "")))


def _source_name(record: CropRecord) -> str:
    """How a picture is named to people: its photo, and its second in a film."""
    return record.photo if record.time is None else f"{record.photo} at {record.time:.3f} s"


def _remove_empty(out: Path, folder: str) -> None:
    """Remove a unit's folder, and those above it within `out`, as far as they are empty."""
    path = out / folder
    while path != out:
        try:
            path.rmdir()
        except OSError:  # not empty, or never made
            return
        path = path.parent


def refuse_nested(source: Path, out: Path) -> None:
    """Raise `UserError` where sources and crops would lie in one another, or `out` is no folder."""
    inner, outer = source.resolve(), out.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"{out} and {source}: crops and sources must not lie in one another, or a second run would cut "
                        "its own crops; choose an OUT beside the sources")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: not a folder; choose another OUT")


@contextmanager
def open_dataset(out: Path, settings: CropSettings, stamp_of: Callable[[str], Stamp | None], tool: str,
                 **more: object) -> Iterator[CropDataset]:
    """Hold `out` for this process alone, held to the settings (`more` are the tool's own) that it was begun with."""
    recorded = {"layout_version": LAYOUT_VERSION, "tool": tool, **asdict(settings), **more}
    recorded["against"] = list(settings.against)
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / SETTINGS, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; choose another OUT") from error
    with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another {tool}.py is writing there; wait for it or stop it") from None
        _agree(file, out, recorded)
        dataset = CropDataset(out, settings, stamp_of)
        try:
            yield dataset
        finally:
            dataset.close()


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
            is_place = name in ("photos", "videos", "lr", "against")
            moved = f", or mend {name!r} in {out / SETTINGS} if they only moved" if is_place else ""
            raise UserError(f"{out}: begun with {name} = {json.dumps(old)}, now {name} = {json.dumps(new)}; "
                            f"use the same settings or another OUT{moved}")


def cut_all(dataset: CropDataset, units: Iterable[Unit], cut: Callable[[Unit], UnitResult], threads: int,
            total: int | None, name: str) -> None:
    """Cut the units on threads, write the results down in their order, and show how it goes."""
    with quiet_libraries(), progress(total, name) as bar:
        for result in ordered_map(cut, units, threads):
            dataset.add(result)
            bar.update()
            bar.set_postfix(crops=dataset.totals.crops, rejected=dataset.totals.rejects.total(), refresh=False)
