"""The architectures of spandrel that can be trained here: their classes, and what has to be known of each."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cli import nearest
from pipeline.libraries import import_torchvision
from pipeline.models.common import COLOURS, check_sizes

ARCHITECTURES = ("ATD", "CRAFT", "Compact", "DAT", "DCTLSA", "DITN", "DRCT", "ESRGAN", "FDAT", "GRL", "HAT", "MoESR",
                 "MoSR", "OmniSR", "PLKSR", "RCAN", "RGT", "RealCUGAN", "RealPLKSR", "SAFMN", "SPAN", "SeemoRe",
                 "SwiftSRGAN", "Swin2SR", "SwinIR")
REFUSED = {
    "AuraSR": "its licence (CC BY-SA 4.0) binds what is made with it, and it draws noise for every image",
    "IPT": "it takes patches of one size only",
    "MMRealSR": "it learns from images whose degradation is known",
}
SCALE_PARAMETERS = ("scale", "upscale", "up_scale", "upscale_factor", "upscaling_factor")
DEFAULTS: dict[str, dict[str, Any]] = {
    "ATD": {"upsampler": "pixelshuffle"},
    "DRCT": {"upsampler": "pixelshuffle"},
    # The windows of its authors' networks, which no file tells.
    "GRL": {"upsampler": "pixelshuffle", "window_size": 32, "stripe_size": [64, 64], "stripe_shift": True,
            "anchor_window_down_factor": 4},
    "HAT": {"window_size": 16},
    "SAFMN": {"dim": 36},
    # With the norm SPAN works on values up to 255 * (1 - mean), and its first images are noise of that size.
    "SPAN": {"num_in_ch": COLOURS, "num_out_ch": COLOURS, "norm": False},
    "Swin2SR": {"upsampler": "pixelshuffle", "window_size": 8},
    "SwinIR": {"upsampler": "pixelshuffle", "window_size": 8},
}
"""Where the class of an architecture has no default, or one with which it cannot learn to upscale."""
CONSTANT = {
    "FDAT": r"\.blocks\.\d*[02468]\.inter\.sg\.|\.blocks\.\d*[13579]\.inter\.cg\.",
    "RCAN": r"^(sub|add)_mean\.",
    "SPAN": r"\.eval_conv\.",
    "SwiftSRGAN": r"^(residual\.\d+\.block2|convblock)\.act\.",
}
"""Pattern of the names of parameters that no training step uses, or (RCAN) must change: they are not trained, or an
optimizer and a check of gradients would wait for gradients that never come."""
MIXING = ("ATD", "CRAFT", "DAT", "DRCT", "GRL", "RGT", "Swin2SR", "SwinIR")
"""Architectures that make masks or positions in float32 on the way: at half precision they need autocast."""

UNTOLD = {"ATD": ("category_size",)}
"""Parameters that no file tells, and whose effect shows in large images alone."""
CONVOLUTIONAL = ("Compact", "ESRGAN", "MoSR", "PLKSR", "SPAN", "SwiftSRGAN")
"""Architectures of convolutions and arithmetic of single pixels alone, which see equally far from every place."""


def _module(arch: str) -> Any:
    """The module of an architecture."""
    import_torchvision()
    return importlib.import_module(f"spandrel.architectures.{'PLKSR' if arch == 'RealPLKSR' else arch}")


def class_of(arch: str, scale: int) -> type[nn.Module]:
    """The class of an architecture; `ValueError` if there is none."""
    if not isinstance(arch, str):
        raise ValueError(f"arch {arch!r} is not a name; write one, such as SPAN")
    if arch in REFUSED:
        raise ValueError(f"arch {arch!r} is not supported: {REFUSED[arch]}")
    if arch not in ARCHITECTURES:
        raise ValueError(f"no arch {arch!r}{nearest(arch, ARCHITECTURES)}")
    if not isinstance(scale, int) or isinstance(scale, bool) or not 2 <= scale <= 8:
        raise ValueError(f"scale {scale!r} is not a whole number from 2 to 8")
    if arch == "RealCUGAN":
        if scale > 4:
            raise ValueError(f"arch 'RealCUGAN' has no scale {scale}, but 2, 3 and 4")
        return getattr(_module(arch), f"UpCunet{scale}x")
    return getattr(_module(arch), arch)


@functools.cache
def folding(convolution: type[nn.Module]) -> type[nn.Module]:
    """SPAN's `Conv3XC`, whose three convolutions and skip fold into one for inference, without its side effect.

    The original replaces the folded weights in every forward pass; made under `torch.inference_mode`, as in a
    validation, they can never be changed again, and no average of them be kept. Here they are brought up to date when
    they are saved.
    """

    class FoldingConv(convolution):
        def folded(self) -> tuple[Tensor, Tensor]:
            first, middle, last = self.conv
            inner = torch.einsum("oayx,ai->oiyx", middle.weight, first.weight[:, :, 0, 0])
            weight = torch.einsum("oa,aiyx->oiyx", last.weight[:, :, 0, 0], inner) + F.pad(self.sk.weight, (1, 1, 1, 1))
            bias = middle.weight.sum(dim=(2, 3)) @ first.bias + middle.bias
            return weight, last.weight[:, :, 0, 0] @ bias + last.bias + self.sk.bias

        def forward(self, features: Tensor) -> Tensor:
            if self.training:
                return super().forward(features)
            out = F.conv2d(features, *self.folded(), stride=self.stride, padding=1)
            return F.leaky_relu(out, 0.05) if self.has_relu else out

        def _save_to_state_dict(self, *arguments: Any) -> None:
            with torch.no_grad():
                for parameter, value in zip(self.eval_conv.parameters(), self.folded(), strict=True):
                    parameter.copy_(value)
            super()._save_to_state_dict(*arguments)

    return FoldingConv


@functools.cache
def routing(layer: type[nn.Module]) -> type[nn.Module]:
    """SeemoRe's `MoELayer`, computing in evaluation as in training: all experts, weighted, those not chosen with 0.

    In evaluation the original looks up the experts of one image by number: of a batch it fails, and it cannot be
    compiled or run on the meta device.
    """

    class RoutingLayer(layer):
        def forward(self, features: Tensor, keys: Tensor) -> Tensor:
            weights = F.softmax(self.gate(features), dim=1, dtype=torch.float32).to(features.dtype)
            chosen = torch.topk(weights, self.num_expert)
            weights = torch.zeros_like(weights).scatter(1, chosen.indices, chosen.values)
            return features + sum(expert(features, keys) * weights[:, number, None, None, None]
                                  for number, expert in enumerate(self.experts))

    return RoutingLayer


SWAPPED = {("SPAN", "Conv3XC"): folding, ("SeemoRe", "MoELayer"): routing}
"""(architecture, class) whose place one takes here that computes the same and can do more."""


def defaults_of(architecture: type[nn.Module]) -> dict[str, Any]:
    """Parameters of a class that a file can hold (no classes or functions), with their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(architecture.__init__).parameters.items()
            if name != "self" and (parameter.default is inspect.Parameter.empty or not callable(parameter.default))}


def arguments_of(architecture: type[nn.Module], arch: str, scale: int, params: Mapping[str, Any]) -> dict[str, Any]:
    """All keyword arguments of a class for `scale`; `ValueError` for a parameter that it does not have."""
    known = defaults_of(architecture)
    own_scale = next((name for name in SCALE_PARAMETERS if name in known), None)
    known.pop(own_scale, None)
    for name in params:
        if name not in known:
            raise ValueError(f"arch {arch!r} has no parameter {name!r}{nearest(name, known)}")
    arguments = {**DEFAULTS.get(arch, {}), **params}
    # What unshuffles its input first has to upscale by that much more.
    factor = arguments.get({"ESRGAN": "shuffle_factor", "SwinIR": "start_unshuffle"}.get(arch, "")) or 1
    if factor != 1:
        check_sizes(unshuffle=factor)
        if arch == "ESRGAN":  # SwinIR reckons its channels itself
            arguments.setdefault("in_nc", COLOURS * factor**2)
    return arguments if own_scale is None else {**arguments, own_scale: scale * factor}


def plain(value: Any) -> Any:
    """A parameter as JSON holds it."""
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
