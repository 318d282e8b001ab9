"""Losses between pixels. Both images float NCHW in [0, 1], the mean over all their values is
returned."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.images import without_tf32


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
        if (
            isinstance(epsilon, bool)
            or not isinstance(epsilon, (int, float))
            or not 0 < epsilon < math.inf
        ):
            raise ValueError(f"epsilon {epsilon!r} is not a number above 0")
        self.epsilon = float(epsilon)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """A scalar in the images' dtype."""
        return torch.sqrt((sr - hr).square() + self.epsilon * self.epsilon).mean()


# Losses of structure: multi-scale similarity, the spectrum, smoothness. Images are float NCHW in
# [0, 1].
#
# MS-SSIM is written here for its gradient: in pytorch-msssim 1.0.0, piq 0.8.0 and, by default,
# torchmetrics 1.9.0, images whose contrasts run against each other at a single scale have none left
# at any. Moreover, pytorch-msssim takes no image below 161 pixels, and networks are trained on
# crops of 96 and more. piq and torchmetrics can be told to take fewer scales: piq's values are then
# those of here where every side halves evenly; torchmetrics' differ, by 1e-3 at two.


WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, the finest scale first
# Powers have an infinite slope at 0 and no value below it. A similarity under FLOOR, in -1..FLOOR,
# is pressed into FLOOR/2..FLOOR: its gradient goes on to lead uphill. Images that resemble each
# other at all lie far above.
FLOOR = 1e-3


class MsSsim(nn.Module):
    """1 - MS-SSIM (Wang, Simoncelli and Bovik, "Multiscale structural similarity for image quality
    assessment", 2003).

    Of every channel of every image, then the mean. The windows are Gaussian, 11x11 with sigma 1.5,
    and lie within the image. From one scale to the next 2x2 pixels are averaged (an odd last row or
    column is repeated first). A scale whose similarity is below `FLOOR`, which says that the images
    are unlike, counts as about `FLOOR`.

    Args: scales: 1 (SSIM) to 5 (the paper's). `None` takes as many as the crop has room for: 5 from
        161 pixels on the
            shorter side, 4 from 81, 3 from 41, 2 from 21, 1 from 11. The weights of fewer than 5
            scales are the paper's first ones, divided by their sum.

    Raises:
        ValueError: `scales` is none of these.
        UserError: when called, for a crop that is too small.
    """

    def __init__(self, scales: int | None = None) -> None:
        super().__init__()
        if scales is not None and (
            type(scales) is not int or scales not in range(1, len(SCALE_WEIGHTS) + 1)
        ):
            raise ValueError(
                f"scales {scales!r} is not a whole number from 1 to {len(SCALE_WEIGHTS)}"
            )
        self.scales = scales

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """A scalar in 0..1 in the images' dtype: 0 for equal images."""
        weights = SCALE_WEIGHTS[: self._scales_for(min(sr.shape[-2:]))]
        product = 1.0
        for scale, weight in enumerate(weights):
            if scale > 0:
                sr, hr = _halve(sr), _halve(hr)
            luminance, contrast = _similarity_maps(sr, hr)
            is_coarsest = scale == len(weights) - 1
            similarity = (luminance * contrast if is_coarsest else contrast).mean(dim=(-2, -1))
            similarity = FLOOR + F.leaky_relu(similarity - FLOOR, FLOOR / 2)
            product = product * similarity ** (weight / sum(weights))
        return 1 - product.mean()

    def _scales_for(self, side: int) -> int:
        """How many scales are taken of images whose shorter side is `side`."""
        fitting = [
            scale for scale in range(1, len(SCALE_WEIGHTS) + 1) if side >= smallest_side(scale)
        ]
        if not fitting or (self.scales or 1) > fitting[-1]:
            needed = smallest_side(self.scales or 1)
            raise UserError(
                f"the loss 'ms_ssim' needs a crop of at least {needed} pixels for "
                f"{self.scales or 1} "
                f"scale(s), but it is {side}; take a larger data.crop or fewer scales"
            )
        return self.scales or fitting[-1]


