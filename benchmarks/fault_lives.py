"""Runs that a campaign of faults interrupts: start, wait, kill, continue, compare."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import warm
from benchmarks.comparison import checkpoint_differences
from benchmarks.fault_injection import ENTER, FAULT
from benchmarks.small_runs import arguments, make_dataset
from pipeline.cli import RunError
from pipeline.distributed.gpus import CPU
from pipeline.run_folder import CHECKPOINTS_DIR, LOG_FILE, checkpoint_steps

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24
SCHEDULE = {"steps": STEPS, "save_every": 3, "validate_every": 8, "log_every": 1}
PATIENCE = 180  # seconds for a life on a busy machine
Calls = Sequence[Sequence[Any]]


@dataclass
class Outcome:
    """What one fault did. Without `faults_found`, the promise held."""

    fault: str  # what was injected
    moment: str = ""  # when
    status: int | None = None  # the first life's exit status; None if it was killed
    reported: str = ""  # its last line of output, or the line that reports the fault
    continued: bool = False  # whether the same command finished the run
    resumed_at: int = 0  # the step from which it continued
    differences: list[str] = field(default_factory=list)  # from an undisturbed run
    lost_steps: int = 0  # steps that were computed twice
    lost_seconds: float = 0.0  # the time that they had taken
    left: list[str] = field(default_factory=list)  # processes and files afterwards
    wrong: list[str] = field(default_factory=list)  # anything else that breaks the promise
    count: int = 1  # how many faults it was

    @property
    def holds(self) -> bool:
        """Whether the run continued, with the same result, and nothing was left."""
        return self.continued and not self.differences and not self.left and not self.wrong

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "holds": self.holds}


class Life:
    """One start of a run's command, until its end."""

    def __init__(self, command: Sequence[str], output: Path, pids: Path, environment: dict) -> None:
        self.output, self._pids = output, pids
        self._from = output.stat().st_size if output.exists() else 0
        with open(output, "ab") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                # a campaign under nohup ignores it, and a run that inherits this, too
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )

    @property
    def printed(self) -> str:
        """What this life has printed so far."""
        with open(self.output, encoding="utf-8", errors="replace") as file:
            file.seek(self._from)
            return file.read()

    def pid(self, script: str, rank: int | str = "") -> int:
        """Wait for the process that runs `script` (on `rank`) and return its id."""
        found = self.wait_for(
            lambda: next(iter(self._pids.glob(f"{script}-{rank}-*")), None), f"{script} {rank}"
        )
        return int(found.name.rpartition("-")[2])

    def wait_for(self, find: Callable[[], Any], what: str) -> Any:
        """Return the first result of `find` that is true; `RunError` if the life ends before."""
        deadline = time.monotonic() + PATIENCE
        while not (found := find()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RunError(f"{what} did not come: {self.printed[-2000:]}")
            time.sleep(0.002)
        return found

    def join(self, seconds: float = PATIENCE) -> int:
        """Wait for the end; return the exit status as a shell reports it."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise RunError(f"did not end within {seconds:.0f} s: {self.printed[-2000:]}") from None
        return status if status >= 0 else 128 - status

    def reported(self, pattern: str = "") -> str:
        """Return the last line that contains `pattern`, a regular expression, or starts with
        `error:`, else the last line."""
        lines = [line.strip() for line in self.printed.splitlines() if line.strip()]
        wanted = [line for line in lines if re.search(pattern or r"^error: ", line)]
        return (wanted or lines or [""])[-1][:300]


def log_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's log."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / LOG_FILE).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a line that is being written
                lines.append(json.loads(line))
    return lines


class World:
    """A dataset, and undisturbed runs to compare with, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._straight: dict[int, Path] = {}

    @cached_property
    def dataset(self) -> Path:
        return make_dataset(self.folder / "dataset")

    @cached_property
    def num_file_events(self) -> dict[str, int]:
        """Number of file operations of an undisturbed run, in its folder and in `checkpoints`."""
        run, files = Run(self, "counted"), {}
        for part in ("", CHECKPOINTS_DIR):
            files[part] = self.folder / f"file-events-{part}"
        run.finish(
            calls={
                "train.py": [
                    ["count_file_events", str(run.run_dir / part), str(file)]
                    for part, file in files.items()
                ]
            }
        )
        return {part: int(file.read_text()) for part, file in files.items()}

    @cached_property
    def killed(self) -> Path:
        """The folder of a run that was killed at step 20, with several checkpoints."""
        run = Run(self, "killed")
        kill = ["at_step", 20, "send", signal.SIGKILL]
        run.start(calls={"train.py": [["slow_steps", 0.05], kill]}).join()
        return run.run_dir

    @property
    def killed_steps(self) -> list[int]:
        """The steps of its checkpoints."""
        return checkpoint_steps(self.killed)

    def straight(self, procs: int) -> Path:
        """Return the folder of an undisturbed run with `procs` ranks."""
        if procs not in self._straight:
            run = Run(self, f"undisturbed-{procs}", procs)
            run.finish()
            self._straight[procs] = run.run_dir
        return self._straight[procs]


class Run:
    """One run in a folder of its own, with the folders for its process ids and temporary files."""

    def __init__(
        self,
        world: World,
        name: str,
        procs: int = 1,
        *,
        dataset: Path | None = None,
        launcher: str = "",
        options: Sequence[str] = (),
        **overrides: Any,
    ) -> None:
        self.world, self.procs, self.options = world, procs, tuple(options)
        self.launcher = launcher or ("train.py" if procs == 1 else "launch/distributed.py")
        self.folder = world.folder / name
        self.run_dir, self.pids, self.temporary = (
            self.folder / part for part in ("run", "pids", "tmp")
        )
        for part in (self.pids, self.temporary):
            part.mkdir(parents=True)
        self._arguments = arguments(
            dataset or world.dataset, self.run_dir, **{**SCHEDULE, **overrides}
        )
        self.environment: dict[str, str] = {}
        self.last_life: Life | None = None  # the one that `conclude` has started

    @property
    def command(self) -> list[str]:
        """The run's command."""
        words = [warm.python(), str(ROOT / self.launcher), *self.options]
        if self.launcher == "launch/distributed.py":
            hostfile = self.folder / "hostfile"
            hostfile.write_text(f"localhost slots={self.procs}\n")
            words += ["--no-doctor", "--hostfile", str(hostfile)]
        elif self.launcher == "launch/local.py":
            words += ["--procs", str(self.procs)]
        return [*words, *self._arguments]

    def start(self, *, calls: dict[str, Calls] | None = None) -> Life:
        """Start the command, with `calls` of `fault_injection` in its scripts."""
        for file in self.pids.iterdir():
            file.unlink()
        kept = {
            key: value
            for key, value in os.environ.items()
            if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        environment = {
            **kept,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            CPU: "1",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.temporary),
            warm.BEFORE: ENTER,
            FAULT: json.dumps({"pids": str(self.pids), "calls": calls or {}}),
            **self.environment,
        }
        return Life(self.command, self.folder / "output", self.pids, environment)

    def finish(self, *, calls: dict[str, Calls] | None = None) -> Life:
        """Run the command to its end, which must be a success."""
        life = self.start(calls=calls)
        status = life.join()
        if status:
            raise RunError(f"ended with status {status}: {life.printed[-2000:]}")
        return life

    @property
    def logged(self) -> dict[int, float]:
        """Step -> time of its line in the log."""
        return {
            line["step"]: line["time"]
            for line in log_lines(self.run_dir)
            if line["event"] == "train"
        }

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        return checkpoint_steps(self.run_dir)

    def left(self, seconds: float = 10) -> list[str]:
        """Return this run's processes that do not end within `seconds`, and its stray files."""
        deadline = time.monotonic() + seconds
        while (alive := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.02)
        for _, pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        folder = self.run_dir / CHECKPOINTS_DIR
        stray = list(folder.glob(".*")) if folder.is_dir() else []
        stray += list(self.temporary.iterdir())
        return [f"process {name}" for name, _ in alive] + [
            str(path.relative_to(self.folder)) for path in stray
        ]

    def _alive(self) -> list[tuple[str, int]]:
        found = []
        for file in self.pids.iterdir():
            name, _, pid = file.name.rpartition("-")
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found.append((name, int(pid)))
        return found

    def differences(self) -> list[str]:
        """Compare checkpoint and log of the last step with those of an undisturbed run."""
        straight = self.world.straight(self.procs)
        found = checkpoint_differences(straight, self.run_dir, STEPS)
        ours, theirs = (
            [
                (line["event"], line["step"], *(line.get(key) for key in ("loss", "lr", "psnr_y")))
                for line in log_lines(run_dir)
                if line["event"] in ("train", "validation")
            ]
            for run_dir in (self.run_dir, straight)
        )
        if ours != theirs:
            found.append(f"log: {sorted(set(ours) ^ set(theirs))[:3]}")
        return found

    def move_to(self, run_dir: Path) -> None:
        """Use another run folder."""
        self._arguments = [
            argument.replace(str(self.run_dir), str(run_dir)) for argument in self._arguments
        ]
        self.run_dir = run_dir

    def conclude(self, outcome: Outcome, calls: dict[str, Calls] | None = None) -> Outcome:
        """Continue with the same command; fill in what was lost, what differs and what is left.

        `calls`: what goes on happening in its scripts.
        """
        outcome.left = [item for item in self.left() if item.startswith("process")]
        before = self.logged
        try:
            life = self.last_life = self.finish(calls=calls)
        except RunError as error:
            outcome.differences = [str(error)[-1500:]]
            return outcome
        outcome.continued = True
        self.count_lost(outcome, before, life)
        outcome.differences = self.differences()
        # What a kill has left in `checkpoints` goes with the next save, if there is one.
        is_over = outcome.resumed_at == STEPS
        outcome.left += [
            item for item in self.left() if not (is_over and item.startswith("run/checkpoints/"))
        ]
        return outcome

    def count_lost(self, outcome: Outcome, before: dict[int, float], life: Life) -> None:
        """Compare the log `before` a life with the step from which it continued."""
        resumed = re.search(r"continuing from step (\d+)|is finished at step (\d+)", life.printed)
        if not resumed and "global batch" not in life.printed:
            return  # killed before it got there
        first = outcome.resumed_at = int(resumed[1] or resumed[2]) if resumed else 0
        last = max(before, default=0)
        outcome.lost_steps = max(outcome.lost_steps, last - first)
        if first < last:
            # The line of `first` may be an earlier life's.
            seconds = before[last] - before.get(first + 1, before[last])
            outcome.lost_seconds = max(outcome.lost_seconds, round(seconds, 3))
