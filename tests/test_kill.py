"""A training that is killed at any moment, saves included, loses nothing that was committed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

from comparison import checkpoint_differences
from conftest import SMALL
from pipeline.checkpoint import damage
from pipeline.run_folder import checkpoint_dir, checkpoint_steps

KILLS = 20
STEPS = 400


def train(dataset: str, run_dir: str) -> None:
    """One life, in a process forked after the imports, so that a life takes a second."""
    import torch

    from pipeline.options import TrainOptions
    from pipeline.train import main

    torch.set_num_threads(1)
    with open(Path(run_dir).parent / "output.txt", "a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    overrides = (*SMALL, f"steps={STEPS}", "save_every=2", "validate_every=50", "log_every=20")
    sys.exit(main(TrainOptions(overrides=overrides, recipe="demo", dataset_dir=Path(dataset),
                               output_dir=Path(run_dir))))


def wait_for_a_save(run_dir: Path, process: multiprocessing.process.BaseProcess, delay: float) -> None:
    """Return in the middle of a save, `delay` seconds after its folder has appeared."""
    while process.is_alive():
        if any((run_dir / "checkpoints").glob(".tmp-step-*")):
            time.sleep(delay)
            return
        time.sleep(0.0005)


def test_twenty_kills_cost_nothing(dataset: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "nvidia.dali.fn", "pipeline.train"])
    draw = random.Random(0)
    lives, interrupted_saves, before = 0, 0, 0
    run_dir = tmp_path / "killed" / "run"
    run_dir.parent.mkdir()
    while lives < KILLS:
        life = context.Process(target=train, args=(str(dataset), str(run_dir)))
        life.start()
        if lives % 2:
            time.sleep(draw.uniform(0.0, 2.5))
        else:
            time.sleep(draw.uniform(0.8, 1.8))
            wait_for_a_save(run_dir, life, draw.uniform(0, 0.02))
        assert life.is_alive(), "the run ended before its kills: give it more STEPS"
        with contextlib.suppress(ProcessLookupError):
            os.kill(life.pid, signal.SIGKILL)
        life.join()
        lives += 1
        interrupted_saves += any((run_dir / "checkpoints").glob(".tmp-step-*"))
        steps = checkpoint_steps(run_dir)
        assert [damage(checkpoint_dir(run_dir, step)) for step in steps] == [""] * len(steps)
        assert not steps or steps[-1] >= before  # nothing that was committed is lost
        before = steps[-1] if steps else 0
    assert before > 0
    assert interrupted_saves >= 5
    for name, folder in (("killed", run_dir), ("straight", tmp_path / "straight" / "run")):
        folder.parent.mkdir(exist_ok=True)
        last = context.Process(target=train, args=(str(dataset), str(folder)))
        last.start()
        last.join(120)
        assert last.exitcode == 0, (tmp_path / name / "output.txt").read_text()[-3000:]
    assert checkpoint_differences(tmp_path / "straight" / "run", run_dir, STEPS) == []
