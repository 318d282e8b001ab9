"""How LR is made of HR. A new way is one file here, with its spec and its graph, and one row in
`KINDS`.

The specs are read by launchers, too: DALI is imported inside of functions alone.
"""

from __future__ import annotations

from pipeline.data.degradations.base import Degradation, DegradationSpec
from pipeline.data.degradations.bicubic import Bicubic
from pipeline.data.degradations.gaussian import Gaussian
from pipeline.data.degradations.paired import Paired
from pipeline.data.degradations.realesrgan import RealEsrgan

KINDS: list[type[Degradation]] = [
    Bicubic,
    Gaussian,
    RealEsrgan,
    Paired,
]


def build_degradation(spec: DegradationSpec, scale: int) -> Degradation:
    """What a recipe's `data.degradation` asks for."""
    return next(kind for kind in KINDS if kind.Spec is type(spec))(spec, scale)
