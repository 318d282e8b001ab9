"""How spandrel reads a network: from its tensors alone, as every program does that uses spandrel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.libraries import import_torchvision
from pipeline.models.common import COLOURS, told
from pipeline.models.spandrel_archs import (
    ARCHITECTURES,
    DEFAULTS,
    REFUSED,
    SCALE_PARAMETERS,
    UNTOLD,
    class_of,
    defaults_of,
    plain,
)

TOLERANCE = 1e-4
"""How far the network that spandrel reads may be from ours, in parts of the largest output value."""


def read(tensors: Mapping[str, Tensor]) -> Any:
    """spandrel's descriptor of the network with these tensors, its tensors its own; `None` if spandrel knows none."""
    import_torchvision()
    from spandrel import MAIN_REGISTRY

    with torch.random.fork_rng(devices=[]):
        for support in MAIN_REGISTRY.architectures("detection"):
            if support.detect(dict(tensors)):
                try:
                    return support.architecture.load(dict(tensors))
                except Exception:  # tensors that only look like this architecture's
                    return None
    return None


def read_tensors(tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any], dict[str, Tensor]] | None:
    """Scale, other arguments and tensors of the `SpandrelNetwork` in a file; `None` if spandrel does not know it.

    `ValueError` where spandrel knows it, and it is none of `ARCHITECTURES` for RGB images, or its weights are integers.
    """
    found = read(tensors)
    if found is None:
        return None
    model, arch = found.model, str(found.architecture.id)
    if type(model).__name__ == "RealPLKSR":
        arch = "RealPLKSR"
    if arch not in ARCHITECTURES:
        raise ValueError(f"is of spandrel's {arch}, which is not supported: "
                         f"{REFUSED.get(arch, 'it does not upscale photographs')}")
    if found.scale == 1 or (found.input_channels, found.output_channels) != (COLOURS, COLOURS):
        raise ValueError(f"is of spandrel's {arch}, scale {found.scale}, with {found.input_channels} channels in and "
                         f"{found.output_channels} out; scales from 2 and {COLOURS} channels are supported")
    if type(model) is not class_of(arch, found.scale):
        raise ValueError(f"is of spandrel's {type(model).__name__}, a variant of {arch} that is not supported")
    state = dict(model.state_dict())
    for name, tensor in tensors.items():  # loading casts without a word
        if name in state and state[name].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(f"is of spandrel's {arch}, but its tensor {name!r} is {tensor.dtype}; save the weights as "
                             "floating point numbers")
    usual = {**defaults_of(type(model)), **DEFAULTS.get(arch, {})}
    params = {name: plain(value) for name, value in model.hyperparameters.items()
              if name in usual and name not in SCALE_PARAMETERS and plain(value) != plain(usual[name])}
    return found.scale, {"arch": arch, **params}, state


@contextmanager
def large_weights(network: nn.Module) -> Iterator[None]:
    """Within, every trained parameter is a large random number, the same in every process; afterwards its own again.

    With fresh weights two different networks can agree: layer scales of 1e-6 and small last convolutions hide what
    lies behind them, and how much they hide is left to the seed. torch's own random numbers are left alone.
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
    """A value for a parameter with the initial value `fresh`; what begins as one large number goes on around 1."""
    noise = torch.randn(fresh.shape, generator=generator)
    if fresh.min() == fresh.max() and fresh.max() > 0.5:  # the weight of a norm, a temperature
        return 1 + 0.1 * noise
    return noise / max(1, fresh[0].numel()) ** 0.5 if fresh.dim() else noise


def compare(network: nn.Module, found: Any, scale: int, size: tuple[int, int]) -> None:
    """`ValueError` unless `network` and spandrel's reading of its tensors, `found`, upscale an image alike by `scale`.

    `size` is its height and width in pixels; the network must be in eval mode.
    """
    height, width = size
    images = torch.rand((1, COLOURS, height, width), generator=torch.Generator().manual_seed(0))
    arch = found.architecture.id
    try:
        with torch.no_grad():
            ours, theirs = network(images), found.model.eval()(images.clone())
    except Exception as error:  # each class has its own way to refuse
        raise ValueError(f"arch {arch!r} built with these parameters cannot run on images of {width}x{height} pixels "
                         f"({told(error)})") from error
    if found.scale != scale or ours.shape != (1, COLOURS, height * scale, width * scale):
        raise ValueError(f"with these parameters {arch!r} does not upscale by {scale}; choose its upsampler")
    is_same = ours.shape == theirs.shape and (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
    different = {name: value for name, value in found.model.hyperparameters.items()
                 if plain(value) != plain(network.hyperparameters.get(name))}
    if not is_same or different.keys() & set(UNTOLD.get(arch, ())):  # not the same: also where there is NaN
        raise ValueError(f"a file of {arch!r} does not tell all of these parameters, and other programs would read "
                         f"it as another network, with {different}; use these values")
