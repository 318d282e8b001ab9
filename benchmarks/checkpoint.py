"""Measure how long training waits for a checkpoint that is saved in the step or in the background.

The ways take turns, and are compared as ratios within one run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tyro

from pipeline.cli import run

CONFIG = {
    "train_batch_size": 1,
    "steps_per_print": 1 << 60,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.99]}},
}
IN_STEP, IN_BACKGROUND, PLAIN = (
    "written in the step",
    "copied, written in the background",
    "torch.save, no hash, no flush",
)


@dataclass(frozen=True)
class Options:
    """Save a network with its EMA weights and Adam's moments repeatedly, in three ways.

    If the step itself writes, training waits for the whole commit. If the state is copied and then
    written in the background, training waits only for the copy to host memory. The third way is
    what many trainers do: one torch.save of weights, EMA weights and moments.

    Example: python benchmarks/checkpoint.py --network rrdbnet num_blocks=23
    """

    params: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=NUMBER ...")
    ] = ()
    """The network's parameters."""
    network: str = "rrdbnet"
    """A name in pipeline/models."""
    scale: int = 4
    """Scale of the network."""
    patch: int = 32
    """Side of the step's single LR image, in pixels."""
    rounds: int = 5
    """Number of rounds, in which each way is measured once; medians are reported."""
    folder: Path | None = None
    """Folder to save to, whose disk matters. Default: the folder for temporary files."""
    json: Path | None = None
    """File for the numbers."""


@dataclass
class Row:
    """One way of saving, with the seconds of each round."""

    name: str
    stalls: list[float]
    """Time that training waited."""
    cpu: list[float]
    """CPU time of the process during the wait, which varies less on a busy machine."""
    steps: list[float]
    """Time of a step during the write; for ways without a background write, of a normal step."""

    @property
    def stall(self) -> float:
        return statistics.median(self.stalls)


def main(options: Options) -> int:
    """Measure and print."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    params = {key: int(value) for key, _, value in (text.partition("=") for text in options.params)}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(options, params, Path(folder))
        rows = bench.measure()
        size = bench.size
    print(
        f"{options.network} x{options.scale}, {bench.parameters:,} parameters, a checkpoint of "
        f"{size / 1e6:.0f} MB; torch {torch.__version__} on {bench.device}, "
        f"{torch.get_num_threads()} threads, medians of {options.rounds} rounds"
    )
    print(_table(rows))
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "parameters": bench.parameters,
                    "bytes": size,
                    "rows": [asdict(row) for row in rows],
                },
                indent=1,
            )
            + "\n"
        )
    return 0


class Bench:
    """A network in training, and the ways of saving it."""

    def __init__(self, options: Options, params: dict[str, int], folder: Path) -> None:
        import torch

        from pipeline.checkpoint.checkpoint import Contents
        from pipeline.checkpoint.progress import Progress
        from pipeline.checkpoint.saving import Saver
        from pipeline.distributed.ranks import start_distributed
        from pipeline.engine.engine import build_engine, resolve_ds_config
        from pipeline.models import build_generator
        from pipeline.models.ema import ExponentialMovingAverage
        from pipeline.models.weights import SavedNetwork

        ranks = start_distributed()
        network = build_generator(options.network, options.scale, **params)
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        self.device, self.folder, self.rounds = ranks.device, folder, options.rounds
        self.ema = ExponentialMovingAverage(network, 0.999)
        self.ema.network.to(ranks.device)
        resolved, *_ = resolve_ds_config(
            CONFIG, world_size=1, total_steps=1 << 20, device=ranks.device
        )
        self.engine = build_engine(network, resolved, ranks)
        self.images = torch.rand(1, 3, options.patch, options.patch, device=ranks.device)
        contents = Contents(
            {"generator": self.engine},
            self.ema,
            SavedNetwork(options.network, options.scale, dict(params), {}),
            {"recipe": "benchmark"},
        )
        self.progress, self.saver = Progress(), Saver(folder, contents, 1, ranks)
        self.step()  # creates Adam's moments
        self.saver.prepare()

    @property
    def size(self) -> int:
        """Size of a checkpoint in bytes."""
        return sum(
            path.stat().st_size
            for path in (self.folder / "checkpoints").rglob("*")
            if path.is_file()
        )

    def step(self) -> float:
        """Do an update; return its seconds."""
        from pipeline.engine.engine import backward_and_step

        began = time.perf_counter()
        backward_and_step(self.engine, self.engine(self.images).square().mean())
        self._finish()
        self.progress.step += 1
        return time.perf_counter() - began

    def measure(self) -> list[Row]:
        ways = [Row(name, [], [], []) for name in (IN_STEP, IN_BACKGROUND, PLAIN)]
        methods: list[Callable[[], tuple[float, float, float]]] = [
            self.in_step,
            self.in_background,
            self.plain,
        ]
        for number in range(-1, self.rounds):  # the first round is a warm-up
            for row, method in zip(ways, methods, strict=True):
                self.step()
                stall, cpu, step = method()
                if number >= 0:
                    row.stalls.append(stall)
                    row.cpu.append(cpu)
                    row.steps.append(step)
        return ways

    def in_step(self) -> tuple[float, float, float]:
        """Return the seconds of the wait, its CPU seconds, and the seconds of the next step."""
        return *self._seconds(
            lambda: (self.saver.begin(self.progress), self.saver.wait())
        ), self.step()

    def in_background(self) -> tuple[float, float, float]:
        seconds, steps = self._seconds(lambda: self.saver.begin(self.progress)), []
        while self.saver.is_writing:
            steps.append(self.step())
        self.saver.wait()
        return *seconds, statistics.mean(steps)

    def plain(self) -> tuple[float, float, float]:
        import torch

        def save() -> None:
            torch.save(
                {
                    "weights": self.engine.module.state_dict(),
                    "averages": self.ema.network.state_dict(),
                    "optimizer": self.engine.optimizer.state_dict(),
                },
                self.folder / "plain.pth",
            )

        return *self._seconds(save), self.step()

    def _seconds(self, action: Callable[[], Any]) -> tuple[float, float]:
        self._finish()
        began, cpu = time.perf_counter(), time.process_time()
        action()
        self._finish()
        return time.perf_counter() - began, time.process_time() - cpu

    def _finish(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)


def _table(rows: list[Row]) -> str:
    lines = [
        "| | stall, ms | range | relative to the first | CPU ms | relative to the first | step "
        "during the write, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio, cpu = (
            statistics.median(one / first for one, first in zip(ours, theirs, strict=True))
            for ours, theirs in ((row.stalls, rows[0].stalls), (row.cpu, rows[0].cpu))
        )
        lines.append(
            f"| {row.name} | {1e3 * row.stall:.0f} | {1e3 * min(row.stalls):.0f} to "
            f"{1e3 * max(row.stalls):.0f} | {ratio:.3f} | {1e3 * statistics.median(row.cpu):.0f} | "
            f"{cpu:.3f} | {1e3 * statistics.median(row.steps):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(Options, main)
