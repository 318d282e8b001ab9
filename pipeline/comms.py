"""What DeepSpeed's `comms_logger` has counted: how often, how much and how long ranks have spoken to each other."""

from __future__ import annotations

import re


def read_comms() -> dict[str, float]:
    """Of this rank since it was read last, for each operation: calls, megabytes, milliseconds, bus bandwidth in Gbit/s.

    `{"all_reduce_calls": 50, "all_reduce_mb": 68.4, "all_reduce_ms": 31.0, "all_reduce_gbps": 35.3}`. DeepSpeed itself
    only adds to its lists, call by call.
    """
    import deepspeed.comm.comm as comm

    values: dict[str, float] = {}
    for operation, sizes in comm.comms_logger.get_raw_data().items():
        name = re.sub(r"\W+", "_", operation).strip("_")
        calls = sum(count for count, *_ in sizes.values())
        milliseconds = sum(sum(times) for _, times, *_ in sizes.values())
        gigabits = sum(rate * time for _, times, _, rates in sizes.values()
                       for rate, time in zip(rates, times, strict=True))
        values |= {f"{name}_calls": calls, f"{name}_ms": round(milliseconds, 3),
                   f"{name}_mb": round(sum(size * count for size, (count, *_) in sizes.items()) / 1e6, 3),
                   f"{name}_gbps": round(gigabits / max(milliseconds, 1e-9), 3)}
    comm.comms_logger.reset_data()
    return values
