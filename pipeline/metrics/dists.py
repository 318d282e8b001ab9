"""DISTS as a metric: distance of structure and texture; 0 is equal, lower is better."""

from __future__ import annotations

import torch

from pipeline.losses.dists import DistsDistance
from pipeline.metrics.lpips import PerceptualMetric


class DistsMetric(PerceptualMetric):
    """DISTS on RGB, at the images' own size.

    `network` is "vgg" (VGG16), the only one that DISTS is defined for. The other arguments and the
    errors are those of `DistsDistance`.
    """

    def __init__(
        self, network: str = "vgg", weights: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if network != "vgg":
            raise ValueError(f"network {network!r} is not 'vgg'")
        super().__init__("DISTS", DistsDistance(weights), device)
