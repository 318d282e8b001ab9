"""The training loop around a trainer: step, log, validate, save, stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pipeline.checkpoint import spill
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
from pipeline.run_folder import announce_end
from pipeline.training.healing import DivergedError
from pipeline.training.health import HealthRule, StepFacts, TurnRule, Violation
from pipeline.training.memory import explain_out_of_memory
from pipeline.training.meter import SkippedFiles, TrainMeter
from pipeline.training.reporting import Reporter
from pipeline.training.saved_run import nothing_left
from pipeline.training.setup import Run
from pipeline.training.trainers import AdversarialTrainer, indifferent_loss
from pipeline.training.validation import is_better

RETRY_SECONDS = 5  # between two tries of a run's last save


class Training:
    """The training loop of one run (one stage). `reporter` is None on all ranks but the first."""

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
        self.agreement = Agreement(self.ranks)
        indifferent = indifferent_loss(run.trainer)
        self._rule = HealthRule(self.recipe.healing, indifferent, run.progress.health)
        self._turns: TurnRule | None = None  # of the discriminator, if it may skip any
        if isinstance(run.trainer, AdversarialTrainer) and run.trainer.spec.adaptive:
            assert indifferent is not None
            self._turns = TurnRule(run.trainer.spec.adaptive, indifferent, run.progress.turns)
            run.trainer.skips_turns = self._turns.skips
        self.last_save = time.perf_counter()
        self._saver = Saver(self.plan.run_dir, run.contents, self.recipe.keep, self.ranks)
        self._spill, self._spilled = self._spill_folder(), ""
        self._watchdog = Watchdog(self.plan.watchdog_minutes * 60)
        # Four, so that the length is 3 only once, which is when `_log_eta` reports. The first step,
        # which may compile, ends where the first of the two measured intervals begins.
        self._step_ends: deque[float] = deque(maxlen=4)
        self._skips: list[Skip] = []  # this rank's, since the last report
        self._skipped_files = SkippedFiles()
        self._has_logged_profiles = False

    def close(self) -> None:
        # What follows may wait for the disk and for the loader's thread, which is no sign of a
        # hang.
        self._watchdog.stop()
        self._saver.close()
        if self.loader:
            self.loader.close()
        if self.reporter:
            self.reporter.close()
        self.console.close()

    def train(self) -> int:
        """Train until the last step, the end of patience or a signal. Returns the exit status.

        Raises `DivergedError` on all ranks, before anything of the divergence is saved.
        """
        recipe, progress, trainer = self.recipe, self.progress, self.run.trainer
        if self._is_finished():
            self.console.say(nothing_left(self.plan, progress.step))
            return 0
        if self.reporter:
            self.reporter.begin()
        began, first, agreed = time.perf_counter(), progress.step + 1, Request()
        meter = TrainMeter(
            self.ranks, self.plan.total_steps, self.plan.ds_config["train_batch_size"]
        )
        # The run may have been stopped before or during the validation that was due.
        if progress.step and self._validation_is_due():
            self._validate()
            self._show_previews()
        self.loader = loader = self.run.open_loader()
        # A rank whose data fail from the start could not take part in the first step's collectives.
        if any(self.ranks.gather(not self._is_supplied(loader))):
            self._raise_failure(loader)
        while (
            not agreed.ends_training
            and progress.step < self.plan.total_steps
            and not progress.is_out_of_patience(recipe.patience)
        ):
            for name, engine in trainer.engines.items() if self.run.history.returns else ():
                engine.rate.set(self.run.history.rate_factor(name, progress.step))
            with self._gradients() as gradients:
                for _ in range(self.run.accumulation):
                    # Accumulation may make a step long, so each micro-batch counts as progress.
                    # Before the first full step it does not: the watchdog then still allows for
                    # compilation.
                    self._watchdog.feed(only_if_armed=True)
                    batch = next(loader)
                    self._skips += batch.skipped
                    with explain_out_of_memory(self.plan, self.ranks):
                        meter.add(trainer.step(batch, progress.step))
            # Counted even if the update was skipped: the step is also the position in the data,
            # which must move on, and gradients are checked after they are summed, so that all ranks
            # skip the same ones.
            progress.step += 1
            # Whether the update was skipped stays on the device until the meter is read. Asking
            # here would make each FP32 step wait for the GPU.
            learners = trainer.learners(progress.step - 1)
            meter.end_step(
                progress.step,
                step_was_skipped(learners.values()),
                {name: engine.gradient_norm for name, engine in learners.items()},
                loader,
            )
            self._log_notes(loader)
            self._watchdog.feed()
            # From now on there is something to save: the first signal saves and stops instead of
            # ending the process at once.
            self.signals.is_patient = True
            self._log_eta(progress.step)
            if progress.step == first:
                # The optimizer has had its states since the first update, so the size of a
                # checkpoint is known and memory for its copy can be allocated, beside training,
                # before the first save needs it.
                self._saver.prepare()
            # All ranks end an epoch at the same step, so they can gather here without another
            # agreement.
            if self._epoch(progress.step) > self._epoch(progress.step - 1):
                self._report_skips()
            # Ranks must leave the loop at the same step, or those that are left would wait for the
            # others' gradients. Requests travel between ranks while the next step computes and take
            # effect one step late, so that no step waits for them.
            agreed = self.agreement.exchange(self._request(loader))
            self._warn_about(self._saver.poll())
            # Reading the meter waits for the device and gathers over ranks, so not every step does
            # it.
            if meter.is_full or (self._turns and self._turns.is_due(progress.step)):
                self._judge(meter)
            if progress.step % recipe.log_every == 0:
                self._log(meter, loader)
            # None of this counts as training time. The order matters: a validation comes before the
            # save, so that the checkpoint contains its scores and counts as the best if it is.
            with meter.paused():
                if gradients and self.reporter:
                    self.reporter.histograms(gradients)
                # No validation once the ranks have agreed to stop: launchers kill processes that
                # take long to end, and the continued run makes up for it.
                is_best = (
                    not agreed.ends_training and self._validation_is_due() and self._validate()
                )
                # A signal has made all ranks abandon the validation. They stop at this step: the
                # continued run repeats only the validation of the step at which it starts.
                if not agreed.ends_training and self._validation_is_due():
                    break
                if (
                    is_best
                    or agreed.kind == RequestKind.SAVE
                    or progress.step % recipe.save_every == 0
                    or self._snapshot_is_due()
                ):
                    self._judge(meter)
                    if progress.step % recipe.save_every == 0 and progress.candidate_step is None:
                        progress.candidate_step = progress.step
                    self._save()
                if not agreed.ends_training:
                    self._show_previews()
        # The last request is still being exchanged, and may be more urgent than the one that ended
        # the loop. After a failure, too, the finished steps are saved before it is raised.
        agreed = max(agreed, self.agreement.finish())
        self._judge(meter)
        if self.ranks.is_first:
            announce_end(self.plan.home)
        self._save(must=True)
        self._report_skips()
        if agreed.kind == RequestKind.FAIL:
            self._raise_failure(loader)
        if self._spilled:
            raise RunError(self._spilled)
        if not self._is_finished():
            # If no request was agreed on, the signal arrived during the last validation.
            signal = agreed.signal or max(self.ranks.gather(self.signals.received))
            self.console.say(
                f"stopped and saved at step {progress.step}; run the same command without --reset "
                "to continue"
            )
            return 128 + signal
        if self.reporter:
            self.reporter.show_previews()
        best = text_of(progress.best_scores or {"psnr_y": math.nan})
        self.console.say(
            f"finished at step {progress.step} in {duration(time.perf_counter() - began)}; best "
            f"{best} at step {progress.best_step}; run folder {short_path(self.plan.run_dir)}"
        )
        return 0

    def _log_eta(self, step: int) -> None:
        """Log the step time and the remaining time, once, after this process's third step."""
        self._step_ends.append(time.perf_counter())
        if len(self._step_ends) == 3:
            seconds = (self._step_ends[2] - self._step_ends[0]) / 2
            left = self.plan.total_steps - step
            self.console.say(
                f"a step takes about {seconds:.2g} s; the remaining {left} steps take about "
                f"{duration(seconds * left)} without validation; CTRL+C saves and stops"
            )

    def _gradients(self) -> contextlib.AbstractContextManager[dict[str, dict[str, Tensor]]]:
        """Capture the gradients of the next update if a histogram is due, else nothing."""
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
        """Return how many whole epochs are complete after `step` updates."""
        step = self.run.history.data_update(step)
        return step * self.plan.ds_config["train_batch_size"] // self.plan.epoch_length

    def _report_skips(self) -> None:
        """Report the files skipped on any rank since the last report.

        Ends the run on all ranks if too many files are bad.
        """
        data = self.recipe.data
        # The recipe is the same on all ranks, so no rank returns while others gather.
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
        # A rank's source has counted only the bad files that it met itself. The limit applies to
        # those of all ranks together.
        self.ranks.on_all_ranks(
            lambda: refuse_too_many(self._skipped_files.reasons, num_files, data)
        )

    def _log_notes(self, loader: Loader) -> None:
        """Log, once, that files have a colour profile other than sRGB; log the source's notes."""
        if not self._has_logged_profiles and (note := loader.source.profile_note()):
            self._has_logged_profiles = True
            self.console.say(f"note: {note}")
        while loader.source.notes:
            self.console.say(f"note: {loader.source.notes.pop(0)}")

    def _is_supplied(self, loader: Loader) -> bool:
        """Return whether this rank has the batches of the next two steps (or of all that are left).

        Two, because a request takes effect one step late: a rank whose data ran out must say so
        while it can still take part in the next step.
        """
        return loader.is_ahead(
            min(2, self.plan.total_steps - self.progress.step) * self.run.accumulation
        )

    def _request(self, loader: Loader) -> Request:
        """Return what this rank asks all ranks to do."""
        # A failure comes before a signal: the run must end with the error's status and message, and
        # not as if it had only been stopped.
        if not self._is_supplied(loader):
            return Request(RequestKind.FAIL)
        if self.signals.received:
            return Request(RequestKind.STOP, self.signals.received)
        # Only the first rank's clock counts. Resetting `last_save` here keeps it from asking again
        # while the first request is being exchanged.
        if (
            self.ranks.is_first
            and time.perf_counter() - self.last_save > self.recipe.save_minutes * 60
        ):
            self.last_save = time.perf_counter()
            return Request(RequestKind.SAVE)
        return Request()

    def _raise_failure(self, loader: Loader) -> None:
        def raise_failure() -> None:
            failure = loader.failure()
            if failure:
                raise failure

        # A rank that raised alone would leave the others waiting for it in the next collective.
        self.ranks.on_all_ranks(raise_failure)

    def _is_finished(self) -> bool:
        return self.progress.is_finished(self.plan.total_steps, self.recipe.patience)

    def _validation_is_due(self) -> bool:
        step = self.progress.step
        is_point = step % self.recipe.validate_every == 0 or step >= self.plan.total_steps
        return is_point and self.progress.validated_step != step

    def _snapshot_is_due(self) -> bool:
        """Whether this step's averages are to be kept; a checkpoint stores them."""
        rule = self.run.contents.snapshots
        return rule is not None and rule.includes(self.progress.step)

    def _log(self, meter: TrainMeter, loader: Loader) -> None:
        self._judge(meter)
        values = meter.read(self.progress.step, loader)
        # Read on all ranks, including those that do not log: reading empties DeepSpeed's lists.
        comms = read_comms() if self.plan.counts_comms else {}
        if self.reporter:
            step = self.progress.step
            self.reporter.log(
                values,
                self.run.history.data_update(step)
                * self.plan.ds_config["train_batch_size"]
                / self.plan.epoch_length,
            )
            if comms:
                self.reporter.journal.log("comms", step, comms)

    def _judge(self, meter: TrainMeter) -> None:
        """Apply the rules to the updates since the last call; raise `DivergedError`.

        Waits for the device. All ranks call it together and reach the same verdicts.
        """
        facts = meter.drain()
        self._take_verdict(self._rule.judge(facts))
        if self._turns:
            self._decide_turns(self._turns, facts)

    def _decide_turns(self, rule: TurnRule, facts: Sequence[StepFacts]) -> None:
        """Let the discriminator skip its turns or take them again, as its rule says."""
        change = rule.judge(facts)
        self.progress.turns = rule.state
        if change is not None:
            assert isinstance(self.run.trainer, AdversarialTrainer)
            self.run.trainer.skips_turns = change.skips
            if self.reporter:
                self.reporter.turns_changed(change)

    def _take_verdict(self, violation: Violation | None) -> None:
        progress = self.progress
        progress.health = self._rule.state
        if violation is not None:
            raise DivergedError(violation, progress)
        candidate = progress.candidate_step
        if candidate is not None and progress.step >= candidate + self.recipe.healing.window:
            progress.healthy_step, progress.candidate_step = candidate, None

    def _validate(self) -> bool:
        """Score the averaged weights; return True if they are the best so far.

        A signal to stop abandons the validation, since launchers kill processes that take long to
        end. The continued run then repeats it.
        """
        validation, progress = self.run.validation, self.progress
        # Once per run, since it does not change; a continued run has it from its checkpoint.
        if not validation.is_reference(progress.reference):
            found = validation.measure_reference(
                lambda done, share: self._before_image(
                    f"measuring {validation.reference}", done, share
                )
            )
            if found is None:
                return False
            progress.reference = {"images": validation.count, "scores": found}
            if self.reporter:
                self.reporter.journal.log(validation.reference, progress.step, found)
        scores = validation.measure(
            self.run.averaged, lambda done, share: self._before_image("validating", done, share)
        )
        if scores is None:
            return False
        before, progress.validated_step = progress.validated_step, progress.step
        # Recorded whatever the scores: a run that continues from this step must not validate it
        # again, which would count twice against `patience`.
        self._take_verdict(self._rule.judge_validation(scores, progress.step, before))
        is_best = is_better(scores, progress.best_scores, self.recipe.best)
        if is_best:
            progress.best_scores, progress.best_step = scores, progress.step
        progress.stale_validations = 0 if is_best else progress.stale_validations + 1
        # Every rank has the same mean scores, so plateau schedules lower the rate on all of them at
        # once.
        for engine in self.run.trainer.engines.values():
            observe(engine, scores["psnr_y"])
        if self.reporter:
            self.reporter.validated(scores, is_best=is_best)
        return is_best

    def _before_image(self, what: str, done: int, share: int) -> bool:
        """Called before each image; returns False to abandon the validation."""
        self._watchdog.feed(only_if_armed=True)
        self.console.show_status(f"{what}: image {done + 1} of {share}")
        return not self.signals.received

    def _save(self, *, must: bool = False) -> None:
        """Start saving in the background.

        With `must`, wait until the checkpoint is written, and raise `RunError` if that fails.
        """
        if self.progress.step == 0:
            return
        self._watchdog.feed(only_if_armed=True)
        # One save at a time: the writing thread still reads the memory that the next copy would
        # overwrite.
        self._warn_about(self._saver.wait())
        try:
            self._saver.begin(self.progress)
            failure = self._saver.wait() if must else None
        except SaveError as error:
            failure = error
        # A later save could make up for a failed one, except at the end of the run.
        if failure and must:
            failure = self._retry_last_save(failure)
        if failure and must:
            raise RunError(
                f"{failure}; the previous checkpoint in {self.plan.run_dir} is intact"
            ) from failure
        self._warn_about(failure)
        self.last_save = time.perf_counter()
        self._watchdog.feed(only_if_armed=True)

    def _spill_folder(self) -> Path | None:
        """Return the run's folder below --spill-dir; all ranks call it together."""
        run_dir, given = self.plan.run_dir, self.plan.spill_dir
        if given is None:
            return None
        return self.ranks.agree(
            self.ranks.on_all_ranks(
                lambda: spill.prepare(run_dir, given) if self.ranks.is_first else None
            )
        )

    def _retry_last_save(self, failure: SaveError) -> SaveError | None:
        """Spill the last checkpoint, or wait until it can be written or a signal ends the wait.

        Returns the failure if it was not written. All ranks call it together: the ranks have to
        agree on each try and on its end.
        """
        if self._spill and self._spilled_to(self._spill, failure):
            return None
        self.console.say(
            f"warning: {failure}; all steps since the previous checkpoint would be lost, so this "
            f"run waits and tries again every {RETRY_SECONDS} s: free space or repair the disk; "
            "CTRL+C ends the run without this checkpoint"
        )
        began = last = time.monotonic()
        signals, reports = self.signals.count, 1.0
        while True:
            seconds = time.monotonic() - began
            self.console.show_status(f"waiting for space for {duration(seconds)}; CTRL+C ends it")
            if seconds > 60 * reports:
                self.console.say(f"still waiting, for {duration(seconds)}: {failure}")
                reports *= 2
            self._watchdog.feed(only_if_armed=True)
            time.sleep(0.5)
            # A launcher that is gone can pass on no CTRL+C.
            is_ended = self.signals.count > signals or self.signals.is_orphan
            if any(self.ranks.gather(is_ended)):
                return failure
            # Only the first rank's clock counts.
            if not self.ranks.agree(time.monotonic() - last >= RETRY_SECONDS):
                continue
            last = time.monotonic()
            try:
                self._saver.begin(self.progress)
                again = self._saver.wait()
            except SaveError as error:
                again = error
            if again is None:
                self.console.say(
                    f"the checkpoint of step {self.progress.step} is written, after waiting "
                    f"{duration(time.monotonic() - began)}"
                )
                return None
            failure = again

    def _spilled_to(self, folder: Path, failure: SaveError) -> bool:
        """Write the last checkpoint to the spill folder; return whether that succeeded."""
        try:
            self._saver.begin(self.progress, folder)
            second = self._saver.wait()
        except SaveError as error:
            second = error
        if second:
            self.console.say(f"warning: --spill-dir: {second}")
            return False
        if self.ranks.is_first:
            spill.record_spilled(self.plan.run_dir, folder, self.progress.step)
        self._spilled = (
            f"{failure}. The checkpoint is in {folder}, and nothing is lost: free space in "
            f"{self.plan.run_dir} and start the same command again without --reset, which moves it "
            "there"
        )
        return True

    def _warn_about(self, failure: SaveError | None) -> None:
        for note in self._saver.notes():
            self.console.say(f"note: {note}")
        if failure:
            self.console.say(f"warning: {failure}; training continues and will try again")
