"""Losses between pixels. Both images float NCHW in [0, 1], the mean over all their values is returned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def l1(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean absolute error."""
    return F.l1_loss(sr, hr)


def mse(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(sr, hr)


def charbonnier(sr: Tensor, hr: Tensor, epsilon: float = 1e-3) -> Tensor:
    """sqrt(error^2 + epsilon^2): L1 that is smooth at 0 (Lai et al., LapSRN, CVPR 2017)."""
    return torch.sqrt((sr - hr).square() + epsilon * epsilon).mean()
