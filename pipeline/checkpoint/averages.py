"""Snapshots of a run's power-function averages, and averages of any length made from them.

See `models/posthoc_ema.py`. The two averages are files of every checkpoint. A snapshot is a folder
in `averages/` of the run folder with hard links to these files, so that they outlive the checkpoint
at no cost; where the disk has no hard links, they are copied. The folder gets its name last, and
has an index with the checkpoint's hashes.

Only what a checkpoint has committed becomes a snapshot, and a run that starts or continues first
removes the snapshots later than its step. So none is of a part of the run that was left, whether
after a divergence, by `--from-step`, or because a checkpoint was damaged. A snapshot that a kill
has prevented is made after the next save, from the checkpoint. Only the first rank calls the
functions that write.

The averages stay in float32. Factors of short averages are up to 15 in all and of both signs: they
would make float16's rounding several ten-thousandths of the weights.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.checkpoint.pruning import begin_folder, prune, remove_checkpoint, tidy
from pipeline.checkpoint_index import DamagedError, damage, read_index, write_index
from pipeline.cli import UserError
from pipeline.files import flush, parse_json, reason
from pipeline.models.posthoc_ema import (
    LARGEST_ERROR,
    WIDEST,
    WIDTHS,
    coefficients,
    is_snapshot_step,
)
from pipeline.models.weights import SavedNetwork, read_network
from pipeline.run_folder import (
    AVERAGES_DIR,
    GENERATOR_EMA_FILE,
    STATE_FILE,
    WRITING,
    checkpoint_dir,
    checkpoint_steps,
    newest_stage,
    power_average_file,
)

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
USUAL_WIDTHS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.10, 0.13, 0.16, 0.20, 0.25)
"""Lengths that `--ema auto` compares, each about a quarter longer than the one before."""


@dataclass(frozen=True)
class SnapshotRule:
    """Which steps of a run have a snapshot, and how many are kept."""

    most: int
    total_steps: int

    def includes(self, step: int) -> bool:
        return is_snapshot_step(step, self.total_steps, self.most)


def store_averages(run_dir: Path, rule: SnapshotRule | None) -> list[str]:
    """Make the snapshots that are due and missing, and keep the newest; return what to report."""
    if rule is None:
        return []
    notes, stored = tidy(run_dir, AVERAGES_DIR), checkpoint_steps(run_dir, AVERAGES_DIR)
    for step in checkpoint_steps(run_dir):
        # The checkpoint of the best step may be older than all snapshots that are kept.
        is_old = len(stored) >= rule.most and step < stored[-rule.most]
        if rule.includes(step) and step not in stored and not is_old:
            try:
                _store(run_dir, step)
            except (OSError, DamagedError) as error:
                why = reason(error) if isinstance(error, OSError) else str(error)
                notes.append(f"the averages of step {step} could not be kept: {why}")
    return notes + prune(run_dir, rule.most, kind=AVERAGES_DIR)


def _store(run_dir: Path, step: int) -> None:
    source = checkpoint_dir(run_dir, step)
    final = checkpoint_dir(run_dir, step, AVERAGES_DIR)
    index = read_index(source)
    names = [STATE_FILE, *map(power_average_file, WIDTHS)]
    # The checkpoint's own hashes: if a file has changed since, the snapshot is seen to be damaged.
    index["files"] = {name: index["files"][name] for name in names}
    aside = final.with_name(WRITING + final.name)
    begin_folder(aside)
    for name in names:
        try:
            os.link(source / name, aside / name)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            shutil.copyfile(source / name, aside / name)
            flush(aside / name)
    write_index(aside, index)  # also flushes the names of the files
    os.rename(aside, final)
    flush(final.parent)


def remove_averages_after(run_dir: Path, step: int) -> None:
    """Remove the snapshots later than `step`, from which the run continues (0: a new run)."""
    for stored in checkpoint_steps(run_dir, AVERAGES_DIR):
        if stored > step:
            remove_checkpoint(checkpoint_dir(run_dir, stored, AVERAGES_DIR))


@dataclass(frozen=True)
class Stored:
    """A power-function average on disk."""

    updates: int
    """Updates that it averages."""
    width: float
    """Its sigma_rel."""
    path: Path


@dataclass(frozen=True)
class Reconstructed:
    """An average of a length that was chosen after training."""

    saved: SavedNetwork
    width: float
    """Its sigma_rel."""
    length: int
    """Standard deviation of its weights over the updates; `1 / (1 - ema_decay)` corresponds."""
    error: float
    """See `posthoc_ema.coefficients`."""
    snapshots: int
    """How many steps' averages it is made from."""

    def metadata(self) -> dict[str, str]:
        """Return the origin of the weights, for the metadata of a file."""
        return {
            "weights": f"averaged (post-hoc EMA, sigma_rel {self.width:.4g})",
            "ema_sigma_rel": f"{self.width:.4g}",
            "ema_length": str(self.length),
            "ema_error": f"{self.error:.2g}",
            "ema_snapshots": str(self.snapshots),
        }


