"""The options that every tool which cuts crops has in common."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.cli import UserError
from pipeline.data.image_files import MANIFEST
from tools.crops.cutting import CropSettings
from tools.crops.duplicates import MAX_DISTANCE
from tools.crops.leakage import BenchmarkIndex
from tools.crops.quality import MIN_GRADIENT, MIN_SHARPNESS
from tools.files import printable, walk


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """What is good enough to train on."""

    min_gradient: float = MIN_GRADIENT
    """Flat crops (clear sky, black bars) teach nothing: turn away those whose mean luma gradient,
    in grey levels a pixel, is below this; 0 keeps all."""
    min_sharpness: float = MIN_SHARPNESS
    """Blurred or upscaled pictures have next to nothing in their finest octave: turn away those
    whose sharpness is below this (pictures that are cut are halved first, until they reach it); 0
    keeps all."""
    keep_duplicates: bool = False
    """Keep pictures that are identical or nearly so (re-encoded, resized) to one that came
    before."""
    against: tuple[Path, ...] = ()
    """Folders of benchmark images (Set5, Urban100...): what is near-identical to one of them, or to
    a part of one, is reported and rejected, since a network must not be trained on what it is
    measured with."""
    threads: int = 0
    """Number of threads; 0 is one per core."""

    def check_gates(self) -> None:
        """Raise `UserError` for thresholds out of range."""
        for flag, value in (
            ("--min-gradient", self.min_gradient),
            ("--min-sharpness", self.min_sharpness),
        ):
            if not value >= 0:
                raise UserError(f"{flag} {value:g}: must be at least 0; 0 turns this gate off")

    def max_hash_distance(self) -> int | None:
        """Of perceptual hashes: up to it two pictures are duplicates; `None` where duplicates are
        kept."""
        return None if self.keep_duplicates else MAX_DISTANCE

    def benchmark_folders(self) -> tuple[str, ...]:
        """The folders of `against`, in full."""
        return tuple(str(folder.expanduser().resolve()) for folder in self.against)


@dataclass(frozen=True, kw_only=True)
class CropOptions(GateOptions):
    """How crops are cut, judged and stored."""

    size: int = 512
    """Height and width of a crop in pixels; training cuts its smaller random HR crops out of it."""
    format: Literal["npy", "png", "webp"] = "npy"
    """How crops are stored, always lossless: npy is read fastest by far, webp is smallest (0.44 of
    npy)."""
    seed: int = 0
    """Decides where the gaps between the crops lie. Same seed and source, same bytes, on any number
    of threads."""
    cover: bool = False
    """Cover every pixel: as few crops as that takes, overlapping evenly, instead of crops with
    random gaps."""
    keep_lossy_size: bool = False
    """Cut lossy sources at full size too, with their compression artefacts; by default they are
    halved first."""
    num_scales: int | None = None
    """At most this many sizes of each picture (1: only the largest); by default as many as hold a
    crop."""

    def settings(self) -> CropSettings:
        """What decides the bytes of the dataset. Raises `UserError` for values out of range."""
        if not 32 <= self.size <= 8192:
            raise UserError(
                f"--size {self.size}: a crop must have 32 to 8192 pixels a side; 512 suits most "
                "networks"
            )
        if self.num_scales is not None and self.num_scales < 1:
            raise UserError(
                f"--num-scales {self.num_scales}: must be at least 1; leave it away for all sizes"
            )
        self.check_gates()
        return CropSettings(
            self.size,
            self.format,
            self.seed,
            self.cover,
            self.keep_lossy_size,
            self.num_scales,
            self.min_gradient,
            self.min_sharpness,
            self.max_hash_distance(),
            self.benchmark_folders(),
        )


def open_benchmark(folders: tuple[str, ...]) -> BenchmarkIndex | None:
    """The index of the benchmark images that `--against` names; reads them all, and must be able
    to."""
    if not folders:
        return None
    index = BenchmarkIndex([Path(folder) for folder in folders])
    if index.skipped:
        raise UserError(
            f"--against: {printable(index.skipped[0])}: {len(index.skipped)} benchmark images "
            "cannot be "
            "read, so that leaks from them would not be seen; repair or remove them"
        )
    return index


def benchmark_fingerprint(folders: tuple[str, ...]) -> str | None:
    """A hash of the names and sizes of the benchmark images: a set that grew must be searched for
    again."""
    if not folders:
        return None
    digest = hashlib.sha256()
    for folder in folders:
        for name in walk(Path(folder), MANIFEST).encoded:
            size = os.path.getsize(Path(folder) / name)
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
