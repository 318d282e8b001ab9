"""A contact sheet of the LR/HR pairs that training sees, and any one of them again from its number."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro

from pipeline.cli import RunError, UserError, run
from pipeline.data.dataset import Dataset
from pipeline.data.image_files import TRAINING_LIST
from pipeline.data.reader import batches
from pipeline.data.source import CropSource, Position
from pipeline.files import write_atomically
from pipeline.run_folder import DS_CONFIG_FILE, FILE_LISTS_DIR, RECIPE_FILE
from pipeline.training.options import Plan, TrainOptions, make_plan
from tools.common.batch_sheet import Cell, Pair, sheet
from tools.common.image_formats import encode
from tools.parallel import progress, quiet_libraries

DEFAULT_OUT = "show_batch.png"
DEFAULT_COUNT = 16
PANEL, LARGE_PANEL = 256, 768
MOST_PIXELS = 100_000_000  # of a sheet
END_OF_SAMPLES = 10**15
FLAGS = ("--json", "--help", "-h")  # options without a value


@dataclass(frozen=True)
class Options:
    """Draw the LR/HR pairs that training sees, with the parameters drawn for each, as one PNG.

    LR stands left, in blocks, HR right of it. The pixels are those of training on the CPU, to the bit; a GPU may round
    differently. Values of the recipe can be overridden, as in training. With --sample, what a message of a run names:
    python tools/show_batch.py --run runs/vapsr_x4 --sample 48211

    Example: python tools/show_batch.py batch.png --recipe vapsr_x4 data.degradation=realesrgan
    """

    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[OUT.png] [KEY=VALUE ...]")] = ()
    """The picture (default: show_batch.png), and key=value over the recipe."""
    recipe: str | None = None
    """A name in recipes/ or the path of a YAML file. Default: vapsr_x2, as in training."""
    run: Path | None = None
    """A run folder: the samples of that run, by its own recipe. Refused where the dataset's lists have changed."""
    dataset_dir: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")] = ()
    """Dataset folder; repeat it as for the run. Default: ~/dataset."""
    lr_dir: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")] = ()
    """For data.degradation=paired: the folder of LR files, one for each --dataset-dir. Default: beside HR."""
    first: int | None = None
    """Number of the first sample, counted from 0 since the run began. Default: 0."""
    count: int | None = None
    """How many samples. Default: 16; with --step its whole batch."""
    step: int | None = None
    """The batch of this optimizer step, 1 being the first, instead of --first."""
    sample: Annotated[tuple[int, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NUMBER")] = ()
    """Just this sample, large, such as the one that a message names. May be repeated."""
    panel: int | None = None
    """Crops are magnified by the largest whole factor with which they fit so many pixels (at least 1). Default: 256,
    with --sample 768."""
    json: bool = False
    """Print everything drawn for each sample, a line of JSON each."""


def main(options: Options) -> int:
    """Draw the sheet."""
    out, overrides = _out_and_overrides(options.words)
    plan = _plan(options, overrides)
    numbers = _numbers(options, plan.ds_config["train_batch_size"])
    recipe = plan.recipe
    if options.panel is not None and not 32 <= options.panel <= 4096:
        raise UserError(f"--panel {options.panel}: must be 32 to 4096 pixels")
    panel = options.panel or (LARGE_PANEL if options.sample else PANEL)
    _refuse_large(Cell(recipe.data.crop, panel), len(numbers))
    pairs = make_pairs(plan, numbers)
    title = (f"{recipe.name}, x{recipe.scale}, {recipe.data.degradation.name}: LR ({recipe.data.crop // recipe.scale} "
             f"pixels) | HR ({recipe.data.crop})")
    picture = encode(np.asarray(sheet(title, pairs, recipe.data, recipe.scale, panel)), "png")
    try:
        write_atomically(out, picture)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; choose another OUT") from error
    if options.json:
        for pair in pairs:
            print(json.dumps(pair.sample.as_dict()))
    print(f"written to {out}: {_told(numbers)}; an epoch has {plan.epoch_length}",
          file=sys.stderr if options.json else sys.stdout)
    return 0


def positionals_last(arguments: Sequence[str]) -> list[str]:
    """The command line with OUT and the overrides behind the options, wherever they were typed."""
    options: list[str] = []
    positionals: list[str] = []
    for argument in arguments:
        before = options[-1] if options else ""
        is_value = before.startswith("--") and "=" not in before and before not in FLAGS
        (options if is_value or argument.startswith("-") else positionals).append(argument)
    return options + positionals


def make_pairs(plan: Plan, numbers: Sequence[int]) -> list[Pair]:
    """The samples of these numbers as training makes them, on the CPU.

    Raises `UserError` for a file that cannot be trained on, unless the recipe passes over it, as training does.
    """
    recipe = plan.recipe
    source = ChosenSource.of_dataset(plan.dataset, recipe.data, scale=recipe.scale, seed=recipe.seed,
                                     position=Position(0, 1, 1))
    source.numbers, source.end = numbers, len(numbers)
    several = len(plan.dataset.folders) > 1
    names = {folder.path(name): f"{folder.root.name}/{name}" if several else name
             for folder in plan.dataset.folders for name in folder.training}
    pairs = []
    try:
        with quiet_libraries(), progress(len(numbers), "sample") as bar:
            for place, *outputs in batches(source, 0, device_id=None, threads=recipe.data.threads, prefetch=1):
                sample, = source.samples(numbers[place], 1)
                hr, lr = (np.array(output.at(0)).transpose(1, 2, 0) for output in outputs)
                pairs.append(Pair(sample, names[sample.path], hr, lr))
                bar.update()
    except OSError as error:
        raise RunError(f"{error.filename or 'the dataset'}: {error.strerror or error}; the disk or the network failed, "
                       "try again") from error
    finally:
        source.close()
    return pairs


class ChosenSource(CropSource):
    """A source of the samples `numbers` alone, each a micro-batch of its own."""

    numbers: Sequence[int] = ()

    def first_sample(self, index: int) -> int:
        return self.numbers[index]


def _out_and_overrides(words: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    overrides = tuple(word for word in words if re.match(r"[A-Za-z_][\w.]*=", word))
    outs = [word for word in words if word not in overrides] or [DEFAULT_OUT]
    if len(outs) > 1:
        raise UserError(f"{outs[0]} and {outs[1]}: one OUT only; an override is written KEY=VALUE")
    out = Path(outs[0]).expanduser()
    if out.suffix.lower() != ".png":
        raise UserError(f"{outs[0]}: OUT must end in .png, and an override is written KEY=VALUE, such as data.crop=128")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; make it, or choose another OUT")
    if out.is_dir():
        raise UserError(f"{out}: a folder; OUT is the picture's file")
    return out, overrides


def _plan(options: Options, overrides: tuple[str, ...]) -> Plan:
    """What training would read of these options."""
    training = TrainOptions(overrides, dataset_dir=options.dataset_dir, lr_dir=options.lr_dir)
    if options.run is None:
        training.recipe = options.recipe or training.recipe
        return make_plan(training)
    if options.recipe is not None:
        raise UserError(f"--recipe {options.recipe} and --run {options.run}: a run has its own recipe; leave one away")
    run_dir = options.run.expanduser()
    for name in (RECIPE_FILE, DS_CONFIG_FILE, FILE_LISTS_DIR):
        if not (run_dir / name).exists():
            raise UserError(f"{run_dir}: no run folder (it has no {name}); --run wants one such as runs/vapsr_x4")
    training.recipe, training.ds_config = str(run_dir / RECIPE_FILE), run_dir / DS_CONFIG_FILE
    plan = make_plan(training)
    _refuse_another_dataset(plan.dataset, run_dir)
    return plan


def _refuse_another_dataset(dataset: Dataset, run_dir: Path) -> None:
    lists = run_dir / FILE_LISTS_DIR
    folders = len(list(lists.glob(f"*_{TRAINING_LIST}")))
    if folders != len(dataset.folders):
        raise UserError(f"{run_dir}: begun with {folders} dataset folders, not {len(dataset.folders)}; give each with "
                        "--dataset-dir, in their order")
    differences = dataset.differences(lists)
    if differences:
        raise UserError(f"{run_dir}: its samples cannot be made again, the lists have changed: "
                        f"{'; '.join(differences)}; give the folders it was begun with, or --recipe instead of --run")


def _numbers(options: Options, batch: int) -> Sequence[int]:
    """The samples to show; `batch` of them make an optimizer step."""
    given = [f"--{name} {getattr(options, name)}" for name in ("first", "step", "count")
             if getattr(options, name) is not None]
    if options.sample and given:
        raise UserError(f"--sample and {given[0]}: single samples, or a part of the stream; leave one away")
    if options.step is not None and options.first is not None:
        raise UserError(f"{given[0]} and {given[1]}: two places to begin at; leave one away")
    if options.step is not None and options.step < 1:
        raise UserError(f"--step {options.step}: must be at least 1, the first step of a run")
    if options.count is not None and options.count < 1:
        raise UserError(f"--count {options.count}: must be at least 1")
    first = options.first or 0 if options.step is None else (options.step - 1) * batch
    count = options.count or (DEFAULT_COUNT if options.step is None else batch)
    numbers = options.sample or range(first, first + count)
    for number in (*options.sample, numbers[0], numbers[-1]):
        if not 0 <= number < END_OF_SAMPLES:
            raise UserError(f"sample {number}: must be 0, the first of a run, to {END_OF_SAMPLES - 1}")
    return numbers


def _told(numbers: Sequence[int]) -> str:
    if isinstance(numbers, range) and len(numbers) > 1:
        return f"samples {numbers[0]} to {numbers[-1]}"
    return f"sample{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _refuse_large(cell: Cell, count: int) -> None:
    pixels = cell.sheet_pixels(count)
    if pixels > MOST_PIXELS:
        fitting = MOST_PIXELS // cell.sheet_pixels(1)
        way_out = f"show at most {fitting} samples" if fitting else "take a smaller data.crop"
        raise UserError(f"{count} samples, each a pair of {cell.side}x{cell.side} pixels, make a sheet of "
                        f"{pixels / 1e6:.0f} megapixels, more than the {MOST_PIXELS // 10**6} that can be looked at; "
                        f"{way_out}, or give a smaller --panel")


if __name__ == "__main__":
    run(Options, main, positionals_last(sys.argv[1:]))
