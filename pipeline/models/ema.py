"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """An averaged float32 copy of a network, whatever the precision of the original.

    The k-th update keeps min(decay, (1 + k) / (10 + k)) of the average, so that the untrained first
    weights are forgotten quickly (the warm-up of TensorFlow's
    `ExponentialMovingAverage(num_updates)`). With decay 0, it is a plain copy.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
        # A float32 copy of the network's weights, used if they are in another dtype.
        self._current: list[Tensor] = []

    @torch.no_grad()
    def update(self, network: nn.Module, weights: Sequence[Tensor] | None = None) -> None:
        """Move towards `network`'s weights, without waiting for the device.

        Call it once after each optimizer step. `weights` are the network's parameters in float32,
        in order, if the caller has them.
        """
        self.num_updates += 1
        keep = (
            min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.decay else 0.0
        )
        averaged = list(self.network.parameters())
        current = [
            weight.detach() for weight in (network.parameters() if weights is None else weights)
        ]
        if any(weight.dtype != torch.float32 for weight in current):
            self._current = self._current or [torch.empty_like(weight) for weight in averaged]
            # One kernel for all tensors; `.float()` would launch one for each.
            torch._foreach_copy_(self._current, current)
            current = self._current
        torch._foreach_lerp_(averaged, current, 1 - keep)
        if buffers := list(network.buffers()):
            torch._foreach_copy_(list(self.network.buffers()), buffers)
