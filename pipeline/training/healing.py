"""Going back to an earlier step: what a run did when it diverged, or when `--from-step` asked.

Every return is an entry of healing.json in the run folder, written before anything else changes:
which step the run went back to, which samples it passes over from there, and how much lower its
learning rate is for how long. All of this follows from the entries and the step alone, so a healed
run that is stopped and continued, or started again from that step, is the same run.

A checkpoint of the part that was left is recognised by the number of returns that it records; it is
removed, or, after `--from-step`, renamed to `left-step-N`. Imports no torch.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.progress import Progress, read_progress
from pipeline.checkpoint.pruning import remove_checkpoint
from pipeline.checkpoint_index import damage, read_index
from pipeline.cli import RunError, UserError, counted
from pipeline.files import parse_json, short_path, write_atomically
from pipeline.run_folder import checkpoint_dir, checkpoint_steps, free_path
from pipeline.training.health import Violation
from pipeline.training.options import TrainPlan
from pipeline.training.saved_run import refuse_other_run

if TYPE_CHECKING:
    from pipeline.distributed.ranks import Ranks

HEALING_FILE = "healing.json"
LONGEST_SEARCH = 64
"""Updates whose samples are searched for a guilty one. In a longer window all are passed over."""
GUILTY_FACTOR, GUILTY_DEVIATIONS = 8.0, 12.0
"""A guilty sample's loss is this many times the median, and this many median deviations above."""
MOST_GUILTY = 0.02  # share of the samples; if more are that bad, the samples are not the cause
MOST_SHOWN = 64  # samples on the sheet that shows them


class DivergedError(Exception):
    """A run has diverged; raised on all ranks at the same step."""

    def __init__(self, violation: Violation, progress: Progress) -> None:
        super().__init__(violation.reason)
        self.violation, self.progress = violation, progress


@dataclass(frozen=True)
class Return:
    """A return to an earlier step."""

    back_to: int  # step; 0: the run's beginning
    found_at: int  # step at which the run was left
    reason: str  # empty after --from-step
    # Updates whose samples are passed over: the number of updates before the first, and how many.
    first: int = 0
    count: int = 0
    excluded: list[int] = field(default_factory=list)  # samples made from another file instead
    rates: dict[str, float] = field(default_factory=dict)  # engine -> factor of its learning rate
    rates_until: int = 0  # step


class History:
    """The returns of a run, in order. All ranks hold the same."""

    def __init__(self, returns: Iterable[Return] = ()) -> None:
        self.returns = list(returns)

    @staticmethod
    def of(run_dir: Path) -> History:
        """Read the history of the run in `run_dir`; raises `UserError` if it is damaged."""
        path = run_dir / HEALING_FILE
        if not path.is_file():
            return History()
        try:
            entries = parse_json(path.read_text(encoding="utf-8"))["returns"]
            return History(Return(**entry) for entry in entries)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}: {error}); restore it from a backup, "
                "or start a new run with --reset, which keeps the old one"
            ) from error

    @staticmethod
    def read(run_dir: Path, ranks: Ranks) -> History:
        """Read the run's history on the first rank, for all ranks, which call it together."""
        own = ranks.on_all_ranks(lambda: History.of(run_dir) if ranks.is_first else History())
        return History(ranks.agree(own.returns))

    def write(self, run_dir: Path, ranks: Ranks) -> None:
        text = json.dumps({"returns": [asdict(entry) for entry in self.returns]}, indent=1) + "\n"
        run_dir.mkdir(parents=True, exist_ok=True) if ranks.is_first else None
        ranks.on_all_ranks(
            lambda: (
                write_atomically(run_dir / HEALING_FILE, text.encode()) if ranks.is_first else None
            )
        )

    @property
    def effective(self) -> list[Return]:
        """Return the entries that still count: not those after a step that was left later."""
        kept: list[Return] = []
        for entry in self.returns:
            kept = [other for other in kept if other.back_to <= entry.back_to]
            kept.append(entry)
        return kept

    def gaps(self, batch: int) -> tuple[tuple[int, int], ...]:
        """Return what the stream of samples passes over, see `pipeline.data.source.Position`.

        `batch`: samples per update.
        """
        return tuple(
            (entry.first * batch, entry.count * batch) for entry in self.effective if entry.count
        )

    def data_update(self, number: int) -> int:
        """Return which update's samples update `number` (0, 1, …) uses, if none were passed over.

        Also how many updates' samples `number` updates have used or passed over.
        """
        return number + sum(entry.count for entry in self.effective if entry.first <= number)

    def samples(self, first: int, count: int, batch: int) -> range:
        """Return the numbers of the samples of `count` updates from update `first` on."""
        last = self.data_update(first + count - 1) + 1 if count else self.data_update(first)
        return range(self.data_update(first) * batch, last * batch)

    @property
    def excluded(self) -> frozenset[int]:
        return frozenset(sample for entry in self.effective for sample in entry.excluded)

    def rate_factor(self, engine: str, step: int) -> float:
        """Return the factor of an engine's learning rate in the update after `step` updates."""
        return math.prod(
            entry.rates.get(engine, 1.0)
            for entry in self.effective
            if entry.back_to <= step < entry.rates_until
        )

    def in_a_row(self, step: int) -> int:
        """Return how often the run, having diverged, went back to `step`."""
        return sum(entry.back_to == step and bool(entry.reason) for entry in self.effective)

    def is_left(self, step: int, returns: int) -> bool:
        """Whether the checkpoint of `step`, made after `returns` returns, was left since."""
        return any(entry.back_to < step for entry in self.returns[returns:])


