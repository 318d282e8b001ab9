"""Environment variables of the ranks, on one host and across hosts. Needs no torch.

`prepare` builds the environment of the ranks that start on this host. `variables_for_ranks`
collects the variables that every host gets: from the shell and from `.deepspeed_env`, a file of
`NAME=value` lines. DeepSpeed pastes that file into a command line on every host, where a value such
as `$(command)` would run, and it fails on an empty line. Here the file is parsed strictly, nothing
in it is ever executed, and DeepSpeed is given a file of ours instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from pipeline.cli import UserError
from pipeline.distributed.gpus import CPU, count_gpus
from pipeline.distributed.launcher import LAUNCHER
from pipeline.files import private_dir
from pipeline.installation import user_cache_dir
from pipeline.libraries import allocator_variables

STALE_LOCK_SECONDS = 600
ENV_FILE = ".deepspeed_env"
HANDED_ON = (
    "NCCL_",
    "GLOO_",
    "UCX_",
    "TORCH_",
    "OMP_NUM_THREADS",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "WANDB_",
)
"""Name prefixes of the variables that a multi-host run copies from the shell that starts it."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_VALUE = re.compile(r"[\w@%+=:,./ ^-]*", re.ASCII)
_RUNS_PROGRAMS = re.compile(
    r"PATH|\w+_PATH|\w+_DIR|\w*HOME|LD_\w+|PYTHON\w*|BASH_ENV|ENV|IFS|SHELL\w*|"
    r"PROMPT_COMMAND|CC|CXX|\w+_PLUGIN|\w+_LIBRAR(Y|IES)|\w*PRELOAD\w*|\w+_FLAGS|\w+_CONF"
)
_SET_BY_LAUNCHER = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|CROSS_)?(RANK|WORLD_SIZE|SIZE)|MASTER_(ADDR|PORT)|"
    r"CUDA_VISIBLE_DEVICES|VASTSCALE_\w+|(SLURM|OMPI|PMIX|TORCHELASTIC|ACCELERATE)_\w+"
)


def prepare(num_processes: int, *, on_gpu: bool) -> dict[str, str]:
    """Return the environment for `num_processes` ranks on this machine; the user's settings win."""
    environment = dict(os.environ)
    if "TORCH_EXTENSIONS_DIR" not in environment:
        environment["TORCH_EXTENSIONS_DIR"] = str(private_dir(_extensions_dir()))
    _clear_stale_locks(Path(environment["TORCH_EXTENSIONS_DIR"]))
    environment[LAUNCHER] = str(os.getpid())
    threads = 4 if on_gpu else max(1, len(os.sched_getaffinity(0)) // num_processes)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    # Without this torch warns about every address without a host name.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # number GPUs as nvidia-smi does
    if not on_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
        # The ranks read this variable. An empty CUDA_VISIBLE_DEVICES would not do: DeepSpeed's
        # launcher rejects an empty list of GPUs, and otherwise fills the list itself.
        environment[CPU] = "1"
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        return environment | allocator_variables(environment)
    # Expandable segments reduce fragmentation, since validation images of all sizes, DALI's pool
    # and the training steps share one GPU.
    if not environment.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if environment.get("CUDA_VISIBLE_DEVICES"):  # the launcher takes these GPUs and no others
        gpus = environment["CUDA_VISIBLE_DEVICES"].split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[:num_processes])
    return environment


def num_gpus() -> int:
    """Return the number of GPUs (or MIG devices) that torch can use here.

    Imports torch, which takes seconds, only if there may be a GPU. Raises `UserError` if the
    machine has GPUs that torch cannot use, unless the user has chosen the CPU.
    """
    return count_gpus()


def variables_for_ranks(files: Sequence[Path], shell: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that every rank gets: the shell's, overridden by `files` in order."""
    found = {name: value for name, value in shell.items() if name.upper().startswith(HANDED_ON)}
    for file in files:
        found |= read_env_file(file)
    return found


def read_env_file(path: Path) -> dict[str, str]:
    """Parse a file of `NAME=value` lines; empty if it does not exist. `UserError` names a bad
    line."""
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
            name, sign, value = (part.strip() for part in line.partition("="))
            _check_variable(name, sign, value, f"{path}:{number}")
            found[name] = value
    return found


def without(
    arguments: Sequence[str], names: Collection[str], flags: Collection[str] = ()
) -> list[str]:
    """Return `arguments` without the options in `names` (and their values) and without `flags`."""
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


def _check_variable(name: str, sign: str, value: str, where: str) -> None:
    if not sign or not _NAME.fullmatch(name):
        raise UserError(f"{where}: not a NAME=value line; write lines like NCCL_DEBUG=WARN")
    if not _VALUE.fullmatch(value):
        raise UserError(
            f"{where}: the value of {name} contains characters that a shell would interpret; "
            "allowed are letters, digits, spaces and @%+=:,./^_- (nothing in this file is ever run)"
        )
    if _RUNS_PROGRAMS.fullmatch(name):
        raise UserError(
            f"{where}: {name} decides which programs run, so it is not read from a file; set it in "
            "the login shell of each host"
        )
    if _SET_BY_LAUNCHER.fullmatch(name):
        raise UserError(
            f"{where}: {name} is set by the launcher; use --master-addr and --master-port for the "
            "first host's address and port, and --include for GPUs"
        )


def _extensions_dir() -> Path:
    """Where torch and DeepSpeed build kernels on first use.

    One folder per environment, versions and host, so that no build is loaded by another torch.
    """
    try:
        deepspeed = version("deepspeed")
    except PackageNotFoundError:
        deepspeed = "none"
    name = f"{platform.node()}-torch{version('torch')}-ds{deepspeed}"
    # What others could write there, they could let this user's next run load.
    if os.access(sys.prefix, os.W_OK) and os.stat(sys.prefix).st_uid == os.geteuid():
        return Path(sys.prefix) / "torch_extensions" / name
    prefix = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    return user_cache_dir() / f"{prefix}-{name}"


def _clear_stale_locks(directory: Path) -> None:
    """Remove locks left by killed builds; later builds would silently wait for them forever."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".clearing", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for lock in directory.rglob("lock"):
            if time.time() - lock.stat().st_mtime > STALE_LOCK_SECONDS or not _is_building(
                lock.parent
            ):
                lock.unlink(missing_ok=True)


def _is_building(directory: Path) -> bool:
    """Whether a live process has `directory` as its working directory; torch runs ninja there."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # the process has ended, or belongs to another user
            if Path(process.cwd()) == directory.resolve():
                return True
    return False
