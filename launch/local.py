"""Train on this machine: prepare the environment and the demo, launch the ranks, report the end."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil

from launch import environment
from launch.environment import without
from pipeline import cli
from pipeline.cli import UserError, say
from pipeline.config.ds_config import batch_sizes
from pipeline.distributed import gpus
from pipeline.distributed.launcher import LAUNCHER, free_port
from pipeline.installation import cache_dir
from pipeline.run_folder import has_ended, refuse_if_in_use
from pipeline.signals import NOTHING_TO_SAVE, stop_signals
from pipeline.training.options import (
    DATASET_DIR,
    TrainOptions,
    TrainPlan,
    has_lists,
    make_plans,
    overrides_last,
)
from pipeline.training.saved_run import report_if_finished

DEMO_RECIPE = "demo"
DEMO_FILES = cache_dir() / "demo"
SAVE_SECONDS = 300  # for ranks that are still saving after their launcher has ended
SCRIPT = str(ROOT / "train.py")
DEEPSPEED = "deepspeed.launcher."  # in the command lines of DeepSpeed's two launchers


def main(options: TrainOptions) -> int:
    """Train as `options` say.

    Returns `train.py`'s exit status, or 1 for a run that ended early without an error message.
    """
    if options.procs < 0:
        raise UserError(f"--procs {options.procs} must be 1 or more, or 0 for one per GPU")
    arguments = sys.argv[1:]
    held_out = None
    if not has_lists(options):
        options, arguments, held_out = _demo(options, arguments)
    plans = make_plans(options)  # bad input is rejected here, once, before any process starts
    plan, began = plans[-1], time.time()
    if options.device == "cpu":
        os.environ[gpus.CPU] = "1"
    if report_if_finished(plans):  # checked first: counting GPUs may import torch
        return 0 if held_out is None else _show_demo(plan, held_out, began)
    refuse_if_in_use(plan.home, say)
    num_gpus = environment.num_gpus()
    gpus.check_procs(options.procs, num_gpus)
    processes = options.procs or num_gpus or 1
    _check_batch(plan, processes, is_chosen=options.procs > 0)
    status = _launch(processes, on_gpu=num_gpus > 0, arguments=arguments)
    if status == 0 and not has_ended(plan.run_dir, plan.total_steps, plan.recipe.patience):
        print(
            "error: training ended before its last step without an error message; see above",
            file=sys.stderr,
        )
        return 1
    if status == 0 and held_out is not None:
        return _show_demo(plan, held_out, began)
    return status


def _check_batch(plan: TrainPlan, processes: int, *, is_chosen: bool) -> None:
    """Raise `UserError` if the processes cannot share the global batch.

    If the user did not choose their number, the message suggests the largest one that can.
    """
    try:
        batch_sizes(plan.ds_config, processes)
    except UserError as error:
        most = 0 if is_chosen else largest_share(plan.ds_config, processes)
        if not most:
            raise
        raise UserError(
            f"{error}, such as --procs {most}, the largest number of this machine's {processes} "
            "GPUs that can share it"
        ) from error


def largest_share(ds_config: Mapping[str, Any], processes: int) -> int:
    """Return the largest number of ranks below `processes` that can share the batch, or 0."""
    for number in range(processes - 1, 0, -1):
        with suppress(UserError):
            batch_sizes(ds_config, number)
            return number
    return 0


def _launch(processes: int, *, on_gpu: bool, arguments: list[str]) -> int:
    """Run the ranks to their end, forwarding signals to stop. Return a shell's exit status."""
    variables = environment.prepare(processes, on_gpu=on_gpu)
    # One process needs no launcher, which takes seconds to start.
    command = [sys.executable, SCRIPT, *arguments]
    if processes > 1:
        # Without --num_gpus the launcher uses the GPUs in CUDA_VISIBLE_DEVICES; with it, the
        # launcher ignores that variable.
        count = (
            ["--num_gpus", str(processes)]
            if not on_gpu or gpus.share_out(variables, processes)
            else []
        )
        command = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--log_level",
            "critical",
            "--hostfile",
            os.devnull,
            *count,
            "--master_port",
            str(free_port()),
            SCRIPT,
            *arguments,
        ]
    # The ranks get a session of their own, so that CTRL+C reaches only this process, which then
    # signals all of them at once.
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _frame: received.append(number))
        for number in stop_signals()
    }
    try:
        child = subprocess.Popen(command, env=variables, start_new_session=True)
        is_stopping = False
        while (status := _wait(child)) is None:
            if received and not is_stopping:
                # DeepSpeed's launchers are left alone while there are ranks: one of them would
                # kill the ranks after 30 s, saved or not. They end with the ranks.
                is_stopping = True
                if not _stop(_ranks()):
                    _signal_group(child.pid, signal.SIGTERM)
                    _say_nothing_to_save()
        _end_orphans(child.pid)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        if status == -signal.SIGTERM and processes == 1:  # it had not begun to run any code
            _say_nothing_to_save()
        return 128 + received[0]
    if status < 0:
        what = "DeepSpeed's launcher" if processes > 1 else "training"
        name = signal.Signals(-status).name
        print(f"error: {what} was killed by {name}", file=sys.stderr)
    return status if status >= 0 else 128 - status


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    """Return the exit status of `child`, or None if it has not ended within 0.2 s."""
    with suppress(subprocess.TimeoutExpired):
        return child.wait(0.2)
    return None


