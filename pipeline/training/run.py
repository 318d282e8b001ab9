"""The training run: one rank's life, stage after stage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any, NoReturn

from pipeline.cli import RunError, UserError
from pipeline.distributed.launcher import GUARDED
from pipeline.distributed.ranks import Ranks, start_distributed, stop_distributed
from pipeline.distributed.stopping import StopSignals, Watchdog
from pipeline.files import short_path
from pipeline.libraries import keep_freed_memory, postpone_dynamo
from pipeline.monitor.console import Console
from pipeline.monitor.wandb_tracker import require_wandb
from pipeline.run_folder import run_lock
from pipeline.training.loop import Training
from pipeline.training.memory import MemoryShortageError, rehearse
from pipeline.training.options import Plan, TrainOptions, plans_of_rank
from pipeline.training.reporting import Reporter
from pipeline.training.setup import check_stages, move_aside, set_up

# Whether all ranks are about to do the same: code, packages, recipe and data.


SOURCES = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "deepspeed", "accelerate", "numpy", "opencv-python-headless")
MOST_NAMED = 3


def refuse_other_hosts(plans: Sequence[Plan], ranks: Ranks) -> None:
    """Raise `UserError` naming the host, and what differs there from the first rank's; all ranks
    call it together."""
    if ranks.world_size == 1:
        return
    told = ranks.gather((socket.gethostname(), facts(plans)))
    (first, ours), others = told[0], told[1:]
    for rank, (host, theirs) in enumerate(others, 1):
        named = differences(ours, theirs)
        if named:
            more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
            raise UserError(
                f"rank {rank} on {host} differs from rank 0 on {first}: "
                f"{'; '.join(named[:MOST_NAMED])}"
                f"{more}; make the hosts alike with launch/sync.sh"
            )


def facts(plans: Sequence[Plan]) -> dict[str, str]:
    """What decides what a rank computes, by name."""
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
    """One text for each fact that is not the same."""
    return [
        f"{name} ({theirs.get(name, 'none')}, there {ours.get(name, 'none')})"
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
    dali = {
        distribution.version
        for distribution in distributions()
        if str(distribution.metadata["Name"]).startswith("nvidia-dali-cuda")
    }  # of whichever CUDA
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
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def main(options: TrainOptions) -> int:
    """Read and check what `options` name, and `train`."""
    plans = plans_of_rank(options)
    return 2 if plans is None else train(options, plans)


def train(options: TrainOptions, plans: Sequence[Plan]) -> int:
    """One rank's whole life. Exit status: 0 finished, 128 + signal stopped and saved, 2 bad input,
    1 anything else."""
    watchdog = Watchdog(options.watchdog_minutes * 60)
    watchdog.begin()
    patience = options.watchdog_minutes + 5 if options.watchdog_minutes else 24 * 60
    ranks = start_distributed(max(10.0, patience))
    postpone_dynamo()
    if ranks.device.type == "cpu":
        keep_freed_memory()
    try:
        status = _train_all(plans, ranks, watchdog)
    except BaseException as error:
        if ranks.world_size > 1 or isinstance(error, Exception):
            _leave(error, ranks)
        raise
    stop_distributed()
    return status


def _train_all(plans: Sequence[Plan], ranks: Ranks, watchdog: Watchdog) -> int:
    console = Console(is_mute=not ranks.is_first)
    with StopSignals(console.say) as signals, contextlib.ExitStack() as stack:
        refuse_other_hosts(plans, ranks)
        ranks.on_all_ranks(lambda: _take_run_folder(plans[0], ranks, console, stack))
        check_stages(plans, ranks)
        rehearse(plans, ranks, console.say)
        for plan in plans:
            signals.is_patient = False
            watchdog.begin()
            status = _train(plan, ranks, console, signals)
            if status:
                break
        return status


def _leave(error: BaseException, ranks: Ranks) -> NoReturn:
    """Tell what happened to a rank, and end at once.

    Of one rank alone, because threads of its libraries may not survive the interpreter's own end:
    now and then that aborted, with status 134 in place of 2. Of several, because the others may
    wait for this one in a collective, and to close the group in an orderly way it would wait for
    them (pytorch issue 180611). What all ranks raise alike the first one says, or each in its log
    where a guard keeps it. A rank without memory speaks for itself.
    """
    status = 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
    elif isinstance(error, (UserError, RunError)):
        status = 2 if isinstance(error, UserError) else 1
        if ranks.is_first or GUARDED in os.environ or isinstance(error, MemoryShortageError):
            print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _train(plan: Plan, ranks: Ranks, console: Console, signals: StopSignals) -> int:
    """One stage from where it stands to its end."""
    run = set_up(plan, ranks, console.say)
    reporter = ranks.on_all_ranks(lambda: Reporter(run, console) if ranks.is_first else None)
    training = Training(run, reporter, console, signals)
    try:
        return training.train()
    except BaseException as error:
        is_told = isinstance(error, (UserError, RunError))
        console.note(
            f"error: {error}" if is_told else "".join(traceback.format_exception(error)).rstrip()
        )
        raise
    finally:
        training.close()
        for engine in run.trainer.engines.values():
            engine.destroy()


def _take_run_folder(
    plan: Plan, ranks: Ranks, console: Console, stack: contextlib.ExitStack
) -> None:
    """Lock the run folder for as long as `stack` lives, and make room in it for a fresh run if one
    is asked for."""
    if not ranks.is_first:
        return
    if plan.wandb:
        require_wandb()
    stack.enter_context(run_lock(plan.home, console.say))
    kept = move_aside(plan) if plan.reset else None
    if kept:
        console.say(f"the old run is kept in {short_path(kept)}")
