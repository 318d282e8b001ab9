"""SRVGGNetCompact ("Compact"), the small, fast generator of Real-ESRGAN.

Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data",
ICCV Workshops 2021, https://arxiv.org/abs/2107.10833; it is part of the later releases
(realesr-animevideov3, realesr-general-x4v3). Tensors are named as in their files, so that these
load strictly, and spandrel (chaiNNer, ComfyUI) opens ours as "Compact".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.images import unit_range
from pipeline.models.common import (
    COLOURS,
    check_choice,
    check_scale,
    check_sizes,
    count_blocks,
    has_convolutions,
)

SCALES = (1, 2, 3, 4)
ACTIVATIONS = ("prelu", "relu", "leakyrelu")
SLOPE = 0.25  # initial slope of PReLU below zero


class SRVGGNetCompact(nn.Module):
    """3x3 convolutions at LR size, one pixel shuffle, and the nearest-neighbour upscale added.

    At x1 there is no pixel shuffle, and the input itself is added.

    The defaults (621,424 parameters at x4) are those of realesr-animevideov3; realesr-general-x4v3
    has 32 convolutions. Other programs recognise such files only with PReLU, since the tensors do
    not reveal which of the other two activations was used; `recognise` does the same.

    Args:
        scale: 1, 2, 3 or 4.
        num_features: channels between the convolutions.
        num_conv: convolutions between the first and the last one.
        activation: "prelu" (one slope per channel), "relu" or "leakyrelu" (slope 0.1).

    Raises:
        ValueError: an argument has an unsupported value.
    """

    def __init__(
        self, *, scale: int, num_features: int = 64, num_conv: int = 16, activation: str = "prelu"
    ) -> None:
        super().__init__()
        check_scale(scale, SCALES)
        check_sizes(num_features=num_features, num_conv=num_conv)
        check_choice(ACTIVATIONS, activation=activation)
        self.scale = scale
        layers: list[nn.Module] = []
        for number in range(1 + num_conv):
            layers += [
                nn.Conv2d(num_features if number else COLOURS, num_features, 3, padding=1),
                _activation(activation, num_features),
            ]
        layers.append(nn.Conv2d(num_features, COLOURS * scale**2, 3, padding=1))
        self.body = nn.Sequential(*layers)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Use He's initialisation for PReLU, with a first output close to the nearest upscale.

        He et al., ICCV 2015. With PyTorch's default, as published, each layer shrinks the signal by
        more than half: after 200 steps on eight crops (tests/training/test_overfit.py), a network
        of 16 convolutions reaches 22 dB, and with this initialisation 44 to 56 dB, at rates of 5e-4
        to 2e-3.
        """
        convolutions = [layer for layer in self.body if isinstance(layer, nn.Conv2d)]
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, a=SLOPE)
            nn.init.zeros_(convolution.bias)
        convolutions[-1].weight.mul_(0.1)

    @property
    def receptive_radius(self) -> int:
        """Distance in LR pixels at which an input pixel can affect an output pixel.

        Tiles that overlap by this much join without seams.
        """
        return sum(isinstance(layer, nn.Conv2d) for layer in self.body)

    def forward(self, images: Tensor) -> Tensor:
        """Upscale NCHW RGB, uint8 0..255 or float in [0, 1].

        Returns (N, 3, scale*H, scale*W) in the weights' dtype, in [0, 1] except for overshoot: it
        is not clamped (`images.to_bytes` does that).
        """
        lr = unit_range(images, self.body[0].weight.dtype)
        if self.scale == 1:
            return self.body(lr) + lr
        return F.pixel_shuffle(self.body(lr), self.scale) + F.interpolate(
            lr, scale_factor=self.scale, mode="nearest"
        )

    @staticmethod
    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, dict[str, Any]] | None:
        """Return (scale, other arguments) of the `SRVGGNetCompact` with these tensors, or `None`.

        The activation is taken to be PReLU.
        """
        last = count_blocks(shapes, "body") - 1
        convolutions = [f"body.{number}.weight" for number in range(0, last + 1, 2)]
        slopes = [f"body.{number}.weight" for number in range(1, last, 2)]
        if last < 4 or last % 2 or not has_convolutions(shapes, convolutions):
            return None
        if any(len(shapes.get(name, ())) != 1 for name in slopes):
            return None
        scale = {COLOURS * scale**2: scale for scale in SCALES}.get(
            shapes[f"body.{last}.weight"][0]
        )
        if scale is None:
            return None
        return scale, {
            "num_features": shapes["body.0.weight"][0],
            "num_conv": last // 2 - 1,
            "activation": "prelu",
        }


def _activation(name: str, num_features: int) -> nn.Module:
    if name == "prelu":
        return nn.PReLU(num_features, SLOPE)
    return nn.ReLU() if name == "relu" else nn.LeakyReLU(0.1)