def remove_left_checkpoints(
    run_dir: Path, history: History, ranks: Ranks, say: Callable[[str], None]
) -> None:
    """Remove the checkpoints of parts of the run that were left; the first rank does it."""

    def remove() -> list[str]:
        notes = []
        for step in checkpoint_steps(run_dir) if ranks.is_first and history.returns else ():
            folder = checkpoint_dir(run_dir, step)
            try:
                returns = read_progress(run_dir, step).returns
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # damaged, which is reported when the newest intact one is looked for
            if not history.is_left(step, returns):
                continue
            if next(e for e in history.returns[returns:] if e.back_to < step).reason:
                notes += remove_checkpoint(folder)
            else:
                folder.rename(free_path(folder.with_name(f"left-{folder.name}")))
        return notes

    for note in ranks.on_all_ranks(remove):
        say(f"note: {note}")


def return_by_hand(
    plan: TrainPlan,
    identity: dict[str, Any],
    history: History,
    ranks: Ranks,
    say: Callable[[str], None],
) -> None:
    """Add the return to the step that `--from-step` names to `history`.

    Raises `UserError` if that checkpoint does not exist, is damaged, or is another run's.
    """
    step = plan.from_step
    assert step is not None
    steps = ranks.agree(checkpoint_steps(plan.run_dir))
    where = f"--from-step {step}: {short_path(plan.run_dir)}"
    if step not in steps:
        kept = f"kept are {', '.join(map(str, steps))}" if steps else "it has none"
        raise UserError(f"{where} has no checkpoint of that step; {kept}")

    def check() -> None:
        fault = damage(checkpoint_dir(plan.run_dir, step))
        if fault:
            raise UserError(f"{where}: that checkpoint is damaged ({fault}); choose another")
        refuse_other_run(plan, identity, read_index(checkpoint_dir(plan.run_dir, step)))

    ranks.on_all_ranks(lambda: check() if ranks.is_first else None)
    if step == steps[-1]:
        return
    history.returns.append(Return(step, steps[-1], ""))
    history.write(plan.run_dir, ranks)
    say(
        f"going back from step {steps[-1]} to step {step}; later checkpoints are kept as "
        f"left-step-N in {short_path(checkpoint_dir(plan.run_dir, step).parent)}"
    )


def return_to_health(
    plan: TrainPlan, error: DivergedError, ranks: Ranks, say: Callable[[str], None]
) -> None:
    """Go back to the newest healthy checkpoint, or to the beginning, after a divergence.

    The next start of the stage continues from there. Raises `RunError`, with a report, if the run
    does not heal, or has gone back to that step as often as it may.
    """
    spec, found, history = (
        plan.recipe.healing,
        error.violation,
        History.read(plan.run_dir, ranks),
    )
    healthy = error.progress.healthy_step or 0
    # The checkpoint may not exist, because the disk was full when it was due. All older ones are
    # healthy as well.
    steps = ranks.agree(checkpoint_steps(plan.run_dir))
    back_to = max((step for step in steps if step <= healthy), default=0)
    times = history.in_a_row(back_to)
    # Nothing before the step is repeated, so nothing before it can be passed over.
    first = max(found.first, back_to)
    count = found.last - first
    samples = history.samples(first, count, plan.ds_config["train_batch_size"])
    show = _show_command(plan, samples)
    report = f"training has diverged{_times(times, back_to)}: {found.reason}"
    look = f"to see the samples of these updates: {show}"
    if not spec.is_on:
        raise RunError(
            f"{report}; start again with a smaller ds.optimizer.params.lr, or set healing=on; "
            f"{look}"
        )
    engines = ("generator", *(("discriminator",) if plan.recipe.adversarial else ()))
    history.returns.append(
        Return(
            back_to,
            error.progress.step,
            found.reason,
            first,
            count,
            rates={name: spec.rate_factor for name in engines if name in found.engines},
            rates_until=back_to + spec.rate_steps,
        )
    )
    history.write(plan.run_dir, ranks)
    remove_left_checkpoints(plan.run_dir, history, ranks, say)
    if times >= spec.times:
        run = short_path(plan.run_dir)
        way_out = (
            f"the run is back at step {back_to}; start another one from it with --start {run}, a "
            "new --output-dir"
            if back_to
            else "start again with --reset"
        )
        raise RunError(f"{report}; {way_out} and a smaller ds.optimizer.params.lr; {look}")
    say(f"{report}; going back to step {back_to} ({times + 1} of at most {spec.times} times)")


