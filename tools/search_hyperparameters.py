"""Search hyperparameters with short training runs that can be pruned and resumed."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import tyro

from launch.environment import num_gpus
from pipeline.cli import UserError, run, say
from pipeline.config.ds_config import batch_sizes, ds_differences
from pipeline.config.recipe import changes, parse_overrides, recipe_differences, recipe_of
from pipeline.files import short_path, write_atomically
from pipeline.metrics import metric_of
from pipeline.run_folder import RUNS_DIR
from pipeline.training.options import TrainOptions, TrainPlan, make_plans, overrides_last
from tools.search import report
from tools.search.check import Candidate, check
from tools.search.run import Budget, Machine, Objective, Search
from tools.search.space import Space, read_space, space_of
from tools.search.study import IDENTITY, Pruner, StudyFolder, open_study, pruner_of, read_study

PICTURE_FILE = "search.png"
FLAGS = ("--reset", "--show")
LONGEST_MINUTES = 1e6


@dataclass(frozen=True)
class Options:
    """Search hyperparameters with Optuna: train short runs with different values and rank them.

    Each trial is a training run in runs/<study>/trial-0000, trial-0001, ...:
    ./launch_local_train.sh with overrides. Its validations are followed as they come, and a trial
    that is worse than others were at that step is stopped early. The best trial so far is always in
    runs/<study>/best.yaml, a complete recipe that can be trained as it is.

    CTRL+C saves the running trials. The same command continues them, even after kill -9 or a power
    failure. Several machines with a shared disk may run the same command at once.

    Example: python tools/search_hyperparameters.py demo --recipe demo --dataset-dir ~/dataset
    --steps 300 --trials 12
    """

    space: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPACE")]
    """A name in recipes/searches/ or the path of a YAML file: override -> its range or choices."""
    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE ...")
    ] = ()
    """Overrides of all trials: key=value for the recipe, ds.key=value for DeepSpeed's
    configuration."""
    recipe: str = "vapsr_x2"
    """Recipe to optimise: a name in recipes/ or the path of a YAML file."""
    dataset_dir: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = ()
    """Dataset folder, as for training; may be given several times. Default: ~/dataset."""
    lr_dir: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = ()
    """LR folder, as for training; for data.degradation=paired."""
    ds_config: Path | None = None
    """DeepSpeed's configuration. Default: the recipe's."""
    output_dir: Path | None = None
    """Folder of the study. Default: runs/search-<space> in the current folder."""
    steps: int = 2000
    """Optimizer updates per trial, the same for all; a schedule of length auto ends with them."""
    trials: int = 20
    """Total number of trials, including those of earlier calls and other machines."""
    timeout: float = 0
    """Save the running trials and stop after this many minutes; 0 disables. The same command
    continues."""
    metric: str = "psnr"
    """Score of a trial, taken from its best validation: highest PSNR-Y (psnr), lowest LPIPS (lpips,
    which needs validation_lpips=alex or another), or another metric of pipeline/metrics, which
    validation_metrics must list."""
    pruner: Pruner = "median"
    """How trials are stopped early. median: if worse than the median of the finished trials at that
    step, from the sixth trial on. hyperband: many short trials and few long ones, for about 30
    trials or more."""
    prune_after: int | None = None
    """Never stop a trial before this many steps. Default: a quarter of --steps."""
    seed: int = 0
    """Seed of the search; training uses the recipe's seed."""
    jobs: int = 0
    """Number of parallel trials. 0: as many as the GPUs allow, or one on a CPU."""
    procs: int = 1
    """Ranks per trial: GPUs, or processes on a CPU."""
    keep: int = 3
    """Number of best trials whose checkpoints are kept; those of others are removed, but not their
    logs."""
    show: bool = False
    """Only show the results so far; works while the search is running, too."""
    reset: bool = False
    """Start a new study; the old one is moved to <output-dir>.bak-<time>."""


