"""Compare training choices at equal CPU time: optimizers, rates, schedules, losses, teachers, …

Every run is a real training run of train.py's own code, on one thread. Its number of steps is the
time it may take over the measured time of one of its steps, so that what costs more learns fewer
steps. Runs train on T91 and Sun-Hays 80, and are validated on images that none of them has seen:
Set5 and the centres of Kodak's photographs. The last step counts, not the best one.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tyro

from pipeline.cli import UserError, nearest, run
from pipeline.files import write_atomically

Overrides = Mapping[str, Any]

CENTRE = 192  # pixels per side of the validation images cut from Kodak's photographs
TIMED, UNTIMED = 16, 4  # steps of a calibration; the first ones are not timed
VALIDATIONS = 8
# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Arm:
    """One of the choices that an experiment compares."""

    name: str
    overrides: Overrides = field(default_factory=dict)
    patch: str = ""
    """A key of `PATCHES`: a choice that recipes do not offer."""
    has_own_cost: bool = False
    """Whether its steps take another time than those of the experiment's first arm."""


@dataclass(frozen=True)
class Experiment:
    """Arms that differ in one thing, trained from the same recipe, seeds and data."""

    title: str
    recipe: str
    arms: tuple[Arm, ...]
    """The first one is what the others are compared with."""
    overrides: Overrides = field(default_factory=dict)
    seconds: float = 60
    """CPU seconds of training per run."""
    seeds: int = 3
    metrics: tuple[str, ...] = ("psnr_y",)
    """Values of a validation to report, the most important first."""


class Case(NamedTuple):
    """What one run trains."""

    recipe: str
    overrides: dict[str, Any]
    patch: str

    @classmethod
    def of(cls, experiment: Experiment, arm: Arm, seed: int) -> Case:
        measured = {"validation_metrics": list(experiment.metrics), "seed": seed}
        overrides = {**COMMON, **experiment.overrides, **arm.overrides, **measured}
        return cls(experiment.recipe, overrides, arm.patch)


COMMON: dict[str, Any] = {
    "compile": "off",
    "channels_last": "on",
    "native_kernels": "on",
    "ds.train_batch_size": 8,
    "ds.scheduler.params.warmup_num_steps": 50,
    "data.threads": 1,
    "data.cache_gb": 0.3,
    "previews.count": 0,
    "healing": "off",
    "log_every": 20,
    "save_every": 10**9,
    "save_minutes": 10**6,
    "patience": 0,
    "ema_decay": 0.99,
}
"""Overrides of every run, which make it short and repeatable."""
VAPSR = {"data.crop": 48}
COMPACT = {
    "data.crop": 96,
    "generator": {"name": "compact", "num_conv": 16},
    "ds_config": "ds_config.json",
}


def _adamw(rate: float, **params: Any) -> dict[str, Any]:
    return {
        "ds.optimizer": {
            "type": "AdamW",
            "params": {"lr": rate, "betas": [0.9, 0.99], "weight_decay": 0.0, **params},
        }
    }


CONSTANT = {"ds.scheduler": {"type": "ConstantLR", "params": {}}}
CONSTANT_AFTER_WARM_UP = {
    "ds.scheduler": {"type": "ConstantLR", "params": {"warmup_num_steps": 50}}
}


def _optimizer(name: str, rate: float, **params: Any) -> Arm:
    """Return the arm of an optimizer at a learning rate, its other parameters being the usual."""
    overrides: dict[str, Any] = {"ds.optimizer": {"type": name, "params": {"lr": rate, **params}}}
    if name == "ScheduleFreeAdamW":
        overrides |= {**CONSTANT_AFTER_WARM_UP, "ema_decay": 0}
    return Arm(f"{name} {rate:g}", overrides, has_own_cost=True)


PUBLISHED = {
    "ds.optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.99]}},
    **CONSTANT,
    "ds.gradient_clipping": 0,
    "ema_decay": 0.999,
}
"""VapSR's paper: Adam at 1e-3 from the first step on, without warm-up, decay or clipping."""
NO_RESIDUAL = {"generator.global_residual": "none"}
WARM = {"ds.scheduler.params.warmup_num_steps": 400}


