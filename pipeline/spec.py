"""Base class of a recipe's parts, strict and frozen, and their number types. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Spec(BaseModel):
    """A part of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number; true and false are none."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number")
    return value


Number = Annotated[float, BeforeValidator(_no_switch), Field(allow_inf_nan=False)]
"""A finite number. YAML's `true` is refused, although it equals 1 in Python."""


def _both_ends(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value, value
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if not is_pair or any(isinstance(end, bool) for end in value):
        raise ValueError(f"{value!r} is neither a number nor a range [low, high]")
    return value


def within(lowest: float, highest: float = math.inf) -> AfterValidator:
    """Validate a range `[low, high]` of finite numbers within [lowest, highest]."""

    def check(value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not (math.isfinite(high) and lowest <= low <= high <= highest):
            bounds = (
                f"at least {lowest:g}" if math.isinf(highest) else f"within {lowest:g}..{highest:g}"
            )
            raise ValueError(f"[{low:g}, {high:g}] is not a range [low, high] of numbers {bounds}")
        return value

    return AfterValidator(check)


Probability = Annotated[float, Field(ge=0, le=1)]
# A single number stands for both ends.
Range = Annotated[tuple[float, float], BeforeValidator(_both_ends)]
Sigma = Annotated[Range, within(1e-3, 50)]  # of a blur kernel, in pixels
Radius = Annotated[Range, within(0.5, 50)]  # in pixels
Angle = Annotated[Range, within(-360, 360)]  # in degrees, from the x axis (right) to the y (down)
Exponent = Annotated[Range, within(1e-3, 20)]
Levels = Annotated[Range, within(0, 255)]
Factor = Annotated[Range, within(0, 100)]
Quality = Annotated[Range, within(1, 100)]
