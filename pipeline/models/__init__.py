"""The networks, in one table, and the one function that builds them.

A network is one file here and one line in the table. Its class is built by `Class(scale=…, **params)` and raises
`ValueError` for what it refuses. It may have two static methods, by which `weights.read_network` knows its tensors in
a file that does not say what it holds:

- `recognise(shapes)`: names and shapes of tensors -> (scale, the other arguments), or `None` if they are not its own.
- `convert(tensors)`: the same network's tensors as another project names them -> under our names, or `None`.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from pipeline.cli import UserError, nearest
from pipeline.models.colour import in_colour_space
from pipeline.models.compact import SRVGGNetCompact
from pipeline.models.msrresnet import MSRResNet
from pipeline.models.rrdbnet import RRDBNet
from pipeline.models.spandrel_network import SpandrelNetwork
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


def build_generator(name: str, scale: int, *, colour_space: str = "rgb", **params: Any) -> nn.Module:
    """Build the generator `name` for `scale`, freshly initialised, in float32 on the CPU.

    `params` are the keyword arguments of the network's class; in `colour_space` (one of `colour.SPACES`) it works,
    whatever its class. `UserError` for an unknown network, an unknown parameter (with the nearest real one) or a value
    that the network refuses.
    """
    if name not in GENERATORS:
        raise UserError(f"no network named {name!r}{nearest(name, GENERATORS)}")
    parameters = inspect.signature(GENERATORS[name].__init__).parameters
    known = [parameter for parameter in parameters if parameter not in ("self", "scale")] + ["colour_space"]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for parameter in params:
        if parameter not in known and not takes_any:  # a class that takes any judges by itself
            raise UserError(f"network {name!r} has no parameter {parameter!r}{nearest(parameter, known)}")
    missing = [parameter.name for parameter in parameters.values() if parameter.name not in ("self", "scale", *params)
               and parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is inspect.Parameter.empty]
    if missing:
        raise UserError(f"network {name!r} needs the parameter {missing[0]!r}")
    try:
        return in_colour_space(GENERATORS[name](scale=scale, **params), colour_space)
    except ValueError as error:
        raise UserError(f"network {name!r}: {error}") from error
