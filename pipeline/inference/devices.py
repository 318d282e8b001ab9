"""The device that a network runs on, and its free memory.

torch is imported only if a GPU may be involved.
"""

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
    """A device, named as in torch (cpu, cuda:1), so that `torch.device(str(device))` works."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


CPU = Device("cpu")


def choose_device(name: str) -> Device:
    """Return the named device; "auto" is the GPU if there is one.

    Raises:
        UserError: the device cannot be used here.
    """
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
    """Like `choose_device`, for one of several processes: "auto" and "cuda" mean its own GPU."""
    if place.world_size == 1:
        return choose_device(name)
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device {name} is one device for {place.world_size} processes; omit --device to use "
            "one GPU per process"
        )
    count = _gpus() if name != "cpu" else 0
    if not count:
        return choose_device(name)
    import torch

    own = Device("cuda", gpu_of(place, count))
    torch.cuda.set_device(own.index)
    return own


def _gpus() -> int:
    """Return the number of GPUs.

    Importing torch takes a second, so it is asked only if there are signs of a GPU.
    """
    return torch_gpus() if may_have_gpu() or "torch" in sys.modules else 0


def free_bytes(device: Device = CPU) -> int:
    """Return the bytes that are free on the device now; in a container, those within its limit."""
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
        return 1 << 62  # no readable limit
