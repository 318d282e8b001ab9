"""`.deepspeed_env`: variables that every rank shall have, one `NAME=value` a line. Nothing in it can run anything.

DeepSpeed pastes the file into a command line of every host, where a value of `$(command)` runs it, and fails at an
empty line. Here it is read strictly, its values travel to the ranks as data, and DeepSpeed gets a file of our own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.cli import UserError

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