EXPERIMENTS: dict[str, Experiment] = {
    "start": Experiment(
        "What a VapSR x4 without the bicubic residual loses by: weights, warm-up or clipping",
        "vapsr_s_x4",
        (
            Arm("as published, but small weights", {**NO_RESIDUAL, **PUBLISHED}, "small weights"),
            Arm("as published", {**NO_RESIDUAL, **PUBLISHED}, "torch's weights"),
            Arm("small weights", NO_RESIDUAL, "small weights"),
            Arm("… no clipping", {**NO_RESIDUAL, "ds.gradient_clipping": 0}, "small weights"),
            Arm("… warm-up of half the run", {**NO_RESIDUAL, **WARM}, "small weights"),
            Arm("… norms from 1", NO_RESIDUAL, "norms from 1"),
            Arm("… but in the upsampler", NO_RESIDUAL, "small weights before the upsampler"),
            Arm("… only in the upsampler", NO_RESIDUAL, "small weights in the upsampler"),
            Arm("full weights", NO_RESIDUAL, "full weights"),
            Arm("… norms from 1, too", NO_RESIDUAL, "full weights, norms from 1"),
            Arm("torch's weights", NO_RESIDUAL, "torch's weights"),
            Arm("bicubic residual, small weights", {}, "small weights before the upsampler"),
            Arm("bicubic residual, full weights", {}, "full weights"),
            Arm("bicubic residual, as published", PUBLISHED, "full weights"),
        ),
        {"data.crop": 96},
    ),
    "rate": Experiment(
        "AdamW's learning rate, VapSR-S x2",
        "vapsr_s_x2",
        tuple(Arm(f"{rate:g}", _adamw(rate)) for rate in (1e-3, 5e-4, 2e-3, 4e-3, 8e-3)),
        VAPSR,
    ),
    "rate-compact": Experiment(
        "AdamW's learning rate, Compact x4",
        "compact_x4",
        tuple(Arm(f"{rate:g}", _adamw(rate)) for rate in (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
        COMPACT,
    ),
    "optimizer": Experiment(
        "Optimizers and rates, VapSR-S x2",
        "vapsr_s_x2",
        (
            Arm("AdamW 0.002", _adamw(2e-3)),
            *(_optimizer("NAdam", rate) for rate in (2e-3, 4e-3)),
            *(_optimizer("RAdam", rate) for rate in (2e-3, 4e-3)),
            *(_optimizer("Adan", rate) for rate in (2e-3, 1e-2)),
            *(_optimizer("Muon", rate, adamw_lr=2e-3) for rate in (2e-3, 6e-3)),
            *(_optimizer("SOAP", rate) for rate in (2e-3, 6e-3)),
            *(_optimizer("ScheduleFreeAdamW", rate) for rate in (2e-3, 8e-3)),
            _optimizer("Adafactor", 1e-2),
        ),
        VAPSR,
    ),
    "published": Experiment(
        "Our recipe and the published one, VapSR-S x2",
        "vapsr_s_x2",
        (
            Arm("as published", {**PUBLISHED, **NO_RESIDUAL}, "torch's weights"),
            Arm("… with the bicubic residual", PUBLISHED),
            Arm("ours"),
            Arm("ours at 0.002", _adamw(2e-3)),
            Arm("ours at 0.004", _adamw(4e-3)),
        ),
        VAPSR,
        seconds=120,
    ),
    "schedule": Experiment(
        "Schedule, VapSR-S x2",
        "vapsr_s_x2",
        (
            Arm("cosine after a warm-up"),
            Arm("constant", CONSTANT),
            Arm("constant after a warm-up", CONSTANT_AFTER_WARM_UP),
            Arm(
                "linear decay after a warm-up",
                {
                    "ds.scheduler": {
                        "type": "PolynomialLR",
                        "params": {"total_iters": "auto", "power": 1, "warmup_num_steps": 50},
                    }
                },
            ),
        ),
        {**VAPSR, **_adamw(2e-3)},
    ),
    "loss": Experiment(
        "Pixel losses, VapSR-S x2",
        "vapsr_s_x2",
        (
            Arm("L1"),
            Arm("Charbonnier", {"losses": {"charbonnier": 1.0}}, has_own_cost=True),
            Arm("MSE", {"losses": {"mse": 1.0}}, has_own_cost=True),
            Arm("L1 + FFT 0.05", {"losses": {"l1": 1.0, "fft": 0.05}}, has_own_cost=True),
            Arm(
                "MS-SSIM 0.84 + L1 0.16",
                {"losses": {"ms_ssim": 0.84, "l1": 0.16}},
                has_own_cost=True,
            ),
        ),
        {**VAPSR, **_adamw(2e-3)},
        metrics=("psnr_y", "ssim_y"),
    ),
    "batch": Experiment(
        "Batch size against steps, VapSR-S x2",
        "vapsr_s_x2",
        tuple(
            Arm(str(batch), {"ds.train_batch_size": batch}, has_own_cost=batch != 8)
            for batch in (8, 2, 4, 16, 32)
        ),
        {**VAPSR, **_adamw(2e-3)},
    ),
    "crop": Experiment(
        "Crop size against steps, VapSR-S x2",
        "vapsr_s_x2",
        tuple(
            Arm(str(crop), {"data.crop": crop}, has_own_cost=crop != 48)
            for crop in (48, 32, 64, 96)
        ),
        _adamw(2e-3),
    ),
    "average": Experiment(
        "Decay of the averaged weights, VapSR-S x2, constant rate",
        "vapsr_s_x2",
        tuple(Arm(f"{decay:g}", {"ema_decay": decay}) for decay in (0, 0.9, 0.97, 0.99, 0.997)),
        {**VAPSR, **_adamw(2e-3), **CONSTANT},
    ),
}


@contextmanager
def _initial_weights(
    small: tuple[str, ...] = (), norms: float = 0.1, *, is_torchs: bool = False
) -> Iterator[None]:
    """Give VapSR other initial weights.

    Kaiming normal, scaled by 0.1 in the modules whose names start with `small`, or torch's own;
    `norms`: the weights of the norms.
    """
    import torch
    from torch import nn

    from pipeline.models.vapsr import VapSR

    @torch.no_grad()
    def initialise(network: VapSR) -> None:
        for name, module in network.named_modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.constant_(module.weight, norms)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d) and is_torchs:
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
                if name.startswith(small):
                    module.weight.mul_(0.1)
        if network.residual_kernel is not None:
            last = [module for module in network.upsampler if isinstance(module, nn.Conv2d)][-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    with patch.object(VapSR, "_initialise", initialise):
        yield


PATCHES: dict[str, Callable[[], Any]] = {
    "full weights": _initial_weights,
    "torch's weights": lambda: _initial_weights(is_torchs=True),
    "small weights": lambda: _initial_weights(("conv_", "upsampler")),
    "small weights before the upsampler": lambda: _initial_weights(("conv_",)),
    "small weights in the upsampler": lambda: _initial_weights(("upsampler",)),
    "norms from 1": lambda: _initial_weights(("conv_", "upsampler"), 1.0),
    "full weights, norms from 1": lambda: _initial_weights(norms=1.0),
}


@dataclass(frozen=True)
class Options:
    """Compare training choices at equal CPU time, and print a table for each experiment.

    Results are kept in --out, a JSON file per run; a run that is there is not made again, so that
    the comparison can be stopped and continued. Without NAME: all experiments.

    Example: python benchmarks/quality.py start rate --data t91=T91 sunhays80=SunHays80 kodak=Kodak
    set5=Set5
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    """Experiments, or `EXPERIMENT:ARM` for one arm of it."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=PATH ...")] = ()
    """The folders of T91 (t91), Sun-Hays 80 (sunhays80), Kodak (kodak) and Set5's HR images
    (set5)."""
    out: Path = Path("quality")
    """Folder for the dataset, the results and the plots."""
    seconds: float | None = None
    """CPU seconds of training per run, instead of the experiment's."""
    seeds: int | None = None
    """Runs per arm, instead of the experiment's."""
    jobs: int = 1
    """Runs at a time, each on one thread."""
    report: bool = False
    """Train nothing: print the tables and draw the plots of the results so far."""
    list: bool = False
    """Only list the experiments, their arms and their time."""


