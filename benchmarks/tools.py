"""Measure the speed of the dataset tools, as ratios within one run on the same files and cores.

The ways take turns.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cv2
import numpy as np
import tyro

from benchmarks import straightforward
from pipeline.cli import UserError, run
from pipeline.data.decoding import HostDecoder
from pipeline.data.image_files import MANIFEST
from tools import check_training_data, images_to_data
from tools.crops.manifest import CropRecord, format_line
from tools.crops.quality import crop_gates, picture_gates
from tools.files import walk
from tools.images import encode
from tools.parallel import quiet_libraries


@dataclass(frozen=True)
class Options:
    """Measure images_to_data.py and check_training_data.py on your own photographs.

    cut: crops per core-second, compared with a straightforward script (Pillow, one process per
    core, random positions, PNG level 6). check: files per second, compared with a bare loop over
    the decoder (DALI, one decoder per thread), and --fast compared with both. memory: peak resident
    size of the tools on a generated tree of many small files.

    Example: python benchmarks/tools.py ~/Pictures/Kodak ~/Pictures/Urban100
    """

    photos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOS")] = ()
    """Folders of PNG photographs. JPEGs would not be a fair comparison: images_to_data.py halves
    them, the script does not."""
    only: tuple[Literal["cut", "check", "memory"], ...] = ("cut", "check", "memory")
    """What to measure."""
    size: int = 512
    """Height and width of the crops, in pixels."""
    rounds: int = 3
    """Number of measurements of each; medians are reported."""
    num_files: int = 100_000
    """Number of files in the tree for the memory measurement."""


@dataclass(frozen=True)
class Cost:
    """Wall and CPU seconds (of all processes) of some work; the number and size of its crops."""

    wall: float
    cpu: float
    crops: int = 0
    bytes: int = 0


def main(options: Options) -> int:
    """Measure and print."""
    if options.rounds < 1 or options.num_files < 100:
        raise UserError("--rounds must be at least 1 and --num-files at least 100")
    names = [folder / name for folder in options.photos for name in walk(folder, MANIFEST).encoded]
    if not names and {"cut", "check"} & {*options.only}:
        raise UserError("no photographs: give folders of PNG photographs, or --only memory")
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch) / "photos"
        for number, name in enumerate(names):  # one tree, so that all ways see the same files
            (photos / str(number // 1000)).mkdir(parents=True, exist_ok=True)
            os.symlink(name.resolve(), photos / str(number // 1000) / f"{number:06d}{name.suffix}")
        if "cut" in options.only:
            _measure_cut(photos, Path(scratch), options)
        if "check" in options.only:
            _measure_check(photos, Path(scratch), options)
        if "memory" in options.only:
            _measure_memory(Path(scratch), options.num_files)
    return 0


def _measure_cut(photos: Path, scratch: Path, options: Options) -> None:
    ways = {
        "straightforward, png": (_cut_straightforward, "png"),
        "images_to_data, npy": (_cut_ours, "npy"),
        "images_to_data, webp": (_cut_ours, "webp"),
        "images_to_data, png": (_cut_ours, "png"),
    }
    costs: dict[str, list[Cost]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, (work, form) in ways.items():
            out = scratch / "crops"
            costs[way].append(_in_child(work, photos, out, options.size, form))
            shutil.rmtree(out)
    base = _rate(costs["straightforward, png"])
    print(f"\ncut into {options.size}x{options.size} crops (median of {options.rounds})")
    print(
        f"{'':24}{'crops':>8}{'MB':>8}{'kB/crop':>9}"
        f"{'CPU s':>8}{'wall s':>8}{'crops/core-s':>14}{'ratio':>8}"
    )
    for way, runs in costs.items():
        crops, megabytes = runs[0].crops, runs[0].bytes / 1e6
        print(
            f"{way:24}{crops:8}{megabytes:8.0f}{megabytes * 1e3 / crops:9.0f}"
            f"{statistics.median(cost.cpu for cost in runs):8.2f}"
            f"{statistics.median(cost.wall for cost in runs):8.2f}"
            f"{_rate(runs):14.1f}{_rate(runs) / base:8.2f}"
        )
    more = costs["images_to_data, npy"][0].crops / costs["straightforward, png"][0].crops
    print(f"crops from the same photographs: {more:.2f} times as many")


def _rate(costs: list[Cost]) -> float:
    """Return crops per core-second."""
    return statistics.median(cost.crops / cost.cpu for cost in costs)


def _cut_straightforward(photos: Path, out: Path, size: int, _: str) -> None:
    straightforward.cut_folder(sorted(photos.rglob("*.*")), out, size, straightforward.core_count())


def _cut_ours(photos: Path, out: Path, size: int, form: str) -> None:
    status = images_to_data.main(
        images_to_data.Options(photos=photos, out=out, size=size, format=form)
    )
    if status:
        raise RuntimeError("images_to_data.py failed on these photographs")


def _measure_check(photos: Path, scratch: Path, options: Options) -> None:
    folders = {"the photographs": photos}
    for form in ("npy", "webp"):
        folders[f"{form} crops"] = scratch / form
        _in_child(_cut_ours, photos, scratch / form, options.size, form)
    print(
        f"\ncheck (median of {options.rounds}; share of the bare loop's rate per core-second, and "
        "by wall time)"
    )
    print(
        f"{'':24}{'bare loop s':>12}{'full s':>9}{'share':>8}"
        f"{'wall':>7}{'--fast s':>10}{'full / fast':>13}"
    )
    for what, folder in folders.items():
        runs: dict[str, list[Cost]] = {"bare": [], "full": [], "fast": []}
        for _ in range(options.rounds):
            for name, costs in runs.items():
                costs.append(_in_child(_CHECKS[name], folder, folder, options.size, ""))
        cpu = {name: statistics.median(cost.cpu for cost in costs) for name, costs in runs.items()}
        wall = {
            name: statistics.median(cost.wall for cost in costs) for name, costs in runs.items()
        }
        print(
            f"{what:24}{wall['bare']:12.2f}{wall['full']:9.2f}{cpu['bare'] / cpu['full']:8.2f}"
            f"{wall['bare'] / wall['full']:7.2f}"
            f"{wall['fast']:10.3f}{cpu['full'] / cpu['fast']:13.1f}"
        )
    for form in ("npy", "webp"):
        shutil.rmtree(scratch / form)


def _bare_loop(folder: Path, _: Path, __: int, ___: str) -> None:
    """Only read and decode every file, with one thread per core."""
    of_thread = threading.local()

    def decode(name: str) -> None:
        if name.endswith(".npy"):
            np.load(folder / name)
            return
        if not hasattr(of_thread, "decoder"):
            of_thread.decoder = HostDecoder(threads=1, batch=1)
        of_thread.decoder.decode([str(folder / name)])

    with quiet_libraries(), ThreadPoolExecutor(straightforward.core_count()) as pool:
        list(pool.map(decode, walk(folder, MANIFEST).images))


def _check(folder: Path, fast: bool) -> None:
    check_training_data.main(check_training_data.Options(data_dir=folder, fast=fast, min_size=1))


def _full_check(folder: Path, _: Path, __: int, ___: str) -> None:
    _check(folder, fast=False)


def _fast_check(folder: Path, _: Path, __: int, ___: str) -> None:
    _check(folder, fast=True)


_CHECKS: dict[str, Callable[[Path, Path, int, str], None]] = {
    "bare": _bare_loop,
    "full": _full_check,
    "fast": _fast_check,
}


def _in_child(
    work: Callable[[Path, Path, int, str], None], photos: Path, out: Path, size: int, form: str
) -> Cost:
    """Do the work in a fresh process, whose start and imports are not measured."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_timed, work, photos, out, size, form).result()


