"""Search spaces: the values that overrides of a training command may take, in YAML.

Needs neither torch nor Optuna.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from pipeline.cli import UserError, nearest
from pipeline.config import recipe
from pipeline.installation import find_file, recipe_names

SEARCHES = "recipes/searches"
RANGE_KEYS, WHEN = ("low", "high", "log", "step"), "when"
MAX_CHECKED = 16  # largest integer range of which all values are checked before the first trial
MEASURE = (
    "scale",
    "steps",
    "validate_every",
    "validation_images",
    "validation_lpips",
    "validation_metrics",
    "metric_weights",
    "best",
    "patience",
    "data.degradation",
    "name",
)
"""Keys that must be the same in all trials, so that these can be compared."""


class TrialLike(Protocol):
    """Methods used of Optuna's trials and its `FixedTrial`."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None, log: bool
    ) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high` inclusive; integers if both are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def suggest(self, sampler: TrialLike, key: str) -> float:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return sampler.suggest_int(
                key, self.low, self.high, step=int(self.step or 1), log=self.log
            )
        return sampler.suggest_float(key, self.low, self.high, step=self.step, log=self.log)

    def checked(self) -> list[Any]:
        """Both ends, or all values of a small integer range."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            values = range(self.low, self.high + 1, int(self.step or 1))
            if len(values) <= MAX_CHECKED:
                return list(values)
        return [self.low, self.high]


@dataclass(frozen=True)
class Choices:
    """One of several values, which may be lists and tables; a single one is fixed."""

    values: tuple[Any, ...]

    def suggest(self, sampler: TrialLike, key: str) -> Any:
        if len(self.values) == 1:
            return self.values[0]
        if all(
            value is None or isinstance(value, (bool, int, float, str)) for value in self.values
        ):
            return sampler.suggest_categorical(key, self.values)
        by_text = {json.dumps(value): value for value in self.values}  # Optuna accepts only scalars
        return by_text[sampler.suggest_categorical(key, tuple(by_text))]

    def checked(self) -> list[Any]:
        return list(self.values)


@dataclass(frozen=True)
class Parameter:
    """An override that is searched or fixed.

    It applies only if earlier parameters have the values in `when`.
    """

    key: str
    domain: Range | Choices
    when: Mapping[str, tuple[Any, ...]]

    def applies(self, values: Mapping[str, Any]) -> bool:
        return all(key in values and values[key] in allowed for key, allowed in self.when.items())

    @property
    def is_searched(self) -> bool:
        return isinstance(self.domain, Range) or len(self.domain.values) > 1


@dataclass(frozen=True)
class Space:
    """A search space: its parameters in order, and the plain values of its file."""

    parameters: tuple[Parameter, ...]
    source: dict[str, Any]

    def suggest(self, sampler: TrialLike) -> dict[str, Any]:
        """Return the overrides of one trial as key -> value."""
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.applies(values):
                values[parameter.key] = parameter.domain.suggest(sampler, parameter.key)
        return values

    def checked(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `("ema_decay=0.9", overrides)` for both ends of each range and for each choice.

        All other parameters have their first value.
        """
        for parameter in self.parameters:
            for value in parameter.domain.checked():
                forced = {**self._conditions(parameter), parameter.key: value}
                yield override(parameter.key, value), self._completed(forced)

    def _conditions(self, parameter: Parameter) -> dict[str, Any]:
        forced: dict[str, Any] = {}
        for key, allowed in parameter.when.items():
            forced |= {**self._conditions(self._parameter(key)), key: allowed[0]}
        return forced

    def _completed(self, forced: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.applies(values):
                values[parameter.key] = forced.get(parameter.key, parameter.domain.checked()[0])
        return values

    def _parameter(self, key: str) -> Parameter:
        return next(parameter for parameter in self.parameters if parameter.key == key)

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """List the differences from the plain values of a study.

        An entry is `"ema_decay: [0.9] in the study, [0.99] asked for"`, for example.
        """
        requested = json.loads(json.dumps(self.source))
        return [
            f"{key}: {json.dumps(stored[key]) if key in stored else 'unset'} in the study, "
            f"{json.dumps(requested[key]) if key in requested else 'unset'} asked for"
            for key in sorted(stored.keys() | requested.keys())
            if stored.get(key) != requested.get(key)
        ]


def override(key: str, value: Any) -> str:
    """Word of a training command that sets `key` to exactly this value; JSON is valid YAML."""
    return f"{key}={json.dumps(value)}"


def read_space(name: str) -> Space:
    """Read the space `name` (in `recipes/searches/`, or the path of a YAML file).

    Raises `UserError` that names what is wrong.
    """
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name).expanduser() if is_path else find_file(f"{SEARCHES}/{name}.yaml")
    if not path.is_file():
        known = recipe_names(SEARCHES)
        raise UserError(
            f"no search space {name!r}{nearest(name, known)} (or give the path of a .yaml file)"
        )
    source = recipe.read_yaml(path, _UniqueKeys)
    try:
        return space_of(source)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _UniqueKeys(recipe._Loader):
    """Same loader as for recipes, but duplicate keys are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is given {keys.count(key)} times")
        return super().construct_mapping(node, deep)


def space_of(source: Any) -> Space:
    """Build the space from the plain values of a file."""
    if not isinstance(source, dict) or not source:
        raise UserError(
            "a search space is a table of overrides and their values, e.g. "
            "`ds.optimizer.params.lr: {low: 1e-4, high: 1e-2, log: true}`"
        )
    parameters: list[Parameter] = []
    for key, value in source.items():
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
            raise UserError(
                f"{key!r} is not the key of an override such as data.crop or ds.train_batch_size"
            )
        _refuse_measure(key)
        try:
            parameters.append(
                _parameter(key, value, {earlier.key: earlier for earlier in parameters})
            )
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    if not any(parameter.is_searched for parameter in parameters):
        raise UserError(
            "nothing to search: every value is fixed; give one a range or several choices"
        )
    return Space(tuple(parameters), source)


def _refuse_measure(key: str) -> None:
    plain = re.sub(r"^stages\.\w+\.", "", key)
    for name in MEASURE:
        if plain == name or plain.startswith(f"{name}."):
            how = "--steps N" if name == "steps" else f"{key}=VALUE"
            raise UserError(
                f"{key}: must be the same in all trials, because they are compared by it; set "
                f"{how} on the command line"
            )


def _parameter(key: str, value: Any, earlier: Mapping[str, Parameter]) -> Parameter:
    when: dict[str, tuple[Any, ...]] = {}
    if isinstance(value, dict):
        when = _when(value.get(WHEN, {}), earlier)
        value = {name: part for name, part in value.items() if name != WHEN}
        if value.keys() == {"choices"}:
            value = value["choices"]
            if not isinstance(value, list):
                raise UserError(f"choices must be a list, not {value!r}")
    if isinstance(value, dict):
        return Parameter(key, _range(value), when)
    return Parameter(key, _choices(value if isinstance(value, list) else [value]), when)


def _choices(values: list[Any]) -> Choices:
    if not values:
        raise UserError("a list of choices needs at least one")
    for number, value in enumerate(values):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{value} is not a finite number")
        if value in values[:number]:
            raise UserError(f"{value!r} is given twice")
        try:
            json.dumps(value)
        except TypeError as error:  # e.g. a date
            raise UserError(
                f"{value!r} is not a valid recipe value; put it in quotes if it is text"
            ) from error
    return Choices(tuple(values))


def _range(table: dict[Any, Any]) -> Range:
    for name in table:
        if name not in RANGE_KEYS:
            raise UserError(
                f"unknown key {name!r}{nearest(str(name), (*RANGE_KEYS, WHEN, 'choices'))} (put a "
                "table that is itself a value into a list: [{…}])"
            )
    for name in ("low", "high"):
        if name not in table:
            raise UserError(f"a range needs {name}, e.g. {{low: 1e-4, high: 1e-2, log: true}}")
    for name in ("low", "high", "step"):
        number = table.get(name, 1)
        if (
            isinstance(number, bool)
            or not isinstance(number, (int, float))
            or not math.isfinite(number)
        ):
            raise UserError(f"{name} must be a finite number, not {number!r}")
    low, high, log, step = table["low"], table["high"], table.get("log", False), table.get("step")
    if not isinstance(log, bool):
        raise UserError(f"log must be true or false, not {log!r}")
    if not (isinstance(low, int) and isinstance(high, int)):
        low, high = float(low), float(high)
    if low >= high:
        raise UserError(
            f"low {low:g} must be below high {high:g}; for a single value, write just that"
        )
    if log and low <= 0:
        raise UserError(f"low {low:g} must be above 0 if log is true")
    if step is not None:
        _check_step(low, high, step, log)
    return Range(low, high, log, step)


def _check_step(low: float, high: float, step: float, log: bool) -> None:
    if log:
        raise UserError("log and step cannot be combined; omit one, or list the choices")
    if step <= 0:
        raise UserError(f"step {step:g} must be above 0")
    if isinstance(low, int) and not isinstance(step, int):
        raise UserError(
            f"step {step:g} is not an integer, but low and high are; write low as {low}.0"
        )
    count = round((high - low) / step, 6)
    if count != int(count) or count < 1:
        raise UserError(
            f"high {high:g} is not low {low:g} + a multiple of step {step:g}; use high: "
            f"{low + max(1, math.floor(count)) * step:g}"
        )


def _when(table: Any, earlier: Mapping[str, Parameter]) -> dict[str, tuple[Any, ...]]:
    if not isinstance(table, dict):
        raise UserError(f"when must be a table of earlier keys and their values, not {table!r}")
    conditions: dict[str, tuple[Any, ...]] = {}
    for key, allowed in table.items():
        if key not in earlier:
            raise UserError(
                f"when: no earlier key {key!r}{nearest(str(key), earlier) if earlier else ''}"
            )
        domain = earlier[key].domain
        if isinstance(domain, Range):
            raise UserError(f"when: {key} is a range; only choices can be a condition")
        values = (
            tuple(allowed)
            if isinstance(allowed, list) and allowed not in domain.values
            else (allowed,)
        )
        for value in values:
            if value not in domain.values:
                raise UserError(f"when: {value!r} is not among the choices of {key}")
        conditions[key] = values
    return conditions
