"""Damage a checkpoint as disks, copies and people do, at random. Imports no torch."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.checkpoint_index import MANIFEST_FILE
from pipeline.run_folder import STATE_FILE


def mutate(folder: Path, previous: Path, draw: random.Random) -> str:
    """Damage the checkpoint in `folder` in one way, and return a description.

    `previous`: an earlier checkpoint of the same run, parts of which may take the place of parts of
    this one. The content is never the same as before.
    """
    if draw.random() < 0.1:
        return draw.choice(FOLDER_WAYS)(folder, previous, draw)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    # Every third time the index, which is small and on which everything depends.
    path = folder / MANIFEST_FILE if draw.random() < 1 / 3 else draw.choice(paths)
    name, before = path.relative_to(folder), path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.4:
        content, what = _edit(before, draw), "edit"
    else:
        what = draw.choice(tuple(FILE_WAYS))
        content = FILE_WAYS[what](bytearray(before), draw)
    if content == before:
        content, what = _flip(bytearray(before), draw), "flip"
    path.write_bytes(content)
    return f"{what}: {name}"


# --- One file ---


def _flip(content: bytearray, draw: random.Random) -> bytes:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def _flip_some(content: bytearray, draw: random.Random) -> bytes:
    for place in draw.sample(range(len(content)), min(len(content), draw.randint(2, 50))):
        content[place] ^= 1 << draw.randrange(8)
    return bytes(content)


def _truncate(content: bytearray, draw: random.Random) -> bytes:
    return bytes(content[: draw.randrange(len(content))])


def _cut_out(content: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    del content[start : start + draw.randint(1, 64)]
    return bytes(content)


def _grow(content: bytearray, draw: random.Random) -> bytes:
    place = draw.choice((len(content), draw.randrange(len(content))))
    content[place:place] = draw.randbytes(draw.randint(1, 64))
    return bytes(content)


def _zero(content: bytearray, draw: random.Random) -> bytes:
    """A block of zeros, as a file system leaves after a power cut."""
    size = draw.choice((64, 512, 4096, len(content)))
    start = draw.randrange(len(content)) // size * size
    content[start : start + size] = bytes(len(content[start : start + size]))
    return bytes(content)


def _scramble(content: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    content[start : start + 64] = draw.randbytes(len(content[start : start + 64]))
    return bytes(content)


FILE_WAYS: dict[str, Callable[[bytearray, random.Random], bytes]] = {
    "flip": _flip,
    "flip some": _flip_some,
    "truncate": _truncate,
    "empty": lambda *_: b"",
    "cut out": _cut_out,
    "grow": _grow,
    "zero": _zero,
    "scramble": _scramble,
}


def _edit(content: bytes, draw: random.Random) -> bytes:
    """Change one value of a JSON file, or put other JSON in its place, and keep it readable."""
    if draw.random() < 0.2:
        other = draw.choice(("null", "[]", "{}", '"x"', "1e999", "[" * 20_000, "9" * 5_000, "NaN"))
        return other.encode()
    values: Any = json.loads(content)
    place = values
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.8):
            break
        place = place[key]
    if draw.random() < 0.4:
        del place[key]
    else:
        old = place[key]
        other = [None, [], {}, "x", -1, 1e300, True, old + 1 if isinstance(old, int) else 0]
        place[key] = draw.choice([value for value in other if value != old])
    return (json.dumps(values, indent=1) + "\n").encode()


# --- Several files ---


def _delete(folder: Path, previous: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(folder.rglob("*")))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return f"delete: {path.relative_to(folder)}"


def _swap(folder: Path, previous: Path, draw: random.Random) -> str:
    one, other = draw.sample(sorted(path for path in folder.rglob("*") if path.is_file()), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"swap: {one.relative_to(folder)} and {other.relative_to(folder)}"


def _mix(folder: Path, previous: Path, draw: random.Random) -> str:
    """Take one file from the previous checkpoint: of the same name and, often, of the same size."""
    names = [path.relative_to(previous) for path in previous.rglob("*") if path.is_file()]
    changed = [n for n in sorted(names) if (previous / n).read_bytes() != (folder / n).read_bytes()]
    name = draw.choice([*changed, Path(MANIFEST_FILE), Path(STATE_FILE)])
    shutil.copyfile(previous / name, folder / name)
    return f"of another step: {name}"


def _replace(folder: Path, previous: Path, draw: random.Random) -> str:
    shutil.rmtree(folder)
    shutil.copytree(previous, folder)
    return "of another step: everything"


def _become_folder(folder: Path, previous: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    path.unlink()
    path.mkdir()
    return f"a folder: {path.relative_to(folder)}"


FOLDER_WAYS = (_delete, _delete, _swap, _mix, _mix, _replace, _become_folder)
