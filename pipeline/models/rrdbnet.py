"""RRDBNet, the generator of ESRGAN and Real-ESRGAN.

Wang et al., "ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks", ECCV Workshops
2018, https://arxiv.org/abs/1809.00219; x1 and x2 as in Wang et al., "Real-ESRGAN", ICCV Workshops
2021, https://arxiv.org/abs/2107.10833. Written from the papers. Tensors are named as in BasicSR's
and Real-ESRGAN's files, so that these load strictly, and spandrel (chaiNNer, ComfyUI) opens ours as
"ESRGAN".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.images import unit_range
from pipeline.models.common import (
    COLOURS,
    check_choice,
    check_positive,
    check_scale,
    check_sizes,
    count_blocks,
    has_convolutions,
    initialise,
)

UNSHUFFLE = {1: 4, 2: 2, 4: 1}
"""Scale -> factor by which the input is pixel-unshuffled before the x4 network."""
ACTIVATIONS = ("leakyrelu", "relu", "prelu")
SLOPE = 0.2
PUBLISHED_RESIDUAL_SCALE = 0.2


class RRDBNet(nn.Module):
    """RRDBNet for RGB images, x1, x2 or x4; ESRGAN's by default (16,697,987 parameters at x4).

    The network itself upscales by 4; for x2 and x1 the input is pixel-unshuffled by 2 and 4 first.
    ESRDnet, the wide and shallow variant of esrdgan, is `num_features=128, num_blocks=12,
    weight_init_scale=0.5`; with `fusion_kernel=1` its fusion is that of the RDN paper. Other
    programs open files only with `num_grow_ch=32` and both kernels 3, and compute with the
    published values of what `UNSEEN` lists. Of these, we recognise PReLU in a file without a
    description.

    Args:
        scale: 1, 2 or 4.
        num_features: channels between the blocks.
        num_blocks: number of residual-in-residual dense blocks, of three dense blocks each.
        num_grow_ch: channels added by each of the first four convolutions of a dense block.
        fusion_kernel: kernel size of a dense block's last convolution, the local feature fusion: 3
            or 1.
        hr_kernel: kernel size of the last two convolutions, at HR size: 3 or 5.
        activation: "leakyrelu" (slope 0.2), "relu", or "prelu" (a learnt slope for each layer).
        weight_init_scale: factor of the Kaiming-normal initial weights in the dense blocks.
        rdb_residual_scale: factor of a dense block's output before its input is added.
        rrdb_residual_scale: the same for three dense blocks together.

    Raises:
        ValueError: an argument has an unsupported value.
    """

    UNSEEN: ClassVar[Mapping[str, Any]] = {
        "activation": "leakyrelu",
        "rdb_residual_scale": PUBLISHED_RESIDUAL_SCALE,
        "rrdb_residual_scale": PUBLISHED_RESIDUAL_SCALE,
    }
    """Parameters that other programs do not see in the tensors -> what they assume."""
    ONLY_INITIAL = ("weight_init_scale",)
    """Parameters that determine nothing but the initial weights."""

    def __init__(
        self,
        *,
        scale: int,
        num_features: int = 64,
        num_blocks: int = 23,
        num_grow_ch: int = 32,
        fusion_kernel: int = 3,
        hr_kernel: int = 3,
        activation: str = "leakyrelu",
        weight_init_scale: float = 0.1,
        rdb_residual_scale: float = PUBLISHED_RESIDUAL_SCALE,
        rrdb_residual_scale: float = PUBLISHED_RESIDUAL_SCALE,
    ) -> None:
        super().__init__()
        check_scale(scale, tuple(UNSHUFFLE))
        check_sizes(num_features=num_features, num_blocks=num_blocks, num_grow_ch=num_grow_ch)
        check_positive(
            weight_init_scale=weight_init_scale,
            rdb_residual_scale=rdb_residual_scale,
            rrdb_residual_scale=rrdb_residual_scale,
        )
        if fusion_kernel not in (1, 3) or type(fusion_kernel) is not int:
            raise ValueError(f"fusion_kernel {fusion_kernel!r} is neither 1 nor 3")
        if hr_kernel not in (3, 5) or type(hr_kernel) is not int:
            raise ValueError(f"hr_kernel {hr_kernel!r} is neither 3 nor 5")
        check_choice(ACTIVATIONS, activation=activation)
        self.scale, self.unshuffle = scale, UNSHUFFLE[scale]
        self.conv_first = nn.Conv2d(COLOURS * self.unshuffle**2, num_features, 3, padding=1)
        self.body = nn.Sequential(
            *(
                ResidualInResidualDenseBlock(
                    num_features,
                    num_grow_ch,
                    fusion_kernel,
                    activation,
                    rdb_residual_scale,
                    rrdb_residual_scale,
                )
                for _ in range(num_blocks)
            )
        )
        self.conv_body = nn.Conv2d(num_features, num_features, 3, padding=1)
        self.conv_up1 = nn.Conv2d(num_features, num_features, 3, padding=1)
        self.conv_up2 = nn.Conv2d(num_features, num_features, 3, padding=1)
        self.conv_hr = nn.Conv2d(num_features, num_features, hr_kernel, padding=hr_kernel // 2)
        self.conv_last = nn.Conv2d(num_features, COLOURS, hr_kernel, padding=hr_kernel // 2)
        self.act_up1, self.act_up2, self.act_hr = (_activation(activation) for _ in range(3))
        # As published: a tenth of Kaiming normal in the dense blocks, PyTorch's default outside
        # them.
        initialise(self.body.modules(), weight_init_scale)

    @property
    def receptive_radius(self) -> int:
        """Distance in LR pixels at which an input pixel can affect an output pixel.

        Tiles that overlap by this much join without seams. It is a multiple of the unshuffle
        factor, so that tiles which start this far outside are unshuffled like the whole image.
        """
        # conv_first and conv_body: 1 each; a dense block: 4 and its fusion; the four last
        # convolutions: 2 together, with 5x5 kernels at HR size, too.
        fusion = self.body[0].rdb1.conv5.kernel_size[0] // 2
        folded = 2 + len(self.body) * 3 * (4 + fusion) + 2
        return folded * self.unshuffle + (self.unshuffle if self.unshuffle > 1 else 0)

    def forward(self, images: Tensor) -> Tensor:
        """Upscale NCHW RGB, uint8 0..255 or float in [0, 1].

        Returns (N, 3, scale*H, scale*W) in the weights' dtype, in [0, 1] except for overshoot: it
        is not clamped (`images.to_bytes` does that). At x2 and x1, sides that are not multiples of
        2 or 4 are padded by reflection and the result is cropped; they must be above 1 or 3 pixels.
        """
        lr = unit_range(images, self.conv_first.weight.dtype)
        height, width = lr.shape[-2:]
        features = self.conv_first(self._folded(lr))
        features = features + self.conv_body(self.body(features))
        features = F.interpolate(features, scale_factor=2, mode="nearest")
        features = self.act_up1(self.conv_up1(features))
        features = F.interpolate(features, scale_factor=2, mode="nearest")
        features = self.act_up2(self.conv_up2(features))
        sr = self.conv_last(self.act_hr(self.conv_hr(features)))
        return sr[..., : height * self.scale, : width * self.scale] if self.unshuffle > 1 else sr

    def _folded(self, lr: Tensor) -> Tensor:
        if self.unshuffle == 1:
            return lr
        missing_rows, missing_columns = (-side % self.unshuffle for side in lr.shape[-2:])
        if missing_rows or missing_columns:
            lr = F.pad(lr, (0, missing_columns, 0, missing_rows), mode="reflect")
        return F.pixel_unshuffle(lr, self.unshuffle)

    @staticmethod
    def recognise(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, dict[str, Any]] | None:
        """Return (scale, other arguments) of the `RRDBNet` with these tensors, or `None`.

        Apart from PReLU, what `UNSEEN` lists is assumed to have the published value.
        """
        dense = "body.0.rdb1"
        if any("conv1x1" in name for name in shapes):  # ESRGAN+ is another network
            return None
        if not has_convolutions(
            shapes,
            (
                "conv_first.weight",
                f"{dense}.conv1.weight",
                f"{dense}.conv5.weight",
                "conv_body.weight",
                "conv_up1.weight",
                "conv_up2.weight",
                "conv_hr.weight",
                "conv_last.weight",
            ),
        ):
            return None
        num_features, folded_colours = shapes["conv_first.weight"][:2]
        scale = {COLOURS * unshuffle**2: scale for scale, unshuffle in UNSHUFFLE.items()}.get(
            folded_colours
        )
        if scale is None:
            return None
        return scale, {
            "num_features": num_features,
            "num_blocks": count_blocks(shapes, "body"),
            "num_grow_ch": shapes[f"{dense}.conv1.weight"][0],
            "fusion_kernel": shapes[f"{dense}.conv5.weight"][2],
            "hr_kernel": shapes["conv_hr.weight"][2],
            **RRDBNet.UNSEEN,
            **({"activation": "prelu"} if "act_hr.weight" in shapes else {}),
        }

    @staticmethod
    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Rename the tensors of ESRGAN's first two codebases and of esrdgan; `None` for others.

        They named them `model.1.sub.0.RDB1.conv1.0.weight`, `RRDB_trunk.0.RDB1.conv1.weight` and
        `model.1.module.0.rdbs.0.conv1.conv.0.weight`.
        """
        if any("conv1x1" in name for name in tensors):  # ESRGAN+
            return None
        if "RRDB_trunk.0.RDB1.conv1.weight" in tensors:
            renames = _SECOND_NAMES
        elif "model.1.sub.0.RDB1.conv1.0.weight" in tensors:
            renames = {
                **_FIRST_NAMES,
                rf"model\.1\.sub\.{count_blocks(tensors, 'model.1.sub') - 1}\.": "conv_body.",
            }
        elif "model.1.module.0.rdbs.0.conv1.conv.0.weight" in tensors:
            renames = {
                **_ESRDGAN_NAMES,
                rf"model\.1\.module\.{count_blocks(tensors, 'model.1.module') - 1}\.": "conv_body.",
            }
        else:
            return None
        return {_renamed(name, renames): tensor for name, tensor in tensors.items()}


