"""DISTS: distance between the means and the correlations of VGG16 features."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.images import unit_range
from pipeline.losses.trunks import (
    VGG16_BLOCKS,
    VggTrunk,
    check_precision,
    check_side,
    in_precision,
)

CHANNELS = (3, *(channels for channels, _ in VGG16_BLOCKS))  # of the image, then of each block
PACKAGE = "DISTS_pytorch"
C1 = C2 = 1e-6
# From 17 pixels on, the deepest features have more than one position, without which there is no
# structure to compare.
SMALLEST_SIDE = 17


class DistsFeatures(VggTrunk):
    """VGG16 whose max pooling is replaced by L2 pooling, up to the last activation of each block.

    L2 pooling is the root of the squares' mean under a Hanning window of 3x3, with stride 2. It
    does not alias, unlike max pooling.

    Args:
        weights: a file with VGG16's weights, see `load_trunk`; `None` uses torch's cache.

    Raises:
        UserError: the weights are missing or not this trunk's.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__("vgg", weights)
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("window", torch.outer(row, row)[None, None])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the image and the features of the five blocks, float32 NCHW.

        `images` are RGB NCHW, pixels or floats in [0, 1].
        """
        dtype = self.mean.dtype
        images = unit_range(images, dtype)
        features, found = self.normalised(images), [images]
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                features = features.to(dtype)
                found.append(features)
                # Squares of features exceed float16.
                if len(found) < len(CHANNELS):
                    with torch.autocast(images.device.type, enabled=False):
                        features = self._pool(features)
            else:
                features = layer(features)
        return found

    def _pool(self, features: Tensor) -> Tensor:
        channels = features.shape[1]
        window = self.window.expand(channels, 1, 3, 3)
        means = F.conv2d(features.square(), window, stride=2, padding=1, groups=channels)
        return torch.sqrt(means + 1e-12)


class DistsDistance(nn.Module):
    """DISTS of every image of a batch.

    Ding, Ma, Wang and Simoncelli, "Image Quality Assessment: Unifying Structure and Texture
    Similarity", TPAMI 2020 (arXiv:2004.07728). For each channel of the image and of five layers of
    VGG16, SSIM's formulas compare the means (texture) and the correlation (structure) of SR and HR
    over the whole map. The learned weights of the channels are those of the package dists-pytorch
    0.1, by the authors (MIT).

    Images are compared at their own size. The authors' command line and piq first reduce larger
    images to 256 pixels on the shorter side.

    Args:
        weights: a file with VGG16's weights, see `load_trunk`; `None` uses torch's cache.

    Raises:
        UserError: the weights are missing or not this trunk's, or, when called, the images are
            too small.
    """

    smallest_side = SMALLEST_SIDE

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.trunk = DistsFeatures(weights)
        alpha, beta = _channel_weights()
        self.register_buffer("alpha", alpha)
        self.register_buffer("beta", beta)
        self.requires_grad_(False).eval()

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return float32 (N,), 0 for equal images, for RGB NCHW tensors, pixels or floats in
        [0, 1].

        Gradients flow only to `sr`.
        """
        check_side("dists", sr, self.smallest_side)
        with torch.no_grad():
            of_hr = self.trunk(hr.detach())
        of_sr = self.trunk(sr)
        with torch.autocast(sr.device.type, enabled=False):
            pairs = [_distances(*pair) for pair in zip(of_sr, of_hr, strict=True)]
            texture, structure = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
            return (texture * self.alpha + structure * self.beta).sum(dim=1)


class Dists(nn.Module):
    """Mean DISTS of a batch as a loss; `weights` and errors are those of `DistsDistance`.

    `precision` is that of VGG16's convolutions, see `trunk_dtype`. The DISTS metric is always
    computed in float32.
    """

    def __init__(self, weights: str | None = None, precision: str = "auto") -> None:
        super().__init__()
        check_precision(precision)
        self.measure, self.precision = DistsDistance(weights), precision

    @property
    def trunk(self) -> nn.Module:
        """The part that is worth compiling."""
        return self.measure.trunk

    def forward(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Return a float32 scalar for two RGB NCHW tensors, pixels or floats in [0, 1].

        Gradients flow only to `sr`.
        """
        return in_precision(self.precision, lambda sr, hr: self.measure(sr, hr).mean(), sr, hr)


def _distances(sr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 - the similarity of the means, and of the structure, NC, of two NCHW feature maps.

    They are written as quotients, because 1 - the paper's similarities would lose the digits of
    small distances.
    """
    mean_sr, mean_hr = (features.mean(dim=(2, 3), keepdim=True) for features in (sr, hr))
    texture = (mean_sr - mean_hr).square() / (mean_sr.square() + mean_hr.square() + C1)
    sr, hr = sr - mean_sr, hr - mean_hr
    variances = sr.square().mean(dim=(2, 3)) + hr.square().mean(dim=(2, 3))
    return texture[..., 0, 0], (sr - hr).square().mean(dim=(2, 3)) / (variances + C2)


def _channel_weights() -> tuple[Tensor, Tensor]:
    """Return the learned alpha (of means) and beta (of structures), (1475,); they add up to 1.

    The file is read without importing the package, whose code needs pretrained weights of
    torchvision.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise UserError(
            "DISTS needs its learned weights; install them with: pip install dists-pytorch==0.1"
        )
    state = torch.load(Path(package.origin).with_name("weights.pt"), weights_only=True)
    alpha, beta = (state[name].detach().flatten().float() for name in ("alpha", "beta"))
    assert len(alpha) == len(beta) == sum(CHANNELS)
    total = alpha.sum() + beta.sum()
    return alpha / total, beta / total
