"""The output folder of a crop dataset: locking, settings, repair after a kill, manifest.

`open_dataset` gives one process exclusive access to a `CropDataset`; `cut_all` cuts the unfinished
units on threads; a `Clock` reports what was done and how fast.
"""

from __future__ import annotations

import filecmp
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

from pipeline.cli import UserError, counted
from pipeline.data.image_files import MANIFEST
from pipeline.files import parse_json
from tools.crops.cutting import (
    FINAL_GATES,
    REJECTS,
    SETTINGS,
    CropSettings,
    CutPicture,
    Reject,
    Unit,
    discard,
    parse_reject,
    reject_groups,
    reject_line,
)
from tools.crops.duplicates import NearDuplicates
from tools.crops.manifest import CropRecord, format_lines, parse_line
from tools.crops.options import benchmark_fingerprint
from tools.files import converted_note, lock_output, printable
from tools.parallel import ordered_map, progress, quiet_libraries

NUM_SHOWN = 20
GATE_WORDS = {
    "size": "too small",
    "decode": "unreadable",
    "pair": "not matching",
    "leak": "in a benchmark",
}
"""Wording of gates whose name alone would not be clear in a report."""
# Increase this when the same settings would produce other data, so that one dataset never mixes
# both.
LAYOUT_VERSION = 2

Stamp = tuple[int, int]  # size and modification time of a source file


@contextmanager
def open_dataset(
    out: Path,
    settings: CropSettings,
    stamp_of: Callable[[str], Stamp | None],
    tool: str,
    **more: object,
) -> Iterator[CropDataset]:
    """Open `out` for this process alone and yield its `CropDataset`.

    `settings` and `more` (the tool's own settings) must equal those the dataset was started with.
    Raises `UserError` if they differ, if another process holds the folder, or if it cannot be
    written.
    """
    recorded = {"layout_version": LAYOUT_VERSION, "tool": tool, **asdict(settings), **more}
    recorded["against"] = list(settings.against)
    if settings.depth == 8:
        del recorded["depth"]
    recorded["against_files"] = benchmark_fingerprint(settings.against)
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / SETTINGS, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written: {error.strerror}; choose another OUT"
        ) from error
    with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
        lock_output(file, out, tool)
        _check_settings(file, out, recorded)
        dataset = CropDataset(out, settings, stamp_of)
        try:
            yield dataset
        except BaseException:
            with suppress(UserError):  # the first error is the one to report
                dataset.close()
            raise
        dataset.close()


def _check_settings(file: IO[str], out: Path, settings: dict[str, object]) -> None:
    """Write the settings into a new dataset.json; raise `UserError` if an existing one differs."""
    text = file.read()
    if not text:
        if (out / MANIFEST).exists():
            raise UserError(
                f"{out / SETTINGS}: missing or empty beside a {MANIFEST}; restore it or choose "
                "another OUT"
            )
        file.write(json.dumps(settings, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
        return
    try:
        recorded = parse_json(text)
    except ValueError:
        recorded = None
    if not isinstance(recorded, dict):
        raise UserError(
            f"{out / SETTINGS}: not the settings of a dataset; restore it, or choose another OUT"
        )
    for name in sorted({*recorded, *settings}):
        # Written only where it is not 8, which is what it was before there was a choice.
        missing = 8 if name == "depth" else None
        old, new = recorded.get(name, missing), settings.get(name, missing)
        if old != new:
            is_place = name in ("photos", "videos", "lr", "against")
            moved = (
                f", or correct {name!r} in {out / SETTINGS} if they only moved" if is_place else ""
            )
            raise UserError(
                f"{out}: started with {name} = {json.dumps(old)}, now {name} = {json.dumps(new)}; "
                f"use the same settings or another OUT{moved}"
            )


def refuse_nested(
    source: Path,
    out: Path,
    why: str = "neither may lie within the other, or a second run would cut its own crops; choose "
    "an OUT beside the sources",
) -> None:
    """Raise `UserError` if `source` and `out` overlap, or if `out` is not a folder."""
    inner, outer = source.resolve(), out.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"{out} and {source}: {why}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: not a folder; choose another OUT")


def cut_all(
    dataset: CropDataset,
    units: Iterable[Unit],
    cut: Callable[[Unit], UnitResult],
    threads: int,
    total: int | None,
    name: str,
) -> None:
    """Cut the units on threads, record the results in order, and show progress."""
    with quiet_libraries(), progress(total, name) as bar:
        for result in ordered_map(cut, units, threads):
            dataset.add(result)
            bar.update()
            bar.set_postfix(
                crops=dataset.totals.crops, rejected=dataset.totals.rejects.total(), refresh=False
            )


@dataclass
class UnitResult:
    """Result of cutting a unit: its pictures, or the reasons why there are none."""

    unit: Unit
    pictures: list[CutPicture] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)  # rejects of the unit as a whole


