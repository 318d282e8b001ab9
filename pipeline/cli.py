"""Shared command-line entry point: parse options, run, map errors to exit codes.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from pipeline.installation import as_typed
from pipeline.signals import end_orderly

Options = TypeVar("Options")


LONGEST_MESSAGE = 2000
"""Characters of an error message; a file may contain a line of millions."""


class UserError(ValueError):
    """An error that the user can fix.

    Its message names the thing, the rule and the way out, in one line.
    """


class RunError(Exception):
    """The work failed although the input is valid.

    Its message says what happened and what to do, in one line.
    """


FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
DISK_ERRORS = FULL_DISK | frozenset(
    {
        errno.EFBIG,  # a limit on the size of files
        errno.EROFS,
        errno.EIO,
        errno.ESTALE,  # a network disk that has gone
    }
)


def disk_error(error: OSError) -> str:
    """Format one of `DISK_ERRORS`: what the system says, the path, and the way out."""
    way_out = "free some space" if error.errno in FULL_DISK else "check the disk"
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror}{where}; {way_out} and start the same command again"


def one_line(error: Exception) -> str:
    """Format a library's exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 rank` or `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def bar_options() -> dict[str, Any]:
    """Return tqdm's options: no bar for short work or without a terminal, few lines in a log."""
    return {
        "delay": 2,
        "disable": None,
        "dynamic_ncols": True,
        "mininterval": 0.1 if sys.stderr.isatty() else 10,
    }


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean 'crop'?"` for the choice nearest to `word`, else list the choices."""
    choices = sorted(choices)
    same = [choice for choice in choices if choice.lower() == word.lower()]
    match = same or difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; choose from {', '.join(choices)}"


def run(
    options: Callable[..., Options],
    main: Callable[[Options], int | None],
    arguments: Sequence[str] | None = None,
    *,
    ends_with_reader: bool = False,
) -> NoReturn:
    """Parse the command line into `options` (a dataclass), call `main(options)` and exit.

    Exit status: what `main` returns (`None` is 0); 2 with one line on stderr for a `UserError` or
    an argument that does not parse; 1 with one line for a `RunError` or a full or broken disk, and
    with a traceback for bugs; 130 after CTRL+C. If the reader of stdout goes away (`command |
    head`), the work continues to its end and its own status; with `ends_with_reader`, for commands
    that do nothing but print, it ends with status 0.
    """
    with _stdout_outliving_its_reader(ends_with_reader):
        status = exit_status(lambda: main(_parse(options, arguments)))
    sys.exit(status)


def exit_status(action: Callable[[], int | None]) -> int:
    """Call `action` and flush stdout; return the exit status, reporting errors as `run` does."""
    end_orderly()
    try:
        status = action() or 0
        sys.stdout.flush()
    except UserError as error:
        _tell(f"error: {_shortened(str(error))}")
        status = 2
    except RunError as failure:
        _tell(f"error: {_shortened(str(failure))}")
        status = 1
    except OSError as error:
        # Any write may meet a full or broken disk; everything else is a bug.
        if error.errno not in DISK_ERRORS:
            raise
        _tell(f"error: {disk_error(error)}")
        status = 1
    except KeyboardInterrupt:
        _tell("stopped")
        status = 130
    return status


