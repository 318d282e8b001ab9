"""Contact sheet of the LR/HR pairs that training sees, with the values drawn for each sample.

The samples come from training's own source and reader, on the CPU. Any sample can be recreated from
its number.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from pipeline.cli import RunError, UserError, run
from pipeline.config.recipe import Recipe
from pipeline.data.degradations import chain, host
from pipeline.data.degradations.base import Degradation, Parameters
from pipeline.data.image_pixels import to_8_bits
from pipeline.data.reader import batches
from pipeline.data.source import CropSource, Position, Sample
from pipeline.data.spec import DataSpec, num_threads
from pipeline.files import write_atomically
from pipeline.run_folder import STATE_FILE, newest_intact, read_state
from pipeline.training.healing import History
from pipeline.training.options import TrainOptions, TrainPlan, make_plan
from pipeline.training.saved_run import plan_of_run
from tools.compare.figure import BACKGROUND, FAINT, TEXT, magnified
from tools.images import encode
from tools.parallel import progress, quiet_libraries

GAP, BETWEEN = 14, 4  # pixels around a cell; pixels between LR and HR
TEXT_WIDTH = 380  # minimum, so that small crops have room for their description
MIN_STEP_WIDTH = 200  # likewise, of the panel of a step
LETTERS, LINE = 12, 16
MAX_LINES = 12  # per cell, to estimate the size of a sheet
ASPECT = 1.4  # of a sheet; about that of a screen
DEFAULT_OUT = "show_batch.png"
DEFAULT_COUNT = 16
PANEL, LARGE_PANEL, STEP_PANEL = 256, 768, 384
MAX_PIXELS = 100_000_000  # of a sheet
END_OF_SAMPLES = 10**15
SEEDS = ("words", "seed", "seeds", "phases")  # parameters of steps that say nothing to a reader
MAX_LISTED = 4  # values of a list
FLAGS = ("--json", "--help", "-h")  # options without a value


class DrawnPair(NamedTuple):
    """A sample with its file name and pixels, uint8 RGB (height, width, 3)."""

    sample: Sample
    name: str
    hr: np.ndarray
    lr: np.ndarray
    region: np.ndarray | None = None
    """The part of the photograph that a chain has degraded, which includes the HR crop."""
    mix: Mapping[str, Any] | None = None
    """How `hr` and `lr` were mixed with the partner's: the fields of `mixing.Mix`."""
    unmixed: tuple[np.ndarray, np.ndarray] | None = None
    """HR and LR before that."""


