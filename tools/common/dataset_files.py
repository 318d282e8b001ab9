"""The files beside the crops of a dataset: what they are called, and the lines of rejects.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from tools.crops.cutting import Reject, Unit
from tools.files import shown as shown

SETTINGS = "dataset.json"
REJECTS = "rejects.jsonl"
# Decided by the settings, the source and (for copies) a twin: no second look unless one of them changes. The others,
# that is damage, may be mended.
FINAL_GATES = frozenset({"size", "flat", "soft", "duplicate", "near-duplicate", "leak"})


def reject_line(unit: Unit, reject: Reject, is_whole: bool) -> str:
    values = {"photo": unit.photo, "folder": unit.folder, **asdict(reject), "photo_bytes": unit.bytes,
              "photo_mtime_ns": unit.mtime_ns, "whole": is_whole}
    return json.dumps({name: value for name, value in values.items() if value is not None}, ensure_ascii=False) + "\n"


def parse_reject(line: bytes | str) -> dict | None:
    """A line of rejects.jsonl, or `None` where it is torn or foreign."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    needed = {"photo": str, "folder": str, "gate": str, "reason": str, "photo_bytes": int, "photo_mtime_ns": int,
              "whole": bool}
    is_ours = isinstance(values, dict) and all(type(values.get(name)) is kind for name, kind in needed.items())
    return values if is_ours else None


def reject_groups(lines: Iterable[bytes]) -> Iterator[tuple[str, list[dict]]]:
    """The rejects of each unit, in their order in the file."""
    group: list[dict] = []
    for values in filter(None, map(parse_reject, lines)):
        if group and values["folder"] != group[0]["folder"]:
            yield group[0]["folder"], group
            group = []
        group.append(values)
    if group:
        yield group[0]["folder"], group
