"""Whether another backend makes the images that PyTorch makes: measured on photographs, at several
sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.cli import RunError, UserError, one_line
from pipeline.data.image_headers import IMAGE_SUFFIXES
from pipeline.data.image_pixels import read_rgb
from pipeline.export.onnx_file import Form, with_form
from pipeline.export.photographs import SHIPPED, SIZES, paths_within_packages
from pipeline.images import to_tensor, unit_range

# The photographs that a converted network is compared, calibrated and measured on.


@dataclass(frozen=True)
class Photograph:
    """An image and its name for people."""

    name: str
    pixels: Tensor
    """uint8 RGB 1 x 3 x H x W."""


def read_photographs(
    folder: Path | None, option: str, most: int, shipped: Sequence[str]
) -> list[Photograph]:
    """Every image in `folder`, or an even spread of `most` of them; `None`: `shipped`, files within
    packages.

    `UserError`, which names `option`, for a folder that is missing or holds no images.
    """
    if folder is None:
        return [
            Photograph(path.name, to_tensor(read_rgb(path)))
            for path in paths_within_packages(shipped, option)
        ]
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r} of {option}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(
            f"no images in {str(folder)!r} of {option}; their names end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    count = min(len(paths), most)
    chosen = [paths[number * len(paths) // count] for number in range(count)]
    return [Photograph(str(path.relative_to(folder)), to_tensor(read_rgb(path))) for path in chosen]


# The comparison.

RunBatch = Callable[[np.ndarray], np.ndarray]
"""Runs a converted network on one batch."""

MOST_PHOTOGRAPHS = 32


@dataclass(frozen=True)
class Limit:
    """What a converted network must reach on every batch."""

    psnr: float
    """dB against PyTorch's FP32 output, at least."""
    levels: int | None = None
    """Of 255, at most; only of bytes. One is rounding: a value between two levels may become
    either."""


LIMITS = {
    ("float", False): Limit(90),
    ("float", True): Limit(60),
    ("uint8", False): Limit(60, levels=1),
    ("uint8", True): Limit(50, levels=2),
}
"""By what goes in and out, and whether weights or arithmetic are FP16."""


@dataclass(frozen=True)
class Check:
    """A batch, and what PyTorch makes of it in FP32."""

    images: np.ndarray
    expected: np.ndarray
    size: tuple[int, int, int]
    """Batch, height, width."""


def photographs(folder: Path | None) -> list[Tensor]:
    """uint8 1 x 3 x H x W: every image in `folder`, or an even spread of `MOST_PHOTOGRAPHS`;
    `None`: `SHIPPED`."""
    return [
        photo.pixels for photo in read_photographs(folder, "--images", MOST_PHOTOGRAPHS, SHIPPED)
    ]


def checks(network: nn.Module, form: Form, photos: list[Tensor]) -> list[Check]:
    """Batches of the middles of photographs, sized as `SIZES` says in turn, until every photograph
    was in one."""
    reference = with_form(network.eval(), form)
    endless, found, taken = itertools.cycle(photos), [], 0
    for size in itertools.cycle(SIZES):
        if taken >= len(photos) and len(found) >= len(SIZES):
            return found
        images = torch.cat([middle(next(endless), *size[1:]) for _ in range(size[0])])
        taken += size[0]
        if form.layout == "nhwc":
            images = images.permute(0, 2, 3, 1).contiguous()
        with torch.inference_mode():
            if form.io == "float":
                images = unit_range(images, torch.float32)
            expected = reference(images)
        found.append(Check(images.to(form.dtype).numpy(), expected.numpy(), size))
    raise AssertionError("a cycle has no end")


def compare(title: str, run: RunBatch, batches: list[Check], limit: Limit) -> str:
    """A table of how near `run` comes to what is expected; `RunError` that names the first batch
    beyond `limit`."""
    rows, failed = (
        [f"{title} against PyTorch: batch, LR width x height, PSNR, largest difference"],
        "",
    )
    for check in batches:
        batch, height, width = check.size
        name = f"{batch} x {width}x{height}"
        try:
            found = run(check.images)
        except Exception as error:  # each backend has its own
            raise RunError(
                f"{title} cannot run the network on {name} ({one_line(error)})"
            ) from error
        if found.shape != check.expected.shape:
            raise RunError(
                f"{title} turns {name} into {found.shape}, and PyTorch into {check.expected.shape}"
            )
        psnr, largest, is_good = _measure(found, check.expected, limit)
        shown = (
            f"{psnr:6.1f} dB  {largest:.1e}"
            if limit.levels is None
            else f"{psnr:6.1f} dB  {largest:.0f} of 255"
        )
        rows.append(f"  {name:<14}{shown}")
        if not is_good and not failed:
            failed = f"{title} differs from PyTorch on {name}: {shown.strip()}; {_asked(limit)}"
    if failed:
        raise RunError(failed)
    return "\n".join(rows)


def _measure(found: np.ndarray, expected: np.ndarray, limit: Limit) -> tuple[float, float, bool]:
    """PSNR in dB, largest difference, and whether both are within `limit`."""
    peak = 1.0 if limit.levels is None else 255.0
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    largest, error = float(difference.max()), float(np.square(difference).mean())
    psnr = (
        math.inf
        if error == 0
        else 10 * math.log10(peak**2 / error)
        if math.isfinite(error)
        else -math.inf
    )
    return psnr, largest, psnr >= limit.psnr and (limit.levels is None or largest <= limit.levels)


def _asked(limit: Limit) -> str:
    levels = "" if limit.levels is None else f" and at most {limit.levels} of 255"
    return f"{limit.psnr:.0f} dB{levels} are asked for"


def middle(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of an image in that size; what is too small is continued, mirrored again and
    again."""
    rows, columns = (
        _places(have, want) for have, want in zip(image.shape[-2:], (height, width), strict=True)
    )
    return image[:, :, rows][..., columns]


def _places(have: int, want: int) -> Tensor:
    places = torch.arange(want) + max(0, (have - want) // 2)
    around = places % (2 * have)
    return torch.minimum(around, 2 * have - 1 - around)
