"""What every command of the project does with its arguments and its errors. Needs no torch."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
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
    same = [choice for choice in choices if choice.lower() == word.lower()]
    match = same or difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; choose from {', '.join(choices)}"


def run(options: Callable[..., Options], main: Callable[[Options], int | None],
        arguments: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line into `options` (a dataclass), call `main(options)` and exit.

    Exit status: what `main` returns (`None` is 0); 2 with one line on stderr for a `UserError` or an
    argument that does not parse; 1 with one line for a `RunError`, and with the traceback for our own mistakes; 130
    after CTRL+C.
    """
    parsed = _parse(options, arguments)
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


def _parse(options: Callable[..., Options], arguments: Sequence[str] | None) -> Options:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    prog = os.environ.get("VASTSCALE_COMMAND")  # what the user typed, where a shell script stands in front
    config = (tyro.conf.FlagCreatePairsOff,)
    known = tyro.extras.get_parser(options, config=config)._option_string_actions
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if re.match(r"--?[A-Za-z]", name) and name not in known:
            hint = nearest(name, [flag for flag in known if flag.startswith("--")])
            print(f"error: unknown option {argument}{hint} (--help lists all)", file=sys.stderr)
            sys.exit(2)
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            parsed, unknown = tyro.cli(options, prog=prog, args=arguments, config=config, return_unknown_args=True)
    except SystemExit as stop:
        if stop.code:
            print(f"error: {_unboxed(boxed.getvalue())}", file=sys.stderr)
        raise
    if unknown:
        print(f"error: unknown argument {unknown[0]} (--help lists all)", file=sys.stderr)
        sys.exit(2)
    return parsed


def _unboxed(message: str) -> str:
    """tyro's framed error, in one line."""
    lines = [re.sub(r"[\u2500-\u257f]+", " ", line).strip() for line in message.splitlines()]
    message = " ".join(line for line in lines if line and "For full helptext" not in line)
    message = re.split(r" Argument helptext:| Got errors:", message)[0]
    return re.sub(r"^(Value error|Parsing error|Missing argument) ", "", message) + " (--help lists all)"
