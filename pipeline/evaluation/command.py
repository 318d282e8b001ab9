"""The work of `evaluate.py`: choose models and images, measure, print and write the results.

`run_evaluation` starts several processes or runs as one of them. Every process prepares the whole
evaluation, so that mistakes are reported before the work begins. The processes then share the
images, and the first one prints and writes the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.cli import UserError
from pipeline.distributed.gpus import count_gpus
from pipeline.distributed.launcher import RankInfo, find_rank_info
from pipeline.distributed.ranks import Ranks
from pipeline.evaluation.image_sets import ImageSet, find_benchmark, find_folder
from pipeline.evaluation.models import Model, choose_models
from pipeline.evaluation.page import Gallery, write_page
from pipeline.evaluation.processes import (
    TaskQueue,
    fork_processes,
    joined,
    num_processes,
    run_processes,
    worth_starting,
)
from pipeline.evaluation.scoring import upscaler_of
from pipeline.evaluation.spread import Work, check_same_files, measure_sets
from pipeline.evaluation.tables import (
    LEVEL,
    RESAMPLES,
    SEED,
    SetScores,
    as_json,
    csv_text,
    format_table,
    headline,
    interval_text,
    markdown,
)
from pipeline.files import write_atomically
from pipeline.inference.devices import Device, device_at
from pipeline.metrics import METRICS, Measure, Trunk, load_measures

RESULTS_DIR = Path("results")


class Options(Protocol):
    """The options of `evaluate.py`, which documents them."""

    hr: Path | None
    lr: Path | None
    benchmark: Sequence[str]
    benchmarks: Path
    model: Sequence[Path]
    self_ensemble: bool
    scale: int | None
    json: Path | None
    out: Path | None
    html: Path | None
    lpips: str
    lpips_weights: Path | None
    dists: str
    dists_weights: Path | None
    niqe: Path | None
    device: str
    procs: int


@dataclass(frozen=True)
class Outputs:
    """Where the results are written."""

    pictures: Path
    numbers: Path
    page: Path | None


@dataclass(frozen=True)
class Subject:
    """The models to evaluate and the image sets to evaluate them on."""

    models: list[Model]
    sets: list[ImageSet]


@dataclass(frozen=True)
class Evaluation:
    """Everything that one process has prepared before it measures."""

    models: list[Model]
    work: Work
    device: Device
    outputs: Outputs


def run_evaluation(options: Options, command: Sequence[str] = ()) -> int:
    """Run the evaluation that `evaluate.py --help` describes; return the exit status.

    Args:
        options: the options of `evaluate.py`.
        command: the command line that starts another process like this one. Without it, this
            process does all the work.
    """
    place = find_rank_info()
    if place.world_size > 1:
        return _evaluate_among_others(options, None)
    count = num_processes(options.procs, options.device) if command else 1
    if count > 1 and options.device != "cpu" and count_gpus():
        return run_processes(count, command)
    subject = None
    if count > 1:
        threads = torch.get_num_threads()
        # fork() copies only the calling thread: a child of a process with a thread pool would wait
        # for the missing threads forever.
        torch.set_num_threads(1)
        subject = choose_subject(options)
        num_images = sum(len(data.pairs) for data in subject.sets)
        if (fewer := worth_starting(count, num_images)) < count:
            print(f"note: too few images ({num_images}) for {count} processes; using {fewer}")
        if fewer > 1:
            return fork_processes(fewer, lambda: _evaluate_among_others(options, subject))
        torch.set_num_threads(threads)
    return _evaluate(options, subject, TaskQueue(Ranks()), place)


def _evaluate_among_others(options: Options, subject: Subject | None) -> int:
    """Evaluate as one of several processes, as described by the environment variables."""
    place = find_rank_info()
    with joined(place) as queue:
        return _evaluate(options, subject, queue, place)


def _evaluate(options: Options, subject: Subject | None, queue: TaskQueue, place: RankInfo) -> int:
    ranks = queue.ranks
    evaluation = ranks.on_all_ranks(lambda: _prepare(options, subject, place))
    work, outputs = evaluation.work, evaluation.outputs
    check_same_files(evaluation.models, work.sets, outputs.pictures, ranks)
    if ranks.is_first:
        _announce(evaluation, ranks.world_size, is_ensemble=options.self_ensemble)
    gallery = Gallery(len(work.sets)) if outputs.page else None
    measured = measure_sets(work, queue, gallery)

    def finish() -> None:
        report = as_json(
            measured,
            [{"title": model.title, **model.describe()} for model in evaluation.models],
            work.scale,
            device=evaluation.device.type if options.device == "auto" else options.device,
            self_ensemble=options.self_ensemble,
        )
        _print_tables(measured, evaluation.models, work.scale)
        _write(measured, outputs, report)
        if gallery is not None and outputs.page is not None:
            write_page(outputs.page, measured, gallery, report)
            print(f"page:     {outputs.page}")

    ranks.on_all_ranks(lambda: finish() if ranks.is_first else None)
    return 0


def choose_subject(options: Options) -> Subject:
    """Return the models and images that the options name; raise `UserError` if one is unusable."""
    models = choose_models(options.model, options.scale)
    return Subject(models, choose_images(options, models[0].saved.scale))


def _prepare(options: Options, subject: Subject | None, place: RankInfo) -> Evaluation:
    """Prepare everything; raise `UserError` for every mistake that can be found before the work.

    `subject` is what the starting process has chosen; `None` if this process has to choose.
    """
    if (
        subject is None
        and options.procs > 1
        and options.procs != place.world_size
        and place.world_size > 1
    ):
        raise UserError(
            f"--procs {options.procs}, but {place.launcher} has started {place.world_size} "
            "processes; omit --procs"
        )
    subject = subject or choose_subject(options)
    models, sets = subject.models, subject.sets
    device = device_at(place, options.device)
    upscalers = {
        model.title: upscaler_of(model.saved.build(), device, self_ensemble=options.self_ensemble)
        for model in models
    }
    outputs = _make_folders(options, models)
    return Evaluation(
        models, Work(sets, upscalers, _measures(options, device), outputs.pictures), device, outputs
    )


def _measures(options: Options, device: Device) -> list[Measure]:
    """Load all metrics that need no trunk, and those for which the options name one."""
    trunks = {}
    for name, trunk, file in (
        ("lpips", options.lpips, options.lpips_weights),
        ("dists", options.dists, options.dists_weights),
        ("niqe", "off" if options.niqe is None else "natural", options.niqe),
    ):
        if trunk != "off":
            trunks[name] = Trunk(trunk, None if file is None else str(file))
        elif file is not None:
            *others, last = METRICS[name].trunks
            choice = f"{', '.join(others)} or {last}" if others else last
            raise UserError(f"--{name}-weights {file} without --{name}; add --{name} {choice}")
    return load_measures(METRICS.values(), trunks, str(device))


def choose_images(options: Options, scale: int) -> list[ImageSet]:
    """Return the folder of --hr, if given, and each named benchmark once."""
    if options.hr is None and not options.benchmark:
        raise UserError(
            "no images to evaluate on; give a folder with --hr, or benchmarks with --benchmark "
            "set5 set14…"
        )
    if options.hr is None and options.lr is not None:
        raise UserError(
            f"--lr {options.lr} without --hr; add --hr (a benchmark's LR images are in its own "
            "folder)"
        )
    root = options.benchmarks.expanduser()
    folders = [] if options.hr is None else [find_folder(options.hr, options.lr, scale)]
    presets = [find_benchmark(root, key, scale) for key in dict.fromkeys(options.benchmark)]
    names = {preset.name.lower() for preset in presets}
    if made := [data for data in (*folders, *presets) if scale == 1 and data.lr_made_by]:
        raise UserError(
            f"{made[0].name}: the model restores images of the same size (x1), so its input cannot "
            "be made by downscaling; give degraded images with --lr, or beside the HR images as "
            "NAME_HR and NAME_LR"
        )
    return [
        ImageSet(f"{data.name} (folder)", data.pairs, data.hr, data.lr)
        if data.name.lower() in names
        else data
        for data in folders
    ] + presets


def _make_folders(options: Options, models: Sequence[Model]) -> Outputs:
    """Create the output folders before the work, so that an unusable one fails early."""
    name = "_".join(model.title for model in models)[:80].replace("/", "-")
    pictures = options.out or RESULTS_DIR / name
    numbers = options.json or pictures / "evaluation.json"
    if numbers.suffix.lower() in (".csv", ".md"):
        raise UserError(
            f"--json {numbers} would be overwritten by the {numbers.suffix} file written beside "
            "it; use the suffix .json"
        )
    page = None if options.html is None else options.html / "index.html"
    for folder in (pictures, numbers.parent, *([page.parent] if page else [])):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create the folder {str(folder)!r} ({error.strerror}); choose another"
            ) from error
    return Outputs(pictures, numbers, page)


def _announce(evaluation: Evaluation, num_processes: int, *, is_ensemble: bool) -> None:
    models, device = evaluation.models, evaluation.device
    where = f"on {device.type if num_processes > 1 else device}"
    where += ", self-ensemble of eight" if is_ensemble else ""
    where += f", in {num_processes} processes" if num_processes > 1 else ""
    sets = evaluation.work.sets
    if len(sets) == 1 and len(models) == 1:
        saved = models[0].saved
        print(
            f"model: {models[0].file} ({saved.name} x{saved.scale}) {where}; "
            f"{len(sets[0].pairs)} image{'' if len(sets[0].pairs) == 1 else 's'}"
            f"{', LR made by bicubic downscaling' if sets[0].lr_made_by else ''}"
        )
    else:
        for model in models:
            saved = model.saved
            print(f"model: {model.title} is {model.file} ({saved.name} x{saved.scale}) {where}")
        for data in sets:
            lr = (
                "LR made by bicubic downscaling"
                if data.lr_made_by
                else f"LR from {data.lr or data.hr}"
            )
            print(f"images: {data.name}, {len(data.pairs)} from {data.hr}, {lr}")
    for data in sets:
        if data.note:
            print(f"note: {data.note}")


def _print_tables(sets: Sequence[SetScores], models: Sequence[Model], scale: int) -> None:
    if len(sets) == 1 and len(models) == 1:
        print(f"\n{format_table(sets[0], models[0].title, scale)}")
    else:
        print("\n" + "\n".join(headline(sets)))
    print(
        f"\nDifferences in PSNR-Y, {LEVEL:.0%} intervals (bootstrap over images, {RESAMPLES:,} "
        f"draws, seed {SEED}):"
    )
    for measured in sets:
        for entry in measured.differences:
            if entry.metric == "psnr_y":
                print(
                    f"  {measured.name}: {entry.method} over {entry.against} "
                    f"{interval_text(entry.interval, 'psnr_y', '+')} dB: {entry.verdict}"
                )
    print()


def _write(sets: Sequence[SetScores], outputs: Outputs, report: dict[str, Any]) -> None:
    files = {
        outputs.numbers: dumps(report, indent=2, allow_nan=False) + "\n",
        outputs.numbers.with_suffix(".csv"): csv_text(sets),
        outputs.numbers.with_suffix(".md"): markdown(sets, report["scale"]),
    }
    for file, text in files.items():
        write_atomically(file, text.encode(errors="backslashreplace"))
    names = ", ".join(path.suffix for path in list(files)[1:])
    print(f"numbers:  {outputs.numbers} (and {names})\npictures: {outputs.pictures}")
