"""Reports of the first rank: log entries, curves, previews, histograms."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.config.recipe import write_recipe
from pipeline.files import write_atomically
from pipeline.metrics import text_of
from pipeline.monitor.console import RUN_LOG_FILE, Console
from pipeline.monitor.journal import Journal
from pipeline.monitor.wandb_tracker import WandbTracker
from pipeline.run_folder import DS_CONFIG_FILE, FILE_LISTS_DIR, RECIPE_FILE
from pipeline.training.health import TurnChange
from pipeline.training.meter import MOST_WAIT, Reading
from pipeline.training.previews import PREVIEWS_DIR, Previews, every_nth
from pipeline.training.setup import Run, move_logs_aside
from pipeline.training.validation import enlarged_input, weighted_score

TIME_SHARE = 0.05  # of the process's time, for previews at the ends of epochs
FREE_SECONDS = 5.0  # for previews, in addition to that share


class Reporter:
    """Reports of the first rank.

    Writes the recipe, ds_config and file lists into the run folder, and logs and previews into the
    log folder.
    """

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console, self._plan, self._progress = run, console, run.plan, run.progress
        plan = run.plan
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        write_recipe(plan.recipe, plan.run_dir / RECIPE_FILE)
        write_atomically(
            plan.run_dir / DS_CONFIG_FILE, json.dumps(plan.ds_config, indent=2).encode()
        )
        plan.dataset.write_lists(plan.run_dir / FILE_LISTS_DIR)
        if run.progress.step == 0:
            move_logs_aside(plan)
        console.log_to(plan.log_dir / RUN_LOG_FILE)
        self._tracker = self._start_tracker() if plan.wandb else None
        self.journal = Journal(plan.log_dir, run.progress.step, console.say, self._tracker)
        self._previews = Previews(
            plan.log_dir / PREVIEWS_DIR, run.previews, plan.recipe.scale, run.progress.step
        )
        self._may_advise = True  # whether the remedy for data waits may still be logged (once)
        self._known_turns: set[bool] = set()  # changes of turns that were announced, by `skips`
        self._shown: int | None = None  # step of the last set of previews
        self._began = time.perf_counter()
        self._seconds = 0.0  # spent on previews since `_began`
        for line in run.introduction:
            console.say(line)
        if self._tracker:
            console.say(self._tracker.introduction)

    def _start_tracker(self) -> WandbTracker:
        plan = self._plan
        assert plan.wandb is not None
        name = plan.home.name + (f" {plan.recipe.stage}" if plan.recipe.stage else "")
        gan = (
            {"discriminator_ds_config": plan.discriminator_ds_config}
            if plan.discriminator_ds_config
            else {}
        )
        config = {
            "recipe": plan.recipe.model_dump(mode="json"),
            "ds_config": plan.ds_config,
            **gan,
            "world_size": self._run.ranks.world_size,
            "total_steps": plan.total_steps,
        }
        return WandbTracker(plan.log_dir, plan.wandb, name, config, self._console.say)

    def begin(self) -> None:
        """Log the previews' inputs and targets, and, at step 0, the initial output."""
        for pair in self._previews.pairs:
            self.journal.picture(self._progress.step, f"{pair.name}/input", enlarged_input(pair))
            self.journal.picture(self._progress.step, f"{pair.name}/target", pair.hr)
        if self._progress.step == 0:
            self.show_previews()

    def log(self, reading: Reading, epoch: float) -> None:
        """Log the means over a log interval and the state of the engines."""
        trainer, step, total = self._run.trainer, self._progress.step, self._plan.total_steps
        learning_rate = trainer.generator.get_lr()[0] * trainer.generator.rate.value
        values = {
            **reading.as_dict(),
            **_split_step_time(reading, self._plan.ds_config["train_batch_size"]),
            "lr": learning_rate,
            "epoch": round(epoch, 4),
        }
        for name, engine in trainer.engines.items():
            prefix = "" if name == "generator" else f"{name}_"
            values[f"{prefix}skipped_steps"] = engine.skipped_steps
            values[f"{prefix}gradient_norm"] = float(engine.gradient_norm)
        self.journal.log("train", step, values)
        for name, scales in getattr(trainer, "logits", {}).items():
            logits = torch.cat([logits.flatten() for logits in scales])
            self.journal.distribution(step, f"discriminator/{name}", logits)
        self._console.progress(
            f"step {step}/{total}  epoch {epoch:.1f}  {reading.text()}  lr {learning_rate:.2e}"
            f"{reading.turns_text()}{reading.waiting_text()}",
            step / total,
        )
        if self._may_advise and reading.data_wait > MOST_WAIT:
            self._may_advise = False
            threads = f"raise data.threads (now {self._plan.recipe.data.threads})"
            remedy = (
                f"{reading.slowest_step} of the degradation's time: make this step rarer or "
                f"faster, or {threads}"
                if reading.slowest_step
                else f"{threads}, or convert encoded files to .npy, which need no decoding "
                "(tools/convert_dataset.py)"
            )
            self._console.say(
                f"note: {reading.data_wait:.0%} of the time is spent waiting for data; {remedy}"
            )

    def validated(self, scores: Mapping[str, float], *, is_best: bool) -> None:
        """Log a validation's scores and the best so far."""
        progress = self._progress
        best = progress.best_scores or {}
        values: dict[str, float | None] = {}
        for name, value in scores.items():
            values |= {name: value, f"best_{name}": best.get(name)}
        spec, reference = self._plan.recipe.best, progress.reference["scores"]
        text = text_of(scores, reference, f" over {self._run.validation.reference}")
        if spec.weights:
            score = weighted_score(scores, spec, reference)
            is_known = all(name in best for name in spec.metrics)
            values |= {
                "score": score,
                "best_score": weighted_score(best, spec, reference) if is_known else None,
            }
            text += f", score {score:+.4f}"
        self.journal.log(
            "validation", progress.step, values | {"stale_validations": progress.stale_validations}
        )
        before = f"best {text_of(best)} at step {progress.best_step}"
        self._console.say(
            f"validation at step {progress.step}: {text} ({'best so far' if is_best else before})",
            is_good=is_best,
        )

    def turns_changed(self, change: TurnChange) -> None:
        """Log that the discriminator begins to skip its turns, or takes them again.

        On the console, only the first change of each kind: it may happen often.
        """
        self.journal.log(
            "turns",
            change.step,
            {"skips": change.skips, "loss": change.loss, "share_of_guessing": change.share},
        )
        if change.skips not in self._known_turns:
            self._known_turns.add(change.skips)
            does = "skips its turns from here on" if change.skips else "takes its turns again"
            self._console.say(
                f"step {change.step}: the discriminator {does}: its loss was {change.loss:.4g}, "
                f"{change.share:.0%} of that of guessing (log.jsonl lists all such changes)"
            )

    def show_previews_if_due(self, epochs_before: int, epochs: int, all_epochs: int) -> None:
        """Show previews if an epoch or a validation has ended, thinned out to `previews.keep`.

        Ends of epochs are skipped while previews have taken more than `TIME_SHARE` of the time.
        """
        step, recipe = self._progress.step, self._plan.recipe
        nth = every_nth(all_epochs, recipe.previews.keep)
        has_time = self._seconds <= FREE_SECONDS + TIME_SHARE * (time.perf_counter() - self._began)
        is_due = has_time and epochs // nth > epochs_before // nth
        if self._progress.validated_step == step:
            nth = every_nth(self._plan.total_steps // recipe.validate_every, recipe.previews.keep)
            is_due |= step // recipe.validate_every % nth == 0 or step >= self._plan.total_steps
        if is_due:
            self.show_previews()

    def show_previews(self) -> None:
        """Write the averaged network's output for the previews, at most once per step."""
        step = self._progress.step
        if self._shown == step:
            return
        self._shown, began = step, time.perf_counter()
        validation, averaged = self._run.validation, self._run.averaged
        outputs = [validation.upscale(averaged, pair).cpu() for pair in self._previews.pairs]
        for pair, output in zip(self._previews.pairs, outputs, strict=True):
            self.journal.picture(step, f"{pair.name}/output", output)
        with self.journal.warn_on_error(PREVIEWS_DIR):
            self._previews.write(step, outputs)
        self._seconds += time.perf_counter() - began

    def histograms(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Log histograms of every parameter's values and of the given `gradients` of an update."""
        for name, engine in self._run.trainer.engines.items():
            for parameter, values in engine.module.named_parameters():
                self.journal.histogram(self._progress.step, f"weights/{name}/{parameter}", values)
            for parameter, gradient in gradients.get(name, {}).items():
                self.journal.histogram(
                    self._progress.step, f"gradients/{name}/{parameter}", gradient
                )

    def close(self) -> None:
        self.journal.close()
        if self._tracker:
            self._tracker.finish()


def _split_step_time(reading: Reading, global_batch: int) -> dict[str, float]:
    """Split the seconds per step into waiting for data and everything else."""
    seconds = global_batch / reading.images_per_second
    data = seconds * reading.data_wait
    return {
        "step_seconds": round(seconds, 6),
        "data_seconds": round(data, 6),
        "compute_seconds": round(seconds - data, 6),
    }
