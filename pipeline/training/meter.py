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

# updates in a row with a loss that is not finite, on some rank, after which a run has diverged
BAD_LOSS_LIMIT = 10
SKIPPED_LIMIT = (
    50  # updates in a row that were skipped: more than FP16 ever needs to find its loss scale
)


@dataclass(frozen=True)
class Reading:
    """What happened since the reading before, the same on every rank but for the last field."""

    losses: dict[
        str, float
    ]  # the generator's, weighted; mean over batches and ranks; none where it did not learn
    statistics: dict[str, float]  # likewise
    images_per_second: float  # HR crops, all ranks
    data_wait: float  # share of the time that this rank waited for the loader
    data_wait_worst: float  # the greatest such share of one step
    remaining_seconds: float
    skipped_run: int  # updates in a row, up to now
    bad_loss_run: int
    bad_batch: int  # this rank's last micro-batch with a loss that was not finite

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


class Meter:
    """Adds up on the device; only `read` looks."""

    def __init__(self, ranks: Ranks, total_steps: int, global_batch: int) -> None:
        self._ranks, self._total_steps, self._global_batch = ranks, total_steps, global_batch
        self._sums: dict[tuple[str, str], Tensor] = {}  # by kind and name
        self._counts: Counter[tuple[str, str]] = Counter()
        # Updates in a row that were skipped; in which the loss was not finite; the last micro-batch
        # where it was not.
        self._trouble = torch.zeros(3, dtype=torch.int64, device=ranks.device)
        self._bad_loss = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._began: float | None = None

    def add(self, outcome: StepResult, index: int) -> None:
        """Count one micro-batch."""
        values = {("loss", name): loss for name, loss in outcome.losses.items()}
        values |= {("statistic", name): value for name, value in outcome.statistics.items()}
        for key, value in values.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()
            self._counts[key] += 1
        bad = ~torch.isfinite(torch.stack(list(values.values())).sum())
        self._bad_loss = torch.maximum(self._bad_loss, bad.long())
        self._trouble[2] = torch.where(bad, index, self._trouble[2])

    def end_step(self, step: int, skipped: Tensor | bool, loader: Loader) -> None:
        """Count an update. The clock starts with the first one, which compiles."""
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
        """Time in here is not training time."""
        began = time.perf_counter()
        yield
        if self._began is not None:
            self._began += time.perf_counter() - began
            self._step_began += time.perf_counter() - began

    def read(self, step: int, loader: Loader) -> Reading:
        """Means since the last reading; every rank calls it. Waits for the device."""
        assert self._began is not None
        sums = torch.stack(list(self._sums.values())).double().cpu()
        means = (sums / torch.tensor([self._counts[key] for key in self._sums])).tolist()
        shares = self._ranks.gather((means, *self._trouble.tolist()))
        of: dict[str, dict[str, float]] = {"loss": {}, "statistic": {}}
        for i, (kind, name) in enumerate(self._sums):
            of[kind][name] = sum(share[0][i] for share in shares) / len(shares)
        now = time.perf_counter()
        elapsed, steps = max(now - self._began, 1e-9), step - self._step
        rate = (
            steps / elapsed if steps else float("nan")
        )  # the very first step of a process is not timed
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


# Files that training passed over because they are bad: counted over all ranks, named once.


NUM_NAMED = 20  # bad files named in a report


class SkippedFiles:
    """What all ranks have passed over in this process, the same on every rank."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        """Path -> why it cannot be trained on."""

    def add(self, skips: Iterable[Skip]) -> tuple[dict[str, int], str]:
        """Count what all ranks have skipped since the last time: numbers for the log, and a line
        for people."""
        skips = list(skips)
        new = {skip.path: skip.reason for skip in skips if skip.path not in self.reasons}
        self.reasons |= new
        samples = len({skip.sample for skip in skips})  # what stands in may have been bad, too
        named = "".join(f"\n  {path}: {reason}" for path, reason in list(new.items())[:NUM_NAMED])
        return (
            {"samples": samples, "bad_files": len(self.reasons)},
            f"samples replaced since the last report, for files that are bad: {samples}; such "
            "files so far: "
            f"{len(self.reasons)}{named}",
        )
