"""How much there is to send and how long a step takes: what a prediction of the network's cost needs to know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.shipped import ROOT, last_line
from pipeline import run_folder
from pipeline.cli import UserError

_COUNT = """
import sys
sys.path[:] = [path for path in sys.path if path]  # without the current folder
import torch
from pipeline.models import build_generator
from pipeline.models.discriminators import build_discriminator
from pipeline.recipe import load_recipe, parse_overrides
recipe = load_recipe(sys.argv[1], parse_overrides(sys.argv[2:])[0])
with torch.device("meta"):
    networks = [build_generator(recipe.generator.name, recipe.scale, **recipe.generator.params)]
    if recipe.adversarial:
        spec = recipe.adversarial.discriminator
        networks.append(build_discriminator(spec.name, recipe.data.crop, **spec.params))
print(sum(parameter.numel() for network in networks for parameter in network.parameters()))
"""


def count_parameters(recipe: str, overrides: Sequence[str] = ()) -> int:
    """The parameters that a recipe (of its stages the last) trains, its discriminator's among them.

    Networks are torch's, so another process counts them. `UserError` for a recipe that is none.
    """
    done = subprocess.run([sys.executable, "-c", _COUNT, recipe, *overrides], capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode != 0:
        complaint = last_line(done.stderr)
        raise UserError(f"--recipe {recipe}: {complaint.partition('UserError: ')[2] or complaint}")
    return int(last_line(done.stdout))


def step_seconds_of(run_dir: Path, ranks: int) -> float | None:
    """Seconds that each of `ranks` ranks will work on a step, after the speed that a run's log tells; `None` if none.

    What its own ranks spent on communication counts as work. The global batch stays, so its time goes down with ranks.
    """
    run_dir = run_folder.newest_stage(run_dir)
    try:
        batch = json.loads((run_dir / run_folder.DS_CONFIG_FILE).read_text())["train_batch_size"]
        newest = run_folder.checkpoint_dir(run_dir, run_folder.checkpoint_steps(run_dir)[-1])
        before = json.loads((newest / run_folder.MANIFEST_FILE).read_text())["world_size"]
        lines = (run_dir / run_folder.LOG_FILE).read_text().splitlines()
        speeds = [speed for speed in map(_images_per_second, lines) if speed]
        return batch / speeds[-1] * before / ranks
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def _images_per_second(line: str) -> float | None:
    try:
        values = json.loads(line)
        return float(values["images_per_second"]) if values["event"] == "train" else None
    except (ValueError, KeyError, TypeError):  # another event, or a line cut short
        return None
