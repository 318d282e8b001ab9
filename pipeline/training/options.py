"""Command-line options of training, and the plan made from them: recipe, ds_config, data, folders.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.cli import UserError
from pipeline.config.ds_config import (
    Runtime,
    check_accelerate,
    check_optimizer_fits,
    choose_runtime,
    load_ds_config,
)
from pipeline.config.elsewhere import ours
from pipeline.config.recipe import Recipe, load_stages, parse_overrides
from pipeline.config.specs import NetworkSpec
from pipeline.data.dataset import Dataset, read_dataset
from pipeline.data.degradations import build_degradation
from pipeline.data.image_files import TRAINING_LIST, VALIDATION_LIST
from pipeline.distributed.launcher import find_rank_info
from pipeline.files import check_utf8, short_path
from pipeline.installation import find_file
from pipeline.run_folder import RUNS_DIR

DATASET_DIR = Path("~/dataset")
# Most samples that data.multiplier may give an epoch: every rank draws the order of a whole epoch
# at once.
LONGEST_EPOCH = 1 << 25
VGG19_LOSSES = ("vgg_feature", "vgg_patch", "contextual")


@dataclass
class TrainOptions:
    """Train a super-resolution network.

    Continues the run in --output-dir if there is one, from the sample at which it stopped; --reset
    starts a new one. CTRL+C saves and stops. Values of the recipe and of DeepSpeed's file can be
    overridden at the end of the line: data.crop=128 generator.num_blocks=11
    ds.train_batch_size=32 ds.optimizer.params.lr=5e-4
    """

    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE ...")
    ] = ()
    """key=value overrides the recipe, ds.key=value overrides DeepSpeed's file."""
    recipe: str = "vapsr_x2"
    """A name in recipes/ or the path of a YAML file."""
    dataset_dir: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = ()
    """Folder with training_file_list.txt and validation_file_list.txt. Repeat it for several
    folders; data.weights sets how often each is sampled. Default: ~/dataset."""
    lr_dir: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = ()
    """For data.degradation=paired: the folder of LR files, one for each --dataset-dir. Default: LR
    files are next to the HR files."""
    start: Path | None = None
    """Initial weights: a weights file, or a run folder, whose best averaged weights are used.
    Default: the recipe's."""
    vgg_weights: Path | None = None
    """VGG19 weights for vgg_feature, vgg_patch and contextual. Default: the recipe's, or
    torchvision's cache."""
    dataset_multiplier: int | None = None
    """Random crops per file and epoch. Default: the recipe's data.multiplier, 1."""
    output_dir: Path | None = None
    """The run folder: checkpoints, recipe, log. Default: runs/<recipe> in the current folder."""
    log_dir: Path | None = None
    """Folder for log.jsonl, run.log, tensorboard/ and samples/. Default: the run folder."""
    spill_dir: Path | None = None
    """Folder on another disk for the last checkpoint if the run folder's disk is full. The same
    command moves it back when there is space. Default: wait for space."""
    wandb: Annotated[str | None, tyro.conf.arg(metavar="PROJECT")] = None
    """Also log to this Weights & Biases project; offline if it cannot be reached. Needs `pip
    install wandb`."""
    ds_config: Path | None = None
    """DeepSpeed's configuration. Default: the recipe's, usually ds_config.json."""
    reset: bool = False
    """Start a new run; the old one is moved to <output-dir>.bak-<time> (inside <output-dir> if that
    is a mount point), never deleted."""
    from_step: Annotated[int | None, tyro.conf.arg(metavar="STEP")] = None
    """Continue from this checkpoint of the run instead of the newest; later ones are kept as
    checkpoints/left-step-N."""
    max_epochs: int | None = None
    """Stop after this many passes over the training list, or after the recipe's steps if sooner."""
    patience: int | None = None
    """Stop after this many validations in a row without an improvement; 0 disables. Default: the
    recipe's."""
    procs: int = 0
    """Processes on this machine; 0: one per GPU, or one on the CPU."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: this machine's GPUs, or the CPU if there are none; cpu: always the CPU (also
    VASTSCALE_CPU=1)."""
    runtime: Runtime = "auto"
    """DeepSpeed, or plain PyTorch through Accelerate. auto: Accelerate under `accelerate launch`
    and if DeepSpeed is not installed."""
    watchdog_minutes: float = 10
    """Kill a rank that makes no progress for this many minutes and print its stack traces; 0
    disables. Counts from the first step."""

    hint_at = staticmethod(ours)


