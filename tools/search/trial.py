"""The training run of one trial: a process, its validations as they come, and its end."""

from __future__ import annotations

import contextlib
import functools
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
from pipeline.files import parse_json

OUTPUT_FILE = "output.txt"
# Seconds to save after a stop request; longer than launch/local.py waits for its ranks.
GRACE_SECONDS = 180


class LogTail:
    """Follows the lines of a log.jsonl as they are written.

    A continued run rewrites its log, which is then read again from the beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_id: tuple[int, int] | None = None
        self._offset = 0
        self.was_rewritten = False  # the last call read from the beginning

    def read(self) -> list[dict[str, Any]]:
        """Return the new entries; an incomplete line is left for the next call."""
        self.was_rewritten = False
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                if self._file_id != (status.st_dev, status.st_ino) or status.st_size < self._offset:
                    self._file_id, self._offset = (status.st_dev, status.st_ino), 0
                    self.was_rewritten = True
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                entry = parse_json(line)
                if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                    found.append(entry)
        return found


class TrialRun:
    """The training run of a trial in `folder`; `key` is the name of its score in `log`."""

    def __init__(self, number: int, folder: Path, log: Path, key: str) -> None:
        self.number, self.folder = number, folder
        self.scores: dict[int, float] = {}  # step -> finite score
        self.step = 0  # last step seen
        self.is_pruned = False
        self._log, self._key = LogTail(log), key
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_requested_at: float | None = None
        self._output_from = 0

    def start(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Start or continue the run; it is asked to stop when this process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / OUTPUT_FILE, "ab") as output:
            self._output_from = output.tell()
            # Its own session, so that CTRL+C reaches only the searcher, which then stops all
            # trials.
            self._process = subprocess.Popen(
                command,
                env=dict(variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(end_with_parent, signal.SIGTERM),
            )

    def new_scores(self) -> list[tuple[int, float]]:
        """Return (step, score) of the validations since the last call."""
        found = []
        lines = self._log.read()
        if self._log.was_rewritten:  # what came after the checkpoint is repeated
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
        """Ask the run to save and stop, once."""
        if self._stop_requested_at is None and self._process is not None:
            self._stop_requested_at = time.monotonic()
            self._process.terminate()

    @property
    def is_stopping(self) -> bool:
        return self._stop_requested_at is not None

    def status(self) -> int | None:
        """Return the exit status as a shell does once the run has ended, else `None`.

        A run that does not stop in time is killed.
        """
        assert self._process is not None
        if (
            self._stop_requested_at is not None
            and time.monotonic() - self._stop_requested_at > GRACE_SECONDS
        ):
            with contextlib.suppress(psutil.NoSuchProcess):
                run = psutil.Process(self._process.pid)
                # DeepSpeed gives each rank its own session.
                for process in (run, *run.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
        status = self._process.poll()
        return 128 - status if status is not None and status < 0 else status

    def reason(self, status: int) -> str:
        """Why the run failed, in one line: its error, or its last output."""
        with open(self.folder / OUTPUT_FILE, "rb") as output:
            output.seek(self._output_from)
            lines = [
                line.strip()
                for line in re.split(r"[\r\n]+", output.read().decode(errors="replace"))
            ]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        messages = errors or [line for line in lines if line]
        if status > 128:
            with contextlib.suppress(ValueError):
                return f"ended by {signal.Signals(status - 128).name}" + (
                    f"; its last output: {messages[-1]}" if messages else ""
                )
        return messages[-1] if messages else f"ended with status {status} without output"
