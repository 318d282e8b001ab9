"""Options shared by all tools that cut crops."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
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
    """Quality thresholds for training data."""

    min_gradient: float = MIN_GRADIENT
    """Reject flat crops (clear sky, black bars), which carry no information for training: those
    whose mean luma gradient, in gray levels per pixel, is below this; 0 keeps all."""
    min_sharpness: float = MIN_SHARPNESS
    """Reject blurred or upscaled pictures, which have almost no detail in their finest octave:
    those whose sharpness is below this. Pictures to be cut are first halved until they reach it. 0
    keeps all."""
    keep_duplicates: bool = False
    """Keep pictures that are identical or nearly identical (re-encoded, resized) to an earlier
    one."""
    against: tuple[Path, ...] = ()
    """Folders of benchmark images (Set5, Urban100...). Anything nearly identical to one of them, or
    to a part of one, is reported and rejected, because a network must not be trained on the images
    it is evaluated with."""
    threads: int = 0
    """Number of threads; 0 is one per core."""

    def check_gates(self) -> None:
        """Raise `UserError` for thresholds out of range."""
        for flag, value in (
            ("--min-gradient", self.min_gradient),
            ("--min-sharpness", self.min_sharpness),
        ):
            if not value >= 0:
                raise UserError(f"{flag} {value:g}: must be at least 0; 0 disables this gate")

    def max_hash_distance(self) -> int | None:
        """Largest hash distance between duplicates in bits; `None` if duplicates are kept."""
        return None if self.keep_duplicates else MAX_DISTANCE

    def benchmark_folders(self) -> tuple[str, ...]:
        """Absolute paths of the folders in `against`."""
        return tuple(str(folder.expanduser().resolve()) for folder in self.against)


@dataclass(frozen=True, kw_only=True)
class CropOptions(GateOptions):
    """How to cut, judge and store crops."""

    size: int = 512
    """Height and width of a crop in pixels; training cuts its smaller random HR crops out of it."""
    format: Literal["npy", "png", "webp"] = "npy"
    """Lossless format of the crops: npy is by far the fastest to read, webp the smallest (0.44 of
    npy)."""
    seed: int = 0
    """Seed of the gaps between the crops. The same seed and source give the same bytes with any
    number of threads."""
    cover: bool = False
    """Cover every pixel with as few crops as possible, evenly overlapping, instead of leaving
    random gaps."""
    keep_lossy_size: bool = False
    """Also cut lossy sources at full size, with their compression artefacts; by default they are
    halved first."""
    num_scales: int | None = None
    """Maximum number of sizes per picture (1: only the largest); by default as many as hold a
    crop."""

    def settings(self) -> CropSettings:
        """Return the settings that determine the bytes of the dataset.

        Raises `UserError` for values out of range.
        """
        if not 32 <= self.size <= 8192:
            raise UserError(
                f"--size {self.size}: a crop must have 32 to 8192 pixels per side; 512 suits most "
                "networks"
            )
        if self.num_scales is not None and self.num_scales < 1:
            raise UserError(
                f"--num-scales {self.num_scales}: must be at least 1; omit it for all sizes"
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


def with_depth(settings: CropSettings, depth: int) -> CropSettings:
    """Return the settings with crops of `depth` bits; raises `UserError` if none can hold them."""
    if depth == 16 and settings.format == "webp":
        raise UserError("--depth 16: WebP holds 8 bits; give --format npy or png")
    return replace(settings, depth=depth)


def open_benchmark(folders: tuple[str, ...]) -> BenchmarkIndex | None:
    """Index the benchmark images named by `--against`; `None` without any.

    Raises `UserError` if one of them cannot be read.
    """
    if not folders:
        return None
    index = BenchmarkIndex([Path(folder) for folder in folders])
    if index.skipped:
        raise UserError(
            f"--against: {printable(index.skipped[0])}: {len(index.skipped)} benchmark images "
            "cannot be read, so leaks from them would go unnoticed; repair or remove them"
        )
    return index


def benchmark_fingerprint(folders: tuple[str, ...]) -> str | None:
    """Hash of the names and sizes of the benchmark images; `None` without any.

    It is stored with the dataset, so that a changed benchmark triggers a new search.
    """
    if not folders:
        return None
    digest = hashlib.sha256()
    for folder in folders:
        for name in walk(Path(folder), MANIFEST).encoded:
            size = os.path.getsize(Path(folder) / name)
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
