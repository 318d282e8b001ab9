"""Benchmark storage formats: size, encoding, decoding, crops per second in training."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

import numpy as np
import tyro

from pipeline.cli import RunError, UserError, run
from pipeline.data.image_files import MANIFEST, BadNpyError, is_encoded, is_npy
from pipeline.data.image_headers import BadImageError
from pipeline.data.image_pixels import prepare_decoders
from pipeline.files import write_atomically
from tools.files import walk
from tools.images import FORMATS, decode, decode_file, encode, parallel_encoder
from tools.parallel import ordered_map, progress, quiet_libraries, thread_count

WARM_UP = 3  # batches of the loader before timing starts
PREFETCH = 2
SCALE = 2  # of the low-resolution side that the loader makes
MAX_MEGAPIXELS = 128  # of the sample, which is held in memory at 3 bytes per pixel


@dataclass(frozen=True)
class Options:
    """Measure the storage formats on a sample of your own images, on this machine.

    For each format: the size of the files, the speed of encoding and decoding (megapixels per
    second on all threads, and per core-second), and the random training crops per second that the
    training's own loader (DALI; including flips and the low-resolution side) delivers from them.
    The first line shows your files as they are. Everything is read from memory (the page cache);
    with a slow disk or network, small formats are better than the table shows.

    Example: python tools/benchmark_formats.py ~/dataset --count 100
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH")] = (
        Path("~/dataset"),
    )
    """One or more dataset folders (searched recursively), or image files."""
    count: int = 64
    """Number of images in the sample; fewer if they are large (at most 128 megapixels in total)."""
    seed: int = 0
    """Seed of the sample."""
    formats: tuple[Literal["npy", "png", "webp", "jp2"], ...] = FORMATS
    """The formats to measure."""
    seconds: float = 2.0
    """Minimum duration of each measurement in seconds."""
    crop: int = 256
    """HR crop of the training in pixels; smaller if an image is."""
    micro_batch: int = 16
    """Crops per batch of the loader."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the loader decodes and resizes."""
    skip_loader: bool = False
    """Do not measure the loader, which needs nvidia-dali."""
    json: Path | None = None
    """Also write the numbers to this file."""
    threads: int = 0
    """Number of threads; 0 is one per core."""


def main(options: Options) -> int:
    """Measure and print the table.

    Returns 0 if all files were read, 1 if some could not be read.
    """
    _check_options(options)
    threads, files = thread_count(options.threads), _files(options.paths)
    prepare_decoders()
    with quiet_libraries():
        sample, unreadable = _read_sample(files, options)
    loader = _loader_settings(sample, options)
    about = (
        f"{len(sample.files)} of {len(files)} images, {sample.megapixels:.1f} megapixels, "
        f"{threads} threads"
    )
    print(
        (
            f"{about}; loader on {options.device}: crops of {loader.crop}, batches of "
            f"{loader.micro_batch}"
        )
        if loader
        else about,
        flush=True,
    )
    rows = []
    with (
        quiet_libraries(),
        progress(len(options.formats) + 1, "format") as bar,
        tempfile.TemporaryDirectory(prefix="formats-") as folder,
    ):
        meter = FormatMeter(sample, Path(folder), threads, options.seconds, loader)
        rows.append(meter.as_it_is())
        bar.update()
        for form in options.formats:
            rows.append(meter.format(form))
            bar.update()
    _print(rows)
    if options.json:
        _write_json(options.json.expanduser(), rows, sample, loader, threads)
    return 1 if unreadable else 0


def _check_options(options: Options) -> None:
    """Raise `UserError` for options that cannot work."""
    for flag, value in (
        ("--count", options.count),
        ("--crop", options.crop),
        ("--micro-batch", options.micro_batch),
    ):
        if value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if not 0 <= options.seconds <= 3600:
        raise UserError(f"--seconds {options.seconds:g}: must be 0 to 3600")
    if not options.formats or len(set(options.formats)) < len(options.formats):
        raise UserError(f"--formats: name each format once; available: {', '.join(FORMATS)}")
    if not options.skip_loader and importlib.util.find_spec("nvidia.dali") is None:
        raise UserError(
            "the loader needs nvidia-dali, which is not installed; install requirements.txt, or "
            "give --skip-loader"
        )


