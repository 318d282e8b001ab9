"""Ends a process that makes no progress any more. Needs no torch."""

from __future__ import annotations

import faulthandler
import os
import sys
import time

EVERY_SECONDS = 0.5  # feeding it more often changes nothing


class Watchdog:
    """From the first `feed` on there must be another one within `seconds` (0: it never minds).

    Otherwise the tracebacks of all threads are written to stderr, and the process ends with status 1 at once. That is
    done by a thread of C that needs no Python lock: it works where the process hangs inside a library, too.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._fed = float("-inf")
        self._told = sys.__stderr__ or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as it lives

    def feed(self) -> None:
        """Say that there was progress."""
        now = time.monotonic()
        if self._seconds and now - self._fed > min(EVERY_SECONDS, self._seconds / 10):
            self._fed = now
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._told)

    def stop(self) -> None:
        """Mind nothing from now on."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
