"""Run commands on other hosts over ssh, without prompts, unbounded waits or shell interpretation.

`run_on` runs a command on several hosts at once. A host may have another checkout or none, so a
program is sent to it as source: a module that imports only the standard library (and torch, late),
with a function `answer(task)` that takes and returns JSON values. `command` starts a Python there
and `parcel` is what it reads: one line on stdin, which no shell sees. The answer is the output line
that begins with `MARK`, so whatever a login script prints before it does no harm.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONNECT_SECONDS = 5
ALIVE_SECONDS = 5
"""Interval at which ssh asks whether the other host is still there."""
SYNCED = ".synced_from.json"
"""File with the commit, in a checkout made by `launch/sync.sh` (which does not copy .git)."""
MARK = "vastscale-answer:"
MOST_CHARACTERS = 4 << 20  # of an answer

_START = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; import json; "
    "parcel = json.loads(sys.stdin.buffer.readline()); exec(parcel['start'])"
)
"""Removes the login shell's folder from sys.path: files there must not be imported as modules."""
_UNPACK = """
import types
module = sys.modules[parcel["name"]] = types.ModuleType(parcel["name"])
exec(compile(parcel["source"], parcel["name"], "exec"), module.__dict__)
answer = module.answer(parcel["task"])
print("\\n" + parcel["mark"] + json.dumps(answer), flush=True)
"""
_CHOOSE = (
    'for python; do if command -v "$python" >/dev/null 2>&1; then exec "$python" -c "$0"; fi; '
    "done; "
    'echo "no $1 here" >&2; exit 127'
)


@dataclass(frozen=True)
class CommandResult:
    """The result of a command on one host."""

    host: str
    status: int  # exit status of the command; 255: ssh failed, 124: it took too long
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """The last line that the command wrote to stderr."""
        return last_line(self.stderr) or f"status {self.status}"


def run_on(
    hosts: Iterable[str],
    command: Sequence[str],
    *,
    timeout: float,
    stdin: str = "",
    ssh_arguments: Sequence[str] = (),
) -> dict[str, CommandResult]:
    """Run `command` on all hosts at once, with additional arguments for ssh.

    The status of a host that does not answer is 255 or, after `timeout` seconds, 124.
    """

    def run(host: str) -> CommandResult:
        try:
            done = subprocess.run(
                ssh(host, command, ssh_arguments),
                input=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return CommandResult(host, 124, "", f"no answer within {timeout:.0f} s")
        return CommandResult(host, done.returncode, done.stdout, done.stderr)

    hosts = list(hosts)
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return dict(zip(hosts, pool.map(run, hosts), strict=True))


def ssh(host: str, command: Sequence[str], arguments: Sequence[str] = ()) -> list[str]:
    """Return the command line that runs `command` on `host`, each word quoted."""
    return ["ssh", *ssh_options(), *arguments, "-T", "--", host, shlex.join(command)]


def ssh_options(silences: int = 3) -> list[str]:
    """Return options for an ssh that never prompts and ends after `silences` missed keepalives."""
    return [
        "-o",
        "BatchMode=yes",
        "-o",
        f"ConnectTimeout={CONNECT_SECONDS}",
        "-o",
        f"ServerAliveInterval={ALIVE_SECONDS}",
        "-o",
        f"ServerAliveCountMax={silences}",
    ]


def command(*pythons: str) -> list[str]:
    """Return the command that runs a parcel with the first of `pythons` that exists on the host.

    Its status is 127 if none of them exists.
    """
    return ["sh", "-c", _CHOOSE, _START, *pythons]


def parcel(name: str, task: Mapping[str, Any]) -> str:
    """Return a program for stdin: the source of module `name` of this checkout, and its task.

    The module must not import anything else from the checkout.
    """
    source = (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    return (
        json.dumps({"start": _UNPACK, "name": name, "source": source, "task": task, "mark": MARK})
        + "\n"
    )


def answer(stdout: str) -> Any | None:
    """Return the answer in the output of a program; `None` if there is none."""
    for line in reversed(stdout.splitlines()):
        if line.startswith(MARK) and len(line) <= MOST_CHARACTERS:
            try:
                return json.loads(line[len(MARK) :])
            except (ValueError, RecursionError):
                return None
    return None


def last_line(text: str) -> str:
    """Return the last non-empty line (the exception, in a traceback)."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
