"""Learning rate schedules by torch's names, beside DeepSpeed's own, each behind a warm-up if the ds_config wants it.

A schedule counts the updates of its own network, not the steps of the run: where a network learns at every third step
only, `milestones`, `T_max`, `total_iters` and `warmup_num_steps` are thirds of the steps.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
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
"""Parameters that may be "auto": the updates of the network in the whole run."""
WARMUP = {"warmup_num_steps": 0, "warmup_min_ratio": 0.0}
WHOLE = {"step_size": 1, "T_max": 1, "T_0": 1, "T_mult": 1, "total_iters": 1, "step_size_up": 1, "step_size_down": 0,
         "patience": 0, "cooldown": 0, "warmup_num_steps": 0}
"""Parameters that are whole numbers -> the least that makes sense. All but these and the next are numbers."""
WORDS, SWITCHES, LISTS = ("mode", "threshold_mode"), ("cycle_momentum",), ("base_lr", "max_lr", "min_lr")
NOT_OURS = ("last_epoch", "scale_fn", "scale_mode")
"""Parameters of torch's classes that no ds_config can give."""
PROGRESS = ("last_epoch", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter")
"""Where one of torch's schedules stands. Its other attributes follow from the ds_config."""


class Schedule:
    """One of torch's schedules, stepped once an update, behind a linear warm-up.

    In update number k (0, 1, …) of the warm-up the rate is `min_ratio` + (1 - `min_ratio`) (k + 1) / `steps` times what
    the schedule says; the schedule itself counts from the first update on. Where torch knows a closed form, the rate
    is a function of k and the parameters alone: after a change of length it is that of a run begun with the new one.
    """

    def __init__(self, inner: Any, steps: int, min_ratio: float) -> None:
        self.inner, self.steps, self.min_ratio = inner, steps, min_ratio
        self.count = 0
        self._has_closed_form = hasattr(inner, "_get_closed_form_lr")
        self._rates = self._closed_form() if self._has_closed_form else self.get_last_lr()  # without the warm-up
        self._apply()
        # An optimizer's state brings the rate it was saved with, and ZeRO's is loaded after the schedule's.
        inner.optimizer.register_load_state_dict_post_hook(lambda _: self._apply())

    def step(self) -> None:
        """After an update: set the rate of the next one."""
        self.count += 1
        if self._has_closed_form:
            self._rates = self._closed_form()
        elif not isinstance(self.inner, lr_scheduler.ReduceLROnPlateau):
            self.inner.step()
            self._rates = self.get_last_lr()
        self._apply()

    def observe(self, psnr: float) -> None:
        """Tell a validation's result to the schedule that wants to know it."""
        if isinstance(self.inner, lr_scheduler.ReduceLROnPlateau):
            self._set(self._rates)
            self.inner.step(psnr)
            self._rates = self.get_last_lr()
            self._apply()

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.inner.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Plain values alone, which safe loading accepts; what is left out follows from the ds_config."""
        inner = {name: getattr(self.inner, name) for name in PROGRESS if hasattr(self.inner, name)}
        return {"count": self.count, "rates": self._rates, "inner": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self._rates = state["count"], list(state["rates"])
        vars(self.inner).update({name: state["inner"][name] for name in PROGRESS if name in state["inner"]})
        if self._has_closed_form:
            self._rates = self._closed_form()
        self._apply()

    def _closed_form(self) -> list[float]:
        self.inner.last_epoch = self.count
        return self.inner._get_closed_form_lr()

    def _apply(self) -> None:
        factor = 1.0
        if self.count < self.steps:
            factor = self.min_ratio + (1 - self.min_ratio) * (self.count + 1) / self.steps
        self._set([rate * factor for rate in self._rates])

    def _set(self, rates: list[float]) -> None:
        for group, rate in zip(self.inner.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def build_schedule(section: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Schedule:
    """The schedule of a resolved ds_config's `scheduler` section whose type is one of `SCHEDULES`."""
    validate_schedule(section)
    return _build(section, optimizer)


def validate_schedule(section: Mapping[str, Any]) -> None:
    """Raise `UserError` for a `scheduler` section, resolved or not, that names no schedule, or a torch's wrongly.

    The parameters of DeepSpeed's schedules are left to DeepSpeed.
    """
    check_schedule(section)
    if section["type"] not in SCHEDULES:
        return
    params = {key: 10 if key in AUTO and value == "auto" else value for key, value in section.get("params", {}).items()}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = _build({**section, "params": params}, optimizer)
    try:
        for _ in range(2):  # much of what torch cannot use it notices only when it counts with it
            optimizer.step()
            schedule.observe(30.0)
            schedule.step()
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"ds_config: schedule {section['type']}: {error}") from error


def _build(section: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Schedule:
    name = section["type"]
    known = [*(key for key in list(inspect.signature(SCHEDULES[name]).parameters)[1:] if key not in NOT_OURS), *WARMUP]
    for key in section.get("params", {}):
        if key not in known:
            raise UserError(f"ds_config: schedule {name} has no parameter {key!r}{nearest(key, known)}")
    params = {key: _checked(name, key, value)
              for key, value in {**DEFAULTS.get(name, {}), **section.get("params", {})}.items()}
    warmup = {key: params.pop(key, default) for key, default in WARMUP.items()}
    try:
        return Schedule(SCHEDULES[name](optimizer, **params), warmup["warmup_num_steps"], warmup["warmup_min_ratio"])
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"ds_config: schedule {name}: {error}") from error