def main(options: Options) -> int:
    """Return 0, or 1 if runs failed."""
    chosen = _chosen(options.names)
    if options.list:
        for name, arms in chosen.items():
            one = EXPERIMENTS[name]
            minutes = len(arms) * one.seeds * one.seconds / 60
            print(f"{name}: {one.title} ({one.seeds} seeds, {minutes:.0f} min)")
            print("".join(f"  {arm.name}\n" for arm in arms), end="")
        return 0
    failed = 0
    if not options.report:
        dataset = _dataset(options)
        tasks = [
            (name, arm, seed)
            for name, arms in chosen.items()
            for seed in range(options.seeds or EXPERIMENTS[name].seeds)
            for arm in arms
        ]
        failed = _run_all(tasks, dataset, options)
    for name in chosen:
        results = _results(options.out, name)
        if results:
            print(f"\n{EXPERIMENTS[name].title}\n\n{table(EXPERIMENTS[name], results)}")
            plot(EXPERIMENTS[name], results, options.out / f"{name}.png")
    return 1 if failed else 0


def _chosen(names: Sequence[str]) -> dict[str, tuple[Arm, ...]]:
    chosen: dict[str, tuple[Arm, ...]] = {}
    for text in names or EXPERIMENTS:
        name, _, arm = text.partition(":")
        if name not in EXPERIMENTS:
            raise UserError(f"no experiment {name!r}{nearest(name, EXPERIMENTS)}")
        arms = {one.name: one for one in EXPERIMENTS[name].arms}
        if arm and arm not in arms:
            raise UserError(f"experiment {name} has no arm {arm!r}{nearest(arm, arms)}")
        chosen[name] = (*chosen.get(name, ()), *((arms[arm],) if arm else arms.values()))
    return chosen


