"""What a trainer tells of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """Scalars, detached, on the device."""

    losses: dict[str, Tensor]  # the generator's terms, weighted; their sum is what it minimises
    statistics: dict[str, Tensor] = field(default_factory=dict)  # whatever else is worth a curve