def _checked(schedule: str, key: str, value: Any) -> Any:
    """`value` as torch wants it; whole numbers may be written 1e5. `UserError` for one of another kind."""
    is_good, rule = _rule(key)
    if not is_good(value):
        raise UserError(f"ds_config: schedule {schedule}: {key} must be {rule}, not {value!r}")
    if key == "milestones":
        return [int(one) for one in value]
    return int(value) if key in WHOLE else value


def _rule(key: str) -> tuple[Callable[[Any], bool], str]:
    """What a parameter's value must be: a judge of it, and words."""
    if key in WHOLE:
        return lambda value: _is_whole(value, WHOLE[key]), f"a whole number, {WHOLE[key]} or above"
    if key == "milestones":
        return (lambda value: isinstance(value, list) and all(_is_whole(one, 1) for one in value),
                "a list of whole numbers, 1 or above")
    if key in WORDS:
        return lambda value: isinstance(value, str), "a word"
    if key in SWITCHES:
        return lambda value: isinstance(value, bool), "true or false"
    return (lambda value: all(_is_number(one) for one in (value if key in LISTS and isinstance(value, list)
                                                          else [value])), "a number, 0 or above")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_whole(value: Any, least: int) -> bool:
    return _is_number(value) and value == int(value) and value >= least


def check_schedule(section: Mapping[str, Any]) -> None:
    """Raise `UserError` for a type that neither torch nor DeepSpeed has."""
    name, known = section["type"], [*SCHEDULES, *DEEPSPEEDS]
    if name not in known:
        raise UserError(f"ds_config: no schedule {name!r}{nearest(name, known)}")


# DeepSpeed's warm-up schedules as formulas, for the runtime that has no DeepSpeed: the same rates, to rounding.
#
# As there, the first update goes at the least rate: WarmupCosineLR's at 0, the others' at `warmup_min_lr`.


Formula = Callable[[int, float], float]
"""(updates done before, the optimizer's own rate) -> rate."""
DEEPSPEED_WARMUP = {"warmup_num_steps": 1000, "warmup_type": "log"}
RATES = {"warmup_min_lr": 0.0, "warmup_max_lr": None}
PARAMETERS: dict[str, dict[str, Any]] = {
    "WarmupLR": {**RATES, **DEEPSPEED_WARMUP},
    "WarmupDecayLR": {**RATES, "warmup_max_lr": 0.001, "total_num_steps": None, **DEEPSPEED_WARMUP},
    "WarmupCosineLR": {"warmup_min_ratio": 0.0, "cos_min_ratio": 0.0001, "total_num_steps": None, **DEEPSPEED_WARMUP},
}


def build_warmup_schedule(section: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Schedule:
    """The schedule of a resolved ds_config's `scheduler` section whose type is one of `PARAMETERS`."""
    name, given = section["type"], section.get("params", {})
    for key in given:
        if key not in PARAMETERS[name]:
            raise UserError(f"ds_config: schedule {name} has no parameter {key!r}{nearest(key, PARAMETERS[name])}")
    params = {**PARAMETERS[name], **given}
    _check(name, params)
    formula = _cosine(params) if name == "WarmupCosineLR" else _linear(name, params)
    return Schedule(_ByFormula(optimizer, formula), 0, 0.0)


class _ByFormula:
    """What `Schedule` asks of one of torch's schedules."""

    def __init__(self, optimizer: torch.optim.Optimizer, formula: Formula) -> None:
        self.optimizer, self.last_epoch = optimizer, 0
        self._formula, self._base = formula, [group["lr"] for group in optimizer.param_groups]

    def _get_closed_form_lr(self) -> list[float]:
        return [self._formula(self.last_epoch, base) for base in self._base]


def _linear(name: str, params: Mapping[str, Any]) -> Formula:
    """WarmupLR, which stays at the top, and WarmupDecayLR, which falls to 0 in a line."""
    least, most, length = params["warmup_min_lr"], params["warmup_max_lr"], _length(params)

    def rate(count: int, base: float) -> float:
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

    return rate


def _cosine(params: Mapping[str, Any]) -> Formula:
    least, floor, length = params["warmup_min_ratio"], params["cos_min_ratio"], _length(params)
    decay = max(1, params["total_num_steps"] - length)

    def rate(count: int, base: float) -> float:
        step = count - 1
        if step < 0:
            return 0.0
        if step < length:
            return base * (least + (1 - least) * _warmth(step, params))
        wave = (1 + math.cos(math.pi * min(1.0, (step + 1 - length) / decay))) / 2
        return base * max(0.0, floor + (1 - floor) * wave)

    return rate


def _length(params: Mapping[str, Any]) -> int:
    return max(2, params["warmup_num_steps"])


def _warmth(step: int, params: Mapping[str, Any]) -> float:
    """How much of the warm-up is done in its step 0, 1, …: from 0 to 1."""
    if params["warmup_type"] == "linear":
        return step / _length(params)
    return math.log(step + 1) / math.log(_length(params))


def _check(name: str, params: Mapping[str, Any]) -> None:
    for key, value in params.items():
        if key == "warmup_type":
            if value not in ("log", "linear"):
                raise UserError(f"ds_config: schedule {name}: warmup_type must be log or linear, not {value!r}")
        elif key.endswith("_num_steps"):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"ds_config: schedule {name}: {key} must be a whole number, 1 or above, not {value!r}")
        elif value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0):
            raise UserError(f"ds_config: schedule {name}: {key} must be a number, 0 or above, not {value!r}")
