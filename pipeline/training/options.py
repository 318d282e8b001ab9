"""The command line of training and what it comes to: recipe, ds_config, lists, folders. Needs no
torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.cli import UserError
from pipeline.config.ds_config import Runtime, check_accelerate, choose_runtime, load_ds_config
from pipeline.config.recipe import ROOT, Recipe, load_stages, parse_overrides
from pipeline.data.dataset import Dataset, read_dataset
from pipeline.data.image_files import TRAINING_LIST, VALIDATION_LIST
from pipeline.distributed.launcher import find_place
from pipeline.run_folder import RUNS_DIR

DATASET_DIR = Path("~/dataset")
LONGEST_EPOCH = (
    1 << 25
)  # samples, by a multiplier: the order of an epoch is drawn at once, on every rank


@dataclass
class TrainOptions:
    """Train a super-resolution network.

    Continues the run in --output-dir if there is one, from the very sample where it stopped;
    --reset starts afresh. CTRL+C saves and stops. Values of the recipe and of DeepSpeed's file can
    be overridden at the end of the line: data.crop=128 generator.num_blocks=11
    ds.train_batch_size=32 ds.optimizer.params.lr=5e-4
    """

    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE ...")
    ] = ()
    """key=value over the recipe, ds.key=value over DeepSpeed's file."""
    recipe: str = "vapsr_x2"
    """A name in recipes/ or the path of a YAML file."""
    dataset_dir: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = ()
    """Folder with training_file_list.txt and validation_file_list.txt; may be given several times,
    with data.weights for how often each is shown. Default: ~/dataset."""
    lr_dir: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = ()
    """For data.degradation=paired: the folder of LR files, one for each --dataset-dir. Default: LR
    lies beside HR."""
    start: Path | None = None
    """Weights to begin with: a file, or a run folder, whose best averaged weights are taken.
    Default: the recipe's."""
    vgg_weights: Path | None = None
    """VGG19's weights for the loss vgg_feature. Default: the recipe's, or torchvision's cache."""
    dataset_multiplier: int | None = None
    """Random crops of every file an epoch. Default: the recipe's data.multiplier, 1."""
    output_dir: Path | None = None
    """The run folder: checkpoints, recipe, log. Default: runs/<recipe> in the current folder."""
    log_dir: Path | None = None
    """Where log.jsonl, run.log, tensorboard/ and samples/ go. Default: the run folder."""
    wandb: Annotated[str | None, tyro.conf.arg(metavar="PROJECT")] = None
    """Log to this project of Weights & Biases, too; offline where it cannot be reached. Needs `pip
    install wandb`."""
    ds_config: Path | None = None
    """DeepSpeed's configuration. Default: the recipe's, usually ds_config.json."""
    reset: bool = False
    """Start a fresh run; the old one is moved aside to <output-dir>.bak-<time>, never deleted."""
    max_epochs: int | None = None
    """Stop after so many passes over the training list, if that comes before the recipe's steps."""
    patience: int | None = None
    """Stop after so many validations in a row without a better PSNR (0: never). Default: the
    recipe's."""
    procs: int = 0
    """Processes on this machine; 0: one a GPU, or a single one on the CPU."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: this machine's GPUs, and a CPU where there are none; cpu: the CPU all the same (also
    VASTSCALE_CPU=1)."""
    runtime: Runtime = "auto"
    """What drives the ranks: DeepSpeed, or Accelerate's plain PyTorch. auto: Accelerate under
    `accelerate launch` and where DeepSpeed is not installed."""
    watchdog_minutes: float = 10
    """End a rank that has made no step for so long, after the first one, and say what it was doing;
    0: never."""


@dataclass(frozen=True)
class Plan:
    """Options, read and checked."""

    recipe: Recipe
    ds_config: dict[str, Any]
    dataset: Dataset
    run_dir: Path
    log_dir: Path
    home: Path  # the run's folder: `run_dir` itself, or where it lies as one of several stages
    previous: Path | None  # the run folder of the stage before
    discriminator_ds_config: dict[str, Any] | None
    reset: bool
    total_steps: int
    runtime: str = "deepspeed"  # or accelerate
    watchdog_minutes: float = 10
    wandb: str | None = None  # a project of Weights & Biases

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        gan = (
            {"discriminator_ds_config": self.discriminator_ds_config}
            if self.discriminator_ds_config
            else {}
        )
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "ds_config": self.ds_config,
            **gan,
            "dataset": self.dataset.identity(),
        }

    @property
    def counts_comms(self) -> bool:
        """Whether what ranks say to each other is counted."""
        return self.runtime == "deepspeed" and "comms_logger" in self.ds_config

    @property
    def epoch_length(self) -> int:
        """Samples in an epoch."""
        return sum(self.dataset.folder_sizes) * self.recipe.data.multiplier


def overrides_last(arguments: Sequence[str], flags: Collection[str] = ("--reset",)) -> list[str]:
    """The command line with its overrides behind its options, wherever they were typed. `flags`
    take no value."""
    options: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        before = options[-1] if options else ""
        is_value = (
            before.startswith("--") and "=" not in before and before.replace("_", "-") not in flags
        )
        is_override = re.match(r"[A-Za-z_][\w.]*=", argument) is not None
        (overrides if is_override and not is_value else options).append(argument)
    return options + overrides


def make_plan(options: TrainOptions) -> Plan:
    """Read and check what `options` name: of a recipe with stages, the last. `UserError` for
    whatever does not fit."""
    return make_plans(options)[-1]


