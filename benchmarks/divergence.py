"""Make runs diverge and see whether they heal; see whether clean runs raise a false alarm.

A faulty run is compared with the clean run of the same recipe and seed by its last validation. A
clean run is compared with the same run under `healing=off`: every tensor must have the same bytes.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tyro

from pipeline.cli import run

STEPS = 800
TINY = (
    f"steps={STEPS}",
    "data.crop=32",
    "ds.train_batch_size=8",
    "compile=off",
    "channels_last=on",
    "native_kernels=off",
    "log_every=50",
    "validate_every=100",
    "save_every=100",
    "previews.count=0",
    f"ds.scheduler.params.total_num_steps={STEPS}",
    "ds.scheduler.params.warmup_num_steps=20",
    "healing.window=50",
    "healing.rate_steps=50",
    "healing.saturation=60",
)
"""Overrides of the demo recipe for runs of about 10 seconds. The windows fit their length."""
VAPSR = "generator={name: vapsr, num_features: 16, num_attention_features: 16, num_blocks: 1}"
GAN = "adversarial={weight: 0.005, discriminator: {name: vgg, num_features: 4}}"
BF16 = "ds.fp16.enabled=false", "ds.bf16.enabled=true"


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in training, once, in some updates."""

    kind: str  # a key of KINDS
    at: int  # number of updates before the first that is affected
    count: int = 1  # updates
    factor: float = 100.0  # of the learning rate, the gradient or the weights
    gan: bool = False
    overrides: tuple[str, ...] = ()
    repeats: bool = False  # also after the run went back

    @property
    def text(self) -> str:
        factor = (
            f" (x {self.factor:g})" if self.kind in ("rate", "weights", "discriminator") else ""
        )
        return f"{KINDS[self.kind][0]}{factor}, {self.count} updates from {self.at}"


@contextmanager
def injected(fault: Fault) -> Iterator[list[int]]:
    """Make this process's training suffer `fault`, once; yields the numbers of the updates hit."""
    from pipeline.training.trainers import AdversarialTrainer, ReconstructionTrainer

    hit: list[int] = []

    def faulty(step: Callable[..., Any]) -> Callable[..., Any]:
        def run_step(trainer: Any, batch: Any, number: int) -> Any:
            is_new = fault.repeats or number not in hit
            if not (is_new and fault.at <= number < fault.at + fault.count):
                return step(trainer, batch, number)
            hit.append(number)
            with KINDS[fault.kind][1](trainer, batch, fault):
                return step(trainer, batch, number)

        return run_step

    with (
        patch.object(ReconstructionTrainer, "step", faulty(ReconstructionTrainer.step)),
        patch.object(AdversarialTrainer, "step", faulty(AdversarialTrainer.step)),
    ):
        yield hit


@contextmanager
def _rate(trainer: Any, batch: Any, fault: Fault) -> Iterator[None]:
    for group in trainer.generator.optimizer.param_groups:
        group["lr"] *= fault.factor
    yield


@contextmanager
def _discriminator_rate(trainer: Any, batch: Any, fault: Fault) -> Iterator[None]:
    for group in trainer.discriminator.optimizer.param_groups:
        group["lr"] *= fault.factor
    yield


@contextmanager
def _crop(trainer: Any, batch: Any, fault: Fault) -> Iterator[None]:
    """Give the first sample of the batch an HR image that has nothing to do with its LR image."""
    import torch

    generator = torch.Generator().manual_seed(fault.at)
    batch.hr[0] = torch.randint(0, 256, batch.hr[0].shape, generator=generator, dtype=torch.uint8)
    yield


@contextmanager
def _gradient(
    trainer: Any, batch: Any, fault: Fault, value: float = float("nan")
) -> Iterator[None]:
    """Write a value into one gradient before the update."""

    def spoil() -> None:
        next(p.grad for p in trainer.generator.module.parameters() if p.grad is not None).view(-1)[
            0
        ] = value

    trainer.generator.before_update.append(spoil)
    yield
    trainer.generator.before_update.remove(spoil)


