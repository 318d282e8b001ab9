"""One launch of all ranks, as a command line and an environment for DeepSpeed's launcher; and what
a restart may use.

DeepSpeed passes much of its shell's environment on to a shell of every host. Here it gets an
environment without those variables, and each rank's guard gets its own as data, in one word.
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
PORT_SECONDS = 15  # for one that should become free again
POLL_SECONDS = 5
Launcher = Literal["pdsh", "openmpi", "slurm"]
PROGRAMS = {
    "pdsh": ("pdsh", "pdsh"),
    "openmpi": ("ompi_info", "openmpi-bin"),
    "slurm": ("srun", "slurm-client"),
}
"""Launcher -> the program it cannot do without, and the Debian package that has it."""
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Beginnings of names that DeepSpeed pastes into the command line of every host; ours travel as
data."""
_PDSHS = ("WCOLL", "DSHPATH", "PDSH_RCMD_TYPE")
_PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)


@dataclass(frozen=True)
class Job:
    """All ranks of a run, and where they meet."""

    slots: Slots
    address: str  # of this machine, the first host, for the others
    port: int  # free there: of rank 0's store
    arguments: tuple[str, ...]  # for train.py
    variables: Mapping[str, str]  # for every rank
    directory: str  # in which each rank works, where it is there
    logs: Path  # on every host
    launcher: Launcher = "pdsh"
    launcher_args: str = ""

    @property
    def hosts(self) -> list[str]:
        """The host of each rank."""
        return [host for host, slots in self.slots.items() for _ in slots]

    def word(self, run: str, supervisor_port: int) -> str:
        """What each rank's guard needs to find the supervisor, as one word."""
        return messages.pack({"run": run, "supervisor": [self.address, supervisor_port]})

    @property
    def task(self) -> dict[str, Any]:
        """What the supervisor makes each guard run."""
        return {
            "logs": str(self.logs),
            "arguments": list(self.arguments),
            "environment": dict(self.variables),
            "directory": self.directory,
        }

    def command(self, folder: Path, word: str) -> list[str]:
        """DeepSpeed's launcher, whose files go into `folder`, starting a guard with `word` for each
        rank."""
        hostfile = folder / "hostfile"
        hostfile.write_text(
            "".join(f"{host} slots={1 + max(numbers)}\n" for host, numbers in self.slots.items())
        )
        chosen = ["--include", as_filter(self.slots)] if self.launcher == "pdsh" else []
        own = ""
        if self.launcher == "openmpi":
            # The ranks never speak MPI: its network must only not be looked for. DeepSpeed would
            # say eth0.
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
        """The launcher's own environment: this one, but for what would end in a shell on other
        hosts."""
        variables = {
            name: value
            for name, value in base.items()
            if not name.startswith((*_EXPORTED, "OMPI_", "PMIX_")) and name not in _PDSHS
        }
        file = folder / "deepspeed_env"
        # Slurm itself says where rank 0 is, which need not be here; with the others it is this
        # machine.
        own = (
            {}
            if self.launcher == "slurm"
            else {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}
        )
        file.write_text("".join(f"{name}={value}\n" for name, value in own.items()))
        variables["DS_ENV_FILE"] = str(file)
        if CPU in self.variables or not may_have_gpu():
            variables["DS_ACCELERATOR"] = "cpu"
        # The guards notice a host that is gone; ssh must not give up sooner, over a short break of
        # the network.
        words = (*ssh_options(silences=6), base.get("PDSH_SSH_ARGS_APPEND", ""))
        variables["PDSH_SSH_ARGS_APPEND"] = " ".join(words).strip()
        return variables


def check_launcher(launcher: Launcher, slots: Slots, launcher_args: str) -> None:
    """`UserError` where the launcher is not installed, or cannot start ranks on just these
    slots."""
    for path in (sys.executable, str(ROOT)):
        if not _PLAIN.fullmatch(path):  # DeepSpeed leaves it to shells as it is
            raise UserError(
                f"{path!r} has characters that shells on other hosts would read; move the checkout "
                "to a "
                "path of letters, digits and ./_-"
            )
    try:
        words = shlex.split(launcher_args)
    except ValueError as error:
        raise UserError(f"--launcher-args {launcher_args!r}: {error}") from error
    for word in words:
        if not _PLAIN.fullmatch(word) or (launcher == "pdsh" and not word.startswith("-")):
            raise UserError(
                f"--launcher-args {launcher_args!r}: {word!r} could be read as a command; of pdsh "
                "only "
                "options are taken (-t10, not -t 10), of the others words without blanks and quotes"
            )
    program, package = PROGRAMS[launcher]
    if len(slots) > 1 and not shutil.which(program):
        raise UserError(
            f"--launcher {launcher} needs {program}, which is not installed here; `apt install "
            f"{package}`, "
            "or choose another --launcher"
        )
    if launcher == "pdsh":
        return
    for host, numbers in slots.items():
        if numbers != tuple(range(len(numbers))):
            raise UserError(
                f"--launcher {launcher} cannot leave out single slots (of {host} it would be "
                f"{','.join(map(str, numbers))}); choose pdsh, or whole hosts"
            )
    if launcher == "slurm" and len({len(numbers) for numbers in slots.values()}) > 1:
        raise UserError(
            "--launcher slurm needs the same number of slots on every host; change the hostfile, "
            "or choose "
            "pdsh"
        )


def choose_port(address: str, wanted: int, *, wait: bool = False) -> int:
    """`wanted`, or a free port of `address` where it is 0. `UserError` if it is taken, with `wait`
    for a while."""
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
                f"{where} cannot be listened on here: {why}; choose another --master-port, or this "
                "machine's own address as --master-addr"
            )
        time.sleep(0.5)


# --- What a run can continue with after a failure ---


def answering(slots: Slots, *, timeout: float = 2 * CONNECT_SECONDS) -> Slots:
    """The hosts that run a command now. The first is this machine."""
    first, *others = slots
    done = run_on(others, ["true"], timeout=timeout)
    return {
        host: numbers for host, numbers in slots.items() if host == first or done[host].status == 0
    }


def wait_for_all(slots: Slots, seconds: float, say: Callable[[str], None]) -> None:
    """Return when every host answers. `RunError` names those that still do not after so many
    seconds."""
    deadline, has_said = time.monotonic() + seconds, False
    while True:
        there = answering(slots)
        missing = [host for host in slots if host not in there]
        if not missing:
            return
        names = ", ".join(missing)
        if time.monotonic() > deadline:
            raise RunError(
                f"{names} did not come back within {seconds:.0f} s; repair them, or go on without "
                "them: "
                f"--exclude {'@'.join(missing)}, or --elastic"
            )
        if not has_said:
            say(f"waiting up to {seconds:.0f} s for {names} (--elastic goes on without)")
            has_said = True
        time.sleep(POLL_SECONDS)


def share_batch(slots: Slots, total: int, largest_micro_batch: int) -> tuple[Slots, int]:
    """As many of the slots as can share the global batch `total`, and the micro-batch with which
    they do.

    No rank gets more samples at a time than before, `largest_micro_batch`: accumulation makes up
    for ranks that are gone. The last slots of the last hosts are left out where there are too many.
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
