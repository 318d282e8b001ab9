"""Compare the device's batches with the CPU's, sample by sample; then measure the loader's rate."""

from __future__ import annotations

import importlib.metadata
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.selfcheck.report import Report, SkippedError, seconds_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CROP, SCALE, MICRO_BATCH = 96, 2, 8
CHAIN = {
    "name": "chain",
    "steps": [
        "blur",
        {"noise": {"kind": ["gaussian", "poisson"], "probability": 0.5}},
        {"one_of": ["sharpen", "color", "none"]},
        {"resize": {"to": "lr"}},
    ],
}
"""A chain that a GPU makes alone; with another step, the host finishes it."""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "npy": ("npy", {}),
    "png": ("png", {}),
    "jpeg": ("jpg", {}),
    "brightness": ("npy", {"brightness": {"probability": 0.5}}),
    "noise": ("npy", {"lr_noise": {"probability": 1.0}}),
    "gaussian": ("npy", {"degradation": "gaussian"}),
    "realesrgan": ("npy", {"degradation": "realesrgan"}),
    "chain": ("npy", {"degradation": CHAIN}),
    "chain_split": ("npy", {"degradation": {**CHAIN, "steps": [*CHAIN["steps"], "chroma"]}}),
}
"""Name -> the kind of files, and further keys of the recipe's data section."""
LEAST_PSNR = {"realesrgan": 35.0, "chain": 45.0, "chain_split": 45.0, "jpeg": 45.0}
"""Minimum PSNR in dB between a GPU's images and the CPU's: of LR, after Real-ESRGAN's degradations
(which include three JPEG passes) or after a chain, which the CPU's host makes; and of decoded JPEG
files."""
AHEAD = 6
SPEEDS = {
    "npy": "this loader, npy",
    "npy_torch": "this loader, npy, as torch tensors",
    "png": "this loader, PNG",
    "npy_realesrgan": "this loader, npy, realesrgan",
    "npy_chain": "this loader, npy, a chain of four steps",
    "npy_gaussian": "this loader, npy, gaussian",
    "npy_noise": "this loader, npy, noise on LR",
    "png_cached": "this loader, PNG, from its cache",
    "npy_paired": "this loader, npy, paired LR",
    "npy_brightness": "this loader, npy, brightness of 20 %",
}
"""Id -> name of the loader variant in benchmarks/loader.py."""
COMMAND = "python benchmarks/loader.py PHOTOS --gpu"


def run(report: Report) -> None:
    """Check the contents of batches, then measure the rates."""
    if not any(
        (one.metadata["Name"] or "").lower().startswith("nvidia-dali-cuda")
        for one in importlib.metadata.distributions()
    ):
        raise SkippedError("DALI is not installed")
    files = _files(report.scratch / "files")
    for name in KINDS:
        with report.guarded(f"same.{name}"):
            _compare(report, files, name)
    for name in ("npy", "jpeg", "realesrgan", "chain", "chain_split"):
        with report.guarded(f"batches.{name}"):
            small, large = (
                _batches(report.device, files, name, size, count)
                for size, count in ((4, 2), (8, 1))
            )
            same = all(_equal(one, other) for one, other in zip(small, large, strict=True))
            report.fact(
                f"batches.{name}",
                same,
                note="the same eight samples in batches of 4 and of 8, byte for byte",
            )
    with report.guarded("aliasing"):
        _aliasing(report, files)
    with report.guarded("overlap"):
        _overlap(report, files)
    _speeds(report)


