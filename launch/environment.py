"""What every rank finds in its environment. Needs no torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

STALE_LOCK_SECONDS = 600


def prepare(num_processes: int, *, on_gpu: bool) -> dict[str, str]:
    """The environment for `num_processes` ranks on this machine; what the user has set stays."""
    environment = dict(os.environ)
    if "TORCH_EXTENSIONS_DIR" not in environment:
        environment["TORCH_EXTENSIONS_DIR"] = str(_extensions_dir())
    _clear_stale_locks(Path(environment["TORCH_EXTENSIONS_DIR"]))
    environment["VASTSCALE_LAUNCHER_PID"] = str(os.getpid())
    threads = 4 if on_gpu else max(1, len(os.sched_getaffinity(0)) // num_processes)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of addresses that have no name
    environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # numbers GPUs as nvidia-smi does
    if not on_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    elif environment.get("CUDA_VISIBLE_DEVICES"):  # the launcher takes these GPUs and no others
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(environment["CUDA_VISIBLE_DEVICES"].split(",")[:num_processes])
    return environment


def may_have_gpu() -> bool:
    """Whether there are signs of a GPU on this machine."""
    return bool(shutil.which("nvidia-smi")) or Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()


def num_gpus() -> int:
    """GPUs that torch can use here. Torch is asked only where there may be one: importing it takes seconds."""
    if not may_have_gpu():
        return 0
    import torch

    return torch.cuda.device_count()


def _extensions_dir() -> Path:
    """For kernels that torch and DeepSpeed build on first use: private to this environment, its versions, this host."""
    try:
        deepspeed = version("deepspeed")
    except PackageNotFoundError:
        deepspeed = "none"
    name = f"{platform.node()}-torch{version('torch')}-ds{deepspeed}"
    if os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "torch_extensions" / name
    return Path.home() / ".cache" / "vastscale" / f"{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}-{name}"


def _clear_stale_locks(directory: Path) -> None:
    """A build that was killed leaves a lock for which every later one would wait for ever, in silence."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".clearing", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for lock in directory.rglob("lock"):
            if time.time() - lock.stat().st_mtime > STALE_LOCK_SECONDS or not _is_building(lock.parent):
                lock.unlink(missing_ok=True)


def _is_building(directory: Path) -> bool:
    """Whether a live process works on `directory`: ninja, which torch starts there, runs with it as its own folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == directory.resolve():
                return True
        except OSError:
            continue
    return False
