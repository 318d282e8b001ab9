"""manifest.jsonl: the source of each crop, one JSON object per line, grouped by folder."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from pipeline.cli import UserError
from pipeline.data.image_files import MANIFEST
from pipeline.files import parse_json


@dataclass(frozen=True, slots=True)
class CropRecord:
    """One crop. Paths are POSIX paths: `path` and `lr` relative to the manifest's folder."""

    path: str
    # The source it was cut from (a photo, a video...); training and validation are split by it.
    photo: str
    scale: int  # the picture was reduced by this factor before cropping: 1, 2, 4...
    top: int  # top-left corner, in pixels of the reduced picture
    left: int
    size: int  # height and width, in pixels
    bytes: int  # size of the crop's file
    sha256: str  # hash of the pixels: uint8 RGB, rows from the top
    decoder: str  # decoder of the source, with its version
    gates: Mapping[str, float | str]  # measures of the quality gates, see quality.py
    photo_bytes: int  # size and modification time of the source file, to detect changes
    photo_mtime_ns: int
    folder_crops: int  # number of crops in its folder, to detect missing ones
    time: float | None = field(default=None)  # time of the frame in its video, in seconds
    lr: str | None = field(default=None)  # the matching LR crop, in paired datasets
    role: str = "hr"  # "lr": the LR side of a pair, which no list names and no gate judges


_REQUIRED = {
    name: {"str": str, "int": int}.get(kind, dict)
    for name, kind in ((entry.name, entry.type) for entry in fields(CropRecord))
    if name not in ("time", "lr", "role")
}
_OPTIONAL = {"time": (int, float), "lr": (str,), "role": (str,)}
_LARGEST = 1 << 62  # bytes, pixels and ns; NumPy's and the tools' counters hold 64 bits
_HASHES = {"hash": 32, "source_hash": 32, "source_sha256": 32}  # name of a gate -> bytes
_MEASURES = ("gradient", "sharpness", "source_sharpness", "entropy")


def parse_line(line: str | bytes) -> CropRecord | None:
    """Parse a line of a manifest; `None` if it is torn or foreign."""
    try:
        values = parse_json(line)
    except ValueError:  # includes UnicodeDecodeError
        return None
    if (
        not isinstance(values, dict)
        or not _REQUIRED.keys() <= values.keys() <= _REQUIRED.keys() | _OPTIONAL.keys()
    ):
        return None
    if not all(type(values[name]) is kind for name, kind in _REQUIRED.items()):
        return None
    if not all(type(values[name]) in _OPTIONAL[name] for name in values.keys() - _REQUIRED.keys()):
        return None
    if not (_is_inside(values["path"]) and _is_inside(values.get("lr", "lr"))):
        return None
    numbers = [value for value in values.values() if isinstance(value, (int, float))]
    if not all(-_LARGEST <= number <= _LARGEST for number in numbers):
        return None
    return CropRecord(**values) if _are_gates(values["gates"]) else None


def _are_gates(gates: Mapping[str, object]) -> bool:
    """Whether measures and hashes are ones that quality.py could have made."""
    for name, value in gates.items():
        if name in _HASHES:
            is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]*", value)
            if not is_hash or len(value) not in (0, 2 * _HASHES[name]):
                return False
        elif name in _MEASURES and (
            type(value) not in (int, float) or not -_LARGEST <= value <= _LARGEST
        ):
            return False
    return True


def _is_inside(path: str) -> bool:
    """Whether a relative path stays inside its folder.

    Files with these names are read and deleted, so a manifest must not point elsewhere.
    """
    return (
        bool(path) and not path.startswith("/") and "\0" not in path and ".." not in path.split("/")
    )


