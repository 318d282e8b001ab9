"""One host's part in a short all-reduce between all hosts.

This file is sent to every host as source, and imports torch there, late. Each rank announces itself
in a store on the first host, so that missing ranks can be named; then all ranks sum tensors of a
few sizes. Every rank checks the sums; the times are the first rank's.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

LATENCY_BYTES = 4
SIZES = (1_000_000, 16_000_000, 64_000_000)
"""Sizes of the float32 tensors in bytes."""
WARM_UPS, MOST_REPEATS = 3, 50
BUDGET_SECONDS = 0.6  # for the repeats of one size
MOST_SECONDS = 5.0  # a size whose all-reduce is expected to take longer is skipped


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Run this host's ranks; return {"ranks": {rank: result of `_rank`}}. See `measure.task_of`."""
    with suppress(OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(task["seconds"]) + 5)  # end this process whatever hangs
    threading.Thread(target=_end_with_reader, daemon=True).start()
    os.environ.update(task["environment"])
    import torch  # noqa: F401 - imported before the fork, so that all ranks share it

    if len(task["ranks"]) == 1:
        return {"ranks": {task["ranks"][0]: _guarded(task, 0)}}
    pipes = [_fork(task, position) for position in range(len(task["ranks"]))]
    return {"ranks": {rank: _read(pipe) for rank, pipe in zip(task["ranks"], pipes, strict=True)}}


def _end_with_reader() -> None:
    """End this process group once stdin closes: whoever waits for the answer holds it open."""
    while sys.stdin.buffer.read(1):
        pass
    with suppress(OSError):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _fork(task: dict[str, Any], position: int) -> int:
    reader, writer = os.pipe()
    if os.fork() == 0:
        signal.alarm(int(task["seconds"]) + 5)  # a forked child does not inherit the alarm
        with open(writer, "w") as pipe:
            json.dump(_guarded(task, position), pipe)
        os._exit(0)
    os.close(writer)
    return reader


def _read(pipe: int) -> dict[str, Any]:
    with open(pipe) as reader:
        text = reader.read()
    try:
        return json.loads(text)
    except ValueError:
        return {
            "error": "the rank ended without an answer: killed, or crashed in the network library"
        }


def _guarded(task: dict[str, Any], position: int) -> dict[str, Any]:
    try:
        return _rank(task, position)
    except Exception as error:  # any error is part of the answer; the doctor reports it
        return {
            "error": (
                f"{type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error) else ''}"
            )
        }


def _rank(task: dict[str, Any], position: int) -> dict[str, Any]:
    """Run one rank; return {"is_right": bool}.

    The first rank adds {"seconds": {bytes: median}}, or returns {"absent": [rank, ...]}.
    """
    import torch
    import torch.distributed as dist

    rank, world_size, timeout = (
        task["ranks"][position],
        task["world_size"],
        timedelta(seconds=task["join_seconds"]),
    )
    device = (
        torch.device("cpu")
        if task["devices"] is None
        else torch.device("cuda", task["devices"][position])
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    store = dist.TCPStore(
        task["address"],
        task["port"],
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
    )
    store.set(f"here/{rank}", "")
    absent = (
        _absent(store, world_size, time.monotonic() + task["join_seconds"]) if rank == 0 else []
    )
    if absent:
        return {"absent": absent}
    store.wait([f"here/{other}" for other in range(world_size)], timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    seconds, is_right = _measure(dist, device, rank, world_size)
    store.set(f"done/{rank}", "")
    if rank == 0:  # the store lives in this process: the others must be done with it first
        store.wait([f"done/{other}" for other in range(world_size)], timeout)
    dist.destroy_process_group()
    return {"is_right": is_right, **({"seconds": seconds} if rank == 0 else {})}


def _absent(store: Any, world_size: int, deadline: float) -> list[int]:
    """Return the ranks that have not announced themselves by `deadline` (monotonic seconds)."""
    missing = list(range(world_size))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
        time.sleep(0.05)
    return missing


def _measure(dist: Any, device: Any, rank: int, world_size: int) -> tuple[dict[int, float], bool]:
    """Return the median seconds of an all-reduce by size in bytes, and whether all sums were
    right."""
    import torch

    medians: dict[int, float] = {}
    is_right, before = True, 0
    for size in (LATENCY_BYTES, *SIZES):
        tensor = torch.empty(size // 4, device=device)
        expected = medians[before] * size / before if before > LATENCY_BYTES else 0.0
        if _broadcast(dist, device, rank, int(expected > MOST_SECONDS)):
            break
        times = []
        for _ in range(WARM_UPS if size < SIZES[-1] else 1):
            times.append(_all_reduce(dist, tensor, rank))
        repeats = _broadcast(
            dist, device, rank, max(2, min(MOST_REPEATS, int(BUDGET_SECONDS / times[-1])))
        )
        times = [_all_reduce(dist, tensor, rank) for _ in range(repeats)]
        is_right = is_right and bool((tensor == world_size * (world_size + 1) / 2).all())
        medians[size] = statistics.median(times)
        before = size
    return medians, is_right


def _all_reduce(dist: Any, tensor: Any, rank: int) -> float:
    """Sum `rank + 1` over all ranks, which start together; return the seconds it took."""
    import torch

    tensor.fill_(rank + 1)
    dist.barrier()
    _wait(torch, tensor)
    began = time.perf_counter()
    dist.all_reduce(tensor)
    _wait(torch, tensor)
    return time.perf_counter() - began


def _wait(torch: Any, tensor: Any) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _broadcast(dist: Any, device: Any, rank: int, number: int) -> int:
    """Return the first rank's `number` on every rank."""
    import torch

    value = torch.tensor([number], device=device)
    dist.broadcast(value, 0)
    return int(value.item())
