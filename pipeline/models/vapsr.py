"""VapSR: super-resolution by vast-receptive-field pixel attention.

Zhou et al., "Efficient Image Super-Resolution using Vast-Receptive-Field Attention", ECCV Workshops
2022, https://arxiv.org/abs/2210.05960. Written from the paper. The tensors have the names of the
released files, so that these load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.images import unit_range
from pipeline.models.common import COLOURS, LayerNorm, check_sizes
from pipeline.models.depthwise import same_size

SCALES = (1, 2, 3, 4)
RESIDUALS = ("none", "bicubic")
VALUE_RANGES = ("unit", "signed")


class VapSR(nn.Module):
    """VapSR for RGB images, x1 to x4. The defaults are the paper's (342,220 parameters at x4).

    VapSR-S, the paper's small one, is `num_features=32, num_blocks=11, conv_groups=2` (154,956
    parameters at x4).

    Args:
        scale: 1, 2, 3 or 4. At x1, one convolution takes the place of the upsampler.
        num_features: channels between the blocks.
        num_attention_features: channels within the attention.
        num_blocks: number of attention blocks; each extends the reach by 8 LR pixels on every side.
        conv_groups: groups of the convolution after the blocks.
        projection_kernel: kernel size of the projection into the attention: 1 as in the paper, or 3
            for a larger reach (VapSR-3x3).
        upsampler_features: channels of the upsampler's first convolution. `None` is 64 at x4 (as in
            the released file) and 56 at x2 and x3 (the released files' width from memory; files
            with another width load as well). x1 has none.
        global_residual: "bicubic" adds the cubic upscale of the input to the output, so that the
            network learns only the difference and training starts at bicubic quality; "none" is the
            paper's. At x1, the input itself is added.
        value_range: the range that the convolutions work on: "unit" is [0, 1] as in the paper,
            "signed" is [-1, 1]. The network's input and output are in [0, 1] either way.

    Raises:
        ValueError: an argument has an unsupported value.
    """

    def __init__(
        self,
        *,
        scale: int,
        num_features: int = 48,
        num_attention_features: int = 64,
        num_blocks: int = 21,
        conv_groups: int = 1,
        projection_kernel: int = 1,
        upsampler_features: int | None = None,
        global_residual: str = "none",
        value_range: str = "unit",
    ) -> None:
        super().__init__()
        if scale == 1 and upsampler_features is not None:
            raise ValueError(
                f"upsampler_features {upsampler_features!r}: x1 has no upsampler; omit it"
            )
        if upsampler_features is None:
            upsampler_features = 64 if scale == 4 else 56
        _check_sizes(
            scale,
            num_features,
            num_attention_features,
            num_blocks,
            conv_groups,
            projection_kernel,
            upsampler_features,
        )
        if global_residual not in RESIDUALS:
            raise ValueError(f"global_residual {global_residual!r} is neither 'none' nor 'bicubic'")
        if value_range not in VALUE_RANGES:
            raise ValueError(f"value_range {value_range!r} is neither 'unit' nor 'signed'")
        self.scale = scale
        self.is_signed = value_range == "signed"
        self.conv_first = nn.Conv2d(COLOURS, num_features, 3, padding=1)
        self.body = nn.Sequential(
            *(
                AttentionBlock(num_features, num_attention_features, projection_kernel)
                for _ in range(num_blocks)
            )
        )
        self.conv_body = nn.Conv2d(num_features, num_features, 3, padding=1, groups=conv_groups)
        self.upsampler = _upsampler(num_features, upsampler_features, scale)
        # None registers no tensor: files without the residual have exactly the paper's tensors.
        kernel = bicubic_kernel(scale) if global_residual == "bicubic" else None
        self.register_buffer("residual_kernel", kernel)
        self._initialise()

    @property
    def receptive_radius(self) -> int:
        """Distance in LR pixels at which an input pixel can affect an output pixel.

        Tiles that overlap by this much join without seams.
        """
        # conv_first, conv_body and the upsampler's convolutions, one at x1 and otherwise two (the
        # second at LR size or larger): 1 each. A block: 2 (depthwise) + 6 (dilated) + the
        # projection.
        projection = self.body[0].proj_1.kernel_size[0] // 2
        return (3 if self.scale == 1 else 4) + len(self.body) * (2 + 6 + projection)

    def forward(self, images: Tensor) -> Tensor:
        """Upscale NCHW RGB, uint8 0..255 or float in [0, 1].

        Returns (N, 3, scale*H, scale*W) in the weights' dtype, in [0, 1] except for overshoot: it
        is not clamped (`images.to_bytes` does that).
        """
        lr = unit_range(images, self.conv_first.weight.dtype)
        if self.is_signed:
            lr = lr * 2 - 1
        features = self.conv_first(lr)
        features = features + self.conv_body(self.body(features))
        sr = self.upsampler(features)
        if self.residual_kernel is not None:
            sr = sr + cubic_upscale(lr, self.residual_kernel, self.scale)
        return (sr + 1) / 2 if self.is_signed else sr

    @staticmethod
    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, dict[str, Any]] | None:
        """Return (scale, other arguments) of the `VapSR` with these tensors, or `None`.

        The value range leaves no trace in the tensors. 3x3 projections without a residual are
        assumed to be "signed": such files without a description come from the project that
        introduced VapSR-3x3 (catid/upsampling), whose network takes bytes and works on [-1, 1].
        """
        signature = (
            "conv_first.weight",
            "body.0.proj_1.weight",
            "body.0.atten_branch.depthwise_dilated.weight",
            "conv_body.weight",
            "upsampler.0.weight",
        )
        if any(len(shapes.get(name, ())) != 4 for name in signature):
            return None
        if "upsampler.3.weight" in shapes:
            scale = 4
        elif last := shapes.get("upsampler.2.weight"):
            scale = {12: 2, 27: 3}.get(last[0])
        else:
            scale = {COLOURS: 1}.get(shapes["upsampler.0.weight"][0])
        if scale is None:
            return None
        num_attention_features, num_features, projection_kernel = shapes["body.0.proj_1.weight"][:3]
        blocks = {name.split(".")[1] for name in shapes if name.startswith("body.")}
        has_residual = "residual_kernel" in shapes
        return scale, {
            "num_features": num_features,
            "num_attention_features": num_attention_features,
            "num_blocks": len(blocks),
            "conv_groups": num_features // max(1, shapes["conv_body.weight"][1]),
            "projection_kernel": projection_kernel,
            "upsampler_features": None if scale == 1 else shapes["upsampler.0.weight"][0],
            "global_residual": "bicubic" if has_residual else "none",
            "value_range": "signed" if projection_kernel == 3 and not has_residual else "unit",
        }

    @torch.no_grad()
    def _initialise(self) -> None:
        """Use Kaiming normal (fan in, gain 1) for convolutions, 0.1 for norms, 0 for biases.

        The norms' value is the paper's. With the residual, the last convolution starts at 0, so
        that the first output is exactly bicubic; in the first step only that layer has a gradient,
        and from the second step on every layer has one. The convolutions before and after the
        blocks then have a tenth of their weights. Without the residual, small weights outside the
        blocks would cost 1.8 dB after a minute of training (benchmarks/quality.py start).
        """
        small = ("conv_first", "conv_body") if self.residual_kernel is not None else ()
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
                if name.startswith(small):
                    module.weight.mul_(0.1)
            elif isinstance(module, nn.LayerNorm):
                nn.init.constant_(module.weight, 0.1)
                nn.init.zeros_(module.bias)
        if self.residual_kernel is not None:
            nn.init.zeros_(
                [module for module in self.upsampler if isinstance(module, nn.Conv2d)][-1].weight
            )


class PixelAttention(nn.Module):
    """Attention per pixel and channel, with a 17x17 field.

    Three convolutions: 1x1, depthwise 5x5, and depthwise 5x5 with dilation 3.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(num_features, num_features, 1)
        self.depthwise = same_size(num_features, 5)
        self.depthwise_dilated = same_size(num_features, 5, dilation=3)

    def forward(self, features: Tensor) -> Tensor:
        """Multiply NCHW features by their attention; the shape stays the same."""
        return features * self.depthwise_dilated(self.depthwise(self.pointwise(features)))


