"""The training run: loop, log, validate, save, stop."""

from __future__ import annotations

import contextlib
import os
import sys
import time

from pipeline import checkpoint
from pipeline.checkpoint import SaveError
from pipeline.cli import RunError, UserError
from pipeline.data.loader import Loader
from pipeline.engine import Ranks, skipped_steps, start_distributed, stop_distributed
from pipeline.meter import Meter
from pipeline.monitor import Journal, duration, say
from pipeline.options import Plan, TrainOptions, make_plan
from pipeline.recipe import write_recipe
from pipeline.run_folder import RECIPE_FILE
from pipeline.run_lock import run_lock
from pipeline.setup import Run, move_aside, set_up, short
from pipeline.stopping import GO_ON, SAVE, Agreement, StopSignals

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
        with StopSignals() as signals, contextlib.ExitStack() as stack:
            _take_run_folder(plan, ranks, stack)
            run = set_up(plan, ranks, say if ranks.is_first else _silent)
            training = Training(run, signals)
            stack.callback(training.close)
            return training.train()
    finally:
        stop_distributed()


def _take_run_folder(plan: Plan, ranks: Ranks, stack: contextlib.ExitStack) -> None:
    """Lock the run folder for as long as `stack` lives, and make room in it for a fresh run if one is asked for."""
    refusal = ""
    if ranks.is_first:
        try:
            stack.enter_context(run_lock(plan.run_dir, say))
            kept = move_aside(plan) if plan.reset else None
            if kept:
                say(f"the old run is kept in {short(kept)}")
        except UserError as error:
            refusal = str(error)
    refusal = ranks.agree(refusal)
    if refusal and ranks.is_first:
        raise UserError(refusal)
    if refusal:
        sys.exit(2)


def _silent(_: str) -> None: ...


