"""What a run leaves on disk and how it is read back: a checkpoint is a folder that exists whole or not at all.

Written beside (`.tmp-step-N`), flushed, hashed, agreed on by all ranks, then renamed to `step-N`, whose MANIFEST.json
names every file with its size and SHA-256. Read: the newest step that is whole for every rank that sees it. A kill, a
full disk or a flipped bit costs the checkpoint in the making, never one that was made. Ranks on hosts that do not see
the run folder send their files to the first rank and get copies of what they must read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from pipeline.checkpoint.engine_state import load_engine, save_engine
from pipeline.checkpoint.manifest import damage, describe, read_manifest
from pipeline.checkpoint.random_states import random_states, restore_random_states
from pipeline.checkpoint.transfer import collect, local_copy, private_folder
from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.engine.engine import Engine
from pipeline.files import flush
from pipeline.metrics import METRICS
from pipeline.models.ema import ExponentialMovingAverage
from pipeline.models.weights import SavedNetwork, read_network, write_network
from pipeline.run_folder import (
    CHECKPOINTS_DIR,
    GENERATOR_EMA_FILE,
    GENERATOR_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    checkpoint_dir,
    checkpoint_steps,
)

Result = TypeVar("Result")
VISIBLE_SECONDS = 90  # longer than NFS keeps what it knows of a folder


@dataclass
class Progress:
    """How far a run has come; with the weights and the seed all that continuing takes."""

    step: int = 0  # optimizer updates done
    best_scores: dict[str, float] | None = None  # of the best validation, by metric
    best_step: int | None = None
    stale_validations: int = 0  # since the best
    validated_step: int | None = None  # the last validation
    layout: str = ""  # of the activations: channels_last or contiguous; it decides the rounding

    def as_state(self) -> dict[str, Any]:
        """As plain values. Each best score has a key of its own; `best_psnr` and `best_lpips` are always there."""
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
        """From plain values, of any version. Scores of metrics that are not in the table any more are left out."""
        known = {field.name: state[field.name] for field in fields(Progress) if field.name in state}
        scores = {name: state[f"best_{metric.key}"] for name, metric in METRICS.items()
                  if state.get(f"best_{metric.key}") is not None}
        return Progress(**known, best_scores=scores or None)


class SaveError(Exception):
    """A checkpoint could not be written; the ones before are untouched."""


@dataclass(frozen=True)
class Contents:
    """Everything that goes into a checkpoint besides `Progress`."""

    engines: Mapping[str, Engine]
    ema: ExponentialMovingAverage
    generator: SavedNetwork  # describes the network; its state_dict is filled in here
    identity: Mapping[str, Any]  # of the run: recipe, ds_config, dataset; what a continuation must agree on
    sees_run_dir: bool = True  # this rank; see `run_disk`


def save(run_dir: Path, progress: Progress, contents: Contents, ranks: Ranks) -> None:
    """Commit a checkpoint of `progress.step`; all ranks call it together.

    Raises `SaveError` on every rank, the half-written folder gone, when any rank could not write.
    """
    final = checkpoint_dir(run_dir, progress.step)
    if ranks.agree(ranks.is_first and _is_saved(final, progress)):
        return
    aside = final.with_name(f".tmp-{final.name}")
    try:
        with ExitStack() as stack:
            own = _insist(lambda: _make_folders(aside, contents, ranks, stack), ranks)
            failures = [save_engine(engine, own, name) for name, engine in contents.engines.items()]  # all ranks, each
            _refuse(next((failure for failure in failures if failure), ""), ranks)
            _insist(lambda: _write_own_files(own, progress, contents, ranks), ranks)
            _refuse(collect(own, aside, contents.sees_run_dir, ranks), ranks)
            written = set().union(*ranks.gather(_names(aside) if contents.sees_run_dir else set()))
            if ranks.is_first:
                commit = partial(_commit, aside, final, progress, contents, ranks, written)
            _insist(commit if ranks.is_first else lambda: None, ranks)
    except SaveError:
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _insist(action: Callable[[], Result], ranks: Ranks) -> Result:
    """Run `action`, which waits for no other rank, on every rank; `SaveError` on all if the disk refused one."""
    failure, result = "", None
    try:
        result = action()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        failure = str(error) or type(error).__name__
    _refuse(failure, ranks)
    return cast(Result, result)


def _refuse(failure: str, ranks: Ranks) -> None:
    """Raise `SaveError` on every rank if one has a `failure` to tell."""
    failures = [failure for failure in ranks.gather(failure) if failure]
    if failures:
        raise SaveError(failures[0])


def _is_saved(final: Path, progress: Progress) -> bool:
    """Whether `final` is a checkpoint that says all of `progress` (a validation may have come after it)."""
    return (final / MANIFEST_FILE).is_file() and _read_progress(final) == progress


def _make_folders(aside: Path, contents: Contents, ranks: Ranks, stack: ExitStack) -> Path:
    """The folder that this rank writes into: `aside`, or one of its own where that is not seen."""
    if ranks.is_first:
        _clear_away(aside.parent)
    own = aside if contents.sees_run_dir else private_folder(stack)
    for name in contents.engines:
        if ranks.is_first or not contents.sees_run_dir:
            (own / name).mkdir(parents=True)
    return own


def _clear_away(checkpoints: Path) -> None:
    """Remove what was never committed, or removed by half."""
    for stale in checkpoints.glob(".tmp-step-*"):
        shutil.rmtree(stale)
    for half_removed in checkpoints.glob("step-*"):
        if not (half_removed / MANIFEST_FILE).exists():
            shutil.rmtree(half_removed)


def _write_own_files(own: Path, progress: Progress, contents: Contents, ranks: Ranks) -> None:
    torch.save(random_states(), own / f"random-rank-{ranks.rank:05d}.pt")
    flush(own / f"random-rank-{ranks.rank:05d}.pt")
    if not ranks.is_first:
        return
    generator = contents.engines["generator"].module
    for file, network in ((GENERATOR_FILE, generator), (GENERATOR_EMA_FILE, contents.ema.network)):
        _write_generator(own / file, network, progress.step, contents)
    state = progress.as_state() | {"ema_updates": contents.ema.num_updates, "world_size": ranks.world_size}
    (own / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")


def _write_generator(file: Path, network: nn.Module, step: int, contents: Contents) -> None:
    described = contents.generator
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {**described.metadata, "step": str(step)}
    write_network(file, SavedNetwork(described.name, described.scale, described.params, tensors, metadata))


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _wait_for(folder: Path, names: set[str]) -> None:
    """Until this host sees what others have written: a network disk may show it late."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while missing := names - _names(folder):
        if time.monotonic() > deadline:
            raise OSError(f"{folder} does not show {min(missing)}, which another host has written; see how that disk "
                          "is mounted")
        time.sleep(0.5)


