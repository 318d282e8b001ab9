"""Commands on other hosts, over ssh: never a question, never a wait without an end, nothing left to a shell to read."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

CONNECT_SECONDS = 5
ALIVE_SECONDS = 5
"""ssh asks so often whether the other host is there."""


@dataclass(frozen=True)
class Done:
    """A command's end on one host."""

    host: str
    status: int  # the command's own; 255: ssh's, 124: it took too long
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """The last thing that it said on stderr, in one line."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"status {self.status}"


def ssh_options(silences: int = 3) -> list[str]:
    """For an ssh that never asks anything, and ends after the other host has left so many questions unanswered."""
    return ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", "-o",
            f"ServerAliveInterval={ALIVE_SECONDS}", "-o", f"ServerAliveCountMax={silences}"]


def ssh(host: str, command: Sequence[str]) -> list[str]:
    """The command line that runs `command`, word by word as given, on `host`."""
    return ["ssh", *ssh_options(), "-T", "--", host, shlex.join(command)]


def run_on(hosts: Iterable[str], command: Sequence[str], *, timeout: float, stdin: str = "") -> dict[str, Done]:
    """Run `command` on every host at once. A host that does not answer has status 255 or, after `timeout` s, 124."""
    hosts = list(hosts)
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return dict(zip(hosts, pool.map(lambda host: _run(host, command, timeout, stdin), hosts), strict=True))


def _run(host: str, command: Sequence[str], timeout: float, stdin: str) -> Done:
    try:
        done = subprocess.run(ssh(host, command), input=stdin, capture_output=True, text=True, errors="replace",
                              timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return Done(host, 124, "", f"no answer within {timeout:.0f} s")
    return Done(host, done.returncode, done.stdout, done.stderr)
