"""This process among the others: the process group, and what ranks do together."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from pipeline.cli import UserError

LAUNCHER = "VASTSCALE_LAUNCHER_PID"
"""Environment variable with the process that started the ranks; they stop when it is gone."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup  # over Gloo: flags between hosts, never a synchronisation with the GPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` (any picklable object) of every rank, in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, value: Any) -> Any:
        """The first rank's `value`, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def together(self, action: Callable[[], Result]) -> Result:
        """Run `action`, which waits for no other rank, on every rank; return its value if it went well on all.

        Otherwise the first complaint is raised as `UserError` on the first rank, and the others exit with its status.
        """
        complaint, result = "", None
        try:
            result = action()
        except UserError as error:
            complaint = str(error)
        except OSError as error:
            complaint = f"{error.filename or 'disk'}: {error.strerror or error}"
        complaints = [complaint for complaint in self.gather(complaint) if complaint]
        if complaints and self.is_first:
            raise UserError(complaints[0])
        if complaints:
            sys.exit(2)
        return cast(Result, result)


def start_distributed(timeout_minutes: float = 10) -> Ranks:
    """Join the process group that RANK, WORLD_SIZE and LOCAL_RANK describe; alone where they are not set.

    NCCL between GPUs, Gloo between CPUs. When the launcher dies, this process is told to stop (SIGTERM).
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if LAUNCHER in os.environ or world_size > 1:
        _stop_with_parent()
    if world_size == 1:
        os.environ.setdefault("MASTER_PORT", "0")  # any free one
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(local_rank)
    deepspeed = _import_deepspeed(has_gpu)
    timeout = timedelta(minutes=timeout_minutes)
    deepspeed.init_distributed(dist_backend="nccl" if has_gpu else "gloo", timeout=timeout, verbose=False)
    control = dist.new_group(backend="gloo", timeout=timeout)
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    return Ranks(rank, world_size, local_rank, device, control)


def stop_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _import_deepspeed(has_gpu: bool) -> Any:
    if not has_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for handler in deepspeed.utils.logger.handlers:
        handler.setLevel(logging.ERROR)
    # Its shared-memory collectives between CPU ranks are C++ built on first use, under a lock that a killed process
    # leaves behind for ever. Gloo does the same work without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _stop_with_parent() -> None:
    """Ask Linux for SIGTERM when the launcher that started us is gone, so that no rank trains on as an orphan."""
    pr_set_pdeathsig = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
