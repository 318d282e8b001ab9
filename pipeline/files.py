"""Atomic writes, paths for messages, and which files are videos. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

VIDEO_SUFFIXES = frozenset(
    {
        ".3gp",
        ".avi",
        ".flv",
        ".m2t",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".ogm",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
        ".y4m",
    }
)
"""Suffixes of the video files that upscale.py and video_to_data.py read."""


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace the content of the file `path`.

    A reader, or a power failure, finds either the old or the new content, never a mixture.
    """
    write_pieces_atomically(path, [content])


def write_pieces_atomically(
    path: str | os.PathLike[str], pieces: Iterable[bytes | memoryview]
) -> None:
    """Like `write_atomically`, for content that arrives in pieces and never as a whole."""
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
    flush(path.parent)  # the rename is stored in the folder


def flush(path: str | os.PathLike[str]) -> None:
    """Flush a file's content, or a folder's entries, to disk, to survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def short_path(path: Path) -> str:
    """Return a path as a person would write it: relative to the current folder or to ~."""
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        with contextlib.suppress(ValueError):
            return prefix + str(path.relative_to(base))
    return str(path)
