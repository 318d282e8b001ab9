"""Training runs of about a second, for campaigns of faults and for long runs: dataset and recipe.

The network is the smallest VapSR, in FP32, on crops of 32x32 pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

SMALL = {
    "data.crop": 32,
    "ds.train_batch_size": 4,
    "generator.num_blocks": 1,
    "generator.num_features": 8,
    "generator.num_attention_features": 8,
    "compile": "off",
    "channels_last": "on",
    "native_kernels": "off",
    "previews.count": 0,
    "ds.scheduler.params.warmup_num_steps": 2,
    "data.threads": 1,
}
"""Overrides of the recipe `demo`."""


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    """Return an image with edges, texture and noise: uint8, (height, width, 3)."""
    import cv2

    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        x, y, radius = (int(v) for v in random.integers(0, min(height, width), 3))
        cv2.circle(image, (x, y), radius // 4 + 2, [int(v) for v in random.integers(0, 256, 3)], -1)
    return np.clip(image + random.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def make_dataset(root: Path, files: int = 10, validation: int = 2) -> Path:
    """Write `files` training and `validation` validation crops of about 70x80 pixels, with lists.

    Returns `root`. The files are the same for every call.
    """
    (root / "photos").mkdir(parents=True)
    names = [f"photos/{number:03d}.npy" for number in range(files + validation)]
    for number, name in enumerate(names):
        np.save(root / name, photograph(number, 64 + 2 * (number % 13), 96 - 3 * (number % 13)))
    for name, part in (
        ("training_file_list.txt", names[:files]),
        ("validation_file_list.txt", names[files:]),
    ):
        (root / name).write_text("".join(f"{line}\n" for line in part))
    return root


def arguments(dataset: Path, run_dir: Path, **overrides: object) -> list[str]:
    """Return train.py's arguments for a small run. `__` stands for the dot in an override's key."""
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return [
        "--recipe=demo",
        f"--dataset-dir={dataset}",
        f"--output-dir={run_dir}",
        *(f"{key}={value}" for key, value in {**SMALL, **given}.items()),
    ]
