"""Names that a recipe may use, with their parameters, without importing torch.

The tables of networks, discriminators and losses are in modules that import torch; importing them
would cost a launcher a second and a half, and 200 MB for as long as it watches the ranks. So the
rows are parsed from the sources, in a hundredth of the time. If a table's module is already
imported, the table itself is used.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cli import UserError, nearest

PACKAGE = Path(__file__).resolve().parents[1]
Definition = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Row:
    """What a recipe may write for one name of a table."""

    parameters: tuple[str, ...] = ()
    required: tuple[str, ...] = ()  # parameters without a default
    takes_any: bool = False  # further parameters are accepted and checked by the function itself
    flags: Mapping[str, bool] = field(default_factory=dict)  # boolean fields, if the row has them


@dataclass(frozen=True)
class Table:
    """Location of a table: the dict literal `variable` in `module`.

    Its values are functions, classes or objects.
    """

    kind: str  # used in messages
    module: str
    variable: str
    given: tuple[str, ...] = ()  # arguments that the program passes, not the recipe
    common: tuple[str, ...] = ()  # parameters of all rows, whatever their signatures say

    def rows(self) -> dict[str, Row]:
        """Return all rows by name."""
        if self.module in sys.modules:
            table = vars(sys.modules[self.module])[self.variable]
            return {
                name: _row_of_object(value, self.given, self.common)
                for name, value in table.items()
            }
        return _rows_of_source(self)

    def check(self, name: str, params: Iterable[str] = ()) -> Row:
        """Return the row `name`.

        Raises `UserError` for an unknown name or parameter, suggesting the nearest one, and for a
        missing parameter.
        """
        rows = self.rows()
        if name not in rows:
            raise UserError(f"no {self.kind} named {name!r}{nearest(str(name), rows)}")
        row, params = rows[name], tuple(params)
        for parameter in params:
            is_free = row.takes_any and parameter not in ("self", "cls", *self.given)
            if parameter not in row.parameters and not is_free:
                raise UserError(
                    f"{self.kind} {name!r} has no parameter {parameter!r}"
                    f"{nearest(str(parameter), row.parameters)}"
                )
        for parameter in row.required:
            if parameter not in params:
                raise UserError(f"{self.kind} {name!r} needs the parameter {parameter!r}")
        return row


NETWORKS = Table(
    "network", "pipeline.models", "GENERATORS", given=("scale",), common=("colour_space",)
)
DISCRIMINATORS = Table(
    "discriminator", "pipeline.models.discriminators", "DISCRIMINATORS", given=("crop",)
)
LOSSES = Table("loss", "pipeline.losses", "LOSSES", given=("sr", "hr"), common=("weight",))
ADVERSARIAL_LOSSES = Table("adversarial loss", "pipeline.losses.adversarial", "ADVERSARIAL_LOSSES")


def _row_of_object(value: Any, given: Collection[str], common: Collection[str]) -> Row:
    if not inspect.isroutine(value) and not inspect.isclass(value):
        return Row(
            flags={name: flag for name, flag in vars(value).items() if isinstance(flag, bool)}
        )
    parameters = inspect.signature(
        value.__init__ if inspect.isclass(value) else value
    ).parameters.values()
    kinds = {parameter.name: parameter.kind for parameter in parameters}
    needed = {
        parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty
    }
    named = [
        name
        for name, kind in kinds.items()
        if kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
    return _row(named, needed, inspect.Parameter.VAR_KEYWORD in kinds.values(), given, common)


def _row(
    named: Iterable[str],
    needed: Collection[str],
    takes_any: bool,
    given: Collection[str],
    common: Collection[str],
) -> Row:
    own = [name for name in named if name not in ("self", *given)]
    return Row((*own, *common), tuple(name for name in own if name in needed), takes_any)


@functools.cache
def _rows_of_source(table: Table) -> dict[str, Row]:
    for statement in _module(table.module).body:
        targets = (
            statement.targets
            if isinstance(statement, ast.Assign)
            else [getattr(statement, "target", None)]
        )
        if any(isinstance(target, ast.Name) and target.id == table.variable for target in targets):
            value = statement.value  # type: ignore[attr-defined]
            assert isinstance(value, ast.Dict), (
                f"{table.module}.{table.variable} must be written as one table"
            )
            return {
                ast.literal_eval(key): _row_of_source(table, row)
                for key, row in zip(value.keys, value.values, strict=True)
                if key is not None
            }
    raise AssertionError(f"{table.module} has no {table.variable}")


def _row_of_source(table: Table, value: ast.expr) -> Row:
    if isinstance(value, ast.Call):
        return Row(
            flags={
                keyword.arg: keyword.value.value
                for keyword in value.keywords
                if keyword.arg and isinstance(keyword.value, ast.Constant)
            }
        )
    assert isinstance(value, ast.Name), (
        f"a row of {table.module}.{table.variable} must be a name or a call"
    )
    function = _function(table.module, value.id)
    if function is None:  # a class without its own `__init__`
        return Row(table.common, takes_any=True)
    arguments = function.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    needed = positional[: len(positional) - len(arguments.defaults)]
    needed += [
        argument.arg
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    ]
    named = [*positional, *(argument.arg for argument in arguments.kwonlyargs)]
    return _row(named, needed, arguments.kwarg is not None, table.given, table.common)


def _function(module: str, name: str) -> ast.FunctionDef | None:
    """Return the function `name` of a project module, or the `__init__` of its class `name`.

    Follows imports to other modules of the project. None if the class has no `__init__`.
    """
    for statement in _module(module).body:
        if isinstance(statement, ast.FunctionDef) and statement.name == name:
            return statement
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            own = (
                part
                for part in statement.body
                if isinstance(part, ast.FunctionDef) and part.name == "__init__"
            )
            return next(own, None)
        if isinstance(statement, ast.ImportFrom) and statement.module:
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _function(statement.module, alias.name)
    raise AssertionError(f"{module} neither defines nor imports {name}")


@functools.cache
def _module(name: str) -> ast.Module:
    path = PACKAGE.parent.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))
