"""Remove and replace checkpoints without losing anything that somebody may want.

`run_folder.checkpoint_folders` says which folders belong to the run. Of these, only a folder with
an intact index is ever removed, and only the files that its index lists. Everything else that is in
the way is renamed and reported. These functions return what is to be reported, one line each; a
failure to clean up is such a line and no error. Only the first rank calls them. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection
from pathlib import Path

from pipeline.checkpoint_index import DamagedError, damage, read_index
from pipeline.run_folder import (
    CHECKPOINTS_DIR,
    MANIFEST_FILE,
    REMOVED,
    REPLACED,
    WRITING,
    CheckpointFolder,
    checkpoint_dir,
    checkpoint_folders,
    free_path,
)


def prune(
    run_dir: Path, keep: int, also: Collection[int | None] = (), kind: str = CHECKPOINTS_DIR
) -> list[str]:
    """Remove all checkpoints except the newest `keep` and those of the steps `also`.

    `kind`: see `run_folder.checkpoint_dir`.
    """
    intact: list[CheckpointFolder] = []
    notes, folders = _list(run_dir, kind)
    for folder in folders:
        if not folder.prefix and folder.has_index:
            # A checkpoint that nothing can be read from does not count as kept.
            try:
                read_index(folder.path)
                intact.append(folder)
            except DamagedError as error:
                notes += _attempt(lambda path=folder.path, why=error: [set_aside(path, str(why))])
            except OSError as error:
                notes.append(f"{folder.path} could not be read: {error}")
    for folder in intact[:-keep]:
        if folder.step not in also:
            notes += _attempt(lambda path=folder.path: remove_checkpoint(path))
    return notes


def remove_checkpoint(folder: Path) -> list[str]:
    """Remove the checkpoint `folder`. Raises `OSError` if it cannot be renamed."""
    # One rename takes it from the list of checkpoints: it is never half there, also after a kill.
    removed = folder.with_name(REMOVED + folder.name)
    folder.rename(removed)
    return _remove_folder(removed)


def tidy(run_dir: Path, kind: str = CHECKPOINTS_DIR) -> list[str]:
    """Remove what interrupted saves and removals have left; rename folders without an index.

    `kind`: see `run_folder.checkpoint_dir`.
    """
    notes, folders = _list(run_dir, kind)
    for folder in folders:
        if not folder.has_index:
            # Somebody removed the index, or a copy of the run was interrupted: the index comes
            # last. Never a save, which makes the folder's name its last act.
            notes += _attempt(lambda path=folder.path: _set_aside_unless_empty(path))
        elif folder.prefix in (WRITING, REMOVED):
            notes += _attempt(lambda path=folder.path: _remove_folder(path))
    return notes


def finish_replacing(run_dir: Path) -> list[str]:
    """Restore a checkpoint whose replacement (`make_way`) was interrupted between two renames.

    Raises `OSError` if the disk cannot be read.
    """
    notes = []
    for folder in checkpoint_folders(run_dir):
        if folder.prefix != REPLACED or not folder.has_index:
            continue
        final = checkpoint_dir(run_dir, folder.step)
        fault = _fault(final)
        if not fault:
            # The new checkpoint is in place; only the old one still has to be removed.
            notes += _attempt(lambda path=folder.path: _remove_folder(path))
            continue
        # The new checkpoint never got its name. The next save removes it; the old one is whole.
        if os.path.lexists(final):
            notes.append(set_aside(final, fault))
        folder.path.rename(final)
    return notes


def make_way(final: Path) -> list[str]:
    """Move what has the name of the checkpoint `final` aside, for `finish_replacing` or for good.

    A folder cannot be renamed onto one that is not empty. Raises `OSError` if nothing can be
    renamed there.
    """
    if not os.path.lexists(final):
        return []
    notes, replaced = [], final.with_name(REPLACED + final.name)
    if os.path.lexists(replaced):
        notes += _attempt(lambda: _remove_folder(replaced))
        if os.path.lexists(replaced):
            notes.append(set_aside(replaced, "it could not be removed"))
    try:
        fault = _fault(final)
    except OSError as error:  # a checkpoint that cannot be read must not prevent another
        fault = str(error)
    if fault:
        return [*notes, set_aside(final, fault)]
    final.rename(replaced)
    return notes


def remove_replaced(final: Path) -> list[str]:
    """Remove what `make_way` has moved aside, now that the new checkpoint is in place."""
    replaced = final.with_name(REPLACED + final.name)
    return _attempt(lambda: _remove_folder(replaced)) if replaced.is_dir() else []


def begin_folder(aside: Path) -> list[str]:
    """Make the folder `aside` for a new checkpoint; its empty index marks it as the run's.

    Raises `OSError` if it cannot be made.
    """
    notes = [set_aside(aside, "it could not be removed")] if os.path.lexists(aside) else []
    aside.mkdir(parents=True)
    (aside / MANIFEST_FILE).touch()
    return notes


def remove_unfinished(aside: Path) -> list[str]:
    """Remove a checkpoint that `begin_folder` began and that could not be written."""
    return _attempt(lambda: _remove_folder(aside)) if aside.is_dir() else []


def set_aside(path: Path, fault: str) -> str:
    """Rename a damaged checkpoint, or what has its name, to `damaged-step-N`; return the report."""
    kept = free_path(path.with_name(f"damaged-{path.name.lstrip('.')}"))
    path.rename(kept)
    return (
        f"{path.name} in {path.parent} is not an intact checkpoint ({fault}); it is now {kept.name}"
    )


def _remove_folder(folder: Path) -> list[str]:
    """Remove a folder of the run, its index last, so that a kill leaves one that is known as such.

    Files of somebody else stay, in `kept-step-N`.
    """
    index = folder / MANIFEST_FILE
    try:
        # Empty while the checkpoint is written: then everything in it is of the run.
        own = None if index.stat().st_size == 0 else read_index(folder)["files"].keys()
    except DamagedError as error:
        return [set_aside(folder, str(error))]
    strangers = []
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            # Hidden files are the system's: .nfs000…, .DS_Store.
            if own is None or relative in own or name.startswith("."):
                path.unlink(missing_ok=True) if path != index else None
            elif path != index:
                strangers.append(relative)
        for name in folders:
            path = Path(parent, name)
            if path.is_symlink():
                strangers.append(path.relative_to(folder).as_posix())
            else:
                with contextlib.suppress(OSError):  # not empty: it holds somebody's files
                    path.rmdir()
    if not strangers:
        index.unlink()
        folder.rmdir()
        return []
    name = f"step-{folder.name.rpartition('-')[2]}"
    kept = free_path(folder.with_name(f"kept-{name}"))
    folder.rename(kept)
    (kept / MANIFEST_FILE).unlink()
    return [
        f"the old checkpoint {name} in {folder.parent} is removed, except for {min(strangers)}, "
        f"which is not of the run; it is now in {kept.name}"
    ]


def _set_aside_unless_empty(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        folder.rmdir()  # left by a kill between making it and marking it
        return []
    return [set_aside(folder, f"{MANIFEST_FILE} is missing")]


def _fault(path: Path) -> str:
    return "it is a link" if path.is_symlink() else damage(path)


def _list(run_dir: Path, kind: str) -> tuple[list[str], list[CheckpointFolder]]:
    try:
        return [], checkpoint_folders(run_dir, kind)
    except OSError as error:
        return [f"old checkpoints could not be listed: {error}"], []


def _attempt(action: Callable[[], list[str]]) -> list[str]:
    try:
        return action()
    except OSError as error:
        return [f"a leftover could not be removed: {error}"]
