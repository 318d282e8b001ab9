"""Learning rate schedules: torch's, with an optional warm-up, and DeepSpeed's warm-ups.

DeepSpeed's warm-up schedules are implemented as formulas here, for both runtimes, with bit-equal
rates. Its OneCycle and LRRangeTest are left to DeepSpeed. `pipeline.config.ds_config.SCHEDULES`
lists all names.

A schedule counts the updates of its own network, not the steps of the run: if a network learns
every third step, `milestones`, `T_max`, `total_iters` and `warmup_num_steps` are a third of the
steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import lr_scheduler

from pipeline.cli import UserError
from pipeline.config.ds_config import LEFT_TO_DEEPSPEED, check_schedule

DEFAULTS: dict[str, dict[str, Any]] = {
    "CyclicLR": {"cycle_momentum": False},  # with Adam it would cycle beta1
    "ReduceLROnPlateau": {"mode": "max"},  # it watches PSNR, and `patience` counts validations
    "ConstantLR": {"factor": 1.0},
}
AUTO = ("total_num_steps", "T_max", "total_iters")
"""Parameters that may be "auto": the number of updates of the network in the whole run."""
WARMUP_DEFAULTS = {"warmup_num_steps": 0, "warmup_min_ratio": 0.0}
WHOLE = {
    "step_size": 1,
    "T_max": 1,
    "T_0": 1,
    "T_mult": 1,
    "total_iters": 1,
    "step_size_up": 1,
    "step_size_down": 0,
    "patience": 0,
    "cooldown": 0,
    "warmup_num_steps": 0,
}
"""Whole-number parameters -> smallest sensible value.

Parameters that are neither listed here nor in the three tuples below are plain numbers.
"""
WORDS, SWITCHES, LISTS = (
    ("mode", "threshold_mode"),
    ("cycle_momentum",),
    ("base_lr", "max_lr", "min_lr"),
)
PROGRESS = ("last_epoch", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter")
"""State of torch's schedules. Their other attributes follow from the ds_config."""


