"""Run a network over pairs of images and measure it against bicubic."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.cli import UserError
from pipeline.evaluation.pairs import Pair
from pipeline.images import cubic_resize, to_bytes, unit_range
from pipeline.metrics.lpips import LpipsMetric
from pipeline.metrics.psnr_ssim import measure

# LR pixels that are upscaled in one piece; larger images go in tiles. VapSR then peaks at about 1.5 GB.
WHOLE_IMAGE_PIXELS = 1024 * 1024
DRIFTS = ("drift_red", "drift_green", "drift_blue")


@dataclass(frozen=True)
class ImageScore:
    """What was measured on one image, for the network and for bicubic: `METRICS`, the drift of each colour, LPIPS."""

    name: str
    model: dict[str, float]
    bicubic: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """The scores of all images, and their means."""

    scale: int
    images: list[ImageScore]

    @property
    def model(self) -> dict[str, float]:
        """The network's mean of every metric."""
        return _means([image.model for image in self.images])

    @property
    def bicubic(self) -> dict[str, float]:
        """Bicubic's mean of every metric."""
        return _means([image.bicubic for image in self.images])

    @property
    def gain(self) -> float:
        """The network's mean PSNR-Y less bicubic's, in dB."""
        return self.model["psnr_y"] - self.bicubic["psnr_y"]


def _means(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    return {metric: sum(score[metric] for score in scores) / len(scores) for metric in scores[0]}


@dataclass(frozen=True)
class Compared:
    """One image as measured: uint8 RGB 1 x 3 x H x W on the CPU, all of one size."""

    score: ImageScore
    hr: Tensor
    bicubic: Tensor
    sr: Tensor


def evaluate(network: nn.Module, pairs: Sequence[Pair], scale: int, device: torch.device | str,
             lpips: LpipsMetric | None = None, visit: Callable[[Compared], None] | None = None) -> Evaluation:
    """Measure `network` (already on `device`) and bicubic on `pairs`, in the network's own precision.

    `visit` is shown every image once it is measured, while its pixels are in memory. The network comes back in the
    mode (training or not) that it came in. `UserError` for images that do not fit.
    """
    if not pairs:
        raise UserError("no images to evaluate on")
    was_training = network.training
    network.eval()
    interval = 0.1 if sys.stderr.isatty() else 10  # a log file needs no redrawing
    images = []
    try:
        for pair in tqdm(pairs, desc="evaluating", unit="image", delay=2, mininterval=interval, disable=None):
            compared = _compare(network, pair, scale, torch.device(device), lpips)
            images.append(compared.score)
            if visit is not None:
                visit(compared)
    finally:
        network.train(was_training)
    return Evaluation(scale=scale, images=images)


@torch.inference_mode()
def upscale(network: nn.Module, lr: Tensor, scale: int, device: torch.device | str) -> Tensor:
    """uint8 RGB 1 x 3 x H x W -> uint8 RGB 1 x 3 x scale*H x scale*W on the CPU, whatever the size.

    Above `WHOLE_IMAGE_PIXELS` in tiles that see as much of their surroundings as the network ever looks at, so that
    the result is the same as in one piece.
    """
    height, width = lr.shape[-2:]
    if height * width <= WHOLE_IMAGE_PIXELS:
        return _upscale_piece(network, lr, device)
    halo = network.receptive_radius
    tile = max(halo, int(WHOLE_IMAGE_PIXELS**0.5) - 2 * halo)
    sr = torch.empty((1, 3, height * scale, width * scale), dtype=torch.uint8)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            first_row, first_column = max(0, top - halo), max(0, left - halo)
            piece = _upscale_piece(network, lr[..., first_row : bottom + halo, first_column : right + halo], device)
            sr[..., top * scale : bottom * scale, left * scale : right * scale] = piece[
                ..., (top - first_row) * scale : (bottom - first_row) * scale,
                (left - first_column) * scale : (right - first_column) * scale]
    return sr


def _upscale_piece(network: nn.Module, lr: Tensor, device: torch.device | str) -> Tensor:
    # TF32 would cost the digits that papers report; benchmark mode searches anew for every image size.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        return to_bytes(network(lr.to(device).contiguous(memory_format=torch.channels_last))).cpu()


def _compare(network: nn.Module, pair: Pair, scale: int, device: torch.device, lpips: LpipsMetric | None) -> Compared:
    hr, lr = pair.load(scale)
    bicubic = to_bytes(cubic_resize(unit_range(lr, torch.float32), tuple(hr.shape[-2:])))
    sr = upscale(network, lr, scale, device)
    try:
        score = ImageScore(pair.name, *({**measure(image, hr, scale), **_colours(image, hr, scale, lpips)}
                                        for image in (sr, bicubic)))
    except ValueError as error:
        raise UserError(f"image {str(pair.hr)!r}: {error}") from error
    return Compared(score, hr=hr, bicubic=bicubic, sr=sr)


def _colours(sr: Tensor, hr: Tensor, border: int, lpips: LpipsMetric | None) -> dict[str, float]:
    """How much lighter SR is than HR in each colour, in levels, and LPIPS, within the borders."""
    inner = (..., slice(border, -border), slice(border, -border))
    drift = (sr[inner].double() - hr[inner].double()).mean(dim=(0, 2, 3)).tolist()
    scores = dict(zip(DRIFTS, drift, strict=True))
    return scores if lpips is None else {**scores, "lpips": lpips(sr[inner], hr[inner])[0]}
