"""Which signals stop a command, and how one ends that has nothing to save.

Imports next to nothing, so that a script can call `end_at_once` before its other imports, which
take seconds.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

_STOP_SIGNALS = (
    signal.SIGINT,  # CTRL+C
    signal.SIGTERM,  # kill, systemd, docker stop, scancel, preemption
    signal.SIGHUP,  # a closed terminal
    signal.SIGQUIT,  # CTRL+\
    signal.SIGUSR1,  # Slurm's --signal, Grid Engine's -notify
    signal.SIGUSR2,  # LSF before the run limit, Grid Engine's -notify
    signal.SIGXCPU,  # the limit of CPU time, of the kernel or of a scheduler
    signal.SIGPWR,  # a power failure; lxc-stop
)
NOTHING_TO_SAVE = "stopped before the first step; there is nothing to save"
_PARENT_SPEAKS = "VASTSCALE_EVALUATION_PARENT"
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals on which a run saves and stops; the exit status is then 128 + signal.

    These are all that a terminal, a user or a scheduler sends to end or to warn a process and that
    can be caught. SIGHUP is left out where it is ignored, as under `nohup`.
    """
    return tuple(
        number
        for number in _STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    )


def is_stopped(status: int | None) -> bool:
    """Whether an exit status, as a shell reports it, is that of a run stopped by such a signal."""
    return status is not None and status - 128 in _STOP_SIGNALS


def end_at_once(line: str = "") -> None:
    """Let CTRL+C print one line on stderr and end this process at once, until `end_orderly`.

    Call it before any import that takes long: an exception would come out of the middle of some
    library, as a traceback or as another exception, or not at all. With a `line`, the same holds
    for all signals to stop, and `end_orderly` changes nothing: for ranks, which have nothing to
    save before their first step and handle signals themselves afterwards.
    """
    if line:
        for number in stop_signals():
            signal.signal(number, lambda number, _frame: _end(number, line))
    elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not `command &`
        signal.signal(signal.SIGINT, _end)
    # The shell scripts start Python with the signal blocked: it has waited until here.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_orderly() -> None:
    """Let CTRL+C raise KeyboardInterrupt from now on, so that what has begun is undone.

    Inside an import it still ends the process at once.
    """
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, _interrupt)


def _end(number: int, said: FrameType | str | None = None) -> None:
    line = said if isinstance(said, str) else "stopped"
    if _is_heard():
        try:  # noqa: SIM105 - contextlib takes long to import
            os.write(2, f"{line}\n".encode())
        except OSError:  # the terminal is gone
            pass
    os._exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end(number)
        frame = frame.f_back
    raise KeyboardInterrupt


def _is_heard() -> bool:
    """Whether a line of this process belongs on the terminal: no other process says the same."""
    ranks = (os.environ[name] for name in _RANK_VARIABLES if name in os.environ)
    return next(ranks, "0") == "0" and _PARENT_SPEAKS not in os.environ