def _files(folder: Path) -> dict[str, list[str]]:
    """Write twelve images with edges, texture and noise as .npy, .png and .jpg (4:2:0, quality
    95); return the paths by suffix."""
    import cv2
    import numpy as np

    random = np.random.default_rng(0)
    found: dict[str, list[str]] = {"npy": [], "png": [], "jpg": []}
    folder.mkdir()
    for number in range(12):
        image = random.integers(0, 256, (12, 12, 3)).astype(np.uint8)
        image = cv2.resize(image, (256, 256), interpolation=cv2.INTER_CUBIC)
        for _ in range(20):
            x, y, radius = (int(value) for value in random.integers(0, 256, 3))
            cv2.circle(
                image,
                (x, y),
                radius // 8 + 2,
                [int(value) for value in random.integers(0, 256, 3)],
                -1,
            )
        image = np.clip(image + random.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
        np.save(folder / f"{number:02d}.npy", np.ascontiguousarray(image[..., ::-1]))
        cv2.imwrite(str(folder / f"{number:02d}.png"), image)
        cv2.imwrite(str(folder / f"{number:02d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
        for suffix, names in found.items():
            names.append(str(folder / f"{number:02d}.{suffix}"))
    return found


def _loader(device: torch.device, files: dict[str, list[str]], name: str, micro_batch: int) -> Any:
    from pipeline.data.loader import Loader
    from pipeline.data.sampling import Sampler
    from pipeline.data.source import CropSource, Position
    from pipeline.data.spec import DataSpec

    suffix, more = KINDS[name]
    source = CropSource(
        files[suffix],
        Sampler([len(files[suffix])], seed=0),
        DataSpec(crop=CROP, **more),
        scale=SCALE,
        position=Position(0, 1, micro_batch),
        degrades_on_host=name.startswith("chain") and device.type == "cpu",
    )
    return Loader(source, 0, device, threads=2, prefetch=2)


def _batches(
    device: torch.device, files: dict[str, list[str]], name: str, micro_batch: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return HR and LR of the first `count` micro-batches, copied to the CPU."""
    import torch

    loader = _loader(device, files, name, micro_batch)
    try:
        made = [next(loader) for _ in range(count)]
        return torch.cat([one.hr for one in made]).cpu(), torch.cat([one.lr for one in made]).cpu()
    finally:
        loader.close()


def _equal(one: Tensor, other: Tensor) -> bool:
    import torch

    return torch.equal(one, other)


def _compare(report: Report, files: dict[str, list[str]], name: str) -> None:
    """Compare the same samples made on the device and on the CPU."""
    import torch

    (hr, lr), (wanted_hr, wanted_lr) = (
        _batches(device, files, name, MICRO_BATCH, 2)
        for device in (report.device, torch.device("cpu"))
    )
    if name == "jpeg":
        report.at_least(
            "same.jpeg",
            _psnr(hr, wanted_hr),
            LEAST_PSNR[name],
            "dB",
            note="HR of JPEG files against the CPU's",
        )
        report.number(
            "same.jpeg_most", _most(hr, wanted_hr), "levels", note="largest difference of HR"
        )
        return
    most_hr = _most(hr, wanted_hr)
    if name in LEAST_PSNR:
        report.at_least(
            f"same.{name}",
            _psnr(lr, wanted_lr) if most_hr == 0 else -math.inf,
            LEAST_PSNR[name],
            "dB",
            note="LR against the CPU's, HR equal",
        )
        return
    report.at_most(
        f"same.{name}",
        max(_most(lr, wanted_lr), 256 * most_hr if name != "brightness" else most_hr),
        1,
        "levels",
        note="LR against the CPU's, HR equal" if name != "brightness" else "HR and LR",
    )


def _most(one: Tensor, other: Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


def _psnr(one: Tensor, other: Tensor) -> float:
    error = float((one.double() - other.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _aliasing(report: Report, files: dict[str, list[str]]) -> None:
    """Check that a batch keeps its contents while more are made: DALI must not reuse its memory."""
    loader = _loader(report.device, files, "npy", MICRO_BATCH)
    try:
        kept = [next(loader) for _ in range(2)]
        before = [(int(one.hr.long().sum()), int(one.lr.long().sum())) for one in kept]
        for _ in range(AHEAD):
            next(loader)
        after = [(int(one.hr.long().sum()), int(one.lr.long().sum())) for one in kept]
    finally:
        loader.close()
    report.fact(
        "aliasing", before == after, note=f"batches keep their bytes while {AHEAD} more are made"
    )


def _overlap(report: Report, files: dict[str, list[str]]) -> None:
    """Measure how much longer a step takes while the GPU also makes the most expensive batches."""
    if not report.is_on_gpu:
        report.skip("overlap", "no GPU: the cores do both")
        return
    alone, beside = step_seconds(report.device, files, micro_batch=32, side=48)
    report.number(
        "overlap",
        beside / alone,
        "",
        note=f"a step of {1000 * alone:.1f} ms while Real-ESRGAN batches are made, relative to the "
        "step alone",
    )


def step_seconds(
    device: torch.device, files: dict[str, list[str]], *, micro_batch: int, side: int
) -> tuple[float, float]:
    """Return the seconds of RRDBNet's forward and backward pass: alone, and with a batch taken from
    the loader for each."""
    import torch

    from pipeline.models import build_generator

    network = build_generator("rrdbnet", SCALE, num_blocks=2).to(device)
    images = torch.rand(micro_batch, 3, side, side, device=device)

    def step() -> None:
        network(images).mean().backward()

    alone = seconds_of(step, device)
    loader = _loader(device, files, "realesrgan", micro_batch)
    try:

        def both() -> None:
            next(loader)
            step()

        return alone, seconds_of(both, device, least=0.6)
    finally:
        loader.close()


def _speeds(report: Report) -> None:
    """Measure images per second and CPU time per image of each variant, in its own process."""
    from benchmarks.loader import _in_child, cut_photographs, measure
    from benchmarks.loader_ways import OUR_WAYS, Setting
    from tools.make_demo_dataset import make_demo_dataset

    photographs = make_demo_dataset(report.scratch / "demo").dataset_dir.parent / "photographs"
    crop, size = (64, 128) if report.is_small else (256, 512)
    setting = Setting(
        report.scratch / "cut",
        crop,
        2,
        4 if report.is_small else 32,
        max(2, _threads()),
        0 if report.is_on_gpu else None,
    )
    setting.folder.mkdir()
    cut_photographs([photographs], setting, size, 16)
    for name, way in SPEEDS.items():
        if report.is_small and name not in ("npy", "npy_torch"):
            report.skip(name, "not part of the small check")
        elif report.left < 6:
            report.skip(name, "out of time for this section")
        else:
            with report.guarded(name):
                cost = _in_child(measure, OUR_WAYS[way], setting, 0.3 if report.is_small else 2.0)
                report.number(
                    name,
                    cost.wall_rate,
                    "images/s",
                    command=COMMAND,
                    note=f"{1e6 / cost.core_rate:.0f} us of CPU time per image",
                )


def _threads() -> int:
    return min(8, len(os.sched_getaffinity(0)) // 2)
