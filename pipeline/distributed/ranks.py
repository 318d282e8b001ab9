"""The process group: this rank's number and device, and operations of all ranks together."""

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
    LAUNCHER,
    RankInfo,
    choose_interface,
    end_with_parent,
    find_rank_info,
    gpu_of,
)

Result = TypeVar("Result")


class RankLostError(RunError, RuntimeError):
    """Another rank has ended while this one waited for it."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks. By default it is alone and has no process group."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # Gloo group for flags between hosts; its operations never synchronise with the GPU.
    control: dist.ProcessGroup | None = None
    launcher: str = ""  # name of what started the ranks, for messages
    interface: str = ""  # network interface to other hosts, if it was chosen here
    timeout: timedelta = timedelta(minutes=10)  # of `control`

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def with_own_group(self) -> Ranks:
        """Return the same ranks with another control group, for use in a background thread.

        A group's collectives must come in the same order on every rank, so two threads cannot share
        one. All ranks call it together.
        """
        control = (
            None if self.world_size == 1 else dist.new_group(backend="gloo", timeout=self.timeout)
        )
        return replace(self, control=control)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value` (any picklable object), in rank order, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        reach_ranks(lambda: dist.all_gather_object(values, value, group=self.control))
        return values

    def agree(self, value: Any) -> Any:
        """Return the first rank's `value` on every rank."""
        if self.control is None:
            return value
        values = [value]
        reach_ranks(lambda: dist.broadcast_object_list(values, src=0, group=self.control))
        return values[0]

    def on_all_ranks(self, action: Callable[[], Result]) -> Result:
        """Run `action` on every rank and return its value if it succeeded on all of them.

        `action` must not wait for other ranks. Otherwise the first failure is raised on the first
        rank, as `UserError` (which includes `OSError`s) or `RunError`, and the other ranks exit
        with its status.
        """
        # These are errors that a user can do something about, so one rank's message is enough. Any
        # other exception is a bug: this rank ends with its traceback, and the others notice that in
        # `reach_ranks`.
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
            # Exit silently, because the first rank prints the message.
            sys.exit(2 if is_input else 1)
        return cast(Result, result)

    def sees_folder(self, folder: Path, seconds: float = 0) -> bool:
        """Whether this rank sees the first rank's `folder`; all ranks call it together.

        The first rank creates a file for a moment, and the others look for it for up to `seconds`.
        Names of hosts, paths and mounts prove nothing, whereas a new file name cannot be in a
        shared disk's cache.
        """
        if self.world_size == 1:
            return True
        mark = self.agree(folder / f".vastscale-{uuid.uuid4().hex}")
        self.on_all_ranks(lambda: mark.touch() if self.is_first else None)
        try:
            deadline = time.monotonic() + seconds
            while not (is_seen := mark.exists()) and time.monotonic() < deadline:
                time.sleep(0.2)
            # Wait until all have looked, before the file is removed.
            self.gather(None)
        finally:
            if self.is_first:
                mark.unlink(missing_ok=True)
        return is_seen


def reach_ranks(action: Callable[[], Result]) -> Result:
    """Return the value of `action`, which communicates with other ranks.

    Raises `RankLostError` if one of them is gone.
    """
    try:
        return action()
    except RuntimeError as error:  # includes DistError; Gloo raises plain RuntimeErrors
        # From these words the supervisor recognises that another rank is the cause.
        raise RankLostError(
            "another rank has ended or does not answer; see what it reported "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def start_distributed(timeout_minutes: float = 10) -> Ranks:
    """Join the process group that the launcher's environment describes, or work alone without one.

    Uses NCCL between GPUs and Gloo between CPUs. When the launcher dies, this process gets SIGTERM.
    Raises `UserError` for a partially set environment and for a GPU that cannot be used, `RunError`
    if the ranks do not find each other.
    """
    info = find_rank_info()
    # Slurm and Open MPI have other names for what torch, DeepSpeed and Accelerate read from these
    # variables.
    os.environ.update(info.variables())
    if LAUNCHER in os.environ or info.launcher not in ("", BY_HAND):
        # SIGKILL under a guard: without it a rank cannot save, because all others are ended as
        # well, and a stopped process would not react to SIGTERM.
        end_with_parent(signal.SIGKILL if GUARDED in os.environ else signal.SIGTERM)
    # Before the groups are made: by itself Gloo uses the address that the host's own name resolves
    # to, on Debian 127.0.1.1, where no other host can connect.
    interface = choose_interface(info)
    device = _device(info)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        bind_to_cores(info, device.index, torch.cuda.device_count())
        if info.world_size == 1:
            # NCCL needs an interface even for one process; a sandbox may have only loopback.
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    timeout = timedelta(minutes=timeout_minutes)
    # With device_id, NCCL connects (and fails) here and not in the first step; with one rank there
    # is nothing to connect. NCCL takes two MIG devices of one GPU for the same device and refuses
    # them (NVIDIA/nccl #1716).
    by_nccl = device.type == "cuda" and not (has_slice() and info.world_size > 1)
    bound = device if by_nccl and info.world_size > 1 else None
    try:
        dist.init_process_group("nccl" if by_nccl else "gloo", timeout=timeout, device_id=bound)
        # Flags must not travel over NCCL, which would queue them behind the GPU's work.
        control = dist.new_group(backend="gloo", timeout=timeout)
    except dist.DistError as error:
        raise RunError(
            f"rank {info.rank} of {info.world_size} ({info.launcher or 'alone'}) could not join "
            f"the others at {info.master_addr} port {info.master_port}: "
            f"{str(error).splitlines()[0]}; check that rank 0 runs there, that no other program "
            "uses the port, and that no firewall blocks it"
        ) from error
    return Ranks(
        info.rank,
        info.world_size,
        info.local_rank,
        device,
        control,
        info.launcher,
        interface,
        timeout,
    )


def _device(info: RankInfo) -> torch.device:
    """Return this rank's GPU, or the CPU if it was requested or the machine has no GPU.

    Raises `UserError` (on each host's first rank; others exit) for a GPU that cannot be used.
    """
    if is_cpu_wanted() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return torch.device("cpu")
    try:
        count = torch_gpus()
    except UserError:
        if info.local_rank == 0:  # one rank per host reports it
            raise
        sys.exit(2)
    if not count:
        return torch.device("cpu")
    device = torch.device("cuda", gpu_of(info, count))
    refuse_old_gpu(device.index)
    torch.cuda.set_device(device)
    # DeepSpeed would choose another GPU by these.
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in os.environ:
            os.environ[name] = str(device.index)
    return device


def stop_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
