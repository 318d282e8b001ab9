"""The run folder: what training writes and all later commands read. Imports no torch.

    runs/<name>/recipe.yaml, ds_config.json, file_lists/    (with stages: runs/<name>/<stage>/…)
    runs/<name>/checkpoints/step-00000400/{MANIFEST.json, state.json,
                                           generator.safetensors, generator_ema.safetensors}
    runs/<name>/averages/step-00000400/       snapshots of averages, see `checkpoint/averages.py`

A checkpoint exists if and only if its MANIFEST.json does, which is written last. `find_run`,
`choose_step` and `network_file` find the weights that a command asks for; `run_lock` reserves the
folder for a single run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.checkpoint_index import MANIFEST_FILE as MANIFEST_FILE
from pipeline.checkpoint_index import damage
from pipeline.cli import UserError
from pipeline.files import parse_json

RUNS_DIR = Path("runs")
"""Where runs are written and looked for, below the current folder, unless the command line says
otherwise."""
RECIPE_FILE = "recipe.yaml"
DS_CONFIG_FILE = "ds_config.json"
FILE_LISTS_DIR = "file_lists"
CHECKPOINTS_DIR = "checkpoints"
AVERAGES_DIR = "averages"
LOG_FILE = "log.jsonl"
STATE_FILE = "state.json"
GENERATOR_FILE = "generator.safetensors"
GENERATOR_EMA_FILE = "generator_ema.safetensors"
WEIGHTS_FILES = (STATE_FILE, GENERATOR_FILE, GENERATOR_EMA_FILE)
"""What commands read of a checkpoint after training; they check these files for damage."""
LOCK_FILE = ".lock"
WAIT_SECONDS = 3  # for a run folder that is in use
SAVING_SECONDS = 60  # for one whose run is writing its last checkpoint

Step = Literal["best", "newest"] | int


def power_average_file(width: float) -> str:
    """Return the name of the file with the power-function average of the relative `width`."""
    return f"generator_ema_{width:.2f}.safetensors"


def checkpoint_dir(run_dir: Path, step: int, kind: str = CHECKPOINTS_DIR) -> Path:
    """Return the folder of the checkpoint of `step`, whether it exists or not.

    `kind`: the folder in `run_dir` that it is in, also for the following functions; snapshots of
    averages are in `AVERAGES_DIR`, in the same layout.
    """
    return Path(run_dir) / kind / f"step-{step:08d}"


class CheckpointFolder(NamedTuple):
    """A folder in `checkpoints/` that belongs to the run, by its name."""

    path: Path
    prefix: str  # "" for a checkpoint; else one of `PREFIXES`
    step: int
    has_index: bool


WRITING, REPLACED, REMOVED = PREFIXES = (".tmp-", ".old-", ".removed-")
"""Before the name of a checkpoint that is being written, being replaced, or being removed."""


def checkpoint_folders(run_dir: Path, kind: str = CHECKPOINTS_DIR) -> list[CheckpointFolder]:
    """Return the run's own folders in `checkpoints/`, by step: the one rule of what belongs to it.

    A folder does if it is a real one, not a link, and has exactly the name that the run gives. All
    else (step-good, step-9-mine, step-00000009.tar) is somebody else's. What changes or removes a
    folder moreover asks for its index; a folder without one may only be renamed.
    """
    try:
        with os.scandir(Path(run_dir) / kind) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in names:
        match = re.fullmatch(r"(\.[a-z]+-)?step-([0-9]{8,})", name)
        prefix, step = (match[1] or "", int(match[2])) if match else ("", -1)
        path = checkpoint_dir(run_dir, step, kind)
        path = path.with_name(prefix + path.name)
        if path.name == name and prefix in ("", *PREFIXES):
            found.append(CheckpointFolder(path, prefix, step, _may_have_index(path)))
    return sorted(found, key=lambda folder: (folder.step, folder.prefix))


def _may_have_index(folder: Path) -> bool:
    """Whether the checkpoint has an index; an unreadable folder is not said to have none."""
    try:
        (folder / MANIFEST_FILE).lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def checkpoint_steps(run_dir: Path, kind: str = CHECKPOINTS_DIR) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    folders = checkpoint_folders(run_dir, kind)
    return [folder.step for folder in folders if not folder.prefix and folder.has_index]


def checkpoint_size(run_dir: Path, step: int) -> int:
    """Return the bytes of all files of a checkpoint."""
    files = checkpoint_dir(run_dir, step).rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def has_ended(run_dir: Path, total_steps: int, patience: int) -> bool:
    """Whether the newest checkpoint is at the last step or used up `patience` (0: unlimited)."""
    step = newest_intact(run_dir, (STATE_FILE,))
    if step is None:
        return False
    return step >= total_steps or 0 < patience <= read_state(run_dir, step).get(
        "stale_validations", 0
    )


def find_run(root: Path = RUNS_DIR) -> Path:
    """Return the run in `root` with the newest complete checkpoint; `UserError` without any."""
    root = Path(root)
    newest = _last_saved(
        folder.parent
        for pattern in (f"*/{CHECKPOINTS_DIR}", f"*/*/{CHECKPOINTS_DIR}")
        for folder in root.glob(pattern)
        if ".bak-" not in str(folder.relative_to(root))  # see `move_aside`
    )
    if newest is None:
        raise UserError(
            f"no run with a checkpoint in {str(root)!r}; train one first with "
            "./launch_local_train.sh"
        )
    return newest


def newest_stage(run_dir: Path) -> Path:
    """Return the stage folder with the newest checkpoint.

    Returns `run_dir` itself if the run has no stages or no checkpoint.
    """
    if (run_dir / CHECKPOINTS_DIR).is_dir():
        return run_dir
    stages = (
        folder.parent
        for folder in run_dir.glob(f"*/{CHECKPOINTS_DIR}")
        if ".bak-" not in str(folder.relative_to(run_dir))  # see `move_aside`
    )
    return _last_saved(stages) or run_dir


def _last_saved(run_dirs: Iterable[Path]) -> Path | None:
    """Return the run or stage folder with the most recently written checkpoint, if any has one."""
    times = []
    for run_dir in run_dirs:
        # Removed in the meantime, or the run of somebody else who keeps it private.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            for step in checkpoint_steps(run_dir):
                written = (checkpoint_dir(run_dir, step) / MANIFEST_FILE).stat().st_mtime_ns
                times.append((written, str(run_dir), step, run_dir))
    return max(times)[-1] if times else None


def choose_step(run_dir: Path, step: Step, also: Collection[str] = ()) -> int:
    """Resolve `step` to the step of an intact checkpoint; `UserError` if there is none.

    "best" is the step of the best validation so far. If none was measured yet, or its checkpoint is
    gone or damaged, the newest is used. A note on stderr says so, and likewise names each damaged
    checkpoint that was passed over. Checked are the files in `WEIGHTS_FILES` and `also`.
    """
    run_dir = newest_stage(Path(run_dir))
    if not run_dir.is_dir():
        raise UserError(f"no run folder {str(run_dir)!r}")
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise UserError(
            f"run {str(run_dir)!r} has no complete checkpoint yet; train until its first save"
        )
    names, why = (*WEIGHTS_FILES, *also), ""
    if step not in ("best", "newest", *steps):
        raise UserError(
            f"run {str(run_dir)!r} has no complete checkpoint of step {step}; "
            f"choose from best, newest, {', '.join(map(str, steps))}"
        )
    if step == "best":
        best, fault = _best_step(run_dir), ""
        if best in steps:
            fault = _damage(checkpoint_dir(run_dir, best), names)
            if not fault:
                return best
            fault = f"damaged ({fault})"
        why = (
            "no best step yet"
            if best is None
            else f"the checkpoint of the best step {best} is {fault or 'gone'}"
        )
    elif step != "newest":
        if fault := _damage(checkpoint_dir(run_dir, step), names):
            raise UserError(
                f"run {str(run_dir)!r}: the checkpoint of step {step} is damaged ({fault}); choose "
                f"from best, newest, {', '.join(str(other) for other in steps if other != step)}"
            )
        return step

    def say(note: str) -> None:
        print(f"note: run {run_dir.name!r}: {note}", file=sys.stderr)

    newest = newest_intact(run_dir, names, say)
    if newest is None:
        raise UserError(
            f"every checkpoint in {str(run_dir / CHECKPOINTS_DIR)!r} is damaged; choose another run"
        )
    if why:
        say(f"{why}; using the newest, step {newest}")
    return newest


def newest_intact(
    run_dir: Path, names: Collection[str], say: Callable[[str], None] = lambda _: None
) -> int | None:
    """Return the newest step whose index and files `names` are intact; None if there is none.

    `say` is called about each damaged checkpoint. Raises `UserError` if the disk cannot be read.
    """
    for step in reversed(checkpoint_steps(run_dir)):
        fault = _damage(checkpoint_dir(run_dir, step), names)
        if not fault:
            return step
        say(f"the checkpoint of step {step} is damaged ({fault}); trying the previous one")
    return None


def _damage(folder: Path, names: Collection[str]) -> str:
    try:
        return damage(folder, names)
    except OSError as error:
        raise UserError(
            f"the checkpoint {str(folder)!r} cannot be read ({error.strerror}); check the disk"
        ) from error


def run_network_file(run_dir: Path, step: Step, ema: bool) -> Path:
    """Return the file of the generator's weights at `step`, averaged (`ema`) or raw.

    See `choose_step`. Raises `UserError` if it does not exist.
    """
    run_dir = newest_stage(Path(run_dir))
    path = checkpoint_dir(run_dir, choose_step(run_dir, step)) / (
        GENERATOR_EMA_FILE if ema else GENERATOR_FILE
    )
    if not path.is_file():
        raise UserError(f"checkpoint {str(path.parent)!r} has no {path.name}; choose another step")
    return path


def network_file(model: Path | None) -> Path:
    """Return `model` if it is a weights file, else the best averaged weights of that run folder.

    `None` means the newest run.
    """
    if model is not None and not model.is_dir():
        return model
    return run_network_file(find_run() if model is None else model, "best", ema=True)


def _best_step(run_dir: Path) -> int | None:
    """Return the best step so far, according to the newest checkpoint that says so."""
    newest = newest_intact(run_dir, (STATE_FILE,))
    return None if newest is None else read_state(run_dir, newest).get("best_step")


def read_state(run_dir: Path, step: int) -> dict[str, Any]:
    """Return what the checkpoint of `step` says about the run's progress; it must be intact."""
    return parse_json((checkpoint_dir(run_dir, step) / STATE_FILE).read_bytes())