def format_line(record: CropRecord) -> str:
    """Format `record` as a line of a manifest."""
    values = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    values = {
        name: value
        for name, value in values.items()
        if value is not None and (name, value) != ("role", "hr")
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


def format_lines(records: Iterable[CropRecord]) -> str:
    """Format `records` as lines of a manifest."""
    return "".join(map(format_line, records))


def iterate_lines(path: Path) -> Iterator[tuple[int, CropRecord]]:
    """Yield (byte offset, record) for each line of a manifest.

    A torn last line (of a run that was killed or is still writing) is ignored. Raises `UserError`
    for any other broken line.
    """
    offset, torn = 0, None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if torn is not None:
                break
            record = parse_line(line) if line.endswith(b"\n") else None
            if record is not None:
                yield offset, record
            elif line.strip():
                torn = number
            offset += len(line)
        else:
            return
    raise UserError(
        f"{path}, line {torn}: not a line of a {MANIFEST}; rerun the tool that made the "
        "dataset with the same arguments to repair the file"
    )


def iterate_records(root: Path, manifests: Iterable[str]) -> Iterator[CropRecord]:
    """Yield all records of `manifests` (paths relative to `root`).

    Their `path`, `photo` and `lr` are made relative to `root`.
    """
    for name in sorted(manifests):
        folder = posixpath.dirname(name)
        for _, record in iterate_lines(root / name):
            yield _below(folder, record)


def _below(folder: str, record: CropRecord) -> CropRecord:
    if not folder:
        return record
    return replace(
        record,
        path=posixpath.join(folder, record.path),
        photo=posixpath.join(folder, record.photo),
        lr=record.lr and posixpath.join(folder, record.lr),
    )


class DatasetHash:
    """Order-independent hash of a whole dataset: of every crop's path and pixels.

    Two nodes that print the same hash hold the same dataset. The crops' SHA-256 are summed, so a
    million crops need neither sorting nor memory.
    """

    def __init__(self) -> None:
        self.count, self._sum = 0, 0

    def add(self, path: str, sha256: str) -> None:
        """Add one crop."""
        digest = hashlib.sha256(f"{path}\0{sha256}".encode("utf-8", "surrogatepass")).digest()
        self._sum = (self._sum + int.from_bytes(digest, "big")) % 2**256
        self.count += 1

    def remove(self, path: str, sha256: str) -> None:
        """Remove one crop that was added."""
        other = DatasetHash()
        other.add(path, sha256)
        self._sum = (self._sum - other._sum) % 2**256
        self.count -= 1

    def hexdigest(self) -> str:
        """The hash as 64 hexadecimal digits."""
        return hashlib.sha256(f"{self.count} {self._sum:064x}".encode()).hexdigest()


class ManifestIndex:
    """Looks up the records of many manifests by path; needs 16 bytes of memory per crop."""

    def __init__(self, root: Path, manifests: Iterable[str]) -> None:
        self._root, self._files, self._folders = root, [], []
        keys, places = array("Q"), array("Q")
        for number, name in enumerate(sorted(manifests)):
            self._folders.append(posixpath.dirname(name))
            self._files.append(open(root / name, "rb"))  # noqa: SIM115 - closed by close()
            for offset, record in iterate_lines(root / name):
                keys.append(_key(posixpath.join(self._folders[-1], record.path)))
                places.append(number << 48 | offset)
        unsorted = np.frombuffer(keys, np.uint64)
        order = np.argsort(unsorted, kind="stable")
        self._keys, self._places = unsorted[order], np.frombuffer(places, np.uint64)[order]
        self._seen = np.zeros(len(order), bool)

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, path: str) -> CropRecord | None:
        """Return the record of `path` (relative to the root); `None` if no manifest lists it."""
        key = np.uint64(_key(path))
        at = int(np.searchsorted(self._keys, key))
        while at < len(self._keys) and self._keys[at] == key:
            number, offset = int(self._places[at]) >> 48, int(self._places[at]) & (1 << 48) - 1
            record = parse_line(_line_at(self._files[number].fileno(), offset))
            if record is not None:
                record = _below(self._folders[number], record)
                if record.path == path:
                    self._seen[at] = True
                    return record
            at += 1
        return None

    def missing(self) -> int:
        """Number of listed crops that were never looked up, because their files are missing."""
        return int(len(self._seen) - self._seen.sum())

    def close(self) -> None:
        """Close the manifests."""
        for file in self._files:
            file.close()


def _key(path: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def _line_at(descriptor: int, offset: int) -> bytes:
    """Read the line at byte `offset`; uses `pread` because many threads share the file."""
    line = b""
    while True:
        part = os.pread(descriptor, 4096, offset + len(line))
        line += part
        end = line.find(b"\n")
        if end >= 0 or not part:
            return line[:end] if end >= 0 else line
