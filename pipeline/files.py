"""Atomic writes, and paths as people write them. Needs no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace the file `path` by `content`: a reader or a power cut finds the old or the new one,
    never a mixture."""
    write_pieces_atomically(path, [content])


def write_pieces_atomically(
    path: str | os.PathLike[str], pieces: Iterable[bytes | memoryview]
) -> None:
    """As `write_atomically`, of content that comes piece after piece and is never in memory as a
    whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)  # the rename itself lives in the folder


def flush(path: str | os.PathLike[str]) -> None:
    """Make what was written to a file, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def short_path(path: Path) -> str:
    """A path as a person would write it."""
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        with contextlib.suppress(ValueError):
            return prefix + str(path.relative_to(base))
    return str(path)
