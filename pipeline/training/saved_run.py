"""The run on disk: whether it is the one a plan asks for, and whether it is already finished.

Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.checkpoint.progress import read_progress
from pipeline.checkpoint_index import DamagedError, damage, read_index
from pipeline.cli import UserError
from pipeline.config.ds_config import ds_differences, precision_of
from pipeline.config.recipe import changes, recipe_differences, recipe_of
from pipeline.data.image_files import TRAINING_LIST
from pipeline.distributed.gpus import is_cpu_wanted, may_have_gpu
from pipeline.distributed.launcher import GUARDED, find_rank_info
from pipeline.monitor.console import RUN_LOG_FILE, Console
from pipeline.run_folder import (
    DS_CONFIG_FILE,
    FILE_LISTS_DIR,
    RECIPE_FILE,
    REPLACED,
    STATE_FILE,
    WEIGHTS_FILES,
    checkpoint_dir,
    checkpoint_folders,
    checkpoint_steps,
    newest_intact,
)
from pipeline.training.options import TrainOptions, TrainPlan, make_plan


def refuse_other_run(plan: TrainPlan, wanted: dict[str, Any], index: dict[str, Any]) -> None:
    """Raise `UserError` naming the fields in which the run on disk differs from `plan`.

    The number of ranks may differ; `batch_sizes` refuses a global batch that it does not divide.
    """
    found, step = index["identity"], index["step"]
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
    if wanted.get("teacher_sha256", found.get("teacher_sha256")) != found.get("teacher_sha256"):
        differences.append("the weights in teacher.file have changed")
    # A run of an earlier version may have recorded fewer keys.
    known = {key: wanted["dataset"].get(key) for key in found["dataset"]}
    changed = changes(found["dataset"], known, "dataset ")
    if changed:
        named = plan.dataset.differences(plan.run_dir / FILE_LISTS_DIR)
        differences += named + [line for line in changed if not (named and "lists_sha256" in line)]
    if differences:
        raise UserError(
            f"{plan.run_dir} holds another run (step {step}): {'; '.join(differences)}. Continue "
            "it with its original settings (the recipe is in its recipe.yaml: --recipe), give "
            "another --output-dir, or start a new run with --reset (the old run is kept)"
        )


def as_recorded(plan: TrainPlan) -> TrainPlan | None:
    """Return the plan with the generator's parameters that its run on disk has adopted.

    The run took them from its start file, which may have changed or gone since. None if there is no
    run yet.
    """
    for step in reversed(checkpoint_steps(plan.run_dir)):
        with suppress(DamagedError):
            identity = read_index(checkpoint_dir(plan.run_dir, step))["identity"]
            adopted, params = identity.get("adopted", {}), plan.recipe.generator.params
            recorded = {
                key: value
                for key, value in identity.get("recipe", {}).get("generator", {}).items()
                if key != "name"
            }
            for key, asked in adopted.items():
                # If the recipe now says something else, `refuse_other_run` names the difference.
                if key not in plan.fixed_params and params.get(key) == asked:
                    params.pop(key, None)
                    params |= {key: recorded[key]} if key in recorded else {}
            return plan.with_start_params(params, adopted)
    return None


def plan_of_run(
    run_dir: Path,
    dataset_dir: tuple[Path, ...] = (),
    lr_dir: tuple[Path, ...] = (),
    overrides: tuple[str, ...] = (),
) -> TrainPlan:
    """Return the plan of the run (or stage) in `run_dir`, from its own recipe, with its dataset.

    Raises `UserError` if it is no run folder, or if the dataset's lists have changed since.
    """
    for name in (RECIPE_FILE, DS_CONFIG_FILE, FILE_LISTS_DIR):
        if not (run_dir / name).exists():
            raise UserError(
                f"{run_dir}: not a run folder (it has no {name}); give one such as runs/vapsr_x4"
            )
    options = TrainOptions(
        overrides,
        recipe=str(run_dir / RECIPE_FILE),
        ds_config=run_dir / DS_CONFIG_FILE,
        dataset_dir=dataset_dir,
        lr_dir=lr_dir,
    )
    plan = make_plan(options)
    lists = run_dir / FILE_LISTS_DIR
    folders = len(list(lists.glob(f"*_{TRAINING_LIST}")))
    if folders != len(plan.dataset.folders):
        raise UserError(
            f"{run_dir}: started with {folders} dataset folders, not {len(plan.dataset.folders)}; "
            "give each one with --dataset-dir, in the same order"
        )
    if differences := plan.dataset.differences(lists):
        raise UserError(
            f"{run_dir}: its dataset's lists have changed: {'; '.join(differences)}; give the "
            "folders it was started with, with --dataset-dir"
        )
    return plan


def newest_of_previous(plan: TrainPlan) -> int | None:
    """Return the newest intact step of the previous stage, or None if this one starts otherwise."""
    if plan.previous is None or plan.recipe.start != "previous":
        return None
    return newest_intact(plan.previous, WEIGHTS_FILES)


def nothing_left(plan: TrainPlan, step: int) -> str:
    """Return the message for a stage that is finished at `step`."""
    what = f"stage {plan.recipe.stage}" if plan.recipe.stage else "this run"
    return (
        f"nothing left to do: {what} is finished at step {step} of {plan.total_steps} (--reset "
        "starts a new run; to train longer, set steps=N or --patience N)"
    )


# A finished run is reported from its checkpoint alone: importing torch and DeepSpeed, building
# engines and reading the validation set would take seconds to find that nothing is left to do. One
# process does this before any ranks exist, and only if it is certain: the newest checkpoint of
# every stage is at its end, is intact by its hashes, and belongs to this plan. Everything else (a
# damaged checkpoint, another run, another precision) goes through the normal start, which reports
# and repairs.


def report_if_finished(plans: Sequence[TrainPlan]) -> bool:
    """Report that nothing is left to do if that is certain for every stage.

    Returns whether it is; otherwise nothing is printed or changed.
    """
    if any(plan.reset or plan.wandb or plan.from_step is not None for plan in plans):
        return False
    if not _is_alone():
        return False
    steps = [_last_step(plan) for plan in plans]
    if None in steps:
        return False
    console = Console()
    for plan, step in zip(plans, steps, strict=True):
        console.log_to(plan.log_dir / RUN_LOG_FILE)
        console.say(nothing_left(plan, step))
        console.close()
    return True


def _is_alone() -> bool:
    """Whether no other rank waits for this process and no supervisor waits for a rank."""
    with suppress(UserError):  # the normal start reports it
        return find_rank_info().world_size == 1 and GUARDED not in os.environ
    return False


def _last_step(plan: TrainPlan) -> int | None:
    """Return the step at which the stage is finished, or None if it is not or that is uncertain."""
    with suppress(UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        step = max(checkpoint_steps(plan.run_dir), default=None)
        # Only the state at first: the rest takes time to read, and few runs are finished.
        if (
            step is None
            or damage(checkpoint_dir(plan.run_dir, step), {STATE_FILE})
            or not read_progress(plan.run_dir, step).is_finished(
                plan.total_steps, plan.recipe.patience
            )
        ):
            return None
        # The normal start repairs a replacement that was interrupted between its two renames.
        if any(folder.prefix == REPLACED for folder in checkpoint_folders(plan.run_dir)):
            return None
        index = read_index(checkpoint_dir(plan.run_dir, step))
        began = index["identity"].get("began_with_step")
        if began is not None and began != newest_of_previous(plan):
            return None
        # Signs of a GPU are taken for a usable one. If that is wrong, the precision differs and the
        # normal start decides.
        precision = precision_of(
            plan.ds_config, on_cpu=is_cpu_wanted() or not may_have_gpu(), runtime=plan.runtime
        )
        recorded = as_recorded(plan) or plan
        refuse_other_run(recorded, {**recorded.identity, "precision": precision}, index)
        if not damage(checkpoint_dir(plan.run_dir, step)):
            return step
    return None
