"""Count rejects by gate, and read the file lists.

Rejects come from rejects.jsonl (cutting tools) and quarantine/report.jsonl (checks). The lists are
read as sets of keys with 8 bytes per line.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cli import UserError
from pipeline.files import open_regular_file, parse_json
from tools.crops.cutting import parse_reject
from tools.dataset.sampling import HashSample, KeySet, Tally, bytes_key

MEANINGS = {
    "size": "too small for one crop, or not of the requested size",
    "decode": "could not be decoded or read",
    "file": "broken, truncated, or changed since it was written",
    "pair": "HR and LR that do not match, or whose other side was rejected",
    "flat": "almost no detail: clear sky, a plain wall, black bars",
    "soft": "blurred, or enlarged from something smaller",
    "duplicate": "the same file as an earlier one",
    "near-duplicate": "nearly the same picture as an earlier one",
    "leak": "part of a benchmark that the network will be evaluated with",
}
QUARANTINE_REPORT = "report.jsonl"
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Example:
    """A reject and its reason."""

    name: str
    reason: str


@dataclass
class Rejects:
    """Counts per gate, with a few examples of each."""

    pictures: Tally = field(default_factory=Tally)  # photographs, frames, or one size of them
    crops: Tally = field(default_factory=Tally)
    gone: int = 0  # listed in the report of a quarantine, but moved back or deleted since
    examples: dict[str, HashSample[Example]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of rejects."""
        return sum(self.pictures.values()) + sum(self.crops.values())

    def gates(self) -> list[str]:
        """Gates, sorted by the number of rejects, highest first."""
        names = {*self.pictures, *self.crops}
        return sorted(
            names, key=lambda gate: (-self.pictures.get(gate, 0) - self.crops.get(gate, 0), gate)
        )

    def add(self, gate: str, is_crop: bool, example: Example, seed: int) -> None:
        """Count a reject, and add it to the sample of examples."""
        gate = (self.crops if is_crop else self.pictures).add(gate)
        self._keep(gate, example, seed)

    def merge(self, other: Rejects, seed: int) -> None:
        """Add the counts and examples of `other`."""
        self.pictures.merge(other.pictures)
        self.crops.merge(other.crops)
        self.gone += other.gone
        for gate, examples in other.examples.items():
            for example in examples:
                self._keep(gate, example, seed)

    def _keep(self, gate: str, example: Example, seed: int) -> None:
        samples = self.examples.setdefault(gate, HashSample(_NUM_EXAMPLES, seed))
        samples.add(f"{example.name}\0{example.reason}", example)


def read_rejects(path: Path, folder: str, seed: int) -> Rejects:
    """Count the lines of a rejects.jsonl; torn and foreign lines are ignored.

    `folder` is prepended to the names.
    """
    rejects = Rejects()
    for values in filter(None, map(parse_reject, _lines(path))):
        if values.get("cleaned"):
            continue  # it is in the quarantine's report
        name = posixpath.join(folder, values["photo"])
        if values.get("time") is not None:
            name += f" at {values['time']} s"
        if values.get("scale") is not None:
            name += f", 1/{values['scale']}"
        if values.get("top") is not None:
            name += f", crop at ({values['top']}, {values.get('left')})"
        rejects.add(
            values["gate"], values.get("top") is not None, Example(name, values["reason"]), seed
        )
    return rejects


def read_quarantine(quarantine: Path, folder: str, seed: int) -> Rejects:
    """Count the files that are still in a quarantine, by its report."""
    rejects = Rejects()
    for values in filter(None, map(_parse_entry, _lines(quarantine / QUARANTINE_REPORT))):
        if os.path.lexists(quarantine.parent / values["moved_to"]):
            example = Example(posixpath.join(folder, values["path"]), values["reason"])
            rejects.add(str(values.get("gate") or "file"), False, example, seed)
        else:
            rejects.gone += 1
    return rejects


def _parse_entry(line: bytes) -> Mapping[str, str] | None:
    """Parse a line of a quarantine's report; `None` if it is torn or foreign."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    is_ours = isinstance(values, dict) and all(
        type(values.get(name)) is str for name in ("path", "moved_to", "reason")
    )
    return values if is_ours and "\0" not in values["moved_to"] else None


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a file; none if it is missing."""
    try:
        with open_regular_file(path) as file:
            yield from file
    except FileNotFoundError:
        return


@dataclass
class FileList:
    """Contents of a file list: the files it names, and how many of them exist."""

    keys: KeySet = field(default_factory=KeySet)
    found: int = 0  # named files that exist on disk; counted by the caller
    # SHA-256 of the file; `None` if select_training_files.py did not write it.
    digest: bytes | None = None


def read_list(path: Path) -> FileList | None:
    """Read the list `path`; `None` if it does not exist.

    Bad lines are reported by training, see `read_file_list`. Raises `UserError` if the list cannot
    be read.
    """
    names, digest, last, is_ours = FileList(), hashlib.sha256(), b"", True
    try:
        with open_regular_file(path) as file:
            for line in file:
                digest.update(line)
                name = line.rstrip(b"\r\n")
                is_ours &= line == name + b"\n" and last < name
                last = name
                if name:
                    names.keys.add(bytes_key(name))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); write the lists with "
            "`python tools/select_training_files.py`"
        ) from None
    names.digest = digest.digest() if is_ours else None
    return names


def hash_of_lists(training: FileList | None, validation: FileList | None) -> str | None:
    """Return the hash that select_training_files.py printed.

    `None` if a list is missing or was changed by hand.
    """
    if (
        training is None
        or validation is None
        or training.digest is None
        or validation.digest is None
    ):
        return None
    return hashlib.sha256(training.digest + validation.digest).hexdigest()
