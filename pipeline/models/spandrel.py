"""Networks of the spandrel library, for training and reading.

Their files open in every program that uses spandrel (https://github.com/chaiNNer-org/spandrel),
which contains the field's super-resolution architectures and recognises a network from its tensors
alone. Its code is MIT; each architecture has its own licence, and those of `ARCHITECTURES` are all
permissive (MIT, Apache-2.0, BSD-3-Clause, CC0). Papers and parameters are in its source,
`spandrel/architectures/<name>/`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cli import UserError, nearest, one_line
from pipeline.images import unit_range
from pipeline.libraries import import_torchvision
from pipeline.models.common import (
    COLOURS,
    BatchNorm2d,
    LayerNorm,
    check_sizes,
    layer_norm,
    listed,
)
from pipeline.models.depthwise import DepthwiseConv2d, is_wrong_in_bf16

# The spandrel architectures that can be trained here: their classes and their peculiarities.


ARCHITECTURES = (
    "ATD",
    "CRAFT",
    "Compact",
    "DAT",
    "DCTLSA",
    "DITN",
    "DRCT",
    "ESRGAN",
    "FDAT",
    "GRL",
    "HAT",
    "MoESR",
    "MoSR",
    "NAFNet",
    "OmniSR",
    "PLKSR",
    "RCAN",
    "RGT",
    "RealCUGAN",
    "RealPLKSR",
    "SAFMN",
    "SCUNet",
    "SPAN",
    "SeemoRe",
    "SwiftSRGAN",
    "Swin2SR",
    "SwinIR",
)
REFUSED = {
    "AuraSR": (
        "its licence (CC BY-SA 4.0) also applies to what is made with it, and it draws noise for "
        "every image"
    ),
    "IPT": "it accepts only patches of one size",
    "MMRealSR": "it needs images whose degradation is known",
}
SCALES = {"NAFNet": (1,), "RealCUGAN": (2, 3, 4), "SCUNet": (1,)}
"""The scales of architectures that do not support all from 1 to 8."""
SCALE_PARAMETERS = ("scale", "upscale", "up_scale", "upscale_factor", "upscaling_factor")
DEFAULTS: dict[str, dict[str, Any]] = {
    "ATD": {"upsampler": "pixelshuffle"},
    "DRCT": {"upsampler": "pixelshuffle"},
    # The windows of its authors' networks, which files do not reveal.
    "GRL": {
        "upsampler": "pixelshuffle",
        "window_size": 32,
        "stripe_size": [64, 64],
        "stripe_shift": True,
        "anchor_window_down_factor": 4,
    },
    "HAT": {"window_size": 16},
    # Its authors' network of width 32 for noise (SIDD); the class itself has no blocks.
    "NAFNet": {
        "width": 32,
        "middle_blk_num": 12,
        "enc_blk_nums": [2, 2, 4, 8],
        "dec_blk_nums": [2, 2, 2, 2],
    },
    "SAFMN": {"dim": 36},
    # With its norm, SPAN works on values up to 255 * (1 - mean), and its first images are noise of
    # that magnitude.
    "SPAN": {"num_in_ch": COLOURS, "num_out_ch": COLOURS, "norm": False},
    "Swin2SR": {"upsampler": "pixelshuffle", "window_size": 8},
    "SwinIR": {"upsampler": "pixelshuffle", "window_size": 8},
}
"""Parameters without a default in the class, or with one that cannot learn to upscale."""
DEFAULTS_AT_X1: dict[str, dict[str, Any]] = {
    "ATD": {"upsampler": ""},
    "DRCT": {"upsampler": ""},
    "GRL": {"upsampler": "", "window_size": 8, "stripe_size": [8, 8]},
    "RCAN": {"unshuffle_mod": True},
    "Swin2SR": {"upsampler": ""},
    "SwinIR": {"upsampler": ""},
}
"""The same at scale 1: no upsampler, as in the authors' networks that restore, or unshuffling."""
CONSTANT = {
    "FDAT": r"\.blocks\.\d*[02468]\.inter\.sg\.|\.blocks\.\d*[13579]\.inter\.cg\.",
    "RCAN": r"^(sub|add)_mean\.",
    "SPAN": r"\.eval_conv\.",
    "SwiftSRGAN": r"^(residual\.\d+\.block2|convblock)\.act\.",
}
"""Patterns of parameters that no training step uses, or (RCAN) that must not change.

They are not trained, because an optimizer and the gradient check would wait for their gradients.
"""
NEED_AUTOCAST = ("ATD", "CRAFT", "DAT", "DRCT", "GRL", "RGT", "Swin2SR", "SwinIR")
"""Architectures that create masks or positions in float32: in half precision they need autocast."""

