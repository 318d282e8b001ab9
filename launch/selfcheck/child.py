"""Run a section in its own process: the parent's side and the child's.

A crash or hang ends only that process and is one line of the report. The process writes its checks
to a file, one per line, and a last line that says that it has ended.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.selfcheck.report import ROOT, Check, Report, SkippedError
from launch.selfcheck.table import SECTIONS, Section

PASS, FAIL, SKIPPED = "PASS", "FAIL", "skipped"


@dataclass
class SectionResult:
    """The result of a section."""

    name: str
    status: str
    """PASS, FAIL or skipped."""
    why: str = ""
    """Why it was skipped, crashed or hung; empty otherwise."""
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        why = {"why": self.why} if self.why else {}
        return {
            "name": self.name,
            "status": self.status,
            **why,
            "seconds": round(self.seconds, 2),
            "checks": [check.as_json() for check in self.checks],
        }


def run_section(section: Section, *, share: float, most: float, is_small: bool) -> SectionResult:
    """Run a section to its end: it should take about `share` seconds and is killed after `most`."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"selfcheck-{section.name}-") as folder:
        lines, log = Path(folder) / "checks.jsonl", Path(folder) / "log.txt"
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        words = [
            sys.executable,
            "-m",
            "launch.selfcheck.child",
            section.name,
            str(lines),
            str(scratch),
            str(share),
            str(most),
            "small" if is_small else "full",
        ]
        with open(log, "wb") as output:
            child = subprocess.Popen(
                words,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                status: int | None = child.wait(most)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # together with what it has left behind
                child.wait()
        found = _read(section.name, lines)
        if not found.status:
            found.status, found.why = FAIL, _why(status, most, log)
    found.seconds = time.monotonic() - began
    return found


def _read(name: str, lines: Path) -> SectionResult:
    """Read the checks in a file; the status is "" if it does not say how the section ended."""
    found = SectionResult(name, "")
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []:
        with suppress(ValueError):  # a line that was cut off when the process was killed
            entry = json.loads(line)
            if "ended" in entry:
                failed = any(check.ok is False for check in found.checks)
                found.status, found.why = FAIL if failed else entry["ended"], entry["why"]
            else:
                found.checks.append(Check(**entry))
    return found


def _why(status: int | None, most: float, log: Path) -> str:
    """Say why a section did not reach its end."""
    said = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    last = f": {said[-1][:300]}" if said else ""
    if status is None:
        return f"did not end within {most:.0f} s{last}"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}{last}"
    return f"ended with status {status}{last}"


def main(arguments: list[str]) -> int:
    """Run a section in this process and write its checks to a file."""
    name, lines, scratch, share, most, size = arguments
    with open(lines, "a", encoding="utf-8") as file:
        report = Report(
            file, name, Path(scratch), float(share), float(most), is_small=size == "small"
        )
        ended, why = PASS, ""
        try:
            importlib.import_module(f"launch.selfcheck.sections.{SECTIONS[name].name}").run(report)
        except SkippedError as skip:
            ended, why = SKIPPED, str(skip)
        file.write(json.dumps({"ended": ended, "why": why}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
