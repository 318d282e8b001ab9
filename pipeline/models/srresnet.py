"""SRResNet, the generator of SRGAN.

Ledig et al., "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial
Network", CVPR 2017, https://arxiv.org/abs/1609.04802. Written from the paper. Tensors are named as
in the files of Lornatang's SRGAN-PyTorch, so that these load strictly; `SRResNet.convert` handles
the names of its earlier versions.
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

SCALES = (1, 2, 4, 8)
PARTS = {"conv1", "trunk", "conv2", "upsampling", "conv3"}


class SRResNet(nn.Module):
    """SRResNet for RGB images, x1 to x8; the paper's by default (1,547,350 parameters at x4).

    The paper's HR images are in [-1, 1]; those of this network are in [0, 1].

    Args:
        scale: 1, 2, 4 or 8, with one x2 pixel-shuffle stage per doubling, so none at x1.
        num_features: channels between the blocks.
        num_blocks: number of residual blocks, which do not share weights.

    Raises:
        ValueError: an argument has an unsupported value.
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
        """Distance in LR pixels at which an input pixel can affect an output pixel.

        Tiles that overlap by this much join without seams.
        """
        # conv1: 4; each block: 2; conv2: 1. conv3 reaches 4 HR pixels, which becomes 3 LR pixels
        # after halving and adding 1 at each stage.
        return 4 + 2 * len(self.trunk) + 1 + (3 if len(self.upsampling) else 4)

    def forward(self, images: Tensor) -> Tensor:
        """Upscale NCHW RGB, uint8 0..255 or float in [0, 1].

        Returns (N, 3, scale*H, scale*W) in the weights' dtype, in [0, 1] except for overshoot: it
        is not clamped (`images.to_bytes` does that). Batch norms use the statistics of the batch in
        training mode and the running ones in eval mode.
        """
        features = self.conv1(unit_range(images, self.conv3.weight.dtype))
        features = features + self.conv2(self.trunk(features))
        return self.conv3(self.upsampling(features))

    @torch.no_grad()
    def _initialise(self) -> None:
        """Use Kaiming normal (fan in), biases 0, norms 1 and PReLU 0.25.

        The last convolution gets a tenth of that. The paper does not specify the initialisation.
        The features grow with every block, so full weights in the last convolution would give first
        images with values around 5.
        """
        initialise(self.modules(), 1.0)
        self.conv3.weight.mul_(0.1)

    @staticmethod
    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, dict[str, Any]] | None:
        """Return (scale, other arguments) of the `SRResNet` with these tensors, or `None`."""
        if not has_convolutions(
            shapes, ("conv1.0.weight", "trunk.0.rcb.0.weight", "conv2.0.weight", "conv3.weight")
        ):
            return None
        num_features = shapes["conv1.0.weight"][0]
        scale = 2 ** count_blocks(shapes, "upsampling")
        stage = shapes.get("upsampling.0.upsample_block.0.weight", ())
        if scale not in SCALES or (scale > 1 and stage[:1] != (4 * num_features,)):
            return None
        # At x1, nothing but the missing stages tells it from a network with another upsampler.
        if not {name.split(".")[0] for name in shapes} <= PARTS:
            return None
        return scale, {"num_features": num_features, "num_blocks": count_blocks(shapes, "trunk")}

    @staticmethod
    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Rename the tensors of an earlier SRGAN-PyTorch file; `None` for other files.

        Some of these files were trained with one block used in all 16 positions. They contain its
        tensors 16 times, which become 16 blocks with equal initial weights. Files of networks that
        end in a tanh are not converted: their images are in [-1, 1], and the network is a different
        one.
        """
        has_head = any(name in tensors for name in ("conv1.0.weight", "conv_block1.0.weight"))
        has_tail = any(name in tensors for name in ("conv3.weight", "conv_block3.weight"))
        if not has_head or not has_tail or not any(name.startswith("trunk.") for name in tensors):
            return None
        converted = {_current_name(name): tensor for name, tensor in tensors.items()}
        return None if converted.keys() == tensors.keys() else converted


class ResidualBlock(nn.Module):
    """Convolution, batch norm, PReLU, convolution and batch norm, with the input added."""

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
        """Map NCHW features to the same shape."""
        return features + self.rcb(features)


def _upsampling_stage(num_features: int) -> nn.Sequential:
    """Build a stage that doubles height and width."""
    return nn.Sequential(
        OrderedDict(
            upsample_block=nn.Sequential(
                nn.Conv2d(num_features, 4 * num_features, 3, padding=1),
                nn.PixelShuffle(2),
                nn.PReLU(),
            )
        )
    )


def _current_name(name: str) -> str:
    """Map a tensor name of SRGAN-PyTorch from 2021 or 2022 to that of its last version and ours."""
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
    # All stages in one `nn.Sequential`, three modules each.
    return re.sub(
        r"^upsampling\.(\d+)\.(weight|bias)$",
        lambda match: (
            f"upsampling.{int(match[1]) // 3}.upsample_block.{int(match[1]) % 3}.{match[2]}"
        ),
        name,
    )
