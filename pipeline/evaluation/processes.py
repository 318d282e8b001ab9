"""`evaluate.py --procs N`: start the processes, watch them, and say why one has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from pipeline.cli import RunError, UserError, bar_options
from pipeline.distributed.launcher import BY_HAND, Place, choose_interface, end_with_parent, free_port

# The processes that evaluate together: they take images from one queue, and the first one has it all in the end.


WATCHED = "VASTSCALE_EVALUATION_PARENT"
"""Environment variable of a process that `processes.py` started and watches: the id of the one that did."""
LOST = 70
"""Exit status of a watched process that lost another one: whoever watches knows the cause."""
MINUTES_TO_MEET = 10
LONGEST_WAIT = timedelta(days=7)  # for the last image of another process; one that is gone is noticed at once
SECONDS_BETWEEN_LOOKS = 0.5

Result = TypeVar("Result")


class Alone:
    """One process that does everything."""

    size = 1
    is_first = True

    def together(self, action: Callable[[], Result]) -> Result:
        """The value of `action`; `UserError` where the disk fails it."""
        try:
            return action()
        except OSError as error:
            raise _of_disk(error) from error

    def agree(self, value: Result) -> Result:
        """The first process's value."""
        return value

    def gather(self, value: Result) -> list[Result]:
        """The value of every process."""
        return [value]

    def run(self, action: Callable[[int], None], tasks: Sequence[int], title: str) -> None:
        """Do `action` for every task, under a progress bar."""
        def work() -> None:
            for task in tqdm(tasks, desc=title, unit="image", **bar_options()):
                action(task)

        self.together(work)


class Crew:
    """This process among several; `joined` makes one. All of them call the same methods in the same order."""

    def __init__(self, place: Place, store: dist.Store) -> None:
        self.size = place.world_size
        self.is_first = place.rank == 0
        self._store = store

    def together(self, action: Callable[[], Result]) -> Result:
        """The value of `action`, which waits for no other process, if it went well in all of them.

        Otherwise the complaint of the lowest rank is raised in the first process, and the others exit with its status.
        """
        complaint, result = None, None
        try:
            result = action()
        except (UserError, RunError) as error:
            complaint = error
        except OSError as error:
            complaint = _of_disk(error)
        if complaint is not None:
            self._add("failed", 1)  # so that the others take no more tasks
        found: list[Any] = [None] * self.size
        self._reach(lambda: dist.all_gather_object(found, complaint))
        first = next((complaint for complaint in found if complaint is not None), None)
        if first is None:
            return result  # type: ignore[return-value]
        if self.is_first:
            raise first
        sys.exit(2 if isinstance(first, UserError) else 1)

    def agree(self, value: Result) -> Result:
        """The first process's value, in all of them."""
        values = [value]
        self._reach(lambda: dist.broadcast_object_list(values, src=0))
        return values[0]

    def gather(self, value: Result) -> list[Result]:
        """The value of every process, in the first; nothing in the others."""
        values: list[Any] | None = [None] * self.size if self.is_first else None
        self._reach(lambda: dist.gather_object(value, values, dst=0))
        return values or []

    def run(self, action: Callable[[int], None], tasks: Sequence[int], title: str) -> None:
        """Do `action` for every task, each in one process, until all are done or a process has failed.

        Who is ready takes the next one. The first process shows how many all have done.
        """
        def work() -> None:
            while not self._add("failed", 0) and (taken := self._add("taken", 1)) <= len(tasks):
                action(tasks[taken - 1])
                self._add("done", 1)

        with self._progress(len(tasks), title):
            self.together(work)

    @contextmanager
    def _progress(self, total: int, title: str) -> Iterator[None]:
        if not self.is_first:
            yield
            return
        over = threading.Event()
        with tqdm(total=total, desc=title, unit="image", **bar_options()) as bar:
            def follow() -> None:
                with suppress(RunError):  # the other thread will run into it, too
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
        return self._reach(lambda: self._store.add(name, amount))

    def _reach(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except RuntimeError as error:  # DistError is one; Gloo's own are nothing else
            if WATCHED in os.environ:
                sys.exit(LOST)
            raise RunError("another process of this evaluation has ended before its time; see what it said "
                           f"({str(error).splitlines()[0]})") from error


@contextmanager
def joined(place: Place) -> Iterator[Crew]:
    """Meet the other processes that the launcher's environment describes, over Gloo; end with who started this one."""
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
        dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size,
                                timeout=LONGEST_WAIT)
    except RuntimeError as error:
        raise RunError(f"process {place.rank} of {place.world_size} could not join the others at {place.master_addr} "
                       f"port {place.master_port}: {str(error).splitlines()[0]}; see that the first one runs there, "
                       "that no other program has the port, and that no firewall is between") from error
    try:
        yield Crew(place, dist.PrefixStore("evaluation", store))
        dist.barrier()  # none leaves while another still asks
    finally:
        dist.destroy_process_group()


def _divide_threads(place: Place) -> None:
    """The processes of a host share its cores, unless it is said how many threads each has."""
    if "OMP_NUM_THREADS" not in os.environ and place.local_size:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_size))


def _of_disk(error: OSError) -> UserError:
    return UserError(f"{error.filename or 'disk'}: {error.strerror or error}; mend that and start again")


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
    port = free_port()
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