@dataclass(frozen=True)
class TrainPlan:
    """Everything one stage of training needs, read from the options and checked."""

    recipe: Recipe
    ds_config: dict[str, Any]
    dataset: Dataset
    run_dir: Path
    log_dir: Path
    home: Path  # the run's folder: `run_dir`, or its parent if the recipe has stages
    previous: Path | None  # run folder of the previous stage
    discriminator_ds_config: dict[str, Any] | None
    reset: bool
    total_steps: int
    runtime: str = "deepspeed"  # or accelerate
    watchdog_minutes: float = 10
    wandb: str | None = None  # a Weights & Biases project
    spill_dir: Path | None = None
    from_step: int | None = None  # the checkpoint to continue from, if not the newest
    # The generator's parameters that the command line sets: a start file does not change them.
    fixed_params: frozenset[str] = frozenset()
    # The generator's parameters that are those of the start file -> what the recipe said, if at
    # all. `recipe` has the file's values.
    adopted: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What defines a run: a checkpoint is continued only by a plan of the same identity."""
        gan = (
            {"discriminator_ds_config": self.discriminator_ds_config}
            if self.discriminator_ds_config
            else {}
        )
        libraries: dict[str, str] = {}
        for degradation in self.recipe.data.degradation.by_folder:
            libraries |= build_degradation(degradation, self.recipe.scale).versions()
        return {
            **({"libraries": libraries} if libraries else {}),
            **({"adopted": dict(self.adopted)} if self.adopted else {}),
            "recipe": self.recipe.model_dump(mode="json"),
            "ds_config": self.ds_config,
            **gan,
            "dataset": self.dataset.identity(),
        }

    def with_start_params(self, params: Mapping[str, Any], adopted: Mapping[str, Any]) -> TrainPlan:
        """Return the plan with `params` as those of the generator, of which `adopted` are others'.

        See the field `adopted`.
        """
        generator = NetworkSpec(name=self.recipe.generator.name, **params)
        recipe = self.recipe.model_copy(update={"generator": generator})
        return replace(self, recipe=recipe, adopted=dict(adopted))

    @property
    def counts_comms(self) -> bool:
        """Whether DeepSpeed counts the communication between ranks (`comms_logger`)."""
        return self.runtime == "deepspeed" and "comms_logger" in self.ds_config

    @property
    def epoch_length(self) -> int:
        """Samples per epoch."""
        return sum(self.dataset.folder_sizes) * self.recipe.data.multiplier


def overrides_last(arguments: Sequence[str], flags: Collection[str] = ("--reset",)) -> list[str]:
    """Move overrides (key=value) behind the options, wherever they were typed.

    `flags` are the options that take no value.
    """
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


def make_plan(options: TrainOptions) -> TrainPlan:
    """Read and check what `options` name; return the plan of the last or only stage.

    Raises `UserError` for anything missing or inconsistent.
    """
    return make_plans(options)[-1]


def make_plans(options: TrainOptions) -> list[TrainPlan]:
    """Return a plan for each stage of the recipe, in order; see `make_plan`."""
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
        if not any(name in recipe.losses for recipe in recipes for name in VGG19_LOSSES):
            raise UserError(
                f"--vgg-weights {options.vgg_weights}: recipe {options.recipe} has no loss "
                f"{', '.join(VGG19_LOSSES[:-1])} or {VGG19_LOSSES[-1]}"
            )
    if start is not None:  # each later stage starts from the one before
        recipes[0] = recipes[0].model_copy(update={"start": str(start)})
    plans: list[TrainPlan] = []
    for recipe in recipes:
        plans.append(_stage_plan(options, recipe, ds_overrides, plans[-1] if plans else None))
    return plans


def plans_of_rank(options: TrainOptions) -> list[TrainPlan] | None:
    """Like `make_plans`, but only each host's first rank raises `UserError`; others return None.

    One rank per host reports, because one host may lack what another has.
    """
    try:
        return make_plans(options)
    except UserError:
        if find_rank_info().local_rank == 0:
            raise
        return None


def _with_vgg_weights(recipe: Recipe, file: Path) -> Recipe:
    losses = dict(recipe.losses)
    for name in losses.keys() & set(VGG19_LOSSES):
        term = losses[name]
        table = dict(term) if isinstance(term, dict) else {"weight": term}
        losses[name] = {**table, "weights": str(file)}
    return recipe.model_copy(update={"losses": losses})


def _stage_plan(
    options: TrainOptions, recipe: Recipe, ds_overrides: dict[str, Any], before: TrainPlan | None
) -> TrainPlan:
    ds_config = load_ds_config(
        (options.ds_config or recipe.ds_config_path()).expanduser(), ds_overrides
    )
    # Reading lists of millions of files takes seconds: stages with the same data share them.
    is_read = before is not None and _with_depth(before.recipe, recipe.data.depth).data == (
        recipe.data
    )
    dataset = before.dataset if before is not None and is_read else _dataset(options, recipe)
    # From here on the recipe says what "auto" has found, so that a run notices if its files change.
    recipe = _with_depth(recipe, dataset.depths.chosen(recipe.data.depth))
    if options.from_step is not None and (options.reset or options.from_step < 1):
        raise UserError(
            f"--from-step {options.from_step} continues a run, but --reset starts a new one; give "
            "only one"
            if options.reset
            else f"--from-step {options.from_step} must be at least 1; --reset starts from 0"
        )
    if options.max_epochs is not None and options.max_epochs < 1:
        raise UserError(f"--max-epochs {options.max_epochs} must be at least 1")
    if not 0 <= options.watchdog_minutes < 1e6:
        raise UserError(
            f"--watchdog-minutes {options.watchdog_minutes} must be above 0, or 0 to disable the "
            "watchdog"
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
    for folder in dataset.folders:
        # --reset would move the dataset away with the run.
        if home.resolve() in (folder.root.resolve(), *folder.root.resolve().parents):
            raise UserError(
                f"--output-dir {short_path(home)} contains the dataset {short_path(folder.root)}; "
                "give the run a folder of its own"
            )
    check_utf8(home, "safetensors")
    check_utf8(log_dir, "TensorBoard")
    return TrainPlan(
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
        options.spill_dir,
        options.from_step,
        _fixed_params(options, recipe.stage),
    )


def _fixed_params(options: TrainOptions, stage: str) -> frozenset[str]:
    """Return the parameters of the stage's generator that the command line sets."""
    fixed: set[str] = set()
    for key, value in parse_overrides(options.overrides)[0].items():
        table, _, name = key.removeprefix(f"stages.{stage}.").partition(".")
        if table == "generator":
            fixed |= {name} if name else {*value} if isinstance(value, dict) else set()
    return frozenset(fixed)


