"""Losses against colour shifts: the chroma and the local brightness of Oklab.

Perceptual and adversarial losses tolerate a change of a region's colour or brightness, which is
visible in the output. These two compare exactly that, in a space in which equal distances look
equally different. The idea of penalising both, and of comparing brightness after a blur so that
texture remains free, is that of the loss `consistency` of neosr, https://github.com/neosr-project/neosr.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.colour_spaces import rgb_to_oklab
from pipeline.losses.pixel import gaussian_blur
from pipeline.spec import is_number

EPSILON = 1e-3  # smooths the distance at 0; differences of 0.02 in Oklab are just visible
MAX_SIGMA = 50


class OklabChroma(nn.Module):
    """Mean distance of SR and HR in the plane of Oklab's a (green to red) and b (blue to yellow).

    The distance is sqrt(da^2 + db^2 + 1e-6). Brightness has no influence.

    Args:
        sigma: standard deviation in pixels of a Gaussian blur of a and b before they are compared;
            0: every pixel is compared.

    Raises:
        ValueError: `sigma` is not a number from 0 to 50.
        UserError: when called, the crop is smaller than the blur.
    """

    def __init__(self, sigma: float = 0.0) -> None:
        super().__init__()
        self.sigma = _checked(sigma)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a scalar in the images' dtype."""
        difference = (rgb_to_oklab(sr) - rgb_to_oklab(hr))[:, 1:]
        difference = _blurred(difference, self.sigma, "oklab_chroma")
        return torch.sqrt(difference.square().sum(dim=1) + EPSILON * EPSILON).mean()


class Luma(nn.Module):
    """Mean absolute difference of Oklab's lightness of SR and HR, both blurred.

    Args:
        sigma: standard deviation in pixels of the Gaussian blur: detail that is finer is left to
            the other losses. 0: every pixel is compared.

    Raises:
        ValueError: `sigma` is not a number from 0 to 50.
        UserError: when called, the crop is smaller than the blur.
    """

    def __init__(self, sigma: float = 3.0) -> None:
        super().__init__()
        self.sigma = _checked(sigma)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a scalar in the images' dtype."""
        difference = (rgb_to_oklab(sr) - rgb_to_oklab(hr))[:, :1]
        return _blurred(difference, self.sigma, "luma").abs().mean()


def _checked(sigma: float) -> float:
    if not is_number(sigma) or not 0 <= sigma <= MAX_SIGMA:
        raise ValueError(f"sigma {sigma!r} is not a number from 0 to {MAX_SIGMA}")
    return float(sigma)


def _blurred(planes: Tensor, sigma: float, loss: str) -> Tensor:
    """Blur NCHW where the window, which ends at 3 sigma, fits completely.

    A blur is linear, so that of the difference replaces those of two images.
    """
    if sigma == 0:
        return planes
    radius = math.ceil(3 * sigma)
    side = 2 * radius + 1
    if min(planes.shape[-2:]) < side:
        raise UserError(
            f"the loss {loss!r} with sigma {sigma:g} needs a crop of at least {side} pixels, but "
            f"it is {min(planes.shape[-2:])}; use a larger data.crop or a smaller sigma"
        )
    return gaussian_blur(planes, sigma, radius)