def _commit(aside: Path, final: Path, progress: Progress, contents: Contents, ranks: Ranks, written: set[str]) -> None:
    _wait_for(aside, written)
    for path in (p for p in aside.rglob("*") if p.is_file()):
        flush(path)
    manifest = {"step": progress.step, "world_size": ranks.world_size, "identity": contents.identity,
                "files": describe(aside)}
    (aside / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
    flush(aside / MANIFEST_FILE)
    for folder in [aside, *(p for p in aside.rglob("*") if p.is_dir())]:
        flush(folder)
    replaced = final.with_name(f".old-{final.name}")
    if final.exists():
        os.rename(final, replaced)
    os.rename(aside, final)
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(run_dir: Path, keep: int, best_step: int | None) -> None:
    """Remove all checkpoints but the newest `keep` and the best. One rank calls it."""
    for step in checkpoint_steps(run_dir)[:-keep]:
        if step != best_step:
            folder = checkpoint_dir(run_dir, step)
            with suppress(OSError):  # without its manifest it is no checkpoint any more, whatever happens next
                (folder / MANIFEST_FILE).unlink()
                shutil.rmtree(folder)


def newest_whole(run_dir: Path, ranks: Ranks, say: Any = print, sees_run_dir: bool = True) -> int | None:
    """The newest step whose checkpoint every rank that sees the run folder finds whole; None in a new run.

    Damaged ones newer than it are named and renamed to `damaged-step-N`, out of the way of the next save. Raises
    `UserError` where there are checkpoints but all are damaged.
    """
    ranks.on_all_ranks(lambda: _finish_replacing(run_dir) if ranks.is_first else None)
    steps = ranks.agree(checkpoint_steps(run_dir))
    damaged = []
    for step in reversed(steps):
        folder = checkpoint_dir(run_dir, step)
        fault = ranks.on_all_ranks(lambda folder=folder: damage(folder) if sees_run_dir else "")
        faults = [fault for fault in ranks.gather(fault) if fault]
        if not faults:
            for other in damaged if ranks.is_first else ():
                shutil.rmtree(other.with_name(f"damaged-{other.name}"), ignore_errors=True)
                other.rename(other.with_name(f"damaged-{other.name}"))
            return step
        damaged.append(folder)
        if ranks.is_first:
            say(f"checkpoint of step {step} is damaged ({faults[0]}); trying the one before")
    if steps:
        raise UserError(f"every checkpoint in {run_dir / CHECKPOINTS_DIR} is damaged; start afresh with --reset, which "
                        "keeps the old run aside")
    return None


def _finish_replacing(run_dir: Path) -> None:
    """Put back a checkpoint whose replacement was cut off between its two renames."""
    for replaced in (run_dir / CHECKPOINTS_DIR).glob(".old-step-*"):
        final = replaced.with_name(replaced.name.removeprefix(".old-"))
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)


def read_progress(run_dir: Path, step: int) -> Progress:
    """Of a whole checkpoint."""
    return _read_progress(checkpoint_dir(run_dir, step))


def _read_progress(folder: Path) -> Progress:
    return Progress.of_state(json.loads((folder / STATE_FILE).read_text()))


def load(run_dir: Path, step: int, contents: Contents, ranks: Ranks) -> Progress:
    """Put the checkpoint of `step` into the engines and the EMA; all ranks call it together.

    Raises `RuntimeError` if the ranks' weights differ afterwards.
    """
    folder = checkpoint_dir(run_dir, step)
    files = read_manifest(run_dir, step)["files"] if ranks.is_first else {}
    with local_copy(folder, files, contents.sees_run_dir, ranks) as place:
        progress = _load(place, contents, ranks)
    hashes = ranks.gather([weight_hash(engine.module) for engine in contents.engines.values()])
    if any(other != hashes[0] for other in hashes):
        raise RuntimeError(f"ranks disagree on the weights of step {step} after loading: {hashes}")
    return progress


def _load(folder: Path, contents: Contents, ranks: Ranks) -> Progress:
    for name, engine in contents.engines.items():
        load_engine(engine, folder, name)
    averaged = read_network(folder / GENERATOR_EMA_FILE).state_dict
    contents.ema.network.load_state_dict(averaged)
    contents.ema.num_updates = json.loads((folder / STATE_FILE).read_text())["ema_updates"]
    states = folder / f"random-rank-{ranks.rank:05d}.pt"
    if states.is_file():  # a rank that was not there before starts with its own
        restore_random_states(torch.load(states, weights_only=True))
    return _read_progress(folder)


def weight_hash(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, names, types and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
