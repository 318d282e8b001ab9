"""One trial's training run: a process of its own, its validations as they come, and its end."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from pipeline.distributed.launcher import end_with_parent

OUTPUT_FILE = "output.txt"
GRACE_SECONDS = (
    180  # for saving, once told to stop; longer than launch/local.py waits for its ranks
)


class LogTail:
    """The lines of a log.jsonl, as they are written. A continued run writes its log again, which is
    then read again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_id: tuple[int, int] | None = None
        self._offset = 0
        self.is_anew = False  # read from its beginning the last time

    def read(self) -> list[dict[str, Any]]:
        """What is new; a line that is still being written waits for the next time."""
        self.is_anew = False
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                if self._file_id != (status.st_dev, status.st_ino) or status.st_size < self._offset:
                    self._file_id, self._offset = (status.st_dev, status.st_ino), 0
                    self.is_anew = True
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                    found.append(entry)
        return found


class TrialRun:
    """The training run of a trial in `folder`, whose validations `log` tells under the name
    `key`."""

    def __init__(self, number: int, folder: Path, log: Path, key: str) -> None:
        self.number, self.folder = number, folder
        self.scores: dict[int, float] = {}  # step -> score, of finite ones
        self.step = 0  # seen last
        self.is_pruned = False
        self._log, self._key = LogTail(log), key
        self._process: subprocess.Popen[bytes] | None = None
        self._told_at: float | None = None
        self._output_from = 0

    def start(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Start the run, or go on with it. It is told to stop when this process is gone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / OUTPUT_FILE, "ab") as output:
            self._output_from = output.tell()
            # In a session of its own: CTRL+C reaches the searcher alone, which then tells all of
            # them.
            self._process = subprocess.Popen(
                command,
                env=dict(variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(end_with_parent, signal.SIGTERM),
            )

    def news(self) -> list[tuple[int, float]]:
        """(step, score) of the validations since the last time."""
        found = []
        lines = self._log.read()
        if self._log.is_anew:  # what came after the checkpoint is done again
            self.scores.clear()
        for line in lines:
            self.step = line["step"]
            score = line.get(self._key)
            if (
                line.get("event") == "validation"
                and isinstance(score, (int, float))
                and self.step not in self.scores
            ):
                self.scores[self.step] = float(score)
                found.append((self.step, float(score)))
        return found

    def stop(self) -> None:
        """Ask the run to save and to end, once."""
        if self._told_at is None and self._process is not None:
            self._told_at = time.monotonic()
            self._process.terminate()

    @property
    def is_told_to_stop(self) -> bool:
        return self._told_at is not None

    def status(self) -> int | None:
        """The exit status once the run has ended, as a shell gives it. One that does not stop when
        told is killed."""
        assert self._process is not None
        if self._told_at is not None and time.monotonic() - self._told_at > GRACE_SECONDS:
            with contextlib.suppress(psutil.NoSuchProcess):
                run = psutil.Process(self._process.pid)
                for process in (
                    run,
                    *run.children(recursive=True),
                ):  # DeepSpeed gives each rank its own session
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
        status = self._process.poll()
        return 128 - status if status is not None and status < 0 else status

    def reason(self, status: int) -> str:
        """Why the run failed, in one line: its error, or the last that it said."""
        with open(self.folder / OUTPUT_FILE, "rb") as output:
            output.seek(self._output_from)
            lines = [
                line.strip()
                for line in re.split(r"[\r\n]+", output.read().decode(errors="replace"))
            ]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        said = errors or [line for line in lines if line]
        if status > 128:
            with contextlib.suppress(ValueError):
                return f"ended by {signal.Signals(status - 128).name}" + (
                    f"; it said last: {said[-1]}" if said else ""
                )
        return said[-1] if said else f"ended with status {status} and no word"
