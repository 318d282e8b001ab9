"""Logs of a run: JSON lines, TensorBoard, and Weights & Biases if enabled."""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.cli import say
from pipeline.files import AppendFile, parse_json
from pipeline.images import as_bytes
from pipeline.run_folder import LOG_FILE

TENSORBOARD_DIR = "tensorboard"
MOST_UNWRITTEN = 10_000  # lines of log.jsonl that are kept while the disk is full
MOST_VALUES = 1_000_000
"""Larger distributions are represented by this many evenly spaced values; torch computes quantiles
of at most 2^24."""
_numbers = itertools.count()  # of the event files of this process


class Tracker(Protocol):
    """Another destination for the same numbers and images. Its methods never raise."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, tag: str, pixels: np.ndarray) -> None: ...

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None: ...


class Journal:
    """Logs a run.

    Entries after `step` belong to lost work that will be repeated; they are dropped.
    """

    def __init__(
        self,
        log_dir: Path,
        step: int,
        warn: Callable[[str], None] = say,
        tracker: Tracker | None = None,
    ) -> None:
        self._warn, self._tracker = warn, tracker
        self._broken: set[str] = set()
        path = log_dir / LOG_FILE
        with self.warn_on_error():
            _drop_after(path, step)
        self._lines = AppendFile(path)
        self._unwritten: deque[bytes] = deque(maxlen=MOST_UNWRITTEN)  # lines
        self._board = _board(log_dir / TENSORBOARD_DIR, step)

    def log(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Write a JSON line, and a scalar `event/name` for every number."""
        plain = {  # JSON has no NaN
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._line({"event": event, "step": step, "time": round(time.time(), 3), **plain})
        scalars = {
            f"{event}/{name}": value
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        with self.warn_on_error():
            for tag, value in scalars.items():
                self._board.add_scalar(tag, value, step)
        if self._tracker:
            self._tracker.scalars(step, scalars)

    def picture(self, step: int, tag: str, image: Tensor) -> None:
        """Log an image: uint8 or uint16 (1, 3, height, width); shown in 8 bits."""
        image = as_bytes(image)
        with self.warn_on_error():
            self._board.add_image(tag, image[0].cpu(), step)
        if self._tracker:
            self._tracker.picture(step, tag, image[0].permute(1, 2, 0).cpu().numpy())

    def distribution(self, step: int, tag: str, values: Tensor) -> None:
        """Log a histogram, and the mean and the 5, 50 and 95 % quantiles as a JSON line.

        Nothing is logged if a value is not finite. If there are more than `MOST_VALUES`, a
        subset is used for histogram and quantiles; the mean is over all.
        """
        values = values.detach().float().flatten()
        if not torch.isfinite(values).all():
            return
        mean = values.mean().item()
        values = _some(values).cpu()
        low, median, high = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        self.histogram(step, tag, values)
        self._line(
            {
                "event": "distribution",
                "step": step,
                "name": tag,
                "mean": mean,
                "quantiles": [low, median, high],
            }
        )

    def histogram(self, step: int, tag: str, values: Tensor) -> None:
        """Log the histogram of the finite `values`; nothing if there are none."""
        values = _some(values.detach().float().flatten())
        values = values[torch.isfinite(values)].cpu()
        if not len(values):
            return
        with self.warn_on_error():
            self._board.add_histogram(tag, values, step)
        if self._tracker:
            self._tracker.histogram(step, tag, values.numpy())

    def _line(self, line: Mapping[str, Any]) -> None:
        self._unwritten.append(f"{json.dumps(line)}\n".encode())
        with self.warn_on_error():
            self._write_lines()

    def _write_lines(self) -> None:
        """Write the lines in order; those that a full disk does not take stay for the next call."""
        while self._unwritten:
            self._lines.write(self._unwritten[0])
            self._unwritten.popleft()

    @contextmanager
    def warn_on_error(self, what: str = "the log") -> Iterator[None]:
        """Turn an `OSError` into one warning per `what`: failing logs must not stop a run."""
        try:
            yield
        except OSError as error:
            if what not in self._broken:
                self._warn(
                    f"warning: {what} cannot be written: {error}; training continues; what could "
                    "not be written is missing"
                )
                self._broken.add(what)

    def close(self) -> None:
        with suppress(OSError):
            self._write_lines()
        with suppress(OSError):
            self._board.close()
        self._lines.close()


def _board(folder: Path, step: int) -> Any:
    """Return a SummaryWriter whose events are written at once, by the thread that logs them.

    tensorboard's own writer leaves that to a thread, which prints a traceback on a full disk and
    never writes again.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard import FileWriter, SummaryWriter

    class EventFile:
        def __init__(self) -> None:
            host, process = socket.gethostname(), os.getpid()
            name = f"events.out.tfevents.{time.time():010.0f}.{host}.{process}.{next(_numbers)}"
            self._file = AppendFile(folder / name)
            self._records = RecordWriter(self._file)
            # What lost work has logged after `step` is hidden by the second and the third.
            self._first = [
                Event(file_version="brain.Event:2"),
                Event(file_version="brain.Event:2", step=step + 1),
                Event(session_log=SessionLog(status=SessionLog.START), step=step + 1),
            ]

        def add_event(self, event: Event) -> None:
            while self._first:
                self._first[0].wall_time = time.time()
                self._records.write(self._first[0].SerializeToString())
                del self._first[0]
            self._records.write(event.SerializeToString())

        def flush(self) -> None: ...

        def close(self) -> None:
            self._file.close()

    class Writer(FileWriter):
        def __init__(self) -> None:
            self.event_writer = EventFile()

    class Board(SummaryWriter):
        def _get_file_writer(self) -> FileWriter:
            if self.file_writer is None:
                self.file_writer = Writer()
                self.all_writers = {self.log_dir: self.file_writer}
            return self.file_writer

    return Board(str(folder))


def _some(values: Tensor) -> Tensor:
    """Return `values` (flat), or at most `MOST_VALUES` of them, evenly spaced."""
    apart = -(-len(values) // MOST_VALUES)
    return values[:: apart | 1]  # an odd stride, so that all columns of an even width are sampled


def _drop_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):  # drops lines cut short by a kill as well
            if parse_json(line)["step"] <= step:
                kept.append(line)
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    aside.replace(path)


def duration(seconds: float) -> str:
    """Format seconds as `3:07:05` or `7:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
