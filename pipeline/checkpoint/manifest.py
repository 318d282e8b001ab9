"""MANIFEST.json lists a checkpoint's files with sizes and SHA-256; check a checkpoint against it.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.run_folder import MANIFEST_FILE, checkpoint_dir

BLOCK = 1 << 20  # bytes


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Return relative path -> `{"size": bytes, "sha256": hex}` for every file in `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
    }


def read_manifest(run_dir: Path, step: int) -> dict[str, Any]:
    """Return a checkpoint's manifest: `step`, `world_size`, `identity`, `files` (`describe`)."""
    return json.loads((checkpoint_dir(run_dir, step) / MANIFEST_FILE).read_text())


def damage(folder: Path) -> str:
    """Return what is wrong with the checkpoint `folder`; empty if all files match its manifest.

    A disk that cannot be read is not damage: its `OSError` is raised.
    """
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        for name, expected in files.items():
            path = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST_FILE}: {name} is outside the checkpoint"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE}: {error or type(error).__name__}"
    return ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
