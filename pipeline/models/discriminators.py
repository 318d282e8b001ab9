"""The table of discriminators for GAN training, and the function that builds them.

They take NCHW RGB, uint8 0..255 or float in [0, 1], and return logits, not probabilities: the
losses apply the sigmoid. The initialisation is torch's default, as published, unless a class says
otherwise. Tensors are named as in BasicSR's and Real-ESRGAN's files, so that these load strictly if
the shapes agree.

The weights may be cast to half precision with or without the buffers (by default, DeepSpeed casts
only parameters): batch norm statistics and spectral norms are computed in float32 in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cli import UserError, one_line
from pipeline.config import names
from pipeline.images import unit_range
from pipeline.models.common import COLOURS, NOT_ALLOCATED, BatchNorm2d, check_choice, check_sizes

SMALLEST_CROP = 32
LARGEST_WIDENING = 8
"""Features double from stage to stage up to this multiple of `num_features`: up to 512 for 64."""
NORMS = ("batch", "instance", "none")
HEADS = ("pool", "flatten")
HEAD_SIDE = 4
HIDDEN_FEATURES = 100
SLOPE = 0.2


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Freeze a discriminator while the generator's loss goes through it.

    In this context, no parameter requires a gradient, batch norm normalises by the batch as in
    training but does not update its running statistics, and spectral norms keep their singular
    vectors. The discriminator's state thus depends only on its own steps, whichever network steps
    first and however often. Gradients with respect to the input are computed as usual. All flags
    are restored on exit, also after an exception. The backward pass may happen later, because what
    was run inside stays frozen. Supports torch's batch norm classes and this module's spectral
    norm, not torch's.
    """
    flags: list[tuple[Any, str, bool]] = [
        (parameter, "requires_grad", parameter.requires_grad) for parameter in module.parameters()
    ]
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            flags.append((part, "track_running_stats", part.track_running_stats))
        elif isinstance(part, SpectralConv2d):
            flags.append((part, "is_iterating", part.is_iterating))
    try:
        for owner, flag, _ in flags:
            setattr(owner, flag, False)
        yield module
    finally:
        for owner, flag, value in flags:
            setattr(owner, flag, value)


class VGGDiscriminator(nn.Module):
    """The image-level discriminator of SRGAN and ESRGAN (Ledig et al. 2017, Wang et al. 2018).

    Each stage has a 3x3 convolution and a 4x4 one with stride 2. There are as many stages as leave
    at least 3x3 positions; features double up to 8 times `num_features`. Two linear layers with 100
    features between them follow. For crops of 128 and 256, both heads equal BasicSR's
    VGGStyleDiscriminator (14,499,401 parameters at 128); for 96, "flatten" equals the published one
    for 96 (3x3 positions).

    Args:
        crop: side of the square HR crops in pixels, at least 32, odd or even.
        num_features: channels of the first stage.
        norm: "batch" is the published one; "instance" normalises each image on its own, which suits
            small micro-batches; "none" uses biases and Kaiming initialisation instead, which keeps
            the signal's magnitude.
        head: "pool" averages the positions to 4x4 and therefore accepts images of any size,
            whatever `crop` is; "flatten" uses the positions directly and accepts only images of
            `crop` x `crop`.

    Raises:
        ValueError: an argument has an unsupported value.
    """

    def __init__(
        self, *, crop: int, num_features: int = 64, norm: str = "batch", head: str = "pool"
    ) -> None:
        super().__init__()
        _check_crop(crop)
        check_sizes(num_features=num_features)
        check_choice(NORMS, norm=norm)
        check_choice(HEADS, head=head)
        self.num_stages = _num_stages(crop)
        self.head_side = HEAD_SIDE if head == "pool" else crop >> self.num_stages
        self.is_pooled = head == "pool"
        features = COLOURS
        for stage in range(self.num_stages):
            wider = num_features * min(2**stage, LARGEST_WIDENING)
            # The very first convolution has a bias and no norm, as published.
            self._add(
                f"{stage}_0",
                _conv(features, wider, 3, 1, has_bias=stage == 0 or norm == "none"),
                "none" if stage == 0 else norm,
            )
            self._add(f"{stage}_1", _conv(wider, wider, 4, 2, has_bias=norm == "none"), norm)
            features = wider
        self.linear1 = nn.Linear(features * self.head_side**2, HIDDEN_FEATURES)
        self.linear2 = nn.Linear(HIDDEN_FEATURES, 1)
        if norm == "none":
            self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, 1) logits in the weights' dtype for (N, 3, H, W) images; real is above 0."""
        features = unit_range(images, self.linear1.weight.dtype)
        for stage in range(self.num_stages):
            for layer in (f"{stage}_0", f"{stage}_1"):
                features = getattr(self, f"conv{layer}")(features)
                if hasattr(self, f"bn{layer}"):
                    features = getattr(self, f"bn{layer}")(features)
                features = F.leaky_relu(features, SLOPE)
        if self.is_pooled:
            features = F.adaptive_avg_pool2d(features, self.head_side)
        elif features.shape[-2:] != (self.head_side, self.head_side):
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} pixels do not fit the crop of this "
                'discriminator; build it for their size, or with head: "pool"'
            )
        return self.linear2(F.leaky_relu(self.linear1(features.flatten(1)), SLOPE))

    def _add(self, layer: str, conv: nn.Conv2d, norm: str) -> None:
        self.add_module(f"conv{layer}", conv)
        if norm == "batch":
            self.add_module(f"bn{layer}", BatchNorm2d(conv.out_channels))
        elif norm == "instance":
            self.add_module(f"bn{layer}", nn.InstanceNorm2d(conv.out_channels, affine=True))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                nn.init.zeros_(module.bias)


