"""The processes of one evaluation, started by `evaluate.py --procs N` or by a launcher.

`run_processes` starts and watches them for GPUs, `fork_processes` for CPUs; both report why a
process ended early. `joined` makes a process one of the ranks. The ranks take images from one
`TaskQueue`, and the first rank collects the results.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from pipeline.cli import RunError, UserError, bar_options, exit_status
from pipeline.distributed.gpus import check_procs, count_gpus, take_slice
from pipeline.distributed.launcher import (
    BY_HAND,
    RankInfo,
    choose_interface,
    end_with_parent,
    free_port,
)
from pipeline.distributed.ranks import RankLostError, Ranks, reach_ranks

WATCHED = "VASTSCALE_EVALUATION_PARENT"
"""Environment variable of a process that `run_processes` started: the parent's process id."""
LOST = 70
"""Exit status of a watched process that lost another one; the parent finds the cause."""
MINUTES_TO_MEET = 10
# The longest wait for another process's last image; a process that has died is noticed at once.
LONGEST_WAIT = timedelta(days=7)
SECONDS_BETWEEN_LOOKS = 0.5
# The end of a process may be noticed this much later than its effect on the others.
SECONDS_FOR_THE_CAUSE = 3.0


class TaskQueue:
    """Distribute tasks over ranks: a rank that is ready takes the next one.

    All ranks call its methods together.

    Args:
        ranks: this process and the others.
        store: counters that all ranks share; `None` for a single rank.
    """

    def __init__(self, ranks: Ranks, store: dist.Store | None = None) -> None:
        self.ranks = ranks
        self._store = store

    def run(self, action: Callable[[int], None], tasks: Sequence[int], title: str) -> None:
        """Call `action` for every task, each in one process, until all are done or one has failed.

        The first process shows a progress bar that counts the tasks of all processes.
        """
        if self._store is None:

            def work() -> None:
                for task in tqdm(tasks, desc=title, unit="image", **bar_options()):
                    action(task)
        else:

            def work() -> None:
                try:
                    while not self._add("failed", 0) and (place := self._add("taken", 1)) <= len(
                        tasks
                    ):
                        action(tasks[place - 1])
                        self._add("done", 1)
                except (UserError, RunError, OSError):
                    self._add("failed", 1)  # so that the others take no more tasks
                    raise

        with self._progress(len(tasks), title):
            self.ranks.on_all_ranks(work)

    @contextmanager
    def _progress(self, total: int, title: str) -> Iterator[None]:
        if self._store is None or not self.ranks.is_first:
            yield
            return
        over = threading.Event()
        with tqdm(total=total, desc=title, unit="image", **bar_options()) as bar:

            def follow() -> None:
                with suppress(RankLostError):  # the main thread raises it as well
                    while not over.wait(SECONDS_BETWEEN_LOOKS):
                        bar.update(self._add("done", 0) - bar.n)

            watch = threading.Thread(target=follow, daemon=True)
            watch.start()
            try:
                yield
            finally:
                over.set()
                watch.join()
            bar.update(total - bar.n)

    def _add(self, name: str, amount: int) -> int:
        """Add to a counter that all ranks share; return its new value."""
        return reach_ranks(lambda: self._store.add(name, amount))


@contextmanager
def joined(place: RankInfo) -> Iterator[TaskQueue]:
    """Join the other processes that the launcher's environment describes, over Gloo.

    From then on this process ends when the process that started it ends. If another process is
    lost, a watched process exits with status `LOST`.

    Raises:
        RunError: the others could not be reached in `MINUTES_TO_MEET`.
    """
    if WATCHED in os.environ:
        end_with_parent(signal.SIGKILL)
        if os.getppid() != int(os.environ[WATCHED]):  # the parent has already ended
            sys.exit(LOST)
    elif place.launcher not in ("", BY_HAND):
        end_with_parent(signal.SIGTERM)
    os.environ.update(place.variables())
    choose_interface(place)
    _divide_threads(place)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=MINUTES_TO_MEET)))
        dist.init_process_group(
            "gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=LONGEST_WAIT
        )
    except RuntimeError as error:
        raise RunError(
            f"process {place.rank} of {place.world_size} could not join the others at "
            f"{place.master_addr} port {place.master_port}: {str(error).splitlines()[0]}; check "
            "that process 0 runs there, that no other program uses the port, and that no firewall "
            "blocks it"
        ) from error
    ranks = Ranks(
        place.rank,
        place.world_size,
        place.local_rank,
        control=dist.group.WORLD,
        launcher=place.launcher,
    )
    try:
        yield TaskQueue(ranks, dist.PrefixStore("evaluation", store))
        ranks.gather(None)  # the store lives in rank 0: nobody leaves while others still use it
    except RankLostError:
        if WATCHED in os.environ:
            sys.exit(LOST)
        raise
    finally:
        dist.destroy_process_group()


