"""One launch of all ranks: command line and environment for DeepSpeed's launcher; restart helpers.

DeepSpeed copies much of its own environment into a shell command on every host. Here its launcher
gets an environment without those variables; each rank's guard receives them as data from the
supervisor.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.cluster import messages
from launch.cluster.hostfile import PORTS, Slots, as_filter, world_size
from launch.cluster.remote import CONNECT_SECONDS, run_on, ssh_options
from pipeline.cli import RunError, UserError
from pipeline.distributed.gpus import CPU, may_have_gpu

ROOT = Path(__file__).resolve().parents[2]
PORT_SECONDS = 15  # how long to wait for a busy port to become free
POLL_SECONDS = 5
Launcher = Literal["pdsh", "openmpi", "slurm"]
PROGRAMS = {
    "pdsh": ("pdsh", "pdsh"),
    "openmpi": ("ompi_info", "openmpi-bin"),
    "slurm": ("srun", "slurm-client"),
}
"""Launcher -> the program it requires, and the Debian package that contains it."""
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Prefixes of variables that DeepSpeed pastes into the command line of every host; ours travel as
data instead."""
_PDSH_VARIABLES = ("WCOLL", "DSHPATH", "PDSH_RCMD_TYPE")
_PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)


@dataclass(frozen=True)
class ClusterJob:
    """All ranks of a run, how they are launched and where they meet."""

    slots: Slots
    address: str  # of this machine, the first host, as the others reach it
    port: int  # of rank 0's store, on `address`
    arguments: tuple[str, ...]  # for train.py
    variables: Mapping[str, str]  # environment variables for every rank
    directory: str  # each rank's working directory, on hosts where it exists
    logs: Path  # folder of the ranks' logs, on every host
    launcher: Launcher = "pdsh"
    launcher_args: str = ""

    @property
    def hosts(self) -> list[str]:
        """The host of each rank."""
        return [host for host, slots in self.slots.items() for _ in slots]

    @property
    def key_by_stdin(self) -> bool:
        """Whether guards get the launch's key on stdin, which srun copies to all of them.

        Slurm may start them on hosts that are in no hostfile and that ssh does not reach. The other
        launchers give stdin to one rank at most, but reach the hosts over ssh.
        """
        return self.launcher == "slurm"

    def word(self, run: str, supervisor_port: int) -> str:
        """Return what a guard needs to find the supervisor, as one word for its command line."""
        supervisor = [self.address, supervisor_port]
        return messages.pack(
            {"run": run, "supervisor": supervisor, "key_by_stdin": self.key_by_stdin}
        )

    @property
    def task(self) -> dict[str, Any]:
        """What the supervisor tells each guard to run."""
        return {
            "logs": str(self.logs),
            "arguments": list(self.arguments),
            "environment": dict(self.variables),
            "directory": self.directory,
        }

    def command(self, folder: Path, word: str) -> list[str]:
        """Return the command of DeepSpeed's launcher that starts a guard with `word` for each rank.

        Writes the launcher's hostfile into `folder`.
        """
        hostfile = folder / "hostfile"
        hostfile.write_text(
            "".join(f"{host} slots={1 + max(numbers)}\n" for host, numbers in self.slots.items())
        )
        chosen = ["--include", as_filter(self.slots)] if self.launcher == "pdsh" else []
        own = ""
        if self.launcher == "openmpi":
            # The ranks never use MPI to communicate, so any interface will do for it; DeepSpeed's
            # default is eth0, which may not exist.
            own = "--mca btl_tcp_if_include lo" + (
                " --allow-run-as-root" if os.geteuid() == 0 else ""
            )
        elif self.launcher == "slurm":
            per_node = len(next(iter(self.slots.values())))
            own = (
                f"--nodes={len(self.slots)} --ntasks-per-node={per_node} "
                f"--nodelist={','.join(self.slots)}"
            )
        arguments = " ".join(filter(None, (own, self.launcher_args)))
        return [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--log_level",
            "error",
            "--hostfile",
            str(hostfile),
            *chosen,
            "--launcher",
            self.launcher,
            f"--launcher_args={arguments}",
            "--master_addr",
            self.address,
            "--master_port",
            str(self.port),
            "--no_ssh_check",
            "--no_local_rank",
            str(ROOT / "launch" / "cluster" / "guard.py"),
            word,
        ]

    def launcher_variables(
        self, folder: Path, base: Mapping[str, str] = os.environ
    ) -> dict[str, str]:
        """Return the launcher's environment: `base` without what DeepSpeed would copy to other
        hosts."""
        variables = {
            name: value
            for name, value in base.items()
            if not name.startswith((*_EXPORTED, "OMPI_", "PMIX_")) and name not in _PDSH_VARIABLES
        }
        file = folder / "deepspeed_env"
        # Under Slurm, Slurm says where rank 0 runs, which may be another machine; the other
        # launchers start it on this one.
        own = (
            {}
            if self.launcher == "slurm"
            else {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}
        )
        file.write_text("".join(f"{name}={value}\n" for name, value in own.items()))
        variables["DS_ENV_FILE"] = str(file)
        if CPU in self.variables or not may_have_gpu():
            variables["DS_ACCELERATOR"] = "cpu"
        # Lost hosts are detected by the guards; ssh must not give up before they do, just because
        # the network is briefly interrupted.
        words = (*ssh_options(silences=6), base.get("PDSH_SSH_ARGS_APPEND", ""))
        variables["PDSH_SSH_ARGS_APPEND"] = " ".join(words).strip()
        return variables


