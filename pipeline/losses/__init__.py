"""What training minimises: named, weighted terms of a network's output against the HR image."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from pipeline.images import unit_range
from pipeline.losses.pixel import charbonnier, l1, mse

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1, "mse": mse, "charbonnier": charbonnier}


class Criterion:
    """The weighted terms of a recipe's `losses`."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)

    def __call__(self, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """`sr` float NCHW in [0, 1]; `hr` of the same shape, bytes or floats. Each term a float32 scalar, weighted."""
        sr = sr.float()
        hr = unit_range(hr, sr.dtype)
        return {name: weight * LOSSES[name](sr, hr) for name, weight in self.weights.items()}