# The lock is a file inside the run folder, so it is the same file whichever path leads there: a
# link, a bind mount, another host's mount point. The kernel locks it and releases it when the
# process ends in any way; the file that a killed run leaves behind means nothing.


@contextlib.contextmanager
def run_lock(
    run_dir: Path, say: Callable[[str], None], wait_seconds: float = WAIT_SECONDS
) -> Iterator[None]:
    """Reserve the run folder for this process, and make it if it does not exist.

    Waits up to `wait_seconds` for another process, or up to `SAVING_SECONDS` for one that is
    writing its last checkpoint (`announce_end`). Raises `UserError` if the folder stays in use or
    cannot be written.
    """
    lock = _wait_for_lock(run_dir, say, wait_seconds, makes_folder=True)
    assert lock is not None
    _describe(lock, ends=False)
    try:
        yield
    finally:
        # Removed while it is locked. Whoever opened it before sees that the name is gone.
        with contextlib.suppress(OSError):
            path = Path(run_dir).resolve() / LOCK_FILE
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                path.unlink()
        os.close(lock)


def refuse_if_in_use(run_dir: Path, say: Callable[[str], None]) -> None:
    """Raise `UserError` as `run_lock` would, without making, reserving or changing anything.

    For launchers: ranks need seconds to start before they try.
    """
    lock = _wait_for_lock(run_dir, say, WAIT_SECONDS, makes_folder=False)
    if lock is not None:
        os.close(lock)


