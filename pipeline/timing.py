"""Comparable timings of calls, on which processor, and words about what takes long."""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


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


def processor() -> str:
    """Return the processor's model name, or the machine's architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.machine()