@dataclass(frozen=True)
class Cell:
    """Size in pixels of a pair of crops of `crop` HR pixels, magnified as far as fits `panel`."""

    crop: int
    panel: int

    @property
    def side(self) -> int:
        return self.crop * max(1, self.panel // self.crop)

    @property
    def width(self) -> int:
        return max(2 * self.side + BETWEEN, TEXT_WIDTH)

    def sheet_pixels(self, count: int) -> int:
        """Upper estimate of the number of pixels of a sheet with `count` cells."""
        return count * (self.width + GAP) * (self.side + GAP + MAX_LINES * LINE)


@dataclass(frozen=True)
class Options:
    """Draw the LR/HR pairs that training sees, with the parameters drawn for each, as one PNG.

    LR is on the left, in blocks, HR on the right. The pixels are exactly those of training on the
    CPU; a GPU may round differently. Recipe values can be overridden as in training. Use --sample
    to show a sample that a message of a run mentions, and what every step of a chain did to it:
    python tools/show_batch.py --run runs/vapsr_x4 --sample 48211

    Example: python tools/show_batch.py batch.png --recipe vapsr_x4 data.degradation=realesrgan
    """

    words: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[OUT.png] [KEY=VALUE ...]")
    ] = ()
    """The picture to write (default: show_batch.png), and key=value overrides of the recipe."""
    recipe: str | None = None
    """A name in recipes/ or the path of a YAML file. Default: vapsr_x2, as in training."""
    run: Path | None = None
    """A run folder: show the samples of that run, with its own recipe. Rejected if the dataset's
    lists have changed."""
    dataset_dir: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = ()
    """Dataset folder; repeat it as for the run. Default: ~/dataset."""
    lr_dir: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = ()
    """For data.degradation=paired: the folder of LR files, one per --dataset-dir. Default: beside
    HR."""
    first: int | None = None
    """Number of the first sample, counted from 0 at the start of the run. Default: 0."""
    count: int | None = None
    """Number of samples. Default: 16; with --step the whole batch."""
    step: int | None = None
    """Show the batch of this optimizer step (the first is 1), instead of --first."""
    sample: Annotated[
        tuple[int, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NUMBER")
    ] = ()
    """Show only this sample, enlarged, such as one that a message mentions; if its degradation is a
    chain, the image after every step. May be repeated."""
    panel: int | None = None
    """Magnify crops by the largest integer factor with which they fit this many pixels (at least
    1). Default: 256; with --sample 768, or 384 for the steps of a chain."""
    json: bool = False
    """Print everything drawn for each sample, one line of JSON per sample."""


def main(options: Options) -> int:
    """Draw the sheet."""
    out, overrides = _out_and_overrides(options.words)
    plan = _plan(options, overrides)
    numbers = _numbers(options, plan.ds_config["train_batch_size"])
    recipe = plan.recipe
    if options.panel is not None and not 32 <= options.panel <= 4096:
        raise UserError(f"--panel {options.panel}: must be 32 to 4096 pixels")
    most_steps = _most_steps(recipe.data) if options.sample else 0
    panel = options.panel or (
        STEP_PANEL if most_steps else LARGE_PANEL if options.sample else PANEL
    )
    _refuse_large(Cell(recipe.data.crop, panel), len(numbers), most_steps)
    pairs = make_pairs(
        plan,
        numbers,
        degrades_on_host=options.run is None or _degrades_on_host(options.run),
        keeps_regions=most_steps > 0,
    )
    of = ", ".join(dict.fromkeys(_title(spec) for spec in recipe.data.degradation.by_folder))
    sides = f"LR ({recipe.data.crop // recipe.scale} pixels) | HR ({recipe.data.crop})"
    if most_steps:
        sides = f"HR ({recipe.data.crop} pixels), every step, LR"
    title = f"{recipe.name}, x{recipe.scale}, {of}: {sides}"
    drawing = step_sheet if most_steps else sheet
    picture = encode(np.asarray(drawing(title, pairs, recipe.data, recipe.scale, panel)), "png")
    try:
        write_atomically(out, picture)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written: {error.strerror}; choose another OUT"
        ) from error
    if options.json:
        for pair in pairs:
            print(json.dumps(pair.sample.as_dict() | ({"mix": pair.mix} if pair.mix else {})))
    print(
        f"written to {out}: {_sample_range(numbers)}; an epoch has {plan.epoch_length}",
        file=sys.stderr if options.json else sys.stdout,
    )
    return 0


def _title(spec: Any) -> str:
    return getattr(spec, "preset", "") or spec.name


def _most_steps(spec: DataSpec) -> int:
    """Return the largest number of steps that may be drawn; 0 if no folder has a chain."""
    return max(
        chain.number_of_items(of.steps) + 1 if isinstance(of, chain.ChainSpec) else 0
        for of in spec.degradation.by_folder
    )


def positionals_last(arguments: Sequence[str]) -> list[str]:
    """Move OUT and the overrides behind the options, wherever they were typed."""
    options: list[str] = []
    positionals: list[str] = []
    for argument in arguments:
        before = options[-1] if options else ""
        is_value = before.startswith("--") and "=" not in before and before not in FLAGS
        (options if is_value or argument.startswith("-") else positionals).append(argument)
    return options + positionals


def _out_and_overrides(words: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    overrides = tuple(word for word in words if re.match(r"[A-Za-z_][\w.]*=", word))
    outs = [word for word in words if word not in overrides] or [DEFAULT_OUT]
    if len(outs) > 1:
        raise UserError(
            f"{outs[0]} and {outs[1]}: only one OUT is allowed; write overrides as KEY=VALUE"
        )
    out = Path(outs[0]).expanduser()
    if out.suffix.lower() != ".png":
        raise UserError(
            f"{outs[0]}: OUT must end in .png; write overrides as KEY=VALUE, such as data.crop=128"
        )
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; create it, or choose another OUT")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; OUT must be the name of a file")
    return out, overrides


