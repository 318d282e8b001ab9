"""Which signals stop a command, and how one ends that has nothing to save.

Imports next to nothing, so that a script can call `end_at_once` before its other imports, which
take seconds.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
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


def end_at_once(
    line: str = "stopped", numbers: Iterable[signal.Signals] = (signal.SIGINT,)
) -> None:
    """Let a signal print `line` on stderr and end this process at once, with status 128 + signal.

    Imports can be interrupted in this way only: an exception would come out of the middle of some
    library, as a traceback or as another exception, or not at all.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        if is_first_rank():
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"{line}\n".encode())
        os._exit(128 + number)

    for number in numbers:
        signal.signal(number, end)


def is_first_rank() -> bool:
    """Whether this process is the first rank or no rank, as far as its environment says."""
    ranks = (os.environ[name] for name in _RANK_VARIABLES if name in os.environ)
    return next(ranks, "0") == "0"
