"""A checkpoint's index, MANIFEST.json: its files with sizes and SHA-256, and what run it is of.

The index ends with the SHA-256 of its own text, so that every changed bit of a checkpoint is found.
Indexes of earlier versions have no such line. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.files import file_sha256, write_atomically

MANIFEST_FILE = "MANIFEST.json"
KEYS = {"step": int, "world_size": int, "identity": dict, "files": dict}
RUN_KEYS = {"recipe": dict, "ds_config": dict, "dataset": dict, "precision": str}
"""What the identity of a run has held since the first version."""
_SEALED = re.compile(rb'(.*),\n "sha256": "([0-9a-f]{64})"\n}\n', re.DOTALL)


class DamagedError(ValueError):
    """A checkpoint's index is missing or not what was written; the message says how."""


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Return relative path -> `{"size": bytes, "sha256": hex}` for every file but the index."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in sorted(names - {MANIFEST_FILE})
    }


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write a checkpoint's index: `KEYS`, and whatever else it should hold; a reader sees all of it
    or the one before."""
    text = json.dumps({key: index[key] for key in index if key != "sha256"}, indent=1)
    body = text.removesuffix("\n}")
    seal = hashlib.sha256(body.encode()).hexdigest()
    write_atomically(folder / MANIFEST_FILE, f'{body},\n "sha256": "{seal}"\n}}\n'.encode())


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of the checkpoint in `folder`, with at least `KEYS`.

    Raises `DamagedError` if it is not what was written, or was written for another step; `OSError`
    if the disk cannot be read.
    """
    try:
        content = (folder / MANIFEST_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{MANIFEST_FILE} is missing") from None
    except IsADirectoryError:
        raise DamagedError(f"{MANIFEST_FILE} is a folder") from None
    sealed = _SEALED.fullmatch(content)
    if sealed and hashlib.sha256(sealed[1]).hexdigest().encode() != sealed[2]:
        raise DamagedError(f"{MANIFEST_FILE} has changed since it was written")
    try:
        index = json.loads(content.decode())
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or thousands of brackets
        raise DamagedError(f"{MANIFEST_FILE} is not JSON") from None
    # Without its hash, an index is one of an earlier version, which had these keys and no other:
    # one that lost its hash, or the name of it, is not mistaken for that.
    if (
        not isinstance(index, dict)
        or not _has(index, KEYS)
        or not (sealed or (index.keys() == KEYS.keys() and _has(index["identity"], RUN_KEYS)))
    ):
        raise DamagedError(f"{MANIFEST_FILE} is not a checkpoint's index")
    for name, expected in index["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise DamagedError(f"{MANIFEST_FILE}: {name!r} is outside the checkpoint")
        if not isinstance(expected, dict) or not _has(expected, {"size": int, "sha256": str}):
            raise DamagedError(f"{MANIFEST_FILE} is not a checkpoint's index")
    named = re.search(r"step-(\d{8,})$", folder.name)
    if named and int(named[1]) != index["step"]:
        raise DamagedError(f"{MANIFEST_FILE} is that of step {index['step']}")
    return index


def damage(folder: Path, names: Collection[str] | None = None) -> str:
    """Return what is wrong with the checkpoint in `folder`; empty if its files match its index.

    `names`: check only these of the files that the index lists, and the index itself. A disk that
    cannot be read is not damage: its `OSError` is raised.
    """
    try:
        files = read_index(folder)["files"]
    except DamagedError as error:
        return str(error)
    for name, expected in files.items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if not os.path.isfile(path):  # unlike Path.is_file, also False for a name that is too long
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
        if file_sha256(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return ""


def _has(values: Mapping[str, Any], types: Mapping[str, type]) -> bool:
    """Whether `values` has these keys with values of exactly these types (True is no int)."""
    return all(type(values.get(key)) is kind for key, kind in types.items())