def make_plans(options: TrainOptions) -> list[Plan]:
    """A plan for each stage of the recipe, in order; see `make_plan`."""
    recipe_overrides, ds_overrides = parse_overrides(options.overrides)
    given = {
        "patience": options.patience,
        "data.multiplier": options.dataset_multiplier,
        "start": options.start,
    }
    recipe_overrides |= {key: value for key, value in given.items() if value is not None}
    start = recipe_overrides.pop("start", None)
    recipes = load_stages(options.recipe, recipe_overrides)
    if options.vgg_weights is not None:
        recipes = [_with_vgg_weights(recipe, options.vgg_weights) for recipe in recipes]
        if not any("vgg_feature" in recipe.losses for recipe in recipes):
            raise UserError(
                f"--vgg-weights {options.vgg_weights}: recipe {options.recipe} has no loss "
                "vgg_feature"
            )
    if start is not None:  # the stages after the first begin with each other's
        recipes[0] = recipes[0].model_copy(update={"start": str(start)})
    plans: list[Plan] = []
    for recipe in recipes:
        plans.append(_stage_plan(options, recipe, ds_overrides, plans[-1] if plans else None))
    return plans


def plans_of_rank(options: TrainOptions) -> list[Plan] | None:
    """As `make_plans`. None on a host's other ranks for what its first one has a `UserError` for.

    One rank of every host speaks, for a host may lack what another has.
    """
    try:
        return make_plans(options)
    except UserError:
        if find_place().local_rank == 0:
            raise
        return None


def _with_vgg_weights(recipe: Recipe, file: Path) -> Recipe:
    term = recipe.losses.get("vgg_feature")
    if term is None:
        return recipe
    table = dict(term) if isinstance(term, dict) else {"weight": term}
    return recipe.model_copy(
        update={"losses": {**recipe.losses, "vgg_feature": {**table, "weights": str(file)}}}
    )


def _stage_plan(
    options: TrainOptions, recipe: Recipe, ds_overrides: dict[str, Any], before: Plan | None
) -> Plan:
    ds_config = load_ds_config(
        (options.ds_config or recipe.ds_config_path()).expanduser(), ds_overrides
    )
    is_read = (
        before is not None and before.recipe.data == recipe.data
    )  # lists of millions take seconds
    dataset = before.dataset if before is not None and is_read else _dataset(options, recipe)
    if options.max_epochs is not None and options.max_epochs < 1:
        raise UserError(f"--max-epochs {options.max_epochs} must be at least 1")
    if not 0 <= options.watchdog_minutes < 1e6:
        raise UserError(
            f"--watchdog-minutes {options.watchdog_minutes} must be above 0, or 0 for no watchdog"
        )
    total = recipe.steps
    if options.max_epochs is not None:
        length = sum(dataset.folder_sizes) * recipe.data.multiplier
        total = min(
            total, steps_in_epochs(options.max_epochs, length, ds_config["train_batch_size"])
        )
    runtime = choose_runtime(options.runtime)
    discriminator_ds_config = _discriminator_ds_config(recipe, ds_config, ds_overrides)
    if runtime == "accelerate":
        for config in (ds_config, discriminator_ds_config or {}):
            check_accelerate(config)
    home = (options.output_dir or RUNS_DIR / recipe.name).expanduser().absolute()
    log_dir = (options.log_dir or home).expanduser().absolute()
    return Plan(
        recipe,
        ds_config,
        dataset,
        home / recipe.stage,
        log_dir / recipe.stage,
        home,
        before.run_dir if before else None,
        discriminator_ds_config,
        options.reset,
        total,
        runtime,
        options.watchdog_minutes,
        options.wandb,
    )


def _discriminator_ds_config(
    recipe: Recipe, ds_config: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any] | None:
    """DeepSpeed's configuration of the discriminator, which sees the generator's batches in the
    same precision."""
    if recipe.adversarial is None:
        return None
    if recipe.adversarial.ds_config is None:
        return ds_config
    own = load_ds_config(ROOT / recipe.adversarial.ds_config, overrides)
    shared = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "fp16",
        "bf16",
        "data_types",
        "zero_optimization",
    )
    return {
        **{key: value for key, value in own.items() if key not in shared},
        **{key: ds_config[key] for key in shared if key in ds_config},
    }


def _dataset(options: TrainOptions, recipe: Recipe) -> Dataset:
    dataset = read_dataset(
        dataset_dirs(options),
        lr_roots=[path.expanduser() for path in options.lr_dir],
        paired_scale=recipe.scale if recipe.data.degradation.reads_lr else None,
    )
    if recipe.data.weights and len(recipe.data.weights) != len(dataset.folders):
        raise UserError(
            f"data.weights has {len(recipe.data.weights)} numbers for {len(dataset.folders)} "
            "dataset "
            "folders; give one for each --dataset-dir, or none"
        )
    if (
        recipe.data.multiplier > 1
        and sum(dataset.folder_sizes) * recipe.data.multiplier > LONGEST_EPOCH
    ):
        raise UserError(
            f"data.multiplier {recipe.data.multiplier} makes an epoch of "
            f"{sum(dataset.folder_sizes) * recipe.data.multiplier:,} samples, more than "
            f"{LONGEST_EPOCH:,}; "
            f"say at most {max(1, LONGEST_EPOCH // sum(dataset.folder_sizes))}"
        )
    return dataset


def dataset_dirs(options: TrainOptions) -> list[Path]:
    return [path.expanduser() for path in options.dataset_dir or (DATASET_DIR,)]


def steps_in_epochs(epochs: int, epoch_length: int, global_batch: int) -> int:
    """Steps in so many epochs of `epoch_length` samples; the last batch may reach into the next
    epoch."""
    return -(-epochs * epoch_length // global_batch)


def has_lists(options: TrainOptions) -> bool:
    """Whether there is a dataset where the options look for one."""
    return any(
        (root / name).is_file()
        for root in dataset_dirs(options)
        for name in (TRAINING_LIST, VALIDATION_LIST)
    )
