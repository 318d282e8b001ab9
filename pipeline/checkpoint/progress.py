"""How far a run has come and whether it is finished.

Imports no torch, so that a finished run is reported without importing it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pipeline.metrics import METRICS
from pipeline.run_folder import STATE_FILE, checkpoint_dir


@dataclass
class Progress:
    """How far a run has come. Together with weights and seed, all that is needed to continue."""

    step: int = 0  # optimizer updates done
    best_scores: dict[str, float] | None = None  # of the best validation, by metric
    best_step: int | None = None
    # Of the validation images' input, upscaled bicubically: number of images and mean scores.
    reference: dict[str, Any] = field(default_factory=dict)
    stale_validations: int = 0  # in a row without an improvement
    validated_step: int | None = None  # step of the last validation
    layout: str = ""  # memory format of activations, channels_last or contiguous; affects rounding
    # Kernel of the depthwise convolutions, torch or native, which round differently; "" was torch.
    kernel: str = ""
    # What makes LR on a CPU: host, or dali as in runs of versions that do not record it.
    cpu_degradation: str = "dali"
    # The rest is for runs that go back when they diverge, see `pipeline/training/healing.py`.
    healthy_step: int | None = None  # newest checkpoint after which the rule held for a window
    candidate_step: int | None = None  # a later checkpoint whose window has not passed yet
    returns: int = 0  # times the run had gone back to an earlier step before this checkpoint
    health: dict[str, Any] = field(default_factory=dict)  # what the health rule remembers
    # What the rule for the discriminator's turns remembers; empty without one.
    turns: dict[str, Any] = field(default_factory=dict)

    @property
    def pinned_steps(self) -> set[int]:
        """Checkpoints that must be kept besides the newest ones."""
        steps = (self.best_step, self.healthy_step, self.candidate_step)
        return {step for step in steps if step is not None}

    def is_finished(self, total_steps: int, patience: int) -> bool:
        """Whether all steps are done and validated, or `patience` (0: unlimited) is used up."""
        if self.step >= total_steps:
            return self.validated_step == self.step
        return self.is_out_of_patience(patience)

    def is_out_of_patience(self, patience: int) -> bool:
        """Whether the last `patience` validations (0: unlimited) brought no improvement."""
        return 0 < patience <= self.stale_validations

    def copy(self) -> Progress:
        """Return a copy that does not change while the run continues."""
        return copy.deepcopy(self)

    def as_state(self) -> dict[str, Any]:
        """Return plain values, with one key per best score; psnr and lpips are always present."""
        state: dict[str, Any] = {}
        for part in fields(self):
            if part.name == "best_scores":
                scores = {"psnr_y": None, "lpips": None, **(self.best_scores or {})}
                state |= {f"best_{METRICS[name].key}": value for name, value in scores.items()}
            else:
                state[part.name] = getattr(self, part.name)
        return state

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Progress:
        """Build from plain values of any version; drop scores of metrics that no longer exist."""
        known = {part.name: state[part.name] for part in fields(Progress) if part.name in state}
        scores = {
            name: state[f"best_{metric.key}"]
            for name, metric in METRICS.items()
            if state.get(f"best_{metric.key}") is not None
        }
        return Progress(**known, best_scores=scores or None)


def read_progress(run_dir: Path, step: int) -> Progress:
    """Read the progress that the checkpoint of `step` holds."""
    return progress_in(checkpoint_dir(run_dir, step))


def progress_in(folder: Path) -> Progress:
    """Read the progress that the checkpoint in `folder` holds."""
    return Progress.from_state(json.loads((folder / STATE_FILE).read_text()))
