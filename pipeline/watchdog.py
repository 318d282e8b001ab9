"""Ends a process that makes no progress any more. Needs no torch."""

from __future__ import annotations

import faulthandler
import os
import sys
import time

EVERY_SECONDS = 0.5  # feeding it more often changes nothing


START_SECONDS = 30 * 60  # to begin: imports, other ranks, compiling


class Watchdog:
    """From the first `feed` on there must be another one within `seconds` (0: it never minds).

    From `begin` on there must be a first one within half an hour.

    Otherwise the tracebacks of all threads are written to stderr, and the process ends with status 1 at once. That is
    done by a thread of C that needs no Python lock: it works where the process hangs inside a library, too.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._fed = float("-inf")
        self._is_armed = False
        self._told = sys.__stderr__ or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as it lives

    def begin(self) -> None:
        """Say that there will be progress."""
        if self._seconds:
            faulthandler.dump_traceback_later(max(START_SECONDS, self._seconds), exit=True, file=self._told)

    def feed(self, *, only_if_armed: bool = False) -> None:
        """Say that there was progress; `only_if_armed`: of the kind that comes before the first step, too."""
        now = time.monotonic()
        if only_if_armed and not self._is_armed:
            return
        self._is_armed = True
        if self._seconds and now - self._fed > min(EVERY_SECONDS, self._seconds / 10):
            self._fed = now
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._told)

    def stop(self) -> None:
        """Mind nothing from now on."""
        self._is_armed = False
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
