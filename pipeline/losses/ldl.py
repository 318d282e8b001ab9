"""Locally discriminative learning: L1 where SR has artefacts and not details."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW, EXPONENT = 7, 1 / 5  # as published


class Ldl(nn.Module):
    """L1 weighted by a map of artefacts.

    Liang, Zeng and Zhang, "Details or Artifacts: A Locally Discriminative Learning Approach to
    Realistic Image Super-Resolution", CVPR 2022, https://arxiv.org/abs/2203.09195, where it has
    weight 1 in a GAN.

    The residual of a pixel is the sum of |hr - sr| over the channels. Artefacts are where it varies
    strongly: the map is the residual's variance in 7x7 pixels, times its variance over the whole
    crop to the power of 1/5. (Variances are unbiased. At the border, the residual is reflected.)
    Where the averaged network's residual is larger than the network's own, training is improving
    the pixel, so it counts as a detail and the map is 0. The loss is the mean of map x |hr - sr|
    over all channels. As in the authors' code, the gradient also flows through the map, so the loss
    also reduces the variance of the residual.

    The averaged network is the one that is validated and exported (`ema_decay`). With `refine`,
    each micro-batch passes through it as well, in FP32 and without gradients.

    Args:
        refine: set the map to 0 where the averaged network is worse, as published. False saves the
            second forward pass, and also trains on details that are improving.

    Raises:
        ValueError: `refine` is neither true nor false.
    """

    def __init__(self, refine: bool = True) -> None:
        super().__init__()
        if not isinstance(refine, bool):
            raise ValueError(f"refine {refine!r} is neither true nor false")
        # `Criterion` reads it: whether `forward` needs the averaged network's output.
        self.uses_averaged = refine

    def forward(self, sr: Tensor, hr: Tensor, averaged: Tensor | None = None) -> Tensor:
        """Return a scalar in the images' dtype.

        `averaged` is the averaged network's SR. It is needed with `refine`, and ignored otherwise.
        """
        residual = (hr - sr).abs().sum(dim=1, keepdim=True)
        artefacts = _positive(residual.var(dim=(1, 2, 3), keepdim=True)) ** EXPONENT
        artefacts = artefacts * _local_variance(residual)
        if self.uses_averaged:
            assert averaged is not None, "the caller must give what `uses_averaged` asks for"
            before = (hr - averaged).abs().sum(dim=1, keepdim=True)
            artefacts = torch.where(residual < before, 0.0, artefacts)
        return (artefacts * (sr - hr)).abs().mean()


def _local_variance(residual: Tensor) -> Tensor:
    """Return the unbiased variance of N1HW in each pixel's window, N1HW."""
    # Reflected by hand, because on a GPU the gradient of PyTorch's reflection is not deterministic.
    reach = WINDOW // 2
    for dim in (-2, -1):
        side = residual.shape[dim]
        before = residual.narrow(dim, 1, reach).flip(dim)
        after = residual.narrow(dim, side - 1 - reach, reach).flip(dim)
        residual = torch.cat((before, residual, after), dim=dim)
    # The variance is a difference of two means. Without the crop's mean in both, less of it is lost
    # to rounding.
    residual = residual - residual.detach().mean(dim=(2, 3), keepdim=True)
    means = F.avg_pool2d(torch.cat((residual, residual.square()), dim=1), WINDOW, stride=1)
    count = WINDOW * WINDOW
    return (means[:, 1:] - means[:, :1].square()).clamp(min=0) * (count / (count - 1))


def _positive(variance: Tensor) -> Tensor:
    # The power has an infinite slope at 0, the variance of equal images.
    return variance.clamp(min=1e-12)