def _plan(options: Options, overrides: tuple[str, ...]) -> TrainPlan:
    """The plan that training would make from these options."""
    training = TrainOptions(overrides, dataset_dir=options.dataset_dir, lr_dir=options.lr_dir)
    if options.run is None:
        training.recipe = options.recipe or training.recipe
        return make_plan(training)
    if options.recipe is not None:
        raise UserError(
            f"--recipe {options.recipe} and --run {options.run}: a run has its own recipe; give "
            "only one"
        )
    return plan_of_run(options.run.expanduser(), options.dataset_dir, options.lr_dir, overrides)


def _degrades_on_host(run_dir: Path) -> bool:
    """Whether the run creates LR on the host if possible.

    Older runs left it to DALI, which rounds differently.
    """
    step = newest_intact(run_dir.expanduser(), (STATE_FILE,))
    return step is None or read_state(run_dir.expanduser(), step).get("cpu_degradation") == "host"


def _numbers(options: Options, batch: int) -> Sequence[int]:
    """Numbers of the samples to show; an optimizer step has `batch` of them.

    A run that has gone back after a divergence has passed over some.
    """
    given = [
        f"--{name} {getattr(options, name)}"
        for name in ("first", "step", "count")
        if getattr(options, name) is not None
    ]
    if options.sample and given:
        raise UserError(
            f"--sample and {given[0]}: show either single samples or a part of the stream; give "
            "only one"
        )
    if options.step is not None and options.first is not None:
        raise UserError(f"{given[0]} and {given[1]}: both set the first sample; give only one")
    if options.step is not None and options.step < 1:
        raise UserError(f"--step {options.step}: must be at least 1 (the first step of a run)")
    if options.count is not None and options.count < 1:
        raise UserError(f"--count {options.count}: must be at least 1")
    history = History.of(options.run.expanduser()) if options.run else History()
    first = (
        options.first or 0
        if options.step is None
        else history.data_update(options.step - 1) * batch
    )
    count = options.count or (DEFAULT_COUNT if options.step is None else batch)
    numbers = options.sample or range(first, first + count)
    for number in (*options.sample, numbers[0], numbers[-1]):
        if not 0 <= number < END_OF_SAMPLES:
            raise UserError(
                f"sample {number}: must be 0 (the first of a run) to {END_OF_SAMPLES - 1}"
            )
    return numbers


def _refuse_large(cell: Cell, count: int, most_steps: int) -> None:
    cells = 1 + most_steps // 2  # per sample; two panels fit into one
    pixels = cell.sheet_pixels(count * cells)
    if pixels > MAX_PIXELS:
        fitting = MAX_PIXELS // cell.sheet_pixels(cells)
        way_out = f"show at most {fitting} samples" if fitting else "use a smaller data.crop"
        raise UserError(
            f"{count} samples, each a pair of {cell.side}x{cell.side} pixels, would make a sheet "
            f"of {pixels / 1e6:.0f} megapixels, above the limit of {MAX_PIXELS // 10**6}; "
            f"{way_out}, or use a smaller --panel"
        )