def main(options: Options) -> int:
    """Run the search.

    Returns 0 when done, 128 + signal when stopped and saved, 2 for bad input, 1 if the first trials
    fail.
    """
    _check_options(options)
    name = Path(options.space).stem if options.space.endswith((".yaml", ".yml")) else options.space
    folder = StudyFolder(
        (options.output_dir or RUNS_DIR / f"search-{name}").expanduser().absolute()
    )
    if options.show:
        return _show(folder)
    space = read_space(options.space)
    budget = _budget(options)
    training = TrainOptions(
        recipe=options.recipe,
        dataset_dir=options.dataset_dir,
        lr_dir=options.lr_dir,
        ds_config=options.ds_config,
    )
    target = _target(options, space, training, budget)
    machine = _machine(options, target.plans)
    old = None if options.reset else read_study(folder)
    if old is None or IDENTITY not in old.user_attrs:
        _check_values(target, machine)  # before anything is created or moved
    with folder.entered(reset=options.reset) as kept:
        if kept:
            print(f"the old study is kept in {short_path(kept)}")
        direction = "minimize" if metric_of(options.metric).lower_is_better else "maximize"
        study = open_study(
            folder, direction, pruner_of(options.pruner, options.steps, budget.prune_after)
        )
        with folder.alone():
            if IDENTITY in study.user_attrs:
                _check_identity(folder, study.user_attrs[IDENTITY], target)
            else:
                study.set_user_attr(IDENTITY, _identity(target))
        status = Search(folder, study, target, budget, machine).run()
        if not status:
            _print_report(folder, study, space, options.metric)
        return status


def _check_options(options: Options) -> None:
    for name, least in (
        ("steps", 1),
        ("trials", 1),
        ("seed", 0),
        ("jobs", 0),
        ("procs", 1),
        ("keep", 1),
    ):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)} must be at least {least}")
    if not 0 <= options.timeout < LONGEST_MINUTES:
        raise UserError(f"--timeout {options.timeout:g} must be at least 0 minutes; 0 disables it")
    if options.prune_after is not None and not 0 <= options.prune_after <= options.steps:
        raise UserError(
            f"--prune-after {options.prune_after} must be from 0 to --steps {options.steps}"
        )
    metric_of(options.metric)  # raises for an unknown metric


def _budget(options: Options) -> Budget:
    after = options.steps // 4 if options.prune_after is None else options.prune_after
    return Budget(
        options.trials,
        options.steps,
        after,
        options.timeout * 60 or math.inf,
        options.keep,
        options.seed,
    )


def _target(options: Options, space: Space, training: TrainOptions, budget: Budget) -> Objective:
    """Build the objective; validates ten times per trial unless that interval is given."""
    given: dict[str, Any] = {}
    for word in options.overrides:
        recipe, ds_config = parse_overrides([word])
        given |= recipe | {f"ds.{key}": value for key, value in ds_config.items()}
    if "steps" in given:
        raise UserError(f"steps={given['steps']}: the length of a trial is set with --steps")
    for key in given:
        if key in (parameter.key for parameter in space.parameters):
            raise UserError(f"{key} is given on the command line and in the search space; omit one")
    measured = [f"steps={budget.steps}"]
    if "validate_every" not in given:
        measured.append(f"validate_every={max(1, budget.steps // 10)}")
    if not any(key.partition(".")[0] == "healing" for key in given):
        # A trial that diverges has bad values. Going back with a lower rate would hide that.
        measured.append("healing=off")
    fixed = (*options.overrides, *measured)
    plans = make_plans(_with(training, fixed))
    base = make_plans(
        _with(
            training,
            tuple(word for word in options.overrides if not word.startswith("validate_every=")),
        )
    )
    recipe = plans[-1].recipe
    if metric_of(options.metric).name not in recipe.measured():
        if options.metric == "lpips":
            raise UserError(
                "--metric lpips needs LPIPS in validation; set validation_lpips=alex, squeeze or "
                "vgg"
            )
        raise UserError(
            f"--metric {options.metric} is not measured in validation; set "
            f"validation_metrics=[{options.metric}]"
        )
    return Objective(space, training, fixed, options.metric, plans, base)


def _with(training: TrainOptions, overrides: Sequence[str]) -> TrainOptions:
    return TrainOptions(**{**vars(training), "overrides": tuple(overrides)})


