"""The best trial as a recipe that trains as it is: recipe file, DeepSpeed's files beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.recipe import ROOT
from pipeline.files import write_atomically
from pipeline.training.options import Plan

BEST_FILE = "best.yaml"
NOT_OF_A_STAGE = ("name", "stage")


def write_best(folder: Path, plans: Sequence[Plan], base: Sequence[Plan], said: str) -> Path:
    """Write best.yaml and what it needs into `folder`.

    It says all that the recipe of the trial (its `plans`, one a stage) says, so that no later change of a base recipe
    alters it; how long to train and how often to measure are as in the recipe that the search began with (`base`).
    `said` goes on top as a comment.
    """
    stages = {}
    for plan, before in zip(plans, base, strict=True):
        values = plan.recipe.model_dump(mode="json", exclude_unset=True)
        for name in ("steps", "validate_every"):
            values[name] = getattr(before.recipe, name)
        prefix = f"best_{plan.recipe.stage}" if plan.recipe.stage else "best"
        values["ds_config"] = _write_ds_config(folder / f"{prefix}_ds_config.json", plan.ds_config)
        if plan.recipe.adversarial and plan.recipe.adversarial.ds_config and plan.discriminator_ds_config:
            values["adversarial"]["ds_config"] = _write_ds_config(
                folder / f"{prefix}_discriminator_ds_config.json", plan.discriminator_ds_config)
        stages[plan.recipe.stage] = values
    name = {"name": re.sub(r"[^A-Za-z0-9._-]", "-", f"{folder.name}-best")}
    if "" in stages:
        recipe = {**stages[""], **name}
    else:
        recipe = {**name, "scale": plans[0].recipe.scale, "stages": {
            stage: {key: value for key, value in values.items() if key not in NOT_OF_A_STAGE}
            for stage, values in stages.items()}}
    comment = "".join(f"# {line}\n" for line in said.splitlines())
    write_atomically(folder / BEST_FILE, (comment + yaml.safe_dump(recipe, sort_keys=False)).encode())
    return folder / BEST_FILE


def _write_ds_config(path: Path, values: dict[str, Any]) -> str:
    """Write DeepSpeed's file; returns its name for a recipe, seen from the checkout if it lies in there."""
    path = path.absolute()
    write_atomically(path, json.dumps(values, indent=2).encode() + b"\n")
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