def _sample_range(numbers: Sequence[int]) -> str:
    if isinstance(numbers, range) and len(numbers) > 1:
        return f"samples {numbers[0]} to {numbers[-1]}"
    return f"sample{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def make_pairs(
    plan: TrainPlan,
    numbers: Sequence[int],
    *,
    degrades_on_host: bool = True,
    keeps_regions: bool = False,
) -> list[DrawnPair]:
    """Make the samples with these numbers as training does, on the CPU.

    Without `degrades_on_host`, DALI makes all of LR if it can. With `keeps_regions`, the pairs of
    chains have their `region`. Raises `UserError` for a file that cannot be trained on, unless the
    recipe skips such files in training.
    """
    recipe, wanted = plan.recipe, numbers
    if recipe.data.mixing.has_partners:
        from pipeline.data import mixing

        numbers = sorted({*wanted, *map(mixing.partner, wanted)})
    source = ChosenSource.of_dataset(
        plan.dataset,
        recipe.data,
        scale=recipe.scale,
        seed=recipe.seed,
        position=Position(0, 1, 1),
        degrades_on_host=degrades_on_host,
    )
    source.numbers, source.end = numbers, len(numbers)
    regions: list[np.ndarray] = []
    for degradation in source.degradations if keeps_regions else ():
        if isinstance(degradation, chain.Chain):
            _keep_regions(degradation, regions)
    threads = num_threads(recipe.data.threads)
    several = len(plan.dataset.folders) > 1
    names = {
        folder.path(name): f"{folder.root.name}/{name}" if several else name
        for folder in plan.dataset.folders
        for name in folder.training
    }
    pairs = []
    try:
        with quiet_libraries(), progress(len(numbers), "sample") as bar:
            for place, *outputs in batches(source, 0, device_id=None, threads=threads, prefetch=1):
                (sample,) = source.samples(numbers[place], 1)
                hr, lr = (np.array(output.at(0)).transpose(1, 2, 0) for output in outputs)
                region = regions.pop() if regions else None
                pairs.append(DrawnPair(sample, names[sample.path], hr, lr, region))
                bar.update()
    except OSError as error:
        raise RunError(
            f"{error.filename or 'the dataset'}: {error.strerror or error}; the disk or the "
            "network failed; try again"
        ) from error
    finally:
        source.close()
    if note := source.profile_note():
        print(f"note: {note}", file=sys.stderr)
    if recipe.data.mixing.probability:
        found = {pair.sample.number: pair for pair in pairs}
        pairs = [_mixed(number, found, recipe) for number in wanted]
    return [
        pair._replace(
            hr=to_8_bits(pair.hr),
            lr=to_8_bits(pair.lr),
            unmixed=pair.unmixed and tuple(map(to_8_bits, pair.unmixed)),
        )
        for pair in pairs
    ]


def _mixed(number: int, pairs: Mapping[int, DrawnPair], recipe: Recipe) -> DrawnPair:
    """Return the pair of sample `number`, mixed as in training; `pairs` has its partner too."""
    import torch

    from pipeline.data import mixing
    from pipeline.images import to_tensor

    own, spec = pairs[number], recipe.data.mixing
    low = recipe.data.crop // recipe.scale
    (drawn,) = mixing.draw(spec, recipe.seed, number, 1, low)
    if drawn is None:
        return own
    first = number - number % 2
    both = [pairs.get(of, own) for of in (first, mixing.partner(first))]
    lr, hr = (torch.cat([to_tensor(getattr(of, side)) for of in both]) for side in ("lr", "hr"))
    mixes = [drawn if of == number else None for of in (first, mixing.partner(first))]
    lr, hr = (
        side[number % 2].permute(1, 2, 0).contiguous().numpy() for side in mixing.mix(lr, hr, mixes)
    )
    return own._replace(hr=hr, lr=lr, mix=drawn._asdict(), unmixed=(own.hr, own.lr))


def _keep_regions(degradation: Degradation, regions: list[np.ndarray]) -> None:
    """Append to `regions` a copy of all that LR is made from."""
    make = degradation.lr_on_host

    def lr_on_host(drawn: Any, keys: Any, region: np.ndarray, *others: Any) -> np.ndarray:
        regions.append(region.copy())
        return make(drawn, keys, region, *others)

    degradation.lr_on_host = lr_on_host  # type: ignore[method-assign]


class ChosenSource(CropSource):
    """A source of the samples in `numbers`, each as a micro-batch of its own."""

    numbers: Sequence[int] = ()

    def first_sample(self, index: int) -> int:
        return self.numbers[index]


# --- The sheet ---