def stored_averages(run_dir: Path, step: int) -> list[Stored]:
    """Return the averages from which those that end at the checkpoint of `step` can be made.

    They are those of the snapshots before it and its own. Damaged snapshots are left out. Raises
    `UserError` if the run has none.
    """
    run_dir = newest_stage(run_dir)
    own = checkpoint_dir(run_dir, step)
    if not (own / power_average_file(WIDTHS[0])).is_file():
        raise UserError(
            f"run {str(run_dir)!r} has no averages to choose a length from; train with "
            "posthoc_ema=on, or omit --ema"
        )
    returns = _state(own).get("returns", 0)
    folders = []
    for stored in checkpoint_steps(run_dir, AVERAGES_DIR):
        folder = checkpoint_dir(run_dir, stored, AVERAGES_DIR)
        if stored < step and not damage(folder) and _state(folder).get("returns", 0) <= returns:
            folders.append(folder)
    return [
        Stored(_state(folder)["ema_updates"], width, folder / power_average_file(width))
        for folder in (*folders, own)
        for width in WIDTHS
    ]


def _state(folder: Path) -> dict[str, int]:
    return parse_json((folder / STATE_FILE).read_bytes())


def usable_widths(stored: Sequence[Stored]) -> list[float]:
    """Return those of `USUAL_WIDTHS` that can be made from `stored`."""
    found = zip(USUAL_WIDTHS, _factors(stored, USUAL_WIDTHS), strict=True)
    return [width for width, (_, error) in found if error <= LARGEST_ERROR]


def chosen_width(text: str, stored: Sequence[Stored]) -> float:
    """Return the sigma_rel that a user asks for: itself, or from 1 on a length in updates.

    Raises `UserError` if it is no such number or cannot be made from `stored`.
    """
    updates = max(one.updates for one in stored)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise UserError(
            f"--ema {text}: give auto, tracked, a share of the run such as 0.07, or a length in "
            "updates such as 500"
        )
    width = number if number < 1 else number / updates
    if width > WIDEST:
        raise UserError(
            f"--ema {text}: the longest average, of all {updates} updates alike, is {WIDEST:.3f} "
            f"or {int(WIDEST * updates)} updates; choose a smaller number"
        )
    ((_, error),) = _factors(stored, [width])
    if error > LARGEST_ERROR:
        usable = usable_widths(stored)
        way_out = (
            f"choose from {usable[0]:g} to {usable[-1]:g}" if usable else "choose a later step"
        )
        raise UserError(
            f"--ema {text}: the {len(stored) // len(WIDTHS)} snapshots up to this step would give "
            f"it with an error of {error:.0%}, above {LARGEST_ERROR:.0%}; {way_out}"
        )
    return width


def reconstruct(
    run_dir: Path, step: int, stored: Sequence[Stored], widths: Sequence[float]
) -> list[Reconstructed]:
    """Return the averages of the relative `widths` that end at the checkpoint of `step`.

    Buffers, such as batch norm's statistics, are those of the run's own average (EMA). Each file is
    read once.
    """
    base = read_network(checkpoint_dir(newest_stage(run_dir), step) / GENERATOR_EMA_FILE)
    parameters = dict(base.build().named_parameters())
    found = _factors(stored, widths)
    sums: list[dict[str, Tensor]] = [
        {name: base.state_dict[name].float() * 0 for name in parameters} for _ in widths
    ]
    for place, one in enumerate(stored):
        averaged = read_network(one.path).state_dict
        for (factors, _), total in zip(found, sums, strict=True):
            for name, tensor in total.items():
                tensor.add_(averaged[name], alpha=float(factors[place]))
    updates = max(one.updates for one in stored)
    return [
        Reconstructed(
            replace(base, state_dict={**base.state_dict, **total}),
            width,
            round(width * updates),
            error,
            len(stored) // len(WIDTHS),
        )
        for width, total, (_, error) in zip(widths, sums, found, strict=True)
    ]


def _factors(stored: Sequence[Stored], wanted: Sequence[float]) -> list[tuple[np.ndarray, float]]:
    ends, widths = zip(*((one.updates, one.width) for one in stored), strict=True)
    return coefficients(ends, widths, max(ends), wanted)
