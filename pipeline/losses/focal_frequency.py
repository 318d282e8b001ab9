"""The focal frequency loss: squared errors of a spectrum, weighted by how large they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.spec import is_number


class FocalFrequency(nn.Module):
    """Mean of w |F(sr) - F(hr)|^2 over all frequencies.

    Jiang et al., "Focal Frequency Loss for Image Reconstruction and Synthesis", ICCV 2021,
    https://arxiv.org/abs/2012.12821. F is the orthonormal 2-D Fourier transform of each channel of
    a patch. w is |F(sr) - F(hr)| to the power of `alpha`, divided by its maximum over the patch's
    frequencies, and gets no gradient. The frequencies that the network reproduces worst therefore
    count most. These are the defaults of the authors' code, without its batch statistics: a
    sample's loss does not depend on the rest of its micro-batch.

    Args:
        alpha: 1 as published; 0 weighs all frequencies equally, which is the mean squared error.
        patch_factor: number of patches into which each side of the crop is divided before the
            transform.

    Raises:
        ValueError: `alpha` is not a number from 0 on, or `patch_factor` is not an integer from 1
            on.
        UserError: when called, the crop is not a multiple of `patch_factor`.
    """

    def __init__(self, alpha: float = 1.0, patch_factor: int = 1) -> None:
        super().__init__()
        if not is_number(alpha) or alpha < 0:
            raise ValueError(f"alpha {alpha!r} is not a number from 0 on")
        if type(patch_factor) is not int or patch_factor < 1:
            raise ValueError(f"patch_factor {patch_factor!r} is not an integer from 1 on")
        self.alpha, self.patch_factor = float(alpha), patch_factor

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a scalar in the images' dtype; 0 for equal images."""
        # The transform is linear, so one transform of the difference replaces two.
        spectrum = torch.view_as_real(torch.fft.fft2(self._patches(sr - hr), norm="ortho"))
        squares = spectrum.square().sum(dim=-1)
        weights = squares.detach() ** (self.alpha / 2)
        # Equal patches have no largest error; their weights are 0 and not 0/0.
        largest = weights.amax(dim=(-2, -1), keepdim=True)
        return (weights / largest.clamp(min=torch.finfo(largest.dtype).tiny) * squares).mean()

    def _patches(self, images: Tensor) -> Tensor:
        """Return (N, C, patches, patches, height, width) of NCHW."""
        count, (height, width) = self.patch_factor, images.shape[-2:]
        if height % count or width % count:
            raise UserError(
                f"the loss 'focal_frequency' cannot divide a crop of {width}x{height} into "
                f"{count}x{count} patches; set patch_factor or data.crop so that it is a multiple"
            )
        rows = images.unflatten(-2, (count, height // count))
        return rows.unflatten(-1, (count, width // count)).transpose(-3, -2)