def sheet(
    title: str, pairs: Sequence[DrawnPair], spec: DataSpec, scale: int, panel: int
) -> Image.Image:
    """Draw all pairs under a title: LR in blocks of HR's size, HR to its right, text below."""
    cell, letters = Cell(spec.crop, panel), ImageFont.load_default(LETTERS)
    texts = [_wrapped(describe(pair, spec, scale), cell.width, letters) for pair in pairs]
    height = cell.side + GAP + LINE * max(map(len, texts))
    columns = min(
        len(pairs), max(1, round(math.sqrt(ASPECT * len(pairs) * height / (cell.width + GAP))))
    )
    rows = [
        range(first, min(first + columns, len(pairs))) for first in range(0, len(pairs), columns)
    ]
    heights = [cell.side + 2 * GAP + LINE * max(len(texts[i]) for i in row) for row in rows]
    head = _wrapped([title], columns * (cell.width + GAP) - GAP, letters)
    size = columns * (cell.width + GAP) + GAP, 2 * GAP + LINE * len(head) + sum(heights)
    picture = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    _write(draw, GAP, GAP, head, letters)
    top = 2 * GAP + LINE * len(head)
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = GAP + column * (cell.width + GAP)
            picture.paste(Image.fromarray(side_by_side(pairs[i], scale, panel)), (left, top))
            _write(draw, left, top + cell.side + BETWEEN, texts[i], letters)
        top += row_height
    return picture


def step_sheet(
    title: str, pairs: Sequence[DrawnPair], spec: DataSpec, scale: int, panel: int
) -> Image.Image:
    """Draw each pair under a title: HR, the image after every step of its chain, and LR.

    All panels show the HR crop's part of the image, flipped and transposed like it, in blocks of
    HR's size.
    """
    side, letters = Cell(spec.crop, panel).side, ImageFont.load_default(LETTERS)
    width = max(side, MIN_STEP_WIDTH)
    rows: list[tuple[list[str], list[tuple[np.ndarray, list[str]]]]] = []
    most = max(2, *(len(pair.sample.degradation.get("steps", ())) + 2 for pair in pairs))
    most += 2 * any(pair.mix is not None for pair in pairs)
    columns = min(most, max(2, round(math.sqrt(ASPECT * most * (side + 3 * LINE) / (width + GAP)))))
    total = columns * (width + GAP) - GAP
    for pair in pairs:
        panels = [
            (image, _wrapped([words], width, letters)) for words, image in panels_of(pair, side)
        ]
        heading = [line for line in describe(pair, spec, scale) if not re.match(r"\d+: ", line)]
        rows += [(_wrapped(heading, total, letters), [])]
        rows += [([], panels[first : first + columns]) for first in range(0, len(panels), columns)]
    heights = [
        LINE * len(head) + BETWEEN
        if head
        else side + GAP + LINE * max(len(words) for _, words in panels)
        for head, panels in rows
    ]
    head = _wrapped([title], total, letters)
    picture = Image.new(
        "RGB", (total + 2 * GAP, 3 * GAP + LINE * len(head) + sum(heights)), BACKGROUND
    )
    draw = ImageDraw.Draw(picture)
    _write(draw, GAP, GAP, head, letters)
    top = 2 * GAP + LINE * len(head)
    for (heading, panels), height in zip(rows, heights, strict=True):
        _write(draw, GAP, top, heading, letters)
        for column, (image, words) in enumerate(panels):
            left = GAP + column * (width + GAP)
            picture.paste(Image.fromarray(image), (left, top))
            _write(draw, left, top + side + BETWEEN, words, letters)
        top += height
    return picture


def panels_of(pair: DrawnPair, side: int) -> list[tuple[str, np.ndarray]]:
    """Return (caption, uint8 RGB of `side` x `side`) of HR, of every step's result, and of LR."""
    sample, steps = pair.sample, pair.sample.degradation.get("steps", ())
    hr, lr = pair.unmixed or (pair.hr, pair.lr)
    panels = [("HR", blocks(hr, (0, 0), (1, 1), side))]
    if pair.region is not None:
        region, workspace = pair.region.shape[:2], host.Workspace()
        crop = len(pair.hr)
        start = sample.corner(crop, is_turned=True)
        corner, extent = (
            [place / length for place, length in zip(of, region, strict=True)]
            for of in (start, (crop, crop))
        )
        image = pair.region.copy()
        for number, drawn in enumerate(steps, 1):
            image = chain.run(image, [drawn], workspace)
            part = blocks(host.rounded(image, host.Workspace()), corner, extent, side)
            panels.append((f"{number}: {step_words(drawn)}", part))
    noise = f", noise sigma {sample.noise_sigma:.2f}" if sample.noise_sigma else ""
    height, width = lr.shape[:2]
    panels.append((f"LR, {height}x{width}{noise}", blocks(lr, (0, 0), (1, 1), side)))
    if pair.mix:
        panels += [
            (f"mixed {name}", blocks(image, (0, 0), (1, 1), side))
            for name, image in (("HR", pair.hr), ("LR", pair.lr))
        ]
    return panels


