"""Losses between pixels. Both images float NCHW in [0, 1], the mean over all their values is returned."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def l1(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean absolute error."""
    return F.l1_loss(sr, hr)


def mse(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(sr, hr)


class Charbonnier(nn.Module):
    """sqrt(error^2 + epsilon^2): L1 that is smooth at 0 (Lai et al., LapSRN, CVPR 2017).

    Args:
        epsilon: where the square of a small error turns into L1; 1e-3 is LapSRN's code's.

    Raises:
        ValueError: an `epsilon` that is not above 0 and finite.
    """

    def __init__(self, epsilon: float = 1e-3) -> None:
        super().__init__()
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon {epsilon!r} is not a number above 0")
        self.epsilon = float(epsilon)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """A scalar in the images' dtype."""
        return torch.sqrt((sr - hr).square() + self.epsilon * self.epsilon).mean()
