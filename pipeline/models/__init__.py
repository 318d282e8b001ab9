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

It may have two static methods with which `weights.read_network` identifies a network by the tensors
in a file that does not describe itself:

- `recognise(shapes)`: tensor name -> shape; returns (scale, other arguments), or `None` if the
  tensors belong to another network.
- `convert(tensors)`: tensors of the same network under another project's names; returns them under
  our names, or `None`.
"""

from __future__ import annotations

from typing import Any

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