class CropDataset:
    """A dataset folder while a tool writes to it; created by `open_dataset`."""

    def __init__(
        self, out: Path, settings: CropSettings, stamp_of: Callable[[str], Stamp | None]
    ) -> None:
        """Repair the folder and find out which units are finished.

        `stamp_of(photo)` returns the current stamp of a source, or `None` if it is gone or not
        available (its crops stay).
        """
        self.out, self.settings, self.totals = out, settings, CuttingTotals()
        distance = settings.max_hash_distance
        self._duplicates = None if distance is None else NearDuplicates(distance)
        # Static corners of moving pictures.
        self._film_crops = None if distance is None else NearDuplicates(distance)
        self._source_of_sha256: dict[bytes, str] = {}
        self._finished: set[str] = set()
        # crops of changed sources, until they are cut again
        self._stale: dict[str, list[CropRecord]] = {}
        self._is_empty = True
        self._stamp_of = stamp_of
        self._repair_manifest(_cleaned(out / REJECTS))
        self._repair_rejects()
        self._manifest: IO[str] = open(out / MANIFEST, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._rejects: IO[str] = open(out / REJECTS, "a", encoding="utf-8")  # noqa: SIM115

    def is_finished(self, folder: str) -> bool:
        """Whether an earlier run has processed the unit with this folder."""
        return folder in self._finished

    @property
    def num_finished(self) -> int:
        """Number of units that earlier runs have processed."""
        return len(self._finished)

    @property
    def is_empty(self) -> bool:
        """Whether neither this run nor an earlier one produced a crop."""
        return self._is_empty and not self.totals.crops

    def close(self) -> None:
        """Flush everything to disk; crops of changed sources that were not reached stay listed."""
        try:
            for records in self._stale.values():
                self._manifest.write(format_lines(records))
            for file in (self._rejects, self._manifest):
                file.flush()
                os.fsync(file.fileno())
            if (self.out / REJECTS).stat().st_size == 0:
                (self.out / REJECTS).unlink()
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            for file in (self._rejects, self._manifest):
                with suppress(OSError):  # unwritten data is still in its buffer
                    file.close()

    def forget(self, photo: str) -> None:
        """Delete the crops of units that a changed source no longer contains.

        `photo` is a video, or an archive with all its members, that was read to the end in this
        run.
        """
        for folder, records in list(self._stale.items()):
            if f"{records[0].photo}/".startswith(f"{photo}/"):
                discard(self._stale.pop(folder), self.out)
                _remove_empty(self.out, folder)

    def add(self, result: UnitResult) -> None:
        """Record the result of a unit whose crops are all on disk."""
        unit, records = result.unit, []
        rejects = list(result.rejects)
        for picture in result.pictures:
            self.totals.pixels += picture.pixels
            if picture.profile and picture.records:
                self.totals.converted[picture.profile] += 1
            twin = self._refuse_twin(picture)
            rejects += [twin] if twin else picture.rejects
            rejects += self._drop_seen_crops(picture)
            records += picture.records
        records = [replace(record, folder_crops=len(records)) for record in records]
        earlier = self._stale.pop(unit.folder, [])
        is_broken = not records and all(reject.gate not in FINAL_GATES for reject in rejects)
        if not records and not is_broken:
            discard(earlier, self.out)
        try:
            self._rejects.write(
                "".join(reject_line(unit, reject, is_whole=not records) for reject in rejects)
            )
            self._rejects.flush()
            # Keep the crops of the old source, because the new one gave none.
            self._manifest.write(format_lines(earlier if is_broken else records))
            self._manifest.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        if not records:
            _remove_empty(self.out, unit.folder)
        self.totals.count(unit, rejects, len(records))

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.out}: the manifest cannot be written: {error.strerror}; free disk space, then "
            "run the same command again; it continues where it stopped"
        )

    def _refuse_twin(self, picture: CutPicture) -> Reject | None:
        """Delete the crops of a picture that is a copy of an earlier one, and return the reject."""
        if self._duplicates is None or not picture.records:
            return None
        reject = self._twin(picture.records[0])
        if reject is not None:
            discard(picture.records, self.out)
            picture.records.clear()
        return reject

    def _drop_seen_crops(self, picture: CutPicture) -> list[Reject]:
        """Delete the crops of a frame that repeat a crop of another frame.

        The background behind a moving subject often does not change.
        """
        rejects, kept = [], []
        for record in picture.records:
            is_of_film = self._film_crops is not None and record.time is not None
            twin = self._film_crops.add(record.path, _crop_hash(record)) if is_of_film else None
            if twin is None:
                kept.append(record)
                continue
            discard([record], self.out)
            reason = f"nearly the same crop as {twin} (--keep-duplicates)"
            rejects.append(
                Reject("near-duplicate", reason, record.scale, record.top, record.left, record.time)
            )
        picture.records[:] = kept
        return rejects

    def _twin(self, record: CropRecord) -> Reject | None:
        sha256, source = _source_sha256(record), _source(record)
        if sha256 in self._source_of_sha256:
            folder, name = _parts(self._source_of_sha256[sha256])
            return Reject(
                "duplicate",
                f"the same file as {name} (--keep-duplicates)",
                time=record.time,
                twin=folder,
            )
        twin = self._duplicates.add(source, bytes.fromhex(str(record.gates["source_hash"])))
        if twin is not None:
            folder, name = _parts(twin)
            reason = f"nearly the same picture as {name} (--keep-duplicates)"
            return Reject("near-duplicate", reason, time=record.time, twin=folder)
        if sha256:
            self._source_of_sha256[sha256] = source
        return None

    def _repair_manifest(self, cleaned: set[str]) -> None:
        """Keep the units whose crops all exist or were `cleaned` away, and drop all others.

        This finds torn lines, missing or shortened crops, and changed sources. If a source is gone,
        its existing crops are kept.
        """
        with _repairing(self.out / MANIFEST) as (old, new):
            for folder, records in _by_folder(old):
                if folder in self._finished or folder in self._stale:
                    continue  # left behind by a killed run
                stamp, there = (
                    self._stamp_of(records[0].photo),
                    [self._is_there(record) for record in records],
                )
                is_whole = len(records) == records[0].folder_crops and all(
                    is_there or record.path in cleaned
                    for record, is_there in zip(records, there, strict=True)
                )
                kept = [record for record, is_there in zip(records, there, strict=True) if is_there]
                if stamp is None or (
                    is_whole and stamp == (records[0].photo_bytes, records[0].photo_mtime_ns)
                ):
                    self._finished.add(folder)
                    self._is_empty = self._is_empty and not kept
                    self._remember(kept)
                    new.write(
                        format_lines(replace(record, folder_crops=len(kept)) for record in kept)
                    )
                elif is_whole:
                    self._stale[folder] = kept  # its source changed

    def _is_there(self, record: CropRecord) -> bool:
        """Whether a crop's file exists and has its recorded size."""
        try:
            return (self.out / record.path).stat().st_size == record.bytes
        except OSError:
            return False

    def _remember(self, records: list[CropRecord]) -> None:
        """Add the pictures of a finished unit to those that later ones must not repeat."""
        if self._duplicates is None:
            return
        for source, record in {
            _source(record): record for record in records if record.role != "lr"
        }.items():
            if hashed := record.gates.get("source_hash"):  # else the line is not of this dataset
                self._duplicates.add(source, bytes.fromhex(str(hashed)))
            if sha256 := _source_sha256(record):
                self._source_of_sha256[sha256] = source
        for record in records:
            has_hash = record.time is not None and record.gates.get("hash")
            if has_hash and self._film_crops is not None:
                self._film_crops.add(record.path, _crop_hash(record))

    def _repair_rejects(self) -> None:
        """Keep the rejects of finished units, and those that hold until a source changes."""
        settled = set()
        with _repairing(self.out / REJECTS) as (old, new):
            for folder, lines in reject_groups(old):
                if folder in self._finished or self._is_settled(lines):
                    settled.add(folder)
                    new.writelines(
                        json.dumps(values, ensure_ascii=False) + "\n" for values in lines
                    )
        self._finished |= settled

    def _is_settled(self, lines: list[dict]) -> bool:
        """Whether a unit without crops would be rejected again for the same reasons."""
        first = lines[0]
        return (
            all(values["whole"] and values["gate"] in FINAL_GATES for values in lines)
            and self._stamp_of(first["photo"])
            in (None, (first["photo_bytes"], first["photo_mtime_ns"]))
            and all(values["twin"] in self._finished for values in lines if "twin" in values)
        )


