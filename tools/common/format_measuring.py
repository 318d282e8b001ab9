"""How large images are in a storage format, how fast they are written and read, and how fast training reads them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.cli import RunError
from tools.common.image_formats import decode, decode_file, encode, parallel_encoder
from tools.parallel import ordered_map

WARM_UP = 3  # batches of the loader before the clock starts
PREFETCH = 2
SCALE = 2    # of the low-resolution side that the loader makes


class Speed(NamedTuple):
    """Units (megapixels, crops) a second of wall time, and per second of CPU time of all threads together."""

    wall: float
    core: float


@dataclass(frozen=True)
class Row:
    """The measurements of one format; `None`: not measured."""

    format: str
    megabytes: float
    of_raw: float         # size relative to that of the bare pixels
    encode: Speed | None  # megapixels
    decode: Speed         # megapixels
    loader: Speed | None  # crops


@dataclass(frozen=True)
class Sample:
    """The images that everything is measured on; pixels are uint8 RGB (height, width, 3)."""

    files: list[Path]
    pixels: list[np.ndarray]

    @property
    def megapixels(self) -> float:
        """Of all images together."""
        return sum(image.shape[0] * image.shape[1] for image in self.pixels) / 1e6


@dataclass(frozen=True)
class LoaderSettings:
    """How the training's loader is driven; `device_id` is that of a GPU, `None` for the CPU."""

    crop: int
    micro_batch: int
    device_id: int | None


class Meter:
    """Measures formats on a sample, with so many threads, each number for at least `seconds`."""

    def __init__(self, sample: Sample, folder: Path, threads: int, seconds: float,
                 loader: LoaderSettings | None) -> None:
        """`folder` takes the encoded files; without `loader` the loader is not measured."""
        self._sample, self._folder, self._threads, self._seconds = sample, folder, threads, seconds
        self._loader = loader

    def as_it_is(self) -> Row:
        """The user's own files: nothing is encoded."""
        files = self._sample.files
        size = sum(file.stat().st_size for file in files) / 1e6
        return Row("as it is", size, size / self._sample.megapixels / 3, None,
                   self._speed(lambda index: decode_file(files[index])), self._loader_speed(files))

    def format(self, form: str) -> Row:
        """The sample in the format `form`. Raises `RunError` where it does not come back bit by bit."""
        pixels = self._sample.pixels
        contents = list(ordered_map(lambda image: encode(image, form), pixels, self._threads))
        files = [self._folder / f"{index:05d}.{form}" for index in range(len(contents))]
        for file, content, image in zip(files, contents, pixels, strict=True):
            file.write_bytes(content)
            if not np.array_equal(decode(content, form), image):
                raise RunError(f"{form} does not give the same pixels back; do not use it with these library versions")
        size = sum(map(len, contents)) / 1e6
        row = Row(form, size, size / self._sample.megapixels / 3, self._encoding_speed(form),
                  self._speed(lambda index: decode(files[index].read_bytes(), form)), self._loader_speed(files))
        for file in files:
            file.unlink()
        return row

    def _encoding_speed(self, form: str) -> Speed:
        """As `_speed`. The CPU time of processes cannot be seen from here: it is measured without them."""
        pixels = self._sample.pixels
        speed = self._speed(lambda index: encode(pixels[index], form))
        with parallel_encoder(form, self._threads) as parallel:
            if isinstance(parallel, partial):  # the same as above
                return speed
            list(ordered_map(parallel, pixels[: 2 * self._threads], self._threads))  # the processes have started
            return Speed(self._speed(lambda index: parallel(pixels[index])).wall, speed.core)

    def _speed(self, work: Callable[[int], object]) -> Speed:
        """Megapixels a second of `work` on each image of the sample, on all threads, as often as the time allows."""
        rounds, started, cpu = 0, time.perf_counter(), time.process_time()
        while not rounds or time.perf_counter() - started < self._seconds:
            for _ in ordered_map(work, range(len(self._sample.pixels)), self._threads):
                pass
            rounds += 1
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        return Speed(rounds * self._sample.megapixels / wall, rounds * self._sample.megapixels / max(cpu, 1e-6))

    def _loader_speed(self, files: Sequence[Path]) -> Speed | None:
        """Random training crops a second out of `files`, through the graph that training uses."""
        if self._loader is None:
            return None
        from pipeline.config.specs import DataSpec
        from pipeline.data.reader import training_pipeline  # needs DALI; not torch
        from pipeline.data.sampling import Sampler
        from pipeline.data.source import CropSource, Position

        settings = self._loader
        source = CropSource([os.path.abspath(file) for file in files], Sampler([len(files)], seed=0),
                            DataSpec(crop=settings.crop), scale=SCALE, position=Position(0, 1, settings.micro_batch))
        pipeline = training_pipeline(source, 0, device_id=settings.device_id, threads=self._threads, prefetch=PREFETCH)
        for _ in range(WARM_UP + PREFETCH):
            pipeline.run()
        batches, started, cpu = 0, time.perf_counter(), time.process_time()
        while not batches or time.perf_counter() - started < self._seconds:
            pipeline.run()
            batches += 1
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        return Speed(batches * settings.micro_batch / wall, batches * settings.micro_batch / max(cpu, 1e-6))