class Schedule:
    """One of torch's schedules, stepped once per update, behind a linear warm-up.

    In update k (0, 1, …) of the warm-up, the rate is `min_ratio` + (1 - `min_ratio`) (k + 1) /
    `steps` times the schedule's; the schedule itself counts from the first update on. If torch has
    a closed form, the rate depends only on k and the parameters, so after a change of length
    it equals the rate of a run started with the new length.

    `writes_as_deepspeed`: write the state in the form of DeepSpeed's own schedules. Both forms can
    be loaded.
    """

    def __init__(
        self, inner: Any, steps: int, min_ratio: float, *, writes_as_deepspeed: bool = False
    ) -> None:
        self.inner, self.steps, self.min_ratio = inner, steps, min_ratio
        self.count = 0
        self._writes_as_deepspeed = writes_as_deepspeed
        self._has_closed_form = hasattr(inner, "_get_closed_form_lr") or isinstance(
            inner, lr_scheduler.LambdaLR
        )
        # Rates without the warm-up.
        self._rates = self._closed_form() if self._has_closed_form else self.get_last_lr()
        self._apply()
        # An optimizer's state contains the rate it was saved with, and ZeRO loads it after the
        # schedule's state.
        inner.optimizer.register_load_state_dict_post_hook(lambda _: self._apply())

    def step(self) -> None:
        """Set the rate of the next update; called after each update."""
        self.count += 1
        if self._has_closed_form:
            self._rates = self._closed_form()
        elif not isinstance(self.inner, lr_scheduler.ReduceLROnPlateau):
            self.inner.step()
            self._rates = self.get_last_lr()
        self._apply()

    def observe(self, psnr: float) -> None:
        """Pass a validation's PSNR to ReduceLROnPlateau; other schedules ignore it."""
        if isinstance(self.inner, lr_scheduler.ReduceLROnPlateau):
            self._set(self._rates)
            self.inner.step(psnr)
            self._rates = self.get_last_lr()
            self._apply()

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.inner.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values only, which safe loading accepts.

        Everything else follows from the ds_config.
        """
        if self._writes_as_deepspeed:
            return {"last_batch_iteration": self.count - 1}
        inner = {name: getattr(self.inner, name) for name in PROGRESS if hasattr(self.inner, name)}
        return {"count": self.count, "rates": self._rates, "inner": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "last_batch_iteration" in state:
            self.count = state["last_batch_iteration"] + 1
        else:
            self.count, self._rates = state["count"], list(state["rates"])
            vars(self.inner).update(
                {name: state["inner"][name] for name in PROGRESS if name in state["inner"]}
            )
        if self._has_closed_form:
            self._rates = self._closed_form()
        self._apply()

    def _closed_form(self) -> list[float]:
        self.inner.last_epoch = self.count
        if isinstance(self.inner, lr_scheduler.LambdaLR):
            pairs = zip(self.inner.base_lrs, self.inner.lr_lambdas, strict=True)
            return [base * factor(self.count) for base, factor in pairs]
        return self.inner._get_closed_form_lr()

    def _apply(self) -> None:
        factor = 1.0
        if self.count < self.steps:
            factor = self.min_ratio + (1 - self.min_ratio) * (self.count + 1) / self.steps
        self._set([rate * factor for rate in self._rates])

    def _set(self, rates: list[float]) -> None:
        for group, rate in zip(self.inner.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def build_schedule(
    section: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    *,
    writes_as_deepspeed: bool = False,
) -> Schedule:
    """Build the schedule of a resolved ds_config's `scheduler` section.

    The section must not name one of `LEFT_TO_DEEPSPEED`. `writes_as_deepspeed`: write the state of
    DeepSpeed's warm-ups in DeepSpeed's form; see `Schedule`. Raises `UserError`.
    """
    validate_schedule(section)
    return _build(section, optimizer, writes_as_deepspeed)


def validate_schedule(section: Mapping[str, Any]) -> None:
    """Raise `UserError` for an invalid `scheduler` section, which may be resolved or not."""
    check_schedule(section)
    if section["type"] in LEFT_TO_DEEPSPEED:
        return
    params = {
        key: 10 if key in AUTO and value == "auto" else value
        for key, value in section.get("params", {}).items()
    }
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = _build({**section, "params": params}, optimizer)
    try:
        for _ in range(2):  # torch notices many invalid values only when it computes with them
            optimizer.step()
            schedule.observe(30.0)
            schedule.step()
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"ds_config: schedule {section['type']}: {error}") from error


def _build(
    section: Mapping[str, Any], optimizer: torch.optim.Optimizer, writes_as_deepspeed: bool = False
) -> Schedule:
    name, given = section["type"], section.get("params", {})
    if name in DEEPSPEED_WARMUPS:
        return Schedule(
            _deepspeed_warmup(name, given, optimizer),
            0,
            0.0,
            writes_as_deepspeed=writes_as_deepspeed,
        )
    params = {
        key: _checked(name, key, value)
        for key, value in {**DEFAULTS.get(name, {}), **given}.items()
    }
    warmup = {key: params.pop(key, default) for key, default in WARMUP_DEFAULTS.items()}
    try:
        inner = getattr(lr_scheduler, name)(optimizer, **params)
        return Schedule(inner, warmup["warmup_num_steps"], warmup["warmup_min_ratio"])
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"ds_config: schedule {name}: {error}") from error


def _checked(schedule: str, key: str, value: Any) -> Any:
    """Return `value` as torch needs it; whole numbers may be written as 1e5.

    Raises `UserError` for a value of another type.
    """
    is_good, rule = _rule(key)
    if not is_good(value):
        raise UserError(f"ds_config: schedule {schedule}: {key} must be {rule}, not {value!r}")
    if key == "milestones":
        return [int(one) for one in value]
    return int(value) if key in WHOLE else value


def _rule(key: str) -> tuple[Callable[[Any], bool], str]:
    """Return a parameter's check and a description of valid values."""
    if key in WHOLE:
        return lambda value: _is_whole(value, WHOLE[key]), f"a whole number, {WHOLE[key]} or above"
    if key == "milestones":
        return (
            lambda value: isinstance(value, list) and all(_is_whole(one, 1) for one in value),
            "a list of whole numbers, 1 or above",
        )
    if key in WORDS:
        return lambda value: isinstance(value, str), "a string"
    if key in SWITCHES:
        return lambda value: isinstance(value, bool), "true or false"
    return (
        lambda value: all(
            _is_number(one)
            for one in (value if key in LISTS and isinstance(value, list) else [value])
        ),
        "a number, 0 or above",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_whole(value: Any, least: int) -> bool:
    return _is_number(value) and value == int(value) and value >= least


# DeepSpeed's warm-up schedules as formulas. As in DeepSpeed, the first update uses the lowest rate:
# 0 for WarmupCosineLR, `warmup_min_lr` for the others.


_WARMUP = {"warmup_num_steps": 1000, "warmup_type": "log"}
_RATES = {"warmup_min_lr": 0.0, "warmup_max_lr": None}  # None: the optimizer's rate
DEEPSPEED_WARMUPS: dict[str, dict[str, Any]] = {
    "WarmupLR": {**_RATES, **_WARMUP},
    "WarmupDecayLR": {**_RATES, "warmup_max_lr": 0.001, "total_num_steps": None, **_WARMUP},
    "WarmupCosineLR": {
        "warmup_min_ratio": 0.0,
        "cos_min_ratio": 0.0001,
        "total_num_steps": None,
        **_WARMUP,
    },
}
"""Name -> parameters with DeepSpeed's defaults."""


def _deepspeed_warmup(
    name: str, given: Mapping[str, Any], optimizer: torch.optim.Optimizer
) -> lr_scheduler.LambdaLR:
    params = {**DEEPSPEED_WARMUPS[name], **given}
    _check(name, params)
    factors = []
    for group in optimizer.param_groups:
        if name == "WarmupCosineLR":
            factors.append(functools.partial(_cosine_factor, params))
        else:
            factors.append(functools.partial(_linear_rate, name, params, group["lr"]))
            # LambdaLR multiplies it with the factors, which are absolute rates here.
            group["initial_lr"] = 1.0
    schedule = lr_scheduler.LambdaLR(optimizer, factors)
    for group in optimizer.param_groups:
        del group["initial_lr"]  # otherwise the optimizer would write it into every checkpoint
    return schedule


def _linear_rate(name: str, params: Mapping[str, Any], base: float, count: int) -> float:
    """Return the rate after `count` updates.

    After the warm-up, WarmupLR stays at the top and WarmupDecayLR falls linearly to 0.
    """
    least, most, length = params["warmup_min_lr"], params["warmup_max_lr"], _length(params)
    step, top = count - 1, base if most is None else most
    if step < 0:
        return least
    share = 1.0
    if step < length:
        share = _warmth(step, params)
    elif name == "WarmupDecayLR":
        total = params["total_num_steps"]
        share = max(0.0, (total - step) / max(1.0, total - length))
    return least + (top - least) * share


def _cosine_factor(params: Mapping[str, Any], count: int) -> float:
    """Return the rate after `count` updates, as a fraction of the optimizer's."""
    least, floor, length = params["warmup_min_ratio"], params["cos_min_ratio"], _length(params)
    decay, step = max(1, params["total_num_steps"] - length), count - 1
    if step < 0:
        return 0.0
    if step < length:
        return least + (1 - least) * _warmth(step, params)
    wave = (1 + math.cos(math.pi * min(1.0, (step + 1 - length) / decay))) / 2
    return max(0.0, floor + (1 - floor) * wave)


def _length(params: Mapping[str, Any]) -> int:
    return max(2, params["warmup_num_steps"])


def _warmth(step: int, params: Mapping[str, Any]) -> float:
    """Return how much of the warm-up is complete at its step 0, 1, …, from 0 to 1."""
    if params["warmup_type"] == "linear":
        return step / _length(params)
    return 1.0 / math.log(_length(params)) * math.log(step + 1)


def _check(name: str, params: Mapping[str, Any]) -> None:
    for key, value in params.items():
        if key == "warmup_type":
            if value not in ("log", "linear"):
                raise UserError(
                    f"ds_config: schedule {name}: warmup_type must be log or linear, not {value!r}"
                )
        elif key.endswith("_num_steps"):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(
                    f"ds_config: schedule {name}: {key} must be a whole number, 1 or above, not "
                    f"{value!r}"
                )
        elif value is not None and (
            not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0
        ):
            raise UserError(
                f"ds_config: schedule {name}: {key} must be a number, 0 or above, not {value!r}"
            )