def announce_end(run_dir: Path) -> None:
    """Record that this process, which has the lock, is only writing its last checkpoint.

    The same command, started again too early, then waits longer.
    """
    with contextlib.suppress(OSError):
        lock = os.open(Path(run_dir).resolve() / LOCK_FILE, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            _describe(lock, ends=True)
        finally:
            os.close(lock)


def move_aside(run_dir: Path) -> Path | None:
    """Move a run out of its folder, whose lock this process has; return where it is now.

    The folder is renamed to `<name>.bak-<time>` and made again, with the lock in it. If it cannot
    be renamed, because it is a mount point or in a folder that is not writable, its content moves
    to a folder of that name inside it. None if the folder holds no run. Raises `UserError` if
    neither is possible.
    """
    folder = Path(run_dir).resolve()
    if not holds_run(folder):
        return None
    name = f"{folder.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}"
    kept = free_path(folder.with_name(name))
    try:
        folder.rename(kept)
    except OSError:
        entries = _run_entries(folder)
        kept = free_path(folder / name)
        try:
            kept.mkdir()
            for entry in entries:
                entry.rename(kept / entry.name)
        except OSError as error:
            raise UserError(
                f"{error.filename or folder}: the old run cannot be moved aside "
                f"({error.strerror}); move it yourself, or use another --output-dir"
            ) from error
        return kept
    try:
        folder.mkdir()
        # Linked, not renamed: that would replace the lock of a process that was faster.
        if (kept / LOCK_FILE).exists():
            os.link(kept / LOCK_FILE, folder / LOCK_FILE)
            (kept / LOCK_FILE).unlink()
    except OSError as error:
        raise UserError(
            f"{run_dir}: the old run is kept in {kept}, but its folder could not be reserved for "
            f"a new one ({error.strerror}); start the same command without --reset"
        ) from error
    return kept


def holds_run(run_dir: Path) -> bool:
    """Whether the folder contains anything that `move_aside` would move."""
    return bool(_run_entries(Path(run_dir).resolve()))


def _run_entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [
        entry
        for entry in sorted(folder.iterdir())
        if entry.name != LOCK_FILE and not entry.name.startswith(f"{folder.name}.bak-")
    ]


def kept_runs(run_dir: Path) -> set[Path]:
    """Return where `move_aside` has moved the earlier runs of a folder."""
    folder = Path(run_dir).resolve()
    return {
        path
        for parent in (folder.parent, folder)
        if parent.is_dir()
        for path in parent.iterdir()
        if path.name.startswith(f"{folder.name}.bak-")
    }


def free_path(path: Path) -> Path:
    """Return `path`, or `path` with a number if it exists."""
    number = 1
    candidate = path
    while os.path.lexists(candidate):
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def _wait_for_lock(
    run_dir: Path, say: Callable[[str], None], wait_seconds: float, *, makes_folder: bool
) -> int | None:
    """Return a descriptor of the locked file, or None without one if not `makes_folder`."""
    folder = Path(run_dir).resolve()
    path = folder / LOCK_FILE
    began, has_said = time.monotonic(), False
    while True:
        try:
            if makes_folder:
                folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(
                path,
                os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if makes_folder else 0),
                0o666,  # less the umask: others may share the folder
            )
        except FileNotFoundError:
            if makes_folder:
                continue  # moved away in this moment
            return None
        except OSError as error:
            raise UserError(
                f"{run_dir}: the run folder cannot be written: {error.strerror}; "
                "free disk space or fix its permissions, or use another --output-dir"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The folder may have been moved aside, or the file removed, since it was opened.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(path)):
                    return lock
            os.close(lock)
            continue
        except BlockingIOError:
            holder, is_ending = _holder(lock)
            os.close(lock)
        except OSError as error:
            # Such as Lustre mounted without -o flock.
            say(
                f"warning: {run_dir}: this disk has no file locks ({error.strerror}); make sure "
                "that no other process trains in this folder"
            )
            return lock
        limit = max(wait_seconds, SAVING_SECONDS) if is_ending else wait_seconds
        if time.monotonic() - began > limit:
            raise UserError(
                f"{run_dir} is in use by process {holder}; stop it, or use another --output-dir"
            )
        if not has_said:
            say(
                f"{run_dir} is in use by process {holder}; waiting up to {limit:.0f} s for it to "
                "finish"
            )
            has_said = True
        time.sleep(0.1)


def _describe(lock: int, *, ends: bool) -> None:
    """Write who has the lock. Only a message depends on it, so a full disk does not matter."""
    content = json.dumps({"pid": os.getpid(), "host": os.uname().nodename, "ends": ends})
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, content.encode(), 0)


def _holder(lock: int) -> tuple[str, bool]:
    """Return a text about the process that has the lock, and whether it is ending."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        holder = json.loads(os.pread(lock, 4096, 0))
        return f"{holder['pid']} on {holder['host']}", bool(holder.get("ends"))
    return "(unknown)", False
