"""Predict the scaling efficiency: the share of the speed of N independent ranks that is kept.

A ring all-reduce of S bytes between N ranks takes 2(N-1) steps, each of which sends S/N bytes
(Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009):

    T = 2(N-1)/N * S / B + 2(N-1) * a

B is the bus bandwidth in bytes per second as nccl-tests counts it (2(n-1)/n * size / time,
doc/PERFORMANCE.md there), and a is the latency of one step in seconds: a 4-byte all-reduce between
n ranks takes 2(n-1) * a. If a training step has C seconds of work per rank, and none of T is hidden
behind it, the efficiency is C / (C + T). That is the worst case, since communication can overlap
with the backward pass. S comes from the recipe's networks (`count_parameters`), C from the log of
an earlier run (`step_seconds_of`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.remote import ROOT, last_line
from launch.doctor.allreduce import LATENCY_BYTES
from pipeline import run_folder
from pipeline.checkpoint_index import read_index
from pipeline.cli import UserError
from pipeline.files import parse_json

GOOD = 0.9
_COUNT = """
import sys
sys.path[:] = [path for path in sys.path if path]  # without the current folder
import torch
from pipeline.models import build_generator
from pipeline.models.discriminators import build_discriminator
from pipeline.config.recipe import load_recipe, parse_overrides
recipe = load_recipe(sys.argv[1], parse_overrides(sys.argv[2:])[0])
with torch.device("meta"):
    networks = [build_generator(recipe.generator.name, recipe.scale, **recipe.generator.params)]
    if recipe.adversarial:
        spec = recipe.adversarial.discriminator
        networks.append(build_discriminator(spec.name, recipe.data.crop, **spec.params))
print(sum(parameter.numel() for network in networks for parameter in network.parameters()))
"""


@dataclass(frozen=True)
class Network:
    """A measured all-reduce between `ranks` ranks: `seconds` by size in bytes."""

    ranks: int
    backend: str
    seconds: Mapping[int, float]

    @property
    def latency(self) -> float:
        """Seconds that a 4-byte all-reduce takes."""
        return self.seconds[LATENCY_BYTES]

    def bus_bandwidth(self, size: int) -> float:
        """Bus bandwidth in bytes per second for tensors of `size` bytes."""
        return 2 * (self.ranks - 1) / self.ranks * size / self.seconds[size]

    @property
    def best_known(self) -> float:
        """Bus bandwidth in bytes per second at the largest size measured."""
        return self.bus_bandwidth(max(self.seconds))

    def text(self) -> str:
        """Describe the measurement in one line."""
        sizes = [size for size in self.seconds if size != LATENCY_BYTES]
        speeds = ", ".join(
            f"{size / 1e6:.0f} MB {self.bus_bandwidth(size) / 1e9:.2f} GB/s" for size in sizes
        )
        return (
            f"all-reduce of {self.ranks} ranks over {self.backend}: 4 bytes "
            f"{self.latency * 1e6:.0f} us; {speeds} (bus bandwidth)"
        )


def prediction(network: Network, ranks: int, parameters: int, step_seconds: float | None) -> str:
    """Describe communication time and efficiency, for gradients in FP16 or BF16 and in FP32."""
    lines = [
        f"prediction for {ranks} ranks and {parameters:,} parameters, by T = 2(N-1)/N * bytes / "
        "bandwidth + 2(N-1) * latency (ring all-reduce, no overlap):"
    ]
    for name, num_bytes in (("FP16/BF16", 2), ("FP32", 4)):
        seconds = all_reduce_seconds(parameters * num_bytes, ranks, network)
        least = seconds * GOOD / (1 - GOOD)
        text = f"a step must take at least {_time(least)} for {GOOD:.0%}"
        if step_seconds is not None:
            kept = efficiency(step_seconds, seconds)
            text = f"{kept:.1%} at {_time(step_seconds)} per step; {text}"
        lines.append(f"  {name:9} gradients {_time(seconds):>8}  {text}")
    return "\n".join(lines)


def all_reduce_seconds(num_bytes: float, ranks: int, network: Network) -> float:
    """T of the module's formula in seconds; `ranks` may differ from the number measured."""
    steps = 2 * (ranks - 1)
    return steps / ranks * num_bytes / network.best_known + steps * network.latency / (
        2 * (network.ranks - 1)
    )


def efficiency(step_seconds: float, communication_seconds: float) -> float:
    """Share of a step that is work, 0 to 1: C / (C + T)."""
    return step_seconds / (step_seconds + communication_seconds)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def count_parameters(recipe: str, overrides: Sequence[str] = ()) -> int:
    """Count the parameters that a recipe trains (in its last stage), including a discriminator's.

    Another process counts them, because networks need torch. `UserError` for an invalid recipe.
    """
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, recipe, *overrides],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode != 0:
        complaint = last_line(done.stderr)
        raise UserError(f"--recipe {recipe}: {complaint.partition('UserError: ')[2] or complaint}")
    return int(last_line(done.stdout))


def step_seconds_of(run_dir: Path, ranks: int) -> float | None:
    """Estimate the seconds of work per step of each of `ranks` ranks from a run's log, if any.

    The time that the run's own ranks spent on communication counts as work. The global batch stays
    the same, so the time falls as the number of ranks grows.
    """
    run_dir = run_folder.newest_stage(run_dir)
    try:
        batch = parse_json((run_dir / run_folder.DS_CONFIG_FILE).read_text())["train_batch_size"]
        newest = run_folder.newest_intact(run_dir, ())
        if newest is None:
            return None
        before = read_index(run_folder.checkpoint_dir(run_dir, newest))["world_size"]
        lines = (run_dir / run_folder.LOG_FILE).read_text().splitlines()
        speeds = [speed for speed in map(_images_per_second, lines) if speed]
        return batch / speeds[-1] * before / ranks
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def _images_per_second(line: str) -> float | None:
    try:
        values = parse_json(line)
        return float(values["images_per_second"]) if values["event"] == "train" else None
    except (ValueError, KeyError, TypeError):  # another event, or a line cut short
        return None
