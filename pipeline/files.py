"""Atomic writes, foreign files, private folders, checks of paths, and which files are videos.

Imports no torch.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

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
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # writing to an open file does not name it
        with contextlib.suppress(OSError):
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


class AppendFile:
    """A file that whole records are appended to, such as lines of a log.

    It is opened at the first `write` and written at once. If a record does not fit on a full disk,
    the part that was written is removed again, and later records can follow when there is space.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0  # of the file, in bytes, after the last `write`
        self._descriptor: int | None = None

    def write(self, record: bytes) -> None:
        """Append all of `record`, or nothing and raise `OSError`."""
        try:
            if self._descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            before = os.fstat(self._descriptor).st_size
            try:
                write_all(self._descriptor, record)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, before)
                raise
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        self.size = before + len(record)

    def flush(self) -> None:
        """Do nothing: `write` has written everything."""

    def close(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of `content` to an open file; a single call of the system may write a part."""
    rest = memoryview(content).cast("B")
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]


def reason(error: OSError, place: str | os.PathLike[str] = "") -> str:
    """Return what the system says about `error`, with the path: its own, or else `place`."""
    text = error.strerror or str(error) or type(error).__name__
    where = place if error.filename is None else error.filename
    return f"{text}: {os.fspath(where)}" if where else text


def size_text(size: int) -> str:
    """Format bytes as `12.3 MB`, with a unit that suits the number."""
    unit, name = next(
        (pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= pair[0]), (1, "bytes")
    )
    return f"{size / unit:.{int(unit > 1)}f} {name}"


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


def open_regular_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading.

    Raises `OSError`, also for what is not a regular file: reading a named pipe could wait forever.
    """
    # O_NONBLOCK: opening a named pipe must not block.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular_file(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a file; raises the errors of `open_regular_file`."""
    with open_regular_file(path) as file:
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raises `ValueError` for everything else, whatever the bytes."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def check_utf8(path: str | os.PathLike[str], library: str) -> None:
    """Raise `UserError` for a path that is not UTF-8, which `library` cannot open."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # Python stores bytes that are not UTF-8 as surrogates
        raise UserError(
            f"{os.fspath(path)!r}: {library} cannot open a path that is not UTF-8; rename the "
            "folder or file, or choose another one"
        ) from None


# Libraries leave temporary files when a process is killed, such as the modules that DALI generates
# while a pipeline is built. Each process that needs them has a folder of its own, which it locks;
# the kernel releases the lock when the process ends in any way. The folders are where the system or
# TMPDIR wants temporary files and not in the user's cache, which may be slow or small: checkpoints
# pass through them on their way to other hosts.

_temporary: dict[int, Path] = {}  # by process: a fork does not own its parent's folder


def use_private_temp() -> Path:
    """Let this process keep its temporary files in a folder of its own; return it.

    First removes the folders of this user's processes that are dead. The folder is removed when the
    process ends normally, and otherwise by the next process that calls this. Libraries and child
    processes find it by `tempfile` and TMPDIR. Raises `UserError` if the place belongs to another
    user.
    """
    if os.getpid() in _temporary:
        return _temporary[os.getpid()]
    # A child process gets TMPDIR from its parent, whose folder it must not put its own into.
    place = os.environ.setdefault("VASTSCALE_TMPDIR", tempfile.gettempdir())
    root = private_dir(Path(place) / f"vastscale-{os.geteuid()}")
    # Processes that start together must not take each other's new folder for a dead one's.
    with open(root / "lock", "w") as guard:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(guard, fcntl.LOCK_EX)
        for entry in root.iterdir():
            if re.fullmatch(r"process-[0-9]+-\w+", entry.name) and not _is_held(entry):
                shutil.rmtree(entry, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"process-{os.getpid()}-", dir=root))
        # Open, and so locked, until the process ends.
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _temporary[os.getpid()] = folder
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    atexit.register(remove_private_temp)
    return folder


def remove_private_temp() -> None:
    """Remove this process's temporary files, before an exit without clean-up."""
    if folder := _temporary.pop(os.getpid(), None):
        shutil.rmtree(folder, ignore_errors=True)


def _is_held(folder: Path) -> bool:
    """Whether a live process has locked `folder`; also if that is uncertain."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False  # killed before it locked the folder
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def short_path(path: Path) -> str:
    """Return a path as a person would write it: relative to the current folder or to ~."""
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        with contextlib.suppress(ValueError):
            return prefix + str(path.relative_to(base))
    return str(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    import hashlib  # here, because it loads OpenSSL, and every command imports this module

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