TILE_GRIDS = {"GRL": 64, "SCUNet": 64}
"""Period in pixels of the attention windows, downscaled levels or stripes of an architecture.

All others have a period of their `window_size` or `split_size`, or of `WINDOW` at most.
"""
WINDOW = 16
HIDDEN_PARAMETERS = {"ATD": ("category_size",)}
"""Parameters that files do not reveal and that affect only large images."""
ONE_SIZE = ("ATD", "CRAFT", "DAT", "HAT", "SAFMN", "SwinIR")
"""Architectures whose code computes masks, windows or groups from the image size in Python.

An exporter records them for the size of its example only.
"""
CONVOLUTIONAL = ("Compact", "ESRGAN", "MoSR", "PLKSR", "SPAN", "SwiftSRGAN")
"""Architectures of convolutions and pixelwise arithmetic only, with the same reach everywhere."""


def _module(arch: str) -> Any:
    """Import the module of an architecture."""
    import_torchvision()
    return importlib.import_module(
        f"spandrel.architectures.{'PLKSR' if arch == 'RealPLKSR' else arch}"
    )


def class_of(arch: str, scale: int) -> type[nn.Module]:
    """Return the class of an architecture; raise `ValueError` if it is unknown or not supported."""
    if not isinstance(arch, str):
        raise ValueError(f"arch {arch!r} is not a name; use one such as SPAN")
    if arch in REFUSED:
        raise ValueError(f"arch {arch!r} is not supported: {REFUSED[arch]}")
    if arch not in ARCHITECTURES:
        raise ValueError(f"no arch {arch!r}{nearest(arch, ARCHITECTURES)}")
    if not isinstance(scale, int) or isinstance(scale, bool) or not 1 <= scale <= 8:
        raise ValueError(f"scale {scale!r} is not a whole number from 1 to 8")
    if scale not in (scales := SCALES.get(arch, (scale,))):
        raise ValueError(f"arch {arch!r} does not support scale {scale}, only {listed(scales)}")
    if arch == "RealCUGAN":
        return getattr(_module(arch), f"UpCunet{scale}x")
    return getattr(_module(arch), arch)


@functools.cache
def folding(convolution: type[nn.Module]) -> type[nn.Module]:
    """Return SPAN's `Conv3XC` without its side effect.

    Its three convolutions and its skip fold into one convolution for inference. The original
    replaces the folded weights in every forward pass. Under `torch.inference_mode`, as in
    validation, these can never be changed again, and their average cannot be kept. Here they are
    updated when they are saved.
    """

    class FoldingConv(convolution):
        def folded(self) -> tuple[Tensor, Tensor]:
            first, middle, last = self.conv
            inner = torch.einsum("oayx,ai->oiyx", middle.weight, first.weight[:, :, 0, 0])
            weight = torch.einsum("oa,aiyx->oiyx", last.weight[:, :, 0, 0], inner) + F.pad(
                self.sk.weight, (1, 1, 1, 1)
            )
            bias = middle.weight.sum(dim=(2, 3)) @ first.bias + middle.bias
            return weight, last.weight[:, :, 0, 0] @ bias + last.bias + self.sk.bias

        def forward(self, features: Tensor) -> Tensor:
            if self.training:
                return super().forward(features)
            out = F.conv2d(features, *self.folded(), stride=self.stride, padding=1)
            return F.leaky_relu(out, 0.05) if self.has_relu else out

        def _save_to_state_dict(self, *arguments: Any) -> None:
            with torch.no_grad():
                for parameter, value in zip(
                    self.eval_conv.parameters(), self.folded(), strict=True
                ):
                    parameter.copy_(value)
            super()._save_to_state_dict(*arguments)

    return FoldingConv


