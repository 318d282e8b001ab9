"""Run networks on a pair of images and measure them against bicubic and nearest upscaling.

At x1 they are measured against their input, which is not upscaled.

Networks run in the tiler of `pipeline.inference`, in FP32, on at most `WHOLE_IMAGE_PIXELS` at
once. The tiles depend only on the image, so the numbers do not depend on the free memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.evaluation.image_sets import ImagePair
from pipeline.images import as_bytes, border_of, cubic_resize, depth_of, to_pixels, unit_range
from pipeline.inference.devices import CPU, Device
from pipeline.inference.tiles import Upscaler
from pipeline.inference.torch_backend import SelfEnsemble, TorchBackend
from pipeline.metrics import Measure, measure
from pipeline.metrics.psnr_ssim import levels, mean_of

WHOLE_IMAGE_PIXELS = 1024 * 1024
"""LR pixels upscaled in one piece; larger images are tiled. VapSR then peaks at about 1.5 GB."""
DRIFTS = ("drift_red", "drift_green", "drift_blue")
REFERENCES = ("bicubic", "input")
"""The baseline of every comparison: bicubic upscaling, or at x1 the input itself."""
BASELINES = ("nearest", *REFERENCES)


@dataclass(frozen=True)
class ImageScores:
    """The scores of one image by method: first baselines, then the networks by their titles."""

    name: str
    methods: dict[str, dict[str, float]]
    """For each method the metrics by name, and the drift of each colour (`DRIFTS`)."""

    @property
    def reference(self) -> str:
        """The one of `REFERENCES` that was measured."""
        return next(method for method in REFERENCES if method in self.methods)


@dataclass(frozen=True)
class Views:
    """One image as measured, for pictures: RGB 1 x 3 x H x W on the CPU, all of the same size.

    The pixels are uint8, rounded after they were measured if the image has 16 bits.
    """

    scores: ImageScores
    hr: Tensor
    pixels: dict[str, Tensor]
    """The upscaled image of each method."""


def upscaler_of(
    network: nn.Module, device: Device = CPU, *, self_ensemble: bool = False
) -> Upscaler:
    """Copy the network to `device`, ready to be measured in FP32.

    With `self_ensemble` its output is the mean over all eight rotations and reflections of the
    image, rounded once.
    """
    backend = TorchBackend(network, device, "fp32")
    return Upscaler(
        SelfEnsemble(backend) if self_ensemble else backend, most_pixels=WHOLE_IMAGE_PIXELS
    )


def upscale(upscaler: Upscaler, lr: Tensor) -> Tensor:
    """Upscale RGB 1 x 3 x H x W of any size to 1 x 3 x scale*H x scale*W on the CPU.

    The images are uint8 or uint16, and so is the result.
    """
    images = np.ascontiguousarray(lr.permute(0, 2, 3, 1).numpy())
    is_deep = images.dtype == np.uint16
    large = upscaler(images, images.dtype, is_deep=is_deep, advance=lambda _: None)
    # Stay channels last: LPIPS's last digits depend on the memory layout.
    return torch.from_numpy(large).permute(0, 3, 1, 2)


def measure_image(
    upscalers: Mapping[str, Upscaler], pair: ImagePair, scale: int, measures: Sequence[Measure]
) -> Views:
    """Measure the networks, given by title, and the scale's baselines on one pair of images.

    Raises:
        UserError: an image cannot be read, the two do not fit, or they are too small for a metric.
    """
    hr, lr = pair.load(scale)
    size = (lr.shape[-2] * scale, lr.shape[-1] * scale)
    pixels = (
        {"input": lr}
        if scale == 1
        else {
            "nearest": lr.repeat_interleave(scale, -2).repeat_interleave(scale, -1),
            "bicubic": to_pixels(cubic_resize(unit_range(lr, torch.float32), size), depth_of(lr)),
        }
    )
    pixels |= {title: upscale(upscaler, lr) for title, upscaler in upscalers.items()}
    # An LR image made from an uncropped HR image is upscaled to a few pixels more than HR has.
    height, width = hr.shape[-2:]
    border = border_of(scale)
    pixels = {title: image[..., :height, :width] for title, image in pixels.items()}
    try:
        scores = {
            title: measure(image, hr, border, measures) | _drift(image, hr, border)
            for title, image in pixels.items()
        }
    except ValueError as error:
        raise UserError(f"image {str(pair.hr)!r}: {error}") from error
    in_8_bits = {title: as_bytes(image) for title, image in pixels.items()}
    return Views(ImageScores(pair.name, scores), as_bytes(hr), in_8_bits)


def _drift(sr: Tensor, hr: Tensor, border: int) -> dict[str, float]:
    """Mean of SR - HR inside the borders for each colour, in levels of 0 to 255."""
    height, width = hr.shape[-2:]
    inner = (..., slice(border, height - border), slice(border, width - border))
    drift = [mean_of(channel) for channel in (levels(sr[inner]) - levels(hr[inner])).unbind(dim=1)]
    return dict(zip(DRIFTS, drift, strict=True))
