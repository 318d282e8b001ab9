"""The last checkpoint of a run whose disk is full, on another disk: `--spill-dir`.

A run with a spill folder records it in `spill.json` in the run folder, with a token that no other
run has. So a checkpoint that was written there is found at the next start, even without the option
or after the run folder was renamed, and never by another run.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.checkpoint.pruning import begin_folder, make_way, remove_replaced, remove_unfinished
from pipeline.checkpoint.saving import require_space
from pipeline.checkpoint_index import damage
from pipeline.cli import UserError
from pipeline.files import flush, parse_json, reason, short_path, write_atomically
from pipeline.run_folder import (
    CHECKPOINTS_DIR,
    MANIFEST_FILE,
    WRITING,
    checkpoint_dir,
    checkpoint_size,
    checkpoint_steps,
)

SPILL_FILE = "spill.json"
RECORD_BYTES = 4096  # padded, so that it can be changed on a full disk


def prepare(run_dir: Path, spill_dir: Path) -> Path:
    """Return the run's own folder in `spill_dir`, after recording it; it is made when needed.

    Raises `UserError` if `spill_dir` cannot be written.
    """
    root = spill_dir.expanduser().resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--spill-dir {spill_dir}: {reason(error)}; choose another folder"
        ) from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise UserError(f"--spill-dir {spill_dir} is not writable; choose another folder")
    if root == run_dir.resolve() or run_dir.resolve() in root.parents:
        raise UserError(
            f"--spill-dir {spill_dir} is inside the run folder; choose one on another disk"
        )
    record = _read(run_dir)
    folders = [Path(folder) for folder in record]
    own = next((folder for folder in folders if folder.parent == root), None)
    if own is None:
        own = root / f"{run_dir.name}-{secrets.token_hex(4)}"
        _write(run_dir, record | {str(own): 0})
    return own


def record_spilled(run_dir: Path, folder: Path, step: int) -> None:
    """Record that the checkpoint of `step` is in `folder`, if the run's disk permits it."""
    with suppress(OSError):
        content = _encode(_read(run_dir) | {str(folder): step})
        # In place: the space is already there, even on a full disk.
        with open(run_dir / SPILL_FILE, "r+b") as file:
            file.write(content)
            os.fsync(file.fileno())


def bring_back(run_dir: Path, say: Callable[[str], None]) -> None:
    """Move the newest spilled checkpoint to the run folder, unless that has a newer one.

    Raises `UserError` if its disk is not there or the run's disk has no space for it: training
    would otherwise repeat those steps.
    """
    for name, recorded in _read(run_dir).items():
        folder, newest = Path(name), max(checkpoint_steps(run_dir), default=0)
        step = max(checkpoint_steps(folder), default=0)
        if max(step, recorded) <= newest:
            _clear(folder)  # moved before, as far as the removal
            continue
        if not step:
            raise UserError(
                f"the checkpoint of step {recorded} of {run_dir} was written to {folder}, which is "
                f"not there; mount that disk, or remove {run_dir / SPILL_FILE} to continue from "
                f"step {newest}"
            )
        if fault := damage(checkpoint_dir(folder, step)):
            say(f"the checkpoint of step {step} in {folder} is damaged ({fault}) and is not used")
            continue
        _move(folder, run_dir, step)
        say(f"moved the checkpoint of step {step} from {folder} to {short_path(run_dir)}")


def _move(folder: Path, run_dir: Path, step: int) -> None:
    source, final = checkpoint_dir(folder, step), checkpoint_dir(run_dir, step)
    aside = final.with_name(WRITING + final.name)
    try:
        remove_unfinished(aside)
        require_space(final.parent, checkpoint_size(folder, step))
        begin_folder(aside)
        # The index comes last: until then the folder is known as one that is being written.
        index, others = aside / MANIFEST_FILE, shutil.ignore_patterns(MANIFEST_FILE)
        shutil.copytree(source, aside, ignore=others, dirs_exist_ok=True)
        shutil.copyfile(source / MANIFEST_FILE, index)
        for path in (*aside.rglob("*"), aside):
            flush(path)
        if fault := damage(aside):
            raise OSError(f"the copy is damaged ({fault})")
        make_way(final)
        aside.rename(final)
        flush(final.parent)
    except (OSError, shutil.Error) as error:
        remove_unfinished(aside)
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise UserError(
            f"the checkpoint of step {step} is in {folder} and could not be moved back: {why}; "
            f"free space there and start the same command again"
        ) from error
    remove_replaced(final)
    _clear(folder)


def _clear(folder: Path) -> None:
    """Remove the checkpoints in a run's spill folder, and the folder if nothing else is in it."""
    with suppress(OSError):
        for step in checkpoint_steps(folder):
            make_way(checkpoint_dir(folder, step))
            remove_replaced(checkpoint_dir(folder, step))
        (folder / CHECKPOINTS_DIR).rmdir()
        folder.rmdir()


def _read(run_dir: Path) -> dict[str, int]:
    """Return folder -> step of the checkpoint that was last written there; 0 for none."""
    try:
        record: Any = parse_json((run_dir / SPILL_FILE).read_text(encoding="utf-8"))
        return {str(folder): int(step) for folder, step in record.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{run_dir / SPILL_FILE} cannot be read ({type(error).__name__}: {error}); look for "
            "checkpoints of this run in its --spill-dir, and remove the file"
        ) from error


def _write(run_dir: Path, record: dict[str, int]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / SPILL_FILE, _encode(record))


def _encode(record: dict[str, int]) -> bytes:
    return json.dumps(record, indent=1).encode().ljust(RECORD_BYTES - 1) + b"\n"
