"""What every rank finds in its environment. Needs no torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.cli import UserError

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


# `.deepspeed_env`: variables that every rank shall have, one `NAME=value` a line. Nothing in it can run anything.
#
# DeepSpeed pastes the file into a command line of every host, where a value of `$(command)` runs it, and fails at an
# empty line. Here it is read strictly, its values travel to the ranks as data, and DeepSpeed gets a file of our own.


ENV_FILE = ".deepspeed_env"
HANDED_ON = ("NCCL_", "GLOO_", "UCX_", "TORCH_", "OMP_NUM_THREADS", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "WANDB_")
"""Beginnings of the names that a run on many hosts takes over from the shell that starts it."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_VALUE = re.compile(r"[\w@%+=:,./ ^-]*", re.ASCII)
_RUNS_THINGS = re.compile(r"PATH|\w+_PATH|\w+_DIR|\w*HOME|LD_\w+|PYTHON\w*|BASH_ENV|ENV|IFS|SHELL\w*|PROMPT_COMMAND|"
                          r"CC|CXX|\w+_PLUGIN|\w+_LIBRAR(Y|IES)|\w*PRELOAD\w*|\w+_FLAGS|\w+_CONF")
_LAUNCHERS = re.compile(r"(LOCAL_|GROUP_|ROLE_|CROSS_)?(RANK|WORLD_SIZE|SIZE)|MASTER_(ADDR|PORT)|CUDA_VISIBLE_DEVICES|"
                        r"VASTSCALE_\w+|(SLURM|OMPI|PMIX|TORCHELASTIC|ACCELERATE)_\w+")


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a file; none where there is no file. `UserError` names the line that is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            name, sign, value = line.partition("=")
            _check(name.strip(), sign, value.strip(), f"{path}:{number}")
            found[name.strip()] = value.strip()
    return found


def _check(name: str, sign: str, value: str, where: str) -> None:
    if not sign or not _NAME.fullmatch(name):
        raise UserError(f"{where}: this is no NAME=value; write lines like NCCL_DEBUG=WARN")
    if not _VALUE.fullmatch(value):
        raise UserError(f"{where}: the value of {name} has characters that shells read (letters, digits, blanks and "
                        "@%+=:,./^_- are allowed); nothing in this file is ever run")
    if _RUNS_THINGS.fullmatch(name):
        raise UserError(f"{where}: {name} decides which programs run, and is not taken from a file; set it in the "
                        "login shell of each host")
    if _LAUNCHERS.fullmatch(name):
        raise UserError(f"{where}: {name} is the launcher's to set; for the first host's address and port say "
                        "--master-addr and --master-port, for GPUs --include")


def variables_for_ranks(files: list[Path], shell: Mapping[str, str]) -> dict[str, str]:
    """What every rank shall have: of the shell what is handed on, and over it the files', the last one's first."""
    found = {name: value for name, value in shell.items() if name.upper().startswith(HANDED_ON)}
    for file in files:
        found |= read_env_file(file)
    return found


# Command lines taken apart: which words are whose.


def without(arguments: Sequence[str], names: Collection[str], flags: Collection[str] = ()) -> list[str]:
    """`arguments` less the options `names`, each with its value, and the `flags`, which have none."""
    kept: list[str] = []
    rest: Iterator[str] = iter(arguments)
    for argument in rest:
        option, sign, _ = argument.partition("=")
        option = option.replace("_", "-")
        if option in flags:
            continue
        if option not in names:
            kept.append(argument)
        elif not sign:
            next(rest, None)
    return kept
