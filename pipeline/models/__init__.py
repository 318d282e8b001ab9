"""The networks, in one table, and the one function that builds them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from pipeline.cli import UserError, nearest
from pipeline.models.vapsr import VapSR

GENERATORS: dict[str, type[nn.Module]] = {
    "vapsr": VapSR,
}


def build_generator(name: str, scale: int, **params: Any) -> nn.Module:
    """Build the generator `name` for `scale`, freshly initialised, in float32 on the CPU.

    `params` are the keyword arguments of the network's class. `UserError` for an unknown network, an unknown
    parameter (with the nearest real one) or a value that the network refuses.
    """
    if name not in GENERATORS:
        raise UserError(f"no network named {name!r}{nearest(name, GENERATORS)}")
    known = [parameter for parameter in inspect.signature(GENERATORS[name]).parameters if parameter != "scale"]
    for parameter in params:
        if parameter not in known:
            raise UserError(f"network {name!r} has no parameter {parameter!r}{nearest(parameter, known)}")
    try:
        return GENERATORS[name](scale=scale, **params)
    except ValueError as error:
        raise UserError(f"network {name!r}: {error}") from error
