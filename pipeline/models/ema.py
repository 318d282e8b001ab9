"""The exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """An averaged float32 copy of a network, whatever the precision of the original.

    The k-th update keeps min(decay, (1 + k) / (10 + k)) of the average, so that the first weights, which know nothing,
    are soon forgotten (the warm-up of tensorflow's `ExponentialMovingAverage(num_updates)`). decay 0: a plain copy.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
        self._averaged = list(self.network.parameters())

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards `network`'s weights; call once after each optimizer step. Does not wait for the device."""
        self.num_updates += 1
        keep = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.decay else 0.0
        current: list[Tensor] = [parameter.detach().float() for parameter in network.parameters()]
        torch._foreach_lerp_(self._averaged, current, 1 - keep)
        for averaged, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            averaged.copy_(buffer)
