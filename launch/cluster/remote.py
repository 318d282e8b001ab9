"""Commands on other hosts, over ssh: never a question, never a wait without an end, nothing left to a shell to read."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONNECT_SECONDS = 5
ALIVE_SECONDS = 5
"""ssh asks so often whether the other host is there."""
SYNCED = ".synced_from.json"
"""In a checkout that `launch/sync.sh`, which copies no .git, has made: the commit."""


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


# Programs that run on another host though this checkout is not there, or is another: their source travels with them.
#
# A program is a module of the standard library alone (or of torch, imported late) with a function `answer(task)` that
# takes and returns what JSON can say. It arrives on stdin as one line, so that no shell reads any of it, and its answer
# is the line that begins with `MARK`: what a login script prints before it does no harm.


ROOT = Path(__file__).resolve().parents[2]
MARK = "vastscale-answer:"
MOST_CHARACTERS = 4 << 20  # of an answer

_START = ("import sys; sys.path[:] = [path for path in sys.path if path]; import json; "
          "parcel = json.loads(sys.stdin.buffer.readline()); exec(parcel['start'])")
"""Without the folder that the login shell starts in, whose files must not be taken for modules."""
_UNPACK = """
import types
module = sys.modules[parcel["name"]] = types.ModuleType(parcel["name"])
exec(compile(parcel["source"], parcel["name"], "exec"), module.__dict__)
answer = module.answer(parcel["task"])
print("\\n" + parcel["mark"] + json.dumps(answer), flush=True)
"""
_CHOOSE = ('for python; do if command -v "$python" >/dev/null 2>&1; then exec "$python" -c "$0"; fi; done; '
           'echo "no $1 here" >&2; exit 127')


def command(*pythons: str) -> list[str]:
    """What runs a parcel on another host, with the first of `pythons` that is there. None is there: status 127."""
    return ["sh", "-c", _CHOOSE, _START, *pythons]


def parcel(name: str, task: Mapping[str, Any]) -> str:
    """A program for stdin: the module `name` of this checkout, which imports nothing else from it, and its task."""
    source = (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    return json.dumps({"start": _UNPACK, "name": name, "source": source, "task": task, "mark": MARK}) + "\n"


def answer(stdout: str) -> Any | None:
    """The answer in what a program has printed; `None` where there is none."""
    for line in reversed(stdout.splitlines()):
        if line.startswith(MARK) and len(line) <= MOST_CHARACTERS:
            try:
                return json.loads(line[len(MARK):])
            except (ValueError, RecursionError):
                return None
    return None


def last_line(text: str) -> str:
    """The last line that says something: of a traceback, the exception."""
    lines: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