@contextmanager
def _overflow(trainer: Any, batch: Any, fault: Fault) -> Iterator[None]:
    with _gradient(trainer, batch, fault, float("inf")):
        yield


@contextmanager
def _weights(trainer: Any, batch: Any, fault: Fault) -> Iterator[None]:
    """Multiply the largest weight tensor, as a flipped bit in memory would."""
    import torch

    with torch.no_grad():
        max(trainer.generator.weights, key=torch.numel).mul_(fault.factor)
    yield


KINDS: dict[str, tuple[str, Callable[..., Any]]] = {
    "rate": ("the learning rate is far too high", _rate),
    "crop": ("an HR crop is noise", _crop),
    "gradient": ("a gradient is NaN", _gradient),
    "overflow": ("gradients are infinite", _overflow),
    "discriminator": ("the discriminator's learning rate is far too high", _discriminator_rate),
    "weights": ("weights are multiplied", _weights),
}
FAULTS = (
    Fault("rate", 230, 20, 100),
    Fault("rate", 305, 20, 1000),
    Fault("rate", 187, 40, 100),
    Fault("rate", 411, 5, 1000),
    Fault("rate", 250, 30, 300, overrides=("seed=1",)),
    Fault("rate", 20, 30, 1000, overrides=("seed=2",)),
    Fault("rate", 240, 30, 1000, gan=True),
    Fault("crop", 260),
    Fault("crop", 377, 3, overrides=("ds.gradient_clipping=0",)),
    Fault("crop", 90, 12, overrides=("seed=3",)),
    Fault("gradient", 222),
    Fault("gradient", 310, 15),
    Fault("gradient", 150, 60, overrides=("seed=4",)),
    Fault("overflow", 200, 60),
    Fault("overflow", 333, 80, overrides=("seed=5",)),
    Fault("weights", 281, 1, 1000),
    Fault("weights", 140, 1, -20, overrides=("seed=6",)),
    Fault("discriminator", 220, 80, 100, gan=True),
    Fault("discriminator", 300, 60, 1000, gan=True, overrides=("seed=7",)),
    Fault("discriminator", 150, 150, 30, gan=True, overrides=("seed=8",)),
)
CLEAN = (
    (),
    ("seed=11",),
    ("seed=12", "losses={charbonnier: 1}"),
    ("seed=13", "losses={mse: 1}"),
    ("seed=14", "losses={l1: 1, tv: 0.001}", "data.augment=false"),
    ("seed=15", "losses={l1: 1, fft: 0.05}"),
    ("seed=16", "generator={name: msrresnet, num_features: 12, num_blocks: 2}"),
    ("seed=17", "generator={name: srresnet, num_features: 12, num_blocks: 2}"),
    ("seed=18", "generator={name: rrdbnet, num_features: 8, num_grow_ch: 4, num_blocks: 1}"),
    ("seed=19", "generator={name: compact, num_features: 12, num_conv: 3}"),
    ("seed=20", "scale=4"),
    ("seed=21", "scale=4", "data.degradation=realesrgan"),
    ("seed=22", "ds.train_batch_size=4", "ds.optimizer.params.lr=2e-3"),
    ("seed=23", *BF16),
    ("seed=24", "ds.zero_optimization.stage=1"),
    ("seed=25", "ds.optimizer.params.lr=4e-3", "ds.gradient_clipping=0"),
    ("seed=26", GAN),
    ("seed=27", GAN.replace("weight: 0.005", "weight: 0.02, loss: relativistic_average")),
    ("seed=28", GAN.replace("weight: 0.005", "weight: 0.01, loss: hinge")),
    ("seed=29", GAN.replace("weight: 0.005", "weight: 0.01, loss: least_squares")),
)


