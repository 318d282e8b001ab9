"""Command lines taken apart: which words are whose."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence


def without(arguments: Sequence[str], names: Collection[str], flags: Collection[str] = ()) -> list[str]:
    """`arguments` less the options `names`, each with its value, and the `flags`, which have none."""
    kept: list[str] = []
    rest: Iterator[str] = iter(arguments)
    for argument in rest:
        option, sign, _ = argument.partition("=")
        option = option.replace("_", "-")
        if option in flags:
            continue
        if option not in names:
            kept.append(argument)
        elif not sign:
            next(rest, None)
    return kept
