"""Taking bad files out of a dataset: to its quarantine or for good, and so that cutting tools know
of it."""

from __future__ import annotations

import fcntl
import json
import os
import posixpath
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from pipeline.cli import UserError
from pipeline.data.image_files import QUARANTINE
from tools.crops.cutting import REJECTS, SETTINGS, Reject, Unit, parse_reject, reject_line
from tools.crops.manifest import CropRecord, ManifestIndex, iterate_lines
from tools.dataset.judging import Judgement

REPORT = "report.jsonl"


def check_can_clean(root: Path) -> None:
    """Raise `UserError`, before anything is judged, where there can be no quarantine."""
    quarantine = root / QUARANTINE
    if os.path.lexists(quarantine) and not quarantine.is_dir():
        raise UserError(
            f"{quarantine}: not a folder, so bad files cannot be moved there; rename it"
        )
    folder = quarantine if quarantine.is_dir() else root
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder}: cannot be written, so bad files cannot be moved; repair its permissions, "
            "or leave "
            "--clean away"
        )


class Cleaner:
    """Takes bad files away. A context: while it is open, no other run cleans, and no tool cuts what
    it writes about.

    Crops that are whole and yet bad would be made again by the tool that made them. Of each, a line
    in the rejects.jsonl beside their manifest tells it not to: that of a reject, with `cleaned` and
    the crop's `path`.
    """

    def __init__(
        self,
        root: Path,
        manifests: Iterable[str],
        made_again: Iterable[str],
        bad: list[Judgement],
        delete: bool,
    ) -> None:
        """`made_again` are the bad files that are to be made again; `delete`: for good. `UserError`
        if it cannot be."""
        self._root, self._delete = root, delete
        self.taken = 0
        self.failed: list[tuple[str, str]] = []
        self._open_files = ExitStack()
        with ExitStack() as stack:
            self._records = _recorded(
                root, manifests, {judgement.path for judgement in bad}.difference(made_again)
            )
            self._rejects = {
                folder: _open_rejects(root / folder, stack)
                for folder in sorted({folder for folder, _ in self._records.values()})
            }
            self._report = None if delete else _open_report(root / QUARANTINE, stack)
            self._open_files = stack.pop_all()

    def __enter__(self) -> Cleaner:
        return self

    def __exit__(self, *error: object) -> None:
        self._open_files.close()

    def take(self, judgement: Judgement) -> None:
        """Take one file away. What cannot be moved or deleted is added to `failed`: (path,
        reason)."""
        try:
            is_taken = self._unlink(judgement) if self._delete else self._quarantine(judgement)
        except OSError as error:
            self.failed.append((judgement.path, error.strerror or str(error)))
            return
        self.taken += is_taken
        if is_taken and judgement.path in self._records:
            folder, record = self._records[judgement.path]
            _append(
                self._rejects[folder],
                _cleaned_line(record, judgement),
                self._root / folder / REJECTS,
            )

    def _unlink(self, judgement: Judgement) -> bool:
        try:
            os.unlink(self._root / judgement.path)
        except FileNotFoundError:  # somebody else has taken it away
            return False
        return True

    def _quarantine(self, judgement: Judgement) -> bool:
        """Move a file to quarantine/<same path>, the report first: what was moved is always
        known."""
        root, quarantine = self._root, self._root / QUARANTINE
        target, number = quarantine / judgement.path, 1
        while os.path.lexists(target):  # an earlier file of that name: keep both
            number += 1
            target = (quarantine / judgement.path).with_name(
                f"{Path(judgement.path).name}.{number}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        entry = {
            "path": judgement.path,
            "moved_to": target.relative_to(root).as_posix(),
            "reason": judgement.reason,
            "gate": judgement.gate,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        length = os.fstat(self._report.fileno()).st_size
        _append(self._report, json.dumps(entry) + "\n", quarantine / REPORT)
        try:
            os.rename(root / judgement.path, target)
        except OSError as error:
            os.ftruncate(self._report.fileno(), length)
            if isinstance(error, FileNotFoundError):  # somebody else has taken it away
                return False
            raise
        return True


def cleaned_away(root: Path, manifests: Iterable[str], crops: ManifestIndex) -> int:
    """How many crops of the manifests an earlier run took away for good; `crops` takes them for
    found."""
    names: set[str] = set()
    for manifest in manifests:
        folder = posixpath.dirname(manifest)
        try:
            with open(root / folder / REJECTS, "rb") as lines:
                for values in filter(None, map(parse_reject, lines)):
                    path = values.get("path")
                    if values.get("cleaned") and isinstance(path, str) and "\0" not in path:
                        names.add(posixpath.join(folder, path))
        except FileNotFoundError:
            continue
    return sum(not os.path.lexists(root / name) and crops.get(name) is not None for name in names)


def _recorded(
    root: Path, manifests: Iterable[str], names: set[str]
) -> dict[str, tuple[str, CropRecord]]:
    """Name -> (folder of its manifest, record as it stands there), for those that a manifest
    knows."""
    found: dict[str, tuple[str, CropRecord]] = {}
    for manifest in manifests if names else ():
        folder = posixpath.dirname(manifest)
        for _, record in iterate_lines(root / manifest):
            name = posixpath.join(folder, record.path)
            if name in names:
                found[name] = (folder, record)
    return found


def _cleaned_line(record: CropRecord, judgement: Judgement) -> str:
    """The line of rejects.jsonl for a crop that was taken away."""
    unit = Unit(
        posixpath.dirname(record.path), record.photo, record.photo_bytes, record.photo_mtime_ns
    )
    reject = Reject(
        judgement.gate, judgement.reason, record.scale, record.top, record.left, record.time
    )
    values = {
        **json.loads(reject_line(unit, reject, is_whole=False)),
        "path": record.path,
        "cleaned": True,
    }
    return json.dumps(values) + "\n"


def _open_rejects(folder: Path, stack: ExitStack) -> BinaryIO:
    """The rejects.jsonl of a dataset that no tool is writing to, until `stack` closes."""
    try:
        if (folder / SETTINGS).exists():
            settings = stack.enter_context(open(folder / SETTINGS, "r+b"))  # noqa: SIM115 - the stack closes it
            fcntl.flock(settings, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _open_lines(folder / REJECTS, stack)
    except BlockingIOError:
        raise UserError(
            f"{folder}: a tool is writing there; wait for it or stop it, then clean; nothing was "
            "changed"
        ) from None
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; repair its "
            "permissions; "
            "nothing was changed"
        ) from error


def _open_report(quarantine: Path, stack: ExitStack) -> BinaryIO:
    """The report of a quarantine that no other run is using, until `stack` closes."""
    try:
        quarantine.mkdir(exist_ok=True)
        report = _open_lines(quarantine / REPORT, stack)
        fcntl.flock(report, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{quarantine}: another run of check_training_data.py --clean is moving files there; "
            "wait for "
            "it; nothing was changed"
        ) from None
    except OSError as error:
        raise UserError(
            f"{quarantine}: bad files cannot be moved there: {error.strerror}; nothing was changed"
        ) from error
    return report


def _open_lines(path: Path, stack: ExitStack) -> BinaryIO:
    """A file of lines to append to."""
    file = stack.enter_context(open(path, "a+b"))  # noqa: SIM115 - the stack closes it
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":  # a run that was killed left half a line
            file.write(b"\n")
            file.flush()
    return file


def _append(file: BinaryIO, line: str, path: Path) -> None:
    try:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; make room, then run the same command "
            "again: it "
            "goes on where it stopped"
        ) from error
