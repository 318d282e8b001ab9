"""Losses and speed over a log interval, collected without waiting for the device."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.data.loader import Loader
from pipeline.data.source import Skip
from pipeline.distributed.ranks import Ranks
from pipeline.monitor.journal import duration
from pipeline.training.trainers import StepResult

# Consecutive updates with a non-finite loss on some rank after which a run has diverged.
BAD_LOSS_LIMIT = 10
# Consecutive skipped updates, likewise: more than FP16 ever needs to find its loss scale.
SKIPPED_LIMIT = 50


@dataclass(frozen=True)
class Reading:
    """Measurements since the previous reading.

    All but `data_wait`, `data_wait_worst` and `bad_batch` are equal on all ranks.
    """

    # The generator's terms, weighted; means over batches and ranks. Empty if it did not learn.
    losses: dict[str, float]
    statistics: dict[str, float]  # likewise
    images_per_second: float  # HR crops, all ranks; NaN before the second step of a process
    data_wait: float  # share of this rank's time spent waiting for the loader, 0 to 1
    data_wait_worst: float  # the largest such share of a single step
    remaining_seconds: float
    skipped_run: int  # consecutive skipped updates, up to now
    bad_loss_run: int  # consecutive updates with a non-finite loss, up to now
    bad_batch: int  # index of this rank's last micro-batch with a non-finite loss

    @property
    def has_diverged(self) -> bool:
        return self.bad_loss_run >= BAD_LOSS_LIMIT or self.skipped_run >= SKIPPED_LIMIT

    def as_dict(self) -> dict[str, Any]:
        whole = {"loss": sum(self.losses.values())} if self.losses else {}
        return {
            **whole,
            **{f"loss_{name}": value for name, value in self.losses.items()},
            **self.statistics,
            "images_per_second": round(self.images_per_second, 2),
            "data_wait": round(self.data_wait, 4),
            "data_wait_worst": round(self.data_wait_worst, 4),
            "remaining_seconds": round(self.remaining_seconds, 1),
        }

    def text(self) -> str:
        speed = (
            ""
            if math.isnan(self.images_per_second)
            else (
                f"  {self.images_per_second:.1f} images/s  data wait {self.data_wait:.0%}  "
                f"ETA {duration(self.remaining_seconds)}"
            )
        )
        loss = f"{sum(self.losses.values()):.5f}" if self.losses else "-"
        return f"loss {loss}{speed}"


class TrainMeter:
    """Sums losses and counts trouble on the device; only `read` synchronises with it."""

    def __init__(self, ranks: Ranks, total_steps: int, global_batch: int) -> None:
        self._ranks, self._total_steps, self._global_batch = ranks, total_steps, global_batch
        self._sums: dict[tuple[str, str], Tensor] = {}  # by kind and name
        self._counts: Counter[tuple[str, str]] = Counter()
        # Consecutive skipped updates, consecutive updates with a non-finite loss, and the index of
        # the last micro-batch with such a loss.
        self._trouble = torch.zeros(3, dtype=torch.int64, device=ranks.device)
        self._bad_loss = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._began: float | None = None

    def add(self, result: StepResult, index: int) -> None:
        """Add the result of micro-batch `index`."""
        values = {("loss", name): loss for name, loss in result.losses.items()}
        values |= {("statistic", name): value for name, value in result.statistics.items()}
        for key, value in values.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()
            self._counts[key] += 1
        bad = ~torch.isfinite(torch.stack(list(values.values())).sum())
        self._bad_loss = torch.maximum(self._bad_loss, bad.long())
        self._trouble[2] = torch.where(bad, index, self._trouble[2])

    def end_step(self, step: int, skipped: Tensor | bool, loader: Loader) -> None:
        """Count an update. The clock starts after the first one, which includes compilation."""
        self._trouble[0] = (self._trouble[0] + 1) * skipped
        self._trouble[1] = (self._trouble[1] + 1) * self._bad_loss
        self._bad_loss = torch.zeros_like(self._bad_loss)
        now, waited = time.perf_counter(), loader.waited_seconds
        if self._began is None:
            self._began, self._waited, self._step, self._worst_wait = now, waited, step, 0.0
        else:
            share = (waited - self._waited_before) / max(now - self._step_began, 1e-9)
            self._worst_wait = max(self._worst_wait, min(1.0, share))
        self._step_began, self._waited_before = now, waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in this block from the measured training time."""
        began = time.perf_counter()
        yield
        if self._began is not None:
            self._began += time.perf_counter() - began
            self._step_began += time.perf_counter() - began

    def read(self, step: int, loader: Loader) -> Reading:
        """Return the measurements since the last reading.

        Waits for the device. All ranks call it together.
        """
        assert self._began is not None
        sums = torch.stack(list(self._sums.values())).double().cpu()
        means = (sums / torch.tensor([self._counts[key] for key in self._sums])).tolist()
        shares = self._ranks.gather((means, *self._trouble.tolist()))
        of: dict[str, dict[str, float]] = {"loss": {}, "statistic": {}}
        for i, (kind, name) in enumerate(self._sums):
            of[kind][name] = sum(share[0][i] for share in shares) / len(shares)
        now = time.perf_counter()
        elapsed, steps = max(now - self._began, 1e-9), step - self._step
        # The first step of a process is not timed.
        rate = steps / elapsed if steps else float("nan")
        reading = Reading(
            of["loss"],
            of["statistic"],
            rate * self._global_batch,
            min(1.0, (loader.waited_seconds - self._waited) / elapsed),
            self._worst_wait,
            (self._total_steps - step) / rate,
            max(share[1] for share in shares),
            max(share[2] for share in shares),
            self._trouble[2].item(),
        )
        self._sums, self._counts = {}, Counter()
        self._began, self._waited, self._step, self._worst_wait = (
            now,
            loader.waited_seconds,
            step,
            0.0,
        )
        return reading


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
