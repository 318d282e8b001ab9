"""Ways of making LR from HR: one file per degradation with its spec and graph, one row in `KINDS`.

Launchers read the specs too, so DALI is imported only inside functions.
"""

from __future__ import annotations

from pipeline.data.degradations.base import Degradation, DegradationSpec
from pipeline.data.degradations.bicubic import Bicubic
from pipeline.data.degradations.chain import Chain
from pipeline.data.degradations.gaussian import Gaussian
from pipeline.data.degradations.paired import Paired
from pipeline.data.degradations.realesrgan import RealEsrgan

KINDS: list[type[Degradation]] = [
    Bicubic,
    Gaussian,
    RealEsrgan,
    Paired,
    Chain,
]


def build_degradation(spec: DegradationSpec, scale: int) -> Degradation:
    """Build the degradation for a recipe's `data.degradation`.

    Raises `UserError` if this machine lacks something that it needs.
    """
    degradation = next(kind for kind in KINDS if kind.Spec is type(spec))(spec, scale)
    degradation.check()
    return degradation