class UNetDiscriminator(nn.Module):
    """The pixel-level discriminator of Real-ESRGAN: a U-Net with spectral norm (Wang et al. 2021).

    It has 4,376,897 parameters by default.

    Args:
        crop: side of the HR crops in pixels, at least 32; the network is the same for all. Sides
            that are not multiples of 8 work too: each decoder level has the size of its encoder
            level.
        num_features: channels at full size.
        skip_connections: add the encoder's features in the decoder.

    Raises:
        ValueError: an argument has an unsupported value.
    """

    def __init__(self, *, crop: int, num_features: int = 64, skip_connections: bool = True) -> None:
        super().__init__()
        _check_crop(crop)
        check_sizes(num_features=num_features)
        if not isinstance(skip_connections, bool):
            raise ValueError(f"skip_connections {skip_connections!r} is neither true nor false")
        self.has_skips = skip_connections
        full, half, quarter, eighth = (num_features * 2**level for level in range(4))
        self.conv0 = _conv(COLOURS, full, 3, 1)
        self.conv1 = SpectralConv2d(full, half, 4, 2)
        self.conv2 = SpectralConv2d(half, quarter, 4, 2)
        self.conv3 = SpectralConv2d(quarter, eighth, 4, 2)
        self.conv4 = SpectralConv2d(eighth, quarter, 3, 1)
        self.conv5 = SpectralConv2d(quarter, half, 3, 1)
        self.conv6 = SpectralConv2d(half, full, 3, 1)
        self.conv7 = SpectralConv2d(full, full, 3, 1)
        self.conv8 = SpectralConv2d(full, full, 3, 1)
        self.conv9 = _conv(full, 1, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, 1, H, W) logits, one per pixel, in the weights' dtype; real is above 0."""
        features = unit_range(images, self.conv0.weight.dtype)
        way_down = []
        for conv in (self.conv0, self.conv1, self.conv2, self.conv3):
            features = F.leaky_relu(conv(features), SLOPE)
            way_down.append(features)
        for conv, across in zip((self.conv4, self.conv5, self.conv6), way_down[2::-1], strict=True):
            features = F.interpolate(
                features, size=across.shape[-2:], mode="bilinear", align_corners=False
            )
            features = F.leaky_relu(conv(features), SLOPE)
            if self.has_skips:
                features = features + across
        for conv in (self.conv7, self.conv8):
            features = F.leaky_relu(conv(features), SLOPE)
        return self.conv9(features)


