"""The training run: set up, loop, save, stop."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import checkpoint
from pipeline.checkpoint import Contents, Progress, SaveFailed
from pipeline.cli import Failure, UserError
from pipeline.data.loader import Loader
from pipeline.data.reader import CropSource, Position
from pipeline.data.sampling import Sampler
from pipeline.ema import ExponentialMovingAverage
from pipeline.engine import (
    Ranks,
    build_engine,
    compile_module,
    resolve_ds_config,
    skipped_steps,
    start_distributed,
    stop_distributed,
    why_not_compiled,
)
from pipeline.layout import LAYOUTS, faster_layout
from pipeline.losses import Criterion
from pipeline.meter import Meter
from pipeline.models import build_generator
from pipeline.models.weights import SavedNetwork
from pipeline.monitor import LOG_FILE, TENSORBOARD_DIR, Journal, duration, say
from pipeline.options import Plan, TrainOptions, make_plan
from pipeline.recipe import Recipe, ds_differences, recipe_differences, write_recipe
from pipeline.run_folder import RECIPE_FILE
from pipeline.run_lock import run_lock
from pipeline.stopping import SAVE, Agreement, StopSignals
from pipeline.trainers.reconstruction import ReconstructionTrainer
from pipeline.validation import ValidationSet

NUM_PICTURES = 3  # validation images shown in TensorBoard


def main(options: TrainOptions) -> int:
    """One rank's whole life. Exit status: 0 finished, 128 + signal stopped and saved, 2 bad input."""
    try:
        plan = make_plan(options)
    except UserError:
        if os.environ.get("RANK", "0") == "0":
            raise
        return 2  # the first rank says it for all
    ranks = start_distributed()
    try:
        return _locked(plan, ranks)
    finally:
        stop_distributed()


def _locked(plan: Plan, ranks: Ranks) -> int:
    with StopSignals() as signals, contextlib.ExitStack() as stack:
        tell = say if ranks.is_first else _silent
        refusal = _try_user(lambda: stack.enter_context(run_lock(plan.run_dir, tell))) if ranks.is_first else None
        _raise_together(ranks.agree(refusal), ranks)
        if plan.reset and ranks.is_first:
            move_aside(plan)
        ranks.barrier()
        run = _Run(plan, ranks, signals)
        try:
            return run.train()
        finally:
            run.close()


def _silent(_: str) -> None: ...


