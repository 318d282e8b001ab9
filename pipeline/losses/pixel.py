"""Losses between pixels of float NCHW images in [0, 1]; each returns a mean over all values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.images import without_tf32
from pipeline.spec import is_number


def l1(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean absolute error."""
    return F.l1_loss(sr, hr)


def mse(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(sr, hr)


class Charbonnier(nn.Module):
    """sqrt(error^2 + epsilon^2), a smooth L1 (Lai et al., LapSRN, CVPR 2017).

    Args:
        epsilon: errors well below it are squared, larger ones count as in L1; LapSRN's code uses
            1e-3.

    Raises:
        ValueError: `epsilon` is not above 0 and finite.
    """

    def __init__(self, epsilon: float = 1e-3) -> None:
        super().__init__()
        if not is_number(epsilon) or epsilon <= 0:
            raise ValueError(f"epsilon {epsilon!r} is not a number above 0")
        self.epsilon = float(epsilon)

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a scalar in the images' dtype."""
        return torch.sqrt((sr - hr).square() + self.epsilon * self.epsilon).mean()


# Losses on structure: multi-scale similarity, spectrum, smoothness. Images are float NCHW in [0,
# 1].
#
# MS-SSIM is implemented here for its gradient: in pytorch-msssim 1.0.0, piq 0.8.0 and, by default,
# torchmetrics 1.9.0, images with a negative contrast similarity at a single scale get no gradient
# at all. In addition, pytorch-msssim rejects images below 161 pixels, but networks are trained on
# crops from 96 pixels. piq and torchmetrics can use fewer scales: piq's values then equal these if
# every side can be halved evenly; torchmetrics' differ by 1e-3 with two scales.


WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, the finest scale first
# x^weight has an infinite slope at 0 and no value below it. A similarity in -1..FLOOR is therefore
# compressed into FLOOR/2..FLOOR, so that its gradient still increases it. Images with any
# resemblance are far above.
FLOOR = 1e-3


class MsSsim(nn.Module):
    """1 - MS-SSIM of every channel of every image, then the mean.

    Wang, Simoncelli and Bovik, "Multiscale structural similarity for image quality assessment",
    2003. The windows are Gaussian, 11x11 with sigma 1.5, and lie within the image. From each scale
    to the next, blocks of 2x2 pixels are averaged (an odd last row or column is repeated first). A
    scale whose similarity is below `FLOOR`, i.e. of unrelated images, counts as about `FLOOR`.

    Args:
        scales: 1 (SSIM) to 5 (as in the paper). `None` uses as many as fit into the crop: 5 from
            161 pixels on the shorter side, 4 from 81, 3 from 41, 2 from 21, 1 from 11. With fewer
            than 5 scales, the first weights of the paper are used, divided by their sum.

    Raises:
        ValueError: `scales` is none of these.
        UserError: when called, the crop is too small.
    """

    def __init__(self, scales: int | None = None) -> None:
        super().__init__()
        if scales is not None and (
            type(scales) is not int or scales not in range(1, len(SCALE_WEIGHTS) + 1)
        ):
            raise ValueError(f"scales {scales!r} is not an integer from 1 to {len(SCALE_WEIGHTS)}")
        self.scales = scales

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a scalar in 0..1 in the images' dtype; 0 for equal images."""
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
        """Return the number of scales for images whose shorter side is `side`."""
        fitting = [
            scale for scale in range(1, len(SCALE_WEIGHTS) + 1) if side >= smallest_side(scale)
        ]
        if not fitting or (self.scales or 1) > fitting[-1]:
            needed = smallest_side(self.scales or 1)
            raise UserError(
                f"the loss 'ms_ssim' needs a crop of at least {needed} pixels for "
                f"{self.scales or 1} scale(s), but it is {side}; use a larger data.crop or fewer "
                "scales"
            )
        return self.scales or fitting[-1]


class FourierL1(nn.Module):
    """L1 between the real and imaginary parts of the images' `rfft2`, averaged over all values.

    The frequency loss of SAFMN (Sun et al., ICCV 2023) and SMFANet (Zheng et al., ECCV 2024). Both
    use it with weight 0.05 beside L1 with weight 1, and `norm` "backward".

    Args:
        norm: "backward" does not scale the transform, so the loss grows with the crop's side.
            "ortho" divides it by the square root of the number of pixels, so that one weight fits
            crops of all sizes.

    Raises:
        ValueError: `norm` is neither of these.
    """

    def __init__(self, norm: str = "backward") -> None:
        super().__init__()
        if norm not in ("backward", "ortho"):
            raise ValueError(f"norm {norm!r} is neither 'backward' nor 'ortho'")
        self.norm = norm

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a scalar in the images' dtype."""
        # The transform is linear, so one transform of the difference replaces two.
        return torch.view_as_real(torch.fft.rfft2(sr - hr, norm=self.norm)).abs().mean()


class TotalVariation(nn.Module):
    """Total variation of `sr`, a regulariser against noise; `hr` is ignored.

    Args:
        distance: "l2" is twice the sum of the mean squared differences down and across, as in the
            SRGAN codes. Their weight is 2e-8 beside MSE with weight 1 (the first version of the
            paper, arXiv:1609.04802v1, gives the weight), which is too small for a visible effect.
            "l1" is the sum of the mean absolute differences down and across, as in BasicSR.

    Raises:
        ValueError: `distance` is neither of these.
    """

    def __init__(self, distance: str = "l2") -> None:
        super().__init__()
        if distance not in ("l1", "l2"):
            raise ValueError(f"distance {distance!r} is neither 'l1' nor 'l2'")
        self.distance = distance

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a scalar in the image's dtype."""
        down, across = sr.diff(dim=-2), sr.diff(dim=-1)
        if self.distance == "l1":
            return down.abs().mean() + across.abs().mean()
        return 2 * (down.square().mean() + across.square().mean())


def smallest_side(scales: int) -> int:
    """Return the shortest side, in pixels, of images for MS-SSIM with `scales` scales."""
    return (WINDOW - 1) * 2 ** (scales - 1) + 1


def _halve(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    if height % 2 or width % 2:
        images = F.pad(images, (0, width % 2, 0, height % 2), mode="replicate")
    return F.avg_pool2d(images, 2)


def _similarity_maps(sr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
    """Return SSIM's two factors (luminance, contrast and structure), each NC(H-10)(W-10)."""
    c1, c2 = K1 * K1, K2 * K2
    # Variances are differences of these means, and as small as TF32's rounding of them.
    mean_sr, mean_hr, square_sr, square_hr, mixed = gaussian_blur(
        torch.cat((sr, hr, sr * sr, hr * hr, sr * hr), dim=1), SIGMA, WINDOW // 2
    ).chunk(5, dim=1)
    product = mean_sr * mean_hr
    variances = square_sr + square_hr - mean_sr * mean_sr - mean_hr * mean_hr
    luminance = (2 * product + c1) / (mean_sr * mean_sr + mean_hr * mean_hr + c1)
    return luminance, (2 * (mixed - product) + c2) / (variances + c2)


def gaussian_blur(planes: Tensor, sigma: float, radius: int) -> Tensor:
    """Blur NCHW along both axes, only where the window of 2 radius + 1 pixels fits completely.

    TF32 is off, because what is compared may be a small difference of the results.
    """
    channels, side = planes.shape[1], 2 * radius + 1
    offsets = torch.arange(side, dtype=planes.dtype, device=planes.device) - radius
    window = torch.exp(-offsets.square() / (2 * sigma**2))
    window = (window / window.sum()).expand(channels, 1, side)
    with without_tf32():
        down = F.conv2d(planes.contiguous(), window[..., None].contiguous(), groups=channels)
        return F.conv2d(down, window[..., None, :].contiguous(), groups=channels)
