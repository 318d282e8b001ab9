"""How much a quantised network loses: PSNR-Y against HR photographs, beside that of the FP32 network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from tqdm import tqdm

from pipeline.cli import RunError, bar_options
from pipeline.export.onnx_file import Form
from pipeline.export.parity import Runtime
from pipeline.export.photographs import Photograph
from pipeline.export.quantization import as_bytes, as_input
from pipeline.images import crop_to_multiple, cubic_resize, to_bytes, unit_range
from pipeline.metrics.psnr_ssim import luma, psnr
from pipeline.models.common import told

SIDE = 1024
"""Of a photograph at most; of a larger one the middle is measured."""
SMALLEST = 64
"""Height and width of a photograph, at least."""


@dataclass(frozen=True)
class Score:
    """One photograph."""

    name: str
    fp32: float
    """PSNR-Y in dB of the FP32 network against HR."""
    int8: float
    agreement: float
    """PSNR in dB, over RGB, of the INT8 network's image against the FP32 network's."""

    @property
    def drop(self) -> float:
        """PSNR-Y lost, in dB; below 0 where INT8 is nearer to HR."""
        return 0.0 if self.fp32 == self.int8 else self.fp32 - self.int8


def measure(fp32: Runtime, int8: Runtime, photos: Sequence[Photograph], scale: int, form: Form) -> list[Score]:
    """Both networks on the exact cubic LR of every photograph.

    PSNR-Y as in the papers (`psnr_ssim`): uint8 Y, `scale` pixels of border cut. `RunError` where a network fails.
    """
    scores = []
    for photo in tqdm(photos, desc="measuring the drop", unit="image", dynamic_ncols=True, **bar_options()):
        hr = crop_to_multiple(_middle(photo.pixels), scale)
        size = (hr.shape[-2] // scale, hr.shape[-1] // scale)
        lr = as_input(to_bytes(cubic_resize(unit_range(hr, torch.float32), size)), form)
        try:
            expected, found = as_bytes(fp32(lr), form), as_bytes(int8(lr), form)
        except Exception as error:  # each runtime has its own
            raise RunError(f"the network cannot be run on {photo.name!r} ({told(error)})") from error
        hr_y, expected_y, found_y = (luma(images, rounded=True)[..., scale:-scale, scale:-scale]
                                     for images in (hr, expected, found))
        scores.append(Score(photo.name, psnr(expected_y, hr_y), psnr(found_y, hr_y), psnr(found, expected)))
    return scores


def mean_drop(scores: Sequence[Score]) -> float:
    """In dB."""
    return fmean(score.drop for score in scores)


def table(title: str, scores: Sequence[Score]) -> str:
    """A line for each photograph and one for the mean."""
    mean = [fmean(values) for values in zip(*((score.fp32, score.int8, score.drop, score.agreement)
                                              for score in scores), strict=True)]
    rows = [(score.name, (score.fp32, score.int8, score.drop, score.agreement)) for score in scores]
    width = max(14, *(len(name) for name, _ in rows))
    head = f"{title}, PSNR-Y against HR in dB: FP32, INT8, drop; PSNR of INT8's images against FP32's"
    return "\n".join([head, *(f"  {name:<{width}}{values[0]:8.3f}{values[1]:8.3f}{values[2]:+8.3f}{values[3]:7.1f}"
                              for name, values in (*rows, ("mean", mean)))])


def _middle(images: torch.Tensor) -> torch.Tensor:
    top, left = (max(0, (side - SIDE) // 2) for side in images.shape[-2:])
    return images[..., top : top + SIDE, left : left + SIDE]