def _cleaned(rejects: Path) -> set[str]:
    """Crops that check_training_data.py deleted on purpose; they are not made again."""
    if not rejects.exists():
        return set()
    with open(rejects, "rb") as lines:
        return {
            values["path"]
            for values in map(parse_reject, lines)
            if values and values.get("cleaned") and "path" in values
        }


@contextmanager
def _repairing(path: Path) -> Iterator[tuple[Iterable[bytes], IO[str]]]:
    """Yield (lines of `path`, file for the lines to keep); replace `path` if they differ."""
    repaired = path.with_name(f".{path.name}.tmp")
    try:
        if not path.exists():
            path.touch()
        with open(path, "rb") as old, open(repaired, "w", encoding="utf-8") as new:
            yield old, new
            new.flush()
            os.fsync(new.fileno())
        if not filecmp.cmp(path, repaired, shallow=False):
            os.replace(repaired, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be repaired: {error.strerror or error}; free disk space "
            "or fix its permissions, then run the same command again"
        ) from error
    finally:
        repaired.unlink(missing_ok=True)


def _by_folder(lines: Iterable[bytes]) -> Iterator[tuple[str, list[CropRecord]]]:
    """Yield (folder, records) for each unit; skip torn and foreign lines.

    The lines of a unit are adjacent.
    """
    records: list[CropRecord] = []
    for record in filter(None, map(parse_line, lines)):
        folder = record.path.rpartition("/")[0]
        if records and folder != records[0].path.rpartition("/")[0]:
            yield records[0].path.rpartition("/")[0], records
            records = []
        records.append(record)
    if records:
        yield records[0].path.rpartition("/")[0], records


