"""Losses and speed over a log interval, collected without waiting for the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.data.loader import Loader
from pipeline.engine import Ranks
from pipeline.monitor import duration

NONFINITE_LIMIT = 10  # micro-batches in a row on one rank after which a run counts as diverged


@dataclass(frozen=True)
class Reading:
    """What happened since the reading before."""

    losses: dict[str, float]  # weighted; mean over batches and ranks
    images_per_second: float  # HR crops, all ranks
    data_wait: float  # share of the time that this rank waited for the loader
    remaining_seconds: float
    nonfinite_run: int
    nonfinite_batch: int | None  # this rank's micro-batch that ended a run of NONFINITE_LIMIT; None: all is well

    def as_dict(self) -> dict[str, Any]:
        return {"loss": sum(self.losses.values()), **{f"loss_{name}": value for name, value in self.losses.items()},
                "images_per_second": round(self.images_per_second, 2), "data_wait": round(self.data_wait, 4),
                "remaining_seconds": round(self.remaining_seconds, 1)}

    def text(self) -> str:
        return (f"loss {sum(self.losses.values()):.5f}  {self.images_per_second:.1f} images/s  "
                f"data wait {self.data_wait:.0%}  ETA {duration(self.remaining_seconds)}")


class Meter:
    """Adds up on the device; only `read` looks."""

    def __init__(self, ranks: Ranks, log_every: int, total_steps: int, global_batch: int) -> None:
        self._ranks, self._total_steps, self._global_batch = ranks, total_steps, global_batch
        self._log_every = log_every
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._nonfinite = torch.zeros(2, dtype=torch.int64, device=ranks.device)  # run length, last micro-batch
        self._began, self._waited, self._step = time.perf_counter(), 0.0, None

    def add(self, losses: Mapping[str, Tensor], index: int) -> None:
        """Count one micro-batch's losses (scalars on the device)."""
        for name, loss in losses.items():
            self._sums[name] = self._sums[name] + loss if name in self._sums else loss.clone()
        self._count += 1
        total = torch.stack(list(losses.values())).sum()
        bad = (~torch.isfinite(total)).long()
        self._nonfinite[0] = (self._nonfinite[0] + 1) * bad
        self._nonfinite[1] = torch.where(bad.bool(), index, self._nonfinite[1])

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training time."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def read(self, step: int, loader: Loader) -> Reading:
        """Means since the last reading; every rank calls it. Waits for the device."""
        means = torch.stack(list(self._sums.values())).double().cpu() / self._count
        run, batch = self._nonfinite.tolist()
        shares = self._ranks.gather(means.tolist())
        names = list(self._sums)
        losses = {name: sum(share[i] for share in shares) / len(shares) for i, name in enumerate(names)}
        now = time.perf_counter()
        elapsed = max(now - self._began, 1e-9)
        steps = step - self._step if self._step is not None else step % self._log_every or self._log_every
        waited = loader.waited_seconds - self._waited
        reading = Reading(losses, steps * self._global_batch / elapsed, min(1.0, waited / elapsed),
                          elapsed / steps * (self._total_steps - step), run, batch if run >= NONFINITE_LIMIT else None)
        self._sums, self._count = {}, 0
        self._began, self._waited, self._step = now, loader.waited_seconds, step
        return reading
