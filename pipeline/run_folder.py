"""The run folder: what training writes and all later commands read. Imports no torch.

    runs/<name>/recipe.yaml, ds_config.json, file_lists/    (with stages: runs/<name>/<stage>/…)
    runs/<name>/checkpoints/step-00000400/{MANIFEST.json, state.json,
                                           generator.safetensors, generator_ema.safetensors}

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pipeline.cli import UserError

RUNS_DIR = Path("runs")
"""Where runs are written and looked for, below the current folder, unless the command line says
otherwise."""
RECIPE_FILE = "recipe.yaml"
DS_CONFIG_FILE = "ds_config.json"
FILE_LISTS_DIR = "file_lists"
CHECKPOINTS_DIR = "checkpoints"
LOG_FILE = "log.jsonl"
MANIFEST_FILE = "MANIFEST.json"
STATE_FILE = "state.json"
GENERATOR_FILE = "generator.safetensors"
GENERATOR_EMA_FILE = "generator_ema.safetensors"

Step = Literal["best", "newest"] | int


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`, whether it exists or not."""
    return Path(run_dir) / CHECKPOINTS_DIR / f"step-{step:08d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    manifests = (Path(run_dir) / CHECKPOINTS_DIR).glob(f"step-*/{MANIFEST_FILE}")
    names = (re.fullmatch(r"step-(\d{8,})", manifest.parent.name) for manifest in manifests)
    return sorted(int(name[1]) for name in names if name)


def has_ended(run_dir: Path, total_steps: int, patience: int) -> bool:
    """Whether the newest checkpoint is at the last step or used up `patience` (0: unlimited)."""
    steps = checkpoint_steps(run_dir)
    if not steps:
        return False
    if steps[-1] >= total_steps:
        return True
    state = json.loads((checkpoint_dir(run_dir, steps[-1]) / STATE_FILE).read_text())
    return 0 < patience <= state["stale_validations"]


def find_run(root: Path = RUNS_DIR) -> Path:
    """Return the run in `root` with the newest complete checkpoint; `UserError` without any."""
    root = Path(root)
    inner = f"{CHECKPOINTS_DIR}/step-*/{MANIFEST_FILE}"
    manifests = [*root.glob(f"*/{inner}"), *root.glob(f"*/*/{inner}")]
    newest_first = sorted(
        (m for m in manifests if ".bak-" not in str(m.relative_to(root))),  # moved by --reset
        key=lambda manifest: (manifest.stat().st_mtime_ns, str(manifest)),
        reverse=True,
    )
    if not newest_first:
        raise UserError(
            f"no run with a checkpoint in {str(root)!r}; train one first with "
            "./launch_local_train.sh"
        )
    return newest_first[0].parents[2]


def newest_stage(run_dir: Path) -> Path:
    """Return the stage folder with the newest checkpoint.

    Returns `run_dir` itself if the run has no stages or no checkpoint.
    """
    if (run_dir / CHECKPOINTS_DIR).is_dir():
        return run_dir
    manifests = run_dir.glob(f"*/{CHECKPOINTS_DIR}/step-*/{MANIFEST_FILE}")
    newest = max(
        manifests, key=lambda manifest: (manifest.stat().st_mtime_ns, str(manifest)), default=None
    )
    return newest.parents[2] if newest else run_dir


def choose_step(run_dir: Path, step: Step) -> int:
    """Resolve `step` to the step of a complete checkpoint; `UserError` if there is none.

    "best" is the step of the best validation so far. If none was measured yet, or its checkpoint is
    gone, the newest is used and a note on stderr says so.
    """
    run_dir = newest_stage(Path(run_dir))
    if not run_dir.is_dir():
        raise UserError(f"no run folder {str(run_dir)!r}")
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise UserError(
            f"run {str(run_dir)!r} has no complete checkpoint yet; train until its first save"
        )
    if step == "newest":
        return steps[-1]
    if step == "best":
        best = _best_step(run_dir, steps[-1])
        if best in steps:
            return best
        why = (
            "no best step yet"
            if best is None
            else f"the checkpoint of the best step {best} is gone"
        )
        print(
            f"note: run {run_dir.name!r}: {why}; using the newest, step {steps[-1]}",
            file=sys.stderr,
        )
        return steps[-1]
    if step not in steps:
        raise UserError(
            f"run {str(run_dir)!r} has no complete checkpoint of step {step}; "
            f"choose from best, newest, {', '.join(map(str, steps))}"
        )
    return step


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


def _best_step(run_dir: Path, newest: int) -> int | None:
    path = checkpoint_dir(run_dir, newest) / STATE_FILE
    try:
        best = json.loads(path.read_text(encoding="utf-8"))["best_step"]
        return None if best is None else int(best)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} does not say which step is best ({type(error).__name__}: {error}); "
            "choose --step newest"
        ) from error


@contextlib.contextmanager
def run_lock(run_dir: Path, say: Callable[[str], None], wait_seconds: float = 60) -> Iterator[None]:
    """Reserve the run folder for this run; wait up to `wait_seconds` for one that is still saving.

    The lock file is next to the folder, so that the folder can be moved; the lock is released when
    the process ends. Raises `UserError` if the folder stays in use.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.parent / f".{run_dir.name}.lock"
    with open(path, "a+") as file:
        deadline = time.monotonic() + wait_seconds
        has_said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                holder = _holder(path)
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{run_dir} is in use by process {holder}; stop it, or use another "
                        "--output-dir"
                    ) from None
                if not has_said:
                    say(
                        f"{run_dir} is in use by process {holder}; waiting up to "
                        f"{wait_seconds:.0f} s for it to finish"
                    )
                    has_said = True
                time.sleep(0.2)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
        file.flush()
        yield


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        holder = json.loads(path.read_text())
        return f"{holder['pid']} on {holder['host']}"
    return "(unknown)"
