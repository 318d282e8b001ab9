"""Read checkpoints back from a run folder; `saving.py` writes them.

A run continues from the newest step whose folder is intact (according to its MANIFEST.json) for
every rank that sees it. Ranks on hosts that do not see the run folder receive copies of what they
must read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.averages import SnapshotRule
from pipeline.checkpoint.engine_state import load_engine
from pipeline.checkpoint.progress import Progress, progress_in
from pipeline.checkpoint.pruning import finish_replacing, set_aside, tidy
from pipeline.checkpoint.random_states import restore_random_states
from pipeline.checkpoint.transfer import local_copy
from pipeline.checkpoint_index import damage, read_index
from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.engine.engine import Engine
from pipeline.models.ema import ExponentialMovingAverage
from pipeline.models.weights import SavedNetwork, read_network
from pipeline.run_folder import (
    CHECKPOINTS_DIR,
    GENERATOR_EMA_FILE,
    STATE_FILE,
    checkpoint_dir,
    checkpoint_steps,
    power_average_file,
)


@dataclass(frozen=True)
class Contents:
    """Everything that goes into a checkpoint besides `Progress`."""

    engines: Mapping[str, Engine]
    ema: ExponentialMovingAverage
    generator: SavedNetwork  # describes the network; its state_dict is filled in when saving
    # Recipe, ds_config and dataset of the run. A run must have the same identity to continue.
    identity: Mapping[str, Any]
    sees_run_dir: bool = True  # whether this rank does; see `transfer.sees_run_dir`
    snapshots: SnapshotRule | None = None  # of `ema.power`


def newest_whole(
    run_dir: Path, ranks: Ranks, say: Any = print, sees_run_dir: bool = True
) -> int | None:
    """Return the newest step whose checkpoint is intact for every rank that sees the run folder.

    None in a new run. Newer, damaged checkpoints are reported and renamed to `damaged-step-N`, out
    of the way of the next save. Raises `UserError` if all checkpoints are damaged. All ranks call
    it together.
    """
    # Only the first rank changes the folder, before any rank lists it.
    restored = ranks.on_all_ranks(lambda: finish_replacing(run_dir) if ranks.is_first else [])
    # The first rank's list counts: a network disk may show other hosts an older one. Checkpoints
    # are ordered by step and never by time, since the clocks of hosts differ.
    steps = ranks.agree(checkpoint_steps(run_dir))
    damaged, found = {}, None
    for step in reversed(steps):
        folder = checkpoint_dir(run_dir, step)
        # Every host reads for itself, because a disk may be readable on one host and not on
        # another. All ranks agree first on disk errors, which are not damage, and then on what is
        # damaged.
        fault = ranks.on_all_ranks(lambda folder=folder: damage(folder) if sees_run_dir else "")
        faults = [fault for fault in ranks.gather(fault) if fault]
        if not faults:
            found = step
            break
        damaged[folder] = faults[0]
        if ranks.is_first:
            say(f"checkpoint of step {step} is damaged ({faults[0]}); trying the previous one")
    if steps and found is None:
        raise UserError(
            f"every checkpoint in {run_dir / CHECKPOINTS_DIR} is damaged; start a new run with "
            "--reset, which keeps the old one"
        )
    # Renamed only now that an intact one is found: a run that refuses to start changes nothing.
    if ranks.is_first:
        renamed = [set_aside(folder, fault) for folder, fault in damaged.items()]
        for note in [*restored, *renamed, *tidy(run_dir)]:
            say(f"note: {note}")
    return found


def load(run_dir: Path, step: int, contents: Contents, ranks: Ranks) -> Progress:
    """Load the checkpoint of `step` into the engines and the EMA; all ranks call it together.

    Raises `RuntimeError` if the ranks' weights differ afterwards.
    """
    folder = checkpoint_dir(run_dir, step)
    files = read_index(folder)["files"] if ranks.is_first else {}
    with local_copy(folder, files, contents.sees_run_dir, ranks) as place:
        progress = _load(place, contents, ranks)
    # Ranks may have read different copies or different shards. Ranks with different weights would
    # keep training without an error, because they only exchange gradients.
    hashes = ranks.gather([weight_hash(engine.module) for engine in contents.engines.values()])
    if any(other != hashes[0] for other in hashes):
        raise RuntimeError(f"ranks disagree on the weights of step {step} after loading: {hashes}")
    return progress


def _load(folder: Path, contents: Contents, ranks: Ranks) -> Progress:
    for name, engine in contents.engines.items():
        load_engine(engine, folder, name)
    averaged = read_network(folder / GENERATOR_EMA_FILE).state_dict
    contents.ema.network.load_state_dict(averaged)
    for width in contents.ema.power:
        power = read_network(folder / power_average_file(width)).state_dict
        contents.ema.load_power_state(width, power)
    contents.ema.num_updates = json.loads((folder / STATE_FILE).read_text())["ema_updates"]
    states = folder / f"random-rank-{ranks.rank:05d}.pt"
    # A rank that did not exist when the checkpoint was saved keeps its fresh states.
    if states.is_file():
        restore_random_states(torch.load(states, weights_only=True))
    return progress_in(folder)


def weight_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's parameters and buffers: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