class AttentionBlock(nn.Module):
    """Projection, GELU, attention and projection, the input added, and a norm over channels."""

    def __init__(
        self, num_features: int, num_attention_features: int, projection_kernel: int
    ) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(
            num_features, num_attention_features, projection_kernel, padding=projection_kernel // 2
        )
        self.atten_branch = PixelAttention(num_attention_features)
        self.proj_2 = nn.Conv2d(num_attention_features, num_features, 1)
        self.pixel_norm = LayerNorm(num_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map NCHW features to the same shape."""
        features = features + self.proj_2(self.atten_branch(F.gelu(self.proj_1(features))))
        # The two permutes are views; channels_last tensors are not copied.
        return self.pixel_norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def bicubic_kernel(scale: int) -> Tensor:
    """Return the cubic (Keys, a = -0.5) upscale as one depthwise kernel, (3*scale**2, 1, 5, 5).

    Each of the scale**2 positions within an LR pixel has its own 5x5 taps, in the order of
    `pixel_shuffle`. The dtype is float32. At scale 1, the only tap is 1, (3, 1, 1, 1).
    """
    if scale == 1:
        return torch.ones(COLOURS, 1, 1, 1)
    # The centre of HR pixel p of LR pixel 0 is at (p + 0.5) / scale - 0.5; its taps are the LR
    # pixels -2..2.
    centres = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5
    distances = (torch.arange(-2, 3, dtype=torch.float64) - centres[:, None]).abs()
    near = 1.5 * distances**3 - 2.5 * distances**2 + 1
    far = -0.5 * distances**3 + 2.5 * distances**2 - 4 * distances + 2
    taps = torch.where(distances <= 1, near, torch.where(distances < 2, far, 0.0))  # (scale, 5)
    planes = torch.einsum("yi,xj->yxij", taps, taps).reshape(scale * scale, 1, 5, 5)
    return planes.repeat(COLOURS, 1, 1, 1).float()


def cubic_upscale(lr: Tensor, kernel: Tensor, scale: int) -> Tensor:
    """Upscale float NCHW RGB with a `bicubic_kernel` of `scale`, replicating border pixels.

    Equals `images.cubic_resize` except for the outermost LR pixels, where that renormalises
    instead. At scale 1, returns `lr` itself.
    """
    if scale == 1:
        return lr
    padded = F.pad(lr, (2, 2, 2, 2), mode="replicate")
    return F.pixel_shuffle(F.conv2d(padded, kernel.to(lr.dtype), groups=COLOURS), scale)


def _upsampler(num_features: int, upsampler_features: int, scale: int) -> nn.Sequential:
    if scale == 1:
        return nn.Sequential(nn.Conv2d(num_features, COLOURS, 3, padding=1))
    if scale == 4:
        return nn.Sequential(
            nn.Conv2d(num_features, upsampler_features, 3, padding=1),
            nn.PixelShuffle(2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(upsampler_features // 4, COLOURS * 4, 3, padding=1),
            nn.PixelShuffle(2),
        )
    return nn.Sequential(
        nn.Conv2d(num_features, upsampler_features, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(upsampler_features, COLOURS * scale * scale, 3, padding=1),
        nn.PixelShuffle(scale),
    )


def _check_sizes(
    scale: int,
    num_features: int,
    num_attention_features: int,
    num_blocks: int,
    conv_groups: int,
    projection_kernel: int,
    upsampler_features: int,
) -> None:
    if scale not in SCALES or not isinstance(scale, int):
        raise ValueError(f"scale {scale!r} is not one of 1, 2, 3 and 4")
    check_sizes(
        num_features=num_features,
        num_attention_features=num_attention_features,
        num_blocks=num_blocks,
        conv_groups=conv_groups,
        projection_kernel=projection_kernel,
        upsampler_features=upsampler_features,
    )
    if num_features % conv_groups:
        raise ValueError(
            f"num_features {num_features} is not a multiple of conv_groups {conv_groups}"
        )
    if projection_kernel not in (1, 3):
        raise ValueError(f"projection_kernel {projection_kernel!r} is neither 1 nor 3")
    if scale == 4 and upsampler_features % 4:
        raise ValueError(
            f"upsampler_features {upsampler_features} is not a multiple of 4, which x4 needs"
        )
