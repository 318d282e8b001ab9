"""Measure how fast loaders make training batches, on the same photographs and cores.

The ways take turns, and are compared as ratios within one run.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cv2
import numpy as np
import tyro

from benchmarks.loader_ways import (
    DALI_NUMPY,
    DALI_PNG,
    DEEP_FORMS,
    DEPTHS,
    HOST,
    OPERATORS,
    OUR_WAYS,
    OURS,
    OURS_PNG,
    OURS_PRESET,
    OURS_TORCH,
    PREFETCH,
    TORCH_PNG,
    TORCH_WRITTEN,
    WAYS,
    WRITTEN_HERE,
    Setting,
    Way,
)
from pipeline.cli import RunError, UserError, run
from pipeline.data.degradations.host import Workspace
from pipeline.data.degradations.steps import STEPS
from pipeline.data.degradations.steps.base import NUMBERS, Canvas, Draws, kinds_of
from pipeline.data.image_files import MANIFEST
from tools.files import walk
from tools.parallel import progress

SIZE = 512  # side of the files, in pixels
CROP, SCALE, MICRO_BATCH = 256, 2, 32
# LR pixels along the border that may differ: an LR image made from a crop alone lacks the
# surroundings.
EDGE = 4


@dataclass(frozen=True)
class Options:
    """Compare the training loader with others on your own photographs, cut into 512x512 files.

    Batches are HR crops of 256x256 with the eight symmetries and LR images of half the size, as
    uint8 NCHW (torch: float32). All ways are checked for this before they are measured. CPU time
    includes child processes.

    Example: python benchmarks/loader.py ~/Pictures/Kodak ~/Pictures/SunHays80
    """

    photos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOS")]
    """Folders of photographs of at least 512x512 pixels."""
    images: int = 256
    """Maximum number of files cut from them."""
    rounds: int = 5
    """Number of rounds, in which each way is measured once; medians are reported."""
    seconds: float = 3.0
    """Duration of each measurement, in seconds."""
    threads: int = 2
    """Threads of DALI and processes of the torch DataLoader."""
    scale: int = SCALE
    """Downscaling factor of LR."""
    batch: int = MICRO_BATCH
    """Samples per batch."""
    only: tuple[str, ...] = ()
    """Measure only the ways whose names contain one of these words, such as realesrgan; ratios are
    to the last one."""
    depths: bool = False
    """Instead, compare batches of 16 bits with batches of 8."""
    steps: bool = False
    """Instead, measure each kind of each degradation step by itself, in one thread, on crops of
    256x256."""
    operators: bool = False
    """Instead, measure variants of the loader's graph, each with one change."""
    gpu: bool = False
    """Run this project's loader on the first GPU; its CPU time is the host's. The others stay on
    the CPU."""


@dataclass(frozen=True)
class Cost:
    """Wall and CPU seconds (of all processes) for `images` samples."""

    wall: float
    cpu: float
    images: int

    @property
    def wall_rate(self) -> float:
        """Images per second."""
        return self.images / self.wall

    @property
    def core_rate(self) -> float:
        """Images per core-second."""
        return self.images / self.cpu


