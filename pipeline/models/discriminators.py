"""The table of discriminators for GAN training, and the function that builds them.

They take NCHW RGB, uint8 0..255 or float in [0, 1], and return logits, not probabilities: the
losses apply the sigmoid. A discriminator with several scales returns a list of logits, one tensor
per scale; its loss is the mean over the scales. The initialisation is torch's default, as
published, unless a class says otherwise. The tensors of `vgg` and `unet` are named as in BasicSR's
and Real-ESRGAN's files, so that these load strictly if the shapes agree.

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
from pipeline.models.common import (
    COLOURS,
    NOT_ALLOCATED,
    BatchNorm2d,
    SpectralConv2d,
    check_choice,
    check_sizes,
)

SMALLEST_CROP = 32
LARGEST_WIDENING = 8
"""Features double from stage to stage up to this multiple of `num_features`: up to 512 for 64."""
NORMS = ("batch", "instance", "none")
HEADS = ("pool", "flatten")
FEATURE_KERNELS = (3, 5)
MOST_LEVELS = 8  # scales, or layers with stride 2
COARSEST_CROP = 16  # smallest image for a U-Net, which halves it three times
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
    was run inside stays frozen. Supports torch's batch norm classes and `SpectralConv2d`, not
    torch's spectral norm.
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
        feature_kernel: kernel size of the convolutions with stride 1: 3, as published, or 5.

    Raises:
        ValueError: an argument has an unsupported value.
    """

    def __init__(
        self,
        *,
        crop: int,
        num_features: int = 64,
        norm: str = "batch",
        head: str = "pool",
        feature_kernel: int = 3,
    ) -> None:
        super().__init__()
        _check_crop(crop)
        check_sizes(num_features=num_features)
        check_choice(NORMS, norm=norm)
        check_choice(HEADS, head=head)
        if feature_kernel not in FEATURE_KERNELS or type(feature_kernel) is not int:
            raise ValueError(f"feature_kernel {feature_kernel!r} is neither 3 nor 5")
        self.num_stages = _num_stages(crop)
        self.head_side = HEAD_SIDE if head == "pool" else crop >> self.num_stages
        self.is_pooled = head == "pool"
        features = COLOURS
        for stage in range(self.num_stages):
            wider = num_features * min(2**stage, LARGEST_WIDENING)
            # The very first convolution has a bias and no norm, as published.
            self._add(
                f"{stage}_0",
                _conv(features, wider, feature_kernel, 1, has_bias=stage == 0 or norm == "none"),
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
            features = F.leaky_relu(conv(_resized(features, across)), SLOPE)
            if self.has_skips:
                features = features + across
        for conv in (self.conv7, self.conv8):
            features = F.leaky_relu(conv(features), SLOPE)
        return self.conv9(features)


class AttentionUNetDiscriminator(nn.Module):
    """Attention U-Nets at several scales, as the paper on A-ESRGAN describes (Wei et al. 2021).

    Each scale has a U-Net of its own, which differs from `UNetDiscriminator` in its skip
    connections: an `AttentionGate` weighs the encoder's features, and the decoder's convolutions
    get them as additional channels. The first U-Net sees the images, each further one the images of
    the one before at half the size. A U-Net has 5,340,356 parameters by default.

    Args:
        crop: side of the HR crops in pixels, at least 32 and 16 at the coarsest scale; the networks
            are the same for all.
        num_features: channels at full size.
        num_scales: number of scales.

    Raises:
        ValueError: an argument has an unsupported value.
    """

    def __init__(self, *, crop: int, num_features: int = 64, num_scales: int = 2) -> None:
        super().__init__()
        check_sizes(num_features=num_features)
        _check_levels(num_scales=num_scales)
        _check_crop(crop, COARSEST_CROP << (num_scales - 1), "or a smaller num_scales")
        self.scales = nn.ModuleList(AttentionUNet(num_features) for _ in range(num_scales))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return (N, 1, h, w) logits per scale, the finest first, in the weights' dtype.

        There is one per pixel of the scale's images; real is above 0.
        """
        return _at_scales(self.scales, unit_range(images, self.scales[0].conv0.weight.dtype))


class AttentionUNet(nn.Module):
    """One scale of `AttentionUNetDiscriminator`."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        full, half, quarter, eighth = (num_features * 2**level for level in range(4))
        self.conv0 = _conv(COLOURS, full, 3, 1)
        self.conv1 = SpectralConv2d(full, half, 4, 2)
        self.conv2 = SpectralConv2d(half, quarter, 4, 2)
        self.conv3 = SpectralConv2d(quarter, eighth, 4, 2)
        self.gate4 = AttentionGate(quarter, eighth)
        self.conv4 = SpectralConv2d(eighth, quarter, 3, 1)
        self.gate5 = AttentionGate(half, 2 * quarter)
        self.conv5 = SpectralConv2d(2 * quarter, half, 3, 1)
        self.gate6 = AttentionGate(full, 2 * half)
        self.conv6 = SpectralConv2d(2 * half, full, 3, 1)
        self.conv7 = SpectralConv2d(2 * full, full, 3, 1)
        self.conv8 = SpectralConv2d(full, full, 3, 1)
        self.conv9 = _conv(full, 1, 3, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return (N, 1, H, W) logits for (N, 3, H, W) images in the weights' dtype."""
        way_down = []
        for conv in (self.conv0, self.conv1, self.conv2, self.conv3):
            features = F.leaky_relu(conv(features), SLOPE)
            way_down.append(features)
        way_up = ((self.gate4, self.conv4), (self.gate5, self.conv5), (self.gate6, self.conv6))
        for (gate, conv), across in zip(way_up, way_down[2::-1], strict=True):
            weighed = gate(across, features)
            features = F.leaky_relu(conv(_resized(features, across)), SLOPE)
            features = torch.cat((features, weighed), dim=1)
        for conv in (self.conv7, self.conv8):
            features = F.leaky_relu(conv(features), SLOPE)
        return self.conv9(features)


class AttentionGate(nn.Module):
    """Weighs an encoder's features by what the decoder knows (Oktay et al. 2018).

    Each position gets a weight from 0 to 1, computed at the size of the decoder's features.
    """

    def __init__(self, features: int, coarse_features: int) -> None:
        super().__init__()
        self.fine = SpectralConv2d(features, features, 2, 2)
        self.coarse = SpectralConv2d(coarse_features, features, 1, 1, has_bias=True)
        self.score = _conv(features, 1, 1, 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Weigh (N, C, H, W) encoder features by (N, D, H // 2, W // 2) decoder features."""
        weights = torch.sigmoid(self.score(F.relu(self.fine(fine) + self.coarse(coarse))))
        return fine * _resized(weights, fine)


class PatchDiscriminator(nn.Module):
    """PatchGAN at several scales with spectral norm, as in pix2pixHD (Wang et al. 2018).

    Each scale has a network of its own: that of pix2pix (Isola et al. 2017) with spectral norm in
    place of batch norm. It has `num_layers` 4x4 convolutions with stride 2, then two with stride 1;
    features double from layer to layer up to 8 times `num_features`. The first network sees the
    images, each further one the images of the one before at half the size. A network has 2,764,737
    parameters by default.

    Args:
        crop: side of the HR crops in pixels, large enough for one logit at the coarsest scale: at
            least 47 by default. The networks are the same for all.
        num_features: channels of the first convolution.
        num_layers: convolutions with stride 2; with 3, a logit judges 70 x 70 pixels of its scale.
        num_scales: number of scales.

    Raises:
        ValueError: an argument has an unsupported value.
    """

    def __init__(
        self, *, crop: int, num_features: int = 64, num_layers: int = 3, num_scales: int = 2
    ) -> None:
        super().__init__()
        check_sizes(num_features=num_features)
        _check_levels(num_layers=num_layers, num_scales=num_scales)
        # The convolutions with stride 2 halve, rounding down, and the others need 3 positions;
        # between the scales, sides are rounded up.
        smallest = (3 * 2**num_layers - 1) * 2 ** (num_scales - 1) + 1
        _check_crop(crop, smallest, "or a smaller num_scales or num_layers")
        self.receptive_field = 9 * 2**num_layers - 2
        """Side of the square of pixels of its scale that affects a logit."""
        self.scales = nn.ModuleList(
            _patch_network(num_features, num_layers) for _ in range(num_scales)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return (N, 1, h, w) logits per scale, the finest first, in the weights' dtype.

        There is one per patch, about 2**`num_layers` pixels apart; real is above 0.
        """
        return _at_scales(self.scales, unit_range(images, self.scales[0][0].weight.dtype))


def _patch_network(num_features: int, num_layers: int) -> nn.Sequential:
    """Build one scale of `PatchDiscriminator`."""
    layers: list[nn.Module] = [_conv(COLOURS, num_features, 4, 2), nn.LeakyReLU(SLOPE)]
    features = num_features
    for layer in range(1, num_layers + 1):
        wider = num_features * min(2**layer, LARGEST_WIDENING)
        stride = 2 if layer < num_layers else 1
        layers += [
            SpectralConv2d(features, wider, 4, stride, has_bias=True),
            nn.LeakyReLU(SLOPE),
        ]
        features = wider
    return nn.Sequential(*layers, _conv(features, 1, 4, 1))


def _at_scales(networks: nn.ModuleList, images: Tensor) -> list[Tensor]:
    """Return each network's logits: the first sees `images`, each further one half the size."""
    logits = []
    for scale, network in enumerate(networks):
        if scale:
            images = F.avg_pool2d(images, 3, 2, padding=1, count_include_pad=False)
        logits.append(network(images))
    return logits


def _resized(features: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)


DISCRIMINATORS: dict[str, type[nn.Module]] = {
    "vgg": VGGDiscriminator,
    "unet": UNetDiscriminator,
    "attention_unet": AttentionUNetDiscriminator,
    "patch": PatchDiscriminator,
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
    return nn.Conv2d(
        in_features, out_features, kernel_size, stride, (kernel_size - 1) // 2, bias=has_bias
    )


def _num_stages(crop: int) -> int:
    """Return how many times `crop` can be halved, rounding down, to at least 3."""
    stages = 0
    while crop >> (stages + 1) >= 3:
        stages += 1
    return stages


def _check_crop(crop: int, smallest: int = SMALLEST_CROP, remedy: str = "") -> None:
    smallest = max(smallest, SMALLEST_CROP)
    if not isinstance(crop, int) or isinstance(crop, bool) or crop < smallest:
        raise ValueError(
            f"crop {crop!r} is not a whole number of at least {smallest} pixels; set "
            f"{' '.join(('data.crop', remedy)).strip()}"
        )


def _check_levels(**counts: int) -> None:
    check_sizes(**counts)
    for name, count in counts.items():
        if count > MOST_LEVELS:
            raise ValueError(f"{name} {count} is above {MOST_LEVELS}")
