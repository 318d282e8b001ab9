"""The training run: loop, log, validate, save, stop."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from typing import NoReturn

from pipeline import checkpoint
from pipeline.alike import refuse_other_hosts
from pipeline.checkpoint import SaveError
from pipeline.cli import RunError, UserError
from pipeline.data.loader import Loader
from pipeline.data.source import Skip, refuse_too_many
from pipeline.engine import gradient_norm, observe, skipped_steps, step_was_skipped
from pipeline.files import short, write_atomically
from pipeline.launched import GUARDED, find_place
from pipeline.meter import Meter
from pipeline.monitor import Journal, duration, say
from pipeline.options import Plan, TrainOptions, make_plans
from pipeline.ranks import Ranks, start_distributed, stop_distributed
from pipeline.recipe import write_recipe
from pipeline.run_folder import DS_CONFIG_FILE, FILE_LISTS_DIR, RECIPE_FILE
from pipeline.run_lock import run_lock
from pipeline.setup import Run, check_stages, move_aside, move_logs_aside, set_up
from pipeline.stopping import FAIL, GO_ON, SAVE, STOP, Agreement, StopSignals
from pipeline.validation import Pair, Scores, is_better
from pipeline.watchdog import Watchdog

NUM_PICTURES = 3  # validation images shown in TensorBoard
NUM_NAMED = 20  # bad files named in a report


def main(options: TrainOptions) -> int:
    """One rank's whole life. Exit status: 0 finished, 128 + signal stopped and saved, 2 bad input, 1 anything else."""
    try:
        plans = make_plans(options)
    except UserError:
        if find_place().local_rank == 0:  # another host may lack what this one has
            raise
        return 2
    watchdog = Watchdog(options.watchdog_minutes * 60)
    watchdog.begin()
    patience = options.watchdog_minutes + 5 if options.watchdog_minutes else 24 * 60
    ranks = start_distributed(max(10.0, patience))
    try:
        status = _train_all(plans, ranks, watchdog)
    except BaseException as error:
        if ranks.world_size > 1:
            _leave(error, ranks)
        raise
    stop_distributed()
    return status


def _train_all(plans: Sequence[Plan], ranks: Ranks, watchdog: Watchdog) -> int:
    with StopSignals(say if ranks.is_first else _silent) as signals, contextlib.ExitStack() as stack:
        refuse_other_hosts(plans, ranks)
        ranks.together(lambda: _take_run_folder(plans[0], ranks, stack))
        check_stages(plans, ranks)
        for plan in plans:
            signals.is_patient = False
            watchdog.begin()
            status = _train(plan, ranks, signals)
            if status:
                break
        return status


def _leave(error: BaseException, ranks: Ranks) -> NoReturn:
    """Tell what happened to one rank of several, and end at once.

    The others may wait for this one in a collective, and to close the group in an orderly way it would wait for them
    (pytorch issue 180611). What all ranks raise alike the first one says, or each in its log where a guard keeps it.
    """
    status = 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
    elif isinstance(error, (UserError, RunError)):
        status = 2 if isinstance(error, UserError) else 1
        if ranks.is_first or GUARDED in os.environ:
            print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _train(plan: Plan, ranks: Ranks, signals: StopSignals) -> int:
    """One stage from where it stands to its end."""
    run = set_up(plan, ranks, say if ranks.is_first else _silent)
    training = ranks.together(lambda: Training(run, signals))
    try:
        return training.train()
    finally:
        training.close()
        for engine in run.trainer.engines.values():
            engine.destroy()


def _take_run_folder(plan: Plan, ranks: Ranks, stack: contextlib.ExitStack) -> None:
    """Lock the run folder for as long as `stack` lives, and make room in it for a fresh run if one is asked for."""
    if not ranks.is_first:
        return
    stack.enter_context(run_lock(plan.home, say))
    kept = move_aside(plan) if plan.reset else None
    if kept:
        say(f"the old run is kept in {short(kept)}")


