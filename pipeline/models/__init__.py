"""The table of generators and the function that builds them.

A network is one file here and one row in the table. Its class, an `nn.Module`, has

- `__init__(self, *, scale, …)`: keyword-only arguments with defaults; raises `ValueError` for
  values it does not accept. Builds in float32.
- `forward(images)`: NCHW RGB of any height and width, uint8 0..255 or float in [0, 1]
  (`images.unit_range` accepts both) -> NCHW RGB `scale` times larger, in [0, 1] except for
  overshoot, in the dtype of the weights. Does not change `images`. No Python branches on tensor
  values, which would prevent compilation.
- `scale`: the output's size as a multiple of the input's.
- `receptive_radius`: how far away, in LR pixels, an input pixel can affect an output pixel. Tiles
  of large images overlap by this much.

Where attention windows have a period, `tile_grid` is that period in LR pixels: tiles start at
multiples of it. `takes_any_size` is False if the class computes something from the image size in
Python, so that it can be written as ONNX for one size only.

It may have two static methods with which `weights.read_network` identifies a network by the tensors
in a file that does not describe itself:

- `recognise(shapes)`: tensor name -> shape; returns (scale, other arguments), or `None` if the
  tensors belong to another network.
- `convert(tensors)`: tensors of the same network under another project's names; returns them under
  our names, or `None`.

It may also say of its parameters:

- `UNSEEN`: those that other programs do not see in the tensors of our files -> what they assume.
- `ONLY_INITIAL`: those that determine nothing but the initial weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pipeline.cli import UserError, one_line
from pipeline.config.names import NETWORKS
from pipeline.models.colour import in_colour_space
from pipeline.models.common import NOT_ALLOCATED
from pipeline.models.compact import SRVGGNetCompact
from pipeline.models.msrresnet import MSRResNet
from pipeline.models.rrdbnet import RRDBNet
from pipeline.models.spandrel import SpandrelNetwork
from pipeline.models.srresnet import SRResNet
from pipeline.models.vapsr import VapSR

GENERATORS: dict[str, type[nn.Module]] = {
    "vapsr": VapSR,
    "srresnet": SRResNet,
    "msrresnet": MSRResNet,
    "rrdbnet": RRDBNet,
    "compact": SRVGGNetCompact,
    "spandrel": SpandrelNetwork,
}


def build_generator(
    name: str, scale: int, /, *, colour_space: str = "rgb", **params: Any
) -> nn.Module:
    """Build the generator `name` for `scale`, freshly initialised, in float32 on the CPU.

    `params` are the keyword arguments of the network's class. Any network can work in a
    `colour_space` (one of `colour.SPACES`). Raises `UserError` for an unknown network, an unknown
    parameter (naming the nearest one) and a value that the network does not accept.
    """
    NETWORKS.check(name, params)
    try:
        return in_colour_space(GENERATORS[name](scale=scale, **params), colour_space, scale)
    except ValueError as error:
        raise UserError(f"network {name!r}: {error}") from error
    except NOT_ALLOCATED as error:
        raise UserError(
            f"network {name!r} cannot be built with {params}; is it too large? ({one_line(error)})"
        ) from error


MAX_NUMBER = 512
"""Sizes that a file's description may always give."""


def build_outline(
    name: str, scale: int, params: Mapping[str, Any], most: int = MAX_NUMBER
) -> nn.Module:
    """Build the generator that a file describes, on the meta device if its class allows that.

    The numbers in a file may be anything, and a network of their size might not fit into memory.
    So no number in `params` may be larger than `most` (the largest size of the file's tensors) and
    `MAX_NUMBER`, and tensors on the meta device need no memory. Raises the errors of
    `build_generator`.
    """
    most = max(most, MAX_NUMBER)
    for key, value in params.items():
        for number in _numbers_in(value):
            if not abs(number) <= most:
                raise UserError(
                    f"its description says {key} {str(number)[:20]}, which is larger than all "
                    f"sizes of its tensors ({most}); is it damaged?"
                )
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build_generator(name, scale, **params)
        except UserError:  # wrong, or of a class that needs values, such as spandrel's
            return build_generator(name, scale, **params)


def _numbers_in(value: Any) -> Iterator[float]:
    """Yield the numbers in a JSON value."""
    if isinstance(value, (list, tuple, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers_in(inner)
    elif isinstance(value, (int, float)):
        yield value
