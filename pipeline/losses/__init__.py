"""Pixel and perceptual losses: named, weighted terms that compare a network's output with HR."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.config import names
from pipeline.images import unit_range
from pipeline.losses.colour import Luma, OklabChroma
from pipeline.losses.contextual import Contextual
from pipeline.losses.dists import Dists
from pipeline.losses.focal_frequency import FocalFrequency
from pipeline.losses.ldl import Ldl
from pipeline.losses.perceptual import Lpips, VggFeature, share_trunks, vgg_losses
from pipeline.losses.pixel import Charbonnier, FourierL1, MsSsim, TotalVariation, l1, mse
from pipeline.losses.sobel import Sobel
from pipeline.losses.trunks import trunk_layout
from pipeline.losses.vgg_patch import VggPatch
from pipeline.spec import is_number

# Either a function f(sr, hr, **params), or a class built with its params and called with (sr, hr).
# A loss whose attribute `uses_averaged` is true also gets `averaged`, the averaged network's SR.
LOSSES: dict[str, Callable[..., Any]] = {
    "l1": l1,
    "mse": mse,
    "charbonnier": Charbonnier,
    "ms_ssim": MsSsim,
    "fft": FourierL1,
    "focal_frequency": FocalFrequency,
    "sobel": Sobel,
    "oklab_chroma": OklabChroma,
    "luma": Luma,
    "ldl": Ldl,
    "tv": TotalVariation,
    "vgg_feature": VggFeature,
    "vgg_patch": VggPatch,
    "contextual": Contextual,
    "lpips": Lpips,
    "dists": Dists,
}


class Criterion:
    """The weighted loss terms of a recipe.

    `terms` maps a loss name to its weight, or to {"weight": weight, **parameters}. Losses with a
    pretrained trunk keep it frozen on `device`; trunks are not part of checkpoints. Raises
    `UserError` for an unknown loss or parameter, a weight that is not above 0, and an empty
    `terms`.
    """

    def __init__(
        self, terms: Mapping[str, float | Mapping[str, Any]], device: torch.device | str = "cpu"
    ) -> None:
        if not terms:
            raise UserError(f"at least one loss is needed; choose from {', '.join(LOSSES)}")
        self.weights: dict[str, float] = {}
        self._losses: dict[str, Callable[..., Tensor]] = {}
        self._is_checked = False
        for name, term in terms.items():
            self.weights[name], params = _split(name, term)
            self._losses[name] = _build(name, params, torch.device(device))
        self._vgg_groups = share_trunks(self._losses.values())

    @property
    def trunks(self) -> list[nn.Module]:
        """The pretrained networks of the losses: what is worth compiling."""
        trunks = [getattr(loss, "trunk", None) for loss in self._losses.values()]
        return [trunk for trunk in dict.fromkeys(trunks) if trunk is not None]

    @property
    def uses_averaged(self) -> bool:
        """Whether a loss compares with the output of the averaged network."""
        return any(map(_uses_averaged, self._losses.values()))

    def __call__(self, sr: Tensor, hr: Tensor, averaged: Tensor | None = None) -> dict[str, Tensor]:
        """Return each weighted term as a float32 scalar.

        `sr` is float NCHW in [0, 1]; `hr` has the same shape, pixels or floats in [0, 1].
        `averaged` is the averaged network's SR, without a gradient, if `uses_averaged`. Raises
        `ValueError` if the first float `hr` is not in [0, 1]. Later ones are not checked, because
        reading their range would wait for the device.
        """
        self._check_range(hr)
        with torch.autocast(sr.device.type, enabled=False):
            sr = sr.float()
            hr = unit_range(hr, sr.dtype)
            more = {} if averaged is None else {"averaged": averaged.float()}
            values: dict[str, Tensor] = {}
            for group in self._vgg_groups:
                values |= vgg_losses(group, sr, hr)
            for name, loss in self._losses.items():
                if name not in values:
                    values[name] = loss(sr, hr, **(more if _uses_averaged(loss) else {}))
            return {name: weight * values[name] for name, weight in self.weights.items()}

    def _check_range(self, hr: Tensor) -> None:
        if self._is_checked or hr.dtype in (torch.uint8, torch.uint16):
            return
        low, high = hr.min().item(), hr.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"HR given as floats must be in [0, 1], but it is in [{low:.4g}, {high:.4g}]"
            )
        self._is_checked = True


def _split(name: str, term: float | Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return the weight and the parameters of one entry of a recipe's `losses`."""
    params = dict(term) if isinstance(term, Mapping) else {"weight": term}
    names.LOSSES.check(name, params)
    if "weight" not in params:
        raise UserError(f"the loss {name!r} has no weight; give it one, e.g. weight: 1.0")
    weight = params.pop("weight")
    if not is_number(weight) or weight <= 0:
        raise UserError(
            f"the weight of {name!r} is {weight!r}, but must be a number above 0; to train "
            "without the loss, remove it"
        )
    return float(weight), params


def _uses_averaged(loss: Callable[..., Tensor]) -> bool:
    return bool(getattr(loss, "uses_averaged", False))


def _build(name: str, params: Mapping[str, Any], device: torch.device) -> Callable[..., Tensor]:
    loss = LOSSES[name]
    if not inspect.isclass(loss):
        return functools.partial(loss, **params)
    try:
        built: nn.Module = loss(**params)
    except (ValueError, TypeError) as error:  # a UserError is a ValueError too
        raise UserError(f"the loss {name!r}: {error}") from error
    built.requires_grad_(False).eval().to(device)
    if (trunk := getattr(built, "trunk", None)) is not None:
        trunk.to(memory_format=trunk_layout(device))
    return built