def _silent(_: str) -> None: ...


def _text(scores: Scores) -> str:
    return f"PSNR-Y {scores.psnr:.3f} dB" + ("" if scores.lpips is None else f", LPIPS {scores.lpips:.4f}")


class Training:
    """The loop around a trainer, and what it does once in a while."""

    def __init__(self, run: Run, signals: StopSignals) -> None:
        self.run, self.signals = run, signals
        self.plan, self.recipe, self.progress, self.ranks = run.plan, run.plan.recipe, run.progress, run.ranks
        self.journal: Journal | None = None
        self.loader: Loader | None = None
        self.last_save = time.perf_counter()
        self._watchdog = Watchdog(self.plan.watchdog_minutes * 60)
        self._step_ends: deque[float] = deque(maxlen=4)
        self._skips: list[Skip] = []  # of this rank, since they were reported
        self._bad_files: dict[str, str] = {}  # of all ranks, with the reason
        if self.ranks.is_first:
            self.plan.run_dir.mkdir(parents=True, exist_ok=True)
            write_recipe(self.recipe, self.plan.run_dir / RECIPE_FILE)
            write_atomically(self.plan.run_dir / DS_CONFIG_FILE, json.dumps(self.plan.ds_config, indent=2).encode())
            self.plan.dataset.write_lists(self.plan.run_dir / FILE_LISTS_DIR)
            if self.progress.step == 0:
                move_logs_aside(self.plan)
            self.journal = Journal(self.plan.log_dir, self.progress.step)
        for line in run.introduction:
            self._say(line)

    def close(self) -> None:
        self._watchdog.stop()
        if self.loader:
            self.loader.close()
        if self.journal:
            self.journal.close()

    def train(self) -> int:
        """Steps, validations and saves until the end, patience or a signal. Returns the exit status."""
        recipe, progress, trainer = self.recipe, self.progress, self.run.trainer
        if self._is_finished():
            what = f"stage {recipe.stage}" if recipe.stage else "this run"
            self._say(f"nothing left to do: {what} is finished at step {progress.step} of {self.plan.total_steps} "
                      "(--reset starts afresh; for a longer one say steps=N, or --patience N)")
            return 0
        self._show_inputs()
        began, agreed = time.perf_counter(), GO_ON
        agreement = Agreement(self.ranks)
        meter = Meter(self.ranks, self.plan.total_steps, self.plan.ds_config["train_batch_size"])
        if progress.step and self._validation_is_due():  # the run was stopped before it, or in it
            self._validate()
        self.loader = loader = self.run.open_loader()
        if any(self.ranks.gather(not self._is_supplied(loader))):
            self._raise_failure(loader)
        while agreed <= SAVE and progress.step < self.plan.total_steps and not self._is_out_of_patience():
            for _ in range(self.run.accumulation):
                self._watchdog.feed(only_if_armed=True)
                batch = next(loader)
                self._skips += batch.skipped
                meter.add(trainer.step(batch, progress.step), batch.index)
            progress.step += 1
            meter.end_step(progress.step, step_was_skipped(trainer.learners(progress.step - 1)), loader)
            self._watchdog.feed()
            self.signals.is_patient = True  # from now on there is something to save
            self._foretell(progress.step)
            if self._epoch(progress.step) > self._epoch(progress.step - 1):
                self._report_skips()
            agreed = agreement.exchange(self._request(loader))
            if progress.step % recipe.log_every == 0:
                self._log(meter, loader)
            with meter.paused():
                is_best = agreed <= SAVE and self._validation_is_due() and self._validate()
                if is_best or agreed == SAVE or progress.step % recipe.save_every == 0:
                    self._save()
        agreed = max(agreed, agreement.finish())
        self._save(must=True)
        self._report_skips()
        if agreed >= FAIL:
            self._raise_failure(loader)
        if not self._is_finished():
            if agreed < STOP:  # the signal came in the last validation
                agreed = STOP + max(self.ranks.gather(self.signals.received))
            self._say(f"stopped and saved at step {progress.step}; the same command without --reset continues there")
            return 128 + agreed - STOP
        best = _text(Scores(progress.best_psnr or math.nan, progress.best_lpips))
        self._say(f"finished at step {progress.step} in {duration(time.perf_counter() - began)}; best {best} at step "
                  f"{progress.best_step}; run folder {short(self.plan.run_dir)}")
        return 0

    def _foretell(self, step: int) -> None:
        """How long it will take, as soon as that can be known: after the third step of this process."""
        self._step_ends.append(time.perf_counter())
        if len(self._step_ends) == 3:
            seconds = (self._step_ends[2] - self._step_ends[0]) / 2
            left = self.plan.total_steps - step
            self._say(f"a step takes about {seconds:.2g} s: {left} more take {duration(seconds * left)}, without "
                      "validation; CTRL+C saves")

    def _epoch(self, step: int) -> int:
        """Whole epochs that lie behind after `step` updates."""
        return step * self.plan.ds_config["train_batch_size"] // self.plan.epoch_length

    def _report_skips(self) -> None:
        """Say which files were passed over since the last time, on any rank; too many end the run on all."""
        data = self.recipe.data
        if data.on_error == "stop":
            return
        skips = [skip for share in self.ranks.gather(self._skips) for skip in share]
        self._skips = []
        if not skips:
            return
        new = {skip.path: skip.reason for skip in skips if skip.path not in self._bad_files}
        self._bad_files |= new
        if self.journal:
            samples = len({skip.sample for skip in skips})  # what stands in may have been bad, too
            self.journal.log("skipped", self.progress.step, {"samples": samples, "bad_files": len(self._bad_files)})
            self.journal.say(f"samples replaced since the last report, for files that are bad: {samples}; such files "
                             f"so far: {len(self._bad_files)}" + "".join(f"\n  {path}: {reason}" for path, reason in
                                                                         list(new.items())[:NUM_NAMED]))
        self.ranks.together(lambda: refuse_too_many(self._bad_files, sum(self.plan.dataset.folder_sizes), data))

    def _is_supplied(self, loader: Loader) -> bool:
        """Whether this rank has the batches of two steps, or of all that are left.

        An agreement takes a step: a rank whose data end must say so while it still can take part in the next one.
        """
        return loader.is_ahead(min(2, self.plan.total_steps - self.progress.step) * self.run.accumulation)

    def _request(self, loader: Loader) -> int:
        """What this rank would have all of them do."""
        if not self._is_supplied(loader):
            return FAIL
        if self.signals.received:
            return STOP + self.signals.received
        # One rank's clock, and not twice while the first request is under way.
        if self.ranks.is_first and time.perf_counter() - self.last_save > self.recipe.save_minutes * 60:
            self.last_save = time.perf_counter()
            return SAVE
        return GO_ON

    def _raise_failure(self, loader: Loader) -> None:
        def complain() -> None:
            failure = loader.failure()
            if failure:
                raise failure

        self.ranks.together(complain)

    def _is_finished(self) -> bool:
        """All steps done and measured, or out of patience."""
        if self.progress.step >= self.plan.total_steps:
            return self.progress.validated_step == self.progress.step
        return self._is_out_of_patience()

    def _validation_is_due(self) -> bool:
        step = self.progress.step
        is_point = step % self.recipe.validate_every == 0 or step >= self.plan.total_steps
        return is_point and self.progress.validated_step != step

    def _is_out_of_patience(self) -> bool:
        return 0 < self.recipe.patience <= self.progress.stale_validations

    def _log(self, meter: Meter, loader: Loader) -> None:
        values = meter.read(self.progress.step, loader)
        if values.has_diverged:
            files = ", ".join(dict.fromkeys(loader.source.files_of(values.bad_batch)))
            raise RunError(f"training has diverged: the last {values.skipped_run} updates were skipped for gradients "
                           f"that are not finite, and the last {values.bad_loss_run} had such a loss (seen last with "
                           f"{files}); start afresh with a smaller ds.optimizer.params.lr")
        if self.journal:
            step, engine = self.progress.step, self.run.trainer.generator
            epoch = step * self.plan.ds_config["train_batch_size"] / self.plan.epoch_length
            learning_rate = engine.get_lr()[0]
            self.journal.log("train", step, {**values.as_dict(), "lr": learning_rate, "epoch": round(epoch, 4),
                                             **self._engine_values()})
            for name, logits in getattr(self.run.trainer, "logits", {}).items():
                self.journal.distribution(step, f"discriminator/{name}", logits)
            self.journal.progress(f"step {step}/{self.plan.total_steps}  epoch {epoch:.1f}  {values.text()}  "
                                  f"lr {learning_rate:.2e}")

    def _engine_values(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, engine in self.run.trainer.engines.items():
            prefix = "" if name == "generator" else f"{name}_"
            values[f"{prefix}skipped_steps"] = skipped_steps(engine)
            values[f"{prefix}gradient_norm"] = float(gradient_norm(engine))
        return values

    def _validate(self) -> bool:
        """Measure the averaged weights; True if they are the best so far.

        Abandoned when a signal asks to stop, for a launcher waits only so long: the continuation does it then.
        """
        scores = self.run.validation.measure(self.run.averaged, self._before_validating)
        if scores is None:
            return False
        progress = self.progress
        progress.validated_step = progress.step
        best = None if progress.best_psnr is None else Scores(progress.best_psnr, progress.best_lpips)
        is_best = is_better(scores, best, self.recipe.best)
        if is_best:
            progress.best_psnr, progress.best_lpips, progress.best_step = *scores, progress.step
        progress.stale_validations = 0 if is_best else progress.stale_validations + 1
        for engine in self.run.trainer.engines.values():
            observe(engine, scores.psnr)
        if self.journal:
            values = {"psnr_y": scores.psnr, "best_psnr_y": progress.best_psnr}
            if scores.lpips is not None:
                values |= {"lpips": scores.lpips, "best_lpips": progress.best_lpips}
            self.journal.log("validation", progress.step,
                             values | {"stale_validations": progress.stale_validations})
            before = f"best {_text(Scores(progress.best_psnr, progress.best_lpips))} at step {progress.best_step}"
            self.journal.say(f"validation at step {progress.step}: {_text(scores)} "
                             f"({'best so far' if is_best else before})")
            for pair in self._shown_pairs():
                self.journal.picture(progress.step, f"{pair.name}/output",
                                     self.run.validation.upscale(self.run.averaged, pair))
        return is_best

    def _before_validating(self, done: int, share: int) -> bool:
        """Called before each image; False if there is no time for it any more."""
        self._watchdog.feed(only_if_armed=True)
        if self.journal:
            self.journal.passing(f"validating: image {done + 1} of {share}")
        return not self.signals.received

    def _show_inputs(self) -> None:
        if self.journal:
            for pair in self._shown_pairs():
                self.journal.picture(self.progress.step, f"{pair.name}/input", self.run.validation.bicubic(pair))
                self.journal.picture(self.progress.step, f"{pair.name}/target", pair.hr)

    def _shown_pairs(self) -> list[Pair]:
        return [self.run.validation.pair(place) for place in range(min(NUM_PICTURES, len(self.run.validation)))]

    def _save(self, *, must: bool = False) -> None:
        if self.progress.step == 0:
            return
        self._watchdog.feed(only_if_armed=True)
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
        self._watchdog.feed(only_if_armed=True)

    def _say(self, text: str) -> None:
        if self.journal:
            self.journal.say(text)