class Training:
    """The loop around a trainer, and what it does once in a while."""

    def __init__(self, run: Run, signals: StopSignals) -> None:
        self.run, self.signals = run, signals
        self.plan, self.recipe, self.progress, self.ranks = run.plan, run.plan.recipe, run.progress, run.ranks
        self.journal: Journal | None = None
        self.loader: Loader | None = None
        self.last_save = time.perf_counter()
        if self.ranks.is_first:
            self.plan.run_dir.mkdir(parents=True, exist_ok=True)
            write_recipe(self.recipe, self.plan.run_dir / RECIPE_FILE)
            self.journal = Journal(self.plan.log_dir, self.progress.step)
        for line in run.introduction:
            self._say(line)

    def close(self) -> None:
        if self.loader:
            self.loader.close()
        if self.journal:
            self.journal.close()

    def train(self) -> int:
        """Steps, validations and saves until the end, patience or a signal. Returns the exit status."""
        recipe, progress, total_steps = self.recipe, self.progress, self.plan.total_steps
        if progress.step >= total_steps or self._is_out_of_patience():
            self._say(f"nothing left to do: this run is finished at step {progress.step} of {total_steps} "
                      "(--reset starts afresh; for a longer one say steps=N, or --patience N)")
            return 0
        self._show_inputs()
        began, validated_at, agreed = time.perf_counter(), -1, GO_ON
        agreement = Agreement(self.ranks)
        meter = Meter(self.ranks, recipe.log_every, total_steps, self.plan.ds_config["train_batch_size"])
        self.loader = self.run.open_loader()
        while progress.step < total_steps and agreed <= SAVE and not self._is_out_of_patience():
            for _ in range(self.run.accumulation):
                batch = next(self.loader)
                meter.add(self.run.trainer.step(batch), batch.index)
            progress.step += 1
            agreed = agreement.exchange(self._request())
            if progress.step % recipe.log_every == 0:
                self._log(meter, self.loader)
            is_best = False
            if progress.step % recipe.validate_every == 0:
                with meter.paused():
                    is_best, validated_at = self._validate(), progress.step
            if is_best or agreed == SAVE or progress.step % recipe.save_every == 0:
                with meter.paused():
                    self._save()
        agreed = max(agreed, agreement.finish())
        if agreed > SAVE:
            self._save(must=True)
            self._say(f"stopped and saved at step {progress.step}; the same command without --reset continues there")
            return 128 + agreed
        if validated_at != progress.step:
            self._validate()
        self._save(must=True)
        self._say(f"finished at step {progress.step} in {duration(time.perf_counter() - began)}; best PSNR-Y "
                  f"{progress.best_psnr:.3f} dB at step {progress.best_step}; run folder {short(self.plan.run_dir)}")
        return 0

    def _request(self) -> int:
        """What this rank would have all of them do."""
        save_is_due = time.perf_counter() - self.last_save > self.recipe.save_minutes * 60
        return self.signals.received or (SAVE if save_is_due else GO_ON)

    def _is_out_of_patience(self) -> bool:
        return 0 < self.recipe.patience <= self.progress.stale_validations

    def _log(self, meter: Meter, loader: Loader) -> None:
        values = meter.read(self.progress.step, loader)
        if values.nonfinite_batch is not None:
            files = ", ".join(dict.fromkeys(loader.source.files_of(values.nonfinite_batch)))
            raise RunError(f"training has diverged: the loss has not been finite for {values.nonfinite_run} batches in "
                          f"a row on rank {self.ranks.rank}, last with {files}; the weights are as they were before, "
                          "but a fresh run needs a smaller ds.optimizer.params.lr")
        if self.journal:
            step, engine = self.progress.step, self.run.trainer.generator
            epoch = step * self.plan.ds_config["train_batch_size"] / len(self.plan.training_files)
            learning_rate = engine.get_lr()[0]
            self.journal.log("train", step, {**values.as_dict(), "lr": learning_rate, "epoch": round(epoch, 4),
                                             "skipped_steps": skipped_steps(engine)})
            self.journal.progress(f"step {step}/{self.plan.total_steps}  epoch {epoch:.1f}  {values.text()}  "
                                  f"lr {learning_rate:.2e}")

    def _validate(self) -> bool:
        """Measure the averaged weights; True if they are the best so far."""
        psnr = self.run.validation.psnr(self.run.averaged)
        progress = self.progress
        is_best = progress.best_psnr is None or psnr > progress.best_psnr
        if is_best:
            progress.best_psnr, progress.best_step, progress.stale_validations = psnr, progress.step, 0
        else:
            progress.stale_validations += 1
        if self.journal:
            self.journal.log("validation", progress.step, {"psnr_y": psnr, "best_psnr_y": progress.best_psnr,
                                                           "stale_validations": progress.stale_validations})
            best = "best so far" if is_best else f"best {progress.best_psnr:.3f} at step {progress.best_step}"
            self.journal.say(f"validation at step {progress.step}: PSNR-Y {psnr:.3f} dB ({best})")
            for pair in self.run.validation.pairs[:NUM_PICTURES]:
                self.journal.picture(progress.step, f"{pair.name}/output",
                                     self.run.validation.upscale(self.run.averaged, pair))
        return is_best

    def _show_inputs(self) -> None:
        if self.journal:
            for pair in self.run.validation.pairs[:NUM_PICTURES]:
                self.journal.picture(self.progress.step, f"{pair.name}/input", self.run.validation.bicubic(pair))
                self.journal.picture(self.progress.step, f"{pair.name}/target", pair.hr)

    def _save(self, *, must: bool = False) -> None:
        try:
            checkpoint.save(self.plan.run_dir, self.progress, self.run.contents, self.ranks)
        except SaveError as error:
            message = f"the checkpoint of step {self.progress.step} could not be written: {error}"
            if must:
                raise RunError(f"{message}; the one before is untouched in {self.plan.run_dir}") from error
            self._say(f"warning: {message}; training goes on and will try again")
        else:
            if self.ranks.is_first:
                checkpoint.prune(self.plan.run_dir, self.recipe.keep, self.progress.best_step)
        self.last_save = time.perf_counter()

    def _say(self, text: str) -> None:
        if self.journal:
            self.journal.say(text)
