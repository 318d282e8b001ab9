"""Training of one network towards the HR image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.config.specs import AdversarialSpec
from pipeline.data.loader import Batch
from pipeline.engine.engine import Engine, backward_and_step
from pipeline.images import unit_range
from pipeline.losses import Criterion
from pipeline.losses.adversarial import ADVERSARIAL_LOSSES, discriminator_loss, draw_labels
from pipeline.models.discriminators import frozen
from pipeline.models.ema import ExponentialMovingAverage

# What a trainer returns of one micro-batch.


@dataclass(frozen=True)
class StepResult:
    """Scalars, detached, on the device."""

    losses: dict[str, Tensor]  # the generator's terms, weighted; their sum is what it minimises
    statistics: dict[str, Tensor] = field(default_factory=dict)  # whatever else is worth a curve


class ReconstructionTrainer:
    """A generator that learns from what its output is beside the HR image."""

    uses_cuda_graphs = False  # they must be told where a step begins

    def __init__(
        self,
        generator: Engine,
        criterion: Criterion,
        ema: ExponentialMovingAverage,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.generator, self.criterion, self.ema, self.memory_format = (
            generator,
            criterion,
            ema,
            memory_format,
        )

    @property
    def engines(self) -> dict[str, Engine]:
        """Name -> engine: what a checkpoint must hold."""
        return {"generator": self.generator}

    def learners(self, number: int) -> list[Engine]:
        """The engines that learn in update `number` of the run."""
        return [self.generator]

    def step(self, batch: Batch, number: int) -> StepResult:
        """Learn from one micro-batch of update `number` (0, 1, …) of the run."""
        if self.uses_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        lr = batch.lr.contiguous(memory_format=self.memory_format)
        losses = self.criterion(self.generator(lr), batch.hr)
        at_boundary = self.generator.is_gradient_accumulation_boundary()
        backward_and_step(self.generator, torch.stack(list(losses.values())).sum())
        if at_boundary:
            self.ema.update(self.generator.module, self.generator.weights)
        return StepResult({name: loss.detach() for name, loss in losses.items()})


# Training of a generator against a discriminator: two engines, two optimizers, one batch.


class AdversarialTrainer:
    """First the generator learns from its losses and the discriminator as it stands, then the
    discriminator.

    The generator's gradient flows through the discriminator's module with its weights switched off,
    never through its engine: nothing of the discriminator changes in the generator's part. The
    discriminator sees the output detached. Each engine scales its own FP16 loss and skips its own
    overflows.
    """

    uses_cuda_graphs = False  # they must be told where a step begins

    def __init__(
        self,
        generator: Engine,
        discriminator: Engine,
        criterion: Criterion,
        ema: ExponentialMovingAverage,
        spec: AdversarialSpec,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.generator, self.discriminator, self.criterion, self.ema = (
            generator,
            discriminator,
            criterion,
            ema,
        )
        self.spec, self.loss, self.memory_format = (
            spec,
            ADVERSARIAL_LOSSES[spec.loss],
            memory_format,
        )
        self._noise = 0.0  # standard deviation of the instance noise, at this step
        self.logits: dict[
            str, Tensor
        ] = {}  # the last micro-batch's, of the discriminator's own part

    @property
    def engines(self) -> dict[str, Engine]:
        """Name -> engine: what a checkpoint must hold."""
        return {"generator": self.generator, "discriminator": self.discriminator}

    def learners(self, number: int) -> list[Engine]:
        """The engines that learn in update `number` of the run."""
        turns = (
            (self.generator, self.spec.generator_every),
            (self.discriminator, self.spec.discriminator_every),
        )
        return [engine for engine, every in turns if number % every == 0]

    def step(self, batch: Batch, number: int) -> StepResult:
        """Learn from one micro-batch of update `number` (0, 1, …) of the run."""
        if self.uses_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        spec = self.spec
        self._noise = spec.instance_noise.sigma * max(0.0, 1 - number / spec.instance_noise.steps)
        lr = batch.lr.contiguous(memory_format=self.memory_format)
        hr = unit_range(batch.hr, torch.float32).contiguous(memory_format=self.memory_format)
        learners = self.learners(number)
        with torch.set_grad_enabled(self.generator in learners):
            sr = self.generator(lr).float()
        losses = self._improve_generator(sr, hr) if self.generator in learners else {}
        statistics = _colour_drift(sr.detach(), hr)
        if self.discriminator in learners:
            statistics |= self._improve_discriminator(sr.detach(), hr)
        return StepResult(losses, statistics)

    def _improve_generator(self, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        losses = self.criterion(sr, hr)
        with frozen(self.discriminator.module):
            fake = self._judge(self.discriminator.module, sr)
            real = None
            if self.loss.sees_real:
                with torch.no_grad():
                    real = self._judge(self.discriminator.module, hr)
            losses["adversarial"] = self.spec.weight * self.loss.generator(fake, real)
            at_boundary = self.generator.is_gradient_accumulation_boundary()
            backward_and_step(self.generator, torch.stack(list(losses.values())).sum())
        if at_boundary:
            self.ema.update(self.generator.module, self.generator.weights)
        return {name: loss.detach() for name, loss in losses.items()}

    def _improve_discriminator(self, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        real, fake = self._judge(self.discriminator, hr), self._judge(self.discriminator, sr)
        loss = discriminator_loss(self.loss, real, fake, draw_labels(self.spec.labels, real))
        backward_and_step(self.discriminator, loss)
        self.logits = {"real": real.detach(), "fake": fake.detach()}
        return {
            "discriminator": loss.detach(),
            "d_real": self.logits["real"].mean(),
            "d_fake": self.logits["fake"].mean(),
        }

    def _judge(self, discriminator: Any, images: Tensor) -> Tensor:
        """Float32 logits of float images in [0, 1], with the instance noise of this step.

        A copy: with CUDA graphs the discriminator's next pass writes over what this one returned.
        """
        if self._noise:
            images = images + self._noise * torch.randn_like(images)
        return discriminator(images).to(torch.float32, copy=True)


def _colour_drift(sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
    """How much lighter SR is than HR in each channel, in levels of 255, mean over the
    micro-batch."""
    drift = (sr - hr).mean(dim=(0, 2, 3)) * 255
    return {f"colour_drift_{name}": drift[i] for i, name in enumerate(("red", "green", "blue"))}
