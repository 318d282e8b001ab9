"""A run that is killed at any moment, also during a save, loses no committed checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

from comparison import checkpoint_differences
from lives import start, train
from pipeline.checkpoint_index import damage
from pipeline.models.posthoc_ema import WIDTHS
from pipeline.run_folder import (
    AVERAGES_DIR,
    STATE_FILE,
    checkpoint_dir,
    checkpoint_steps,
    power_average_file,
)
from warm import Fork

KILLS = 20
STEPS = 450
OVERRIDES = (
    f"steps={STEPS}",
    "save_every=2",
    "validate_every=50",
    "log_every=20",
    "posthoc_ema=on",
)


def wait_for_step(run_dir: Path, process: Fork, step: int) -> None:
    deadline = time.monotonic() + 60
    while process.is_alive() and max(checkpoint_steps(run_dir), default=0) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.002)


def saves_under_way(run_dir: Path) -> set[tuple[str, int]]:
    """Return the unfinished checkpoints, including those left by earlier kills."""
    found = set()
    for folder in (run_dir / "checkpoints").glob(".tmp-step-*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((folder.name, folder.stat().st_ino))
    return found


def wait_for_a_save(
    run_dir: Path, process: Fork, before: set[tuple[str, int]], delay: float
) -> None:
    """Return in the middle of a save, `delay` seconds after its folder has appeared."""
    deadline = time.monotonic() + 60
    while process.is_alive() and not saves_under_way(run_dir) - before:
        assert time.monotonic() < deadline, "no save began"
        time.sleep(0.0005)
    time.sleep(delay)


def snapshots(run_dir: Path) -> list[int]:
    return checkpoint_steps(run_dir, AVERAGES_DIR)


def test_twenty_kills_cost_nothing(dataset: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    lives, interrupted_saves, before = 0, 0, 0
    run_dir, straight = tmp_path / "killed", tmp_path / "straight"
    while lives < KILLS:
        leftovers = saves_under_way(run_dir)
        (life,) = start(dataset, run_dir, *OVERRIDES)
        if lives % 4 == 3:
            time.sleep(draw.uniform(0.0, 1.5))  # most likely before the first step
        else:
            wait_for_step(run_dir, life, before + draw.randint(0, 16))
            time.sleep(draw.uniform(0, 0.05))
        if lives % 2:
            wait_for_a_save(run_dir, life, leftovers, draw.uniform(0, 0.01))
        assert life.is_alive(), "the run ended before its kills; increase STEPS"
        with contextlib.suppress(ProcessLookupError):
            os.kill(life.pid, signal.SIGKILL)
        life.join()
        lives += 1
        interrupted_saves += bool(saves_under_way(run_dir) - leftovers)
        steps = checkpoint_steps(run_dir)
        assert [damage(checkpoint_dir(run_dir, step)) for step in steps] == [""] * len(steps)
        assert not steps or steps[-1] >= before  # no committed checkpoint is lost
        before = steps[-1] if steps else 0
        for step in (kept := snapshots(run_dir)):
            assert damage(checkpoint_dir(run_dir, step, AVERAGES_DIR)) == ""
        assert not kept or kept[-1] <= before  # none is of a step that is repeated
    assert before > 0
    assert interrupted_saves >= 5
    train(dataset, run_dir, *OVERRIDES)
    # How often it saves does not change what it learns, only which checkpoints are healthy.
    train(dataset, straight, *OVERRIDES, f"save_every={STEPS}")
    assert checkpoint_differences(straight, run_dir, STEPS) == ["state.json"]
    # Nor is a snapshot of the averages lost, or of other weights.
    assert snapshots(straight) == snapshots(run_dir)
    assert len(snapshots(run_dir)) > 40
    for step in snapshots(run_dir):
        for name in map(power_average_file, WIDTHS):
            first, second = (
                checkpoint_dir(folder, step, AVERAGES_DIR) / name for folder in (straight, run_dir)
            )
            assert first.read_bytes() == second.read_bytes()
    states = [
        json.loads((checkpoint_dir(folder, STEPS) / STATE_FILE).read_text())
        for folder in (straight, run_dir)
    ]
    differing = {key for key in states[0] if states[0][key] != states[1][key]}
    assert differing <= {"healthy_step", "candidate_step"}
