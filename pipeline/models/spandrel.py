"""Networks of the spandrel library, to train and to read: what they make opens in every program that uses spandrel.

spandrel (https://github.com/chaiNNer-org/spandrel) holds super-resolution architectures of the field and knows a
network from its tensors alone. Its code is MIT; each architecture has a licence of its own, and those of
`ARCHITECTURES` are all permissive (MIT, Apache-2.0, BSD-3-Clause, CC0). Papers and parameters are in its source,
`spandrel/architectures/<name>/`.
"""

from __future__ import annotations

import functools
import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.images import unit_range
from pipeline.models.common import COLOURS, BatchNorm2d, told
from pipeline.models.spandrel_archs import CONSTANT, CONVOLUTIONAL, MIXING, SWAPPED, arguments_of, class_of
from pipeline.models.spandrel_reading import compare, large_weights, read


@dataclass(frozen=True)
class _Facts:
    """What is known of a network from outside."""

    arch: str
    scale: int
    minimum: int
    """Smallest height and width in pixels."""
    multiple: int
    """Height and width must be a multiple of it."""


class SpandrelNetwork(nn.Module):
    """Any architecture of `ARCHITECTURES` for RGB images; an instance is one of that architecture's own class, too.

    So the tensors have the names of the architecture, and files with them open wherever spandrel is used.

    Args:
        scale: how many times larger the output is. It takes the place of the architecture's own parameter for it.
        arch: the architecture's name.
        params: the keyword arguments of its class; `DEFAULTS` go before the class's own defaults.

    Raises:
        ValueError: an unknown architecture or parameter (with the nearest real one), values that the class refuses,
            and values with which spandrel would read the file of the network as another one.
    """

    def __new__(cls, *, scale: int = 0, arch: str = "", **params: Any) -> SpandrelNetwork:
        # Copying an instance calls this with the final class and no arguments.
        return super().__new__(_mixed(class_of(arch, scale)) if cls is SpandrelNetwork else cls)

    def __init__(self, *, scale: int, arch: str, **params: Any) -> None:
        arguments = arguments_of(class_of(arch, scale), arch, scale, params)
        try:
            super().__init__(**arguments)
        except Exception as error:  # each class has its own way to refuse
            raise ValueError(f"arch {arch!r} cannot be built with {params} ({told(error)})") from error
        for name, parameter in self.named_parameters():
            if arch in CONSTANT and re.search(CONSTANT[arch], name):
                parameter.requires_grad_(False)
        for module in self.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNorm2d
            elif (arch, type(module).__name__) in SWAPPED:
                module.__class__ = SWAPPED[arch, type(module).__name__](type(module))
        if "scale" not in vars(self):
            self.scale = scale  # as every other network has; ESRGAN's own is another where it unshuffles first
        self._facts = _Facts(arch, scale, minimum=1, multiple=1)
        self._compare_with_what_spandrel_reads()

    @property
    def receptive_radius(self) -> int:
        """How many LR pixels two tiles overlap. Not exact: most of these networks see the whole image, a little."""
        return 64

    @property
    def is_convolutional(self) -> bool:
        """Whether the architecture sees equally far from every place."""
        return self._facts.arch in CONVOLUTIONAL

    @property
    def image_sizes(self) -> tuple[int, int]:
        """Of what number the architecture needs height and width to be multiples, and the smallest it takes.

        `forward` takes any; who writes the network down for another runtime has to know.
        """
        return self._facts.multiple, self._facts.minimum

    def forward(self, images: Tensor) -> Tensor:
        """Upscale NCHW RGB, uint8 0..255 or float in [0, 1], to N x 3 x scale*H x scale*W in the weights' dtype.

        An image that is too small for the architecture, or no multiple of its windows, is continued at the bottom and
        the right, mirrored, and the result cut. The result is not clamped. `UserError` for a batch of one image in
        training where the architecture normalises over the batch (DAT).
        """
        dtype = next(self.parameters()).dtype
        lr = unit_range(images, dtype)
        height, width = lr.shape[-2:]
        if self.training and self._facts.arch == "DAT" and lr.shape[0] == 1:
            raise UserError("arch 'DAT' normalises over the images of a batch and cannot train on one; set "
                            "train_micro_batch_size_per_gpu to 2 or more")
        lr = _continued(lr, self._facts)
        if lr is images:
            lr = lr.clone()  # RCAN multiplies its input in place
        mixes = self._facts.arch in MIXING and dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(lr.device.type, dtype) if mixes else nullcontext():
            sr = super().forward(lr)
        return sr[..., : height * self._facts.scale, : width * self._facts.scale].to(dtype)

    def _compare_with_what_spandrel_reads(self) -> None:
        """Let spandrel know the network from its tensors, learn from it which image sizes fit, and compare outputs.

        Some parameters leave no trace in the tensors; with another value than the usual one every program would read
        the network's file as a network that makes other images.
        """
        arch, scale = self._facts.arch, self._facts.scale
        self.eval()
        with large_weights(self):
            found = read(self.state_dict())
            if found is None:
                raise ValueError(f"with these parameters spandrel does not know its own {arch!r} from its tensors; "
                                 "change those that differ from its defaults")
            if (found.input_channels, found.output_channels) != (COLOURS, COLOURS):
                raise ValueError(f"arch {arch!r} with {found.input_channels} channels in and {found.output_channels} "
                                 f"out; images have {COLOURS}")
            sizes = found.size_requirements
            self._facts = facts = _Facts(arch, scale, sizes.minimum, sizes.multiple_of)
            side = -(-max(16, facts.minimum) // facts.multiple) * facts.multiple
            # Some are made for images of one size, some parameters tell only from one size on.
            for size in ((side, side), (side + facts.multiple, side + 2 * facts.multiple)):
                compare(self, found, scale, size)
        self.train()


@functools.cache
def _mixed(architecture: type[nn.Module]) -> type[SpandrelNetwork]:
    return type(f"Spandrel{architecture.__name__}", (SpandrelNetwork, architecture), {})


def _continued(images: Tensor, facts: _Facts) -> Tensor:
    """Images with the height and the width that an architecture needs, mirrored as far as that goes, then repeated."""
    wanted = [-(-max(side, facts.minimum) // facts.multiple) * facts.multiple for side in images.shape[-2:]]
    for mode, room in (("reflect", 1), ("replicate", None)):
        height, width = images.shape[-2:]
        below, right = wanted[0] - height, wanted[1] - width
        if room is not None:
            below, right = min(below, height - room), min(right, width - room)
        if below or right:
            images = F.pad(images, (0, right, 0, below), mode)
    return images

