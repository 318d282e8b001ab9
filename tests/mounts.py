"""Small disks for tests, where mounting is permitted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(*arguments: object) -> Iterator[None]:
    """Run `mount` with `arguments`, the last of which is the folder, or skip the test."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(arguments[-1])], check=True)


@contextmanager
def small_disk(folder: Path, size: str = "2m") -> Iterator[Path]:
    """Make `folder` a disk of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with mounted("-t", "tmpfs", "-o", f"size={size}", "none", folder):
        yield folder


def fill(disk: Path, left: int) -> Path:
    """Fill a disk except for `left` bytes; return the file to remove."""
    ballast, found = disk / "ballast", os.statvfs(disk)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - left)
    return ballast
