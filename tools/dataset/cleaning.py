"""Move bad files of a dataset to its quarantine, or delete them.

Removed crops are recorded, so that the cutting tools do not make them again.
"""

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
from tools.dataset.judging import FileCheck

REPORT = "report.jsonl"
_LONGEST_LINE = 1 << 16  # bytes of a line that is compared with a new one


def check_can_clean(root: Path) -> None:
    """Raise `UserError`, before any file is checked, if files cannot be moved to the quarantine."""
    quarantine = root / QUARANTINE
    if os.path.lexists(quarantine) and not quarantine.is_dir():
        raise UserError(
            f"{quarantine}: not a folder, so bad files cannot be moved there; rename it"
        )
    folder = quarantine if quarantine.is_dir() else root
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder}: cannot be written, so bad files cannot be moved; fix its permissions or "
            "omit --clean"
        )


class Cleaner:
    """Context manager that removes bad files from a dataset.

    While it is open, no other run cleans the dataset and no tool writes crops to the folders
    concerned. An undamaged crop that a gate rejected gets a line in the rejects.jsonl beside its
    manifest, so that tools do not cut it again: a reject with `cleaned` and the crop's `path`.
    """

    def __init__(
        self,
        root: Path,
        manifests: Iterable[str],
        made_again: Iterable[str],
        bad: list[FileCheck],
        delete: bool,
    ) -> None:
        """`made_again`: bad files that may be cut again; `delete`: delete instead of moving.

        Raises `UserError` if a dataset is in use or cannot be written.
        """
        self._root, self._delete = root, delete
        self.taken = 0
        self.failed: list[tuple[str, str]] = []
        self._open_files = ExitStack()
        with ExitStack() as stack:
            self._records = _recorded(
                root, manifests, {check.path for check in bad}.difference(made_again)
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

    def take(self, check: FileCheck) -> None:
        """Remove one file; if it cannot be moved or deleted, add (path, reason) to `failed`."""
        try:
            self.taken += self._remove(check)
        except OSError as error:
            self.failed.append((check.path, error.strerror or str(error)))

    def _remove(self, check: FileCheck) -> bool:
        """Record the removal of a file, then move it to quarantine/<same path> or delete it.

        Every removed file is therefore known. A file that was recorded by a run which was killed
        before removing it is not recorded twice. Returns whether the file was still there.
        """
        target, added = None, []
        if self._report is not None:
            target = self._target(check.path)
            entry = {
                "path": check.path,
                "moved_to": target.relative_to(self._root).as_posix(),
                "reason": check.reason,
                "gate": check.gate,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            report = self._root / QUARANTINE / REPORT
            added += _add(self._report, json.dumps(entry) + "\n", report)
        if check.path in self._records:
            folder, record = self._records[check.path]
            line = _cleaned_line(record, check)
            added += _add(self._rejects[folder], line, self._root / folder / REJECTS)
        try:
            if target is None:
                os.unlink(self._root / check.path)
            else:
                os.rename(self._root / check.path, target)
        except OSError as error:
            for file, length in added:
                os.ftruncate(file.fileno(), length)
            if isinstance(error, FileNotFoundError):  # already removed by somebody else
                return False
            raise
        return True

    def _target(self, name: str) -> Path:
        """Return a free path in the quarantine; an earlier file with the same name is kept."""
        target, number = self._root / QUARANTINE / name, 1
        while os.path.lexists(target):
            number += 1
            target = (self._root / QUARANTINE / name).with_name(f"{Path(name).name}.{number}")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


def cleaned_away(root: Path, manifests: Iterable[str], crops: ManifestIndex) -> int:
    """Count listed crops that earlier runs removed on purpose; marks them as seen in `crops`."""
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
    """Map each of `names` that a manifest lists to (folder of the manifest, record)."""
    found: dict[str, tuple[str, CropRecord]] = {}
    for manifest in manifests if names else ():
        folder = posixpath.dirname(manifest)
        for _, record in iterate_lines(root / manifest):
            name = posixpath.join(folder, record.path)
            if name in names:
                found[name] = (folder, record)
    return found


def _cleaned_line(record: CropRecord, check: FileCheck) -> str:
    """Format the line of rejects.jsonl for a removed crop."""
    unit = Unit(
        posixpath.dirname(record.path), record.photo, record.photo_bytes, record.photo_mtime_ns
    )
    reject = Reject(check.gate, check.reason, record.scale, record.top, record.left, record.time)
    values = {
        **json.loads(reject_line(unit, reject, is_whole=False)),
        "path": record.path,
        "cleaned": True,
    }
    return json.dumps(values) + "\n"


def _open_rejects(folder: Path, stack: ExitStack) -> BinaryIO:
    """Open the rejects.jsonl of a dataset and lock the dataset until `stack` closes."""
    try:
        if (folder / SETTINGS).exists():
            settings = stack.enter_context(open(folder / SETTINGS, "r+b"))  # noqa: SIM115 - closed by stack
            fcntl.flock(settings, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _open_lines(folder / REJECTS, stack)
    except BlockingIOError:
        raise UserError(
            f"{folder}: a tool is writing there; wait for it or stop it, then clean again; "
            "nothing was changed"
        ) from None
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; fix its "
            "permissions; nothing was changed"
        ) from error


def _open_report(quarantine: Path, stack: ExitStack) -> BinaryIO:
    """Open the report of a quarantine and lock it until `stack` closes."""
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
    """Open a file to append lines to."""
    file = stack.enter_context(open(path, "a+b"))  # noqa: SIM115 - closed by the stack
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":  # a killed run left an incomplete line
            file.write(b"\n")
            file.flush()
    return file


def _add(file: BinaryIO, line: str, path: Path) -> list[tuple[BinaryIO, int]]:
    """Append a line, unless the last line says the same at another time.

    Returns the file with its length before, to undo it; nothing if there is nothing to undo.
    """
    length = os.fstat(file.fileno()).st_size
    start = max(0, length - _LONGEST_LINE)
    last = os.pread(file.fileno(), length - start, start).splitlines()[-1:]
    if last and _timeless(last[0]) == _timeless(line.encode()):
        return []
    _append(file, line, path)
    return [(file, length)]


def _timeless(line: bytes) -> object:
    """Return the values of a line without its time; the line itself if it is damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return line
    return {**values, "time": None} if isinstance(values, dict) else line


def _append(file: BinaryIO, line: str, path: Path) -> None:
    try:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; free disk space, then run the same "
            "command again; it continues where it stopped"
        ) from error
