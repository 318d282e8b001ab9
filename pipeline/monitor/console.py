"""The voice of a run: lines on the terminal, and the same with their times in its run.log. Needs no
torch."""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from pipeline.cli import say

RUN_LOG_FILE = "run.log"
MOST_BYTES = 16 << 20  # of a run.log, which then becomes run.log.1, in the place of the one before
BAR = 24  # characters
COLOURS = {"warning:": "\x1b[33m", "error:": "\x1b[31m"}  # by how a line begins
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


class Console:
    """What the first rank says; those of the other ranks are mute.

    Until `keep_in` names the run.log, lines wait for it. A run.log that cannot be written is a
    warning, once.
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
        self._file: TextIO | None = None
        self._waiting: list[str] = []
        self._is_broken = False

    def keep_in(self, path: Path) -> None:
        """From now on append to the file at `path`."""
        if self._is_mute:
            return
        self.close()
        self._path, self._is_broken = path, False
        waiting, self._waiting = self._waiting, []
        self._write(*waiting)

    def say(self, text: str, *, is_good: bool = False) -> None:
        """A line; green on a terminal if it `is_good` news."""
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
        """A line for run.log alone."""
        if not self._is_mute:
            self._write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def progress(self, text: str, share: float) -> None:
        """The line of progress: rewritten on a terminal, with a bar of the `share` (0 to 1) that is
        done; else new."""
        if self._is_mute:
            return
        self.note(text)
        if self._on_terminal:
            self._rewrite(f"{bar(share)} {text}")
        else:
            say(text)

    def passing(self, text: str) -> None:
        """A word on what is being done, for terminals only: nothing that a log should keep."""
        if self._on_terminal and not self._is_mute:
            self._rewrite(text)

    def close(self) -> None:
        """End the open line and let go of run.log; what is said later waits for the next."""
        self._end_line()
        if self._file:
            with suppress(OSError):
                self._file.close()
        self._file = self._path = None

    def _rewrite(self, text: str) -> None:
        room = shutil.get_terminal_size().columns - 1  # a line that wraps could not be rewritten
        with suppress(OSError, ValueError):
            print(f"\r\x1b[2K{text[:room]}", end="", flush=True)
        self._line_open = True

    def _end_line(self) -> None:
        if self._line_open:
            say("")
            self._line_open = False

    def _write(self, *lines: str) -> None:
        if self._path is None:
            self._waiting += lines
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
            self._file.write("".join(lines))
            self._file.flush()
            if self._file.tell() > MOST_BYTES:
                self._file.close()
                self._file = None
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        except OSError as error:
            if not self._is_broken:
                self._is_broken = True
                self.say(
                    f"warning: {self._path.name} cannot be written: {error}; training goes on "
                    "without"
                )


def bar(share: float) -> str:
    """`[======>                 ]  29%`."""
    done = max(0, min(BAR, int(share * BAR)))
    return f"[{('=' * done + '>' * (done < BAR)).ljust(BAR)}] {share:4.0%}"
