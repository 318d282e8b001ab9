"""Patch-wise perceptual loss: compares the direction of patches of VGG19 features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses.perceptual import VggLoss

EPSILON = 1e-8


class VggPatch(VggLoss):
    """Mean cosine distance between all patches of VGG19 features of SR and HR.

    After the patch loss of An et al., "Patch Loss: A Generic Multi-scale Perceptual Loss for Single
    Image Super-Resolution", Pattern Recognition 2023, defined as follows. A patch is the vector of
    all channels of `size` x `size` neighbouring positions of a layer; patches overlap, with stride
    1. The distance of two patches at the same place is 1 - their cosine. Its mean over all places
    is taken for each size, and then over the sizes. Other than a difference of features, it
    compares how the features of a patch relate to one another, and flat regions count as much as
    contrasted ones.

    Args:
        layers: name ("conv1_1" to "conv5_4") -> weight above 0, by default {"conv3_4": 1}.
        sizes: sides of the patches, in positions of the layer.
        before_activation, weights, precision: see `VggLoss`.

    Raises:
        ValueError, UserError: see `VggLoss`; `sizes` is not a list of integers from 1.
    """

    name = "vgg_patch"

    def __init__(
        self,
        layers: Mapping[str, float] | None = None,
        sizes: Sequence[int] = (3, 5, 7),
        before_activation: bool = True,
        weights: str | None = None,
        precision: str = "auto",
    ) -> None:
        if (
            not isinstance(sizes, Sequence)
            or not sizes
            or any(type(size) is not int or size < 1 for size in sizes)
        ):
            raise ValueError(f"sizes {sizes!r} is not a list of integers from 1, e.g. [3, 5, 7]")
        layers = {"conv3_4": 1.0} if layers is None else layers
        super().__init__(layers, before_activation, weights, precision)
        self.sizes = tuple(sizes)
        self.smallest_side = self.trunk.smallest_side * max(sizes)

    def distance(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return the mean cosine distance of the patches of two feature maps."""
        return torch.stack([patch_distances(sr, hr, size).mean() for size in self.sizes]).mean()


def patch_distances(sr: Tensor, hr: Tensor, size: int) -> Tensor:
    """Return the cosine distance of all patches, (N, H - size + 1, W - size + 1).

    `sr` and `hr` are NCHW feature maps. No patch is unfolded: inner products of patches are sums of
    those of their positions. Written with the squared difference instead of the inner product, the
    distance of nearly equal patches has all its digits.
    """
    products = torch.stack([part.square().sum(dim=1) for part in (sr, hr, sr - hr)], dim=1)  # N3HW
    sums = F.avg_pool2d(products, size, stride=1) * size**2
    norm_sr, norm_hr = (torch.sqrt(sums[:, index] + EPSILON) for index in (0, 1))
    return (sums[:, 2] - (norm_sr - norm_hr).square()) / (2 * norm_sr * norm_hr)
