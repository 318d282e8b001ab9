"""The search: starts, watches, prunes, stops and records the trials on this machine.

The best trial so far is always available as a complete recipe (`write_best`), with DeepSpeed's
configuration files beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any

import optuna
import yaml
from optuna.trial import FixedTrial, Trial, TrialState
from tqdm import tqdm

from pipeline.cli import RunError, bar_options
from pipeline.distributed.gpus import device_names
from pipeline.files import short_path, write_atomically
from pipeline.installation import ROOT
from pipeline.metrics import metric_of
from pipeline.signals import stop_signals
from pipeline.training.options import TrainOptions, TrainPlan, make_plans
from tools.search.report import ranked, score_text, short_names
from tools.search.space import Space, override
from tools.search.study import StudyFolder, next_trial, waits_for_others
from tools.search.trial import OUTPUT_FILE, TrialRun

BEST_FILE = "best.yaml"
NOT_OF_A_STAGE = ("name", "stage")
POLL_SECONDS = 0.2
MAX_FAILURES = 3  # in a row, before any trial succeeded


@dataclass(frozen=True)
class Budget:
    """Limits of a search."""

    trials: int
    steps: int  # per trial
    prune_after: int  # steps
    seconds: float  # for this call
    keep: int  # number of best trials whose checkpoints are kept
    seed: int


@dataclass(frozen=True)
class Machine:
    """Resources of this machine for trials."""

    jobs: int
    procs: int  # ranks per trial
    num_gpus: int

    def variables(self, slot: int) -> dict[str, str]:
        """Environment of the trial in a slot: its own GPUs, or its share of the cores."""
        variables = dict(os.environ)
        if self.num_gpus:
            names = device_names(variables) or list(map(str, range(self.num_gpus)))
            own = names[slot * self.procs : (slot + 1) * self.procs]
            variables.update(CUDA_VISIBLE_DEVICES=",".join(own))
            variables.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        else:
            cores = len(os.sched_getaffinity(0))
            variables.setdefault("OMP_NUM_THREADS", str(max(1, cores // (self.jobs * self.procs))))
        return variables


@dataclass(frozen=True)
class Objective:
    """What is optimised."""

    space: Space
    training: TrainOptions  # without overrides
    fixed: tuple[str, ...]  # overrides of all trials
    metric: str
    plans: list[TrainPlan]  # of a trial without searched values
    base: list[TrainPlan]  # the same, with the recipe's number of steps and validation interval

    def overrides(self, values: dict[str, Any]) -> tuple[str, ...]:
        return (*self.fixed, *(override(key, value) for key, value in values.items()))

    def command(self, values: dict[str, Any], run_dir: Path, procs: int) -> list[str]:
        """Training command of a trial."""
        options = [
            ("--recipe", self.training.recipe),
            ("--output-dir", str(run_dir)),
            ("--procs", str(procs)),
        ]
        options += [("--dataset-dir", str(path)) for path in self.training.dataset_dir]
        options += [("--lr-dir", str(path)) for path in self.training.lr_dir]
        if self.training.ds_config:
            options.append(("--ds-config", str(self.training.ds_config)))
        words = [word for option in options for word in option]
        return [sys.executable, str(ROOT / "launch" / "local.py"), *words, *self.overrides(values)]


@dataclass
class Running:
    """A trial that this process runs."""

    trial: Trial
    lock: IO[str]
    run: TrialRun
    slot: int
    values: dict[str, Any]
    began: float


class Search:
    """Runs the trials of a study on this machine until there are enough."""

    def __init__(
        self,
        folder: StudyFolder,
        study: optuna.Study,
        target: Objective,
        budget: Budget,
        machine: Machine,
    ) -> None:
        self._folder, self._study, self._target = folder, study, target
        self._budget, self._machine = budget, machine
        self._running: dict[int, Running] = {}
        self._received = 0  # number of the signal received, or 0
        self._is_over = False  # out of time, or too many failures
        self._failures: list[str] = []  # of this call, until a trial succeeds
        self._began, self._finished_here = time.monotonic(), 0
        self._deadline = self._began + budget.seconds

    def run(self) -> int:
        """Run the search; returns 0, or 128 + the number of the signal that stopped it.

        Raises `RunError` if the first trials fail.
        """
        with self._signals(), self._bar() as bar:
            while True:
                self._fill(bar)
                if not self._running:
                    break
                time.sleep(POLL_SECONDS)
                for running in list(self._running.values()):
                    self._watch(running, bar)
                self._show(bar)
        if len(self._failures) >= MAX_FAILURES:
            raise RunError(
                f"the first {len(self._failures)} trials failed, the last with: "
                f"{self._failures[-1]}"
            )
        interrupted = len(self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        if self._received:
            print("stopped and saved; run the same command to continue")
            return 128 + self._received
        if self._is_over:
            print(
                f"time is up after {self._budget.seconds / 60:g} min; run the same command to "
                "continue"
            )
        elif interrupted and waits_for_others(self._study, set()):
            print(f"trials still running in other searches: {interrupted}")
        return 0

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, _frame: FrameType | None) -> None:
            if not self._received:
                with contextlib.suppress(OSError):
                    print("\nsaving the running trials ...", file=sys.stderr, flush=True)
            self._received = self._received or number

        previous = {number: signal.signal(number, note) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # --- Choosing and starting ---

    def _fill(self, bar: tqdm) -> None:
        """Start trials while there are free slots."""
        while len(self._running) < self._machine.jobs and not self._is_ending():
            found = next_trial(
                self._folder,
                self._study,
                self._budget.trials,
                self._budget.seed,
                set(self._running),
            )
            if found is None:
                return
            self._start(*found, bar)

    def _is_ending(self) -> bool:
        self._is_over = self._is_over or time.monotonic() > self._deadline
        return bool(self._received or self._is_over or len(self._failures) >= MAX_FAILURES)

    def _start(self, trial: Trial, lock: IO[str], bar: tqdm) -> None:
        """Start or continue the training run of a trial."""
        values = self._target.space.suggest(trial)
        run_dir = self._folder.trial_dir(trial.number)
        stage = self._target.plans[-1].recipe.stage
        run = TrialRun(
            trial.number,
            run_dir,
            run_dir / stage / "log.jsonl",
            metric_of(self._target.metric).name,
        )
        slot = min(
            set(range(self._machine.jobs)) - {other.slot for other in self._running.values()}
        )
        names = short_names(list(values))
        summary = ", ".join(
            f"{names[key]} {value:.4g}" if isinstance(value, float) else f"{names[key]} {value}"
            for key, value in values.items()
        )
        self._say(
            bar, f"trial {trial.number} {'continues' if run_dir.exists() else 'starts'}: {summary}"
        )
        variables = self._machine.variables(slot)
        run.start(self._target.command(values, run_dir, self._machine.procs), variables)
        self._running[trial.number] = Running(trial, lock, run, slot, values, time.monotonic())

    # --- Watching ---

    def _watch(self, running: Running, bar: tqdm) -> None:
        """Report the new scores of a trial, prune it, stop it, or record its end."""
        # Read the status before the log, so that the log is complete if the run has ended.
        status = running.run.status()
        scores = running.run.new_scores()
        for step, score in scores:
            if (
                step
                not in self._study.get_trials(deepcopy=False)[
                    running.trial.number
                ].intermediate_values
            ):
                running.trial.report(score, step)
        if status is not None:
            self._finish(running, status, bar)
        elif self._is_ending():
            running.run.stop()
        elif scores and not running.run.is_stopping and running.trial.should_prune():
            running.run.is_pruned = True
            running.run.stop()

    def _finish(self, running: Running, status: int, bar: tqdm) -> None:
        """Record the end of a trial, unless it was interrupted and will be continued."""
        run, number = running.run, running.trial.number
        scores = run.scores.values()
        best = (min if metric_of(self._target.metric).lower_is_better else max)(
            scores, default=None
        )
        del self._running[number]
        with contextlib.closing(running.lock):
            if run.is_pruned:
                self._study.tell(number, state=TrialState.PRUNED)
                text = f"pruned at step {run.step}"
            elif status == 0 and best is not None:
                self._study.tell(number, best)
                text = self._result(number, best)
            elif run.is_stopping and status in (130, 143):
                self._say(
                    bar,
                    f"trial {number}: saved at step {run.step} of {self._budget.steps}"
                    if run.step
                    else f"trial {number}: stopped before anything could be saved",
                )
                return
            else:
                reason = run.reason(status) if status else "no validation gave a finite score"
                running.trial.set_user_attr("reason", reason)
                self._study.tell(number, state=TrialState.FAIL)
                if not self._study.get_trials(
                    deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)
                ):
                    self._failures.append(reason)
                text = f"failed: {reason} (full output: {short_path(run.folder / OUTPUT_FILE)})"
        self._finished_here += 1
        self._say(bar, f"trial {number}: {text}; {self._left()}")
        with self._folder.alone():
            self._tidy_up()

    def _left(self) -> str:
        """Progress, such as `3 of 12 trials done, about 05:10 left`."""
        done = self._done()
        left = (
            max(0, self._budget.trials - done)
            * (time.monotonic() - self._began)
            / self._finished_here
        )
        return f"{done} of {self._budget.trials} trials done" + (
            f", about {tqdm.format_interval(left)} left" if left else ""
        )

    def _done(self) -> int:
        """Number of finished trials, of this and other searchers."""
        return sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False))

    def _result(self, number: int, best: float) -> str:
        """One-line result of a complete trial."""
        title = metric_of(self._target.metric).title
        text = f"{title} {score_text(best, self._target.metric)}"
        if self._study.best_trial.number != number:
            before = self._study.best_trial
            return (
                f"{text} (best: {score_text(before.value, self._target.metric)}, trial "
                f"{before.number})"
            )
        return f"{text}, best so far"

    def _tidy_up(self) -> None:
        """Write the best recipe, and remove the checkpoints of finished trials except the best."""
        trials = ranked(self._study)
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        kept = {trial.number for trial in complete[: self._budget.keep]}
        for trial in trials:
            if trial.state.is_finished() and trial.number not in kept:
                for checkpoints in self._folder.trial_dir(trial.number).glob("**/checkpoints"):
                    shutil.rmtree(checkpoints, ignore_errors=True)
        if complete:
            self._write_best(complete[0])

    def _write_best(self, best: optuna.trial.FrozenTrial) -> None:
        assert best.value is not None
        values = self._target.space.suggest(FixedTrial(best.params))
        plans = make_plans(replace(self._target.training, overrides=self._target.overrides(values)))
        comment = (
            f"Trial {best.number} of {self._folder.path.name}: "
            f"{metric_of(self._target.metric).title} "
            f"{score_text(best.value, self._target.metric)} in {self._budget.steps} steps of "
            f"recipe {self._target.training.recipe}, with\n"
            f"{' '.join(override(key, value) for key, value in values.items())}\n"
            f"Add {' '.join(self._target.fixed[-2:])} to train for as long as the trial."
        )
        write_best(self._folder.path, plans, self._target.base, comment)

    # --- Output ---

    def _bar(self) -> tqdm:
        bar = "{percentage:3.0f}%|{bar}| {n:.1f}/{total} trials [{elapsed}<{remaining}]{postfix}"
        return tqdm(
            total=self._budget.trials,
            initial=self._done(),
            unit="trial",
            file=sys.stderr,
            bar_format=bar,
            **bar_options(),
        )

    def _show(self, bar: tqdm) -> None:
        """Advance the bar by the steps of the running trials."""
        steps = sum(
            min(1.0, running.run.step / self._budget.steps) for running in self._running.values()
        )
        bar.n = min(self._budget.trials, self._done() + steps)
        bar.set_postfix_str(
            ", ".join(
                f"trial {number}: step {running.run.step}"
                for number, running in self._running.items()
            ),
            refresh=False,
        )
        bar.refresh()

    def _say(self, bar: tqdm, line: str) -> None:
        with contextlib.suppress(OSError):  # a closed terminal must not stop the search
            bar.write(line, file=sys.stdout)
            sys.stdout.flush()


def write_best(
    folder: Path, plans: Sequence[TrainPlan], base: Sequence[TrainPlan], comment: str
) -> Path:
    """Write best.yaml and the files it needs into `folder`; returns its path.

    It contains the complete recipe of the trial (`plans`, one per stage), so later changes of a
    base recipe do not affect it. The number of steps and the validation interval come from the
    recipe that the search started with (`base`). `comment` is added as a comment at the top.
    """
    stages = {}
    for plan, before in zip(plans, base, strict=True):
        values = plan.recipe.model_dump(mode="json", exclude_unset=True)
        for name in ("steps", "validate_every"):
            values[name] = getattr(before.recipe, name)
        prefix = f"best_{plan.recipe.stage}" if plan.recipe.stage else "best"
        values["ds_config"] = _write_ds_config(folder / f"{prefix}_ds_config.json", plan.ds_config)
        if (
            plan.recipe.adversarial
            and plan.recipe.adversarial.ds_config
            and plan.discriminator_ds_config
        ):
            values["adversarial"]["ds_config"] = _write_ds_config(
                folder / f"{prefix}_discriminator_ds_config.json", plan.discriminator_ds_config
            )
        stages[plan.recipe.stage] = values
    name = {"name": re.sub(r"[^A-Za-z0-9._-]", "-", f"{folder.name}-best")}
    if "" in stages:
        recipe = {**stages[""], **name}
    else:
        recipe = {
            **name,
            "scale": plans[0].recipe.scale,
            "stages": {
                stage: {key: value for key, value in values.items() if key not in NOT_OF_A_STAGE}
                for stage, values in stages.items()
            },
        }
    header = "".join(f"# {line}\n" for line in comment.splitlines())
    write_atomically(
        folder / BEST_FILE, (header + yaml.safe_dump(recipe, sort_keys=False)).encode()
    )
    return folder / BEST_FILE


def _write_ds_config(path: Path, values: dict[str, Any]) -> str:
    """Write DeepSpeed's configuration; returns its path, relative to the checkout if inside it."""
    path = path.absolute()
    write_atomically(path, json.dumps(values, indent=2).encode() + b"\n")
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
