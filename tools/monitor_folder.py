"""Watch how fast a folder grows: files/s, MB/s, free space, time to go."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import tyro

from pipeline.cli import RunError, UserError, run

WINDOW = 10  # intervals over which rate and ETA are averaged


@dataclass(frozen=True)
class Options:
    """Watch a folder grow while another command writes into it.

    Every few seconds, one line shows the number of files, their size, how fast both grow, the free
    space on the disk, and with --until the time to go. Only names and sizes are read, in all
    subfolders (links to folders are not followed). Files may appear and disappear meanwhile;
    half-written ones (*.tmp) do not count. Rates are averaged over the last ten intervals. Stops
    when --until is reached, after --count lines, or on CTRL+C.

    Example: python tools/monitor_folder.py ~/dataset/DIV2K --interval 5 --until 30000
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The folder to watch."""
    interval: float = 2.0
    """Seconds between measurements."""
    until: int | None = None
    """Stop at this number of files, and show how long that will take."""
    count: int | None = None
    """Stop after this many lines."""
    pattern: str = "*"
    """Count only files whose name matches, such as '*.npy'."""


class FolderState(NamedTuple):
    """Contents of the folder at one time (seconds of a monotonic clock)."""

    seconds: float
    files: int
    bytes: int


def main(options: Options) -> int:
    """Watch the folder and print one line per measurement.

    Returns 0 when stopped as requested.
    """
    folder = options.folder.expanduser()
    _check_options(options, folder)
    recent: deque[FolderState] = deque(maxlen=WINDOW + 1)
    lines = 0
    try:
        while True:
            recent.append(measure(folder, options.pattern))
            lines += 1
            print(line(recent, shutil.disk_usage(folder).free, options.until), flush=True)
            if (
                options.until is not None and recent[-1].files >= options.until
            ) or lines == options.count:
                return 0
            time.sleep(options.interval)
    except KeyboardInterrupt:  # the usual way to end it
        return 0
    except FileNotFoundError:
        raise RunError(f"{folder}: the folder was removed; start again once it exists") from None


def _check_options(options: Options, folder: Path) -> None:
    """Raise `UserError` for options that cannot work."""
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise UserError(
            f"{folder}: {what}; give the folder that the tool writes into, once it exists"
        )
    if not (math.isfinite(options.interval) and options.interval > 0):
        raise UserError(f"--interval {options.interval:g}: must be above 0 seconds, e.g. 2")
    for flag, value in (("--until", options.until), ("--count", options.count)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")


def measure(folder: Path, pattern: str) -> FolderState:
    """Number and total size of the files below `folder`.

    Raises `FileNotFoundError` if `folder` itself is gone.
    """
    files = size = 0
    os.stat(folder)
    for entry in _entries(folder):
        if entry.name.endswith(".tmp") or not fnmatchcase(entry.name, pattern):
            continue
        try:
            size += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:  # renamed or deleted meanwhile
            continue
        files += 1
    return FolderState(time.monotonic(), files, size)


def _entries(folder: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    """Yield all files below a folder one by one.

    Memory grows with the depth only, not with the number of files.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _entries(entry.path)
                elif entry.is_file():
                    yield entry
    except (FileNotFoundError, NotADirectoryError):  # removed meanwhile
        return
    except PermissionError as error:
        raise UserError(
            f"{error.filename}: this folder cannot be read ({error.strerror}); fix its permissions"
        ) from None


def line(recent: deque[FolderState], free: int, until: int | None) -> str:
    """Format the newest measurement; rates are averages since the oldest one in `recent`."""
    old, new = recent[0], recent[-1]
    text = f"{time.strftime('%H:%M:%S')}  {new.files} files  {new.bytes / 1e6:.1f} MB"
    if len(recent) > 1:
        seconds = max(new.seconds - old.seconds, 1e-9)
        rate = (new.files - old.files) / seconds
        text += f"  {rate:+.1f} files/s  {(new.bytes - old.bytes) / 1e6 / seconds:+.2f} MB/s"
        if until is not None:
            text += f"  {_to_go(until - new.files, rate)}"
    return text + f"  {free / 1e9:.1f} GB free"


def _to_go(files: int, rate: float) -> str:
    """Estimate when this many more files will exist."""
    if files <= 0:
        return "done"
    if rate <= 0:
        return f"{files} to go, no growth"
    seconds = math.ceil(files / rate)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{files} to go, ETA {hours}:{minutes:02d}:{seconds % 60:02d}"


if __name__ == "__main__":
    run(Options, main, ends_with_reader=True)
