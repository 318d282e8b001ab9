"""Run networks over a pair of images and measure them against bicubic and nearest.

Networks run by the tiler of `pipeline.inference`, in FP32, and shown no more than
`WHOLE_IMAGE_PIXELS` at once: tiles depend on the image alone, so the numbers do not change with the
memory that happens to be free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.evaluation.image_sets import ImagePair
from pipeline.images import cubic_resize, to_bytes, unit_range
from pipeline.inference.devices import CPU, Device
from pipeline.inference.tiles import Upscaler
from pipeline.inference.torch_backend import SelfEnsemble, TorchBackend
from pipeline.metrics import Measure, measure
from pipeline.metrics.psnr_ssim import mean_of

WHOLE_IMAGE_PIXELS = 1024 * 1024
"""LR pixels that are upscaled in one piece; larger images go in tiles. VapSR then peaks at about
1.5 GB."""
DRIFTS = ("drift_red", "drift_green", "drift_blue")
BASELINES = ("nearest", "bicubic")


@dataclass(frozen=True)
class ImageScores:
    """What was measured on one image, by method: `BASELINES`, then the networks by their titles."""

    name: str
    methods: dict[str, dict[str, float]]
    """Each with the metrics, by name, and the drift of each colour (`DRIFTS`)."""


@dataclass(frozen=True)
class Views:
    """One image as measured: uint8 RGB 1 x 3 x H x W on the CPU, all of one size, by method."""

    scores: ImageScores
    hr: Tensor
    pixels: dict[str, Tensor]


def upscaler_of(
    network: nn.Module, device: Device = CPU, *, self_ensemble: bool = False
) -> Upscaler:
    """A copy of the network on `device`, ready to be measured in FP32.

    With `self_ensemble` its output is the mean over the image turned and mirrored in all eight
    ways, rounded once.
    """
    backend = TorchBackend(network, device, "fp32")
    return Upscaler(
        SelfEnsemble(backend) if self_ensemble else backend, most_pixels=WHOLE_IMAGE_PIXELS
    )


def upscale(upscaler: Upscaler, lr: Tensor) -> Tensor:
    """uint8 RGB 1 x 3 x H x W -> uint8 RGB 1 x 3 x scale*H x scale*W on the CPU, whatever the
    size."""
    images = np.ascontiguousarray(lr.permute(0, 2, 3, 1).numpy())
    large = upscaler(images, np.dtype(np.uint8), is_deep=False, advance=lambda _: None)
    return torch.from_numpy(large).permute(
        0, 3, 1, 2
    )  # channels last: LPIPS's last digits depend on the layout


def measure_image(
    upscalers: Mapping[str, Upscaler], pair: ImagePair, scale: int, measures: Sequence[Measure]
) -> Views:
    """Measure networks, by their titles, and `BASELINES` on one pair. `UserError` for images that
    do not fit."""
    hr, lr = pair.load(scale)
    size = (lr.shape[-2] * scale, lr.shape[-1] * scale)
    pixels = {
        "nearest": lr.repeat_interleave(scale, -2).repeat_interleave(scale, -1),
        "bicubic": to_bytes(cubic_resize(unit_range(lr, torch.float32), size)),
    }
    pixels |= {title: upscale(upscaler, lr) for title, upscaler in upscalers.items()}
    height, width = hr.shape[-2:]  # an LR image of a whole HR one may give some pixels more
    pixels = {title: image[..., :height, :width] for title, image in pixels.items()}
    try:
        scores = {
            title: measure(image, hr, scale, measures) | _drift(image, hr, scale)
            for title, image in pixels.items()
        }
    except ValueError as error:
        raise UserError(f"image {str(pair.hr)!r}: {error}") from error
    return Views(ImageScores(pair.name, scores), hr, pixels)


def _drift(sr: Tensor, hr: Tensor, border: int) -> dict[str, float]:
    """How much lighter SR is than HR in each colour, in levels, within the borders."""
    inner = (..., slice(border, -border), slice(border, -border))
    drift = [
        mean_of(channel) for channel in (sr[inner].double() - hr[inner].double()).unbind(dim=1)
    ]
    return dict(zip(DRIFTS, drift, strict=True))