@dataclass(frozen=True)
class Options:
    """Inject faults into small runs, or train clean ones, and print a table.

    Results are added to --results, a file of JSON lines; cases that are in it are not run again.

    Example: python benchmarks/divergence.py --cases faults
    """

    cases: Annotated[str, tyro.conf.arg(metavar="faults|clean|all")] = "all"
    """Which cases to run."""
    dataset_dir: Path | None = None
    """A dataset folder with lists. Default: the demo's photographs, in a temporary folder."""
    results: Path = Path("divergence.jsonl")
    """Where results are kept."""
    only: tuple[int, ...] = ()
    """Numbers of the cases, from 0. Default: all."""


def main(options: Options) -> None:
    import torch  # noqa: F401 (imported before the forks, so that none of them has to)

    import pipeline.training.run  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        dataset = options.dataset_dir or _demo_dataset(place)
        done: dict[tuple[str, int], dict[str, Any]] = {}
        cleans: dict[tuple[str, ...], dict[str, Any]] = {}
        if options.results.is_file():
            lines = options.results.read_text().splitlines()
            done = {(entry["cases"], entry["number"]): entry for entry in map(json.loads, lines)}
        for cases, run_case in (("faults", run_fault), ("clean", run_clean)):
            if options.cases not in (cases, "all"):
                continue
            for number in options.only or range(len(FAULTS if cases == "faults" else CLEAN)):
                if (cases, number) not in done:
                    result = run_case(number, dataset, place / f"{cases}-{number}", cleans)
                    done[cases, number] = {"cases": cases, "number": number, **result}
                    with open(options.results, "a") as file:
                        file.write(json.dumps(done[cases, number]) + "\n")
                print(json.dumps(done[cases, number]), flush=True)
    entries = [entry for (cases, _), entry in sorted(done.items()) if cases == "faults"]
    if entries:
        print(table(entries))
        print(f"faults: {sum(e['is_good'] for e in entries)} of {len(entries)} within 1 %")
    entries = [entry for (cases, _), entry in sorted(done.items()) if cases == "clean"]
    if entries:
        print(f"clean runs: {sum(e['is_good'] for e in entries)} of {len(entries)} the same")


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the results of faults, with a row for each kind."""
    rows = ["| fault | count | went back | within 1 % | PSNR-Y, worst |", "|---|---|---|---|---|"]
    for kind, (text, _) in KINDS.items():
        own = [entry for entry in entries if FAULTS[entry["number"]].kind == kind]
        if own:
            worst = min((e["psnr_y"] or 0) / e["clean_psnr_y"] - 1 for e in own)
            rows.append(
                f"| {text} | {len(own)} | {sum(e['returns'] > 0 for e in own)} | "
                f"{sum(e['is_good'] for e in own)} | {100 * worst:+.1f} % |"
            )
    return "\n".join(rows)


def run_fault(
    number: int, dataset: Path, place: Path, cleans: dict[tuple[str, ...], dict[str, Any]]
) -> dict[str, Any]:
    """Return how a run with fault `number` ended, beside the clean run."""
    fault = FAULTS[number]
    overrides = (VAPSR, *((GAN,) if fault.gan else ()), *fault.overrides)
    # Faults of the same recipe and seed share their clean run.
    if overrides not in cleans:
        cleans[overrides] = train(dataset, place / "clean", overrides, None)
    clean, faulty = cleans[overrides], train(dataset, place / "faulty", overrides, fault)
    ratio = faulty["psnr_y"] / clean["psnr_y"] if faulty["psnr_y"] else 0.0
    return {
        "fault": fault.text,
        "hit": faulty["hit"],
        "status": faulty["status"],
        "returns": len(faulty["returns"]),
        "reasons": [entry["reason"] for entry in faulty["returns"]],
        "clean_psnr_y": clean["psnr_y"],
        "psnr_y": faulty["psnr_y"],
        "clean_returns": len(clean["returns"]),
        "is_good": faulty["status"] == 0 and ratio >= 0.99 and not clean["returns"],
    }


def run_clean(number: int, dataset: Path, place: Path, cleans: Any) -> dict[str, Any]:
    """Return whether clean run `number` raised no alarm and is the same as with the rule off."""
    overrides = (VAPSR, *CLEAN[number])
    on, off = (
        train(dataset, place / name, (*overrides, *extra), None)
        for name, extra in (("on", ()), ("off", ("healing=off",)))
    )
    is_same = on["weights"] == off["weights"] != ""
    return {
        "overrides": list(CLEAN[number]),
        "psnr_y": on["psnr_y"],
        "returns": len(on["returns"]),
        "reasons": [entry["reason"] for entry in on["returns"]],
        "output": "" if on["status"] == 0 else on["output"][-500:],
        "is_same": is_same,
        "is_good": on["status"] == 0 and is_same and not on["returns"],
    }


def train(
    dataset: Path, run_dir: Path, overrides: tuple[str, ...], fault: Fault | None
) -> dict[str, Any]:
    """Train the demo recipe in a process of its own; return what came of it."""
    queue: Any = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(
        target=_train, args=(dataset, run_dir, overrides, fault, queue)
    )
    process.start()
    process.join()
    return queue.get() | {"returns": returns_of(run_dir), **_end_of(run_dir)}


def _train(
    dataset: Path, run_dir: Path, overrides: tuple[str, ...], fault: Fault | None, queue: Any
) -> None:
    import torch

    torch.set_num_threads(1)
    become_only_rank()
    queue.put(train_here(dataset, run_dir, (*TINY, *overrides), fault))


def become_only_rank() -> None:
    """Let this process be the only rank of a run."""
    from pipeline.distributed.launcher import free_port

    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )


def train_here(
    dataset: Path,
    run_dir: Path,
    overrides: tuple[str, ...],
    fault: Fault | None = None,
    recipe: str = "demo",
    **options: Any,
) -> dict[str, Any]:
    """Train `recipe` in this process, which is a rank; return its exit status and output.

    `options`: further ones of `TrainOptions`.
    """
    from pipeline.cli import RunError, UserError
    from pipeline.training import run as training
    from pipeline.training.options import TrainOptions

    asked = TrainOptions(
        overrides=overrides,
        recipe=recipe,
        dataset_dir=(dataset,),
        output_dir=run_dir,
        **options,
    )
    output, hit = io.StringIO(), []

    def end(error: BaseException, *_: Any) -> None:
        raise error

    # `train` would end the process before it can report.
    with patch.object(training, "_exit_at_once", end), redirect_stdout(output):
        try:
            if fault is None:
                status = training.main(asked)
            else:
                with injected(fault) as hit:
                    status = training.main(asked)
        except (RunError, UserError) as error:
            status = 2 if isinstance(error, UserError) else 1
            output.write(f"error: {error}\n")
    return {"status": status, "hit": hit, "output": output.getvalue()}


def returns_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's healing.json."""
    path = run_dir / "healing.json"
    return json.loads(path.read_text())["returns"] if path.is_file() else []


def _end_of(run_dir: Path) -> dict[str, Any]:
    """Return PSNR-Y of the last validation and a hash of the last checkpoint's weights."""
    from pipeline.checkpoint_index import read_index
    from pipeline.run_folder import (
        GENERATOR_EMA_FILE,
        GENERATOR_FILE,
        checkpoint_dir,
        checkpoint_steps,
    )

    lines = (run_dir / "log.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if entry["event"] == "validation"]
    steps = checkpoint_steps(run_dir)
    weights = ""
    if steps and steps[-1] == STEPS:
        files = read_index(checkpoint_dir(run_dir, STEPS))["files"]
        weights = files[GENERATOR_FILE]["sha256"] + files[GENERATOR_EMA_FILE]["sha256"]
    last = [entry["psnr_y"] for entry in entries if entry["step"] == STEPS]
    return {"psnr_y": last[0] if last else None, "weights": weights}


def _demo_dataset(place: Path) -> Path:
    from tools.make_demo_dataset import make_demo_dataset

    with redirect_stdout(io.StringIO()):
        return make_demo_dataset(place / "demo").dataset_dir


if __name__ == "__main__":
    run(Options, main)
