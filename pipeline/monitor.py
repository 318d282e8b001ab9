"""What a run tells: one JSON line a log step, TensorBoard, and a line on the terminal. Only the first rank speaks."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cli import say
from pipeline.run_folder import LOG_FILE

TENSORBOARD_DIR = "tensorboard"
MOST_VALUES = 1_000_000
"""So many values, evenly apart, stand for a larger distribution; torch takes quantiles of at most 2^24."""


class Journal:
    """Writes down a run. What was logged after `step` belongs to lost work that will be done again: it is dropped."""

    def __init__(self, log_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        log_dir.mkdir(parents=True, exist_ok=True)
        self._path = log_dir / LOG_FILE
        _forget_after(self._path, step)
        self._lines = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._board = SummaryWriter(str(log_dir / TENSORBOARD_DIR), purge_step=step + 1, flush_secs=30)
        self._on_terminal = sys.stdout.isatty()
        self._line_open = False
        self._is_broken = False

    def log(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """One JSON line, and a TensorBoard scalar `event/name` for every number."""
        plain = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                 for name, value in values.items()}  # JSON knows no NaN
        line = {"event": event, "step": step, "time": round(time.time(), 3), **plain}
        with self._unstoppable():
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
        with self._unstoppable():
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(f"{event}/{name}", value, step)

    def picture(self, step: int, tag: str, image: Tensor) -> None:
        """A byte image (1, 3, height, width) into TensorBoard."""
        with self._unstoppable():
            self._board.add_image(tag, image[0].cpu(), step)

    def distribution(self, step: int, tag: str, values: Tensor) -> None:
        """A histogram into TensorBoard, and its mean and 5, 50 and 95 % quantiles as a JSON line.

        Of more than `MOST_VALUES` a part is taken, for the histogram and the quantiles; the mean is of all.
        """
        values = values.detach().float().flatten()
        if not torch.isfinite(values).all():
            return
        mean = values.mean().item()
        apart = -(-len(values) // MOST_VALUES)
        values = values[:: apart | 1].cpu()  # an odd stride, which meets all columns of an image of even width
        low, median, high = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        with self._unstoppable():
            self._board.add_histogram(tag, values, step)
        with self._unstoppable():
            line = {"event": "distribution", "step": step, "name": tag, "mean": mean,
                    "quantiles": [low, median, high]}
            self._lines.write(json.dumps(line) + "\n")

    @contextmanager
    def _unstoppable(self) -> Iterator[None]:
        """A log that cannot be written must not stop the run: that is said once, and checkpoints try on."""
        try:
            yield
        except OSError as error:
            if not self._is_broken:
                self.say(f"warning: the log cannot be written: {error}; training goes on without")
                self._is_broken = True

    def progress(self, text: str) -> None:
        """The line of progress: rewritten on a terminal, a new one in a file."""
        if self._on_terminal:
            with suppress(OSError, ValueError):
                print(f"\r\x1b[2K{text}", end="", flush=True)
            self._line_open = True
        else:
            say(text)

    def passing(self, text: str) -> None:
        """A word on what is being done, for terminals only: nothing that a log should keep."""
        if self._on_terminal:
            self.progress(text)

    def say(self, text: str) -> None:
        if self._line_open:
            say("")
            self._line_open = False
        say(text)

    def close(self) -> None:
        if self._line_open:
            say("")
        with suppress(OSError):
            self._board.close()
            self._lines.close()


def _forget_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):  # a line cut short by a kill goes too
            if json.loads(line)["step"] <= step:
                kept.append(line)
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    aside.replace(path)


def duration(seconds: float) -> str:
    """`3:07:05`, `7:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