class FourierL1(nn.Module):
    """L1 between the spectra of the images: of the real and of the imaginary parts of their
    `rfft2`, the mean over all.

    The frequency loss of SAFMN (Sun et al., ICCV 2023) and SMFANet (Zheng et al., ECCV 2024), both
    with weight 0.05 beside L1 of weight 1 and with `norm` "backward".

    Args: norm: "backward" leaves the transform as it is: the loss grows with the side of the crop.
        "ortho" divides it
            by the square root of the number of pixels, which makes a weight good for crops of any
            size.

    Raises:
        ValueError: another `norm`.
    """

    def __init__(self, norm: str = "backward") -> None:
        super().__init__()
        if norm not in ("backward", "ortho"):
            raise ValueError(f"norm {norm!r} is neither 'backward' nor 'ortho'")
        self.norm = norm

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """A scalar in the images' dtype."""
        # The transform is linear: one of the difference is the difference of two.
        return torch.view_as_real(torch.fft.rfft2(sr - hr, norm=self.norm)).abs().mean()


class TotalVariation(nn.Module):
    """How much neighbouring pixels of `sr` differ; `hr` is not looked at. A regulariser against
    noise.

    Args: distance: "l2" is twice the sum of the mean squared differences down and across, as the
        SRGAN codes have it,
            whose weight is 2e-8 beside MSE of weight 1 (the paper's first version,
            arXiv:1609.04802v1, gives the weight): so small that it changes nothing to be seen. "l1"
            is the sum of the mean absolute differences down and across, as in BasicSR.

    Raises:
        ValueError: another `distance`.
    """

    def __init__(self, distance: str = "l2") -> None:
        super().__init__()
        if distance not in ("l1", "l2"):
            raise ValueError(f"distance {distance!r} is neither 'l1' nor 'l2'")
        self.distance = distance

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """A scalar in the image's dtype."""
        down, across = sr.diff(dim=-2), sr.diff(dim=-1)
        if self.distance == "l1":
            return down.abs().mean() + across.abs().mean()
        return 2 * (down.square().mean() + across.square().mean())


def smallest_side(scales: int) -> int:
    """The shortest side, in pixels, of an image of which MS-SSIM can take so many scales."""
    return (WINDOW - 1) * 2 ** (scales - 1) + 1


def _halve(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    if height % 2 or width % 2:
        images = F.pad(images, (0, width % 2, 0, height % 2), mode="replicate")
    return F.avg_pool2d(images, 2)


def _similarity_maps(sr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM's two factors, (luminance, contrast and structure), each NC(H-10)(W-10)."""
    c1, c2 = K1 * K1, K2 * K2
    mean_sr, mean_hr, square_sr, square_hr, mixed = _blur(
        torch.cat((sr, hr, sr * sr, hr * hr, sr * hr), dim=1)
    ).chunk(5, dim=1)
    product = mean_sr * mean_hr
    variances = square_sr + square_hr - mean_sr * mean_sr - mean_hr * mean_hr
    luminance = (2 * product + c1) / (mean_sr * mean_sr + mean_hr * mean_hr + c1)
    return luminance, (2 * (mixed - product) + c2) / (variances + c2)


def _blur(planes: Tensor) -> Tensor:
    """The Gaussian window over NCHW, one axis after the other, where it fits wholly.

    Never in TF32, whose rounding is as large as the variances that are differences of these means.
    """
    channels = planes.shape[1]
    offsets = torch.arange(WINDOW, dtype=planes.dtype, device=planes.device) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    window = (window / window.sum()).expand(channels, 1, WINDOW)
    with without_tf32():
        down = F.conv2d(planes.contiguous(), window[..., None].contiguous(), groups=channels)
        return F.conv2d(down, window[..., None, :].contiguous(), groups=channels)
