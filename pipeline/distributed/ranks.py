"""This process among the others: the process group, and what ranks do together."""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from pipeline.cli import RunError, UserError
from pipeline.distributed.affinity import bind_to_cores
from pipeline.distributed.gpus import has_slice, is_cpu_wanted, refuse_old_gpu, torch_gpus
from pipeline.distributed.launcher import (
    BY_HAND,
    GUARDED,
    Place,
    choose_interface,
    end_with_parent,
    find_place,
    gpu_of,
)

LAUNCHER = "VASTSCALE_LAUNCHER_PID"
"""Environment variable with the process that started the ranks; they stop when it is gone."""

Result = TypeVar("Result")


class RankLostError(RunError, RuntimeError):
    """Another rank has ended while this one waited for it."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others. By default it is alone and needs no process group."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = (
        None  # over Gloo: flags between hosts, never a synchronisation with the GPU
    )
    launcher: str = ""  # that started the ranks, for people
    interface: str = ""  # of the network to other hosts, where it was chosen here
    timeout: timedelta = timedelta(minutes=10)  # of `control`

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def apart(self) -> Ranks:
        """The same ranks with a control group of their own, for a thread beside the main one; all
        make it together.

        A group's collectives must come in the same order on every rank, so two threads cannot share
        one.
        """
        control = (
            None if self.world_size == 1 else dist.new_group(backend="gloo", timeout=self.timeout)
        )
        return replace(self, control=control)

    def gather(self, value: Any) -> list[Any]:
        """`value` (any picklable object) of every rank, in rank order, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        reach_ranks(lambda: dist.all_gather_object(values, value, group=self.control))
        return values

    def agree(self, value: Any) -> Any:
        """The first rank's `value`, on every rank."""
        if self.control is None:
            return value
        values = [value]
        reach_ranks(lambda: dist.broadcast_object_list(values, src=0, group=self.control))
        return values[0]

    def on_all_ranks(self, action: Callable[[], Result]) -> Result:
        """Run `action`, which waits for no other rank, on every rank; return its value if it went
        well on all.

        Otherwise the first complaint is raised on the first rank, as the `UserError` (also for a
        disk's) or `RunError` that it was, and the others exit with its status.
        """
        complaint, result = None, None
        try:
            result = action()
        except (UserError, RunError) as error:
            complaint = (str(error), isinstance(error, UserError))
        except OSError as error:
            complaint = (f"{error.filename or 'disk'}: {error.strerror or error}", True)
        complaints = [complaint for complaint in self.gather(complaint) if complaint]
        if complaints:
            text, is_input = complaints[0]
            if self.is_first:
                raise UserError(text) if is_input else RunError(text)
            sys.exit(2 if is_input else 1)
        return cast(Result, result)

    def sees_folder(self, folder: Path, seconds: float = 0) -> bool:
        """Whether this rank sees the `folder` of the first rank, where it exists; all ranks call it
        together.

        A file that the first rank makes for a moment decides: the names of hosts, paths and mounts
        tell nothing, and a name that was never asked for is in no cache of a shared disk. Others
        look for it for up to `seconds`.
        """
        if self.world_size == 1:
            return True
        mark = self.agree(folder / f".vastscale-{uuid.uuid4().hex}")
        self.on_all_ranks(lambda: mark.touch() if self.is_first else None)
        try:
            deadline = time.monotonic() + seconds
            while not (is_seen := mark.exists()) and time.monotonic() < deadline:
                time.sleep(0.2)
            self.gather(None)  # all have looked
        finally:
            if self.is_first:
                mark.unlink(missing_ok=True)
        return is_seen


def reach_ranks(action: Callable[[], Result]) -> Result:
    """The value of `action`, which talks to other ranks; `RankLostError` where one is gone."""
    try:
        return action()
    except RuntimeError as error:  # DistError is one; Gloo's own are nothing else
        # The supervisor knows by these words that another rank is the cause.
        raise RankLostError(
            "another rank has ended or does not answer; see what it reported "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def start_distributed(timeout_minutes: float = 10) -> Ranks:
    """Join the process group that the launcher's environment describes; alone where there is none.

    NCCL between GPUs, Gloo between CPUs. When the launcher dies, this process gets SIGTERM.
    `UserError` for an environment that is partially set and for a GPU that cannot be used,
    `RunError` if the ranks do not find each other.
    """
    place = find_place()
    os.environ.update(place.variables())
    if LAUNCHER in os.environ or place.launcher not in ("", BY_HAND):
        # One whose guard is gone cannot save, for all others are ended; and a stopped one would not
        # end by SIGTERM.
        end_with_parent(signal.SIGKILL if GUARDED in os.environ else signal.SIGTERM)
    interface = choose_interface(place)
    device = _device(place)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        bind_to_cores(place, device.index, torch.cuda.device_count())
        if place.world_size == 1:
            os.environ.setdefault(
                "NCCL_SOCKET_IFNAME", "lo"
            )  # alone, in a sandbox perhaps without any other
    timeout = timedelta(minutes=timeout_minutes)
    # Bound to its GPU, NCCL fails here and not in the first step. Alone there is no one to reach.
    # NCCL takes two MIG devices of a GPU for the same one and refuses (NVIDIA/nccl #1716).
    by_nccl = device.type == "cuda" and not (has_slice() and place.world_size > 1)
    bound = device if by_nccl and place.world_size > 1 else None
    try:
        dist.init_process_group("nccl" if by_nccl else "gloo", timeout=timeout, device_id=bound)
        control = dist.new_group(backend="gloo", timeout=timeout)
    except dist.DistError as error:
        raise RunError(
            f"rank {place.rank} of {place.world_size} ({place.launcher or 'alone'}) could not join "
            "the "
            f"others at {place.master_addr} port {place.master_port}: "
            f"{str(error).splitlines()[0]}; see "
            "that rank 0 runs there, that no other program has the port, and that no firewall is "
            "between"
        ) from error
    return Ranks(
        place.rank,
        place.world_size,
        place.local_rank,
        device,
        control,
        place.launcher,
        interface,
        timeout,
    )


def _device(place: Place) -> torch.device:
    """This rank's GPU, or the CPU where the machine has none or it is insisted on; never silently
    instead of a GPU."""
    if is_cpu_wanted() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return torch.device("cpu")
    try:
        count = torch_gpus()
    except UserError:
        if place.local_rank == 0:  # one of each host says it
            raise
        sys.exit(2)
    if not count:
        return torch.device("cpu")
    device = torch.device("cuda", gpu_of(place, count))
    refuse_old_gpu(device.index)
    torch.cuda.set_device(device)
    for name in (
        "LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ):  # by which DeepSpeed would choose another one
        if name in os.environ:
            os.environ[name] = str(device.index)
    return device


def stop_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
