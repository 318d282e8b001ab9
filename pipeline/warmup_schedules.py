"""DeepSpeed's warm-up schedules as formulas, for the runtime that has no DeepSpeed: the same rates, to rounding.

As there, the first update goes at the least rate: WarmupCosineLR's at 0, the others' at `warmup_min_lr`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipeline.cli import UserError, nearest
from pipeline.engine.schedules import Schedule

Formula = Callable[[int, float], float]
"""(updates done before, the optimizer's own rate) -> rate."""
WARMUP = {"warmup_num_steps": 1000, "warmup_type": "log"}
RATES = {"warmup_min_lr": 0.0, "warmup_max_lr": None}
PARAMETERS: dict[str, dict[str, Any]] = {
    "WarmupLR": {**RATES, **WARMUP},
    "WarmupDecayLR": {**RATES, "warmup_max_lr": 0.001, "total_num_steps": None, **WARMUP},
    "WarmupCosineLR": {"warmup_min_ratio": 0.0, "cos_min_ratio": 0.0001, "total_num_steps": None, **WARMUP},
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
