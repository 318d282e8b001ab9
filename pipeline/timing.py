"""How long calls take, measured so that they can be compared: in turns, the fastest of several
rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


def fastest_seconds(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of the fastest of `rounds` runs of each call, after one that sets up.

    The calls run in turns, so that what else the machine does strikes all alike. What runs on a GPU
    must be waited for within the call.
    """
    times: list[list[float]] = [[] for _ in calls]
    for number in range(1 + rounds):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if number:
                taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]