def _timed(
    work: Callable[[Path, Path, int, str], None], photos: Path, out: Path, size: int, form: str
) -> Cost:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        if work in _CHECKS.values():
            work(photos, out, size, form)  # warm-up: lazy imports and the page cache
        before, started = _cpu_seconds(), time.monotonic()
        work(photos, out, size, form)
        wall, cpu = time.monotonic() - started, _cpu_seconds() - before
    crops = [path for path in out.rglob("x*_*.*") if path.is_file()] or list(out.glob("*.png"))
    return Cost(wall, cpu, len(crops), sum(path.stat().st_size for path in crops))


def _cpu_seconds() -> float:
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _measure_memory(scratch: Path, num_files: int) -> None:
    print(f"\nmemory: peak resident size in MB, on {num_files // 10} and on {num_files} files")
    sizes: dict[str, list[float]] = {}
    for count in (num_files // 10, num_files):
        tree = scratch / f"tree{count}"
        _grow_tree(tree, count)
        for name, arguments in _MEMORY_RUNS.items():
            command = [sys.executable, str(ROOT / "tools" / arguments[0]), *arguments[1:]]
            command = [part.replace("TREE", str(tree)) for part in command]
            sizes.setdefault(name, []).append(_peak_megabytes(command))
        shutil.rmtree(tree)
    for name, (few, many) in sizes.items():
        slope = (many - few) * 1e6 / (num_files - num_files // 10)
        million = many + slope * (1e6 - num_files) / 1e6
        print(
            f"{name:32}{few:8.0f}{many:8.0f}   {slope:6.0f} bytes per file: {million:.0f} MB for "
            "a million"
        )


_MEMORY_RUNS = {
    "check_training_data": [
        "check_training_data.py",
        "--data-dir",
        "TREE/crops",
        "--min-size",
        "32",
    ],
    "check_training_data --fast": [
        "check_training_data.py",
        "--data-dir",
        "TREE/crops",
        "--min-size",
        "32",
        "--fast",
    ],
    "select_training_files": ["select_training_files.py", "--data-dir", "TREE/crops"],
    "list_data_folders": ["list_data_folders.py", "--data-dir", "TREE/crops"],
    "images_to_data": ["images_to_data.py", "TREE/photos", "TREE/cut", "--size", "32"],
    "images_to_data, once more": ["images_to_data.py", "TREE/photos", "TREE/cut", "--size", "32"],
}


def _grow_tree(tree: Path, count: int) -> None:
    """Write `count` photographs of 32 x 32 pixels, and as many crops with their manifests."""
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        photo = tree / f"photos/{number // 1000:04d}/{number:08d}.bmp"
        crop = tree / f"crops/{number // 1000:04d}/{number:08d}.npy"
        if number % 1000 == 0:
            photo.parent.mkdir(parents=True)
            crop.parent.mkdir(parents=True)
            manifest = open(crop.parent / MANIFEST, "w")  # noqa: SIM115 - closed when the next folder begins
        photo.write_bytes(cv2.imencode(".bmp", pixels)[1].tobytes())
        content = encode(pixels, "npy")
        crop.write_bytes(content)
        manifest.write(
            format_line(
                CropRecord(
                    crop.name,
                    photo.name,
                    1,
                    0,
                    0,
                    32,
                    len(content),
                    hashlib.sha256(pixels).hexdigest(),
                    "numpy",
                    {**crop_gates(pixels), **picture_gates(pixels)},
                    1,
                    1,
                    1,
                )
            )
        )
        if number % 1000 == 999 or number == count - 1:
            manifest.close()


def _peak_megabytes(command: list[str]) -> float:
    """Run a command in a separate process and return its peak resident size in MB."""
    code = (
        "import resource, subprocess, sys, json; r = subprocess.run(sys.argv[1:], "
        "stdout=subprocess.DEVNULL);"
        "print(json.dumps([r.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    status, kilobytes = json.loads(result.stdout.splitlines()[-1])
    if status > 1:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
    return kilobytes * 1024 / 1e6


if __name__ == "__main__":
    run(Options, main)
