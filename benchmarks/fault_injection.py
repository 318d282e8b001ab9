"""What a campaign of faults does inside the processes of a run. Imports no torch.

A process is told through the environment variable `FAULT`: a JSON object with the folder for
process ids and, for each script, the calls to make before it starts.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULT = "VASTSCALE_BENCHMARK_FAULT"
ENTER = (
    f"import sys; sys.path.append({str(Path(__file__).resolve().parents[1])!r}); "
    "from benchmarks.fault_injection import enter; enter()"
)
"""Code for `warm.BEFORE`."""
FILE_EVENTS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "shutil.rmtree",
    "os.truncate",
    "fsync",
}
"""Python's audit events about files, and `fsync`, for which Python has none."""


def enter() -> None:
    """Record this process, and make the calls for its script."""
    told = json.loads(os.environ.get(FAULT, "{}"))
    if not told:
        return
    script = Path(sys.argv[0]).name
    if script == "runner.py" or script == "launch.py":
        script = f"deepspeed {script}"
    rank = os.environ.get("RANK", "")
    Path(told["pids"], f"{script}-{rank}-{os.getpid()}").touch()
    for name, *arguments in told["calls"].get(script, []):
        globals()[name](*arguments)


def on_first_rank(name: str, *arguments: Any) -> None:
    """Make the call `name(*arguments)` on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        globals()[name](*arguments)


def set_constants(module: str, values: dict[str, float]) -> None:
    """Set constants of a module, such as time limits."""
    import importlib

    vars(importlib.import_module(module)).update(values)


# --- Files ---


def _on_file_events(folder: str, act: Callable[[int, str], None]) -> None:
    """Call `act(number, path)` before each file operation of this process below `folder`."""
    count = 0
    lock = threading.RLock()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in FILE_EVENTS:
            return
        path = next(
            (
                text
                for text in map(_text, arguments[:2])
                if text == folder or text.startswith(f"{folder}/")
            ),
            None,
        )
        if path is None:
            return
        with lock:
            count += 1
            number = count
        act(number, path)

    sys.addaudithook(hook)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        hook("fsync", (os.readlink(f"/proc/self/fd/{descriptor}"),))
        real(descriptor)

    os.fsync = fsync


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return os.fsdecode(value)
    return os.fspath(value) if isinstance(value, (str, os.PathLike)) else ""


def count_file_events(folder: str, file: str) -> None:
    """Write the number of file operations below `folder` to `file`, as it grows."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    _on_file_events(folder, lambda number, _: os.pwrite(descriptor, b"%d" % number, 0) and None)


def kill_at_file_event(folder: str, number: int) -> None:
    """Kill this process with SIGKILL before its file operation `number` below `folder`."""

    def act(count: int, _path: str) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    _on_file_events(folder, act)


def fail_file_events(folder: str, first: int, times: int, code: int) -> None:
    """Make `times` file operations below `folder` fail with the error `code`, from `first` on."""

    def act(count: int, path: str) -> None:
        if first <= count < first + times:
            raise OSError(code, os.strerror(code), path)

    _on_file_events(folder, act)


def fail_writes(first: int, times: int, code: int) -> None:
    """Make `times` of torch's writes of a checkpoint's files fail, from number `first` on.

    They happen in C++, which no audit event precedes: a write stops half-way, with torch's error.
    """
    import torch

    real, count = torch.save, 0

    def save(state: Any, file: Any, *arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if not first <= count < first + times:
            real(state, file, *arguments, **options)
            return
        if isinstance(file, (str, os.PathLike)):
            real(state, file, *arguments, **options)
            os.truncate(file, os.path.getsize(file) // 2)
        else:
            file.write(b"half")
        raise OSError(code, os.strerror(code), str(getattr(file, "name", file)))

    torch.save = save


def disk_errors(folder: str, first: int, times: int, in_torch: bool) -> None:
    """Input/output errors, in torch's writes or in other file operations below `folder`."""
    if in_torch:
        fail_writes(first, times, errno.EIO)
    else:
        fail_file_events(folder, first, times, errno.EIO)


# --- Stalls and clocks ---


def stop_loader(batch: int, seconds: float) -> None:
    """Make the loader stop for `seconds` at its batch number `batch` since the start of a run."""
    from pipeline.data.source import CropSource

    real = CropSource.make

    def make(self: CropSource, index: int) -> tuple[Any, ...]:
        if index == batch:
            time.sleep(seconds)
        return real(self, index)

    CropSource.make = make


def slow_steps(seconds: float) -> None:
    """Make each training step last `seconds` longer, without using the CPU."""
    from pipeline.training.trainers import ReconstructionTrainer

    real = ReconstructionTrainer.step

    def step(self: ReconstructionTrainer, *arguments: Any) -> Any:
        time.sleep(seconds)
        return real(self, *arguments)

    ReconstructionTrainer.step = step


def at_step(number: int, name: str, *arguments: Any) -> None:
    """Make the call `name(*arguments)` just before training step `number`, counted from 0."""
    from pipeline.training.trainers import ReconstructionTrainer

    real = ReconstructionTrainer.step

    def step(self: ReconstructionTrainer, batch: Any, at: int) -> Any:
        if at == number:
            globals()[name](*arguments)
        return real(self, batch, at)

    ReconstructionTrainer.step = step


def in_validation(number: int, name: str, *arguments: Any) -> None:
    """Make the call `name(*arguments)` before image `number` of all validations is scored."""
    from pipeline.training.validation import ValidationSet

    real, count = ValidationSet.score, 0

    def score(self: ValidationSet, *images: Any) -> dict[str, float]:
        nonlocal count
        if count == number:
            globals()[name](*arguments)
        count += 1
        return real(self, *images)

    ValidationSet.score = score


def touch(path: str) -> None:
    """Make an empty file, as a sign to the campaign."""
    Path(path).touch()


def send(number: int) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


def jump_clock(seed: int, largest: float) -> None:
    """Make the wall clock of this process jump at random, by up to `largest` seconds each way.

    Every reading of `time.time` and `time.time_ns` jumps with a probability of 5 %.
    """
    draw, real, shift = random.Random(seed), time.time_ns, 0

    def time_ns() -> int:
        nonlocal shift
        if draw.random() < 0.05:
            shift = int(draw.uniform(-largest, largest) * 1e9)
        return max(0, real() + shift)

    time.time_ns = time_ns
    time.time = lambda: time_ns() / 1e9


def supervisor_behind(port_file: str, proxy_port: int) -> None:
    """Make the supervisor write its port to `port_file`, and tell the guards `proxy_port`."""
    from launch.cluster.supervisor import Supervisor

    real = Supervisor.listen

    async def listen(self: Supervisor, address: str) -> int:
        port = await real(self, address)
        Path(f"{port_file}.new").write_text(str(port))
        os.rename(f"{port_file}.new", port_file)
        return proxy_port

    Supervisor.listen = listen