def _crop_hash(record: CropRecord) -> bytes:
    return bytes.fromhex(str(record.gates["hash"]))


def _source_sha256(record: CropRecord) -> bytes:
    """Hash of the file that holds the picture; empty if the picture is not a file of its own."""
    return bytes.fromhex(str(record.gates.get("source_sha256", "")))


def _source(record: CropRecord) -> str:
    """Unique name of a picture in the index of duplicates: its folder, photo and time."""
    folder = record.path.rpartition("/")[0]
    return (
        folder
        if folder == record.photo and record.time is None
        else f"{folder}\n{record.photo}\n{record.time}"
    )


def _parts(source: str) -> tuple[str, str]:
    """Split the result of `_source` into the unit's folder and a readable name."""
    folder, photo, time = source.split("\n") if "\n" in source else (source, source, "None")
    return folder, photo if time == "None" else f"{photo} at {float(time):.3f} s"


def _remove_empty(out: Path, folder: str) -> None:
    """Remove a unit's folder and its parents within `out` as long as they are empty."""
    path = out / folder
    while path != out:
        try:
            path.rmdir()
        except OSError:  # not empty, or never created
            return
        path = path.parent


@dataclass
class CuttingTotals:
    """Totals of a run, for its report."""

    units: int = 0
    already: int = 0
    crops: int = 0
    pixels: int = 0
    bad: int = 0  # units of which some or all could not be read or decoded
    rejects: Counter[str] = field(default_factory=Counter)
    # Pictures per colour profile other than sRGB.
    converted: Counter[str] = field(default_factory=Counter)
    # The first reasons for whole pictures (not single crops): damage, and final rejects.
    reasons: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    num_reasons: int = 0

    def count(self, unit: Unit, rejects: list[Reject], crops: int) -> None:
        """Add the result of a unit."""
        self.crops += crops
        self.units += crops > 0
        self.bad += any(reject.gate not in FINAL_GATES for reject in rejects)
        for reject in rejects:
            self.rejects[reject.gate] += 1
            if reject.top is not None:
                continue
            self.num_reasons += 1
            reasons = self.reasons[reject.gate in FINAL_GATES]
            if len(reasons) < NUM_SHOWN:
                at = f" at {reject.time:.3f} s" if reject.time is not None else ""
                reasons.append(f"{printable(unit.photo)}{at}: {reject.reason}")


class Clock:
    """Measures wall and CPU seconds since its creation."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def report(self, totals: CuttingTotals, out: Path, name: str) -> None:
        """Print what was done, how fast, and what was rejected; `name`: of one source."""
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        print(
            f"{counted(totals.units, name)} cut into {counted(totals.crops, 'crop')} in {out}; "
            f"already there: {counted(totals.already, name)}"
        )
        if totals.crops:
            megapixels = totals.pixels / 1e6
            print(
                f"{megapixels:.1f} megapixels in {wall:.1f} s: {totals.crops / wall:.0f} crops/s, "
                f"{megapixels / cpu:.1f} MPix and {totals.crops / cpu:.0f} crops per core-second"
            )
        if totals.converted:
            print(converted_note(totals.converted, name))
        if totals.rejects:
            counts = (
                f"{count} {GATE_WORDS.get(gate, gate)}"
                for gate, count in sorted(totals.rejects.items())
            )
            smaller = "; a smaller --size keeps small ones" if totals.rejects["size"] else ""
            print(f"rejected: {', '.join(counts)}; see {out / REJECTS} for what and why{smaller}")
        for line in [*totals.reasons[0], *totals.reasons[1]][:NUM_SHOWN]:
            print(f"rejected {line}")
        if totals.num_reasons > NUM_SHOWN:
            print(f"... and {totals.num_reasons - NUM_SHOWN} more in {out / REJECTS}")
