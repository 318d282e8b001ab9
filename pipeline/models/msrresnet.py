"""MSRResNet: SRResNet without batch norm, which learns the difference from an interpolated image.

The network of Ledig et al., CVPR 2017, https://arxiv.org/abs/1609.04802, with the residual blocks
of Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPR Workshops
2017, https://arxiv.org/abs/1707.02921, as published in BasicSR. Tensors are named as in BasicSR's
files (MSRResNet_x4_f64b16…), so that these load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    initialise,
)
from pipeline.models.vapsr import bicubic_kernel, cubic_upscale

SCALES = (1, 2, 3, 4)
PARTS = {
    "conv_first",
    "body",
    "upconv1",
    "upconv2",
    "conv_hr",
    "conv_last",
    "residual_kernel",
}
RESIDUALS = ("bicubic", "bilinear")
SLOPE = 0.1


class MSRResNet(nn.Module):
    """MSRResNet for RGB images, x1 to x4. The defaults have 1,517,571 parameters at x4.

    Args:
        scale: 1, 2, 3 or 4. At x1 there is no upsampler.
        num_features: channels between the blocks.
        num_blocks: number of residual blocks.
        global_residual: the interpolation of the input that is added to the output. "bilinear" is
            that of BasicSR's files; "bicubic" is closer to HR, which leaves less to learn. At x1,
            both are the input itself.

    Raises:
        ValueError: an argument has an unsupported value.
    """

    def __init__(
        self,
        *,
        scale: int,
        num_features: int = 64,
        num_blocks: int = 16,
        global_residual: str = "bicubic",
    ) -> None:
        super().__init__()
        check_scale(scale, SCALES)
        check_sizes(num_features=num_features, num_blocks=num_blocks)
        check_choice(RESIDUALS, global_residual=global_residual)
        self.scale = scale
        self.conv_first = nn.Conv2d(COLOURS, num_features, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(num_features) for _ in range(num_blocks)))
        step = 2 if scale == 4 else scale
        self.pixel_shuffle = nn.PixelShuffle(step)
        self.upconv1 = (
            nn.Conv2d(num_features, num_features * step**2, 3, padding=1) if scale > 1 else None
        )
        self.upconv2 = (
            nn.Conv2d(num_features, num_features * step**2, 3, padding=1) if scale == 4 else None
        )
        self.conv_hr = nn.Conv2d(num_features, num_features, 3, padding=1)
        self.conv_last = nn.Conv2d(num_features, COLOURS, 3, padding=1)
        # None registers no tensor: files with the bilinear residual have exactly BasicSR's tensors.
        self.register_buffer(
            "residual_kernel", bicubic_kernel(scale) if global_residual == "bicubic" else None
        )
        # As published. These weights are so small that the first output differs from the
        # interpolated image by only about 1e-4.
        initialise(self.modules(), 0.1)

    @property
    def receptive_radius(self) -> int:
        """Distance in LR pixels at which an input pixel can affect an output pixel.

        Tiles that overlap by this much join without seams.
        """
        # conv_first: 1; each block: 2; conv_last, conv_hr and the upsampling convolutions together:
        # 2.
        return 1 + 2 * len(self.body) + 2

    def forward(self, images: Tensor) -> Tensor:
        """Upscale NCHW RGB, uint8 0..255 or float in [0, 1].

        Returns (N, 3, scale*H, scale*W) in the weights' dtype, in [0, 1] except for overshoot: it
        is not clamped (`images.to_bytes` does that).
        """
        lr = unit_range(images, self.conv_first.weight.dtype)
        features = self.body(F.leaky_relu(self.conv_first(lr), SLOPE))
        for stage in (self.upconv1, self.upconv2):
            if stage is not None:
                features = F.leaky_relu(self.pixel_shuffle(stage(features)), SLOPE)
        return self.conv_last(F.leaky_relu(self.conv_hr(features), SLOPE)) + self._interpolated(lr)

    def _interpolated(self, lr: Tensor) -> Tensor:
        if self.scale == 1:
            return lr
        if self.residual_kernel is not None:
            return cubic_upscale(lr, self.residual_kernel, self.scale)
        return F.interpolate(lr, scale_factor=self.scale, mode="bilinear", align_corners=False)

    @staticmethod
    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, dict[str, Any]] | None:
        """Return (scale, other arguments) of the `MSRResNet` with these tensors, or `None`."""
        if not has_convolutions(
            shapes,
            (
                "conv_first.weight",
                "body.0.conv1.weight",
                "body.0.conv2.weight",
                "conv_hr.weight",
                "conv_last.weight",
            ),
        ):
            return None
        num_features = shapes["conv_first.weight"][0]
        stage = shapes.get("upconv1.weight", (num_features,))
        step = {1: 1, 4: 2, 9: 3}.get(stage[0] / num_features)
        scale = 4 if "upconv2.weight" in shapes else step
        if step is None or (scale == 4 and step != 2) or (step == 1 and "upconv1.weight" in shapes):
            return None
        # At x1, nothing but the missing upconv1 tells it from a network with another upsampler.
        if not {name.split(".")[0] for name in shapes} <= PARTS:
            return None
        return scale, {
            "num_features": num_features,
            "num_blocks": count_blocks(shapes, "body"),
            "global_residual": "bicubic" if "residual_kernel" in shapes else "bilinear",
        }


class ResidualBlock(nn.Module):
    """Convolution, ReLU and convolution, with the input added."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_features, num_features, 3, padding=1)
        self.conv2 = nn.Conv2d(num_features, num_features, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Map NCHW features to the same shape."""
        return features + self.conv2(F.relu(self.conv1(features)))
