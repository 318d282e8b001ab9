"""Cut crops as many SR projects do: Pillow, one process per core, random positions, PNG level 6.

benchmarks/tools.py compares images_to_data.py with it; it was written for that purpose.
"""

from __future__ import annotations

import os
import random
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm.contrib.concurrent import process_map

ATTEMPTS = 10_000  # failed draws in a row before a picture counts as full


def cut_folder(names: list[Path], out: Path, size: int, processes: int) -> None:
    """Write crops of `size` x `size` of all photographs to `out`, in `processes` processes."""
    out.mkdir(parents=True, exist_ok=True)
    process_map(
        partial(cut_photo, out=out, size=size),
        names,
        max_workers=processes,
        chunksize=1,
        disable=True,
    )


def cut_photo(name: Path, out: Path, size: int) -> None:
    """Write the crops of one photograph at full size, 1/2, 1/4, ... as long as one fits."""
    image = Image.open(name).convert("RGB")
    scale = 1
    while min(image.size) >= size:
        for left, top in random_places(image.width, image.height, size):
            crop = image.crop((left, top, left + size, top + size))
            crop.save(
                out / f"{name.parent.name}_{name.stem}_{scale}_{left}_{top}.png", compress_level=6
            )
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        scale *= 2


def random_places(width: int, height: int, size: int) -> list[tuple[int, int]]:
    """Draw corners of non-overlapping squares until `ATTEMPTS` draws in a row do not fit."""
    places: list[tuple[int, int]] = []
    failures = 0
    while failures < ATTEMPTS:
        left, top = random.randint(0, width - size), random.randint(0, height - size)
        if all(abs(left - other[0]) >= size or abs(top - other[1]) >= size for other in places):
            places.append((left, top))
            failures = 0
        else:
            failures += 1
    return places


def core_count() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
