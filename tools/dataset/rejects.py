"""What was rejected, counted by gate: rejects.jsonl of the cutting tools, quarantine/report.jsonl
of the check.

And what the training and the validation list name, as a set of keys: 8 bytes per line.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cli import UserError
from tools.crops.cutting import parse_reject
from tools.dataset.sampling import HashSample, KeySet, Tally, bytes_key

MEANINGS = {
    "size": "too small for one crop, or not of the size that was asked for",
    "decode": "could not be decoded or read",
    "file": "broken, cut short, or not what was written",
    "pair": "HR and LR that do not fit, or whose other side was rejected",
    "flat": "next to no detail: clear sky, a plain wall, black bars",
    "soft": "blurred, or enlarged from something smaller",
    "duplicate": "the same file as an earlier one",
    "near-duplicate": "nearly the same picture as an earlier one",
    "leak": "part of a benchmark that the network will be measured with",
}
QUARANTINE_REPORT = "report.jsonl"
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Example:
    """One thing that was rejected, and why."""

    name: str
    reason: str


@dataclass
class Rejects:
    """Counts by gate, and a few examples of each."""

    pictures: Tally = field(default_factory=Tally)  # photographs, frames, or one size of them
    crops: Tally = field(default_factory=Tally)
    gone: int = 0  # in the report of a quarantine, but no longer there: moved back or deleted
    examples: dict[str, HashSample[Example]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many were rejected."""
        return sum(self.pictures.values()) + sum(self.crops.values())

    def gates(self) -> list[str]:
        """The gates, the one that rejected most first."""
        names = {*self.pictures, *self.crops}
        return sorted(
            names, key=lambda gate: (-self.pictures.get(gate, 0) - self.crops.get(gate, 0), gate)
        )

    def add(self, gate: str, is_crop: bool, example: Example, seed: int) -> None:
        """Count one, and keep it as an example if the draw falls on it."""
        gate = (self.crops if is_crop else self.pictures).add(gate)
        self._keep(gate, example, seed)

    def merge(self, other: Rejects, seed: int) -> None:
        """Count what was counted elsewhere."""
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
    """Count the lines of a rejects.jsonl; names get `folder` before them. Torn and foreign lines do
    not count."""
    rejects = Rejects()
    for values in filter(None, map(parse_reject, _lines(path))):
        if values.get("cleaned"):
            continue  # it stands in the quarantine's report
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
    """Count what still lies in a quarantine, by its report."""
    rejects = Rejects()
    for values in filter(None, map(_parse_entry, _lines(quarantine / QUARANTINE_REPORT))):
        if os.path.lexists(quarantine.parent / values["moved_to"]):
            example = Example(posixpath.join(folder, values["path"]), values["reason"])
            rejects.add(str(values.get("gate") or "file"), False, example, seed)
        else:
            rejects.gone += 1
    return rejects


def _parse_entry(line: bytes) -> Mapping[str, str] | None:
    """A line of a quarantine's report, `None` where it is torn or foreign."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    is_ours = isinstance(values, dict) and all(
        type(values.get(name)) is str for name in ("path", "moved_to", "reason")
    )
    return values if is_ours and "\0" not in values["moved_to"] else None


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, none where it is missing."""
    try:
        with open(path, "rb") as file:
            yield from file
    except FileNotFoundError:
        return


@dataclass
class FileList:
    """A list that was read: which files it names, how many of them are on disk."""

    keys: KeySet = field(default_factory=KeySet)
    found: int = 0  # named files that are on disk; whoever looks there counts
    digest: bytes | None = (
        None  # SHA-256 of the file; `None` where it is not as select_training_files.py writes it
    )


def read_list(path: Path) -> FileList | None:
    """The list `path`, `None` where there is none. What is wrong with its lines training says, see
    `read_file_list`."""
    names, digest, last, is_ours = FileList(), hashlib.sha256(), b"", True
    try:
        with open(path, "rb") as file:
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
    """The hash that select_training_files.py printed; `None` where a list is missing or was changed
    by hand."""
    if (
        training is None
        or validation is None
        or training.digest is None
        or validation.digest is None
    ):
        return None
    return hashlib.sha256(training.digest + validation.digest).hexdigest()