def main(options: Options) -> int:
    """Cut, check, measure and print."""
    _check_options(options)
    if options.steps:
        with tempfile.TemporaryDirectory() as scratch:
            setting = Setting(Path(scratch), CROP, options.scale, options.batch, 1)
            cut_photographs(options.photos, setting, SIZE, min(8, options.images))
            print_steps(setting, options.rounds)
        return 0
    ways = OPERATORS if options.operators else DEPTHS if options.depths else WAYS
    ways = {
        name: way
        for name, way in ways.items()
        if not options.only or any(word in name for word in options.only)
    }
    if not ways:
        raise UserError(
            f"--only {' '.join(options.only)}: matches none of the ways; choose from "
            f"{', '.join(WAYS)}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(Path(scratch), CROP, options.scale, options.batch, options.threads)
        cut_photographs(options.photos, setting, SIZE, options.images)
        if options.depths:
            write_deep(setting)
        settings = {
            name: replace(setting, device_id=0 if options.gpu and name in OUR_WAYS else None)
            for name in ways
        }
        check(
            {name: _in_child(first_batch, ways[name], settings[name]) for name in ways},
            ways,
            setting,
        )
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        with progress(options.rounds * len(ways), "measurement") as bar:
            for _ in range(options.rounds):
                for name, runs in costs.items():
                    runs.append(_in_child(measure, ways[name], settings[name], options.seconds))
                    bar.update()
        _print_conditions(setting, options)
    is_usual = not (options.operators or options.depths)
    print_table(costs, [*ways][-1] if options.only else DALI_PNG if is_usual else OURS)
    if is_usual and not options.only:
        print_ratios(costs)
    if options.depths and not options.only:
        print_depths(costs)
    return 0


def _print_conditions(setting: Setting, options: Options) -> None:
    megabytes = {
        form: sum(file.stat().st_size for file in setting.files(form)) / 1e6
        for form in ("npy", "png")
    }
    print(
        f"{len(setting.files('npy'))} files of {SIZE}x{SIZE} in the page cache: npy "
        f"{megabytes['npy']:.0f} MB, PNG (OpenCV's default) {megabytes['png']:.0f} MB"
    )
    print(
        f"crops of {CROP}, x{setting.scale}, batches of {setting.micro_batch}, {options.threads} "
        f"threads; medians of {options.rounds} rounds of {options.seconds:g} s"
    )
    if options.gpu:
        print(
            "this loader on the GPU, except for its host work; all others on the CPU; CPU seconds "
            "are the host's"
        )


def _check_options(options: Options) -> None:
    if (
        min(options.images, options.rounds, options.threads, options.batch) < 1
        or not 0 < options.seconds < math.inf
    ):
        raise UserError(
            "--images, --rounds, --threads and --batch must be at least 1 and --seconds above 0"
        )
    if not 2 <= options.scale <= 8 or CROP % options.scale:
        raise UserError(f"--scale {options.scale} must be 2, 4 or 8, for crops of {CROP}")
    if not options.photos:
        raise UserError("no photographs: give folders of photographs of at least 512x512 pixels")
    if options.gpu and (options.operators or options.depths):
        raise UserError(
            "--gpu cannot be combined with --operators or --depths, which run only on the CPU; "
            "omit one"
        )
    if options.operators and options.depths:
        raise UserError("--operators and --depths are two comparisons; give one")
    if options.gpu:
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                "--gpu: torch sees no GPU on this machine; omit --gpu, or install torch for CUDA"
            )


def cut_photographs(folders: Sequence[Path], setting: Setting, size: int, most: int) -> int:
    """Cut photographs into files of `size` x `size` with their LR images; return the number.

    The files go into the folders of the setting, at most `most`. The photographs are taken in a
    random order that is always the same.

    Raises:
        UserError: no photograph is large enough.
    """
    photos = [folder / name for folder in folders for name in walk(folder, MANIFEST).encoded]
    random.Random(0).shuffle(photos)
    for folder in ("npy", "png", "lr_npy", "lr_png"):
        (setting.folder / folder).mkdir()
    count = 0
    for tile in islice((tile for photo in photos for tile in _tiles(photo, size)), most):
        low = _cubic_lr(tile.transpose(2, 0, 1)[None], setting.scale)[0].transpose(1, 2, 0)
        for prefix, pixels in (("", tile), ("lr_", np.clip(np.rint(low), 0, 255).astype(np.uint8))):
            np.save(
                setting.folder / f"{prefix}npy" / f"{count:06d}.npy",
                np.ascontiguousarray(pixels[..., ::-1]),
            )
            cv2.imwrite(str(setting.folder / f"{prefix}png" / f"{count:06d}.png"), pixels)
        count += 1
    if not count:
        raise UserError(
            f"no photograph of at least {size}x{size} pixels in {', '.join(map(str, folders))}; "
            "give folders of larger ones"
        )
    return count


def write_deep(setting: Setting) -> None:
    """Write the setting's files a second time, as uint16: a little smoother, so that the lower bits
    hold what a photograph's would.
    """
    for form, deep_form in DEEP_FORMS.items():
        (setting.folder / deep_form).mkdir()
        for file in setting.files(form):
            pixels = np.load(file) if form == "npy" else cv2.imread(str(file))
            smooth = cv2.GaussianBlur(pixels.astype(np.float32) * 257, (0, 0), 0.6)
            deep = np.rint(np.clip(smooth, 0, 65535)).astype(np.uint16)
            target = setting.folder / deep_form / file.name
            if form == "npy":
                np.save(target, deep)
            else:
                cv2.imwrite(str(target), deep)


def _tiles(photo: Path, size: int) -> list[np.ndarray]:
    """Cut a photograph into adjacent squares; BGR."""
    image = cv2.imread(str(photo))
    if image is None:
        raise UserError(f"{photo} cannot be decoded; remove it")
    return [
        image[top : top + size, left : left + size]
        for top in range(0, image.shape[0] - size + 1, size)
        for left in range(0, image.shape[1] - size + 1, size)
    ]