def _times(before: int, step: int) -> str:
    return f" {before + 1} times from step {step}" if before else ""


def _show_command(plan: TrainPlan, samples: Sequence[int]) -> str:
    """Return the command that shows these samples, or the first ones if there are many."""
    words = ["python", "tools/show_batch.py", "--run", short_path(plan.run_dir)]
    for folder in plan.dataset.folders:
        words += ["--dataset-dir", short_path(folder.root)]
    for folder in plan.dataset.folders:
        words += ["--lr-dir", short_path(folder.lr_root)] if folder.lr_root else []
    if isinstance(samples, range):
        words += ["--first", str(samples.start), "--count", str(min(MOST_SHOWN, len(samples)))]
    else:
        words += [word for sample in samples for word in ("--sample", str(sample))]
    return shlex.join(words)


def finish_return(run: Any, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Complete the last return of `run`, which now has its weights of that step.

    If a single sample of the window is guilty, only that one is passed over: its loss under the
    healthy weights stands out. Returns the entry as values for the log; None if the run did not
    just return after a divergence. All ranks call it together.
    """
    history, ranks, plan = run.history, run.ranks, run.plan
    if run.progress.returns == len(history.returns):
        return None
    run.progress.returns = len(history.returns)
    entry = history.returns[-1]
    if not entry.reason or entry.back_to != run.progress.step:
        return None
    batch = plan.ds_config["train_batch_size"]
    before = History(history.returns[:-1])
    samples: Sequence[int] = before.samples(entry.first, entry.count, batch)
    is_first_try = before.in_a_row(entry.back_to) == 0
    if is_first_try and 0 < entry.count <= LONGEST_SEARCH:
        say(f"looking for a bad sample among {samples[0]} to {samples[-1]}")
        guilty = _guilty(_losses(run, before, entry))
        if guilty:
            entry = replace(entry, count=0, excluded=guilty)
            history.returns[-1] = entry
            history.write(plan.run_dir, ranks)
    samples = entry.excluded or samples
    rates = ", ".join(
        f"{name} x {history.rate_factor(name, entry.back_to):g}" for name in sorted(entry.rates)
    )
    what = (
        f"leaving out {counted(len(samples), 'sample')}"
        if entry.excluded
        else f"skipping samples {samples[0]} to {samples[-1]}"
    )
    command = _show_command(plan, samples)
    say(
        f"continuing from step {entry.back_to}, {what}; learning rate {rates} until step "
        f"{entry.rates_until}; to see these samples: {command}"
    )
    return {
        "back_to": entry.back_to,
        "found_at": entry.found_at,
        "reason": entry.reason,
        "first_sample": samples[0],
        "last_sample": samples[-1],
        "excluded": entry.excluded,
        "rates_until": entry.rates_until,
        **{f"rate_{name}": factor for name, factor in entry.rates.items()},
        "command": command,
    }


def _losses(run: Any, before: History, entry: Return) -> dict[int, float]:
    """Return the loss of each sample of the window by itself, under the averaged weights."""
    import torch

    loader = run.open_loader(entry.first, before)
    own: dict[int, float] = {}
    try:
        for _ in range(entry.count * run.accumulation):
            batch = next(loader)
            first = loader.source.first_sample(batch.index)
            for i in range(len(batch.hr)):
                with torch.no_grad():
                    losses = run.trainer.criterion(
                        run.averaged(batch.lr[i : i + 1]), batch.hr[i : i + 1]
                    )
                own[first + i] = float(torch.stack(list(losses.values())).sum())
    finally:
        loader.close()
    return {sample: loss for share in run.ranks.gather(own) for sample, loss in share.items()}


def _guilty(losses: Mapping[int, float]) -> list[int]:
    """Return the samples whose loss stands out; none if too many do."""
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    if len(finite) < 8:
        return []
    median = statistics.median(finite)
    deviation = statistics.median(abs(loss - median) for loss in finite)
    limit = max(GUILTY_FACTOR * median, median + GUILTY_DEVIATIONS * deviation)
    guilty = sorted(sample for sample, loss in losses.items() if not loss <= limit)
    return guilty if len(guilty) <= max(1, MOST_GUILTY * len(losses)) else []
