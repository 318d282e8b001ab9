"""The contextual loss: compares the features of SR and HR as sets, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.losses.perceptual import VggLoss
from pipeline.spec import is_number

EPSILON = 1e-5
MAX_DISTANCES = 1 << 24
"""Distances of a batch that are computed at a time: 64 MB in float32, a few times over."""


class Contextual(VggLoss):
    """-log of the contextual similarity of VGG19 features, averaged over the images.

    Mechrez, Talmi and Zelnik-Manor, "The Contextual Loss for Image Transformation with Non-Aligned
    Data", ECCV 2018; for super-resolution, "Maintaining Natural Image Statistics with the
    Contextual Loss", ACCV 2018. Each position of the feature map is a point; SR is similar to HR if
    each point of HR is the clear nearest neighbour of some point of SR. Where the points are does
    not matter, so HR and SR need not be aligned, and SR is not blurred where details are uncertain.
    Use it beside a loss between pixels.

    All pairs of points are compared: time grows with the fourth power of the crop's side. Memory
    does not, because the pairs are processed in parts, and recomputed for the gradient.

    Args:
        layers: name ("conv1_1" to "conv5_4") -> weight above 0, by default {"conv3_4": 1}; layers
            before the third block have too many points for large crops.
        bandwidth: h of the paper, above 0. The smaller it is, the more only nearest neighbours
            count; the paper uses 0.5, its authors' super-resolution 0.1.
        before_activation, weights, precision: see `VggLoss`.

    Raises:
        ValueError, UserError: see `VggLoss`; `bandwidth` is not above 0 and finite.
    """

    name = "contextual"

    def __init__(
        self,
        layers: Mapping[str, float] | None = None,
        bandwidth: float = 0.5,
        before_activation: bool = False,
        weights: str | None = None,
        precision: str = "auto",
    ) -> None:
        if not is_number(bandwidth) or bandwidth <= 0:
            raise ValueError(f"bandwidth {bandwidth!r} is not a number above 0")
        layers = {"conv3_4": 1.0} if layers is None else layers
        super().__init__(layers, before_activation, weights, precision)
        self.bandwidth = float(bandwidth)

    def distance(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return the contextual loss of two feature maps."""
        return -contextual_similarity(sr, hr, self.bandwidth).log().mean()


def contextual_similarity(
    sr: Tensor, hr: Tensor, bandwidth: float, max_distances: int = MAX_DISTANCES
) -> Tensor:
    """Return CX of the paper, in (0, 1], for each of N pairs of NCHW feature maps.

    At most `max_distances` distances are in memory at a time; the value does not depend on it.
    """
    centre = hr.mean(dim=(2, 3), keepdim=True)
    sr, hr = (F.normalize((features - centre).flatten(2), dim=1) for features in (sr, hr))
    images, _, points = hr.shape
    rows = max(1, max_distances // (images * points))
    if rows >= points:
        return _best_affinities(sr, hr, bandwidth).mean(dim=1)
    parts = [
        checkpoint(
            _best_affinities, part, hr, bandwidth, use_reentrant=False, preserve_rng_state=False
        )
        for part in sr.split(rows, dim=2)
    ]
    return torch.stack(parts).amax(dim=0).mean(dim=1)


def _best_affinities(sr: Tensor, hr: Tensor, bandwidth: float) -> Tensor:
    """Return max over the points of `sr` of their affinity to each point of `hr`: (N, points).

    Both are unit vectors: (N, channels, points).
    """
    distances = (1 - sr.transpose(1, 2) @ hr).clamp(min=0)
    relative = distances / (distances.amin(dim=2, keepdim=True) + EPSILON)
    # exp((1 - relative) / h), divided by its sum over HR's points.
    return torch.softmax(-relative / bandwidth, dim=2).amax(dim=1)