def _dataset(options: Options) -> Path:
    """Make the dataset of all experiments, unless it is there; return its folder."""
    dataset = options.out / "dataset"
    if (dataset / "validation_file_list.txt").is_file():
        return dataset
    places = dict(text.partition("=")[::2] for text in options.data)
    folders = {}
    for name in ("t91", "sunhays80", "kodak", "set5"):
        if name not in places:
            raise UserError(f"--data: {name}=PATH is missing; give the folder of its images")
        folders[name] = Path(places[name]).expanduser()
        if not folders[name].is_dir():
            raise UserError(f"--data {name}={folders[name]}: no such folder")
    import numpy as np
    from PIL import Image

    shutil.rmtree(dataset, ignore_errors=True)
    lists: dict[str, list[str]] = {"training": [], "validation": []}
    for name, folder in folders.items():
        part = "training" if name in ("t91", "sunhays80") else "validation"
        (dataset / name).mkdir(parents=True)
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        # These datasets are also published with LR images beside the HR images.
        paths = [path for path in paths if path.stem.endswith("_HR")] or paths
        for path in paths:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            if name == "kodak":
                top, left = ((side - CENTRE) // 2 for side in pixels.shape[:2])
                pixels = pixels[top : top + CENTRE, left : left + CENTRE]
            if min(pixels.shape[:2]) >= 96:
                np.save(dataset / name / f"{path.stem}.npy", np.ascontiguousarray(pixels))
                lists[part].append(f"{name}/{path.stem}.npy")
    for part, names in lists.items():
        (dataset / f"{part}_file_list.txt").write_text("".join(f"{name}\n" for name in names))
    print(f"{len(lists['training'])} images for training, {len(lists['validation'])} held out")
    return dataset


def _run_all(tasks: Sequence[tuple[str, Arm, int]], dataset: Path, options: Options) -> int:
    """Make the runs that have no result yet, `options.jobs` at a time; return how many failed."""
    import torch  # noqa: F401 (imported before the forks, so that none of them has to)

    import pipeline.training.run  # noqa: F401

    context = multiprocessing.get_context("fork")
    waiting = [task for task in tasks if not _file(options.out, *task).is_file()]
    running: dict[Any, tuple[str, Arm, int]] = {}
    failed, done, began = 0, 0, time.monotonic()
    total = len(waiting)
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name, arm, seed = waiting.pop(0)
            process = context.Process(target=_run_one, args=(name, arm, seed, dataset, options))
            process.start()
            running[process] = name, arm, seed
        for process in [process for process in running if not process.is_alive()]:
            process.join()
            task = running.pop(process)
            file, done = _file(options.out, *task), done + 1
            left = (time.monotonic() - began) / done * (total - done) / 60
            where = f"{task[0]}, {task[1].name}, seed {task[2]}"
            if file.is_file():
                result = json.loads(file.read_text())
                values = ", ".join(f"{key} {value:.4g}" for key, value in result["last"].items())
                print(
                    f"{done} of {total}, {left:.0f} min left: {where}: {result['steps']} steps, "
                    f"{values}",
                    flush=True,
                )
            else:
                failed += 1
                log = options.out / "runs" / file.parent.relative_to(options.out / "results")
                print(f"{where} failed; see {log / str(task[2])}.txt", flush=True)
        time.sleep(0.2)
    return failed


def _file(out: Path, name: str, arm: Arm, seed: int) -> Path:
    """Return the path of a run's result."""
    return out / "results" / name / _plain(arm.name) / f"{seed}.json"


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".+-" else "_" for letter in name)


