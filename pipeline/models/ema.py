"""Moving averages of a network's weights: exponential, and those of `posthoc_ema.py`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.models.posthoc_ema import exponent, kept_share, sampled


class ExponentialMovingAverage:
    """An averaged float32 copy of a network, whatever the precision of the original.

    The k-th update keeps min(decay, (1 + k) / (10 + k)) of the average, so that the untrained first
    weights are forgotten quickly (the warm-up of TensorFlow's
    `ExponentialMovingAverage(num_updates)`). With decay 0, it is a plain copy.

    Beside it, `power` keeps the parameters' power-function averages of the relative `widths`, in
    the network's order. Their buffers are the exponential average's.
    """

    def __init__(self, network: nn.Module, decay: float, widths: Sequence[float] = ()) -> None:
        self.decay = decay
        self.num_updates = 0
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
        self.power = {
            width: [weight.detach().clone() for weight in self.network.parameters()]
            for width in widths
        }
        self._exponents = {width: exponent(width) for width in widths}
        # A float32 copy of the network's weights, used if they are in another dtype.
        self._current: list[Tensor] = []

    def to(self, device: torch.device) -> None:
        """Move all averages to `device`."""
        self.network.to(device)
        self.power = {
            width: [weight.to(device) for weight in weights]
            for width, weights in self.power.items()
        }

    def power_state(self, width: float) -> dict[str, Tensor]:
        """Return the state dict of a network with the power-function average of `width`."""
        own = {
            id(weight): averaged
            for weight, averaged in zip(self.network.parameters(), self.power[width], strict=True)
        }
        state = self.network.state_dict(keep_vars=True)
        return {name: own.get(id(tensor), tensor) for name, tensor in state.items()}

    @torch.no_grad()
    def load_power_state(self, width: float, state: Mapping[str, Tensor]) -> None:
        """Copy what `power_state` has returned into the average of `width`."""
        names = [name for name, _ in self.network.named_parameters()]
        torch._foreach_copy_(self.power[width], [state[name] for name in names])

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
        if sampled(self.num_updates) == self.num_updates:
            for width, power in self.power.items():
                kept = kept_share(self.num_updates, self._exponents[width])
                torch._foreach_lerp_(power, current, 1 - kept)
        if buffers := list(network.buffers()):
            torch._foreach_copy_(list(self.network.buffers()), buffers)
