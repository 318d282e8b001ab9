"""How ranks decide together when to save and when to stop, without waiting for each other's GPU."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipeline.distributed.ranks import LAUNCHER, Ranks

NUM_SIGNALS = 128  # more than Linux has: ranks send kind and signal as one whole number


class RequestKind(IntEnum):
    """What a rank may ask of all, the most urgent last."""

    GO_ON = 0
    SAVE = 1
    STOP = 2  # save and end
    FAIL = 3  # likewise: some rank cannot go on


class Request(NamedTuple):
    """What a rank would have all of them do. Of two requests the larger one wins."""

    kind: RequestKind = RequestKind.GO_ON
    signal: int = 0  # that a STOP is for

    @property
    def is_to_end(self) -> bool:
        """Whether training ends with this step."""
        return self.kind >= RequestKind.STOP


class StopSignals:
    """Turns SIGINT, SIGTERM and SIGHUP into a number to look at; more of them change nothing.

    As long as it `is_patient`: before the first step there is nothing to save, and the process ends
    at once.
    """

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.is_patient = False
        self._say = say
        self._noted = 0
        self._launcher = int(os.environ.get(LAUNCHER, 0))

    @property
    def received(self) -> int:
        """The first signal, SIGTERM if the launcher is gone (nobody could stop this process any
        more), else 0."""
        if not self._noted and self._launcher:
            try:
                os.kill(self._launcher, 0)
            except ProcessLookupError:
                self._noted = signal.SIGTERM
        return self._noted

    def __enter__(self) -> StopSignals:
        self._previous = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if not self.is_patient:
            self._say("stopped before the first step, where there is nothing to save")
            os._exit(128 + number)  # not by an exception: it may come in the middle of compiling
        self._noted = self._noted or number


class Agreement:
    """The largest request of all ranks, a step late: it travels between the hosts while the next
    step computes."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, request: Request) -> Request:
        """Send this step's request; returns what was agreed of the step before. Every rank calls it
        every step."""
        if self._ranks.world_size == 1:
            return request
        agreed = self.finish()
        value = torch.tensor(request.kind * NUM_SIGNALS + request.signal)
        self._pending = (
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self._ranks.control, async_op=True),
            value,
        )
        return agreed

    def finish(self) -> Request:
        """What was agreed of the request sent last; every rank calls it, before it leaves the
        loop."""
        if self._pending is None:
            return Request()
        work, value = self._pending
        work.wait()
        self._pending = None
        kind, number = divmod(int(value), NUM_SIGNALS)
        return Request(RequestKind(kind), number)


# Ends a process that makes no progress any more. Needs no torch.


EVERY_SECONDS = 0.5  # feeding it more often changes nothing


START_SECONDS = 30 * 60  # to begin: imports, other ranks, compiling


class Watchdog:
    """From the first `feed` on there must be another one within `seconds` (0: it never minds).

    From `begin` on there must be a first one within half an hour.

    Otherwise the tracebacks of all threads are written to stderr, and the process ends with status
    1 at once. That is done by a thread of C that needs no Python lock: it works where the process
    hangs inside a library, too.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._fed = float("-inf")
        self._is_armed = False
        self._told = sys.__stderr__ or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as it lives

    def begin(self) -> None:
        """Say that there will be progress."""
        if self._seconds:
            faulthandler.dump_traceback_later(
                max(START_SECONDS, self._seconds), exit=True, file=self._told
            )

    def feed(self, *, only_if_armed: bool = False) -> None:
        """Say that there was progress; `only_if_armed`: of the kind that comes before the first
        step, too."""
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