def _say_nothing_to_save() -> None:
    with suppress(OSError):
        print(NOTHING_TO_SAVE, file=sys.stderr, flush=True)


def _ranks() -> list[psutil.Process]:
    """Return the ranks that this process has started, directly or through DeepSpeed's launcher.

    They are found by their environment: a rank whose launcher has ended has another parent.
    """
    own, found = str(os.getpid()), {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            words = process.cmdline()
            is_rank = SCRIPT in words and not any(word.startswith(DEEPSPEED) for word in words)
            if is_rank and process.environ().get(LAUNCHER) == own:
                found[process.pid] = process
    # What a rank has forked ends with it.
    return [process for process in found.values() if _parent(process) not in found]


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return 0


def _stop(ranks: list[psutil.Process]) -> bool:
    """Ask ranks to save and stop. Return whether there are any."""
    for rank in ranks:
        with suppress(psutil.Error):
            rank.terminate()
    return bool(ranks)


def _end_orphans(group: int) -> None:
    """Let ranks that outlive their launcher save, then kill whatever is left."""
    deadline, asked = time.monotonic() + SAVE_SECONDS, set()
    while (ranks := _ranks()) and time.monotonic() < deadline:
        _stop([rank for rank in ranks if rank.pid not in asked])
        asked |= {rank.pid for rank in ranks}
        time.sleep(0.1)
    for rank in ranks:
        with suppress(psutil.Error):
            rank.kill()
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    """Send a signal to a process group, if any process of it is left."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _demo(options: TrainOptions, arguments: list[str]) -> tuple[TrainOptions, list[str], Path]:
    """Return options, arguments and held-out folder of the demo, which runs without a dataset."""
    default, places = (
        TrainOptions(),
        " or ".join(str(path) for path in options.dataset_dir or (DATASET_DIR,)),
    )
    if options.dataset_dir or options.recipe not in (default.recipe, DEMO_RECIPE):
        raise UserError(
            f"no file lists in {places}; make a dataset with `python tools/images_to_data.py "
            "PHOTOS ~/dataset/NAME` and `python tools/select_training_files.py`, or omit --recipe "
            "and --dataset-dir to run the demo"
        )
    say(
        f"no file lists in {places}: running the demo on photographs that ship with scikit-image "
        "and scikit-learn (your own: python tools/images_to_data.py PHOTOS ~/dataset/NAME)"
    )
    from tools.make_demo_dataset import make_demo_dataset

    dataset = make_demo_dataset(DEMO_FILES)
    options = replace(options, recipe=DEMO_RECIPE, dataset_dir=(dataset.dataset_dir,))
    # If an option is given twice, the last one counts: drop the user's --recipe and --dataset-dir.
    return (
        options,
        [
            "--recipe",
            DEMO_RECIPE,
            "--dataset-dir",
            str(dataset.dataset_dir),
            *without(arguments, ("--recipe", "--dataset-dir")),
        ],
        dataset.held_out_dir,
    )


def _show_demo(plan: TrainPlan, held_out: Path, began: float) -> int:
    """Evaluate the demo's network on the held-out photographs and print where the pictures are."""
    say("\nheld-out photographs, used neither for training nor for validation:")
    command = [
        sys.executable,
        str(ROOT / "evaluate.py"),
        "--model",
        str(plan.run_dir),
        "--hr",
        str(held_out),
        "--scale",
        str(plan.recipe.scale),
        "--json",
        str(plan.run_dir / "evaluation.json"),
        "--out",
        str(plan.run_dir / "pictures"),
    ]
    status = subprocess.run(command, check=False).returncode
    picture = min((plan.run_dir / "pictures").glob("*.png"), default=None)
    if status == 0 and picture:
        say(f"side by side: {picture}")
        say(
            f"the demo took {time.time() - began:.0f} s; next: your own photographs (see README.md)"
        )
    return status


if __name__ == "__main__":
    cli.run(TrainOptions, main, overrides_last(sys.argv[1:]))
