"""Losses and speed over a log interval, collected without waiting for the device."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.loader import Loader
from pipeline.data.source import Skip
from pipeline.distributed.ranks import Ranks
from pipeline.monitor.journal import duration
from pipeline.training.health import StepFacts
from pipeline.training.trainers import StepResult

MOST_PENDING = 500  # updates whose values may wait on the device to be read
NEW_PACE = 0.3  # weight of the newest reading in the average from which the remaining time follows
MOST_WAIT = 0.1  # share of time spent waiting for data above which the cause is named
# Share of the time in which the loader's threads must have degraded for that to be the cause; else
# they waited for files or decoded.
LEAST_DEGRADING = 0.3
NUM_STEPS = 5  # kinds of degradation steps in a log entry, those that take longest


@dataclass(frozen=True)
class Reading:
    """Measurements since the previous reading.

    All but those about data are equal on all ranks.
    """

    # The generator's terms, weighted; means over batches and ranks. Empty if it did not learn.
    losses: dict[str, float]
    statistics: dict[str, float]  # likewise
    images_per_second: float  # HR crops, all ranks; NaN before the second step of a process
    data_wait: float  # share of this rank's time spent waiting for the loader, 0 to 1
    data_wait_worst: float  # the largest such share of a single step
    remaining_seconds: float  # at the average pace of this process, newer steps counting more
    # Share of the time in which this rank's loader threads degraded on the host, 0 to 1.
    degrading: float = 0.0
    # Kind of degradation step -> its share of that time; the longest first.
    degradation_steps: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        whole = {"loss": sum(self.losses.values())} if self.losses else {}
        steps = {
            name: round(share, 4) for name, share in [*self.degradation_steps.items()][:NUM_STEPS]
        }
        return {
            **whole,
            **{f"loss_{name}": value for name, value in self.losses.items()},
            **self.statistics,
            "images_per_second": round(self.images_per_second, 2),
            "data_wait": round(self.data_wait, 4),
            "data_wait_worst": round(self.data_wait_worst, 4),
            **(
                {"degrading": round(self.degrading, 4), "degradation_steps": steps} if steps else {}
            ),
            "remaining_seconds": round(self.remaining_seconds, 1),
        }

    @property
    def slowest_step(self) -> str:
        """Which degradation step training waits for, such as `compress(hevc) takes 60%`.

        Empty if it waits little, or for something else.
        """
        if self.data_wait <= MOST_WAIT or self.degrading < LEAST_DEGRADING:
            return ""
        name, share = next(iter(self.degradation_steps.items()))
        return f"{name} takes {share:.0%}"

    def text(self) -> str:
        speed = (
            ""
            if math.isnan(self.images_per_second)
            else (
                f"  ETA {duration(self.remaining_seconds)}  {self.images_per_second:.1f} images/s"
                f"  data wait {self.data_wait:.0%}"
            )
        )
        loss = f"{sum(self.losses.values()):.5f}" if self.losses else "-"
        return f"loss {loss}{speed}"

    def turns_text(self) -> str:
        skipped = self.statistics.get("d_turns_skipped", 0.0)
        return f"  D skips {skipped:.0%} of its turns" if skipped else ""

    def waiting_text(self) -> str:
        return f"  waiting for data: {self.slowest_step}" if self.slowest_step else ""


class _Pending(NamedTuple):
    """An update whose values are still on the device."""

    step: int
    keys: tuple[tuple[str, str], ...]  # kind (loss or statistic) and name of each value
    values: Tensor  # means over this rank's micro-batches
    was_skipped: Tensor | bool
    norms: dict[str, Tensor | float]


class TrainMeter:
    """Collects what every update shows on the device; only `drain` and `read` wait for it."""

    def __init__(self, ranks: Ranks, total_steps: int, global_batch: int) -> None:
        self._ranks, self._total_steps, self._global_batch = ranks, total_steps, global_batch
        # Of the update in progress: keys -> sum over micro-batches, and their number.
        self._sums: dict[tuple[tuple[str, str], ...], tuple[Tensor, int]] = {}
        self._pending: list[_Pending] = []
        self._facts: list[StepFacts] = []  # since the last reading
        self._began: float | None = None
        self._pace = float("nan")  # seconds of a step, averaged over readings

    def add(self, result: StepResult) -> None:
        """Add the result of a micro-batch."""
        values = {("loss", name): loss for name, loss in result.losses.items()}
        values |= {("statistic", name): value for name, value in result.statistics.items()}
        keys, vector = tuple(values), torch.stack(list(values.values()))
        known = self._sums.get(keys)
        self._sums[keys] = (vector, 1) if known is None else (known[0] + vector, known[1] + 1)

    def end_step(
        self,
        step: int,
        skipped: Tensor | bool,
        norms: Mapping[str, Tensor | float],
        loader: Loader,
    ) -> None:
        """Record an update. The clock starts after the first one, which includes compilation.

        `norms`: of the gradients of the engines that learned, by engine.
        """
        ((keys, (total, count)),) = self._sums.items()  # an update's micro-batches are alike
        self._sums = {}
        # A copy of the flag, because the engine overwrites its own in the next update.
        skipped = skipped.float() if isinstance(skipped, Tensor) else skipped
        self._pending.append(
            _Pending(step, keys, total / count if count > 1 else total, skipped, dict(norms))
        )
        now, waited = time.perf_counter(), loader.waited_seconds
        if self._began is None:
            self._began, self._waited, self._step, self._worst_wait = now, waited, step, 0.0
            self._degraded = loader.step_seconds
        else:
            share = (waited - self._waited_before) / max(now - self._step_began, 1e-9)
            self._worst_wait = max(self._worst_wait, min(1.0, share))
        self._step_began, self._waited_before = now, waited

    @property
    def is_full(self) -> bool:
        """Whether enough updates wait on the device that `drain` should be called."""
        return len(self._pending) >= MOST_PENDING

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in this block from the measured training time."""
        began = time.perf_counter()
        yield
        if self._began is not None:
            self._began += time.perf_counter() - began
            self._step_began += time.perf_counter() - began

    def drain(self) -> list[StepFacts]:
        """Return the updates recorded since the last call.

        Waits for the device, once. All ranks call it together.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return []
        values = [
            value.detach().reshape(-1).float() if isinstance(value, Tensor) else [float(value)]
            for update in pending
            for value in (update.values, update.was_skipped, *update.norms.values())
        ]
        # All that is on the device in one vector, so that it is asked once.
        there = torch.cat([value for value in values if isinstance(value, Tensor)]).cpu()
        sizes = [len(value) for value in values if isinstance(value, Tensor)]
        read = iter(there.double().split(sizes))
        own = [next(read).numpy() if isinstance(value, Tensor) else value for value in values]
        shares = self._ranks.gather(np.concatenate(own))
        means = (sum(shares) / len(shares)).tolist()
        facts, start = [], 0
        for update in pending:
            of: dict[str, dict[str, float]] = {"loss": {}, "statistic": {}}
            for (kind, name), mean in zip(update.keys, means[start:], strict=False):
                of[kind][name] = mean
            start += len(update.keys)
            was_skipped, *norms = means[start : start + 1 + len(update.norms)]
            start += 1 + len(update.norms)
            facts.append(
                StepFacts(
                    update.step,
                    of["loss"],
                    of["statistic"],
                    bool(was_skipped),
                    dict(zip(update.norms, norms, strict=True)),
                )
            )
        self._facts += facts
        return facts

    def read(self, step: int, loader: Loader) -> Reading:
        """Return the measurements since the last reading, of the updates that `drain` returned."""
        assert self._began is not None
        assert not self._pending, "drain() must be called before"
        losses, statistics = (
            _means(getattr(facts, kind) for facts in self._facts)
            for kind in ("losses", "statistics")
        )
        now = time.perf_counter()
        elapsed, steps = max(now - self._began, 1e-9), step - self._step
        # The first step of a process is not timed.
        rate = steps / elapsed if steps else float("nan")
        if steps:
            pace = 1 / rate if math.isnan(self._pace) else self._pace
            self._pace = pace + NEW_PACE * (1 / rate - pace)
        degraded = _new_seconds(self._degraded, loader.step_seconds)
        degrading = sum(degraded.values())
        reading = Reading(
            losses,
            statistics,
            rate * self._global_batch,
            min(1.0, (loader.waited_seconds - self._waited) / elapsed),
            self._worst_wait,
            (self._total_steps - step) * self._pace,
            min(1.0, degrading / (elapsed * loader.num_workers)),
            {name: seconds / degrading for name, seconds in degraded.items()},
        )
        self._facts = []
        self._began, self._waited, self._step, self._worst_wait = (
            now,
            loader.waited_seconds,
            step,
            0.0,
        )
        self._degraded = loader.step_seconds
        return reading


def _new_seconds(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each kind of step since `before`, the longest first; none are 0.

    The clocks start at 0 again where the loader starts a new pipeline.
    """
    new = {
        name: seconds - (before.get(name, 0.0) if seconds >= before.get(name, 0.0) else 0.0)
        for name, seconds in now.items()
    }
    longest = sorted(new.items(), key=lambda step: -step[1])
    return {name: seconds for name, seconds in longest if seconds > 0}


def _means(tables: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each key over the tables that have it."""
    found: dict[str, list[float]] = {}
    for table in tables:
        for name, value in table.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


# Bad files that training skipped: counted over all ranks, each named once.


NUM_NAMED = 20  # bad files named in a report


class SkippedFiles:
    """The bad files that any rank skipped in this process; the same on every rank."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        """Path -> why it cannot be trained on."""

    def add(self, skips: Iterable[Skip]) -> tuple[dict[str, int], str]:
        """Add what all ranks skipped since the last report.

        Returns values for the log and a line (or several) for the console.
        """
        skips = list(skips)
        new = {skip.path: skip.reason for skip in skips if skip.path not in self.reasons}
        self.reasons |= new
        samples = len({skip.sample for skip in skips})  # a substitute may have been bad as well
        named = "".join(f"\n  {path}: {reason}" for path, reason in list(new.items())[:NUM_NAMED])
        return (
            {"samples": samples, "bad_files": len(self.reasons)},
            f"replaced samples whose files are bad: {samples} (bad files so far: "
            f"{len(self.reasons)}){named}",
        )
