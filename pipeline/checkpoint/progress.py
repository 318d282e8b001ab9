"""How far a run has come, and whether that is its end. Needs no torch: a finished run says so
without importing it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipeline.metrics import METRICS
from pipeline.run_folder import STATE_FILE, checkpoint_dir


@dataclass
class Progress:
    """How far a run has come; with the weights and the seed all that continuing takes."""

    step: int = 0  # optimizer updates done
    best_scores: dict[str, float] | None = None  # of the best validation, by metric
    best_step: int | None = None
    stale_validations: int = 0  # since the best
    validated_step: int | None = None  # the last validation
    layout: str = ""  # of the activations: channels_last or contiguous; it decides the rounding
    kernel: str = (
        ""  # of the depthwise convolutions: torch or native, which round differently; "" was torch
    )
    cpu_degradation: str = (
        "dali"  # what makes LR on a CPU: host, where it can, or dali, as in runs that do not say it
    )

    def is_finished(self, total_steps: int, patience: int) -> bool:
        """Whether all steps are done and measured, or the patience (0: endless) is used up."""
        if self.step >= total_steps:
            return self.validated_step == self.step
        return self.is_out_of_patience(patience)

    def is_out_of_patience(self, patience: int) -> bool:
        """Whether as many validations in a row as `patience` (0: endless) have brought nothing
        better."""
        return 0 < patience <= self.stale_validations

    def as_of_now(self) -> Progress:
        """A copy, which stays as it is while the run goes on."""
        return replace(
            self, best_scores=None if self.best_scores is None else dict(self.best_scores)
        )

    def as_state(self) -> dict[str, Any]:
        """As plain values. Each best score has a key of its own; `best_psnr` and `best_lpips` are
        always there."""
        state: dict[str, Any] = {}
        for field in fields(self):
            if field.name == "best_scores":
                scores = {"psnr_y": None, "lpips": None, **(self.best_scores or {})}
                state |= {f"best_{METRICS[name].key}": value for name, value in scores.items()}
            else:
                state[field.name] = getattr(self, field.name)
        return state

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> Progress:
        """From plain values, of any version. Scores of metrics that are not in the table any more
        are left out."""
        known = {field.name: state[field.name] for field in fields(Progress) if field.name in state}
        scores = {
            name: state[f"best_{metric.key}"]
            for name, metric in METRICS.items()
            if state.get(f"best_{metric.key}") is not None
        }
        return Progress(**known, best_scores=scores or None)


def read_progress(run_dir: Path, step: int) -> Progress:
    """That of a whole checkpoint."""
    return progress_in(checkpoint_dir(run_dir, step))


def progress_in(folder: Path) -> Progress:
    """That of the checkpoint in `folder`."""
    return Progress.of_state(json.loads((folder / STATE_FILE).read_text()))
