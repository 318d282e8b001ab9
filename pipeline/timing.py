"""Comparable timings of calls, and words about what takes long."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence


def fastest_seconds(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the minimum seconds of each call over `rounds` rounds, after one uncounted round.

    The calls alternate, so that other load on the machine affects all of them. A call that uses a
    GPU must wait for it.
    """
    times: list[list[float]] = [[] for _ in calls]
    for number in range(1 + rounds):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if number:
                taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


@contextlib.contextmanager
def said_if_slow(say: Callable[[str], None], text: str, seconds: float = 2.0) -> Iterator[None]:
    """Call `say(text)`, from another thread, if the block still runs after `seconds`."""
    timer = threading.Timer(seconds, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
