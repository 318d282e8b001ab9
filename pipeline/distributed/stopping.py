"""How ranks agree when to save and stop, without waiting for each other's GPU; the watchdog."""

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

from pipeline.distributed.launcher import LAUNCHER
from pipeline.distributed.ranks import Ranks, reach_ranks
from pipeline.signals import NOTHING_TO_SAVE, stop_signals

NUM_SIGNALS = 128  # more than Linux has; ranks send kind and signal as one integer


class RequestKind(IntEnum):
    """What a rank may ask of all ranks, the most urgent last."""

    CONTINUE = 0
    SAVE = 1
    STOP = 2  # save and end
    FAIL = 3  # save and end, because some rank cannot continue


class Request(NamedTuple):
    """What a rank asks of all ranks. The largest of several requests wins."""

    kind: RequestKind = RequestKind.CONTINUE
    signal: int = 0  # the reason for a STOP

    @property
    def ends_training(self) -> bool:
        """Whether training ends with this step."""
        return self.kind >= RequestKind.STOP


class StopSignals:
    """Records the signals to stop for the training loop to check; only the first one counts.

    Until `is_patient` is set after the first step, there is nothing to save, and a signal ends the
    process at once.
    """

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.is_patient = False
        self.count = 0  # of signals received, including repeats
        self._say = say
        self._noted = 0
        self._launcher = int(os.environ.get(LAUNCHER, 0))

    @property
    def received(self) -> int:
        """The first signal received, else 0.

        SIGTERM if the launcher is gone, since nobody could stop this process any more.
        """
        if not self._noted and self.is_orphan:
            self._noted = signal.SIGTERM
        return self._noted

    @property
    def is_orphan(self) -> bool:
        """Whether this process had a launcher and it is gone."""
        if self._launcher:
            try:
                os.kill(self._launcher, 0)  # signal 0 only tests whether the process exists
            except ProcessLookupError:
                return True
        return False

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._note) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if not self.is_patient:
            self._say(NOTHING_TO_SAVE)
            # An exception could interrupt compilation halfway.
            os._exit(128 + number)
        self._noted = self._noted or number
        self.count += 1


class Agreement:
    """The largest request of all ranks, one step late.

    It travels between hosts while the next step computes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, request: Request) -> Request:
        """Send this step's request; return what was agreed on in the previous step.

        All ranks call it in every step.
        """
        if self._ranks.world_size == 1:
            return request
        # The previous step's exchange has had a whole step's time, so this hardly ever waits.
        # Waiting for this step's own exchange would make every step take as long as the slowest
        # message, and would keep this host from queueing the next step while its GPU computes.
        agreed = self.finish()
        # One integer, in which the kind outranks the signal, so that one maximum decides both.
        # Its memory belongs to the exchange until that is done.
        value = torch.tensor(request.kind * NUM_SIGNALS + request.signal)
        work = reach_ranks(
            lambda: dist.all_reduce(
                value, dist.ReduceOp.MAX, group=self._ranks.control, async_op=True
            )
        )
        self._pending = work, value
        return agreed

    def finish(self) -> Request:
        """Return what was agreed on in the last exchange, before all ranks leave the loop.

        Raises `RankLostError` if another rank is gone.
        """
        if self._pending is None:
            return Request()
        work, value = self._pending
        reach_ranks(work.wait)
        self._pending = None
        kind, number = divmod(int(value), NUM_SIGNALS)
        return Request(RequestKind(kind), number)


EVERY_SECONDS = 0.5  # minimum time between two renewals of the watchdog
START_SECONDS = 30 * 60  # allowed for imports, other ranks and compilation


class Watchdog:
    """Ends the process if it makes no progress.

    After the first `feed` it must be fed again within `seconds` (0 disables it); after `begin` it
    must be fed within half an hour. Otherwise the tracebacks of all threads are written to stderr
    and the process ends at once with status 1. A C thread does this without Python's lock, so it
    also works if the process hangs inside a library.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._fed = float("-inf")
        self._is_armed = False
        # The original stream, open as long as this object lives: faulthandler writes to its
        # descriptor, from a thread in C.
        self._stderr = sys.__stderr__ or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def begin(self) -> None:
        """Start waiting for the first progress."""
        if self._seconds:
            faulthandler.dump_traceback_later(
                max(START_SECONDS, self._seconds), exit=True, file=self._stderr
            )

    def feed(self, *, only_if_armed: bool = False) -> None:
        """Report progress. `only_if_armed`: ignore it before the first full step."""
        now = time.monotonic()
        # The half hour since `begin` still holds: the first step may compile for minutes.
        if only_if_armed and not self._is_armed:
            return
        self._is_armed = True
        if self._seconds and now - self._fed > min(EVERY_SECONDS, self._seconds / 10):
            # Each call ends faulthandler's thread and starts another, so it is not made for every
            # micro-batch.
            self._fed = now
            # `exit` ends the process without clean-up, which would wait for the library that hangs.
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._stderr)

    def stop(self) -> None:
        """Disable the watchdog."""
        self._is_armed = False
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