def blocks(
    image: np.ndarray, corner: Sequence[float], extent: Sequence[float], side: int
) -> np.ndarray:
    """Return a part of an image, (side, side, 3), by the nearest pixel.

    `corner` and `extent` (vertical, horizontal) are shares of the image's height and width.
    """
    places = (np.arange(side) + 0.5) / side
    rows, columns = (
        ((first + places * share) * length).astype(np.intp)
        for first, share, length in zip(corner, extent, image.shape[:2], strict=True)
    )
    return np.ascontiguousarray(image[rows[:, None], columns])


def side_by_side(pair: DrawnPair, scale: int, panel: int) -> np.ndarray:
    """LR | HR as uint8 RGB; each pixel of either one is a block of whole pixels."""
    lr = pair.lr.repeat(scale, 0).repeat(scale, 1)
    left, right = (magnified(image, panel, smooth=False) for image in (lr, pair.hr))
    space = np.full((len(left), BETWEEN, 3), BACKGROUND, np.uint8)
    return np.concatenate([left, space, right], 1)


def _wrapped(lines: Sequence[str], width: int, letters: ImageFont.FreeTypeFont) -> list[str]:
    """Wrap lines to `width` pixels, at spaces or within overlong words.

    Continuation lines are indented.
    """
    wrapped: list[str] = []
    for line in lines:
        current = ""
        for word in line.split(" "):
            if current.strip() and letters.getlength(f"{current} {word}") > width:
                wrapped.append(current)
                current = "   "
            current = f"{current} {word}" if current else word
            while letters.getlength(current) > width:
                fits = next(
                    end
                    for end in range(len(current) - 1, 0, -1)
                    if letters.getlength(current[:end]) <= width
                )
                wrapped.append(current[:fits])
                current = f"    {current[fits:]}"
        wrapped.append(current)
    return wrapped


def _write(
    draw: ImageDraw.ImageDraw,
    left: int,
    top: int,
    lines: Sequence[str],
    letters: ImageFont.FreeTypeFont,
) -> None:
    for number, line in enumerate(lines):
        draw.text((left, top + number * LINE), line, fill=FAINT if number else TEXT, font=letters)


def describe(pair: DrawnPair, spec: DataSpec, scale: int) -> list[str]:
    """Describe everything drawn for a sample: the file, then its orientation and degradation."""
    sample = pair.sample
    turns = [
        word
        for is_so, word in (
            (sample.flip_vertical, "flipped vertically"),
            (sample.flip_horizontal, "flipped horizontally"),
            (sample.transpose, "transposed"),
        )
        if is_so
    ]
    crop = f"row {sample.top}, column {sample.left} | {', '.join(turns) or 'not turned'}"
    if sample.brightness != 1:
        crop += f" | brightness x{sample.brightness:.3f}"
    lines = [f"sample {sample.number}: {_ascii(pair.name)}", crop]
    degradation = spec.degradation.of_folder(sample.folder)
    if "steps" in sample.degradation:
        lines += [
            f"{number}: {step_words(drawn)}"
            for number, drawn in enumerate(sample.degradation["steps"], 1)
        ]
    elif degradation.name == "realesrgan":
        lines += _second_order_words(sample.degradation, scale)
    elif degradation.reads_lr:
        lines.append(f"LR: {_ascii(str(sample.lr_path))}")
    else:
        numbers = "".join(
            f", {name} {_number(value)}" for name, value in sample.degradation.items()
        )
        lines.append(f"{degradation.name} to 1/{scale}{numbers}")
    if sample.noise_sigma:
        lines.append(f"noise on LR: sigma {sample.noise_sigma:.2f}")
    if pair.mix:
        lines.append(_mix_words(sample.number, pair.mix))
    return lines + [f"replaces {_ascii(skip.path)}: {skip.reason}" for skip in sample.skipped]


