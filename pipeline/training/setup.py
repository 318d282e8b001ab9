"""Build a live run from a plan: find it on disk, build the networks, restore their state."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.checkpoint import checkpoint, spill, transfer
from pipeline.checkpoint.averages import SnapshotRule, remove_averages_after
from pipeline.checkpoint.checkpoint import Contents
from pipeline.checkpoint.progress import Progress, read_progress
from pipeline.checkpoint_index import read_index
from pipeline.cli import UserError
from pipeline.config.ds_config import batch_sizes
from pipeline.config.recipe import Recipe, changes
from pipeline.data.degradations.bicubic import BicubicSpec
from pipeline.data.loader import Loader
from pipeline.data.source import CropSource, Position
from pipeline.data.spec import num_threads
from pipeline.distributed.ranks import Ranks
from pipeline.engine.engine import (
    build_engine,
    build_optimizer,
    compile_module,
    resolve_ds_config,
    set_deterministic,
    why_not_compiled,
)
from pipeline.engine.layout import LAYOUTS, faster_layout
from pipeline.engine.schedules import validate_schedule
from pipeline.files import file_sha256, short_path
from pipeline.losses import Criterion
from pipeline.models import build_generator, native
from pipeline.models.common import checkpoint_activations
from pipeline.models.depthwise import faster_kernel, may_use_native, use_kernel
from pipeline.models.discriminators import build_discriminator
from pipeline.models.ema import ExponentialMovingAverage
from pipeline.models.posthoc_ema import WIDTHS
from pipeline.models.weights import SavedNetwork
from pipeline.monitor.console import RUN_LOG_FILE
from pipeline.monitor.journal import TENSORBOARD_DIR
from pipeline.monitor.wandb_tracker import WANDB_DIR
from pipeline.run_folder import (
    LOG_FILE,
    checkpoint_dir,
    checkpoint_steps,
    free_path,
    holds_run,
)
from pipeline.timing import said_if_slow
from pipeline.training.checks import refuse_own_folder, refuse_small_files
from pipeline.training.healing import History, remove_left_checkpoints, return_by_hand
from pipeline.training.options import TrainPlan
from pipeline.training.previews import PREVIEWS_DIR, read_previews
from pipeline.training.saved_run import newest_of_previous, refuse_other_run
from pipeline.training.start import load_start_discriminator, load_start_weights
from pipeline.training.teacher import Teacher, check_teacher, read_teacher, teacher_file
from pipeline.training.trainers import AdversarialTrainer, ReconstructionTrainer
from pipeline.training.validation import ValidationPair, ValidationSet, validation_measures


@dataclass
class Run:
    """All state of a live training run."""

    plan: TrainPlan
    ranks: Ranks
    trainer: ReconstructionTrainer | AdversarialTrainer
    contents: Contents  # what its checkpoints hold
    progress: Progress
    validation: ValidationSet
    previews: list[ValidationPair]  # empty on all ranks but the first
    micro_batch: int
    accumulation: int
    introduction: list[str]  # lines for the console
    history: History  # of its returns to earlier steps

    @property
    def averaged(self) -> nn.Module:
        """The averaged network: the one that is validated and exported."""
        return self.trainer.ema.network

    def open_loader(self, step: int | None = None, history: History | None = None) -> Loader:
        """Open the training data at the run's current step, or at `step` of another history.

        All ranks call it together.
        """
        step = self.progress.step if step is None else step
        history = self.history if history is None else history
        recipe, threads = (
            self.plan.recipe,
            num_threads(self.plan.recipe.data.threads, _cores(self.ranks)),
        )
        data = recipe.data.model_copy(update={"threads": threads})
        position = Position(
            self.ranks.rank,
            self.ranks.world_size,
            self.micro_batch,
            history.gaps(self.plan.ds_config["train_batch_size"]),
        )
        on_host = self.ranks.device.type == "cpu" and self.progress.cpu_degradation == "host"
        source = CropSource.of_dataset(
            self.plan.dataset,
            data,
            scale=recipe.scale,
            seed=recipe.seed,
            position=position,
            degrades_on_host=on_host,
            excluded=history.excluded,
        )
        return Loader(
            source,
            step * self.accumulation,
            self.ranks.device,
            threads=threads,
            # Room for a whole step, on top of what the recipe wants prefetched.
            prefetch=max(data.prefetch, self.accumulation) + self.accumulation,
        )


def _cores(ranks: Ranks) -> int:
    """Return this rank's share of the cores it may run on; all ranks call it together."""
    host, own = socket.gethostname(), os.sched_getaffinity(0)
    others = [cores for name, cores in ranks.gather((host, own)) if name == host]
    return int(sum(1 / sum(core in cores for cores in others) for core in own) + 1e-9)


