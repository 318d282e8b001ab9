"""SRResNet, the generator of SRGAN, and how to know it from its tensors.

Ledig et al., "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial
Network", CVPR 2017, https://arxiv.org/abs/1609.04802. Written from the paper. Tensors are named as
in the files of Lornatang's SRGAN-PyTorch, so that these load strictly; `SRResNet.convert` knows the
names of its earlier versions.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.images import unit_range
from pipeline.models.common import (
    COLOURS,
    BatchNorm2d,
    check_scale,
    check_sizes,
    count_blocks,
    has_convolutions,
    initialise,
)

SCALES = (2, 4, 8)


class SRResNet(nn.Module):
    """SRResNet for RGB images, x2, x4 or x8. The defaults are the paper's (1,547,350 parameters at
    x4).

    Unlike the paper's, whose HR images lie in [-1, 1], this one makes images in [0, 1].

    Args:
        scale: 2, 4 or 8: one pixel-shuffle stage of x2 for each doubling.
        num_features: channels between the blocks.
        num_blocks: residual blocks; each has weights of its own.

    Raises:
        ValueError: a value outside of these.
    """

    def __init__(self, *, scale: int, num_features: int = 64, num_blocks: int = 16) -> None:
        super().__init__()
        check_scale(scale, SCALES)
        check_sizes(num_features=num_features, num_blocks=num_blocks)
        self.scale = scale
        self.conv1 = nn.Sequential(nn.Conv2d(COLOURS, num_features, 9, padding=4), nn.PReLU())
        self.trunk = nn.Sequential(*(ResidualBlock(num_features) for _ in range(num_blocks)))
        self.conv2 = nn.Sequential(
            nn.Conv2d(num_features, num_features, 3, padding=1, bias=False),
            BatchNorm2d(num_features),
        )
        self.upsampling = nn.Sequential(
            *(_upsampling_stage(num_features) for _ in range(scale.bit_length() - 1))
        )
        self.conv3 = nn.Conv2d(num_features, COLOURS, 9, padding=4)
        self._initialise()

    @property
    def receptive_radius(self) -> int:
        """How many LR pixels away an output pixel still sees: what two tiles must overlap to join
        without a seam."""
        # conv1: 4, a block: 2, conv2: 1. conv3 sees 4 HR pixels; halved and widened by 1 at each
        # stage, that is 3.
        return 4 + 2 * len(self.trunk) + 1 + 3

    def forward(self, images: Tensor) -> Tensor:
        """Upscale NCHW RGB, uint8 0..255 or float in [0, 1], to N x 3 x scale*H x scale*W in the
        weights' dtype.

        The result is in [0, 1] but for overshoot: it is not clamped (`images.to_bytes` does). In
        training mode the batch norms use the statistics of the batch, in eval mode the running
        ones.
        """
        features = self.conv1(unit_range(images, self.conv3.weight.dtype))
        features = features + self.conv2(self.trunk(features))
        return self.conv3(self.upsampling(features))

    @torch.no_grad()
    def _initialise(self) -> None:
        """Kaiming normal (fan in), biases 0, norms 1, PReLU 0.25, and a tenth of that in the last
        convolution.

        The paper names none. The features grow with every block, and full weights in the last
        convolution would make first images of values around 5 out of them.
        """
        initialise(self.modules(), 1.0)
        self.conv3.weight.mul_(0.1)

    @staticmethod
    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, dict[str, Any]] | None:
        """The scale and the other arguments of the `SRResNet` with these tensors; `None` if it is
        none."""
        stage = "upsampling.0.upsample_block.0.weight"
        if not has_convolutions(
            shapes,
            ("conv1.0.weight", "trunk.0.rcb.0.weight", "conv2.0.weight", stage, "conv3.weight"),
        ):
            return None
        num_features = shapes["conv1.0.weight"][0]
        scale = 2 ** count_blocks(shapes, "upsampling")
        if scale not in SCALES or shapes[stage][0] != 4 * num_features:
            return None
        return scale, {"num_features": num_features, "num_blocks": count_blocks(shapes, "trunk")}

    @staticmethod
    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The tensors of an earlier SRGAN-PyTorch file under today's names; `None` if it is no such
        file.

        Some of these files were trained with one block in all 16 places: they hold its tensors 16
        times, and here they become 16 blocks that begin alike. Files of networks that end in a tanh
        are not converted: their images lie in [-1, 1], and the network is another one.
        """
        has_head = any(name in tensors for name in ("conv1.0.weight", "conv_block1.0.weight"))
        has_tail = any(name in tensors for name in ("conv3.weight", "conv_block3.weight"))
        if not has_head or not has_tail or not any(name.startswith("trunk.") for name in tensors):
            return None
        converted = {_todays_name(name): tensor for name, tensor in tensors.items()}
        return None if converted.keys() == tensors.keys() else converted


class ResidualBlock(nn.Module):
    """Convolution, batch norm, PReLU, convolution, batch norm, and the input added."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.rcb = nn.Sequential(
            nn.Conv2d(num_features, num_features, 3, padding=1, bias=False),
            BatchNorm2d(num_features),
            nn.PReLU(),
            nn.Conv2d(num_features, num_features, 3, padding=1, bias=False),
            BatchNorm2d(num_features),
        )

    def forward(self, features: Tensor) -> Tensor:
        """NCHW in, the same shape out."""
        return features + self.rcb(features)


def _upsampling_stage(num_features: int) -> nn.Sequential:
    """Doubles height and width."""
    return nn.Sequential(
        OrderedDict(
            upsample_block=nn.Sequential(
                nn.Conv2d(num_features, 4 * num_features, 3, padding=1),
                nn.PixelShuffle(2),
                nn.PReLU(),
            )
        )
    )


def _todays_name(name: str) -> str:
    """A tensor's name in SRGAN-PyTorch of 2021 or 2022 -> its name in the last version, which is
    ours."""
    layers = {"conv1": 0, "bn1": 1, "prelu": 2, "conv2": 3, "bn2": 4}
    name = re.sub(r"^conv_block([123])\.", r"conv\1.", name)
    name = re.sub(r"^(trunk\.\d+)\.rc_block\.", r"\1.rcb.", name)
    name = re.sub(
        r"^(trunk\.\d+)\.(conv1|bn1|prelu|conv2|bn2)\.",
        lambda match: f"{match[1]}.rcb.{layers[match[2]]}.",
        name,
    )
    name = re.sub(
        r"^subpixel_conv\.(\d+)\.(conv|prelu)\.",
        lambda match: f"upsampling.{match[1]}.upsample_block.{0 if match[2] == 'conv' else 2}.",
        name,
    )
    # All stages in one row, three modules each.
    return re.sub(
        r"^upsampling\.(\d+)\.(weight|bias)$",
        lambda match: (
            f"upsampling.{int(match[1]) // 3}.upsample_block.{int(match[1]) % 3}.{match[2]}"
        ),
        name,
    )
