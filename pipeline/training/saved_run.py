"""The run on disk that a plan asks for: whether it is that one, and whether it is finished already.
Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pipeline.checkpoint.manifest import damage, read_manifest
from pipeline.checkpoint.progress import read_progress
from pipeline.cli import UserError
from pipeline.config.ds_config import ds_differences, precision_of
from pipeline.config.recipe import changes, recipe_differences, recipe_of
from pipeline.distributed.gpus import is_cpu_wanted, may_have_gpu
from pipeline.distributed.launcher import GUARDED, find_place
from pipeline.monitor.console import RUN_LOG_FILE, Console
from pipeline.run_folder import FILE_LISTS_DIR, checkpoint_dir, checkpoint_steps
from pipeline.training.options import Plan


def refuse_strangers(plan: Plan, wanted: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise `UserError` naming the fields in which the run on disk differs from what is asked for.

    The number of ranks may differ: a global batch that it does not divide is refused by
    `batch_sizes`.
    """
    found, step = manifest["identity"], manifest["step"]
    differences = recipe_differences(
        recipe_of(found["recipe"], f"the run in {plan.run_dir}"), plan.recipe
    )
    differences += ds_differences(found["ds_config"], plan.ds_config)
    differences += [
        f"discriminator's {line}"
        for line in ds_differences(
            found.get("discriminator_ds_config", {}), plan.discriminator_ds_config or {}
        )
    ]
    differences += changes({"precision": found["precision"]}, {"precision": wanted["precision"]})
    known = {
        key: wanted["dataset"][key] for key in found["dataset"]
    }  # a run of an earlier version may hold fewer
    changed = changes(found["dataset"], known, "dataset ")
    if changed:
        named = plan.dataset.differences(plan.run_dir / FILE_LISTS_DIR)
        differences += named + [line for line in changed if not (named and "lists_sha256" in line)]
    if differences:
        raise UserError(
            f"{plan.run_dir} holds another run (step {step}): {'; '.join(differences)}. Continue "
            "with what "
            "it was begun with, give --output-dir, or start afresh with --reset (the old run is "
            "kept)"
        )


def newest_of_previous(plan: Plan) -> int | None:
    """The step of the stage before that this one begins with, if it does."""
    if plan.previous is None or plan.recipe.start != "previous":
        return None
    return max(checkpoint_steps(plan.previous), default=None)


def nothing_left(plan: Plan, step: int) -> str:
    """What a stage says that is finished at `step`."""
    what = f"stage {plan.recipe.stage}" if plan.recipe.stage else "this run"
    return (
        f"nothing left to do: {what} is finished at step {step} of {plan.total_steps} (--reset "
        "starts afresh; for "
        "a longer one say steps=N, or --patience N)"
    )


# A finished run answers from its checkpoint. Importing torch and DeepSpeed, building engines and
# reading the validation set take seconds, to find nothing to do. Only what is certain is answered,
# by one process before there are ranks: the newest checkpoint of every stage is of its end, is
# whole by its hashes, and belongs to what is asked for. All else, a damaged checkpoint, another
# run, another precision, goes the usual way, which knows what to say and what to repair.


def says_finished(plans: Sequence[Plan]) -> bool:
    """Say of every stage that nothing is left to do, if that is certain. Otherwise nothing is said
    or changed."""
    if any(plan.reset or plan.wandb for plan in plans) or not _is_alone():
        return False
    steps = [_last_step(plan) for plan in plans]
    if None in steps:
        return False
    console = Console()
    for plan, step in zip(plans, steps, strict=True):
        console.keep_in(plan.log_dir / RUN_LOG_FILE)
        console.say(nothing_left(plan, step))
        console.close()
    return True


def _is_alone() -> bool:
    """Whether no other rank would wait for this process, and no supervisor for a rank."""
    with suppress(UserError):  # the usual way tells it
        return find_place().world_size == 1 and GUARDED not in os.environ
    return False


def _last_step(plan: Plan) -> int | None:
    """The step at which the stage is finished; None where it is not, or where that is not
    certain."""
    with suppress(UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        step = max(checkpoint_steps(plan.run_dir), default=None)
        if step is None or not read_progress(plan.run_dir, step).is_finished(
            plan.total_steps, plan.recipe.patience
        ):
            return None
        # A replacement that was cut off between its two renames is put back by the usual way.
        if any(checkpoint_dir(plan.run_dir, step).parent.glob(".old-step-*")):
            return None
        manifest = read_manifest(plan.run_dir, step)
        began = manifest["identity"].get("began_with_step")
        if began is not None and began != newest_of_previous(plan):
            return None
        # Where there are signs of a GPU, it is taken for one that can be used; another precision
        # goes the usual way.
        precision = precision_of(
            plan.ds_config, on_cpu=is_cpu_wanted() or not may_have_gpu(), runtime=plan.runtime
        )
        refuse_strangers(plan, {**plan.identity, "precision": precision}, manifest)
        if not damage(checkpoint_dir(plan.run_dir, step)):
            return step
    return None
