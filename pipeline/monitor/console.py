"""Console output of a run: lines on the terminal, and the same with timestamps in run.log.

Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from pipeline.cli import say
from pipeline.files import AppendFile
from pipeline.installation import as_typed

RUN_LOG_FILE = "run.log"
MOST_BYTES = 16 << 20  # of a run.log, which then replaces run.log.1
BAR = 24  # characters
LEAST_PARTS = 4  # of a progress line: step, epoch, loss and the time that remains
COLOURS = {"warning:": "\x1b[33m", "error:": "\x1b[31m"}  # by the beginning of a line
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


class Console:
    """Console output of the first rank; on other ranks, make it with `is_mute`.

    Lines are kept until `log_to` names the run.log. If that cannot be written, one warning says so.
    """

    def __init__(self, *, is_mute: bool = False) -> None:
        self._is_mute = is_mute
        self._on_terminal = sys.stdout.isatty()
        self._is_coloured = (
            self._on_terminal
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM", "dumb") != "dumb"
        )
        self._line_open = False
        self._path: Path | None = None
        self._file: AppendFile | None = None
        self._waiting: list[str] = []
        self._is_broken = False

    def log_to(self, path: Path) -> None:
        """Append all further lines to the file at `path`."""
        if self._is_mute:
            return
        self.close()
        self._path, self._is_broken = path, False
        self._file = AppendFile(path)
        waiting, self._waiting = self._waiting, []
        self._write(*waiting)

    def say(self, text: str, *, is_good: bool = False) -> None:
        """Print a line; green on a terminal if it `is_good` news."""
        if self._is_mute:
            return
        self._end_line()
        colour = (
            GREEN
            if is_good
            else next((code for start, code in COLOURS.items() if text.startswith(start)), "")
        )
        say(f"{colour}{text}{PLAIN}" if colour and self._is_coloured else text)
        self.note(text)

    def note(self, text: str) -> None:
        """Write a line to run.log only."""
        if not self._is_mute:
            self._write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {as_typed(text)}\n")

    def progress(self, text: str, share: float) -> None:
        """Print a progress line; `share` is the part that is done, 0 to 1.

        On a terminal the line is rewritten in place, with a bar; elsewhere it is a new line. The
        parts of `text`, separated by two spaces, are in the order of their importance: on a narrow
        terminal the last ones are left out.
        """
        if self._is_mute:
            return
        self.note(text)
        if self._on_terminal:
            self._rewrite(fitted(text, share, _room()))
        else:
            say(text)

    def show_status(self, text: str) -> None:
        """Show what is being done in the progress line of a terminal, without logging it."""
        if self._on_terminal and not self._is_mute:
            self._rewrite(text)

    def close(self) -> None:
        """End the open line and close run.log; further lines wait for the next one."""
        self._end_line()
        if self._file:
            self._file.close()
        self._file = self._path = None

    def _rewrite(self, text: str) -> None:
        with suppress(OSError, ValueError):
            print(f"\r\x1b[2K{text[: _room()]}", end="", flush=True)
        self._line_open = True

    def _end_line(self) -> None:
        if self._line_open:
            say("")
            self._line_open = False

    def _write(self, *lines: str) -> None:
        if self._path is None or self._file is None:
            self._waiting += lines
            return
        try:
            self._file.write("".join(lines).encode(errors="backslashreplace"))
            if self._file.size > MOST_BYTES:
                self._file.close()
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        except OSError as error:
            if not self._is_broken:
                self._is_broken = True
                self.say(
                    f"warning: {self._path.name} cannot be written: {error}; training continues; "
                    "what could not be written is missing"
                )


def _room() -> int:
    """Return the characters of a line that does not wrap: one that does cannot be rewritten."""
    return shutil.get_terminal_size().columns - 1


def fitted(text: str, share: float, room: int) -> str:
    """Return a progress line of at most `room` characters, if its first part has no more.

    A bar that would displace the first `LEAST_PARTS` parts of `text` gives way to a percentage.
    """
    parts = text.split("  ")
    start = bar(share)
    if len(start) + 1 + len("  ".join(parts[:LEAST_PARTS])) > room:
        start = f"{share:4.0%}"
    while len(parts) > 1 and len(start) + 1 + len("  ".join(parts)) > room:
        parts.pop()
    return f"{start} {'  '.join(parts)}"


def bar(share: float) -> str:
    """Draw a progress bar such as `[======>                 ]  29%`."""
    done = max(0, min(BAR, int(share * BAR)))
    return f"[{('=' * done + '>' * (done < BAR)).ljust(BAR)}] {share:4.0%}"