def _try_user(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def _raise_together(refusal: str | None, ranks: Ranks) -> None:
    if refusal is not None:
        if ranks.is_first:
            raise UserError(refusal)
        sys.exit(2)


def move_aside(plan: Plan) -> None:
    """Make room for a fresh run: the old one is renamed, with its logs, and stays."""
    suffix = time.strftime("bak-%Y%m%d-%H%M%S")
    if plan.log_dir != plan.run_dir:
        for name in (LOG_FILE, TENSORBOARD_DIR):
            if (plan.log_dir / name).exists():
                (plan.log_dir / name).rename(_unused(plan.log_dir / f"{name}.{suffix}"))
    if plan.run_dir.is_dir() and any(plan.run_dir.iterdir()):
        kept = _unused(plan.run_dir.with_name(f"{plan.run_dir.name}.{suffix}"))
        plan.run_dir.rename(kept)
        say(f"the old run is kept in {kept}")


def _unused(path: Path) -> Path:
    number = 1
    candidate = path
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


@dataclass
class _Clock:
    """Time spent training, and when checkpoints are due."""

    started: float = field(default_factory=time.perf_counter)
    last_save: float = field(default_factory=time.perf_counter)

    def save_is_due(self, minutes: float) -> bool:
        return time.perf_counter() - self.last_save > minutes * 60


class _Run:
    """Everything that a run holds while it lives."""

    def __init__(self, plan: Plan, ranks: Ranks, signals: StopSignals) -> None:
        self.plan, self.ranks, self.signals = plan, ranks, signals
        recipe = self.recipe = plan.recipe
        step = checkpoint.newest_whole(plan.run_dir, ranks, say)
        if step is not None:
            refuse_strangers(plan, checkpoint.read_identity(plan.run_dir, step), step)
        self.ds_config, precision = resolve_ds_config(plan.ds_config, world_size=ranks.world_size,
                                                      total_steps=plan.total_steps, device=ranks.device)
        self.micro_batch = self.ds_config["train_micro_batch_size_per_gpu"]
        self.accumulation = self.ds_config["gradient_accumulation_steps"]
        _seed(recipe.seed)
        generator = build_generator(recipe.generator.name, recipe.scale, **recipe.generator.params)
        self.progress = Progress()
        layout = self._choose_layout(generator, step)
        described = SavedNetwork(recipe.generator.name, recipe.scale, recipe.generator.params, {},
                                 {"recipe": recipe.name})
        ema = ExponentialMovingAverage(generator, recipe.ema_decay)
        ema.network.to(ranks.device)
        engine = build_engine(generator, self.ds_config, ranks)
        criterion = Criterion(recipe.losses)
        compiled = self._compile(engine.module)
        self.trainer = ReconstructionTrainer(engine, criterion, ema, LAYOUTS[layout])
        self.contents = Contents(self.trainer.engines, ema, described, plan.identity)
        if step is not None:
            self.progress = checkpoint.load(plan.run_dir, step, self.contents, ranks)
        self.progress.layout = layout
        self.validation = ValidationSet(plan.dataset_dir, plan.validation_files, recipe.scale,
                                        recipe.validation_images, ranks, LAYOUTS[layout])
        self.journal = None
        if ranks.is_first:
            plan.run_dir.mkdir(parents=True, exist_ok=True)
            write_recipe(recipe, plan.run_dir / RECIPE_FILE)
            self.journal = Journal(plan.log_dir, self.progress.step)
            self._introduce(precision, compiled, step)
        self.loader: Loader | None = None

    def close(self) -> None:
        if self.loader:
            self.loader.close()
        if self.journal:
            self.journal.close()

    def train(self) -> int:
        """Steps, validations and saves until the end, patience or a signal."""
        plan, recipe, progress = self.plan, self.recipe, self.progress
        if progress.step >= plan.total_steps or self._out_of_patience():
            self._say(f"nothing left to do: this run is finished at step {progress.step} of {plan.total_steps} "
                      "(--reset starts afresh; a longer one: steps=N or --patience N)")
            return 0
        self._show_pictures(self.trainer.ema.network, fixed=True)
        agreement, clock = Agreement(self.ranks), _Clock()
        meter = Meter(self.ranks, recipe.log_every, plan.total_steps, plan.ds_config["train_batch_size"])
        self.loader = self._open_loader()
        agreed, validated_at = 0, -1
        while progress.step < plan.total_steps and agreed <= SAVE and not self._out_of_patience():
            for _ in range(self.accumulation):
                batch = next(self.loader)
                meter.add(self.trainer.step(batch), batch.index)
            progress.step += 1
            agreed = agreement.exchange(
                self.signals.received or (SAVE if clock.save_is_due(recipe.save_minutes) else 0))
            if progress.step % recipe.log_every == 0:
                self._log(meter)
            is_best = False
            if progress.step % recipe.validate_every == 0:
                with meter.paused():
                    is_best, validated_at = self._validate(), progress.step
            if is_best or agreed == SAVE or progress.step % recipe.save_every == 0:
                with meter.paused():
                    self._save(clock)
        agreed = max(agreed, agreement.finish())
        if agreed > SAVE:
            self._save(clock, must=True)
            self._say(f"stopped and saved at step {progress.step}; the same command without --reset continues there")
            return 128 + agreed
        if validated_at != progress.step:
            self._validate()
        self._save(clock, must=True)
        self._say(f"finished at step {progress.step} in {duration(time.perf_counter() - clock.started)}; best PSNR-Y "
                  f"{progress.best_psnr:.3f} dB at step {progress.best_step}; run folder {_short(plan.run_dir)}")
        return 0

    def _choose_layout(self, generator: torch.nn.Module, step: int | None) -> str:
        if step is not None:  # rounding depends on it, so a continuation keeps what the run began with
            return checkpoint.read_progress(self.plan.run_dir, step).layout
        if self.recipe.channels_last != "auto":
            return "channels_last" if self.recipe.channels_last == "on" else "contiguous"
        patch = self.recipe.data.crop // self.recipe.scale
        measured = faster_layout(generator, self.micro_batch, patch, self.ranks.device) if self.ranks.is_first else ""
        return self.ranks.agree(measured)

    def _compile(self, module: torch.nn.Module) -> str:
        if self.recipe.compile == "off":
            return "not compiled (compile: off)"
        lacking = why_not_compiled(self.ranks.device)
        if lacking and self.recipe.compile == "on":
            raise UserError(f"compile: on, but {lacking}; install it or say compile=auto")
        if any(self.ranks.gather(lacking)):
            return f"NOT compiled, slower: {lacking}"
        compile_module(module)
        return "compiled with Inductor (the first step takes half a minute)"

    def _open_loader(self) -> Loader:
        position = Position(self.ranks.rank, self.ranks.world_size, self.micro_batch)
        data = self.recipe.data
        sampler = Sampler(len(self.plan.training_files), self.recipe.seed, augment=data.augment)
        source = CropSource(self.plan.dataset_dir, self.plan.training_files, sampler, crop=data.crop,
                            scale=self.recipe.scale, position=position)
        return Loader(source, self.progress.step * self.accumulation, self.ranks.device, threads=data.threads,
                      prefetch=data.prefetch)

    def _introduce(self, precision: str, compiled: str, resumed: int | None) -> None:
        ranks, plan = self.ranks, self.plan
        parameters = sum(p.numel() for p in self.trainer.generator.module.parameters())
        where = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
        self._say(f"{self.recipe.name}: {self.recipe.generator.name} x{self.recipe.scale}, {parameters:,} parameters, "
                  f"{self.progress.layout}, {compiled}")
        self._say(f"{ranks.world_size} x {where}, {precision}, global batch {plan.ds_config['train_batch_size']} = "
                  f"{self.micro_batch} x {self.accumulation} accumulation x {ranks.world_size} ranks")
        self._say(f"{len(plan.training_files)} training and {len(plan.validation_files)} validation files in "
                  f"{_short(plan.dataset_dir)}; run folder {_short(plan.run_dir)}")
        if resumed is not None:
            self._say(f"continuing from step {resumed} of {plan.total_steps}")

    def _log(self, meter: Meter) -> None:
        assert self.loader is not None
        engine = self.trainer.generator
        values = meter.read(self.progress.step, self.loader)
        if values.nonfinite_batch is not None:
            files = ", ".join(dict.fromkeys(self.loader.source.files_of(values.nonfinite_batch)))
            raise Failure(f"training has diverged: the loss has not been finite for {values.nonfinite_run} batches in a "
                          f"row on rank {self.ranks.rank}, last with {files}; the weights are as they were before, but "
                          "a fresh run needs a smaller ds.optimizer.params.lr")
        if self.journal:
            epoch = self.progress.step * self.plan.ds_config["train_batch_size"] / len(self.plan.training_files)
            line = values.as_dict() | {"lr": engine.get_lr()[0], "epoch": round(epoch, 4),
                                       "skipped_steps": skipped_steps(engine)}
            self.journal.log("train", self.progress.step, line)
            self.journal.progress(f"step {self.progress.step}/{self.plan.total_steps}  epoch {epoch:.1f}  "
                                  f"{values.text()}  lr {line['lr']:.2e}")

    def _validate(self) -> bool:
        """Measure the averaged weights; True if they are the best so far."""
        psnr = self.validation.psnr(self.trainer.ema.network)
        progress = self.progress
        is_best = progress.best_psnr is None or psnr > progress.best_psnr
        if is_best:
            progress.best_psnr, progress.best_step, progress.stale_validations = psnr, progress.step, 0
        else:
            progress.stale_validations += 1
        if self.journal:
            self.journal.log("validation", progress.step, {"psnr_y": psnr, "best_psnr_y": progress.best_psnr,
                                                           "stale_validations": progress.stale_validations})
            self.journal.say(f"validation at step {progress.step}: PSNR-Y {psnr:.3f} dB"
                             + (" (best so far)" if is_best else f" (best {progress.best_psnr:.3f} at step "
                                                                 f"{progress.best_step})"))
            self._show_pictures(self.trainer.ema.network, fixed=False)
        return is_best

    def _show_pictures(self, network: torch.nn.Module, *, fixed: bool) -> None:
        if not self.journal:
            return
        for pair in self.validation.pairs[:NUM_PICTURES]:
            if fixed:
                images = {"input": self.validation.bicubic(pair), "target": pair.hr}
            else:
                images = {"output": self.validation.upscale(network, pair)}
            self.journal.pictures(self.progress.step, pair.name, images)

    def _save(self, clock: _Clock, *, must: bool = False) -> None:
        try:
            checkpoint.save(self.plan.run_dir, self.progress, self.contents, self.ranks)
        except SaveFailed as error:
            message = f"the checkpoint of step {self.progress.step} could not be written: {error}"
            if must:
                raise Failure(f"{message}; the one before is untouched in {self.plan.run_dir}") from error
            self._say(f"warning: {message}; training goes on and will try again")
        else:
            if self.ranks.is_first:
                checkpoint.prune(self.plan.run_dir, self.recipe.keep, self.progress.best_step)
        clock.last_save = time.perf_counter()

    def _out_of_patience(self) -> bool:
        return 0 < self.recipe.patience <= self.progress.stale_validations

    def _say(self, text: str) -> None:
        if self.journal:
            self.journal.say(text)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def refuse_strangers(plan: Plan, identity: dict[str, Any], step: int) -> None:
    """Raise `UserError` naming the fields in which the run on disk differs from what is asked for."""
    differences = recipe_differences(Recipe.model_validate(identity["recipe"]), plan.recipe)
    differences += ds_differences(identity["ds_config"], plan.ds_config)
    old, new = identity["dataset"], plan.identity["dataset"]
    differences += [f"dataset {key}: {old[key]} in the run, {new[key]} asked for"
                    for key in old if old[key] != new[key]]
    if differences:
        raise UserError(f"{plan.run_dir} holds another run (step {step}): {'; '.join(differences)}. Continue with what "
                        "it was begun with, give --output-dir, or start afresh with --reset (the old run is kept)")


def _short(path: Path) -> str:
    """A path as a person would write it."""
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        with contextlib.suppress(ValueError):
            return prefix + str(path.relative_to(base))
    return str(path)