def _files(paths: Sequence[Path]) -> list[Path]:
    """All images in `paths` or below them."""
    files: dict[Path, None] = {}
    for path in (path.expanduser() for path in paths):
        if path.is_file():
            if not (is_npy(path) or is_encoded(path)):
                raise UserError(
                    f"{path}: not an image according to its suffix; give images, or the folder of "
                    "a dataset"
                )
            files[path] = None
        else:
            files.update(dict.fromkeys(path / name for name in walk(path, MANIFEST).images))
    if not files:
        raise UserError(
            f"{paths[0] if paths else 'no PATH'}: no images below this folder; give the folder of "
            "a dataset"
        )
    return list(files)


def _read_sample(files: list[Path], options: Options) -> tuple[BenchmarkImages, int]:
    """Draw the images to measure; also returns how many of them could not be read."""
    drawn = random.Random(options.seed).sample(files, min(options.count, len(files)))
    sample, unreadable = BenchmarkImages([], []), 0
    for path in drawn:
        try:
            pixels = decode_file(path)
        except (BadImageError, BadNpyError, OSError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            print(f"could not be read: {path}: {reason}")
            unreadable += 1
            continue
        sample.files.append(path)
        sample.pixels.append(pixels)
        if sample.megapixels >= MAX_MEGAPIXELS:
            break
    if not sample.files:
        raise RunError(
            f"none of the drawn images ({len(drawn)}) could be read; examine them with `python "
            "tools/check_training_data.py`"
        )
    return sample, unreadable


def _loader_settings(sample: BenchmarkImages, options: Options) -> LoaderSettings | None:
    """Settings of the loader; its crop must fit into the smallest image."""
    if options.skip_loader:
        return None
    crop = min(options.crop, *(min(image.shape[:2]) for image in sample.pixels)) // SCALE * SCALE
    if crop < SCALE:
        raise UserError(
            f"--crop {options.crop}: no training crop of at least {SCALE} pixels fits into all "
            "images; give larger images, a larger --crop, or --skip-loader"
        )
    return LoaderSettings(crop, options.micro_batch, 0 if options.device == "cuda" else None)


@dataclass(frozen=True)
class BenchmarkImages:
    """The images to measure on; pixels are uint8 RGB (height, width, 3)."""

    files: list[Path]
    pixels: list[np.ndarray]

    @property
    def megapixels(self) -> float:
        """Total of all images."""
        return sum(image.shape[0] * image.shape[1] for image in self.pixels) / 1e6


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of the training's loader; `device_id` is that of a GPU, `None` for the CPU."""

    crop: int
    micro_batch: int
    device_id: int | None


class Speed(NamedTuple):
    """Units (megapixels, crops) per second of wall time, and per second of CPU time."""

    wall: float
    core: float


@dataclass(frozen=True)
class FormatRow:
    """Measurements of one format; `None` if not measured."""

    format: str
    megabytes: float
    of_raw: float  # relative to the size of the raw pixels
    encode: Speed | None  # megapixels
    decode: Speed  # megapixels
    loader: Speed | None  # crops


class FormatMeter:
    """Measures formats on a sample, with `threads` threads, each number for at least `seconds`."""

    def __init__(
        self,
        sample: BenchmarkImages,
        folder: Path,
        threads: int,
        seconds: float,
        loader: LoaderSettings | None,
    ) -> None:
        """`folder` receives the encoded files; without `loader`, the loader is not measured."""
        self._sample, self._folder, self._threads, self._seconds = sample, folder, threads, seconds
        self._loader = loader

    def as_it_is(self) -> FormatRow:
        """Measure the original files; nothing is encoded."""
        files = self._sample.files
        size = sum(file.stat().st_size for file in files) / 1e6
        return FormatRow(
            "as it is",
            size,
            size / self._sample.megapixels / 3,
            None,
            self._speed(lambda index: decode_file(files[index])),
            self._loader_speed(files),
        )

    def format(self, form: str) -> FormatRow:
        """Measure the sample in the format `form`.

        Raises `RunError` if decoding does not return identical pixels.
        """
        pixels = self._sample.pixels
        contents = list(ordered_map(lambda image: encode(image, form), pixels, self._threads))
        files = [self._folder / f"{index:05d}.{form}" for index in range(len(contents))]
        for file, content, image in zip(files, contents, pixels, strict=True):
            file.write_bytes(content)
            if not np.array_equal(decode(content, form), image):
                raise RunError(
                    f"{form} does not return identical pixels; do not use it with these library "
                    "versions"
                )
        size = sum(map(len, contents)) / 1e6
        row = FormatRow(
            form,
            size,
            size / self._sample.megapixels / 3,
            self._encoding_speed(form),
            self._speed(lambda index: decode(files[index].read_bytes(), form)),
            self._loader_speed(files),
        )
        for file in files:
            file.unlink()
        return row

    def _encoding_speed(self, form: str) -> Speed:
        """Same as `_speed`, for encoding.

        CPU time is measured without encoding processes, because their CPU time is not visible here.
        """
        pixels = self._sample.pixels
        speed = self._speed(lambda index: encode(pixels[index], form))
        with parallel_encoder(form, self._threads) as parallel:
            if isinstance(parallel, partial):  # same as above
                return speed
            # Make sure the processes have started.
            list(ordered_map(parallel, pixels[: 2 * self._threads], self._threads))
            return Speed(self._speed(lambda index: parallel(pixels[index])).wall, speed.core)

    def _speed(self, work: Callable[[int], object]) -> Speed:
        """Megapixels per second of `work` on all images, repeated until time is up."""

        def round_of_all() -> None:
            for _ in ordered_map(work, range(len(self._sample.pixels)), self._threads):
                pass

        return self._timed(round_of_all, self._sample.megapixels)

    def _loader_speed(self, files: Sequence[Path]) -> Speed | None:
        """Random training crops per second from `files`, with the pipeline used in training."""
        if self._loader is None:
            return None
        from pipeline.data.reader import training_pipeline  # needs DALI, but not torch
        from pipeline.data.sampling import Sampler
        from pipeline.data.source import CropSource, Position
        from pipeline.data.spec import DataSpec

        settings = self._loader
        source = CropSource(
            [os.path.abspath(file) for file in files],
            Sampler([len(files)], seed=0),
            DataSpec(crop=settings.crop),
            scale=SCALE,
            position=Position(0, 1, settings.micro_batch),
        )
        pipeline = training_pipeline(
            source, 0, device_id=settings.device_id, threads=self._threads, prefetch=PREFETCH
        )
        for _ in range(WARM_UP + PREFETCH):
            pipeline.run()
        return self._timed(pipeline.run, settings.micro_batch)

    def _timed(self, work: Callable[[], object], units: float) -> Speed:
        """Repeat `work`, which handles `units` each time, until time is up."""
        rounds, started, cpu = 0, time.perf_counter(), time.process_time()
        while not rounds or time.perf_counter() - started < self._seconds:
            work()
            rounds += 1
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        return Speed(rounds * units / wall, rounds * units / max(cpu, 1e-6))


def _print(rows: list[FormatRow]) -> None:
    """Print the table and the best format for each purpose."""
    print(
        f"\n{'':10}{'size':>18}{'encode, MPix/s':>20}{'decode, MPix/s':>20}{'loader, crops/s':>20}"
    )
    print(f"{'format':10}{'MB':>10}{'of raw':>8}" + f"{'all':>10}{'a core':>10}" * 3)
    for row in rows:
        speeds = "".join(
            f"{speed.wall:10.1f}{speed.core:10.1f}" if speed else f"{'-':>10}{'-':>10}"
            for speed in (row.encode, row.decode, row.loader)
        )
        print(f"{row.format:10}{row.megabytes:10.2f}{row.of_raw:8.3f}{speeds}")
    formats = rows[1:]
    print(
        f"\nsmallest: {min(formats, key=lambda row: row.megabytes).format}; "
        f"fastest to write: {max(formats, key=lambda row: row.encode.wall).format}; "
        f"fastest to decode: {max(formats, key=lambda row: row.decode.wall).format}"
    )
    if formats[0].loader:
        best = max(formats, key=lambda row: row.loader.wall)
        print(
            f"fastest to train from, with the files in memory: {best.format} "
            f"({best.loader.wall:.0f} crops/s)"
        )


def _write_json(
    path: Path,
    rows: list[FormatRow],
    sample: BenchmarkImages,
    loader: LoaderSettings | None,
    threads: int,
) -> None:
    numbers = {
        "images": len(sample.files),
        "megapixels": sample.megapixels,
        "threads": threads,
        "loader": asdict(loader) if loader else None,
        "formats": [
            {
                **asdict(row),
                **{
                    name: speed._asdict() if speed else None
                    for name, speed in (
                        ("encode", row.encode),
                        ("decode", row.decode),
                        ("loader", row.loader),
                    )
                },
            }
            for row in rows
        ],
    }
    try:
        write_atomically(path, (json.dumps(numbers, indent=1) + "\n").encode("utf-8"))
    except OSError as error:
        raise UserError(
            f"--json {path}: cannot be written: {error.strerror}; choose another file"
        ) from error


if __name__ == "__main__":
    run(Options, main)
