"""`evaluate.py --procs N`: start the processes, watch them, and say why one has ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

import torch

from pipeline.cli import RunError, UserError
from pipeline.distributed.launcher import Place
from pipeline.evaluation.crew import LOST, WATCHED

SECONDS_FOR_THE_CAUSE = 3.0  # how much later than its effect on others the end of a process may be seen


def num_processes(wanted: int, device: str) -> int:
    """How many processes evaluate: `wanted`, 0 being one for every GPU that `device` may mean, and else one.

    `UserError` where there are fewer GPUs, or where `device` is one GPU.
    """
    if wanted < 0:
        raise UserError(f"--procs {wanted} must be 1 or more; leave it out for one a GPU")
    if device not in ("auto", "cuda"):
        if wanted > 1 and device != "cpu":
            raise UserError(f"--procs {wanted} on --device {device}, which is one device; leave --device out for a GPU "
                            "each")
        return wanted or 1
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus and wanted > num_gpus:
        raise UserError(f"--procs {wanted}: this machine has {num_gpus} GPU{'s' if num_gpus > 1 else ''}; one process "
                        "a GPU is the most")
    return wanted or num_gpus or 1


def run_processes(count: int, command: Sequence[str]) -> int:
    """Run `command` in `count` processes that find each other, to the end. Returns the exit status.

    `RunError` where one of them was killed. All are ended before this returns or raises.
    """
    port = _free_port()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            # In sessions of their own, so that CTRL+C reaches this process alone.
            processes.append(subprocess.Popen(command, env=_environment(rank, count, port), start_new_session=True))
        return _outcome(processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("LOCAL_SIZE", "CROSS_SIZE")}
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    variables.setdefault("OMP_NUM_THREADS", str(threads))
    variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
    variables.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's own notes to its developers
    place = Place(rank, count, rank, "", "127.0.0.1", port)
    return {**variables, **place.variables(), "LOCAL_WORLD_SIZE": str(count), WATCHED: str(os.getpid())}


def _outcome(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended well, or one has not; what it said is on the screen already."""
    while True:
        statuses = [process.poll() for process in processes]
        if all(status == 0 for status in statuses):
            return 0
        if any(statuses):
            return _cause(processes)
        time.sleep(0.05)


def _cause(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    deadline = time.monotonic() + SECONDS_FOR_THE_CAUSE
    while time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            status = process.poll()
            if status is not None and status < 0:
                raise RunError(f"process {rank + 1} of {len(processes)} was ended by {_signal_name(-status)}; if "
                               "memory ran out, start fewer with --procs")
            if status not in (None, 0, LOST):
                return status
        time.sleep(0.05)
    raise RunError("the processes lost each other; start again, or use --procs 1")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