class SpectralConv2d(nn.Module):
    """A convolution without bias whose weight is divided by its largest singular value.

    Miyato et al., ICLR 2018. As in `torch.nn.utils.spectral_norm`, and with its tensor names, one
    power iteration per training pass updates the singular vectors `weight_u` and `weight_v`. In
    addition, it supports weights in half precision with vectors in float32 and computes in float32,
    and 15 initial iterations make the first passes accurate.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, in_features: int, out_features: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.is_iterating = True
        self.weight_orig = _conv(in_features, out_features, kernel_size, stride).weight
        matrix = self.weight_orig.detach().flatten(1)
        self.register_buffer(
            "weight_u", F.normalize(torch.randn(matrix.shape[0]), dim=0, eps=1e-12)
        )
        self.register_buffer(
            "weight_v", F.normalize(torch.randn(matrix.shape[1]), dim=0, eps=1e-12)
        )
        for _ in range(15):
            self._iterate(matrix)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve NCHW features with padding 1.

        A 3x3 kernel with stride 1 keeps H and W; a 4x4 kernel with stride 2 halves them.
        """
        weight = self.weight_orig.to(torch.promote_types(self.weight_orig.dtype, torch.float32))
        matrix = weight.flatten(1)
        if self.training and self.is_iterating:
            u, v = self._iterate(matrix.detach())
        else:  # copies, because later passes change the buffers before the backward pass
            u, v = (vector.to(weight.dtype, copy=True) for vector in (self.weight_u, self.weight_v))
        weight = weight / torch.dot(u, torch.mv(matrix, v))
        return F.conv2d(features, weight.to(features.dtype), stride=self.stride, padding=1)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Do one power iteration and return the new left and right singular vectors.

        The buffers are updated in their own dtype.
        """
        v = F.normalize(torch.mv(matrix.t(), self.weight_u.to(matrix.dtype)), dim=0, eps=1e-12)
        u = F.normalize(torch.mv(matrix, v), dim=0, eps=1e-12)
        self.weight_u.copy_(u)
        self.weight_v.copy_(v)
        return u, v


DISCRIMINATORS: dict[str, type[nn.Module]] = {
    "vgg": VGGDiscriminator,
    "unet": UNetDiscriminator,
}


def build_discriminator(name: str, crop: int, /, **params: Any) -> nn.Module:
    """Build the discriminator `name` for square HR crops of `crop` pixels, in float32 on the CPU.

    It is freshly initialised. `params` are the keyword arguments of the network's class. Raises
    `UserError` for an unknown network, an unknown parameter (naming the nearest one) and a value
    that the network does not accept.
    """
    names.DISCRIMINATORS.check(name, params)
    try:
        return DISCRIMINATORS[name](crop=crop, **params)
    except ValueError as error:
        raise UserError(f"discriminator {name!r}: {error}") from error
    except NOT_ALLOCATED as error:
        raise UserError(
            f"discriminator {name!r} cannot be built with {params}; is it too large? "
            f"({one_line(error)})"
        ) from error


def _conv(
    in_features: int, out_features: int, kernel_size: int, stride: int, has_bias: bool = True
) -> nn.Conv2d:
    return nn.Conv2d(in_features, out_features, kernel_size, stride, padding=1, bias=has_bias)


def _num_stages(crop: int) -> int:
    """Return how many times `crop` can be halved, rounding down, to at least 3."""
    stages = 0
    while crop >> (stages + 1) >= 3:
        stages += 1
    return stages


def _check_crop(crop: int) -> None:
    if not isinstance(crop, int) or isinstance(crop, bool) or crop < SMALLEST_CROP:
        raise ValueError(
            f"crop {crop!r} is not a whole number of at least {SMALLEST_CROP} pixels; set data.crop"
        )
