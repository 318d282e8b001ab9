"""Compare a converted network with PyTorch, on photographs in several sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.cli import RunError, UserError, counted, one_line
from pipeline.data.image_headers import IMAGE_SUFFIXES
from pipeline.data.image_pixels import read_rgb
from pipeline.export.onnx_file import Form, with_form
from pipeline.export.photographs import SHIPPED, SIZES, paths_within_packages
from pipeline.images import to_tensor, unit_range

# The photographs on which a converted network is compared, calibrated and measured.


@dataclass(frozen=True)
class Photograph:
    """An image and its name for messages."""

    name: str
    pixels: Tensor
    """uint8 RGB 1 x 3 x H x W."""


def read_photographs(
    folder: Path | None, option: str, most: int, shipped: Sequence[str]
) -> list[Photograph]:
    """Read the images in `folder`, at most `most`, evenly spaced over the sorted list.

    Args:
        folder: the folder; `None` for `shipped`.
        option: the folder's option, for messages.
        most: maximum number of images.
        shipped: photographs inside installed packages.

    Raises:
        UserError: the folder does not exist or contains no images.
    """
    if folder is None:
        return [
            Photograph(path.name, to_tensor(read_rgb(path)))
            for path in paths_within_packages(shipped, option)
        ]
    if not folder.is_dir():
        raise UserError(f"the folder {str(folder)!r} of {option} does not exist")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(
            f"no images in the folder {str(folder)!r} of {option}; supported: "
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
    """The agreement that a converted network must reach on every batch."""

    psnr: float
    """Minimum PSNR against PyTorch's FP32 output, in dB."""
    levels: int | None = None
    """Maximum difference in 8-bit levels, for uint8 images only. One level is due to rounding: a
    value between two levels may become either."""


LIMITS = {
    ("float", False): Limit(90),
    ("float", True): Limit(60),
    ("uint8", False): Limit(60, levels=1),
    ("uint8", True): Limit(50, levels=2),
}
"""By the type of the images, and whether weights or arithmetic are FP16."""


@dataclass(frozen=True)
class Check:
    """A batch, and PyTorch's FP32 result for it."""

    images: np.ndarray
    expected: np.ndarray
    size: tuple[int, int, int]
    """Batch, height, width."""


def photographs(folder: Path | None) -> list[Tensor]:
    """Read the photographs to compare on, uint8 1 x 3 x H x W; see `read_photographs`."""
    return [
        photo.pixels for photo in read_photographs(folder, "--images", MOST_PHOTOGRAPHS, SHIPPED)
    ]


def checks(network: nn.Module, form: Form, photos: list[Tensor]) -> list[Check]:
    """Return batches of the photographs' middles with PyTorch's results.

    They have the form's size, or else the `SIZES` in turn. Every size and every photograph occurs
    at least once.
    """
    reference = with_form(network.eval(), form)
    sizes = SIZES if form.size is None else (form.size,)
    endless, found, taken = itertools.cycle(photos), [], 0
    for size in itertools.cycle(sizes):
        if taken >= len(photos) and len(found) >= len(sizes):
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
    raise AssertionError("itertools.cycle never ends")


def compare(title: str, run: RunBatch, batches: list[Check], limit: Limit) -> str:
    """Run all batches and return a table of their agreement with PyTorch.

    Raises:
        RunError: a batch cannot be run, or exceeds `limit`; the message names the first such batch.
    """
    rows, failed = (
        [f"{title} against PyTorch: batch, LR width x height, PSNR, largest difference"],
        "",
    )
    for check in batches:
        batch, height, width = check.size
        name = f"{batch} x {width}x{height}"
        try:
            found = run(check.images)
        except Exception as error:  # each backend has its own exceptions
            raise RunError(
                f"{title} cannot run the network on {name} ({one_line(error)})"
            ) from error
        if found.shape != check.expected.shape:
            raise RunError(
                f"{title} turns {name} into {found.shape}, but PyTorch into {check.expected.shape}"
            )
        psnr, largest, is_good = _measure(found, check.expected, limit)
        shown = (
            f"{psnr:6.1f} dB  {largest:.1e}"
            if limit.levels is None
            else f"{psnr:6.1f} dB  {largest:.0f} of 255 levels"
        )
        rows.append(f"  {name:<14}{shown}")
        if not is_good and not failed:
            failed = (
                f"{title} differs from PyTorch on {name}: {shown.strip()}; {_requirement(limit)}"
            )
    if failed:
        raise RunError(failed)
    return "\n".join(rows)


def _measure(found: np.ndarray, expected: np.ndarray, limit: Limit) -> tuple[float, float, bool]:
    """Return PSNR in dB, the largest difference, and whether both are within `limit`."""
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


def _requirement(limit: Limit) -> str:
    required = f"required: {limit.psnr:.0f} dB"
    if limit.levels is None:
        return required
    return f"{required} and a difference of at most {counted(limit.levels, 'level')}"


def middle(image: Tensor, height: int, width: int) -> Tensor:
    """Return the middle of an image in this size; small images are reflected repeatedly."""
    rows, columns = (
        _places(have, want) for have, want in zip(image.shape[-2:], (height, width), strict=True)
    )
    return image[:, :, rows][..., columns]


def _places(have: int, want: int) -> Tensor:
    places = torch.arange(want) + max(0, (have - want) // 2)
    around = places % (2 * have)
    return torch.minimum(around, 2 * have - 1 - around)