def _mix_words(number: int, drawn: Mapping[str, Any]) -> str:
    from pipeline.data import mixing

    partner = mixing.partner(number)
    side, top, left = (drawn[name] for name in ("side", "top", "left"))
    box = f"{side}x{side} LR pixels at row {top}, column {left}"
    if drawn["kind"] == "cutblur":
        return f"cutblur: HR {'inside' if drawn['is_inside'] else 'outside'} {box}"
    if drawn["kind"] == "mixup":
        return f"mixup: {drawn['share']:.0%} of sample {partner}"
    return f"{drawn['kind']}: sample {partner} in {box}"


def step_words(drawn: Mapping[str, Any]) -> str:
    """Describe a step that was drawn: `blur(lens): radius 2.5`.

    Seeds are left out, and what is decoded as it was encoded.
    """
    told = [
        words
        for name, value in drawn.items()
        if name not in ("step", "kind", "codec")
        and not (name.startswith("decoded_") and value == drawn.get(name.removeprefix("decoded_")))
        and (words := _parameter_words(name, value))
    ]
    return chain.label(drawn) + (f": {', '.join(told)}" if told else "")


def _parameter_words(name: str, value: Any) -> str:
    """Return a parameter in words; "" for a seed or for what is not so."""
    name = name.replace("_", " ")
    if name == "size" and isinstance(value, list | tuple) and len(value) == 2:
        return f"to {value[0]}x{value[1]}"
    if isinstance(value, bool):
        return name if value else ""
    if name in SEEDS or value is None or value == []:
        return ""
    return f"{name} {_value_words(value)}"


def _value_words(value: Any) -> str:
    if isinstance(value, Mapping):
        words = (_parameter_words(str(name), one) for name, one in value.items())
        return f"({', '.join(filter(None, words))})"
    if isinstance(value, list | tuple):
        few = value if len(value) <= MAX_LISTED else value[:MAX_LISTED]
        return "/".join(
            [
                f"({_value_words(one)})" if isinstance(one, list | tuple) else _value_words(one)
                for one in few
            ]
        ) + ("/..." if len(few) < len(value) else "")
    return _ascii(_number(value))


def _second_order_words(drawn: Parameters, scale: int) -> list[str]:
    """One line per round, in the order of its steps."""
    first, second, final = drawn["first"], drawn["second"], drawn["final"]
    end = f"{final['mode']} to 1/{scale}"
    if "sinc" in final:
        end += ", sinc {} px, cutoff {:.2f}".format(*final["sinc"])
    jpeg = f"JPEG {second['jpeg']}"
    return [
        f"1: {_round_words(first)} | JPEG {first['jpeg']}",
        f"2: {_round_words(second)}",
        "3: " + " | ".join([end, jpeg] if final["sinc_first"] else [jpeg, end]),
    ]


def _round_words(drawn: Parameters) -> str:
    height, width = drawn["size"]
    resize = "keep" if drawn["resize"] == "keep" else f"{drawn['resize']} to {drawn['factor']:.2f}"
    noise = {"gaussian": "Gaussian sigma", "poisson": "Poisson"}[drawn["noise"]]
    return " | ".join(
        [
            _blur_words(drawn["blur"]),
            f"{resize}, {drawn['mode']}, {height}x{width}",
            f"{noise} {drawn['level']:.2f}{', gray' if drawn['gray'] else ''}",
        ]
    )


def _blur_words(blur: Parameters) -> str:
    if blur["shape"] == "none":
        return "no blur"
    words = f"{'' if blur['shape'] == 'sinc' else 'blur '}{blur['shape']} {blur['size']} px"
    if "cutoff" in blur:
        return f"{words}, cutoff {blur['cutoff']:.2f}"
    words += f", sigma {blur['sigma'][0]:.2f}"
    if "theta" in blur:
        words += f"/{blur['sigma'][1]:.2f} at {math.degrees(blur['theta']):.0f} deg"
    return words + (f", beta {blur['beta']:.2f}" if "beta" in blur else "")


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _ascii(text: str) -> str:
    """Replace characters that the built-in font cannot show."""
    return text.encode("ascii", "backslashreplace").decode()


if __name__ == "__main__":
    run(Options, main, positionals_last(sys.argv[1:]))
