"""The run folder: what training leaves behind and everything after it reads. Needs no torch.

    runs/<name>/recipe.yaml, ds_config.json, file_lists/    (with stages: runs/<name>/<stage>/…)
    runs/<name>/checkpoints/step-00000400/{MANIFEST.json, state.json,
                                           generator.safetensors, generator_ema.safetensors}

A checkpoint exists if and only if its MANIFEST.json does, which is written last. `find_run`,
`choose_step` and `network_file` find the weights that a command asks for; `run_lock` holds the
folder for one run alone.
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
"""Where runs go and are looked for, in the current folder, unless the command line says
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
    """Where the checkpoint of `step` lies, whether it is there or not."""
    return Path(run_dir) / CHECKPOINTS_DIR / f"step-{step:08d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps of the complete checkpoints, ascending."""
    manifests = (Path(run_dir) / CHECKPOINTS_DIR).glob(f"step-*/{MANIFEST_FILE}")
    names = (re.fullmatch(r"step-(\d{8,})", manifest.parent.name) for manifest in manifests)
    return sorted(int(name[1]) for name in names if name)


def has_ended(run_dir: Path, total_steps: int, patience: int) -> bool:
    """Whether the newest checkpoint is of the last step, or of the validation that used up the
    patience (0: none)."""
    steps = checkpoint_steps(run_dir)
    if not steps:
        return False
    if steps[-1] >= total_steps:
        return True
    state = json.loads((checkpoint_dir(run_dir, steps[-1]) / STATE_FILE).read_text())
    return 0 < patience <= state["stale_validations"]


def find_run(root: Path = RUNS_DIR) -> Path:
    """The run with the newest complete checkpoint in `root`; `UserError` where there is none."""
    root = Path(root)
    inner = f"{CHECKPOINTS_DIR}/step-*/{MANIFEST_FILE}"
    manifests = [*root.glob(f"*/{inner}"), *root.glob(f"*/*/{inner}")]
    newest_first = sorted(
        (m for m in manifests if ".bak-" not in str(m.relative_to(root))),  # put aside by --reset
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
    """The stage folder with the newest checkpoint; `run_dir` itself if the run has no stages or no
    checkpoint."""
    if (run_dir / CHECKPOINTS_DIR).is_dir():
        return run_dir
    manifests = run_dir.glob(f"*/{CHECKPOINTS_DIR}/step-*/{MANIFEST_FILE}")
    newest = max(
        manifests, key=lambda manifest: (manifest.stat().st_mtime_ns, str(manifest)), default=None
    )
    return newest.parents[2] if newest else run_dir


def choose_step(run_dir: Path, step: Step) -> int:
    """The step number meant by `step` among the complete checkpoints of the run; `UserError` where
    there is none.

    "best" is the best validation so far; where none was measured yet or its checkpoint is gone, a
    note on stderr says so and the newest is taken.
    """
    run_dir = newest_stage(Path(run_dir))
    if not run_dir.is_dir():
        raise UserError(f"no run folder {str(run_dir)!r}")
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise UserError(
            f"run {str(run_dir)!r} has no complete checkpoint yet; let it train up to its first "
            "save"
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
            f"note: run {run_dir.name!r}: {why}; taking the newest, step {steps[-1]}",
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
    """The generator's weights at `step` ("best", "newest" or a number): averaged (`ema`) or raw.
    See `choose_step`."""
    run_dir = newest_stage(Path(run_dir))
    path = checkpoint_dir(run_dir, choose_step(run_dir, step)) / (
        GENERATOR_EMA_FILE if ema else GENERATOR_FILE
    )
    if not path.is_file():
        raise UserError(
            f"checkpoint {str(path.parent)!r} holds no {path.name}; choose another step"
        )
    return path


def network_file(model: Path | None) -> Path:
    """`model` if it is a file of weights; of a run folder (`None`: the newest run) the best
    averaged weights."""
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
    """Hold the run folder for this run alone. A run that is still saving is waited for.

    The lock lies beside the folder, so that the folder can be moved aside, and dies with its
    process.
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
                        f"{run_dir} is in use by process {holder}; stop it, or give this run "
                        "another "
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
