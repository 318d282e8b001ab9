"""The networks, in one table, and the one function that builds them.

A network is one file here and one line in the table. Its class, an `nn.Module`, has

- `__init__(self, *, scale, …)`: keywords only, with defaults; raises `ValueError` for what it
  refuses. Float32.
- `forward(images)`: NCHW RGB of any height and width, uint8 0..255 or float in [0, 1]
  (`images.unit_range` takes both) -> NCHW RGB `scale` times larger, in [0, 1] but for overshoot, in
  the dtype of the weights, `images` left as they are. No Python that depends on the values, or it
  cannot be compiled.
- `scale`: how many times larger the output is.
- `receptive_radius`: how many LR pixels away an output pixel still sees; tiles of large images
  overlap by so many.

It may have two static methods, by which `weights.read_network` knows its tensors in a file that
does not say what it holds:

- `recognise(shapes)`: names and shapes of tensors -> (scale, the other arguments), or `None` if
  they are not its own.
- `convert(tensors)`: the same network's tensors as another project names them -> under our names,
  or `None`.
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

    `params` are the keyword arguments of the network's class; in `colour_space` (one of
    `colour.SPACES`) it works, whatever its class. `UserError` for an unknown network, an unknown
    parameter (with the nearest real one) or a value that the network refuses.
    """
    NETWORKS.check(name, params)
    try:
        return in_colour_space(GENERATORS[name](scale=scale, **params), colour_space, scale)
    except ValueError as error:
        raise UserError(f"network {name!r}: {error}") from error
    except NOT_ALLOCATED as error:
        raise UserError(
            f"network {name!r} cannot be built with {params}, is it too large? ({one_line(error)})"
        ) from error
