"""The loop around a trainer: step, log, validate, save, stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque

from torch import Tensor

from pipeline.checkpoint.saving import SaveError, Saver
from pipeline.cli import RunError
from pipeline.data.loader import Loader
from pipeline.data.source import Skip, refuse_too_many
from pipeline.distributed.stopping import Agreement, Request, RequestKind, StopSignals, Watchdog
from pipeline.engine.deepspeed_engine import read_comms
from pipeline.engine.engine import gradients_of_update, observe, step_was_skipped
from pipeline.files import short_path
from pipeline.metrics import text_of
from pipeline.monitor.console import Console
from pipeline.monitor.journal import duration
from pipeline.training.memory import enough_memory
from pipeline.training.meter import Meter, SkippedFiles
from pipeline.training.reporting import Reporter
from pipeline.training.saved_run import nothing_left
from pipeline.training.setup import Run
from pipeline.training.validation import is_better


class Training:
    """A run under way. `reporter`: of the first rank."""

    def __init__(
        self, run: Run, reporter: Reporter | None, console: Console, signals: StopSignals
    ) -> None:
        self.run, self.reporter, self.console, self.signals = run, reporter, console, signals
        self.plan, self.recipe, self.progress, self.ranks = (
            run.plan,
            run.plan.recipe,
            run.progress,
            run.ranks,
        )
        self.loader: Loader | None = None
        self.last_save = time.perf_counter()
        self._saver = Saver(self.plan.run_dir, run.contents, self.recipe.keep, self.ranks)
        self._watchdog = Watchdog(self.plan.watchdog_minutes * 60)
        self._step_ends: deque[float] = deque(maxlen=4)
        self._skips: list[Skip] = []  # of this rank, since they were reported
        self._skipped_files = SkippedFiles()
        self._profiles_are_named = False

    def close(self) -> None:
        self._watchdog.stop()
        self._saver.close()
        if self.loader:
            self.loader.close()
        if self.reporter:
            self.reporter.close()
        self.console.close()

    def train(self) -> int:
        """Steps, validations and saves until the end, patience or a signal. Returns the exit
        status."""
        recipe, progress, trainer = self.recipe, self.progress, self.run.trainer
        if self._is_finished():
            self.console.say(nothing_left(self.plan, progress.step))
            return 0
        if self.reporter:
            self.reporter.begin()
        began, first, agreed = time.perf_counter(), progress.step + 1, Request()
        agreement = Agreement(self.ranks)
        meter = Meter(self.ranks, self.plan.total_steps, self.plan.ds_config["train_batch_size"])
        if progress.step and self._validation_is_due():  # the run was stopped before it, or in it
            self._validate()
            self._show_previews()
        self.loader = loader = self.run.open_loader()
        if any(self.ranks.gather(not self._is_supplied(loader))):
            self._raise_failure(loader)
        while (
            not agreed.is_to_end
            and progress.step < self.plan.total_steps
            and not progress.is_out_of_patience(recipe.patience)
        ):
            with self._gradients() as gradients:
                for _ in range(self.run.accumulation):
                    self._watchdog.feed(only_if_armed=True)
                    batch = next(loader)
                    self._skips += batch.skipped
                    with enough_memory(self.plan, self.ranks):
                        meter.add(trainer.step(batch, progress.step), batch.index)
            progress.step += 1
            meter.end_step(
                progress.step, step_was_skipped(trainer.learners(progress.step - 1)), loader
            )
            self._name_profiles(loader)
            self._watchdog.feed()
            self.signals.is_patient = True  # from now on there is something to save
            self._log_eta(progress.step)
            if progress.step == first:
                self._saver.prepare()
            if self._epoch(progress.step) > self._epoch(progress.step - 1):
                self._report_skips()
            agreed = agreement.exchange(self._request(loader))
            self._warn_of(self._saver.poll())
            if progress.step % recipe.log_every == 0:
                self._log(meter, loader)
            with meter.paused():
                if gradients and self.reporter:
                    self.reporter.histograms(gradients)
                is_best = not agreed.is_to_end and self._validation_is_due() and self._validate()
                if (
                    is_best
                    or agreed.kind == RequestKind.SAVE
                    or progress.step % recipe.save_every == 0
                ):
                    self._save()
                if not agreed.is_to_end:
                    self._show_previews()
        agreed = max(agreed, agreement.finish())
        self._save(must=True)
        self._report_skips()
        if agreed.kind == RequestKind.FAIL:
            self._raise_failure(loader)
        if not self._is_finished():
            # Without an agreement to stop, the signal came in the last validation.
            signal = agreed.signal or max(self.ranks.gather(self.signals.received))
            self.console.say(
                f"stopped and saved at step {progress.step}; the same command without --reset "
                "continues "
                "there"
            )
            return 128 + signal
        if self.reporter:
            self.reporter.show_previews()
        best = text_of(progress.best_scores or {"psnr_y": math.nan})
        self.console.say(
            f"finished at step {progress.step} in {duration(time.perf_counter() - began)}; best "
            f"{best} at "
            f"step {progress.best_step}; run folder {short_path(self.plan.run_dir)}"
        )
        return 0

    def _log_eta(self, step: int) -> None:
        """How long it will take, as soon as that can be known: after the third step of this
        process."""
        self._step_ends.append(time.perf_counter())
        if len(self._step_ends) == 3:
            seconds = (self._step_ends[2] - self._step_ends[0]) / 2
            left = self.plan.total_steps - step
            self.console.say(
                f"a step takes about {seconds:.2g} s: {left} more take {duration(seconds * left)}, "
                "without validation; CTRL+C saves"
            )

    def _gradients(self) -> contextlib.AbstractContextManager[dict[str, dict[str, Tensor]]]:
        """What keeps the gradients of the update under way, where the recipe wants their
        histograms."""
        every = self.recipe.histograms
        if every and (self.progress.step + 1) % every == 0:
            return gradients_of_update(self.run.trainer.engines)
        return contextlib.nullcontext({})

    def _show_previews(self) -> None:
        if self.reporter:
            step, total = self.progress.step, self.plan.total_steps
            self.reporter.show_previews_if_due(
                self._epoch(step - 1), self._epoch(step), self._epoch(total)
            )

    def _epoch(self, step: int) -> int:
        """Whole epochs that lie behind after `step` updates."""
        return step * self.plan.ds_config["train_batch_size"] // self.plan.epoch_length

    def _report_skips(self) -> None:
        """Say which files were passed over since the last time, on any rank; too many end the run
        on all."""
        data = self.recipe.data
        if data.on_error == "stop":
            return
        skips = [skip for share in self.ranks.gather(self._skips) for skip in share]
        self._skips = []
        if not skips:
            return
        values, text = self._skipped_files.add(skips)
        if self.reporter:
            self.reporter.journal.log("skipped", self.progress.step, values)
        self.console.say(text)
        num_files = sum(self.plan.dataset.folder_sizes)
        self.ranks.on_all_ranks(
            lambda: refuse_too_many(self._skipped_files.reasons, num_files, data)
        )

    def _name_profiles(self, loader: Loader) -> None:
        """Say once that files have other colours than sRGB's, as soon as this rank has met one; and
        the notes."""
        if not self._profiles_are_named and (note := loader.source.profile_note()):
            self._profiles_are_named = True
            self.console.say(f"note: {note}")
        while loader.source.notes:
            self.console.say(f"note: {loader.source.notes.pop(0)}")

    def _is_supplied(self, loader: Loader) -> bool:
        """Whether this rank has the batches of two steps, or of all that are left.

        An agreement takes a step: a rank whose data end must say so while it still can take part in
        the next one.
        """
        return loader.is_ahead(
            min(2, self.plan.total_steps - self.progress.step) * self.run.accumulation
        )

    def _request(self, loader: Loader) -> Request:
        """What this rank would have all of them do."""
        if not self._is_supplied(loader):
            return Request(RequestKind.FAIL)
        if self.signals.received:
            return Request(RequestKind.STOP, self.signals.received)
        # One rank's clock, and not twice while the first request is under way.
        if (
            self.ranks.is_first
            and time.perf_counter() - self.last_save > self.recipe.save_minutes * 60
        ):
            self.last_save = time.perf_counter()
            return Request(RequestKind.SAVE)
        return Request()

    def _raise_failure(self, loader: Loader) -> None:
        def complain() -> None:
            failure = loader.failure()
            if failure:
                raise failure

        self.ranks.on_all_ranks(complain)

    def _is_finished(self) -> bool:
        return self.progress.is_finished(self.plan.total_steps, self.recipe.patience)

    def _validation_is_due(self) -> bool:
        step = self.progress.step
        is_point = step % self.recipe.validate_every == 0 or step >= self.plan.total_steps
        return is_point and self.progress.validated_step != step

    def _log(self, meter: Meter, loader: Loader) -> None:
        values = meter.read(self.progress.step, loader)
        if values.has_diverged:
            files = ", ".join(dict.fromkeys(loader.source.files_of(values.bad_batch)))
            raise RunError(
                f"training has diverged: the last {values.skipped_run} updates were skipped for "
                "gradients "
                f"that are not finite, and the last {values.bad_loss_run} had such a loss (seen "
                "last with "
                f"{files}); start afresh with a smaller ds.optimizer.params.lr"
            )
        comms = (
            read_comms() if self.plan.counts_comms else {}
        )  # on all ranks, or their lists would grow
        if self.reporter:
            step = self.progress.step
            self.reporter.log(
                values, step * self.plan.ds_config["train_batch_size"] / self.plan.epoch_length
            )
            if comms:
                self.reporter.journal.log("comms", step, comms)

    def _validate(self) -> bool:
        """Measure the averaged weights; True if they are the best so far.

        Abandoned when a signal asks to stop, for a launcher waits only so long: the continuation
        does it then.
        """
        scores = self.run.validation.measure(self.run.averaged, self._before_validating)
        if scores is None:
            return False
        progress = self.progress
        progress.validated_step = progress.step
        is_best = is_better(scores, progress.best_scores, self.recipe.best)
        if is_best:
            progress.best_scores, progress.best_step = scores, progress.step
        progress.stale_validations = 0 if is_best else progress.stale_validations + 1
        for engine in self.run.trainer.engines.values():
            observe(engine, scores["psnr_y"])
        if self.reporter:
            self.reporter.validated(scores, is_best=is_best)
        return is_best

    def _before_validating(self, done: int, share: int) -> bool:
        """Called before each image; False if there is no time for it any more."""
        self._watchdog.feed(only_if_armed=True)
        self.console.passing(f"validating: image {done + 1} of {share}")
        return not self.signals.received

    def _save(self, *, must: bool = False) -> None:
        """Save in the background. If it `must` be, wait until it is done, and raise `RunError`
        where it fails."""
        if self.progress.step == 0:
            return
        self._watchdog.feed(only_if_armed=True)
        self._warn_of(self._saver.wait())
        try:
            self._saver.begin(self.progress)
            failure = self._saver.wait() if must else None
        except SaveError as error:
            failure = error
        if failure and must:
            raise RunError(
                f"{failure}; the one before is untouched in {self.plan.run_dir}"
            ) from failure
        self._warn_of(failure)
        self.last_save = time.perf_counter()
        self._watchdog.feed(only_if_armed=True)

    def _warn_of(self, failure: SaveError | None) -> None:
        if failure:
            self.console.say(f"warning: {failure}; training goes on and will try again")
