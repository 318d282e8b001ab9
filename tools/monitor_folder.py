"""How fast a folder grows while a tool writes into it: files/s, MB/s, room left, time to go."""

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

import tyro

from pipeline.cli import RunError, UserError, run

WINDOW = 10  # intervals that the rate and the ETA are the mean of


@dataclass(frozen=True)
class Options:
    """Watch a folder grow while another command writes into it: one line every few seconds with the
    number of files, their size, how fast both grow, the room left on the disk, and with --until the
    time to go.

    Looks at names and sizes only, in all folders below (links to folders are not followed); files
    that come and go meanwhile do no harm, and half-written ones (*.tmp) do not count. Rates are
    means over the last ten intervals. Stops when --until is reached, after --count lines, or on
    CTRL+C.

    Example: python tools/monitor_folder.py ~/dataset/DIV2K --interval 5 --until 30000
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The folder to watch."""
    interval: float = 2.0
    """Seconds from one look to the next."""
    until: int | None = None
    """Stop once there are this many files, and say how long that will take."""
    count: int | None = None
    """Stop after this many lines."""
    pattern: str = "*"
    """Count only files whose name matches, such as '*.npy'."""


class FolderState(NamedTuple):
    """What lay in the folder at one time (seconds of a monotonic clock)."""

    seconds: float
    files: int
    bytes: int


def main(options: Options) -> int:
    """Watch, a line a look. 0: stopped as asked."""
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
        raise RunError(f"{folder}: the folder is gone; start again once it is there") from None


def _check_options(options: Options, folder: Path) -> None:
    """Refuse what cannot work."""
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise UserError(
            f"{folder}: {what}; give the folder that the tool writes into, once it is there"
        )
    if not (math.isfinite(options.interval) and options.interval > 0):
        raise UserError(f"--interval {options.interval:g}: must be above 0 seconds, such as 2")
    for flag, value in (("--until", options.until), ("--count", options.count)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")


def measure(folder: Path, pattern: str) -> FolderState:
    """Number and total size of the files below `folder`. Raises `FileNotFoundError` where `folder`
    itself is gone."""
    files = size = 0
    os.stat(folder)
    for entry in _entries(folder):
        if entry.name.endswith(".tmp") or not fnmatchcase(entry.name, pattern):
            continue
        try:
            size += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:  # renamed or deleted while we looked
            continue
        files += 1
    return FolderState(time.monotonic(), files, size)


def _entries(folder: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    """All files below a folder, one at a time: memory grows with the depth alone, not with the
    number of files."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _entries(entry.path)
                elif entry.is_file():
                    yield entry
    except (FileNotFoundError, NotADirectoryError):  # removed while we looked
        return
    except PermissionError as error:
        raise UserError(
            f"{error.filename}: this folder cannot be read ({error.strerror}); repair its "
            "permissions"
        ) from None


def line(recent: deque[FolderState], free: int, until: int | None) -> str:
    """One line on the newest sample; rates are means from the oldest sample in `recent` on."""
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
    """When this many more files will be there."""
    if files <= 0:
        return "done"
    if rate <= 0:
        return f"{files} to go, no growth"
    seconds = math.ceil(files / rate)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{files} to go, ETA {hours}:{minutes:02d}:{seconds % 60:02d}"


if __name__ == "__main__":
    run(Options, main, ends_with_reader=True)
