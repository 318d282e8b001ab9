"""What every command of the project does with its arguments and its errors. Needs no torch."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, TypeVar

import tyro

Options = TypeVar("Options")


class UserError(ValueError):
    """Something the user can mend. The message names the thing, the rule and the way out, in one line."""


class RunError(Exception):
    """The work itself went wrong, through no fault of the input. The message says what, and what to do, in one line."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'crop'?"` for the choice nearest to `word`, else the list of choices."""
    choices = sorted(choices)
    match = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; choose from {', '.join(choices)}"


def run(options: Callable[..., Options], main: Callable[[Options], int | None],
        arguments: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line into `options` (a dataclass), call `main(options)` and exit.

    Exit status: what `main` returns (`None` is 0); 2 with one line on stderr for a `UserError` or an
    argument that does not parse; 1 with one line for a `RunError`, and with the traceback for our own mistakes; 130
    after CTRL+C.
    """
    parsed = tyro.cli(options, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        status = main(parsed) or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except RunError as failure:
        print(f"error: {failure}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # `command | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