@functools.cache
def routing(layer: type[nn.Module]) -> type[nn.Module]:
    """Return SeemoRe's `MoELayer` that evaluates as it trains: all experts, weighted, most by 0.

    In evaluation, the original selects the experts of one image by index: it fails for batches and
    cannot be compiled or run on the meta device.
    """

    class RoutingLayer(layer):
        def forward(self, features: Tensor, keys: Tensor) -> Tensor:
            weights = F.softmax(self.gate(features), dim=1, dtype=torch.float32).to(features.dtype)
            chosen = torch.topk(weights, self.num_expert)
            weights = torch.zeros_like(weights).scatter(1, chosen.indices, chosen.values)
            return features + sum(
                expert(features, keys) * weights[:, number, None, None, None]
                for number, expert in enumerate(self.experts)
            )

    return RoutingLayer


@functools.cache
def normalising(norm: type[nn.Module]) -> type[nn.Module]:
    """Return NAFNet's `LayerNorm2d` without its own backward pass, which cannot be compiled."""

    class ChannelNorm(norm):
        def forward(self, features: Tensor) -> Tensor:
            shape = (features.shape[1],)
            return layer_norm(
                features.permute(0, 2, 3, 1), shape, self.weight, self.bias, self.eps
            ).permute(0, 3, 1, 2)

    return ChannelNorm