def _shortened(message: str) -> str:
    """Return a message without the middle of what it quotes, if that would fill the screen."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    half = LONGEST_MESSAGE // 2
    return f"{message[:half]} … {message[-half:]}"


class _Stdout(io.FileIO):
    """stdout that discards output once its reader is gone, for later child processes too."""

    def __init__(self, descriptor: int, ends_with_reader: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._ends_with_reader = ends_with_reader

    def write(self, data: bytes | memoryview) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            _silence(self.fileno())
            if not isinstance(error, BrokenPipeError):
                raise RunError(
                    f"cannot write to stdout: {error.strerror}; free space where it is redirected"
                ) from error
            if self._ends_with_reader:
                sys.exit(0)
            return memoryview(data).nbytes


@contextlib.contextmanager
def _stdout_outliving_its_reader(ends_with_reader: bool) -> Iterator[None]:
    """Replace `sys.stdout` with a `_Stdout`, unless it is a terminal or was already replaced.

    Either prints characters that its encoding lacks as escapes: a file name that is not UTF-8 must
    not end a command.
    """
    if sys.stdout is None:  # `>&-`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - never closed
    plain = sys.stdout
    if plain is not sys.__stdout__ or plain.isatty():
        if isinstance(plain, io.TextIOWrapper):
            plain.reconfigure(errors="backslashreplace")
        yield
        return
    plain.flush()
    raw = _Stdout(plain.fileno(), ends_with_reader)
    is_unbuffered = plain.write_through  # python -u
    lasting = io.TextIOWrapper(
        raw if is_unbuffered else io.BufferedWriter(raw),
        plain.encoding,
        "backslashreplace",
        line_buffering=plain.line_buffering,
        write_through=is_unbuffered,
    )
    sys.stdout = lasting
    try:
        yield
    finally:
        sys.stdout = plain
        lasting.flush()


def _silence(descriptor: int) -> None:
    """Redirect a file descriptor to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def say(text: str) -> None:
    """Print a line, even if the terminal is gone.

    CTRL+C in a launcher closes it, and the run must still save.
    """
    with contextlib.suppress(OSError, ValueError):
        print(as_typed(text), flush=True)


def _tell(line: str) -> None:
    """Print one line on stderr; the exit status must not depend on whether anybody reads it.

    A path in the line may contain a line break or control characters; they are printed as escapes.
    """
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in as_typed(line))
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:  # `2>&1 | head`
        _silence(sys.stderr.fileno())


def _parse(options: Callable[..., Options], arguments: Sequence[str] | None) -> Options:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # What the user typed, if a shell script called this command.
    prog = os.environ.get("VASTSCALE_COMMAND")
    config = (tyro.conf.FlagCreatePairsOff,)
    hint = getattr(options, "hint_at", lambda name: "")  # of options for other programs' words
    if (summary := as_typed(options.__doc__ or "")) != options.__doc__:
        options.__doc__ = summary
    known = tyro.extras.get_parser(options, config=config)._option_string_actions
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if re.match(r"--?[A-Za-z]", name) and name not in known:
            hint = (
                f"; for the file or folder of that name, write ./{argument}"
                if os.path.lexists(argument)
                else hint(name) or _nearest_option(name, known)
            )
            _tell(f"error: unknown option {argument}{hint} (--help lists all)")
            sys.exit(2)
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            parsed, unknown = tyro.cli(
                options, prog=prog, args=arguments, config=config, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code:
            _tell(f"error: {_unboxed(boxed.getvalue())}")
        raise
    if unknown:
        _tell(f"error: unknown argument {unknown[0]} (--help lists all)")
        sys.exit(2)
    return parsed


def _nearest_option(name: str, known: Iterable[str]) -> str:
    """Return a hint at the option nearest to `name`, if one is near; the dashes do not count."""
    words = {flag.lstrip("-"): flag for flag in known if flag.startswith("--")}
    match = difflib.get_close_matches(name.lstrip("-"), words, n=1, cutoff=0.6)
    return f"; did you mean {words[match[0]]!r}?" if match else ""


def _unboxed(message: str) -> str:
    """Convert tyro's framed error into one line."""
    lines = [re.sub(r"[\u2500-\u257f]+", " ", line).strip() for line in message.splitlines()]
    message = " ".join(line for line in lines if line and "For full helptext" not in line)
    message = re.split(r" Argument helptext:| Got errors:", message)[0]
    return (
        re.sub(r"^(Value error|Parsing error|Missing argument) ", "", message)
        + " (--help lists all)"
    )
