"""Adversarial losses on discriminator logits: float32, (N, 1), or (N, 1, H, W) with one per pixel.

vanilla: Goodfellow et al. 2014, with the non-saturating generator loss; least_squares: Mao et al.
2017 (LSGAN); hinge: Lim and Ye 2017; relativistic_average: ESRGAN (Wang et al. 2018), after
Jolicoeur-Martineau 2018; relativistic: its paired form. The relativistic losses average over this
rank's micro-batch.

A loss consists of two functions and a row in `ADVERSARIAL_LOSSES`; a recipe selects it with
`adversarial.loss`. Of a discriminator with several scales, each scale's logits have their loss, and
`mean_over_scales` is the discriminator's or the generator's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class LabelNoise(Protocol):
    """Deviation of the labels from 1 (real) and 0 (fake): `adversarial.labels` of a recipe."""

    smoothing: float
    noise: float
    flip: float


class Labels(NamedTuple):
    """Targets of real and fake samples, and which samples to swap; each of shape (N, 1, ...)."""

    real: Tensor
    fake: Tensor
    flipped: Tensor  # bool


@dataclass(frozen=True)
class AdversarialLoss:
    """The losses of the two networks, each a scalar function of logits.

    Recipes read the flags from the source text of the table, without importing it, so write each of
    them there as True or False.
    """

    # (fake, real) -> loss; real is None unless `sees_real`
    generator: Callable[[Tensor, Tensor | None], Tensor]
    # (real, fake, labels) -> mean loss over real and fake samples
    discriminator: Callable[[Tensor, Tensor, Labels], Tensor]
    # Whether the discriminator has a target per sample, which smoothing and noise can change.
    takes_labels: bool
    sees_real: bool  # whether the generator's loss also uses the logits of real images
    compares_samples: bool  # whether a sample's loss depends on others of the micro-batch


def draw_labels(spec: LabelNoise, logits: Tensor) -> Labels:
    """Return one target per sample of `logits`.

    Random ones are drawn with torch's generator for the device of `logits`.
    """
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
    """Return the discriminator's loss, a scalar, with the flipped samples swapped."""
    real, fake = torch.where(labels.flipped, fake, real), torch.where(labels.flipped, real, fake)
    return loss.discriminator(real, fake, labels)


def mean_over_scales(values: Sequence[Tensor]) -> Tensor:
    """Return the mean of one scalar per scale."""
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean()


def vanilla_generator(fake: Tensor, real: Tensor | None) -> Tensor:
    """Mean of softplus(-fake), the non-saturating loss."""
    return F.softplus(-fake).mean()


def vanilla_discriminator(real: Tensor, fake: Tensor, labels: Labels) -> Tensor:
    """Cross-entropy of the logits with their labels, averaged over real and fake."""
    return (_cross_entropy(real, labels.real) + _cross_entropy(fake, labels.fake)) / 2


def least_squares_generator(fake: Tensor, real: Tensor | None) -> Tensor:
    """Mean squared distance of the fake logits from 1."""
    return (fake - 1).square().mean()


def least_squares_discriminator(real: Tensor, fake: Tensor, labels: Labels) -> Tensor:
    """Mean squared distance of the logits from their labels, averaged over real and fake."""
    return ((real - labels.real).square().mean() + (fake - labels.fake).square().mean()) / 2


def hinge_generator(fake: Tensor, real: Tensor | None) -> Tensor:
    """Negative mean of the fake logits."""
    return -fake.mean()


def hinge_discriminator(real: Tensor, fake: Tensor, labels: Labels) -> Tensor:
    """Hinge loss with margin 1, averaged over real and fake."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def relativistic_generator(fake: Tensor, real: Tensor | None) -> Tensor:
    """Mean of softplus(real - fake) over all pairs."""
    assert real is not None
    return F.softplus(real - fake).mean()


def relativistic_discriminator(real: Tensor, fake: Tensor, labels: Labels) -> Tensor:
    """Cross-entropy of real - fake of each pair."""
    # One comparison per pair: the target is the difference of the two labels.
    return _cross_entropy(real - fake, labels.real - labels.fake)


def relativistic_average_generator(fake: Tensor, real: Tensor | None) -> Tensor:
    """Cross-entropy of each side's logits minus the other side's mean, with swapped labels."""
    assert real is not None
    ones = torch.ones_like(fake)
    return (
        _cross_entropy(fake - real.mean(), ones) + _cross_entropy(real - fake.mean(), 0 * ones)
    ) / 2


def relativistic_average_discriminator(real: Tensor, fake: Tensor, labels: Labels) -> Tensor:
    """The vanilla loss of each side's logits minus the other side's mean."""
    return vanilla_discriminator(real - fake.mean(), fake - real.mean(), labels)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets.expand_as(logits))


ADVERSARIAL_LOSSES: dict[str, AdversarialLoss] = {
    "vanilla": AdversarialLoss(
        vanilla_generator,
        vanilla_discriminator,
        takes_labels=True,
        sees_real=False,
        compares_samples=False,
    ),
    "least_squares": AdversarialLoss(
        least_squares_generator,
        least_squares_discriminator,
        takes_labels=True,
        sees_real=False,
        compares_samples=False,
    ),
    "hinge": AdversarialLoss(
        hinge_generator,
        hinge_discriminator,
        takes_labels=False,
        sees_real=False,
        compares_samples=False,
    ),
    "relativistic_average": AdversarialLoss(
        relativistic_average_generator,
        relativistic_average_discriminator,
        takes_labels=True,
        sees_real=True,
        compares_samples=True,
    ),
    "relativistic": AdversarialLoss(
        relativistic_generator,
        relativistic_discriminator,
        takes_labels=True,
        sees_real=True,
        compares_samples=False,
    ),
}
