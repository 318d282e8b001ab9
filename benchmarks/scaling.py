"""Measure images per second and scaling efficiency for several numbers of ranks.

They take turns, and are compared as ratios within one run.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tyro

from launch import environment
from launch.cluster.hostfile import Slots, as_filter, read_hostfile, world_size
from pipeline.cli import RunError, UserError, run
from pipeline.run_folder import LOG_FILE
from pipeline.training.options import overrides_last
from tools.make_demo_dataset import make_demo_dataset
from tools.parallel import progress

WARM_UP = 10  # steps that are not counted


@dataclass(frozen=True)
class Options:
    """Train a recipe for some steps on 1, 2, ... ranks and print the gain of additional ranks.

    Strong scaling: the global batch is fixed, so each rank's share shrinks. Weak scaling: each
    rank's share is fixed, so the global batch grows. The number of CPU threads per rank is the same
    for all numbers of ranks.

    Example: python benchmarks/scaling.py --ranks 1,2 --recipe demo
    """

    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE ...")
    ] = ()
    """As in training: data.crop=64 generator.num_blocks=3."""
    ranks: Annotated[str, tyro.conf.arg(metavar="N,N,...")] = "1,2"
    """Numbers of ranks to measure; all others are compared with the first."""
    recipe: str = "demo"
    """A name in recipes/ or the path of a YAML file."""
    dataset_dir: Path | None = None
    """Default: the demo's photographs."""
    hostfile: Annotated[Path | None, tyro.conf.arg(aliases=["-H"])] = None
    """Use the first slots of these hosts, as ./launch_distributed_train.sh does. Default: only this
    machine."""
    batch: int = 16
    """Global batch (strong scaling) and batch per rank (weak scaling)."""
    steps: int = 60
    """Number of measured steps."""
    rounds: int = 3
    """Number of rounds, in which each is measured once; medians are reported."""


@dataclass(frozen=True)
class Way:
    """One row of the table."""

    kind: str
    ranks: int
    batch: int


def main(options: Options) -> int:
    """Measure and print."""
    slots = read_hostfile(options.hostfile.expanduser()) if options.hostfile else {}
    numbers = _numbers(options, slots)
    ways = [Way("strong", ranks, options.batch) for ranks in numbers]
    ways += [Way("weak", ranks, options.batch * ranks) for ranks in numbers]
    threads = max(1, len(os.sched_getaffinity(0)) // max(numbers))
    speeds: dict[Way, list[float]] = {way: [] for way in ways}
    with (
        tempfile.TemporaryDirectory() as scratch,
        progress(options.rounds * len(ways), "run") as bar,
    ):
        dataset = options.dataset_dir or make_demo_dataset(Path(scratch) / "demo").dataset_dir
        for number in range(options.rounds):
            for way, runs in speeds.items():  # in turns
                run_dir = Path(scratch) / f"{number}-{way.kind}-{way.ranks}"
                runs.append(_measure(way, options, slots, dataset, run_dir, threads))
                bar.update()
    print_table(speeds, options)
    return 0


def _numbers(options: Options, slots: Slots) -> list[int]:
    """Return the numbers of ranks; raise `UserError` for impossible ones."""
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", options.ranks):
        raise UserError(f"--ranks {options.ranks!r} must be a list of numbers such as 1,2,4")
    if min(options.batch, options.steps, options.rounds) < 1:
        raise UserError("--batch, --steps and --rounds must be at least 1")
    numbers = list(dict.fromkeys(map(int, options.ranks.split(","))))
    for ranks in numbers:
        if options.batch % ranks:
            raise UserError(
                f"--batch {options.batch} cannot be divided among {ranks} ranks; choose a multiple"
            )
    most = world_size(slots) if slots else environment.num_gpus()
    if most and max(numbers) > most:
        raise UserError(
            f"--ranks {max(numbers)} exceeds the number of {'slots' if slots else 'GPUs'}, {most}; "
            "choose fewer"
        )
    return numbers


def _measure(
    way: Way, options: Options, slots: Slots, dataset: Path, run_dir: Path, threads: int
) -> float:
    """Return the images per second of all ranks together, after the warm-up."""
    script, how = "local.py", ["--procs", str(way.ranks)]
    if slots:
        script = "distributed.py"
        how = [
            "-H",
            str(options.hostfile),
            "--include",
            as_filter(_first(slots, way.ranks)),
            "--no-doctor",
        ]
    command = [
        sys.executable,
        str(ROOT / "launch" / script),
        *how,
        "--reset",
        "--recipe",
        options.recipe,
        "--dataset-dir",
        str(dataset),
        "--output-dir",
        str(run_dir),
        f"steps={WARM_UP + options.steps}",
        f"log_every={WARM_UP}",
        "validate_every=1000000",
        "save_every=1000000",
        "validation_images=1",
        f"ds.train_batch_size={way.batch}",
        *options.overrides,
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(
            f"{way.ranks} ranks: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}"
        )
    lines = [json.loads(line) for line in (run_dir / LOG_FILE).read_text().splitlines()]
    speeds = [
        line["images_per_second"]
        for line in lines
        if line["event"] == "train" and line["step"] > WARM_UP
    ]
    return len(speeds) / sum(1 / speed for speed in speeds)  # harmonic mean: over the whole time


def _first(slots: Slots, ranks: int) -> Slots:
    """Return the first `ranks` slots."""
    chosen: Slots = {}
    for host, numbers in slots.items():
        taken = numbers[: ranks - world_size(chosen)]
        if taken:
            chosen[host] = taken
    return chosen


def print_table(speeds: dict[Way, list[float]], options: Options) -> None:
    """Print medians; efficiency is the speed per rank relative to the first number of ranks."""
    print(
        f"recipe {options.recipe}, {options.steps} steps counted, medians of {options.rounds} "
        "rounds"
    )
    print(
        f"{'scaling':8}{'ranks':>6}{'global batch':>14}"
        f"{'images/s':>10}{'speed-up':>10}{'efficiency':>12}"
    )
    for way, runs in speeds.items():
        reference = next(other for other in speeds if other.kind == way.kind)
        gain = statistics.median(
            speed / base for speed, base in zip(runs, speeds[reference], strict=True)
        )
        efficiency = gain * reference.ranks / way.ranks
        print(
            f"{way.kind:8}{way.ranks:6}{way.batch:14}{statistics.median(runs):10.1f}{gain:10.2f}{efficiency:12.1%}"
        )


if __name__ == "__main__":
    run(Options, main, overrides_last(sys.argv[1:]))
