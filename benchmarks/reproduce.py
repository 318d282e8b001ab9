"""Rerun the commands behind the figures in README.md and docs/, and report which no longer hold."""

from __future__ import annotations

import json
import operator
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tyro
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.cli import RunError, UserError, nearest, one_line, run

FIGURES = ROOT / "benchmarks" / "figures.json"
NUMBER = r"[+-]?\d+(?:,\d{3})*(?::\d\d|\.\d+)?"
MARK = re.compile(rf"\{{({NUMBER}(?: to {NUMBER})?)\}}")
_PLACEHOLDER = re.compile(r"(?<!\$)\{([a-z]\w*)\}")
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_EXTREMES = {"min": min, "max": max}


@dataclass(frozen=True)
class Options:
    """Rerun the commands behind the figures in README.md and docs/, and report which figures no
    longer hold.

    benchmarks/figures.json says where each figure is documented, which command makes it, how its
    value is read from the output, and how far it may be off. Commands run on the CPU, one after the
    other. Without NAME: those that take at most --seconds. The exit status is 1 if a figure does
    not hold.

    Example: python benchmarks/reproduce.py set5-x4 --data set5=Set5 vapsr_x4=VapSR_X4.pth
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    """Commands to run, or figures whose commands to run, however long they take."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=PATH ...")] = ()
    """The photographs, weights and programs that commands need; --list shows their names."""
    seconds: float = 60
    """Longest expected duration of a command that runs without being named."""
    list: bool = False
    """Only list the commands: what they need, how long they take, and when they last ran."""
    show: bool = False
    """Also print the commands' output, on stderr."""
    update: bool = False
    """Write what was measured, the machine and the date to benchmarks/figures.json. The documents
    stay as they are."""
    machine: str = ""
    """Name of this machine for --update. Default: its number of cores and its processor."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Figure(_Strict):
    """One or several numbers of a document."""

    document: str
    """README.md, or docs/NAME.md."""
    text: list[str]
    """What the document says, with each number in braces: `{2.5} times as fast`, `{2 to 3} min`,
    `{2:03} min` (123 seconds); in one place or in several. Any white space matches a blank."""
    read: list[Any] = []
    """Readers (see `read_values`), which together give a value for each number."""
    tolerance: list[str] = ["0"]
    """"0.01" (off by at most that), "x1.5" (by at most that factor), or "at most" or "at least"
    (the document gives a bound); one for all numbers, or one for each."""
    measured: list[float | None]
    """The values last measured, one for each number; `null`: unknown."""

    @property
    def documented(self) -> list[str]:
        return [mark for text in self.text for mark in MARK.findall(text)]

    @property
    def tolerances(self) -> list[str]:
        return self.tolerance * (len(self.documented) if len(self.tolerance) == 1 else 1)


class Command(_Strict):
    """A command, and the figures that it produces."""

    run: list[str] | None
    """Lines of bash, run in the root of the repository. {NAME} stands for a path of --data, {out}
    for an empty folder. `null`: there is no command."""
    why: str = ""
    """Why there is no command."""
    seconds: float = 0
    """Expected duration on two cores."""
    cores: int = 1
    """Number of cores without which the figures would differ."""
    machine: str
    date: str
    """When the figures were last measured, YYYY-MM-DD."""
    figures: dict[str, Figure]

    def placeholders(self) -> list[str]:
        """Names of --data, in alphabetical order."""
        return sorted(set(_PLACEHOLDER.findall("\n".join(self.run or []))) - {"out"})


class Exclusion(_Strict):
    """Numbers that are not figures: settings, sizes, limits, versions, what papers published."""

    why: str
    text: str
    """A regular expression for the numbers, with the words around them."""
    document: str = "*"
    """A pattern, such as docs/*.md."""


class Figures(_Strict):
    """benchmarks/figures.json."""

    placeholders: dict[str, str]
    """What each {NAME} in commands stands for."""
    not_figures: list[Exclusion]
    commands: dict[str, Command]


Row = tuple[str, str, str, str, str]
"""A row of the table: figure, documented and measured number, tolerance, verdict."""


def main(options: Options, file: Path = FIGURES) -> int:
    """Run what was chosen, compare, print the table."""
    figures = load(file)
    chosen = _choose(figures, options.names)
    if options.list:
        print(_listing(figures, chosen))
        return 0
    paths = _paths(figures, options.data)
    rows: list[Row] = []
    for name, command in chosen.items():
        obstacle = _obstacle(command, paths, None if options.names else options.seconds)
        if obstacle:
            rows.append((name, "-", "-", "-", obstacle))
            continue
        print(f"{name}: running, about {_duration(command.seconds)}", file=sys.stderr)
        try:
            with tempfile.TemporaryDirectory() as folder:
                output = _execute(command, {**paths, "out": folder}, options.show)
                rows += compare(command, output, Path(folder))
        except RunError as error:
            rows.append((name, "-", "-", "-", f"does not hold: {error}"))
            continue
        command.date = time.strftime("%Y-%m-%d")
        command.machine = options.machine or _this_machine()
        if options.update:
            text = _layout(figures.model_dump(exclude_defaults=True))
            file.write_text(text + "\n", encoding="utf-8")
    print(_table(rows))
    return int(any(verdict.startswith("does not hold") for *_, verdict in rows))


def load(file: Path = FIGURES) -> Figures:
    """Read the file of figures."""
    try:
        return Figures.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise UserError(f"{file}: {one_line(error)}") from error


def _layout(value: Any, indent: int = 0, lead: int = 0) -> str:
    """JSON in which everything is on one line that fits there."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + indent + lead < 99 or not value or not isinstance(value, dict | list):
        return line
    if isinstance(value, list):
        parts = [_layout(item, indent + 1) for item in value]
    else:
        keys = [f"{json.dumps(key)}: " for key in value]
        parts = [
            key + _layout(item, indent + 1, len(key))
            for key, item in zip(keys, value.values(), strict=True)
        ]
    left, right = "[]" if isinstance(value, list) else "{}"
    inner = ",".join(f"\n{' ' * (indent + 1)}{part}" for part in parts)
    return f"{left}{inner}\n{' ' * indent}{right}"


def _choose(figures: Figures, names: tuple[str, ...]) -> dict[str, Command]:
    owners = {name: name for name in figures.commands}
    for name, command in figures.commands.items():
        owners |= dict.fromkeys(command.figures, name)
    for name in names:
        if name not in owners:
            raise UserError(f"{name!r}: no such command or figure{nearest(name, owners)}")
    wanted = {owners[name] for name in names} or set(figures.commands)
    return {name: command for name, command in figures.commands.items() if name in wanted}


def _paths(figures: Figures, data: tuple[str, ...]) -> dict[str, str]:
    paths = {}
    for item in data:
        name, equals, path = item.partition("=")
        if not equals or name not in figures.placeholders:
            raise UserError(f"--data {item}: write NAME=PATH{nearest(name, figures.placeholders)}")
        paths[name] = os.path.abspath(os.path.expanduser(path))
        if not os.path.exists(paths[name]):
            raise UserError(f"--data {item}: no such path; give {figures.placeholders[name]}")
    return paths


def _obstacle(command: Command, paths: Mapping[str, str], limit: float | None) -> str:
    """Return why the command will not be run; "" if it will."""
    missing = [f"{name}=PATH" for name in command.placeholders() if name not in paths]
    cores = len(os.sched_getaffinity(0))
    if command.run is None:
        reason = f"cannot run here: {command.why}"
    elif missing:
        reason = f"cannot run here: give --data {' '.join(missing)}"
    elif cores < command.cores:
        reason = f"cannot run here: needs {command.cores} cores, but there are {cores}"
    elif limit is not None and command.seconds > limit:
        reason = f"not run: takes about {_duration(command.seconds)}; name it to run it"
    else:
        return ""
    return f"{reason}; measured {command.date}"


def _execute(command: Command, paths: Mapping[str, str], show: bool) -> str:
    """Return what the command prints. Raises `RunError` if it fails."""
    script = _PLACEHOLDER.sub(
        lambda match: shlex.quote(paths[match[1]]), "\n".join(command.run or [])
    )
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,  # which ./launch_local_train.sh uses, too
        "VASTSCALE_CPU": "1",
        "COLUMNS": "200",  # no table is broken into shorter lines
    }
    lines = []
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if show:
                print(line, end="", file=sys.stderr)
    if process.returncode:
        last = lines[-1].strip() if lines else "no output"
        raise RunError(f"exit status {process.returncode} (--show prints all output): {last[:200]}")
    return "".join(lines)


def compare(command: Command, output: str, folder: Path) -> list[Row]:
    """Return a row for each number of the command's figures, and store the values as `measured`.

    Raises `RunError`, before any is stored, if a value cannot be read.
    """
    found: dict[str, list[float]] = {}
    for name, figure in command.figures.items():
        values = [value for reader in figure.read for value in read_values(reader, output, folder)]
        if len(values) != len(figure.documented):
            raise RunError(
                f"{name}: the readers give {len(values)} values for {len(figure.documented)} "
                "documented numbers"
            )
        found[name] = values
    rows: list[Row] = []
    for name, figure in command.figures.items():
        figure.measured = [round(value, 6) for value in found[name]]
        for said, value, tolerance in zip(
            figure.documented, found[name], figure.tolerances, strict=True
        ):
            digits = len(said.partition(" ")[0].partition(".")[2])
            verdict = "holds" if holds(said, value, tolerance) else "does not hold"
            rows.append((name, said, f"{value:.{digits}f}", tolerance, verdict))
    return rows


def read_values(reader: Any, output: str, folder: Path) -> list[float]:
    """The numbers that a reader finds in a command's output or files. `RunError` if there are none.

    A reader is a regular expression, whose groups are numbers (`^` and `$` match at every line);
    `FILE.json#mean/model/psnr_y`, a path within a file of {out}; a number; `["-", reader, reader]`,
    which combines single values by +, -, * or /; or `["min", expression]` or `["max", expression]`
    over all matches.
    """
    if isinstance(reader, list) and reader[0] in _EXTREMES:
        matches = re.findall(reader[1], output, re.MULTILINE)
        if not matches:
            raise RunError(f"nothing in the output matches {reader[1]!r}")
        return [_EXTREMES[reader[0]](map(number, matches))]
    if isinstance(reader, list):
        sign, *operands = reader
        (left,), (right,) = (read_values(operand, output, folder) for operand in operands)
        return [_OPERATORS[sign](left, right)]
    if not isinstance(reader, str):
        return [float(reader)]
    file, _, path = reader.partition("#")
    if file.endswith(".json"):
        try:
            value = json.loads((folder / file).read_text(encoding="utf-8"))
            for key in path.split("/"):
                value = value[int(key) if isinstance(value, list) else key]
            return [float(value)]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RunError(f"{reader}: {one_line(error)}") from error
    match = re.search(reader, output, re.MULTILINE)
    if match is None:
        raise RunError(f"nothing in the output matches {reader!r}")
    return [number(group) for group in match.groups()]


def number(text: str) -> float:
    """'1,802', '+0.5', or '2:03' (123.0)."""
    first, colon, seconds = text.replace(",", "").partition(":")
    return 60 * float(first) + float(seconds) if colon else float(first)


def holds(documented: str, value: float, tolerance: str) -> bool:
    """Whether a measured value is what the document says: a number, or "2 to 3"."""
    ends = [number(end) for end in documented.split(" to ")]
    least, most = min(ends), max(ends)
    if tolerance == "at most":
        return value <= most
    if tolerance == "at least":
        return value >= least
    if tolerance.startswith("x"):
        factor = float(tolerance[1:])
        return least / factor <= value <= most * factor
    slack = float(tolerance) + 1e-9  # decimal fractions are not exact in binary
    return least - slack <= value <= most + slack


def _listing(figures: Figures, chosen: Mapping[str, Command]) -> str:
    lines = []
    for name, command in chosen.items():
        lines.append(f"{name}: {', '.join(command.figures)}")
        lines += [f"        {line}" for line in command.run or []]
        needs = [
            *command.placeholders(),
            *([f"{command.cores} cores"] if command.cores > 1 else []),
        ]
        takes = f"takes about {_duration(command.seconds)}" if command.run else command.why
        lines.append(f"    needs {', '.join(needs) or 'nothing'}; {takes}")
        lines.append(f"    measured {command.date} on {command.machine}")
    lines += ["--data:", *(f"    {name}: {what}" for name, what in figures.placeholders.items())]
    return "\n".join(lines)


def _table(rows: list[Row]) -> str:
    rows = [("figure", "documented", "measured", "tolerance", ""), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
        for a, b, c, d, e in rows
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _this_machine() -> str:
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{len(os.sched_getaffinity(0))} cores of {(names or ['an unknown processor'])[0]}"


if __name__ == "__main__":
    run(Options, main)
