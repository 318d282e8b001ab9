"""Command line of the doctor.

python -m launch.doctor -H hostfile --dataset-dir ~/dataset
"""

from __future__ import annotations

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from launch.cluster.hostfile import HOSTFILE, choose, find_hostfile, read_hostfile, world_size
from launch.doctor import diagnose
from launch.doctor.prediction import count_parameters, step_seconds_of
from pipeline.cli import UserError, run
from pipeline.data.image_files import TRAINING_LIST
from pipeline.files import write_atomically
from pipeline.run_folder import RUNS_DIR
from pipeline.training.options import DATASET_DIR


@dataclass(frozen=True)
class Options:
    """Check every host of a hostfile before a run: what would break there, and how to fix it.

    Asks all hosts at once over ssh, then runs an all-reduce between them. Exit status 0 if a run
    can start (there may be warnings), 2 if a check failed.

    Example: python -m launch.doctor -H hostfile --dataset-dir ~/dataset --recipe vapsr_x4
    """

    hostfile: Annotated[Path, tyro.conf.arg(aliases=["-H"])] = Path(HOSTFILE)
    """File with lines such as `node1 slots=8`."""
    include: str = ""
    """Check only these hosts and slots: node1@node2:0,2."""
    exclude: str = ""
    """Check all hosts and slots but these."""
    dataset_dir: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = ()
    """Dataset folder that must be the same on every host; may be repeated. Default: ~/dataset, if
    it has a training list."""
    output_dir: Path = RUNS_DIR
    """Run folder. It need not exist yet; if it does, the step time is taken from its log."""
    interface: str = ""
    """Name of the network interface on every host. Default: the one that leads to the first
    host."""
    master_addr: str = ""
    """Address of the first host. Default: among those that all hosts reach, the one on its
    fastest interface."""
    timeout: float = 90
    """Seconds to wait for a host's answer."""
    json: Path | None = None
    """Also write the diagnosis to this JSON file."""
    no_allreduce: bool = False
    """Skip the all-reduce, which takes a few seconds, and the prediction that needs it."""
    recipe: str = ""
    """Predict the scaling efficiency for this recipe."""
    parameters: int | None = None
    """Predict it for this number of parameters."""
    step_seconds: float | None = None
    """Seconds of work per step and rank. Default: from the log of the run in --output-dir."""


def main(options: Options) -> int:
    """Diagnose all hosts and print the result. Return 0, or 2 if a check failed."""
    for name in ("timeout", "parameters", "step_seconds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
    if options.recipe and options.parameters:
        raise UserError("--recipe and --parameters are mutually exclusive; give one of them")
    slots = choose(read_hostfile(find_hostfile(options.hostfile)), options.include, options.exclude)
    parameters = None
    if options.recipe or options.parameters:
        parameters = (
            partial(count_parameters, options.recipe)
            if options.recipe
            else lambda: options.parameters or 0
        )
    step_seconds = options.step_seconds or step_seconds_of(
        options.output_dir.expanduser(), world_size(slots)
    )
    default = (DATASET_DIR,) if (DATASET_DIR.expanduser() / TRAINING_LIST).is_file() else ()
    found = diagnose(
        slots,
        dataset_dirs=[_absolute(path) for path in options.dataset_dir] or default,
        output_dir=_absolute(options.output_dir),
        interface=options.interface,
        timeout=options.timeout,
        parameters=parameters,
        step_seconds=step_seconds,
        master_address=options.master_addr,
        with_all_reduce=not options.no_allreduce,
        say=lambda text: print(text, flush=True),
    )
    print(found.table())
    if options.json:
        write_atomically(options.json, (json.dumps(found.as_json(), indent=1) + "\n").encode())
    return 0 if found.ok else 2


def _absolute(path: Path) -> Path:
    """Make `path` absolute, but leave a leading `~`, which each host expands itself."""
    return path if str(path).startswith("~") else path.absolute()


if __name__ == "__main__":
    run(Options, main)
