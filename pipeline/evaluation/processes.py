"""The processes that evaluate together: started and watched by `evaluate.py --procs N`, or by a
launcher.

`run_processes` starts them for GPUs, `fork_processes` for CPUs, and both say why one has ended.
`joined` makes one of them a rank among the others. They take images from one `TaskQueue`, and the
first one has everything in the end.
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
from pipeline.distributed.gpus import count_gpus, take_slice
from pipeline.distributed.launcher import (
    BY_HAND,
    RankInfo,
    choose_interface,
    end_with_parent,
    free_port,
)
from pipeline.distributed.ranks import RankLostError, Ranks, reach_ranks

WATCHED = "VASTSCALE_EVALUATION_PARENT"
"""Environment variable of a process that `run_processes` started and watches: the id of the one
that did."""
LOST = 70
"""Exit status of a watched process that lost another one: whoever watches knows the cause."""
MINUTES_TO_MEET = 10
LONGEST_WAIT = timedelta(
    days=7
)  # for the last image of another process; one that is gone is noticed at once
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_FOR_THE_CAUSE = (
    3.0  # how much later than its effect on others the end of a process may be seen
)


class TaskQueue:
    """Tasks shared out among ranks: whoever is ready takes the next one. All ranks call it
    together.

    Args:
        ranks: this process among the others.
        store: numbers that all ranks share; `None` where there is one rank.
    """

    def __init__(self, ranks: Ranks, store: dist.Store | None = None) -> None:
        self.ranks = ranks
        self._store = store

    def run(self, action: Callable[[int], None], tasks: Sequence[int], title: str) -> None:
        """Do `action` for every task, each in one process, until all are done or a process has
        failed.

        The first process shows under a progress bar how many all have done.
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
                with suppress(RankLostError):  # the other thread will run into it, too
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
        """Add to a number that all share; what it is then."""
        return reach_ranks(lambda: self._store.add(name, amount))


@contextmanager
def joined(place: RankInfo) -> Iterator[TaskQueue]:
    """Meet the other processes that the launcher's environment describes, over Gloo; end with who
    started this one.

    Where another process is lost, a watched one exits with `LOST`.
    """
    if WATCHED in os.environ:
        end_with_parent(signal.SIGKILL)
        if os.getppid() != int(os.environ[WATCHED]):  # gone meanwhile
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
            f"{place.master_addr} "
            f"port {place.master_port}: {str(error).splitlines()[0]}; see that the first one runs "
            "there, "
            "that no other program has the port, and that no firewall is between"
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
        ranks.gather(None)  # none leaves while another still asks
    except RankLostError:
        if WATCHED in os.environ:
            sys.exit(LOST)
        raise
    finally:
        dist.destroy_process_group()


def _divide_threads(place: RankInfo) -> None:
    """The processes of a host share its cores, unless it is said how many threads each has."""
    if "OMP_NUM_THREADS" not in os.environ and place.local_size:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_size))


def num_processes(wanted: int, device: str) -> int:
    """How many processes evaluate: `wanted`, 0 being one for every GPU that `device` may mean, and
    else one.

    `UserError` where there are fewer GPUs, or where `device` is one GPU.
    """
    if wanted < 0:
        raise UserError(f"--procs {wanted} must be 1 or more; leave it out for one per GPU")
    if device not in ("auto", "cuda"):
        if wanted > 1 and device != "cpu":
            raise UserError(
                f"--procs {wanted} on --device {device}, which is one device; leave --device out "
                "for a GPU "
                "each"
            )
        return wanted or 1
    num_gpus = count_gpus()
    if num_gpus and wanted > num_gpus:
        raise UserError(
            f"--procs {wanted}: this machine has {num_gpus} GPU{'s' if num_gpus > 1 else ''}; one "
            "process "
            "per GPU is the most"
        )
    return wanted or num_gpus or 1


IMAGES_PER_PROCESS = 2
"""At least, or one process more takes longer to start than it saves."""


def worth_starting(wanted: int, num_images: int) -> int:
    """How many of `wanted` processes are worth their start on a CPU."""
    return max(1, min(wanted, num_images // IMAGES_PER_PROCESS))


def run_processes(count: int, command: Sequence[str]) -> int:
    """Run `command` in `count` processes that find each other, to the end. Returns the exit status.

    `RunError` where one of them was killed. All are ended before this returns or raises.
    """
    # In sessions of their own, so that CTRL+C reaches this process alone.
    return _watched(
        count, lambda variables: subprocess.Popen(command, env=variables, start_new_session=True)
    )


def fork_processes(count: int, work: Callable[[], int]) -> int:
    """As `run_processes`, with `work` in forks of this process, which have imported and read what
    it has.

    For CPUs: CUDA does not live through a fork, and neither do torch's threads, of which this
    process must not have started any.
    """
    sys.stdout.flush()  # or every fork would print what waits there
    sys.stderr.flush()
    return _watched(count, lambda variables: _Fork(work, variables))


class _Fork:
    """A fork of this process that does `work`, with what `_watched` asks of a
    `subprocess.Popen`."""

    def __init__(self, work: Callable[[], int], variables: dict[str, str]) -> None:
        self._pid = os.fork()
        self._status: int | None = None
        if self._pid == 0:
            os._exit(_work_in_fork(work, variables))

    def poll(self) -> int | None:
        """The exit status, negative for a signal; `None` while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def kill(self) -> None:
        """End it, unless it has ended."""
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> None:
        """Until it has ended."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def _work_in_fork(work: Callable[[], int], variables: dict[str, str]) -> int:
    """Be what a process started with `variables` would be; the exit status, all output being
    flushed."""
    status = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(variables)
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
        status = exit_status(work)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except (
        BaseException
    ):  # our own mistake: nothing above this frame may go on with the parent's work
        traceback.print_exc()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    return status


def _watched(count: int, start: Callable[[dict[str, str]], subprocess.Popen[bytes] | _Fork]) -> int:
    """Start `count` processes, by their environments, and watch them to the end."""
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
    variables.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's own notes to its developers
    take_slice(rank, variables)
    place = RankInfo(rank, count, rank, "", "127.0.0.1", port)
    return {
        **variables,
        **place.variables(),
        "LOCAL_WORLD_SIZE": str(count),
        WATCHED: str(os.getpid()),
    }


def _outcome(processes: Sequence[subprocess.Popen[bytes] | _Fork]) -> int:
    """Wait until all have ended well, or one has not; what it said is on the screen already."""
    while True:
        statuses = [process.poll() for process in processes]
        if all(status == 0 for status in statuses):
            return 0
        if any(statuses):
            return _cause(processes)
        time.sleep(0.05)


def _cause(processes: Sequence[subprocess.Popen[bytes] | _Fork]) -> int:
    deadline = time.monotonic() + SECONDS_FOR_THE_CAUSE
    while time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            status = process.poll()
            if status is not None and status < 0:
                raise RunError(
                    f"process {rank + 1} of {len(processes)} was ended by {_signal_name(-status)}; "
                    "if "
                    "memory ran out, start fewer with --procs"
                )
            if status not in (None, 0, LOST):
                return status
        time.sleep(0.05)
    raise RunError("the processes lost each other; start again, or use --procs 1")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
