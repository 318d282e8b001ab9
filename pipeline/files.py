"""Atomic writes, private folders, paths for messages, and which files are videos.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from pipeline.cli import UserError

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


def private_dir(path: Path) -> Path:
    """Make `path` a folder of this user that nobody else can enter (mode 0700); return it.

    Missing parents are made with the usual mode. Raises `UserError` if `path` is a link, is not
    a folder, or belongs to another user, who could have made it first (in a place where others may
    write, such as /tmp) to read or replace what is stored there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    # Through a descriptor, so that the folder that is checked is the one whose mode is changed.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise UserError(
            f"{path} is not a folder of your own ({error.strerror}); remove it"
        ) from error
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise UserError(
                f"{path} belongs to user {found.st_uid}, not to you ({os.geteuid()}); have it "
                "removed, or set another folder"
            )
        if stat.S_IMODE(found.st_mode) != 0o700:
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
    return path


def short_path(path: Path) -> str:
    """Return a path as a person would write it: relative to the current folder or to ~."""
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        with contextlib.suppress(ValueError):
            return prefix + str(path.relative_to(base))
    return str(path)