def check_stages(plans: Sequence[TrainPlan], ranks: Ranks) -> None:
    """Validate all that stages name before an old run is moved aside and anything is timed.

    A first stage that continues is left out: it needs its start weights no longer, and `set_up`
    moves and times nothing. Raises `UserError`; all ranks call it together.
    """
    pairs = list(zip((None, *plans), plans, strict=False))
    if not plans[0].reset and checkpoint_steps(plans[0].run_dir):
        pairs = pairs[1:]
    ranks.on_all_ranks(lambda: [_check_stage(plan, before, ranks) for before, plan in pairs])


def _check_stage(plan: TrainPlan, before: TrainPlan | None, ranks: Ranks) -> None:
    """Check batches, optimizers, schedules, losses, networks, weights, metric trunks and images."""
    recipe = plan.recipe
    refuse_own_folder(plan)
    micro_batch, _ = batch_sizes(plan.ds_config, ranks.world_size)
    _refuse_odd_batch(recipe, micro_batch)
    for ds_config in (plan.ds_config, plan.discriminator_ds_config or {}):
        if "optimizer" in ds_config:
            build_optimizer(ds_config["optimizer"], [nn.Parameter(torch.zeros(1))])
        if "scheduler" in ds_config:
            validate_schedule(ds_config["scheduler"])
    crop = torch.full((1, 3, recipe.data.crop, recipe.data.crop), 0.5)
    _criterion(recipe, "cpu")(crop.clone(), crop, crop)
    generator = build_generator(recipe.generator.name, recipe.scale, **recipe.generator.params)
    begins = ranks.is_first and (plan.reset or not checkpoint_steps(plan.run_dir))
    # What a stage takes from the one before does not exist yet.
    if begins and recipe.start is not None and (before is None or recipe.start != "previous"):
        load_start_weights(generator, plan)
    _checkpoint_activations(generator, recipe)
    if ranks.is_first:
        check_teacher(plan)
    refuse_small_files(plan)
    if recipe.adversarial:
        spec, start = recipe.adversarial.discriminator, recipe.adversarial.start
        discriminator = build_discriminator(spec.name, recipe.data.crop, **spec.params)
        if start == "previous" and before and before.recipe.adversarial is None:
            raise UserError(
                f"stage {recipe.stage}: adversarial.start: previous, but stage "
                f"{before.recipe.stage} has no discriminator; omit adversarial.start"
            )
        if begins and start is not None and (before is None or start != "previous"):
            load_start_discriminator(discriminator, start, plan)
    if plan.reset and holds_run(plan.home):
        # Read twice, because a photograph that cannot be read must not cost the old run its place.
        ValidationSet(plan.dataset.validation, recipe, ranks)
        if ranks.is_first:
            read_previews(recipe, plan.dataset)
    else:
        validation_measures(recipe)


def _checkpoint_activations(module: nn.Module, recipe: Recipe) -> None:
    """Checkpoint activations if the recipe asks for it; raise `UserError` if nothing can be."""
    if recipe.activation_checkpointing == "on" and not checkpoint_activations(module):
        raise UserError(
            f"activation_checkpointing: on, but {recipe.generator.name} has no blocks without "
            "batch norm, whose activations could be recomputed; omit it"
        )


def _refuse_odd_batch(recipe: Recipe, micro_batch: int) -> None:
    if recipe.data.mixing.has_partners and micro_batch % 2:
        raise UserError(
            f"data.mixing mixes the samples of a micro-batch in pairs, but it has {micro_batch}; "
            "set ds.train_batch_size or ds.gradient_accumulation_steps so that it is even, or "
            "data.mixing.kinds=cutblur, which needs no second sample"
        )


