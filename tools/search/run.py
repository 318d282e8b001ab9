"""The search itself: trials started, watched, pruned, ended and written down, on this machine.

The best trial so far is always there as a recipe that trains as it is (`write_best`): its file, and
DeepSpeed's files beside it.
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
from pipeline.training.options import TrainOptions, TrainPlan, make_plans
from tools.search.report import ranked, score_text, short_names
from tools.search.space import Space, override
from tools.search.study import StudyFolder, next_trial, waits_for_others
from tools.search.trial import OUTPUT_FILE, TrialRun

BEST_FILE = "best.yaml"
NOT_OF_A_STAGE = ("name", "stage")
POLL_SECONDS = 0.2
MOST_FAILURES = 3  # in a row, before any trial went well


@dataclass(frozen=True)
class Budget:
    """How much may be spent."""

    trials: int
    steps: int  # of a trial
    prune_after: int  # steps
    seconds: float  # of this call
    keep: int  # trials whose checkpoints stay
    seed: int


@dataclass(frozen=True)
class Machine:
    """What this machine has for trials."""

    jobs: int
    procs: int  # ranks of a trial
    num_gpus: int

    def variables(self, slot: int) -> dict[str, str]:
        """The environment of the trial in a slot: its own GPUs, or its share of the cores."""
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
    """What is searched for."""

    space: Space
    training: TrainOptions  # without overrides
    fixed: tuple[str, ...]  # overrides of all trials
    metric: str
    plans: list[TrainPlan]  # of a trial without searched values
    base: list[TrainPlan]  # the same, as long and as often validated as the recipe says

    def overrides(self, values: dict[str, Any]) -> tuple[str, ...]:
        return (*self.fixed, *(override(key, value) for key, value in values.items()))

    def command(self, values: dict[str, Any], run_dir: Path, procs: int) -> list[str]:
        """The training line of a trial."""
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
    """A trial that runs here."""

    trial: Trial
    lock: IO[str]
    run: TrialRun
    slot: int
    values: dict[str, Any]
    began: float


class Search:
    """Runs the trials of a study on this machine until there are enough of them."""

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
        self._received = 0  # signal
        self._is_over = False  # time, or too many failures
        self._failures: list[str] = []  # of this call, as long as no trial has gone well
        self._began, self._finished_here = time.monotonic(), 0
        self._deadline = self._began + budget.seconds

    def run(self) -> int:
        """Search to the end. 0, or 128 + the signal that stopped it. `RunError` if trials fail from
        the start."""
        with self._signals(), self._bar() as bar:
            while True:
                self._fill(bar)
                if not self._running:
                    break
                time.sleep(POLL_SECONDS)
                for running in list(self._running.values()):
                    self._watch(running, bar)
                self._show(bar)
        if len(self._failures) >= MOST_FAILURES:
            raise RunError(
                f"the first {len(self._failures)} trials failed, the last with: "
                f"{self._failures[-1]}"
            )
        interrupted = len(self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        if self._received:
            print("stopped and saved; the same command goes on")
            return 128 + self._received
        if self._is_over:
            print(
                f"the time is up after {self._budget.seconds / 60:g} min; the same command goes on"
            )
        elif interrupted and waits_for_others(self._study, set()):
            print(f"{interrupted} trials are still run by others")
        return 0

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, _frame: FrameType | None) -> None:
            if not self._received:
                with contextlib.suppress(OSError):
                    print("\nsaving the trials that run ...", file=sys.stderr, flush=True)
            self._received = self._received or number

        previous = {
            number: signal.signal(number, note)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # Choosing and starting

    def _fill(self, bar: tqdm) -> None:
        """Start trials where there is room for them."""
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
        return bool(self._received or self._is_over or len(self._failures) >= MOST_FAILURES)

    def _start(self, trial: Trial, lock: IO[str], bar: tqdm) -> None:
        """Start a trial's training, or let it go on."""
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
        told = ", ".join(
            f"{names[key]} {value:.4g}" if isinstance(value, float) else f"{names[key]} {value}"
            for key, value in values.items()
        )
        self._say(
            bar, f"trial {trial.number} {'goes on' if run_dir.exists() else 'begins'}: {told}"
        )
        variables = self._machine.variables(slot)
        run.start(self._target.command(values, run_dir, self._machine.procs), variables)
        self._running[trial.number] = Running(trial, lock, run, slot, values, time.monotonic())

    # Watching

    def _watch(self, running: Running, bar: tqdm) -> None:
        """Report what is new of a trial, prune it, stop it, or write down its end."""
        status = running.run.status()  # before the log is read: what it holds then is all
        news = running.run.news()
        for step, score in news:
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
        elif news and not running.run.is_told_to_stop and running.trial.should_prune():
            running.run.is_pruned = True
            running.run.stop()

    def _finish(self, running: Running, status: int, bar: tqdm) -> None:
        """Write down a trial's end, unless it was interrupted: then it stays to be gone on with."""
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
            elif run.is_told_to_stop and status in (130, 143):
                self._say(
                    bar,
                    f"trial {number}: saved at step {run.step} of {self._budget.steps}"
                    if run.step
                    else f"trial {number}: stopped before there was anything to save",
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
                text = f"failed: {reason} (all of it: {short_path(run.folder / OUTPUT_FILE)})"
        self._finished_here += 1
        self._say(bar, f"trial {number}: {text}; {self._left()}")
        with self._folder.alone():
            self._tidy_up()

    def _left(self) -> str:
        """`3 of 12 trials done, 5:10 left`."""
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
        """Trials that have come to their end, here or elsewhere."""
        return sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False))

    def _result(self, number: int, best: float) -> str:
        """A complete trial in a line; of the best so far the recipe is written."""
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
        """Write the best trial's recipe, and remove the checkpoints of all finished ones but the
        best."""
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
        said = (
            f"Trial {best.number} of {self._folder.path.name}: "
            f"{metric_of(self._target.metric).title} "
            f"{score_text(best.value, self._target.metric)} in {self._budget.steps} steps of "
            "recipe "
            f"{self._target.training.recipe}, with\n"
            f"{' '.join(override(key, value) for key, value in values.items())}\n"
            f"Say {' '.join(self._target.fixed[-2:])} to train as long as the trial."
        )
        write_best(self._folder.path, plans, self._target.base, said)

    # Telling

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
        """The bar moves with the steps of the trials that run."""
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
        with contextlib.suppress(OSError):  # a terminal that is gone must not stop a search
            bar.write(line, file=sys.stdout)
            sys.stdout.flush()


def write_best(
    folder: Path, plans: Sequence[TrainPlan], base: Sequence[TrainPlan], said: str
) -> Path:
    """Write best.yaml and what it needs into `folder`.

    It says all that the recipe of the trial (its `plans`, one a stage) says, so that no later
    change of a base recipe alters it; how long to train and how often to measure are as in the
    recipe that the search began with (`base`). `said` goes on top as a comment.
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
    comment = "".join(f"# {line}\n" for line in said.splitlines())
    write_atomically(
        folder / BEST_FILE, (comment + yaml.safe_dump(recipe, sort_keys=False)).encode()
    )
    return folder / BEST_FILE


def _write_ds_config(path: Path, values: dict[str, Any]) -> str:
    """Write DeepSpeed's file; returns its name for a recipe, seen from the checkout if it lies in
    there."""
    path = path.absolute()
    write_atomically(path, json.dumps(values, indent=2).encode() + b"\n")
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
