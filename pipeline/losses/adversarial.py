"""Adversarial losses on the discriminator's logits, float32 of any shape: (N, 1), or (N, 1, H, W)
for one per pixel.

vanilla: Goodfellow et al. 2014, with the generator's non-saturating loss; least_squares: Mao et al.
2017 (LSGAN); hinge: Lim and Ye 2017; relativistic_average: ESRGAN (Wang et al. 2018), after
Jolicoeur-Martineau 2018; relativistic: its paired form. The relativistic ones compare with the mean
over this rank's micro-batch.

A loss is two functions and a row of `ADVERSARIAL_LOSSES`; a recipe names it as `adversarial.loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class LabelNoise(Protocol):
    """How labels differ from 1 for real and 0 for fake samples: `adversarial.labels` of a
    recipe."""

    smoothing: float
    noise: float
    flip: float


class Labels(NamedTuple):
    """Targets of real and of fake samples, and which samples count as their opposite; each (N, 1,
    ...)."""

    real: Tensor
    fake: Tensor
    flipped: Tensor  # bool


@dataclass(frozen=True)
class AdversarialLoss:
    """What the two networks minimise, each a scalar function of logits.

    The flags are read from the source of the table, too, by recipes: write them there, each as True
    or False.
    """

    generator: Callable[
        [Tensor, Tensor | None], Tensor
    ]  # of (fake, real); real is None unless `sees_real`
    discriminator: Callable[
        [Tensor, Tensor, Labels], Tensor
    ]  # of (real, fake, labels): the mean over both kinds
    # whether the discriminator has a target for every sample, which smoothing and noise can move
    takes_labels: bool
    sees_real: bool  # whether the generator, too, is judged against real images


def draw_labels(spec: LabelNoise, logits: Tensor) -> Labels:
    """One target for each sample of `logits`, drawn with torch's generator of its device where
    there is chance."""
    shape = (len(logits), *[1] * (logits.dim() - 1))
    real = logits.new_full(shape, 1 - spec.smoothing)
    fake = logits.new_zeros(shape)
    if spec.noise:
        real, fake = (
            real - spec.noise * torch.rand_like(real),
            fake + spec.noise * torch.rand_like(fake),
        )
    flipped = (
        torch.rand_like(real) < spec.flip if spec.flip else torch.zeros_like(real, dtype=torch.bool)
    )
    return Labels(real, fake, flipped)


def discriminator_loss(loss: AdversarialLoss, real: Tensor, fake: Tensor, labels: Labels) -> Tensor:
    """What the discriminator minimises, a scalar, with the flipped samples counted as their
    opposite."""
    real, fake = torch.where(labels.flipped, fake, real), torch.where(labels.flipped, real, fake)
    return loss.discriminator(real, fake, labels)


def vanilla_generator(fake: Tensor, real: Tensor | None) -> Tensor:
    return F.softplus(-fake).mean()


def vanilla_discriminator(real: Tensor, fake: Tensor, labels: Labels) -> Tensor:
    return (_cross_entropy(real, labels.real) + _cross_entropy(fake, labels.fake)) / 2


def least_squares_generator(fake: Tensor, real: Tensor | None) -> Tensor:
    return (fake - 1).square().mean()


def least_squares_discriminator(real: Tensor, fake: Tensor, labels: Labels) -> Tensor:
    return ((real - labels.real).square().mean() + (fake - labels.fake).square().mean()) / 2


def hinge_generator(fake: Tensor, real: Tensor | None) -> Tensor:
    return -fake.mean()


def hinge_discriminator(real: Tensor, fake: Tensor, labels: Labels) -> Tensor:
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def relativistic_generator(fake: Tensor, real: Tensor | None) -> Tensor:
    assert real is not None
    return F.softplus(real - fake).mean()


def relativistic_discriminator(real: Tensor, fake: Tensor, labels: Labels) -> Tensor:
    # One comparison, whose target is how much more real the real one is.
    return _cross_entropy(real - fake, labels.real - labels.fake)


def relativistic_average_generator(fake: Tensor, real: Tensor | None) -> Tensor:
    assert real is not None
    ones = torch.ones_like(fake)
    return (
        _cross_entropy(fake - real.mean(), ones) + _cross_entropy(real - fake.mean(), 0 * ones)
    ) / 2


def relativistic_average_discriminator(real: Tensor, fake: Tensor, labels: Labels) -> Tensor:
    return vanilla_discriminator(real - fake.mean(), fake - real.mean(), labels)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets.expand_as(logits))


ADVERSARIAL_LOSSES: dict[str, AdversarialLoss] = {
    "vanilla": AdversarialLoss(
        vanilla_generator, vanilla_discriminator, takes_labels=True, sees_real=False
    ),
    "least_squares": AdversarialLoss(
        least_squares_generator, least_squares_discriminator, takes_labels=True, sees_real=False
    ),
    "hinge": AdversarialLoss(
        hinge_generator, hinge_discriminator, takes_labels=False, sees_real=False
    ),
    "relativistic_average": AdversarialLoss(
        relativistic_average_generator,
        relativistic_average_discriminator,
        takes_labels=True,
        sees_real=True,
    ),
    "relativistic": AdversarialLoss(
        relativistic_generator, relativistic_discriminator, takes_labels=True, sees_real=True
    ),
}
