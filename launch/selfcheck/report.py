"""What a section finds: checks, written down one by one, so that a crash loses none of those before
it."""

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
    """A section that cannot run here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One line: a number, or whether something is as it should be."""

    id: str
    value: float | str | None
    unit: str = ""
    limit: str = ""
    """What the value must keep to, for people; empty for a number alone."""
    ok: bool | None = None
    """None: a number, or not checked."""
    note: str = ""
    """Why it was not checked, or what to do."""
    command: str = ""
    """That measures the same, at length."""

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "note" or value}


class Report:
    """Where a section puts its checks.

    Args:
        file: each check is a line of it, written at once.
        scratch: a folder that is removed afterwards.
        seconds: how long the section shall take.
        most: after how many seconds it is ended.
        is_small: small networks, images and numbers of steps, for CPUs and for the tests.
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
        """The first GPU, or the CPU where there is none."""
        import torch

        from pipeline.distributed.gpus import torch_gpus

        return torch.device("cuda", 0) if torch_gpus() else torch.device("cpu")

    @property
    def is_on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the section's time is over."""
        return self._end - time.monotonic()

    def has_time_for(self, seconds: float) -> bool:
        """Whether so many seconds are left before the section is ended, whatever its share was."""
        return self._last - time.monotonic() > 1.3 * seconds

    def number(
        self, name: str, value: float, unit: str, *, note: str = "", command: str = ""
    ) -> None:
        """A measured value."""
        self._add(Check(f"{self.section}.{name}", value, unit, note=note, command=command))

    def at_most(
        self, name: str, value: float, limit: float, unit: str = "", *, note: str = ""
    ) -> None:
        """A value that must not be above `limit`; NaN is."""
        self._add(
            Check(
                f"{self.section}.{name}", value, unit, f"<= {limit:g}", bool(value <= limit), note
            )
        )

    def at_least(
        self, name: str, value: float, limit: float, unit: str = "", *, note: str = ""
    ) -> None:
        """A value that must not be below `limit`; NaN is."""
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
        """Something that must be so; `is_so` None: something that is merely told."""
        told = value if value != "" else {True: "yes", False: "no", None: ""}[is_so]
        self._add(Check(f"{self.section}.{name}", told, limit=limit, ok=is_so, note=note))

    def skip(self, name: str, why: str) -> None:
        """A check that cannot be made here."""
        self._add(Check(f"{self.section}.{name}", None, note=f"skipped: {why}"))

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """An exception in here is a check that failed, and the section goes on."""
        try:
            yield
        except SkippedError as why:
            self.skip(name, str(why))
        except Exception as error:  # whatever fails on this machine is what is asked for
            said = str(error).strip().splitlines()
            self.fact(
                name,
                False,
                "failed",
                note=f"{type(error).__name__}: {said[0][:300] if said else ''}",
            )

    def _add(self, check: Check) -> None:
        if isinstance(check.value, float) and not math.isfinite(
            check.value
        ):  # which JSON has no word for
            check = replace(check, value=str(check.value))
        self._file.write(json.dumps(asdict(check)) + "\n")
        self._file.flush()


def run_script(
    words: Sequence[str], *, seconds: float, variables: Mapping[str, str] | None = None
) -> str:
    """What a script of the checkout prints; `RuntimeError` with its last line where it fails."""
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
    """Seconds that `action` takes on `device`, the mean over at least `least` seconds."""
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
    """Until the device has done all that it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
