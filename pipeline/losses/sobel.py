"""A loss between the gradients of two images, by Sobel's operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPSILON = 1e-3  # smooths the length of a vector where it is 0; a quarter of an 8-bit level


class Sobel(nn.Module):
    """Mean distance between the gradients of SR and HR, in every channel.

    Sobel's operator is divided by 8, so a gradient is in units of white per pixel. It is computed
    where its 3x3 window fits into the image.

    Args:
        compare: "vectors" is the length of the difference of the two gradients, so edges must agree
            in strength and direction. "magnitudes" is the absolute difference of their lengths, as
            in the gradient loss of SPSR (Ma et al., "Structure-Preserving Super Resolution with
            Gradient Guidance", CVPR 2020), which takes the differences of the two neighbours in
            place of Sobel's operator.

    Raises:
        ValueError: `compare` is neither of these.
    """

    def __init__(self, compare: str = "vectors") -> None:
        super().__init__()
        if compare not in ("vectors", "magnitudes"):
            raise ValueError(f"compare {compare!r} is neither 'vectors' nor 'magnitudes'")
        self.compare = compare

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a scalar in the images' dtype."""
        if self.compare == "vectors":
            return _length(*_gradient(sr - hr)).mean()
        return (_length(*_gradient(sr)) - _length(*_gradient(hr))).abs().mean()


def _gradient(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives down and across of NCHW, each NC(H-2)(W-2).

    Plain arithmetic is used because convolutions may run in TF32.
    """
    down = images[..., 2:, :] - images[..., :-2, :]
    across = images[..., 2:] - images[..., :-2]
    return (
        (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 8,
        (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 8,
    )


def _length(down: Tensor, across: Tensor) -> Tensor:
    # The square root has an infinite slope at 0, where most of a smooth image is.
    return torch.sqrt(down.square() + across.square() + EPSILON * EPSILON)