class ResidualInResidualDenseBlock(nn.Module):
    """Three dense blocks, scaled, with the input added."""

    def __init__(
        self,
        num_features: int,
        num_grow_ch: int,
        fusion_kernel: int,
        activation: str,
        rdb_residual_scale: float,
        rrdb_residual_scale: float,
    ) -> None:
        super().__init__()
        self.residual_scale = rrdb_residual_scale
        self.rdb1, self.rdb2, self.rdb3 = (
            DenseBlock(num_features, num_grow_ch, fusion_kernel, activation, rdb_residual_scale)
            for _ in range(3)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map NCHW features to the same shape."""
        return features + self.residual_scale * self.rdb3(self.rdb2(self.rdb1(features)))


class DenseBlock(nn.Module):
    """Four densely connected convolutions and a fusing fifth; scaled, with the input added."""

    def __init__(
        self,
        num_features: int,
        num_grow_ch: int,
        fusion_kernel: int,
        activation: str,
        residual_scale: float,
    ) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.conv1 = nn.Conv2d(num_features, num_grow_ch, 3, padding=1)
        self.conv2 = nn.Conv2d(num_features + num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv3 = nn.Conv2d(num_features + 2 * num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv4 = nn.Conv2d(num_features + 3 * num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv5 = nn.Conv2d(
            num_features + 4 * num_grow_ch, num_features, fusion_kernel, padding=fusion_kernel // 2
        )
        self.act1, self.act2, self.act3, self.act4 = (_activation(activation) for _ in range(4))

    def forward(self, features: Tensor) -> Tensor:
        """Map NCHW features to the same shape."""
        dense = torch.cat((features, self.act1(self.conv1(features))), dim=1)
        dense = torch.cat((dense, self.act2(self.conv2(dense))), dim=1)
        dense = torch.cat((dense, self.act3(self.conv3(dense))), dim=1)
        dense = torch.cat((dense, self.act4(self.conv4(dense))), dim=1)
        return features + self.residual_scale * self.conv5(dense)


def _activation(name: str) -> nn.Module:
    if name == "prelu":
        return nn.PReLU(init=SLOPE)
    # In place on the new output of a convolution, which halves the activation memory without
    # torch.compile.
    return nn.ReLU(inplace=True) if name == "relu" else nn.LeakyReLU(SLOPE, inplace=True)


_SECOND_NAMES = {
    r"RRDB_trunk\.(\d+)\.RDB(\d)\.": r"body.\1.rdb\2.",
    r"trunk_conv\.": "conv_body.",
    r"upconv([12])\.": r"conv_up\1.",
    r"HRconv\.": "conv_hr.",
}
# The numbers are positions in one `nn.Sequential`; at x4: upsample 2, convolve 3, activate 4,
# upsample 5 and so on.
_FIRST_NAMES = {
    r"model\.0\.": "conv_first.",
    r"model\.1\.sub\.(\d+)\.RDB(\d)\.(conv\d)\.0\.": r"body.\1.rdb\2.\3.",
    r"model\.3\.": "conv_up1.",
    r"model\.6\.": "conv_up2.",
    r"model\.8\.": "conv_hr.",
    r"model\.10\.": "conv_last.",
}
# esrdgan (https://github.com/eirikeve/esrdgan) wraps the blocks and the convolution after them in
# one module; its upsampling blocks (2 and 3) have names, and the layers after them have numbers.
_ESRDGAN_NAMES = {
    r"model\.0\.": "conv_first.",
    **{
        rf"model\.1\.module\.(\d+)\.rdbs\.{number}\.{layer}": rf"body.\1.rdb{number + 1}.{ours}."
        for number in range(3)
        for layer, ours in ((r"(conv\d)\.conv\.0\.", r"\2"), (r"LFF\.", "conv5"))
    },
    r"model\.2\.upconv\.1\.": "conv_up1.",
    r"model\.3\.upconv\.1\.": "conv_up2.",
    r"model\.4\.": "conv_hr.",
    r"model\.6\.": "conv_last.",
}


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    for pattern, replacement in renames.items():
        renamed = re.sub(rf"^{pattern}", replacement, name)
        if renamed != name:
            return renamed
    return name
