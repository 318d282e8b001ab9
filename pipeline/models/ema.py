"""The exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """An averaged float32 copy of a network, whatever the precision of the original.

    The k-th update keeps min(decay, (1 + k) / (10 + k)) of the average, so that the first weights,
    which know nothing, are soon forgotten (the warm-up of tensorflow's
    `ExponentialMovingAverage(num_updates)`). decay 0: a plain copy.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
        self._current: list[
            Tensor
        ] = []  # a float32 copy of the network's, where it has no float32 weights

    @torch.no_grad()
    def update(self, network: nn.Module, weights: Sequence[Tensor] | None = None) -> None:
        """Move towards `network`'s weights; call once after each optimizer step. Does not wait for
        the device.

        `weights`: its parameters in float32, in their order, where somebody keeps them.
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
            torch._foreach_copy_(
                self._current, current
            )  # one kernel; `.float()` would be one for each of them
            current = self._current
        torch._foreach_lerp_(averaged, current, 1 - keep)
        if buffers := list(network.buffers()):
            torch._foreach_copy_(list(self.network.buffers()), buffers)