def _with_depth(recipe: Recipe, depth: Literal["auto", 8, 16]) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"depth": depth})})


def _discriminator_ds_config(
    recipe: Recipe, ds_config: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the discriminator's ds_config: its own, with the generator's batch and precision."""
    if recipe.adversarial is None:
        return None
    if recipe.adversarial.ds_config is None:
        return ds_config
    own = load_ds_config(find_file(recipe.adversarial.ds_config), overrides)
    shared = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "fp16",
        "bf16",
        "data_types",
        "zero_optimization",
    )
    merged = {
        **{key: value for key, value in own.items() if key not in shared},
        **{key: ds_config[key] for key in shared if key in ds_config},
    }
    check_optimizer_fits(merged, str(recipe.adversarial.ds_config))
    return merged


def _dataset(options: TrainOptions, recipe: Recipe) -> Dataset:
    dataset = read_dataset(
        dataset_dirs(options),
        lr_roots=[path.expanduser() for path in options.lr_dir],
        paired_scale=recipe.scale if any(recipe.data.degradation.paired_folders) else None,
        paired_folders=recipe.data.degradation.paired_folders,
    )
    for degradation in recipe.data.degradation.by_folder:
        # Names what this machine lacks for it before anything is moved or started.
        build_degradation(degradation, recipe.scale)
    if recipe.data.weights and len(recipe.data.weights) != len(dataset.folders):
        raise UserError(
            f"data.weights has {len(recipe.data.weights)} numbers for {len(dataset.folders)} "
            "dataset folders; give one for each --dataset-dir, or omit it"
        )
    if (
        recipe.data.multiplier > 1
        and sum(dataset.folder_sizes) * recipe.data.multiplier > LONGEST_EPOCH
    ):
        raise UserError(
            f"data.multiplier {recipe.data.multiplier} makes an epoch of "
            f"{sum(dataset.folder_sizes) * recipe.data.multiplier:,} samples, more than "
            f"{LONGEST_EPOCH:,}; set at most "
            f"{max(1, LONGEST_EPOCH // sum(dataset.folder_sizes))}"
        )
    return dataset


def dataset_dirs(options: TrainOptions) -> list[Path]:
    return [path.expanduser() for path in options.dataset_dir or (DATASET_DIR,)]


def steps_in_epochs(epochs: int, epoch_length: int, global_batch: int) -> int:
    """Return the steps that cover `epochs` epochs of `epoch_length` samples, rounded up.

    The last batch may reach into the next epoch.
    """
    return -(-epochs * epoch_length // global_batch)


def has_lists(options: TrainOptions) -> bool:
    """Whether a dataset folder of the options contains a file list."""
    return any(
        (root / name).is_file()
        for root in dataset_dirs(options)
        for name in (TRAINING_LIST, VALIDATION_LIST)
    )