def _divide_threads(place: RankInfo) -> None:
    """Divide the host's cores among its processes, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ and place.local_size:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_size))


def num_processes(wanted: int, device: str) -> int:
    """Return the number of processes to start: `wanted`, or by default one per GPU (CPU: one).

    Raises:
        UserError: there are fewer GPUs, or `device` names a single GPU.
    """
    if wanted < 0:
        raise UserError(f"--procs {wanted} must be 1 or more; omit it for one per GPU")
    if device not in ("auto", "cuda"):
        if wanted > 1 and device != "cpu":
            raise UserError(
                f"--procs {wanted} on --device {device}, which is a single device; omit --device "
                "to give each process a GPU"
            )
        return wanted or 1
    num_gpus = count_gpus()
    check_procs(wanted, num_gpus)
    return wanted or num_gpus or 1


IMAGES_PER_PROCESS = 2
"""Minimum: with fewer, starting another process takes longer than it saves."""


def worth_starting(wanted: int, num_images: int) -> int:
    """Return how many of the `wanted` processes are worth starting on a CPU."""
    return max(1, min(wanted, num_images // IMAGES_PER_PROCESS))


def run_processes(count: int, command: Sequence[str]) -> int:
    """Run `command` in `count` processes that find each other; return the exit status.

    All of them have ended when this returns or raises.

    Raises:
        RunError: one of them was killed, or they lost each other.
    """
    # In sessions of their own, so that CTRL+C reaches only this process.
    return _run_watched(
        count, lambda variables: subprocess.Popen(command, env=variables, start_new_session=True)
    )


def fork_processes(count: int, work: Callable[[], int]) -> int:
    """Like `run_processes`, but call `work` in forks, which share what this process has loaded.

    For CPUs only: CUDA does not survive a fork. Neither do torch's threads, so this process must
    not have started any.
    """
    sys.stdout.flush()  # otherwise every fork would print the buffered output again
    sys.stderr.flush()
    return _run_watched(count, lambda variables: _Fork(work, variables))


class _Fork:
    """A fork of this process that calls `work`, with the `subprocess.Popen` methods used here."""

    def __init__(self, work: Callable[[], int], variables: dict[str, str]) -> None:
        self._pid = os.fork()
        self._status: int | None = None
        if self._pid == 0:
            os._exit(_work_in_fork(work, variables))

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; `None` while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def kill(self) -> None:
        """Kill it, unless it has already ended."""
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait until it has ended."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def _work_in_fork(work: Callable[[], int], variables: dict[str, str]) -> int:
    """Call `work` as in a process started with `variables`; flush and return the exit status."""
    status = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(variables)
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
        status = exit_status(work)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # a bug: no frame above may go on with the parent's work
        traceback.print_exc()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    return status


def _run_watched(
    count: int, start: Callable[[dict[str, str]], subprocess.Popen[bytes] | _Fork]
) -> int:
    """Start `count` processes, given their environments, and watch them until they end."""
    port = free_port()
    processes: list[subprocess.Popen[bytes] | _Fork] = []
    try:
        for rank in range(count):
            processes.append(start(_environment(rank, count, port)))
        return _outcome(processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LOCAL_SIZE", "CROSS_SIZE")
    }
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    variables.setdefault("OMP_NUM_THREADS", str(threads))
    variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
    variables.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no internal warnings from C++
    take_slice(rank, variables)
    place = RankInfo(rank, count, rank, "", "127.0.0.1", port)
    return {
        **variables,
        **place.variables(),
        "LOCAL_WORLD_SIZE": str(count),
        WATCHED: str(os.getpid()),
    }


def _outcome(processes: Sequence[subprocess.Popen[bytes] | _Fork]) -> int:
    """Wait until all have succeeded or one has failed, which has then printed its own message."""
    while True:
        statuses = [process.poll() for process in processes]
        if all(status == 0 for status in statuses):
            return 0
        if any(statuses):
            return _cause(processes)
        time.sleep(0.05)


def _cause(processes: Sequence[subprocess.Popen[bytes] | _Fork]) -> int:
    """Return the status of the process that failed first.

    The others fail with `LOST` as a consequence, and may be seen to end before it.
    """
    deadline = time.monotonic() + SECONDS_FOR_THE_CAUSE
    while time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            status = process.poll()
            if status is not None and status < 0:
                raise RunError(
                    f"process {rank + 1} of {len(processes)} was killed by "
                    f"{_signal_name(-status)}; if memory ran out, start fewer with --procs"
                )
            if status not in (None, 0, LOST):
                return status
        time.sleep(0.05)
    raise RunError("the processes lost contact with each other; try again, or use --procs 1")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