def _cubic_lr(images: np.ndarray, scale: int) -> np.ndarray:
    """Downscale NCHW images of any type by antialiased cubic, to unclipped float32."""
    import torch

    from pipeline.images import cubic_resize

    height, width = images.shape[-2:]
    wide = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    return cubic_resize(wide, (height // scale, width // scale)).numpy()


def first_batch(way: Way, setting: Setting) -> list[np.ndarray]:
    """Return the arrays of a way's first batch."""
    batches = way.batches(setting)
    arrays = [_array(part) for part in next(batches)]
    _close(batches)
    return arrays


def _close(batches: Iterator[Any]) -> None:
    """Stop the prefetching of a generator; other iterators stop by themselves."""
    if isinstance(batches, Generator):
        batches.close()


def _array(part: Any) -> np.ndarray:
    """Copy a DALI list of equally shaped tensors, a torch tensor or an array."""
    if hasattr(part, "as_tensor"):
        return np.array(part.as_cpu().as_tensor())
    return np.array(part.cpu().numpy() if hasattr(part, "cpu") else part)


def check(
    batches: Mapping[str, list[np.ndarray]], ways: Mapping[str, Way], setting: Setting
) -> None:
    """Raise `RunError` unless the first batches of all ways are correct.

    All HR and LR images must have the same shapes. Away from the border, LR must be the bicubic
    version of HR within a level. This project's loader must give the same bytes in all its ways.
    """
    count, crop, low = setting.micro_batch, setting.crop, setting.crop // setting.scale
    for name, batch in batches.items():
        shapes = [array.shape for array in batch]
        if not ways[name].pairs:
            if (
                batch[0].ndim != 4
                or len(batch[0]) != count
                or min(shapes[0][1:3]) < crop
                or shapes[0][3] != 3
            ):
                raise RunError(f"{name} delivers {shapes[0]}, not {count} crops of {crop}x{crop}")
            continue
        if shapes[0] != (count, 3, crop, crop) or shapes[1:] not in ([], [(count, 3, low, low)]):
            raise RunError(
                f"{name} delivers {shapes}, not {count} crops of {crop} and {low} pixels"
            )
        kind = (
            np.uint16 if "16 bits" in name else np.float32 if name.startswith("torch") else np.uint8
        )
        if {array.dtype for array in batch} != {np.dtype(kind)}:
            raise RunError(f"{name} delivers {batch[0].dtype} and {batch[-1].dtype}")
        if len(batch) == 2 and ways[name].is_cubic:
            off = _levels_off(*batch, setting.scale)
            if off > 1:
                raise RunError(f"{name}: LR differs by {off:.2f} levels from the bicubic one")
    first = batches.get(OURS)
    for name in (OURS_TORCH, OURS_PNG, WRITTEN_HERE):
        if first and name in batches and not all(map(np.array_equal, batches[name], first)):
            raise RunError(f"{name} and {OURS} deliver different bytes")


def _levels_off(hr: np.ndarray, lr: np.ndarray, scale: int) -> float:
    """Return the largest difference of LR from the bicubic version of HR, without the border.

    It is in levels of 0 to 255.
    """
    unit = np.float32({"float32": 255, "uint16": 1 / 257}.get(hr.dtype.name, 1))
    difference = np.clip(_cubic_lr(hr * unit, scale), 0, 255) - lr * unit
    return float(abs(difference[..., EDGE:-EDGE, EDGE:-EDGE]).max())


def measure(way: Way, setting: Setting, seconds: float) -> Cost:
    """Take batches for `seconds`, after a warm-up.

    The warm-up fills the prefetch queues and, if time allows, opens every file.
    """
    batches = way.batches(setting)
    epoch, started = math.ceil(len(setting.files("npy")) / setting.micro_batch), time.perf_counter()
    for number in range(PREFETCH + 1 + epoch):
        if number > PREFETCH and time.perf_counter() - started > seconds:
            break
        next(batches)
    count, cpu, started = 0, _cpu_seconds(), time.perf_counter()
    while not count or time.perf_counter() - started < seconds:
        next(batches)
        count += 1
    if setting.device_id is not None:
        import torch

        torch.cuda.synchronize()  # include the last copy into a torch tensor
    wall, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
    _close(batches)
    return Cost(wall, cpu, count * setting.micro_batch)


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and its children, including running ones."""
    running = 0.0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        # utime and stime of all the child's threads, in clock ticks.
        running += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    usages = [
        resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return running + sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _in_child(work: Any, way: Way, *arguments: Any) -> Any:
    """Call `work(way, ...)` in a fresh process, free of the leftovers of other ways."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_collected, work, way, *arguments).result()


def _collected(work: Any, *arguments: Any) -> Any:
    """Call `work(...)` and collect its garbage.

    A DALI pipeline whose threads still run when Python exits may abort the process ("terminate
    called without an active exception").
    """
    result = work(*arguments)
    gc.collect()
    return result


def print_steps(setting: Setting, rounds: int) -> None:
    """Print the CPU time of each kind of each step: the median over photographs and draws.

    Threads of codecs count.
    """
    crops = [np.load(file)[:CROP, :CROP] for file in setting.files("npy")]
    kinds = [(name, kind) for name, step in STEPS.items() for kind in kinds_of(step.Spec) or ("",)]
    print(f"{'step':40}{'CPU us':>10}   of images of {CROP}x{CROP}, median of {rounds} x 8 draws")
    cv2.setNumThreads(1)
    workspace, numbers = Workspace(), random.Random(0)
    for name, kind in kinds:
        step = STEPS[name]
        key = "codec" if "codec" in step.Spec.model_fields else "kind"
        spec = step.Spec.model_validate({key: kind} if kind else {})
        try:
            step.check(spec)
        except UserError:
            continue  # an encoder that this machine lacks
        times = []
        for number in range(8 * rounds + 1):
            crop = np.ascontiguousarray(crops[number % len(crops)])
            draws = Draws(iter([numbers.random() for _ in range(NUMBERS)]))
            drawn = step.draw(spec, draws, Canvas((CROP, CROP), (CROP, CROP), setting.scale))
            began = time.process_time()
            step.apply(crop, drawn, workspace)
            times.append(time.process_time() - began)
        label = f"{name}({kind})" if kind else name
        print(f"{label:40}{statistics.median(times[1:]) * 1e6:10,.0f}")


def print_table(costs: Mapping[str, Sequence[Cost]], base: str) -> None:
    """Print one line per way; ratios are to `base`, within each round."""
    width = max(map(len, costs)) + 2
    print(
        f"\n{'':{width}}{'images/s':>10}{'ratio':>8}"
        f"{'images/core-s':>15}{'ratio':>8}{'CPU us/image':>14}"
    )
    for name, runs in costs.items():
        wall, core = (
            statistics.median(getattr(cost, rate) for cost in runs)
            for rate in ("wall_rate", "core_rate")
        )
        print(
            f"{name:{width}}{wall:10.0f}{_ratio(runs, costs[base], 'wall_rate')[0]:8.2f}"
            f"{core:15.0f}{_ratio(runs, costs[base], 'core_rate')[0]:8.2f}{1e6 / core:14.0f}"
        )


def print_ratios(costs: Mapping[str, Sequence[Cost]]) -> None:
    """Print the ratios for which the project has targets."""
    print("\nratios (median, minimum and maximum of the rounds)")
    for name, other in (
        (OURS, DALI_PNG),
        (OURS, TORCH_PNG),
        (OURS_PNG, DALI_PNG),
        (OURS_PNG, TORCH_PNG),
        (OURS_PRESET, TORCH_WRITTEN),
        (OURS_PRESET, TORCH_PNG),
    ):
        for kind, rate in (("per second", "wall_rate"), ("per core-second", "core_rate")):
            print(
                f"images {kind:16}{name} / {other}: "
                f"{_three(_ratio(costs[name], costs[other], rate))}"
            )
    for other in (DALI_PNG, TORCH_PNG, DALI_NUMPY):
        print(
            f"CPU per image          {other} / {HOST}: "
            f"{_three(_ratio(costs[HOST], costs[other], 'core_rate'))}"
        )


def print_depths(costs: Mapping[str, Sequence[Cost]]) -> None:
    """Print the ratios of 16 bits to 8."""
    print("\nratios (median, minimum and maximum of the rounds)")
    for name, deep_name in zip([*costs][::2], [*costs][1::2], strict=True):
        for kind, rate in (("per second", "wall_rate"), ("per core-second", "core_rate")):
            print(
                f"images {kind:16}{deep_name} / {name}: "
                f"{_three(_ratio(costs[deep_name], costs[name], rate))}"
            )


def _ratio(runs: Sequence[Cost], others: Sequence[Cost], rate: str) -> tuple[float, float, float]:
    """Return median, minimum and maximum of the ratios within each round."""
    ratios = [
        getattr(one, rate) / getattr(other, rate) for one, other in zip(runs, others, strict=True)
    ]
    return statistics.median(ratios), min(ratios), max(ratios)


def _three(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


if __name__ == "__main__":
    run(Options, main)
