"""How ranks decide together when to save and when to stop, without waiting for each other's GPU."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist

from pipeline.engine import Ranks

GO_ON, SAVE = 0, 1  # requests above SAVE are the number of the signal that asks to stop


class StopSignals:
    """Turns SIGINT, SIGTERM and SIGHUP into a number to look at; more of them change nothing."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._note)
                          for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        self.received = self.received or number


class Agreement:
    """The largest request of all ranks, a step late: it travels between the hosts while the next step computes."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, request: int) -> int:
        """Send this step's request; returns what was agreed of the step before. Every rank calls it every step."""
        if self._ranks.world_size == 1:
            return request
        agreed = self.finish()
        value = torch.tensor(request)
        self._pending = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._ranks.control, async_op=True), value
        return agreed

    def finish(self) -> int:
        """What was agreed of the request sent last; every rank calls it, before it leaves the loop."""
        if self._pending is None:
            return GO_ON
        work, value = self._pending
        work.wait()
        self._pending = None
        return int(value)
