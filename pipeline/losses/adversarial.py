"""Adversarial losses on the discriminator's logits, float32 of any shape: (N, 1), or (N, 1, H, W) for one a pixel.

vanilla: Goodfellow et al. 2014, the generator's non-saturating; least_squares: Mao et al. 2017 (LSGAN); hinge: Lim and
Ye 2017; relativistic_average: ESRGAN (Wang et al. 2018), after Jolicoeur-Martineau 2018, of which relativistic is the
paired form. The relativistic ones compare with the mean over this rank's micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.specs import LabelsSpec

RELATIVISTIC = ("relativistic_average", "relativistic")
"""Losses in which the generator, too, is judged against real images."""


class Labels(NamedTuple):
    """Targets of real and of fake samples, and which samples are called their opposite; each (N, 1, ...)."""

    real: Tensor
    fake: Tensor
    flipped: Tensor  # bool


def draw_labels(spec: LabelsSpec, logits: Tensor) -> Labels:
    """One target for each sample of `logits`, drawn with torch's generator of its device where there is chance."""
    shape = (len(logits), *[1] * (logits.dim() - 1))
    real = logits.new_full(shape, 1 - spec.smoothing)
    fake = logits.new_zeros(shape)
    if spec.noise:
        real, fake = real - spec.noise * torch.rand_like(real), fake + spec.noise * torch.rand_like(fake)
    flipped = torch.rand_like(real) < spec.flip if spec.flip else torch.zeros_like(real, dtype=torch.bool)
    return Labels(real, fake, flipped)


def generator_loss(kind: str, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """What the generator minimises, a scalar. `real` is needed by `RELATIVISTIC` kinds alone."""
    if kind == "vanilla":
        return F.softplus(-fake).mean()
    if kind == "least_squares":
        return (fake - 1).square().mean()
    if kind == "hinge":
        return -fake.mean()
    assert real is not None
    if kind == "relativistic":
        return F.softplus(real - fake).mean()
    ones = torch.ones_like(fake)
    return (_cross_entropy(fake - real.mean(), ones) + _cross_entropy(real - fake.mean(), 0 * ones)) / 2


def discriminator_loss(kind: str, real: Tensor, fake: Tensor, labels: Labels) -> Tensor:
    """What the discriminator minimises, a scalar: the mean of its loss on real and on fake samples."""
    real, fake = torch.where(labels.flipped, fake, real), torch.where(labels.flipped, real, fake)
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    if kind == "relativistic":  # one comparison, whose target is how much more real the real one is
        return _cross_entropy(real - fake, labels.real - labels.fake)
    if kind == "relativistic_average":
        real, fake = real - fake.mean(), fake - real.mean()
    judge = _squared_error if kind == "least_squares" else _cross_entropy
    return (judge(real, labels.real) + judge(fake, labels.fake)) / 2


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets.expand_as(logits))


def _squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits - targets).square().mean()
