"""The checks of a section, written to a file one by one, so that a crash does not lose them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]


class SkippedError(Exception):
    """Raised by a section or check that cannot run here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One result: a measured number, or whether something is as it should be."""

    id: str
    value: float | str | None
    unit: str = ""
    limit: str = ""
    """What the value must be, for people; empty for a plain number."""
    ok: bool | None = None
    """Whether the check passed; None for a plain number and for a skipped check."""
    note: str = ""
    """What was measured, why it was skipped, or what to do."""
    command: str = ""
    """Command that measures the same in more detail."""

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "note" or value}


class Report:
    """Collects the checks of a section.

    Args:
        file: receives each check as a line, immediately.
        scratch: a folder that is removed afterwards.
        seconds: how long the section should take.
        most: seconds after which the section is killed.
        is_small: use small networks, small images and few steps, for CPUs and for the tests.
    """

    def __init__(
        self,
        file: IO[str],
        section: str,
        scratch: Path,
        seconds: float,
        most: float,
        *,
        is_small: bool,
    ) -> None:
        self.section, self.scratch, self.is_small = section, scratch, is_small
        self._file, now = file, time.monotonic()
        self._end, self._last = now + seconds, now + most

    @cached_property
    def device(self) -> torch.device:
        """The first GPU, or the CPU if there is none."""
        import torch

        from pipeline.distributed.gpus import torch_gpus

        return torch.device("cuda", 0) if torch_gpus() else torch.device("cpu")

    @property
    def is_on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the section should end."""
        return self._end - time.monotonic()

    def has_time_for(self, seconds: float) -> bool:
        """Whether work of `seconds`, plus 30 %, fits before the section is killed."""
        return self._last - time.monotonic() > 1.3 * seconds

    def number(
        self, name: str, value: float, unit: str, *, note: str = "", command: str = ""
    ) -> None:
        """Add a measured value."""
        self._add(Check(f"{self.section}.{name}", value, unit, note=note, command=command))

    def at_most(
        self, name: str, value: float, limit: float, unit: str = "", *, note: str = ""
    ) -> None:
        """Add a value that must not exceed `limit`; NaN fails."""
        self._add(
            Check(
                f"{self.section}.{name}", value, unit, f"<= {limit:g}", bool(value <= limit), note
            )
        )

    def at_least(
        self, name: str, value: float, limit: float, unit: str = "", *, note: str = ""
    ) -> None:
        """Add a value that must not be below `limit`; NaN fails."""
        self._add(
            Check(
                f"{self.section}.{name}", value, unit, f">= {limit:g}", bool(value >= limit), note
            )
        )

    def fact(
        self,
        name: str,
        is_so: bool | None,
        value: str | float = "",
        *,
        limit: str = "",
        note: str = "",
    ) -> None:
        """Add a statement that must be true, or, if `is_so` is None, is only reported."""
        text = value if value != "" else {True: "yes", False: "no", None: ""}[is_so]
        self._add(Check(f"{self.section}.{name}", text, limit=limit, ok=is_so, note=note))

    def skip(self, name: str, why: str) -> None:
        """Add a check that cannot run here, and the reason."""
        self._add(Check(f"{self.section}.{name}", None, note=f"skipped: {why}"))

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Turn an exception in the block into a failed check, so that the section continues."""
        try:
            yield
        except SkippedError as why:
            self.skip(name, str(why))
        except Exception as error:  # any failure on this machine is a result
            said = str(error).strip().splitlines()
            self.fact(
                name,
                False,
                "failed",
                note=f"{type(error).__name__}: {said[0][:300] if said else ''}",
            )

    def _add(self, check: Check) -> None:
        # JSON cannot express infinities and NaN.
        if isinstance(check.value, float) and not math.isfinite(check.value):
            check = replace(check, value=str(check.value))
        self._file.write(json.dumps(asdict(check)) + "\n")
        self._file.flush()


def run_script(
    words: Sequence[str], *, seconds: float, variables: Mapping[str, str] | None = None
) -> str:
    """Run a script of the checkout and return its output; `RuntimeError` with its last line if it
    fails."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **(variables or {})},
        capture_output=True,
        text=True,
        timeout=max(1.0, seconds),
        check=False,
    )
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise RuntimeError(f"status {done.returncode}: {lines[-1] if lines else ''}")
    return done.stdout


def seconds_of(
    action: Callable[[], Any], device: torch.device, *, least: float = 0.3, warm_ups: int = 2
) -> float:
    """Return the mean seconds that `action` takes on `device`, measured for `least` seconds or
    more."""
    for _ in range(warm_ups):
        action()
    count, taken = 1, 0.0
    while True:
        wait_for(device)
        began = time.perf_counter()
        for _ in range(count):
            action()
        wait_for(device)
        taken = time.perf_counter() - began
        if taken >= least:
            return taken / count
        count = max(count + 1, min(10 * count, int(1.3 * count * least / max(taken, 1e-6))))


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
