"""Measure whether a long run keeps its memory, file handles and threads: one train.py, watched."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import psutil

from benchmarks.small_runs import arguments, make_dataset
from pipeline.cli import RunError, UserError, run
from pipeline.run_folder import LOG_FILE
from pipeline.training.options import steps_in_epochs

BATCH = 4
WARM_UP = 0.1  # of the steps; the first validation, save and log allocate what later ones use again
MIB, KIB = 1 << 20, 1 << 10


@dataclass(frozen=True)
class Options:
    """Train the smallest network for many steps, with periodic validations, saves and logs.

    Prints memory, open files and threads of the process at the start, in the middle and at the end
    (medians over a tenth of the run), and the slope of a straight line through all samples but
    those of the first tenth.

    Example: python benchmarks/long_run.py --json long_run.json
    """

    steps: int = 20_000
    """Number of steps; batches of 4."""
    files: int = 40
    """Training files: with 20,000 steps, 40 files make 2,000 epochs of the loader."""
    validate_every: int = 500
    """Steps between two validations."""
    save_every: int = 200
    """Steps between two saves."""
    log_every: int = 20
    """Steps between two lines of the log."""
    seconds: float = 1.0
    """Time between two samples."""
    json: Path | None = None
    """File for the samples."""


@dataclass(frozen=True)
class Sample:
    """The process at one moment."""

    step: int
    rss: int  # resident memory, bytes
    anonymous: int  # the part of it that belongs to no file: what a leak would fill
    files: int
    threads: int


def sample(process: psutil.Process, log: Path) -> Sample | None:
    """Measure the process; None before its first logged step."""
    step = _newest_step(log)
    if not step:
        return None
    status = Path(f"/proc/{process.pid}/status").read_text()
    rss, anonymous = (
        int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1]) * KIB
        for name in ("VmRSS", "RssAnon")
    )
    return Sample(step, rss, anonymous, process.num_fds(), process.num_threads())


def _newest_step(log: Path) -> int:
    """Return the step of the last whole line of a run's log, 0 without one."""
    if not log.exists():
        return 0
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().split(b"\n")[1:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def rows(samples: list[Sample], steps: int) -> list[tuple[str, str, str, str, str]]:
    """Return the table: quantity, start, middle, end, slope per 1,000 steps."""
    at = np.array([one.step for one in samples])
    kept = at >= WARM_UP * steps
    found = []
    for name, field, unit, slope_unit in (
        ("memory, RSS", "rss", "MiB", "KiB"),
        ("anonymous memory", "anonymous", "MiB", "KiB"),
        ("open files", "files", "", ""),
        ("threads", "threads", "", ""),
    ):
        values = np.array([getattr(one, field) for one in samples], dtype=float)
        medians = []
        for middle in (WARM_UP + 0.05, 0.5, 0.95):
            near = np.abs(at - middle * steps) <= 0.05 * steps
            if not near.any():
                raise RunError("too few samples for a table; give more --steps or fewer --seconds")
            medians.append(np.median(values[near]) / (MIB if unit else 1))
        slope = np.polyfit(at[kept], values[kept], 1)[0] * 1000 / (KIB if slope_unit else 1)
        shown = [f"{value:.1f} {unit}" if unit else f"{value:.0f}" for value in medians]
        found.append((name, *shown, f"{slope:+.1f} {slope_unit}" if unit else f"{slope:+.3f}"))
    return found


def main(options: Options) -> int:
    """Train, sample, print. Returns 0."""
    if options.steps < 10 * max(options.validate_every, options.save_every, options.log_every):
        raise UserError(
            f"--steps {options.steps} must be at least ten times --validate-every, --save-every "
            "and --log-every, so that the first tenth holds one of each"
        )
    with tempfile.TemporaryDirectory(prefix="long-run-") as folder:
        dataset, run_dir = make_dataset(Path(folder, "data"), options.files), Path(folder, "run")
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            *arguments(
                dataset,
                run_dir,
                steps=options.steps,
                validate_every=options.validate_every,
                save_every=options.save_every,
                log_every=options.log_every,
            ),
        ]
        samples, began = [], time.monotonic()
        with open(Path(folder, "output"), "wb") as output:
            child = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "VASTSCALE_CPU": "1"},
            )
            process = psutil.Process(child.pid)
            while child.poll() is None:
                with contextlib.suppress(psutil.Error, OSError, TypeError):  # it is ending
                    found = sample(process, run_dir / LOG_FILE)
                    if found:
                        samples.append(found)
                time.sleep(options.seconds)
        if child.returncode:
            raise RunError(
                f"train.py ended with status {child.returncode}: "
                f"{Path(folder, 'output').read_text()[-2000:]}"
            )
        minutes = (time.monotonic() - began) / 60
        epochs = options.steps // steps_in_epochs(1, options.files, BATCH)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in samples]) + "\n")
    print(
        f"{options.steps:,} steps, {epochs:,} epochs, "
        f"{options.steps // options.validate_every} validations, "
        f"{options.steps // options.save_every} saves, {options.steps // options.log_every:,} "
        f"lines of the log, in {minutes:.1f} min; {len(samples)} samples\n"
    )
    print("| quantity | start | middle | end | slope per 1,000 steps |\n|---|---|---|---|---|")
    for row in rows(samples, options.steps):
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    run(Options, main)
