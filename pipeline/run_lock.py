"""One run folder, one run. Needs no torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.cli import UserError


@contextlib.contextmanager
def run_lock(run_dir: Path, say: Callable[[str], None], wait_seconds: float = 60) -> Iterator[None]:
    """Hold the run folder for this run alone. A run that is still saving is waited for.

    The lock lies beside the folder, so that the folder can be moved aside, and dies with its process.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.parent / f".{run_dir.name}.lock"
    with open(path, "a+") as file:
        deadline = time.monotonic() + wait_seconds
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                holder = _holder(path)
                if time.monotonic() > deadline:
                    raise UserError(f"{run_dir} is in use by process {holder}; stop it, or give this run another "
                                    "--output-dir") from None
                if not told:
                    say(f"{run_dir} is in use by process {holder}; waiting up to {wait_seconds:.0f} s for it to finish")
                    told = True
                time.sleep(0.2)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
        file.flush()
        yield


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        holder = json.loads(path.read_text())
        return f"{holder['pid']} on {holder['host']}"
    return "(unknown)"
