"""Learning rate schedules by torch's names, beside DeepSpeed's own, each behind a warm-up if the ds_config wants it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import lr_scheduler

from pipeline.cli import UserError, nearest

DEEPSPEEDS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")
"""Built by DeepSpeed itself."""
SCHEDULES: dict[str, type[Any]] = {
    "MultiStepLR": lr_scheduler.MultiStepLR, "StepLR": lr_scheduler.StepLR,
    "ExponentialLR": lr_scheduler.ExponentialLR, "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": lr_scheduler.CosineAnnealingLR,
    "CosineAnnealingWarmRestarts": lr_scheduler.CosineAnnealingWarmRestarts,
    "CyclicLR": lr_scheduler.CyclicLR, "ConstantLR": lr_scheduler.ConstantLR,
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "CyclicLR": {"cycle_momentum": False},  # of Adam it would cycle beta 1
    "ReduceLROnPlateau": {"mode": "max"},  # what is watched is PSNR, and `patience` counts validations
    "ConstantLR": {"factor": 1.0},
}
AUTO = ("total_num_steps", "T_max", "total_iters")
"""Parameters that may be "auto": the steps of the run."""
WARMUP = {"warmup_num_steps": 0, "warmup_min_ratio": 0.0}


class Schedule:
    """One of torch's schedules, stepped once an update, behind a linear warm-up.

    In update number k (0, 1, …) of the warm-up the rate is `min_ratio` + (1 - `min_ratio`) (k + 1) / `steps` times what
    the schedule says; the schedule itself counts from the first update on.
    """

    def __init__(self, inner: Any, steps: int, min_ratio: float) -> None:
        self.inner, self.steps, self.min_ratio = inner, steps, min_ratio
        self.count = 0
        self._rates: list[float] = [group["lr"] for group in inner.optimizer.param_groups]  # without the warm-up
        self._apply()

    def step(self) -> None:
        """After an update: set the rate of the next one."""
        self._restore()
        if not isinstance(self.inner, lr_scheduler.ReduceLROnPlateau):
            self.inner.step()
        self.count += 1
        self._rates = [group["lr"] for group in self.inner.optimizer.param_groups]
        self._apply()

    def observe(self, psnr: float) -> None:
        """Tell a validation's result to the schedule that wants to know it."""
        if isinstance(self.inner, lr_scheduler.ReduceLROnPlateau):
            self._restore()
            self.inner.step(psnr)
            self._rates = [group["lr"] for group in self.inner.optimizer.param_groups]
            self._apply()

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.inner.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Plain values alone, which safe loading accepts; what is left out follows from the ds_config."""
        inner = {name: value for name, value in self.inner.state_dict().items()
                 if value is None or isinstance(value, (int, float, str, list))}
        return {"count": self.count, "rates": self._rates, "inner": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self._rates = state["count"], list(state["rates"])
        self.inner.load_state_dict(dict(state["inner"]))
        self._restore()
        self._apply()

    def _restore(self) -> None:
        for group, rate in zip(self.inner.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def _apply(self) -> None:
        if self.count < self.steps:
            factor = self.min_ratio + (1 - self.min_ratio) * (self.count + 1) / self.steps
            for group in self.inner.optimizer.param_groups:
                group["lr"] *= factor


def build_schedule(section: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Schedule:
    """The schedule of a ds_config's `scheduler` section whose type is one of `SCHEDULES`."""
    name, params = section["type"], {**DEFAULTS.get(section["type"], {}), **section.get("params", {})}
    known = [*list(inspect.signature(SCHEDULES[name]).parameters)[1:], *WARMUP]
    for key in params:
        if key not in known:
            raise UserError(f"ds_config: schedule {name} has no parameter {key!r}{nearest(key, known)}")
    warmup = {key: params.pop(key, default) for key, default in WARMUP.items()}
    try:
        return Schedule(SCHEDULES[name](optimizer, **params), int(warmup["warmup_num_steps"]),
                        float(warmup["warmup_min_ratio"]))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"ds_config: schedule {name}: {error}") from error


def check_schedule(section: Mapping[str, Any]) -> None:
    """Raise `UserError` for a type that neither torch nor DeepSpeed has."""
    name, known = section["type"], [*SCHEDULES, *DEEPSPEEDS]
    if name not in known:
        raise UserError(f"ds_config: no schedule {name!r}{nearest(name, known)}")