def set_up(plan: TrainPlan, ranks: Ranks, say: Callable[[str], None]) -> Run:
    """Build the run that `plan` asks for, or restore it from disk; all ranks call it together.

    Raises `UserError` if the run on disk is a different one.
    """
    # A schedule counts the updates of its own network, which may be fewer than the run's steps.
    every = plan.recipe.adversarial.generator_every if plan.recipe.adversarial else 1
    ds_config, precision, why = resolve_ds_config(
        plan.ds_config,
        world_size=ranks.world_size,
        total_steps=-(-plan.total_steps // every),
        device=ranks.device,
        runtime=plan.runtime,
    )
    _refuse_odd_batch(plan.recipe, ds_config["train_micro_batch_size_per_gpu"])
    set_deterministic(plan.recipe.deterministic == "on")
    saved = _find_run(plan, precision, ranks, say)
    trainer, execution = build_networks(plan, ds_config, saved.step, ranks, say)
    contents, progress = _restore(plan, saved, trainer, execution, ranks)
    validation = ranks.on_all_ranks(
        lambda: ValidationSet(
            plan.dataset.validation, plan.recipe, ranks, LAYOUTS[execution.layout]
        )
    )
    previews = ranks.on_all_ranks(
        lambda: read_previews(plan.recipe, plan.dataset) if ranks.is_first else []
    )
    batch = ds_config["train_micro_batch_size_per_gpu"], ds_config["gradient_accumulation_steps"]
    introduction = _introduction(
        plan, ranks, trainer.generator.module, execution, precision + why, batch, saved.step
    )
    return Run(
        plan,
        ranks,
        trainer,
        contents,
        progress,
        validation,
        previews,
        *batch,
        introduction,
        saved.history,
    )


@dataclass(frozen=True)
class _SavedRun:
    """What is on disk of the run that a plan asks for."""

    step: int | None  # of the newest intact checkpoint; None for a new run
    identity: dict[str, Any]  # of the run, as its checkpoints record it
    sees_run_dir: bool  # whether this rank sees the first rank's run folder
    history: History


def _find_run(
    plan: TrainPlan, precision: str, ranks: Ranks, say: Callable[[str], None]
) -> _SavedRun:
    """Find the run on disk; raise `UserError` if it is a different one."""
    identity = {**plan.identity, "precision": precision}
    if teacher := plan.recipe.teacher:
        identity["teacher_sha256"] = ranks.agree(
            ranks.on_all_ranks(lambda: file_sha256(teacher_file(teacher)) if ranks.is_first else "")
        )
    sees_run_dir = transfer.sees_run_dir(plan.run_dir, ranks)
    ranks.on_all_ranks(lambda: spill.bring_back(plan.run_dir, say) if ranks.is_first else None)
    history = History.read(plan.run_dir, ranks)
    if plan.from_step is not None:
        return_by_hand(plan, identity, history, ranks, say)
    remove_left_checkpoints(plan.run_dir, history, ranks, say)
    step = checkpoint.newest_whole(plan.run_dir, ranks, say, sees_run_dir)
    began = newest = ranks.agree(newest_of_previous(plan))
    if step is not None:
        index = ranks.agree(
            read_index(checkpoint_dir(plan.run_dir, step)) if ranks.is_first else None
        )
        ranks.on_all_ranks(lambda: refuse_other_run(plan, identity, index))
        before, now = (of.get("libraries", {}) for of in (index["identity"], identity))
        if before and (updated := changes(before, now, "version of ")):
            say(
                f"note: degradations use other libraries than before: {'; '.join(updated)}; the "
                "samples stay the same, but their pixels may differ slightly"
            )
        began = index["identity"].get("began_with_step")
        if index["world_size"] != ranks.world_size:
            say(
                f"note: step {step} was saved by {index['world_size']} ranks and continues on "
                f"{ranks.world_size}: the samples stay the same, but sums are rounded differently"
            )
    if began != newest and began is not None:
        say(
            f"note: stage {plan.recipe.stage} started from step {began} of the previous stage, "
            f"which is now at step {newest}; to start the stage again, move "
            f"{short_path(plan.run_dir)} away"
        )
    ranks.on_all_ranks(
        lambda: remove_averages_after(plan.run_dir, step or 0) if ranks.is_first else None
    )
    return _SavedRun(step, {**identity, "began_with_step": began}, sees_run_dir, history)


@dataclass(frozen=True)
class _Execution:
    """How the networks are computed.

    Layout and kernel affect rounding, so a continued run keeps them.
    """

    layout: str
    kernel: str
    compiled: str  # text for the console
    remark: str  # text for the console about the kernel; may be empty


def build_networks(
    plan: TrainPlan,
    ds_config: dict[str, Any],
    step: int | None,
    ranks: Ranks,
    say: Callable[[str], None],
) -> tuple[ReconstructionTrainer | AdversarialTrainer, _Execution]:
    """Build the networks in their engines and the trainer; return it and how they are computed.

    `step`: the checkpoint that will be restored into them; None for a new run.
    """
    recipe = plan.recipe
    _seed(recipe.seed)
    generator = build_generator(recipe.generator.name, recipe.scale, **recipe.generator.params)
    if step is None and recipe.start is not None:
        _share_start_weights(generator, lambda: load_start_weights(generator, plan), ranks, say)
    began = (
        None
        if step is None
        else ranks.agree(read_progress(plan.run_dir, step) if ranks.is_first else None)
    )
    micro_batch = ds_config["train_micro_batch_size_per_gpu"]
    is_fp32 = not any(ds_config.get(name, {}).get("enabled") for name in ("fp16", "bf16"))
    kernel, remark = (
        _kernel(plan, generator, micro_batch, began, ranks) if is_fp32 else ("torch", "")
    )
    use_kernel(generator, kernel)
    layout = _layout(plan, generator, micro_batch, began, ranks, say)
    # Copy the weights into the average before the engine takes them: it may cast them to half
    # precision.
    widths = WIDTHS if recipe.posthoc_ema.is_on else ()
    ema = ExponentialMovingAverage(generator, recipe.ema_decay, widths)
    ema.to(ranks.device)
    # PyTorch's kernel, so that validation measures exactly what evaluate.py will measure.
    use_kernel(ema.network, "torch")
    engine = build_engine(generator, ds_config, ranks, plan.runtime)
    _checkpoint_activations(engine.module, recipe)
    compiled = _compile(
        engine.module, recipe, ranks, began, channels_last=layout == "channels_last"
    )
    trainer = _trainer(plan, engine, ema, ranks, layout, began, say if step is None else None)
    trainer.uses_cuda_graphs = _uses_cuda_graphs(recipe, ranks)
    return trainer, _Execution(layout, kernel, compiled, remark)


def _restore(
    plan: TrainPlan,
    saved: _SavedRun,
    trainer: ReconstructionTrainer | AdversarialTrainer,
    execution: _Execution,
    ranks: Ranks,
) -> tuple[Contents, Progress]:
    """Load the saved state, if any; return what checkpoints will hold, and the progress."""
    recipe = plan.recipe
    described = SavedNetwork(
        recipe.generator.name,
        recipe.scale,
        recipe.generator.params,
        {},
        {"recipe": recipe.name, **({"stage": recipe.stage} if recipe.stage else {})},
    )
    most = recipe.posthoc_ema.snapshots
    contents = Contents(
        trainer.engines,
        trainer.ema,
        described,
        saved.identity,
        saved.sees_run_dir,
        SnapshotRule(most, plan.total_steps) if most else None,
    )
    # From here on each rank draws its own random numbers (labels, instance noise).
    _seed(recipe.seed + 1 + ranks.rank)
    progress = (
        Progress(cpu_degradation="host")
        if saved.step is None
        else checkpoint.load(plan.run_dir, saved.step, contents, ranks)
    )
    progress.layout, progress.kernel = execution.layout, execution.kernel
    return contents, progress


def _trainer(
    plan: TrainPlan,
    engine: Any,
    ema: ExponentialMovingAverage,
    ranks: Ranks,
    layout: str,
    began: Progress | None,
    begin: Callable[[str], None] | None,
) -> ReconstructionTrainer | AdversarialTrainer:
    """Build the trainer of `plan`.

    `begin` logs a line about initial weights; None if the run continues.
    """
    recipe, spec = plan.recipe, plan.recipe.adversarial
    criterion = ranks.on_all_ranks(lambda: _criterion(recipe, ranks.device))
    for trunk in criterion.trunks:
        # No CUDA graphs, which would overwrite the features of HR with those of SR.
        _compile(trunk, recipe, ranks, began, channels_last=layout == "channels_last", graphs=False)
    teacher = _teacher(plan, engine.module, ranks, layout, began) if recipe.teacher else None
    if spec is None:
        return ReconstructionTrainer(engine, criterion, ema, LAYOUTS[layout], teacher)
    assert plan.discriminator_ds_config is not None
    ds_config, *_ = resolve_ds_config(
        plan.discriminator_ds_config,
        world_size=ranks.world_size,
        total_steps=-(-plan.total_steps // spec.discriminator_every),
        device=ranks.device,
        runtime=plan.runtime,
    )
    # Seed again: measuring the layout drew random numbers on the first rank only.
    _seed(recipe.seed)
    network = build_discriminator(
        spec.discriminator.name, recipe.data.crop, **spec.discriminator.params
    )
    if begin and spec.start is not None:
        _share_start_weights(
            network, lambda: load_start_discriminator(network, str(spec.start), plan), ranks, begin
        )
    discriminator = build_engine(network, ds_config, ranks, plan.runtime)
    _compile(discriminator.module, recipe, ranks, began, channels_last=layout == "channels_last")
    return AdversarialTrainer(engine, discriminator, criterion, ema, spec, LAYOUTS[layout], teacher)


def _teacher(
    plan: TrainPlan, student: nn.Module, ranks: Ranks, layout: str, began: Progress | None
) -> Teacher:
    """Build the recipe's teacher on every rank; only the first rank's host may have its file."""
    recipe = plan.recipe
    assert recipe.teacher is not None
    saved = ranks.agree(
        ranks.on_all_ranks(lambda: read_teacher(recipe) if ranks.is_first else None)
    )
    network = saved.build().to(ranks.device, memory_format=LAYOUTS[layout])
    teacher = Teacher(network, student, recipe.teacher, recipe.data.crop // recipe.scale)
    _compile(network, recipe, ranks, began, channels_last=layout == "channels_last", graphs=False)
    return teacher


def _criterion(recipe: Recipe, device: torch.device | str) -> Criterion:
    criterion = Criterion(recipe.losses, device)
    if criterion.uses_averaged and not recipe.ema_decay:
        raise UserError(
            "the loss 'ldl' compares with the averaged network, but ema_decay 0 disables "
            "averaging; set ema_decay=0.999, or losses.ldl={weight: 1, refine: false}"
        )
    return criterion


def _share_start_weights(
    network: nn.Module, give_weights: Callable[[], str], ranks: Ranks, say: Callable[[str], None]
) -> None:
    """Load initial weights on the first rank and send them to all.

    Only the first rank's host may have the file.
    """
    say(ranks.on_all_ranks(lambda: give_weights() if ranks.is_first else ""))
    network.load_state_dict(ranks.agree(network.state_dict()))


def move_logs_aside(plan: TrainPlan) -> None:
    """Rename what an earlier run has left in a separate --log-dir: a new log begins."""
    if plan.log_dir != plan.run_dir:
        for name in (LOG_FILE, RUN_LOG_FILE, TENSORBOARD_DIR, PREVIEWS_DIR, WANDB_DIR):
            if (plan.log_dir / name).exists():
                kept = free_path(plan.log_dir / time.strftime(f"{name}.bak-%Y%m%d-%H%M%S"))
                (plan.log_dir / name).rename(kept)


def _seed(seed: int) -> None:
    torch.manual_seed(seed % 2**63)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _layout(
    plan: TrainPlan,
    generator: nn.Module,
    micro_batch: int,
    began: Progress | None,
    ranks: Ranks,
    say: Callable[[str], None],
) -> str:
    if began is not None:
        return began.layout
    if plan.recipe.channels_last != "auto":
        return "channels_last" if plan.recipe.channels_last == "on" else "contiguous"
    patch = plan.recipe.data.crop // plan.recipe.scale
    measured = ""
    if ranks.is_first:
        with said_if_slow(
            say,
            "measuring in which memory format this network trains faster "
            "(channels_last=on or off skips this)",
        ):
            measured = faster_layout(generator, micro_batch, patch, ranks.device)
    return ranks.agree(measured)


def _uses_cuda_graphs(recipe: Recipe, ranks: Ranks) -> bool:
    return recipe.compile == "reduce-overhead" and ranks.device.type == "cuda"


def _kernel(
    plan: TrainPlan, generator: nn.Module, micro_batch: int, began: Progress | None, ranks: Ranks
) -> tuple[str, str]:
    """Choose which of `depthwise.KERNELS` computes the depthwise convolutions of an FP32 run.

    Returns the kernel and a line about it. Runs of versions before there was a choice used
    PyTorch's kernel and recorded none.
    """
    asked, is_eager = plan.recipe.native_kernels, plan.recipe.compile in ("auto", "off")
    if (
        ranks.device.type != "cpu"
        or asked == "off"
        or not is_eager
        or not may_use_native(generator)
    ):
        return "torch", ""
    if began is not None and began.kernel != "native":
        return "torch", ""
    missing = next((reason for reason in ranks.gather(native.why_not_native()) if reason), "")
    if missing and asked == "on":
        raise UserError(f"native_kernels: on, but {missing}; install it or set native_kernels=auto")
    if missing and began is not None:
        return (
            "torch",
            "depthwise convolutions: PyTorch's kernel from here on, which rounds differently from "
            f"our C++ kernel: {missing}",
        )
    if missing:
        return (
            "torch",
            f"depthwise convolutions: PyTorch's kernel, slower than our C++ kernel: {missing}",
        )
    if began is not None or asked == "on":
        return "native", "depthwise convolutions: our own C++ kernel"
    patch = plan.recipe.data.crop // plan.recipe.scale
    return ranks.agree(faster_kernel(generator, micro_batch, patch) if ranks.is_first else None)


def _compile(
    module: nn.Module,
    recipe: Recipe,
    ranks: Ranks,
    began: Progress | None,
    *,
    channels_last: bool,
    graphs: bool = True,
) -> str:
    """Compile `module` in place if the recipe wants it and every rank can.

    `graphs` allows CUDA graphs, if the recipe wants them. Returns a text for the console. Raises
    `UserError` if the recipe insists and a rank cannot.
    """
    if recipe.compile == "off":
        return "not compiled (compile: off)"
    # Runs of earlier versions, which record no kernel, were compiled on CPUs and stay compiled.
    if recipe.compile == "auto" and ranks.device.type == "cpu" and (began is None or began.kernel):
        return "not compiled (compile: auto, on a CPU)"
    missing = next(
        (reason for reason in ranks.gather(why_not_compiled(ranks.device)) if reason), ""
    )
    if missing and recipe.compile != "auto":
        raise UserError(f"compile: {recipe.compile}, but {missing}; install it or set compile=auto")
    if missing:
        return f"NOT compiled, slower: {missing}"
    graphs = graphs and _uses_cuda_graphs(recipe, ranks)
    compile_module(module, channels_last=channels_last, mode="reduce-overhead" if graphs else None)
    return (
        f"compiled with Inductor{' and CUDA graphs' if graphs else ''} (the first step takes "
        "longer)"
    )


def _introduction(
    plan: TrainPlan,
    ranks: Ranks,
    module: nn.Module,
    execution: _Execution,
    precision: str,
    batch: tuple[int, int],
    resumed: int | None,
) -> list[str]:
    recipe = plan.recipe
    parameters = sum(parameter.numel() for parameter in module.parameters())
    where = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    title = f"{recipe.name}, stage {recipe.stage}" if recipe.stage else recipe.name
    lines = [
        f"{title}: {recipe.generator.name} x{recipe.scale}, {parameters:,} parameters, "
        f"{execution.layout}, {execution.compiled}",
        f"{ranks.world_size} x {where}, {precision}"
        + (f"; started by {ranks.launcher}" if ranks.launcher else "")
        + (f", network interface {ranks.interface}" if ranks.interface else ""),
        f"global batch {plan.ds_config['train_batch_size']} = {batch[0]} x {batch[1]} accumulation "
        f"x {ranks.world_size} ranks; {sum(plan.dataset.folder_sizes)} training and "
        f"{len(plan.dataset.validation)} validation files in "
        f"{', '.join(short_path(folder.root) for folder in plan.dataset.folders)}; run folder "
        f"{short_path(plan.run_dir)}",
    ]
    if depths := plan.dataset.depths.line(recipe.data.bits):
        lines.append(depths)
    if recipe.data.depth == 16 and not precision.startswith("FP32"):
        lines.append(
            f"note: {precision.split()[0]} keeps fewer than the data's 16 bits; FP32 keeps them "
            "all (ds.bf16.enabled=false ds.fp16.enabled=false)"
        )
    if execution.remark:
        lines.append(execution.remark)
    if recipe.scale == 1 and isinstance(recipe.data.degradation, BicubicSpec):
        noise = ", except for lr_noise, which validation images do not get"
        lines.append(
            "note: at scale 1, data.degradation: bicubic makes LR equal to HR"
            f"{noise if recipe.data.lr_noise.probability else ''}; choose another degradation"
        )
    return (
        lines
        if resumed is None
        else [*lines, f"continuing from step {resumed} of {plan.total_steps}"]
    )