def _machine(options: Options, plans: Sequence[TrainPlan]) -> Machine:
    """Number of parallel trials, and their GPUs."""
    gpus = num_gpus()
    jobs = options.jobs or (gpus // options.procs if gpus else 1)
    if gpus and (jobs < 1 or jobs * options.procs > gpus):
        raise UserError(
            f"--jobs {max(1, jobs)} with --procs {options.procs} needs "
            f"{max(1, jobs) * options.procs} GPUs; this machine has {gpus}"
        )
    for plan in plans:
        batch_sizes(plan.ds_config, options.procs)
    return Machine(jobs, options.procs, gpus)


def _check_values(target: Objective, machine: Machine) -> None:
    """Check the ends of each range and each choice before the first trial.

    Raises `UserError` for values that training would reject.
    """
    candidates = [Candidate("", target.fixed)]
    candidates += [
        Candidate(shown, target.overrides(values)) for shown, values in target.space.checked()
    ]
    check(target.training, candidates, machine.procs)


def _identity(target: Objective) -> dict[str, Any]:
    """Everything that defines a study; it must not change between calls."""
    return {
        "space": target.space.source,
        "metric": target.metric,
        "recipes": [plan.recipe.model_dump(mode="json") for plan in target.plans],
        "ds_configs": [plan.ds_config for plan in target.plans],
        "dataset": target.plans[-1].dataset.identity(),
    }


def _check_identity(folder: StudyFolder, stored: Mapping[str, Any], target: Objective) -> None:
    """Raise `UserError` that lists the differences between the study on disk and this call."""
    requested = _identity(target)
    found = target.space.differences(stored["space"])
    names = {"metric": "--metric", "steps": "--steps"}
    found += changes(
        {names["metric"]: stored["metric"]}, {names["metric"]: requested["metric"]}, owner="study"
    )
    stages = changes(
        {"stages": len(stored["recipes"])}, {"stages": len(requested["recipes"])}, owner="study"
    )
    found += stages
    if not stages:
        for old, plan in zip(stored["recipes"], target.plans, strict=True):
            before = recipe_of(old, str(folder.path))
            found += recipe_differences(before, plan.recipe, "study")
            # Training allows changes of these.
            free = ("steps", "validate_every", "validation_images", "patience")
            found += changes(
                *(
                    {names.get(key, key): getattr(recipe, key) for key in free}
                    for recipe in (before, plan.recipe)
                ),
                owner="study",
            )
        for old_ds, plan in zip(stored["ds_configs"], target.plans, strict=True):
            found += ds_differences(old_ds, plan.ds_config, "study")
    known = {key: requested["dataset"][key] for key in stored["dataset"]}
    found += changes(stored["dataset"], known, "dataset ", owner="study")
    if found:
        raise UserError(
            f"{folder.path} contains a different study: {'; '.join(dict.fromkeys(found))}. "
            "Continue with its original settings, give --output-dir, or start again with --reset "
            "(the old study is kept)"
        )


def _show(folder: StudyFolder) -> int:
    """Show the study; writes nothing but the picture."""
    study = read_study(folder)
    stored = study.user_attrs.get(IDENTITY) if study else None
    if stored is None:
        raise UserError(f"there is no study in {folder.path}; omit --show to start one")
    _print_report(folder, study, space_of(stored["space"]), stored["metric"])
    return 0


def _print_report(folder: StudyFolder, study: Any, space: Space, metric: str) -> None:
    """Print the table and importances, draw the picture, and say what to do next."""
    print(report.trial_table(study, space, metric))
    shares = report.importances(study, space)
    if shares:
        print(
            f"\nshare of the variance of the {metric_of(metric).title} of complete trials (fANOVA):"
        )
        print(report.importance_lines(shares))
    with contextlib.suppress(OSError):
        write_atomically(folder.path / PICTURE_FILE, report.draw(study, space, metric))
        print(f"\npicture: {short_path(folder.path / PICTURE_FILE)}")
    best = folder.path / "best.yaml"
    if best.is_file():
        say(
            "train the best trial with all steps of its recipe: ./launch_local_train.sh --recipe "
            f"{short_path(best)}"
        )


if __name__ == "__main__":
    run(Options, main, overrides_last(sys.argv[1:], FLAGS))