@functools.cache
def grouping(attention: type[nn.Module]) -> type[nn.Module]:
    """Return ATD's `AC_MSA` with a stable sort.

    It sorts the pixels by category and attends within groups of neighbours in that order. The
    original leaves the order within a category open, and it differs between devices; here it is
    that of the image.
    """

    class StableGroups(attention):
        def forward(self, qkv: Tensor, sim: Tensor, x_size: tuple[int, int]) -> Tensor:
            batch, count, width = qkv.shape
            order = torch.sort(sim.argmax(dim=-1), dim=-1, stable=True)[1]
            tokens = _in_order(qkv, order)
            size = min(count, self.category_size)
            if missing := -count % size:  # the last group is filled by reflection
                tokens = torch.cat([tokens, tokens[:, count - missing :].flip(1)], dim=1)
            heads = (self.num_heads, width // 3 // self.num_heads)
            query, key, value = tokens.reshape(batch, -1, size, 3, *heads).permute(3, 0, 1, 4, 2, 5)
            scale = self.logit_scale.clamp(max=math.log(100)).exp()
            attended = torch.softmax(query @ key.transpose(-2, -1) * scale, dim=-1) @ value
            attended = attended.transpose(2, 3).reshape(batch, -1, width // 3)[:, :count]
            return self.proj(_in_order(attended, order.argsort(dim=-1)))

    return StableGroups


def _in_order(tokens: Tensor, order: Tensor) -> Tensor:
    """Return tokens (batch, count, channels) in an order (batch, count)."""
    return tokens.gather(1, order[..., None].expand_as(tokens))


REPLACED_CLASSES = {
    ("ATD", "AC_MSA"): grouping,
    ("NAFNet", "LayerNorm2d"): normalising,
    ("SPAN", "Conv3XC"): folding,
    ("SeemoRe", "MoELayer"): routing,
}
"""(architecture, class) -> function that returns an equivalent, more capable class."""


def defaults_of(architecture: type[nn.Module]) -> dict[str, Any]:
    """Return the parameters of a class, with defaults, that a file can hold.

    Those are the ones that are not classes or functions.
    """
    return {
        name: parameter.default
        for name, parameter in inspect.signature(architecture.__init__).parameters.items()
        if name != "self"
        and (parameter.default is inspect.Parameter.empty or not callable(parameter.default))
    }


def usual_arguments(architecture: type[nn.Module], arch: str, scale: int) -> dict[str, Any]:
    """Return the parameters of a class with the defaults that `SpandrelNetwork` uses."""
    return {**defaults_of(architecture), **_own_defaults(arch, scale)}


def _own_defaults(arch: str, scale: int) -> dict[str, Any]:
    return {**DEFAULTS.get(arch, {}), **(DEFAULTS_AT_X1.get(arch, {}) if scale == 1 else {})}


def arguments_of(
    architecture: type[nn.Module], arch: str, scale: int, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all keyword arguments of a class for `scale`.

    Raises `ValueError` for a parameter that the class does not have.
    """
    known = defaults_of(architecture)
    own_scale = next((name for name in SCALE_PARAMETERS if name in known), None)
    known.pop(own_scale, None)
    for name in params:
        if name not in known:
            raise ValueError(f"arch {arch!r} has no parameter {name!r}{nearest(name, known)}")
    arguments = {**_own_defaults(arch, scale), **params}
    # A network that unshuffles its input must upscale by that much more.
    factor = (
        arguments.get({"ESRGAN": "shuffle_factor", "SwinIR": "start_unshuffle"}.get(arch, "")) or 1
    )
    if factor != 1:
        check_sizes(unshuffle=factor)
        if arch == "ESRGAN":  # SwinIR computes its channels itself
            arguments.setdefault("in_nc", COLOURS * factor**2)
    return arguments if own_scale is None else {**arguments, own_scale: scale * factor}


def plain(value: Any) -> Any:
    """Convert a parameter to JSON types."""
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# How spandrel, and every program that uses it, reads a network: from its tensors alone.


TOLERANCE = 1e-4
"""Largest difference between spandrel's and our outputs, relative to the largest value."""


def read(tensors: Mapping[str, Tensor]) -> Any:
    """Return spandrel's descriptor of the network with these tensors, or `None` if it is unknown.

    The network gets its own copy of the tensors.
    """
    import_torchvision()
    from spandrel import MAIN_REGISTRY

    with torch.random.fork_rng(devices=[]):
        for support in MAIN_REGISTRY.architectures("detection"):
            if support.detect(dict(tensors)):
                try:
                    return support.architecture.load(dict(tensors))
                except Exception:  # the tensors only resemble this architecture's
                    return None
    return None


def read_tensors(
    tensors: Mapping[str, Tensor],
) -> tuple[int, dict[str, Any], dict[str, Tensor]] | None:
    """Return scale, other arguments and tensors of the `SpandrelNetwork` in a file.

    Returns `None` if spandrel does not recognise it. Raises `ValueError` if it does, but the
    network is not one of `ARCHITECTURES` for RGB images, or its weights are integers.
    """
    found = read(tensors)
    if found is None:
        return None
    model, arch = found.model, str(found.architecture.id)
    if type(model).__name__ == "RealPLKSR":
        arch = "RealPLKSR"
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"holds spandrel's {arch}, which is not supported: "
            f"{REFUSED.get(arch, 'it is not one of those that can be trained here')}"
        )
    if (found.input_channels, found.output_channels) != (COLOURS, COLOURS):
        raise ValueError(
            f"holds spandrel's {arch}, scale {found.scale}, with {found.input_channels} input and "
            f"{found.output_channels} output channels; only {COLOURS} channels are supported"
        )
    if type(model) is not class_of(arch, found.scale):
        raise ValueError(
            f"holds spandrel's {type(model).__name__}, a variant of {arch} that is not supported"
        )
    state = dict(model.state_dict())
    for name, tensor in tensors.items():  # loading would cast silently
        if name in state and state[name].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(
                f"holds spandrel's {arch}, but its tensor {name!r} is {tensor.dtype}; save the "
                "weights as floating-point numbers"
            )
    usual = usual_arguments(type(model), arch, found.scale)
    params = {
        name: plain(value)
        for name, value in model.hyperparameters.items()
        if name in usual and name not in SCALE_PARAMETERS and plain(value) != plain(usual[name])
    }
    return found.scale, {"arch": arch, **params}, state


@contextmanager
def large_weights(network: nn.Module) -> Iterator[None]:
    """Temporarily replace every trained parameter with a large random number, then restore it.

    The numbers are the same in every process, and torch's own random state is not changed. With
    fresh weights, two different networks can agree: layer scales of 1e-6 and small last
    convolutions hide what precedes them, by an amount that depends on the seed.
    """
    generator = torch.Generator().manual_seed(0)
    own = [(parameter, parameter.detach().clone()) for parameter in network.parameters()]
    try:
        with torch.no_grad():
            for parameter, value in own:
                if value.numel() and parameter.requires_grad:
                    parameter.copy_(_large(value, generator))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in own:
                parameter.copy_(value)


def _large(fresh: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random value for a parameter with the initial value `fresh`.

    A parameter that is initialised with one large number stays around 1.
    """
    noise = torch.randn(fresh.shape, generator=generator)
    # E.g. the weight of a norm, or a temperature
    if fresh.min() == fresh.max() and fresh.max() > 0.5:
        return 1 + 0.1 * noise
    return noise / max(1, fresh[0].numel()) ** 0.5 if fresh.dim() else noise


def compare(network: nn.Module, found: Any, scale: int, size: tuple[int, int]) -> None:
    """Raise `ValueError` unless `network` and spandrel's `found` give the same result.

    `found` is what spandrel reads from the network's tensors. `scale` is the upscaling factor,
    `size` the image's (height, width) in pixels; the network must be in eval mode.
    """
    height, width = size
    images = torch.rand((1, COLOURS, height, width), generator=torch.Generator().manual_seed(0))
    arch = found.architecture.id
    try:
        with torch.no_grad():
            ours, theirs = network(images), found.model.eval()(images.clone())
    except Exception as error:  # each class raises its own errors
        raise ValueError(
            f"arch {arch!r} built with these parameters cannot run on images of {width}x{height} "
            f"pixels ({one_line(error)})"
        ) from error
    if found.scale != scale or ours.shape != (1, COLOURS, height * scale, width * scale):
        size = "changes the size" if scale == 1 else f"does not upscale by {scale}"
        raise ValueError(f"with these parameters {arch!r} {size}; choose its upsampler")
    is_same = _agree(ours, theirs)
    if not is_same and ours.shape == theirs.shape:
        # Networks that work on [0, 255], such as the released SPANs, differ by more through
        # rounding alone.
        with suppress(RuntimeError), torch.no_grad():  # some create tensors in float32
            precise = images.double()
            is_same = _agree(network.double()(precise), found.model.double()(precise.clone()))
        network.float()
        found.model.float()
    different = {
        name: value
        for name, value in found.model.hyperparameters.items()
        if plain(value) != plain(network.hyperparameters.get(name))
    }
    # With NaN, `is_same` is False.
    if not is_same or different.keys() & set(HIDDEN_PARAMETERS.get(arch, ())):
        raise ValueError(
            f"a file of {arch!r} does not reveal all of these parameters; other programs would "
            f"read it as another network, with {different}; use these values"
        )


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    return bool(
        ours.shape == theirs.shape and (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
    )


@dataclass(frozen=True)
class _Traits:
    """Properties of a network for its users."""

    arch: str
    scale: int
    minimum: int
    """Smallest supported height and width in pixels."""
    multiple: int
    """Height and width must be multiples of this."""


class SpandrelNetwork(nn.Module):
    """Any architecture of `ARCHITECTURES` for RGB images.

    An instance is also an instance of the architecture's own class. Tensors therefore have the
    architecture's names, and files with them open wherever spandrel is used.

    Args:
        scale: the upscaling factor; replaces the architecture's own parameter for it.
        arch: the architecture's name.
        params: keyword arguments of its class; `DEFAULTS` take precedence over the class's
            defaults.

    Raises:
        ValueError: an unknown architecture or parameter (naming the nearest one), values that the
            class rejects, and values with which spandrel would read the network's file as another
            network.
    """

    def __new__(cls, *, scale: int = 0, arch: str = "", **params: Any) -> SpandrelNetwork:
        # Copying an instance calls this with the final class and no arguments.
        return super().__new__(_mixed(class_of(arch, scale)) if cls is SpandrelNetwork else cls)

    def __init__(self, *, scale: int, arch: str, **params: Any) -> None:
        arguments = arguments_of(class_of(arch, scale), arch, scale, params)
        try:
            super().__init__(**arguments)
        except Exception as error:  # each class raises its own errors
            raise ValueError(
                f"arch {arch!r} cannot be built with {params} ({one_line(error)})"
            ) from error
        for name, parameter in self.named_parameters():
            if arch in CONSTANT and re.search(CONSTANT[arch], name):
                parameter.requires_grad_(False)
        for module in self.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNorm2d
            elif type(module) is nn.LayerNorm:
                module.__class__ = LayerNorm
            elif type(module) is nn.Conv2d and is_wrong_in_bf16(module):
                module.__class__ = DepthwiseConv2d
        _replace_classes(self, arch)
        if "scale" not in vars(self):
            # As in all other networks. ESRGAN has its own attribute, which differs if it
            # unshuffles.
            self.scale = scale
        self._traits = _Traits(arch, scale, minimum=1, multiple=1)
        self._verify_with_spandrel()

    @property
    def receptive_radius(self) -> int:
        """Overlap of tiles in LR pixels.

        It is not exact: most of these networks depend slightly on the whole image.
        """
        return 64

    @property
    def tile_grid(self) -> int:
        """Tiles must start at multiples of it, so that windows have the whole image's grid."""
        if self.is_convolutional:
            return 1
        window = self.hyperparameters.get("window_size", WINDOW)
        grid = TILE_GRIDS.get(self._traits.arch, window if isinstance(window, int) else WINDOW)
        return math.lcm(grid, *self.hyperparameters.get("split_size", ()))  # DAT, RGT

    @property
    def is_convolutional(self) -> bool:
        """Whether the architecture's reach is the same at every position."""
        return self._traits.arch in CONVOLUTIONAL

    @property
    def takes_any_size(self) -> bool:
        """Whether exporters can write the network for images of any size."""
        return self._traits.arch not in ONE_SIZE

    @property
    def image_sizes(self) -> tuple[int, int]:
        """(multiple, minimum) of the heights and widths that the architecture supports.

        `forward` accepts any size; exporters for other runtimes need these numbers.
        """
        return self._traits.multiple, self._traits.minimum

    def forward(self, images: Tensor) -> Tensor:
        """Upscale NCHW RGB, uint8 0..255 or float in [0, 1].

        Returns (N, 3, scale*H, scale*W) in the weights' dtype, not clamped. An image that is too
        small for the architecture, or not a multiple of its windows, is padded at the bottom and
        the right by reflection, and the result is cropped. Raises `UserError` for a batch of one
        image in training if the architecture normalises over the batch (DAT).
        """
        dtype = next(self.parameters()).dtype
        lr = unit_range(images, dtype)
        height, width = lr.shape[-2:]
        if self.training and self._traits.arch == "DAT" and lr.shape[0] == 1:
            raise UserError(
                "arch 'DAT' normalises over the images of a batch and cannot train on one; set "
                "train_micro_batch_size_per_gpu to 2 or more"
            )
        lr = _padded(lr, self._traits)
        if lr is images:
            lr = lr.clone()  # RCAN multiplies its input in place
        is_half = dtype in (torch.float16, torch.bfloat16)
        needs_autocast = is_half and self._traits.arch in NEED_AUTOCAST
        with torch.autocast(lr.device.type, dtype) if needs_autocast else nullcontext():
            sr = super().forward(lr)
        return sr[..., : height * self._traits.scale, : width * self._traits.scale].to(dtype)

    def _verify_with_spandrel(self) -> None:
        """Check that spandrel reads the same network from its tensors, and get its image sizes.

        Some parameters leave no trace in the tensors; with an unusual value, every program would
        read the network's file as a network with different outputs.
        """
        arch, scale = self._traits.arch, self._traits.scale
        self.eval()
        with large_weights(self):
            found = read(self.state_dict())
            if found is None:
                raise ValueError(
                    f"with these parameters, spandrel does not recognise its own {arch!r} from "
                    "the tensors; change those that differ from its defaults"
                )
            if (found.input_channels, found.output_channels) != (COLOURS, COLOURS):
                raise ValueError(
                    f"arch {arch!r} with {found.input_channels} input and {found.output_channels} "
                    f"output channels; images have {COLOURS}"
                )
            if arch == "ATD":  # its own order of equal categories is arbitrary
                _replace_classes(found.model, arch)
            sizes = found.size_requirements
            self._traits = traits = _Traits(arch, scale, sizes.minimum, sizes.multiple_of)
            side = -(-max(16, traits.minimum) // traits.multiple) * traits.multiple
            # Some architectures are built for one image size, and some parameters have an effect
            # only above a certain size.
            for size in ((side, side), (side + traits.multiple, side + 2 * traits.multiple)):
                compare(self, found, scale, size)
        self.train()


def _replace_classes(network: nn.Module, arch: str) -> None:
    for module in network.modules():
        if (arch, type(module).__name__) in REPLACED_CLASSES:
            module.__class__ = REPLACED_CLASSES[arch, type(module).__name__](type(module))


@functools.cache
def _mixed(architecture: type[nn.Module]) -> type[SpandrelNetwork]:
    return type(f"Spandrel{architecture.__name__}", (SpandrelNetwork, architecture), {})


def _padded(images: Tensor, traits: _Traits) -> Tensor:
    """Pad images to the size that an architecture needs: by reflection, then by replication."""
    target = [
        -(-max(side, traits.minimum) // traits.multiple) * traits.multiple
        for side in images.shape[-2:]
    ]
    for mode, margin in (("reflect", 1), ("replicate", None)):
        height, width = images.shape[-2:]
        below, right = target[0] - height, target[1] - width
        if margin is not None:
            below, right = min(below, height - margin), min(right, width - margin)
        if below or right:
            images = F.pad(images, (0, right, 0, below), mode)
    return images
