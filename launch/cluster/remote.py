"""Commands on other hosts, over ssh: never a question, never a wait without an end, nothing for a
shell to read.

`run_on` runs a command on several hosts at once. Where this checkout may be missing or another one,
a program travels along as source: a module of the standard library alone (or of torch, imported
late) with a function `answer(task)` that takes and returns what JSON can express. `command` starts
a Python there, `parcel` is what it reads: one line on stdin, so that no shell reads any of it. The
answer is the line of its output that begins with `MARK`: what a login script prints before it does
no harm.
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
"""In a checkout that `launch/sync.sh`, which copies no .git, has made: the commit."""
MARK = "vastscale-answer:"
MOST_CHARACTERS = 4 << 20  # of an answer

_START = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; import json; "
    "parcel = json.loads(sys.stdin.buffer.readline()); exec(parcel['start'])"
)
"""Without the folder that the login shell starts in, whose files must not be taken for modules."""
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
class Done:
    """A command's end on one host."""

    host: str
    status: int  # the command's own; 255: ssh's, 124: it took too long
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """The last line that the command wrote to stderr."""
        return last_line(self.stderr) or f"status {self.status}"


def run_on(
    hosts: Iterable[str], command: Sequence[str], *, timeout: float, stdin: str = ""
) -> dict[str, Done]:
    """Run `command` on every host at once. A host that does not answer has status 255 or, after
    `timeout` s, 124."""

    def run(host: str) -> Done:
        try:
            done = subprocess.run(
                ssh(host, command),
                input=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Done(host, 124, "", f"no answer within {timeout:.0f} s")
        return Done(host, done.returncode, done.stdout, done.stderr)

    hosts = list(hosts)
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return dict(zip(hosts, pool.map(run, hosts), strict=True))


def ssh(host: str, command: Sequence[str]) -> list[str]:
    """The command line that runs `command`, word by word as given, on `host`."""
    return ["ssh", *ssh_options(), "-T", "--", host, shlex.join(command)]


def ssh_options(silences: int = 3) -> list[str]:
    """Options for an ssh that never asks anything, and ends after `silences` unanswered
    questions."""
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
    """What runs a parcel on another host, with the first of `pythons` that exists there; status 127
    if none does."""
    return ["sh", "-c", _CHOOSE, _START, *pythons]


def parcel(name: str, task: Mapping[str, Any]) -> str:
    """A program for stdin: the module `name` of this checkout, which imports nothing else from it,
    and its task."""
    source = (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    return (
        json.dumps({"start": _UNPACK, "name": name, "source": source, "task": task, "mark": MARK})
        + "\n"
    )


def answer(stdout: str) -> Any | None:
    """The answer in what a program has printed; `None` where there is none."""
    for line in reversed(stdout.splitlines()):
        if line.startswith(MARK) and len(line) <= MOST_CHARACTERS:
            try:
                return json.loads(line[len(MARK) :])
            except (ValueError, RecursionError):
                return None
    return None


def last_line(text: str) -> str:
    """The last line that is not empty: of a traceback, the exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
