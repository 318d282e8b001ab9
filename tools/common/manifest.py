"""manifest.jsonl: which crop came from which photograph, one JSON object a line, a photo's crops one after another."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.cli import UserError
from pipeline.data.image_files import MANIFEST


@dataclass(frozen=True)
class CropRecord:
    """One crop. Paths are POSIX paths: `path` relative to the manifest's folder, `photo` to the photographs' folder."""

    path: str
    photo: str
    scale: int           # the photograph was reduced this many times before cropping: 1, 2, 4...
    top: int             # upper left corner, in pixels of the reduced photograph
    left: int
    size: int            # both sides, in pixels
    bytes: int           # size of the crop's file
    sha256: str          # of the pixels: uint8 RGB, rows from the top
    photo_bytes: int     # size and modification time of the photograph's file, to notice that it changed
    photo_mtime_ns: int
    photo_crops: int     # how many crops the photograph has in all, to notice that some are missing


_KINDS = {field.name: str if field.type == "str" else int for field in fields(CropRecord)}


def parse_line(line: str) -> CropRecord | None:
    """The crop that a line of a manifest describes, or `None` where the line is torn or foreign."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or values.keys() != _KINDS.keys():
        return None
    return CropRecord(**values) if all(type(values[name]) is kind for name, kind in _KINDS.items()) else None


def format_lines(records: Iterable[CropRecord]) -> str:
    """The lines of `records` as a manifest holds them."""
    return "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)


def read_manifests(root: Path, manifests: Iterable[str]) -> dict[str, CropRecord]:
    """Crop path relative to `root` -> its record, of all `manifests` (paths relative to `root`).

    A torn last line (a run that was killed, or goes on right now) does not count; other broken lines are a `UserError`.
    The records' `photo` is made relative to `root` too, so that it names one photograph among all sources.
    """
    crops = {}
    for name in sorted(manifests):
        folder = posixpath.dirname(name)
        lines = (root / name).read_text("utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, 1):
            record = parse_line(line)
            if record is not None:
                photo = posixpath.join(folder, record.photo)
                crops[posixpath.join(folder, record.path)] = CropRecord(**{**asdict(record), "photo": photo})
            elif line and number < len(lines):
                raise UserError(f"{root / name}, line {number}: not a line of a {MANIFEST}; run images_to_data.py with "
                                "the same arguments again, it mends the file")
    return crops