def _run_one(name: str, arm: Arm, seed: int, dataset: Path, options: Options) -> None:
    """Calibrate and train one run, in this process; write its result."""
    import torch

    torch.set_num_threads(1)
    experiment, file = EXPERIMENTS[name], _file(options.out, name, arm, seed)
    folder = options.out / "runs" / name / _plain(arm.name) / str(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    seconds = options.seconds or experiment.seconds
    each = _seconds_per_step(experiment, arm, dataset, folder, file.parents[1])
    steps = max(VALIDATIONS, round(seconds / each / VALIDATIONS) * VALIDATIONS)
    case = Case.of(experiment, arm, seed)
    took = _train(case, steps, VALIDATIONS, dataset, folder / "run")
    curve = [
        entry
        for entry in map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
        if entry["event"] == "validation"
    ]
    values = [
        {"step": entry["step"], **{key: entry[key] for key in experiment.metrics}}
        for entry in curve
    ]
    result = {
        "overrides": case.overrides,
        "patch": case.patch,
        "steps": steps,
        "seconds_per_step": each,
        "measured_seconds_per_step": statistics.median(took),
        "last": {key: values[-1][key] for key in experiment.metrics},
        "curve": values,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, f"{json.dumps(result)}\n".encode())


def _seconds_per_step(
    experiment: Experiment, arm: Arm, dataset: Path, folder: Path, results: Path
) -> float:
    """Return the CPU seconds of a step of `arm`, the same for all seeds; measure them once.

    What else runs on a machine changes the CPU time of a step, by up to a third. So an arm with
    steps of its own is measured in turns with the first arm, whose time then counts.
    """
    first = experiment.arms[0]

    def measure(one: Arm, number: int) -> float:
        place = folder / f"calibration-{number}"
        took = _train(Case.of(experiment, one, 0), UNTIMED + TIMED, 1, dataset, place)
        shutil.rmtree(place)
        return statistics.median(took[UNTIMED:])

    def kept(one: Arm, compute: Callable[[], float]) -> float:
        file = results / _plain(one.name) / "calibration.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps({"seconds_per_step": compute()}).encode())
        seconds: float = json.loads(file.read_text())["seconds_per_step"]
        return seconds

    def relative() -> float:
        times = [measure(one, number) for number, one in enumerate((first, arm, first, arm, first))]
        return base * statistics.median(times[1::2]) / statistics.median(times[::2])

    base = kept(first, lambda: measure(first, 0))
    return kept(arm, relative) if arm.has_own_cost else base


def _train(case: Case, steps: int, validations: int, dataset: Path, run_dir: Path) -> list[float]:
    """Train in a process of its own; return the CPU seconds of its steps, without validations."""
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()
    process = context.Process(
        target=_train_here,
        args=(case, steps, validations, dataset, run_dir, queue),
    )
    process.start()
    process.join()
    if process.exitcode or queue.empty():
        raise SystemExit(1)
    times: list[float] = queue.get()
    return times


def _train_here(
    case: Case, steps: int, validations: int, dataset: Path, run_dir: Path, queue: Any
) -> None:
    from benchmarks.divergence import become_only_rank, train_here
    from pipeline.training.trainers import AdversarialTrainer, ReconstructionTrainer

    become_only_rank()
    given = {**case.overrides, "steps": steps, "validate_every": max(1, steps // validations)}
    texts = tuple(f"{key}={json.dumps(value)}" for key, value in given.items())
    began: list[float] = []

    def timed(step: Callable[..., Any]) -> Callable[..., Any]:
        def run_step(*arguments: Any) -> Any:
            began.append(time.process_time())
            return step(*arguments)

        return run_step

    with ExitStack() as stack:
        for kind in (ReconstructionTrainer, AdversarialTrainer):
            stack.enter_context(patch.object(kind, "step", timed(kind.step)))
        if case.patch:
            stack.enter_context(PATCHES[case.patch]())
        outcome = train_here(dataset, run_dir, texts, recipe=case.recipe)
    print(outcome["output"], flush=True)
    if outcome["status"]:
        raise SystemExit(outcome["status"])
    # Between the beginnings of two steps lies a whole step, with its share of the loader's threads.
    queue.put([later - before for before, later in itertools.pairwise(began)])


def _results(out: Path, name: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the results so far: arm -> seed -> result."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for arm in EXPERIMENTS[name].arms:
        folder = out / "results" / name / _plain(arm.name)
        seeds = {
            int(file.stem): json.loads(file.read_text())
            for file in sorted(folder.glob("[0-9]*.json"))
        }
        if seeds:
            found[arm.name] = seeds
    return found


def difference(arm: Mapping[int, float], first: Mapping[int, float]) -> tuple[float, float] | None:
    """Return the mean of arm - first over the seeds of both, and half its 95 % interval.

    Student's t for paired differences; None if fewer than two seeds are in both.
    """
    pairs = [arm[seed] - first[seed] for seed in sorted(arm.keys() & first.keys())]
    if len(pairs) < 2:
        return None
    half = STUDENT[min(len(pairs) - 1, len(STUDENT)) - 1]
    return statistics.mean(pairs), half * statistics.stdev(pairs) / math.sqrt(len(pairs))


def verdict(mean: float, half: float, lower_is_better: bool) -> str:
    """Return better, worse or "no difference", the last if the interval contains 0."""
    if abs(mean) <= half:
        return "no difference"
    return "better" if (mean < 0) == lower_is_better else "worse"


def table(experiment: Experiment, results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """Return a Markdown table with a row for each arm."""
    from pipeline.metrics import METRICS

    metrics = [METRICS[name] for name in experiment.metrics]
    heads = [f"{one.title} | against the first row" for one in metrics]
    rows = [
        "| | runs | steps | " + " | ".join(heads) + " |",
        "|---|---|---|" + "---|---|" * len(metrics),
    ]
    first = next(iter(results))
    for name, seeds in results.items():
        steps = round(statistics.mean(result["steps"] for result in seeds.values()))
        cells = []
        for metric in metrics:
            own, base = (
                {seed: result["last"][metric.name] for seed, result in of.items()}
                for of in (seeds, results[first])
            )
            cells.append(metric.text(statistics.mean(own.values())))
            compared = None if name == first else difference(own, base)
            if compared is None:
                cells.append("")
            else:
                mean, half = compared
                cells.append(
                    f"{metric.text(mean, '+')} ± {metric.text(half)}: "
                    f"{verdict(mean, half, metric.lower_is_better)}"
                )
        rows.append(f"| {name} | {len(seeds)} | {steps} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(
    experiment: Experiment, results: Mapping[str, Mapping[int, Mapping[str, Any]]], file: Path
) -> None:
    """Draw the main metric of every arm over CPU seconds: mean and range of its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from pipeline.metrics import METRICS

    metric = METRICS[experiment.metrics[0]]
    figure, axes = plt.subplots(figsize=(9, 4.2), dpi=100, layout="constrained")
    for number, (name, seeds) in enumerate(results.items()):
        curves = list(seeds.values())
        seconds = [point["step"] * curves[0]["seconds_per_step"] for point in curves[0]["curve"]]
        values = list(
            zip(*([point[metric.name] for point in one["curve"]] for one in curves), strict=False)
        )
        colour = f"C{number % 10}"
        style = "-" if number < 10 else "--"
        axes.plot(
            seconds[: len(values)],
            [statistics.mean(one) for one in values],
            style,
            color=colour,
            label=name,
        )
        axes.fill_between(
            seconds[: len(values)],
            [min(one) for one in values],
            [max(one) for one in values],
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
    axes.set_xlabel("CPU seconds of training")
    axes.set_ylabel(f"{metric.title}{metric.unit and f', {metric.unit}'}")
    axes.set_title(experiment.title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)


if __name__ == "__main__":
    run(Options, main)