def check_launcher(launcher: Launcher, slots: Slots, launcher_args: str) -> None:
    """Raise `UserError` if the launcher is not installed or cannot start ranks on these slots."""
    for path in (sys.executable, str(ROOT)):
        if not _PLAIN.fullmatch(path):  # DeepSpeed passes it to shells unquoted
            raise UserError(
                f"{path!r} contains characters that a shell on another host would interpret; move "
                "the checkout to a path of letters, digits and ./_-"
            )
    try:
        words = shlex.split(launcher_args)
    except ValueError as error:
        raise UserError(f"--launcher-args {launcher_args!r}: {error}") from error
    for word in words:
        if not _PLAIN.fullmatch(word) or (launcher == "pdsh" and not word.startswith("-")):
            raise UserError(
                f"--launcher-args {launcher_args!r}: {word!r} could be run as a command; for pdsh "
                "give options only (-t10, not -t 10), for the others words without spaces and "
                "quotes"
            )
    program, package = PROGRAMS[launcher]
    if len(slots) > 1 and not shutil.which(program):
        raise UserError(
            f"--launcher {launcher} needs {program}, which is not installed here; `apt install "
            f"{package}`, or choose another --launcher"
        )
    if launcher == "pdsh":
        return
    for host, numbers in slots.items():
        if numbers != tuple(range(len(numbers))):
            raise UserError(
                f"--launcher {launcher} cannot use only some slots of a host (here slots "
                f"{','.join(map(str, numbers))} of {host}); use --launcher pdsh, or choose whole "
                "hosts"
            )
    if launcher == "slurm" and len({len(numbers) for numbers in slots.values()}) > 1:
        raise UserError(
            "--launcher slurm needs the same number of slots on every host; change the hostfile, "
            "or use --launcher pdsh"
        )


def choose_port(address: str, wanted: int, *, wait: bool = False) -> int:
    """Return the port `wanted`, or a free port of `address` if it is 0.

    `UserError` if there is none; with `wait`, only after `PORT_SECONDS`.
    """
    if not 0 <= wanted <= 65535:
        raise UserError(f"--master-port {wanted} must be between 1 and 65535, or 0 for a free one")
    deadline = time.monotonic() + (PORT_SECONDS if wait else 0)
    while True:
        for port in [wanted] if wanted else random.SystemRandom().sample(PORTS, 20):
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    listener.bind((address, port))
                    return port
                except OSError as error:
                    why = error.strerror
        if time.monotonic() > deadline:
            where = f"{address} port {wanted}" if wanted else address
            raise UserError(
                f"cannot listen on {where}: {why}; choose another --master-port, or give an "
                "address of this machine as --master-addr"
            )
        time.sleep(0.5)


# --- Restarting after a failure ---


def answering(slots: Slots, *, timeout: float = 2 * CONNECT_SECONDS) -> Slots:
    """Return the hosts on which ssh can run a command now. The first one is this machine."""
    first, *others = slots
    done = run_on(others, ["true"], timeout=timeout)
    return {
        host: numbers for host, numbers in slots.items() if host == first or done[host].status == 0
    }


def wait_for_all(slots: Slots, seconds: float, say: Callable[[str], None]) -> None:
    """Wait until every host answers. `RunError` names those that do not within `seconds`."""
    deadline, has_said = time.monotonic() + seconds, False
    while True:
        there = answering(slots)
        missing = [host for host in slots if host not in there]
        if not missing:
            return
        names = ", ".join(missing)
        if time.monotonic() > deadline:
            raise RunError(
                f"{names} did not come back within {seconds:.0f} s; repair them, or continue "
                f"without them: --exclude {'@'.join(missing)}, or --elastic"
            )
        if not has_said:
            say(f"waiting up to {seconds:.0f} s for {names} (--elastic continues without)")
            has_said = True
        time.sleep(POLL_SECONDS)


def share_batch(slots: Slots, total: int, largest_micro_batch: int) -> tuple[Slots, int]:
    """Return the most slots that can share the global batch `total`, and their micro-batch.

    The micro-batch never exceeds `largest_micro_batch`, so memory suffices as before; accumulation
    makes up for lost ranks. Surplus slots are dropped from the end of the last host.
    """
    used = dict(slots)
    while total % world_size(used):
        last = list(used)[-1]
        used[last] = used[last][:-1]
        if not used[last]:
            del used[last]
    ranks = world_size(used)
    micro = max(size for size in range(1, largest_micro_batch + 1) if total % (size * ranks) == 0)
    return used, micro
