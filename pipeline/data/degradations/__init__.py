"""How LR is made of HR. A new way is a class of its own, a part of the recipe (`data_spec`) and a line here."""

from __future__ import annotations

from pipeline.config.specs import BicubicSpec, DegradationSpec, GaussianSpec, PairedSpec, RealEsrganSpec
from pipeline.data.degradations.base import Degradation, Gaussian, Paired
from pipeline.data.degradations.realesrgan import RealEsrgan


def build_degradation(spec: DegradationSpec, scale: int) -> Degradation:
    """What a recipe's `data.degradation` asks for."""
    kinds: dict[type, type[Degradation]] = {BicubicSpec: Degradation, GaussianSpec: Gaussian,
                                            RealEsrganSpec: RealEsrgan, PairedSpec: Paired}
    return kinds[type(spec)](spec, scale)


