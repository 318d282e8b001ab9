"""The other side of HR and LR crops: neither can be trained on without it."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from tools.crops.manifest import ManifestIndex, iterate_records

_SIDE = re.compile(r"((?:f\d+_)?x\d+_\d+_\d+)(_lr\d+)?(\.\w+)")


def other_sides(root: Path, crops: ManifestIndex, manifests: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Other side -> name, for those of `names` (relative to `root`) that are a side of a pair.

    The manifests tell; of crops that no manifest knows, the names (`x1_000_000_lr4.npy` beside `x1_000_000.npy`). Only
    files that are there.
    """
    sides: dict[str, str] = {}
    lr_names: set[str] = set()
    listings: dict[str, list[str]] = {}
    for name in names:
        record = crops.get(name)
        if record is None:
            sides |= dict.fromkeys(_sides_by_name(root, name, listings), name)
        elif record.lr:
            sides[record.lr] = name
        elif record.role == "lr":
            lr_names.add(name)
    if lr_names:
        sides |= {record.path: record.lr for record in iterate_records(root, manifests) if record.lr in lr_names}
    return {other: name for other, name in sides.items() if os.path.lexists(root / other)}


def _sides_by_name(root: Path, name: str, listings: dict[str, list[str]]) -> list[str]:
    """The files beside `name` that are the other side of it; `listings` remembers folders that were looked into."""
    folder, base = posixpath.split(name)
    side = _SIDE.fullmatch(base)
    if side is None:
        return []
    if side[2]:
        return [posixpath.join(folder, f"{side[1]}{side[3]}")]
    if folder not in listings:
        listings[folder] = [entry for entry in os.listdir(root / folder) if "_lr" in entry]
    lr = re.compile(rf"{re.escape(side[1])}_lr\d+{re.escape(side[3])}")
    return [posixpath.join(folder, entry) for entry in listings[folder] if lr.fullmatch(entry)]
