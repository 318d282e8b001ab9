"""Real training runs for the self-check, through `launch/local.py`: start, kill and continue."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.selfcheck.report import ROOT
from pipeline.run_folder import LOG_FILE, checkpoint_dir, checkpoint_steps

WEIGHTS = ("generator.safetensors", "generator_ema.safetensors")


class TrainingRun:
    """A run folder and the command that starts or continues the run.

    Args:
        folder: the run folder.
        dataset: a dataset folder with its file lists.
        overrides: overrides of the recipe, such as `steps=10`.
    """

    def __init__(
        self, folder: Path, dataset: Path, overrides: Sequence[str], recipe: str = "demo"
    ) -> None:
        self.folder = folder
        self._words = [
            sys.executable,
            str(ROOT / "launch" / "local.py"),
            "--procs",
            "1",
            "--recipe",
            recipe,
            "--dataset-dir",
            str(dataset),
            "--output-dir",
            str(folder),
            *overrides,
        ]
        self._log = folder.with_name(f"{folder.name}.output")

    def finish(self, seconds: float) -> None:
        """Train to the end. `RuntimeError` with the last line of output if the run fails."""
        process = self.start()
        try:
            status = process.wait(max(1.0, seconds))
        finally:
            self.kill(process)
        if status:
            raise RuntimeError(f"training ended with status {status}: {self._last_line()}")

    def start(self) -> subprocess.Popen[bytes]:
        """Start or continue the run in a process group of its own."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "ab") as output:
            return subprocess.Popen(
                self._words,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=dict(os.environ),
                start_new_session=True,
            )

    def wait_for_step(self, process: subprocess.Popen[bytes], step: int, seconds: float) -> None:
        """Wait for a checkpoint of `step` or later. `RuntimeError` if none comes in `seconds`."""
        end = time.monotonic() + seconds
        while max(checkpoint_steps(self.folder), default=0) < step:
            if process.poll() is not None:
                raise RuntimeError(f"training ended before step {step}: {self._last_line()}")
            if time.monotonic() > end:
                raise RuntimeError(
                    f"no checkpoint of step {step} within {seconds:.0f} s: {self._last_line()}"
                )
            time.sleep(0.01)

    def kill(self, process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> int:
        """Send a signal to the launcher and wait for its end; SIGKILL goes to the ranks, too.

        The ranks have a session of their own, which a signal to the launcher's group does not
        reach. When the launcher dies they get SIGTERM, but here none of them may survive.
        """
        ranks = _children(process.pid)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        if number == signal.SIGKILL:
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
        return process.wait(120)

    def digest(self, step: int) -> str:
        """Return the SHA-256 of the weights in the checkpoint of `step`."""
        folder = checkpoint_dir(self.folder, step)
        return hashlib.sha256(
            b"".join((folder / name).read_bytes() for name in WEIGHTS)
        ).hexdigest()

    def log(self, event: str) -> list[dict[str, Any]]:
        """Return the entries of the run's log about `event`."""
        lines = (
            json.loads(line)
            for line in (self.folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
        )
        return [line for line in lines if line["event"] == event]

    def _last_line(self) -> str:
        lines = [
            line
            for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        ]
        return lines[-1][:300] if lines else ""


def _children(process: int) -> list[int]:
    """Return the ids of all descendants of `process`."""
    found: list[int] = []
    with suppress(OSError, ValueError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            found += [int(child), *_children(int(child))]
    return found
