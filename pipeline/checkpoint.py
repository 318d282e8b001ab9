"""What a run leaves on disk and how it is read back: a checkpoint is a folder that exists whole or not at all.

Written beside (`.tmp-step-N`), flushed, hashed, agreed on by all ranks, then renamed to `step-N`, whose MANIFEST.json
names every file with its size and SHA-256. Read: the newest step that is whole for every rank. A kill, a full disk or
a flipped bit costs the checkpoint in the making, never one that was made.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.cli import UserError
from pipeline.ema import ExponentialMovingAverage
from pipeline.engine_files import load_engine, save_engine
from pipeline.files import flush
from pipeline.models.weights import SavedNetwork, read_network, write_network
from pipeline.ranks import Ranks
from pipeline.run_folder import (
    CHECKPOINTS_DIR,
    GENERATOR_EMA_FILE,
    GENERATOR_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    checkpoint_dir,
    checkpoint_steps,
)


@dataclass
class Progress:
    """How far a run has come; with the weights and the seed all that continuing takes."""

    step: int = 0  # optimizer updates done
    best_psnr: float | None = None  # of the best validation, dB
    best_lpips: float | None = None  # likewise, if it is measured
    best_step: int | None = None
    stale_validations: int = 0  # since the best
    validated_step: int | None = None  # the last validation
    layout: str = ""  # of the activations: channels_last or contiguous; it decides the rounding


class SaveError(Exception):
    """A checkpoint could not be written; the ones before are untouched."""


@dataclass(frozen=True)
class Contents:
    """Everything that goes into a checkpoint besides `Progress`."""

    engines: Mapping[str, Any]
    ema: ExponentialMovingAverage
    generator: SavedNetwork  # describes the network; its state_dict is filled in here
    identity: Mapping[str, Any]  # of the run: recipe, ds_config, dataset; what a continuation must agree on


def save(run_dir: Path, progress: Progress, contents: Contents, ranks: Ranks) -> None:
    """Commit a checkpoint of `progress.step`; all ranks call it together.

    Raises `SaveError` on every rank, the half-written folder gone, when any rank could not write.
    """
    final = checkpoint_dir(run_dir, progress.step)
    if ranks.agree(_is_saved(final, progress)):
        return
    aside = final.with_name(f".tmp-{final.name}")
    failure = _attempt(lambda: _make_folders(aside, contents), only_if=ranks.is_first)
    if not any(ranks.gather(failure)):
        troubles = [save_engine(engine, aside, name) for name, engine in contents.engines.items()]  # all ranks, each
        troubles.append(_attempt(lambda: _write_own_files(aside, progress, contents, ranks)))
        failure = next((trouble for trouble in troubles if trouble), "")
    failures = [f for f in ranks.gather(failure) if f]
    if not failures:
        failure = _attempt(lambda: _commit(aside, final, progress, contents, ranks), only_if=ranks.is_first)
        failures = [f for f in ranks.gather(failure) if f]
    if failures:
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise SaveError(failures[0])


def _is_saved(final: Path, progress: Progress) -> bool:
    """Whether `final` is a checkpoint that says all of `progress` (a validation may have come after it)."""
    return (final / MANIFEST_FILE).is_file() and _read_progress(final) == progress


def _attempt(action: Any, *, only_if: bool = True) -> str:
    """Empty, or why the disk refused."""
    if not only_if:
        return ""
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        return str(error) or type(error).__name__
    return ""


def _make_folders(aside: Path, contents: Contents) -> None:
    for stale in aside.parent.glob(".tmp-step-*"):
        shutil.rmtree(stale)
    for half_removed in aside.parent.glob("step-*"):
        if not (half_removed / MANIFEST_FILE).exists():
            shutil.rmtree(half_removed)
    for name in contents.engines:
        (aside / name).mkdir(parents=True)


def _write_own_files(aside: Path, progress: Progress, contents: Contents, ranks: Ranks) -> None:
    torch.save(_random_states(), aside / f"random-rank-{ranks.rank:05d}.pt")
    flush(aside / f"random-rank-{ranks.rank:05d}.pt")
    if not ranks.is_first:
        return
    generator = contents.engines["generator"].module
    for file, network in ((GENERATOR_FILE, generator), (GENERATOR_EMA_FILE, contents.ema.network)):
        _write_generator(aside / file, network, progress.step, contents)
    state = asdict(progress) | {"ema_updates": contents.ema.num_updates, "world_size": ranks.world_size}
    (aside / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")


def _write_generator(file: Path, network: nn.Module, step: int, contents: Contents) -> None:
    described = contents.generator
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {**described.metadata, "step": str(step)}
    write_network(file, SavedNetwork(described.name, described.scale, described.params, tensors, metadata))


def _commit(aside: Path, final: Path, progress: Progress, contents: Contents, ranks: Ranks) -> None:
    files = {}
    for path in sorted(p for p in aside.rglob("*") if p.is_file()):
        flush(path)
        files[path.relative_to(aside).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"step": progress.step, "world_size": ranks.world_size, "identity": contents.identity, "files": files}
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


def newest_whole(run_dir: Path, ranks: Ranks, say: Any = print) -> int | None:
    """The newest step whose checkpoint every rank finds whole; None in a new run.

    Damaged ones newer than it are named and renamed to `damaged-step-N`, out of the way of the next save. Raises
    `UserError` where there are checkpoints but all are damaged.
    """
    ranks.together(lambda: _finish_replacing(run_dir) if ranks.is_first else None)
    steps = ranks.agree(checkpoint_steps(run_dir))
    damaged = []
    for step in reversed(steps):
        folder = checkpoint_dir(run_dir, step)
        faults = [fault for fault in ranks.gather(ranks.together(lambda folder=folder: damage(folder))) if fault]
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


def damage(folder: Path) -> str:
    """What is wrong with the checkpoint `folder`; empty if every file is as its manifest says.

    A disk that cannot be read (`OSError`) is not damage, and is raised.
    """
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE}: {error or type(error).__name__}"
    return ""


def read_manifest(run_dir: Path, step: int) -> dict[str, Any]:
    """Of a whole checkpoint: `step`, `world_size`, `identity` of the run, `files`."""
    return json.loads((checkpoint_dir(run_dir, step) / MANIFEST_FILE).read_text())


def read_progress(run_dir: Path, step: int) -> Progress:
    """Of a whole checkpoint."""
    return _read_progress(checkpoint_dir(run_dir, step))


def _read_progress(folder: Path) -> Progress:
    state = json.loads((folder / STATE_FILE).read_text())
    return Progress(**{field.name: state[field.name] for field in fields(Progress) if field.name in state})


def load(run_dir: Path, step: int, contents: Contents, ranks: Ranks) -> Progress:
    """Put the checkpoint of `step` into the engines and the EMA; all ranks call it together.

    Raises `RuntimeError` if the ranks' weights differ afterwards.
    """
    folder = checkpoint_dir(run_dir, step)
    for name, engine in contents.engines.items():
        load_engine(engine, folder, name)
    averaged = read_network(folder / GENERATOR_EMA_FILE).state_dict
    contents.ema.network.load_state_dict(averaged)
    contents.ema.num_updates = json.loads((folder / STATE_FILE).read_text())["ema_updates"]
    states = folder / f"random-rank-{ranks.rank:05d}.pt"
    if states.is_file():  # a rank that was not there before starts with its own
        _restore_random_states(torch.load(states, weights_only=True))
    hashes = ranks.gather([weight_hash(engine.module) for engine in contents.engines.values()])
    if any(other != hashes[0] for other in hashes):
        raise RuntimeError(f"ranks disagree on the weights of step {step} after loading: {hashes}")
    return read_progress(run_dir, step)


def weight_hash(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, names, types and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _random_states() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {"torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "python": [version, list(internal), gauss_next]}


def _restore_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_310(file)


def _sha256_310(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
