"""Where a network computes, and how much memory is free there. torch is imported only where a GPU
may take part."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import psutil

from pipeline.cli import UserError
from pipeline.distributed.gpus import may_have_gpu, torch_gpus
from pipeline.distributed.launcher import RankInfo, gpu_of

_CGROUP = Path("/sys/fs/cgroup")


class Device(NamedTuple):
    """A device by torch's names, such as cpu and cuda:1; `torch.device(str(device))` is torch's
    own."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


CPU = Device("cpu")


def choose_device(name: str) -> Device:
    """The device of that name; "auto" is the GPU where there is one. `UserError` for one that
    cannot be used."""
    if name == "auto":
        return Device("cuda") if _gpus() else CPU
    if name == "cpu":
        return CPU
    import torch

    try:
        place = torch.device(name)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"no device {name!r} here ({reason}); choose from auto, cpu, cuda"
        ) from error
    return Device(place.type, place.index)


def device_at(place: RankInfo, name: str) -> Device:
    """`choose_device` for one process of several: "auto" and "cuda" are then the GPU of its own."""
    if place.world_size == 1:
        return choose_device(name)
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device {name} for {place.world_size} processes; leave --device out for one GPU "
            "per process"
        )
    count = _gpus() if name != "cpu" else 0
    if not count:
        return choose_device(name)
    import torch

    own = Device("cuda", gpu_of(place, count))
    torch.cuda.set_device(own.index)
    return own


def _gpus() -> int:
    """How many GPUs there are. Torch, whose import takes a second, is asked only where there are
    signs of one."""
    return torch_gpus() if may_have_gpu() or "torch" in sys.modules else 0


def free_bytes(device: Device = CPU) -> int:
    """Bytes that are free on the device now; on a CPU those that the container may still take, if
    it is in one."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(torch.device(str(device)))[0]
    return min(psutil.virtual_memory().available, _free_in_container())


def _free_in_container() -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        cached = [
            line.split()[1]
            for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
            if line.startswith("inactive_file ")
        ]
        return (int(limit) if limit != "max" else 1 << 62) - used + int(cached[0])
    except (OSError, ValueError, IndexError):
        return 1 << 62  # no limit that can be read
