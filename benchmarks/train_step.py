"""Measure training steps and their lower bounds, for networks, precisions, layouts and ways."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import tyro

from launch import environment
from pipeline.cli import RunError, UserError, run
from pipeline.timing import processor
from tools.parallel import progress

VGG = "adversarial={weight: 0.005, loss: %s, discriminator: {name: vgg, head: flatten}}"
NETWORKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vapsr_x2": ("vapsr_x2", ()),
    "vapsr_x4": ("vapsr_x4", ()),
    "vapsr_s_x4": ("vapsr_s_x4", ()),
    "vapsr_3x3_x2": ("vapsr_x2", ("generator.projection_kernel=3",)),
    "srresnet_x4": ("srresnet_x4", ("data.crop=192",)),
    "msrresnet_x4": ("msrresnet_x4", ("data.crop=192",)),
    "rrdbnet_x4": ("msrresnet_x4", ("generator={name: rrdbnet}", "data.crop=192")),
    "rrdbnet6_x4": ("msrresnet_x4", ("generator={name: rrdbnet, num_blocks: 6}", "data.crop=192")),
    "compact_x4": ("compact_x4", ("data.crop=192",)),
    "compact16_x4": ("compact_x4", ("generator={name: compact, num_conv: 16}", "data.crop=192")),
    "srgan_x4": ("msrresnet_x4", (VGG % "vanilla",)),
    "esrgan_x4": ("msrresnet_x4", ("generator={name: rrdbnet}", VGG % "relativistic_average")),
}
"""Name -> recipe and overrides. The GANs lack their VGG19 loss, whose weights are not included."""
DEFAULT = (
    "vapsr_x2",
    "vapsr_x4",
    "vapsr_s_x4",
    "vapsr_3x3_x2",
    "srresnet_x4",
    "msrresnet_x4",
    "rrdbnet_x4",
    "compact_x4",
    "srgan_x4",
    "esrgan_x4",
)
PRECISIONS = {"fp32": (), "bf16": ("ds.bf16.enabled=true",), "fp16": ("ds.fp16.enabled=true",)}
WAYS = {"eager": "compile=off", "compiled": "compile=on", "reduce-overhead": "compile=off"}
LAYOUTS = {
    "auto": "channels_last=auto",
    "channels_last": "channels_last=on",
    "contiguous": "channels_last=off",
}
PARTS = (
    "waiting for data",
    "forward",
    "losses",
    "backward",
    "communication",
    "gradient check",
    "optimizer",
    "EMA",
    "metrics",
    "copy and the rest",
)
LAUNCH_SECONDS = 5e-6  # to launch a GPU kernel from Python


@dataclass(frozen=True)
class Options:
    """Time training steps of real runs, whole and in parts, and compare them with lower bounds.

    The bounds come from the rates of arithmetic and of memory. Every case runs in its own process,
    set up as by train.py, including the loader, on generated photographs. Uncompiled networks are
    also timed in a bare PyTorch loop, alternately; the table has the ratio to the faster of the
    two layouts.

    Example: python benchmarks/train_step.py --networks vapsr_x4 --batches 8 --ways eager compiled
    """

    networks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = DEFAULT
    """Some of the names in NETWORKS at the top of this file."""
    ways: Annotated[
        tuple[Literal["eager", "compiled", "reduce-overhead"], ...],
        tyro.conf.arg(metavar="eager|compiled|reduce-overhead ..."),
    ] = ("eager",)
    """Uncompiled, torch.compile, and torch.compile with CUDA graphs (on a GPU)."""
    precisions: Annotated[
        tuple[Literal["fp32", "bf16", "fp16"], ...], tyro.conf.arg(metavar="fp32|bf16|fp16 ...")
    ] = ("fp32",)
    layouts: Annotated[
        tuple[Literal["auto", "channels_last", "contiguous"], ...],
        tyro.conf.arg(metavar="auto|channels_last|contiguous ..."),
    ] = ("auto",)
    batches: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (8,)
    """Global batch sizes."""
    native_kernels: Literal["auto", "on", "off"] = "auto"
    """The recipe's key of the same name."""
    seconds: float = 6
    """Duration of the timing of each loop, in five windows."""
    rounds: int = 1
    """Number of rounds, in which each case runs once; medians are reported."""
    dataset_dir: Path | None = None
    """Dataset folder. Default: 16 generated photographs of 512x512 as .npy."""
    json: Path | None = None
    """File for all numbers."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    network: str
    way: str
    precision: str
    layout: str
    batch: int

    def overrides(self, native_kernels: str) -> list[str]:
        """Return the overrides for train.py."""
        own = NETWORKS[self.network][1]
        off = [f"ds.{name}.enabled=false" for name in ("fp16", "bf16") if name != self.precision]
        return [
            *own,
            *off,
            *PRECISIONS[self.precision],
            WAYS[self.way],
            LAYOUTS[self.layout],
            f"ds.train_batch_size={self.batch}",
            f"native_kernels={native_kernels}",
            "steps=100000",
            "previews=[]",
            "validation_images=1",
        ]


def main(options: Options) -> int:
    """Measure and print."""
    cases = _cases(options)
    found: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    with (
        tempfile.TemporaryDirectory() as scratch,
        progress(options.rounds * len(cases), "case") as bar,
    ):
        dataset = options.dataset_dir or _photographs(Path(scratch) / "photographs")
        for number in range(options.rounds):
            for case, results in found.items():  # in turns
                results.append(_measure(case, options, dataset, Path(scratch) / f"run-{number}"))
                bar.update()
    rows = {case: _median(results) for case, results in found.items()}
    print(report(rows))
    if options.json:
        lines = [{**vars(case), **row} for case, row in rows.items()]
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    return 0


def _cases(options: Options) -> list[Case]:
    unknown = [name for name in options.networks if name not in NETWORKS]
    if unknown:
        raise UserError(f"--networks {unknown[0]}: choose from {', '.join(NETWORKS)}")
    if min((*options.batches, options.rounds)) < 1 or options.seconds <= 0:
        raise UserError("--batches, --rounds and --seconds must be above 0")
    has_gpu = environment.num_gpus() > 0
    for chosen, words in ((options.precisions, ("fp16",)), (options.ways, ("reduce-overhead",))):
        if not has_gpu and set(chosen) & set(words):
            raise UserError(f"{words[0]} needs a GPU, but this machine has none; omit it")
    return [
        Case(*values)
        for values in itertools.product(
            options.networks, options.ways, options.precisions, options.layouts, options.batches
        )
    ]


def _photographs(folder: Path) -> Path:
    """Write images with edges and noise, and their lists; return the folder."""
    random = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    names = [f"photos/{number:02d}.npy" for number in range(17)]
    for name in names:
        coarse = random.integers(0, 256, (32, 32, 3)).repeat(16, axis=0).repeat(16, axis=1)
        np.save(
            folder / name,
            np.clip(coarse + random.normal(0, 8, coarse.shape), 0, 255).astype(np.uint8),
        )
    (folder / "training_file_list.txt").write_text("".join(f"{name}\n" for name in names[:16]))
    (folder / "validation_file_list.txt").write_text(f"{names[16]}\n")
    return folder


def _measure(case: Case, options: Options, dataset: Path, output: Path) -> dict[str, Any]:
    """Measure one case in its own process."""
    recipe, _ = NETWORKS[case.network]
    request = {
        "recipe": recipe,
        "overrides": case.overrides(options.native_kernels),
        "dataset": str(dataset),
        "output": str(output / "-".join(map(str, vars(case).values()))),
        "way": case.way,
        "seconds": options.seconds,
        "is_adversarial": "gan" in case.network,
    }
    variables = environment.prepare(1, on_gpu=environment.num_gpus() > 0)
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "train_step_case.py"), json.dumps(request)],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(f"{case}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _median(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the result with the median step time."""
    return sorted(results, key=lambda result: result["step"])[(len(results) - 1) // 2]


def report(rows: dict[Case, dict[str, Any]]) -> str:
    """Return both tables and a verdict for each case, as Markdown."""
    threads = os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {threads} threads, torch {version('torch')}",
        "",
        "| network | batch | precision, way, layout, kernel | ms per step | images/s | ours / best "
        "bare loop | "
        "ours / PyTorch's kernel | MiB | s to first step | floor, ms: compute, memory | step / "
        "floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(case, row) for case, row in rows.items()]
    lines += [
        "",
        "ms per step, by part:",
        "",
        f"| network | {' | '.join(PARTS)} |",
        f"|---|{'---|' * len(PARTS)}",
    ]
    for case, row in rows.items():
        cells = [
            f"{1000 * row['parts'][name]:.1f}" if name in row["parts"] else "-" for name in PARTS
        ]
        lines.append(
            f"| {case.network}, {case.way}, {case.precision}, {case.batch} | {' | '.join(cells)} |"
        )
    lines += [
        "",
        *(
            f"- {case.network}, {case.way}, {case.precision}, {case.batch}: {verdict(row)}"
            for case, row in rows.items()
        ),
    ]
    return "\n".join(lines)


def _row(case: Case, row: dict[str, Any]) -> str:
    compute, memory = floors(row)
    bare = {name: 1 / ratio for name, ratio in row["ours_in_parts_of_bare"].items()}
    best = min((speed for name, speed in bare.items() if name != "plain"), default=None)
    cells = [
        case.network,
        case.batch,
        f"{case.precision}, {case.way}, {row['layout']}, {row['kernel']}",
        f"{1000 * row['step']:.0f}",
        f"{row['images'] / row['step']:.1f}",
        "-" if best is None else f"{best:.3f}",
        f"{bare['plain']:.2f}" if "plain" in bare else "-",
        f"{row['memory'] / 2**20:.0f}",
        f"{row['first_step']:.1f}",
        f"{1000 * compute:.0f}, {1000 * memory:.0f}",
        f"{row['step'] / max(compute, memory):.1f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def floors(row: dict[str, Any]) -> tuple[float, float]:
    """Return the lower bounds of the step's time in seconds, by compute and by memory.

    They are its multiply-adds at the rate of a matrix product, and its bytes at that of a copy.
    """
    return row["macs"] / row["macs_per_second"], row["bytes"] / row["bytes_per_second"]


def verdict(row: dict[str, Any]) -> str:
    """Return what limits the step, and what to change."""
    step, parts = row["step"], row["parts"]
    compute, memory = floors(row)
    launches = row["calls"] * LAUNCH_SECONDS if row["device"] == "cuda" else 0.0
    if (share := parts.get("waiting for data", 0) / step) > 0.05:
        return f"bound by the loader ({share:.0%} of the step): use .npy files, raise data.threads"
    if (share := parts.get("communication", 0) / step) > 0.15:
        return f"bound by communication ({share:.0%}): a larger batch per rank, or accumulation"
    if launches > 0.6 * step:
        return f"bound by kernel launches ({row['calls']}): compile it, or use a larger batch"
    name, floor = max((("compute", compute), ("memory", memory)), key=lambda item: item[1])
    if floor > 0.5 * step:
        return (
            f"bound by {name} ({floor / step:.0%} of the step at the measured rate): only less "
            "work would help"
        )
    largest = max(parts, key=lambda part: parts[part])
    return (
        f"bound by its kernels: {name} would allow {step / floor:.1f} times the speed; {largest} "
        f"takes {parts[largest] / sum(parts.values()):.0%}"
    )


if __name__ == "__main__":
    run(Options, main)
