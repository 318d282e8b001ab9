"""Run all training stages on one rank."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any, NoReturn

import torch

from pipeline.cli import DISK_ERRORS, RunError, UserError, disk_error
from pipeline.distributed.launcher import GUARDED
from pipeline.distributed.ranks import Ranks, start_distributed, stop_distributed
from pipeline.distributed.stopping import StopSignals, Watchdog
from pipeline.files import file_sha256, remove_private_temp, short_path, use_private_temp
from pipeline.installation import as_typed
from pipeline.libraries import (
    keep_compiled_code_private,
    keep_freed_memory,
    postpone_dynamo,
)
from pipeline.monitor.console import RUN_LOG_FILE, Console
from pipeline.monitor.wandb_tracker import require_wandb
from pipeline.run_folder import checkpoint_steps, move_aside, run_lock
from pipeline.training.healing import DivergedError, finish_return, return_to_health
from pipeline.training.loop import Training
from pipeline.training.memory import (
    MemoryShortageError,
    bare,
    fit_to_memory,
    rehearse,
    split_further,
)
from pipeline.training.options import TrainOptions, TrainPlan, plans_of_rank
from pipeline.training.reporting import Reporter
from pipeline.training.setup import check_stages, move_logs_aside, set_up
from pipeline.training.start import with_start_params

# Before training, all ranks compare code, packages, recipe and data: ranks that differ would train
# on wrong gradients, or hang.

SOURCES = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "deepspeed", "accelerate", "numpy", "opencv-python-headless")
MOST_NAMED = 3


def refuse_other_hosts(plans: Sequence[TrainPlan], ranks: Ranks) -> None:
    """Raise `UserError` if another host differs from the first rank's, naming host and differences.

    All ranks call it together.
    """
    if ranks.world_size == 1:
        return
    gathered = ranks.gather((socket.gethostname(), facts(plans)))
    (first, ours), others = gathered[0], gathered[1:]
    for rank, (host, theirs) in enumerate(others, 1):
        named = differences(ours, theirs)
        if named:
            more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
            raise UserError(
                f"rank {rank} on {host} differs from rank 0 on {first}: "
                f"{'; '.join(named[:MOST_NAMED])}"
                f"{more}; bring the hosts in line with launch/sync.sh"
            )


def facts(plans: Sequence[TrainPlan]) -> dict[str, str]:
    """Return everything that determines what a rank computes: name -> version, hash or value."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), **_packages()}
    for plan in plans:
        stage = f"stage {plan.recipe.stage}: " if plan.recipe.stage else ""
        identity = plan.identity
        found |= {
            f"{stage}dataset {key}": str(value) for key, value in identity.pop("dataset").items()
        }
        found |= {
            f"{stage}{key} {name}": value
            for key, part in identity.items()
            for name, value in _flat(part)
        }
    return found | {
        f"file pipeline/{path.relative_to(SOURCES).as_posix()}": _digest(path)
        for path in sorted([*SOURCES.rglob("*.py"), *SOURCES.rglob("*.cpp")])
    }


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Describe each fact that differs, one text per fact."""
    return [
        f"{name} ({theirs.get(name, 'none')} instead of {ours.get(name, 'none')})"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[f"package {name}"] = version(name)
        except PackageNotFoundError:
            found[f"package {name}"] = "none"
    dali = {  # its package name ends in the CUDA version
        distribution.version
        for distribution in distributions()
        if str(distribution.metadata["Name"]).startswith("nvidia-dali-cuda")
    }
    return found | {"package nvidia-dali": ", ".join(sorted(dali))}


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(value, Mapping):
        return [(prefix, json.dumps(value, sort_keys=True, default=str))]
    return [
        item
        for key, inner in value.items()
        for item in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    ]


def _digest(path: Path) -> str:
    return file_sha256(path)[:12]


def main(options: TrainOptions) -> int:
    """Read and check what `options` name, then `train`. Returns the exit status."""
    plans = plans_of_rank(options)
    return 2 if plans is None else train(options, plans)


def train(options: TrainOptions, plans: Sequence[TrainPlan]) -> int:
    """Run all stages on this rank.

    Returns the exit status: 0 finished, 128 + signal stopped and saved, 2 bad input, 1 any other
    failure.
    """
    watchdog = Watchdog(options.watchdog_minutes * 60)
    watchdog.begin()
    patience = options.watchdog_minutes + 5 if options.watchdog_minutes else 24 * 60
    ranks = start_distributed(max(10.0, patience))
    postpone_dynamo()
    keep_compiled_code_private()
    if ranks.device.type == "cpu":
        keep_freed_memory()
    use_private_temp()
    try:
        status = _train_all(plans, ranks, watchdog)
    except BaseException as error:
        if ranks.world_size > 1 or isinstance(error, Exception):
            _exit_at_once(error, ranks)
        raise
    stop_distributed()
    return status


def _train_all(plans: Sequence[TrainPlan], ranks: Ranks, watchdog: Watchdog) -> int:
    console = Console(is_mute=not ranks.is_first)
    with StopSignals(console.say) as signals, contextlib.ExitStack() as stack:
        refuse_other_hosts(plans, ranks)
        ranks.on_all_ranks(lambda: _lock_run_folder(plans, ranks, console, stack))
        plans = with_start_params(plans, ranks)
        check_stages(plans, ranks)
        ranks.on_all_ranks(lambda: _move_old_run(plans[0], console) if ranks.is_first else None)
        plans = rehearse(plans, ranks, console.say)
        for plan in _with_from_step(plans, ranks):
            status = _train(plan, ranks, console, signals, watchdog)
            if status:
                break
        return status


def _with_from_step(plans: Sequence[TrainPlan], ranks: Ranks) -> list[TrainPlan]:
    """Return the plans, with `from_step` only in that of the newest stage that has begun."""
    begun = [i for i, plan in enumerate(plans) if checkpoint_steps(plan.run_dir)]
    newest = ranks.agree(begun[-1] if begun else 0)
    return [plan if i == newest else replace(plan, from_step=None) for i, plan in enumerate(plans)]


def _exit_at_once(error: BaseException, ranks: Ranks) -> NoReturn:
    """Report an error and exit at once, without interpreter shutdown.

    With one rank, library threads occasionally abort during shutdown (exit status 134 instead of
    2). With several, the other ranks may be waiting for this one in a collective, and an orderly
    shutdown of the process group would wait for them (pytorch issue 180611). Errors that all ranks
    raise together are printed by the first rank only, or by each rank if a supervisor keeps its
    log. A rank that is out of memory always prints its own error.
    """
    status = 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
    elif isinstance(error, (UserError, RunError)):
        status = 2 if isinstance(error, UserError) else 1
        if ranks.is_first or GUARDED in os.environ or isinstance(error, MemoryShortageError):
            print(as_typed(f"error: {error}"), file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
        print(as_typed(f"error: {disk_error(error)}"), file=sys.stderr)
    else:
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    remove_private_temp()
    os._exit(status)


def _train(
    plan: TrainPlan, ranks: Ranks, console: Console, signals: StopSignals, watchdog: Watchdog
) -> int:
    """Run one stage from its current step to its end."""
    plan = fit_to_memory(plan, ranks)
    while True:
        signals.is_patient = False
        watchdog.begin()
        status, trouble = _train_until_trouble(plan, ranks, console, signals)
        if trouble is None:
            return status
        # The networks are no longer referenced, and the next ones need their memory.
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        console.log_to(plan.log_dir / RUN_LOG_FILE)
        plan = replace(plan, from_step=None)
        try:
            if isinstance(trouble, DivergedError):
                return_to_health(plan, trouble, ranks, console.say)
            else:
                plan = split_further(plan, trouble, ranks, console.say)
        except RunError as error:
            console.note(f"error: {error}")
            raise


def _train_until_trouble(
    plan: TrainPlan, ranks: Ranks, console: Console, signals: StopSignals
) -> tuple[int, DivergedError | MemoryShortageError | None]:
    """Train from the newest checkpoint on.

    Returns the exit status, or what can be mended by starting from an earlier checkpoint.
    """
    run = set_up(plan, ranks, console.say)
    reporter = ranks.on_all_ranks(lambda: Reporter(run, console) if ranks.is_first else None)
    training = Training(run, reporter, console, signals)
    try:
        returned = finish_return(run, console.say)
        if returned and reporter:
            reporter.journal.log("healing", run.progress.step, returned)
        return training.train(), None
    except DivergedError as error:
        # All ranks are here, and the last exchange between them comes before those of the next
        # start.
        training.agreement.finish()
        return 1, bare(error)
    except MemoryShortageError as error:
        return 1, bare(error)
    except BaseException as error:
        is_plain = isinstance(error, (UserError, RunError))
        console.note(
            f"error: {error}" if is_plain else "".join(traceback.format_exception(error)).rstrip()
        )
        raise
    finally:
        training.close()
        for engine in run.trainer.engines.values():
            engine.destroy()


def _lock_run_folder(
    plans: Sequence[TrainPlan], ranks: Ranks, console: Console, stack: contextlib.ExitStack
) -> None:
    """Lock the run folder for the lifetime of `stack`.

    Separate log folders are locked too: two runs would write to the same files there.
    """
    if not ranks.is_first:
        return
    plan = plans[0]
    if plan.wandb:
        require_wandb()
    homes = {plan.home.resolve(), *(plan.run_dir.resolve() for plan in plans)}
    logs = dict.fromkeys(plan.log_dir.resolve() for plan in plans)
    for folder in (plan.home, *(folder for folder in logs if folder not in homes)):
        stack.enter_context(run_lock(folder, console.say))


def _move_old_run(plan: TrainPlan, console: Console) -> None:
    """With --reset, move the old run aside: the last thing before the new one begins."""
    if plan.reset:
        move_logs_aside(plan)
        kept = move_aside(plan.home)
        if kept:
            console.say(f"the old run is kept in {short_path(kept)}")
