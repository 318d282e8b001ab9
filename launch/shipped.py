"""Programs that run on another host though this checkout is not there, or is another: their source travels with them.

A program is a module of the standard library alone (or of torch, imported late) with a function `answer(task)` that
takes and returns what JSON can say. It arrives on stdin as one line, so that no shell reads any of it, and its answer
is the line that begins with `MARK`: what a login script prints before it does no harm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "vastscale-answer:"
MOST_CHARACTERS = 4 << 20  # of an answer

_START = ("import sys; sys.path[:] = [path for path in sys.path if path]; import json; "
          "parcel = json.loads(sys.stdin.buffer.readline()); exec(parcel['start'])")
"""Without the folder that the login shell starts in, whose files must not be taken for modules."""
_UNPACK = """
import types
for name, source in parcel["modules"].items():
    package, _, own = name.rpartition(".")
    module = sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules.setdefault(package, types.ModuleType(package)), own, module)
    exec(compile(source, name, "exec"), module.__dict__)
answer = sys.modules[parcel["entry"]].answer(parcel["task"])
print("\\n" + parcel["mark"] + json.dumps(answer), flush=True)
"""
_CHOOSE = ('for python; do if command -v "$python" >/dev/null 2>&1; then exec "$python" -c "$0"; fi; done; '
           'echo "no $1 here" >&2; exit 127')


def command(*pythons: str) -> list[str]:
    """What runs a parcel on another host, with the first of `pythons` that is there. None is there: status 127."""
    return ["sh", "-c", _CHOOSE, _START, *pythons]


def parcel(entry: str, task: Mapping[str, Any], *modules: str) -> str:
    """A program for stdin: module `entry` of this checkout, the `modules` that it imports from it, and its task."""
    sources = {name: (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8") for name in (*modules, entry)}
    return json.dumps({"start": _UNPACK, "modules": sources, "entry": entry, "task": task, "mark": MARK}) + "\n"


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
