"""Check that training would accept every candidate of a search, in a process of its own.

The process needs torch. It reads a task as JSON from stdin and prints one line per valid candidate,
or one error on stderr (exit status 2).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.environment import prepare
from pipeline.cli import RunError, UserError
from pipeline.config.ds_config import batch_sizes
from pipeline.training.options import TrainOptions, make_plans
from tools.parallel import progress

FREE_BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class Candidate(NamedTuple):
    """Overrides of a training command, and the one being checked, for messages."""

    shown: str
    overrides: tuple[str, ...]


def check(options: TrainOptions, candidates: Sequence[Candidate], world_size: int) -> None:
    """Raise `UserError` for the first candidate that training would reject on these ranks."""
    places = {
        name: [str(path) for path in getattr(options, name)] for name in ("dataset_dir", "lr_dir")
    }
    task = {
        "recipe": options.recipe,
        "ds_config": str(options.ds_config) if options.ds_config else None,
        **places,
        "world_size": world_size,
        "candidates": candidates,
    }
    with tempfile.TemporaryFile("w+") as complaints, progress(len(candidates), "value") as bar:
        bar.set_description("checking the space")
        with subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            text=True,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=prepare(1, on_gpu=False),
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(task))
            process.stdin.close()
            for _ in process.stdout:
                bar.update()
        complaints.seek(0)
        messages = complaints.read().strip().splitlines() or [
            f"the check ended with status {process.returncode}"
        ]
    if process.returncode == 2 and messages[-1].startswith("error: "):
        raise UserError(messages[-1].removeprefix("error: "))
    if process.returncode:
        raise RunError(f"the search space could not be checked: {messages[-1]}")


def _check_one(options: TrainOptions, candidate: Candidate, world_size: int) -> None:
    from pipeline.distributed.ranks import Ranks
    from pipeline.training.setup import check_stages

    class Alone(Ranks):
        """One rank without a process group."""

        def gather(self, value: Any) -> list[Any]:
            return [value]

    plans = make_plans(replace(options, overrides=candidate.overrides))
    for plan in plans:
        batch_sizes(plan.ds_config, world_size)
    plans = [
        replace(
            plan,
            ds_config={
                key: value for key, value in plan.ds_config.items() if key not in FREE_BATCH
            },
        )
        for plan in plans
    ]
    # Also check the first stage as if it followed another one.
    check_stages([plans[0], *plans], Alone(0, 1, 0, None, None))


def _main() -> int:
    task = json.load(sys.stdin)
    options = TrainOptions(
        recipe=task["recipe"],
        ds_config=task["ds_config"] and Path(task["ds_config"]),
        dataset_dir=tuple(map(Path, task["dataset_dir"])),
        lr_dir=tuple(map(Path, task["lr_dir"])),
    )
    for shown, overrides in task["candidates"]:
        try:
            _check_one(options, Candidate(shown, tuple(overrides)), task["world_size"])
        except (UserError, RunError) as error:
            print(f"error: {f'with {shown}: ' if shown else ''}{error}", file=sys.stderr)
            return 2 if isinstance(error, UserError) else 1
        print(shown, flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.exit(_main())
