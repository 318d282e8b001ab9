"""Trainers: one network towards the HR image, and a generator against a discriminator."""

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
from pipeline.losses.adversarial import (
    ADVERSARIAL_LOSSES,
    Labels,
    discriminator_loss,
    draw_labels,
)
from pipeline.models.discriminators import frozen
from pipeline.models.ema import ExponentialMovingAverage
from pipeline.training.teacher import Teacher


@dataclass(frozen=True)
class StepResult:
    """Result of one micro-batch: detached scalars on the device."""

    losses: dict[str, Tensor]  # the generator's terms, weighted; it minimises their sum
    statistics: dict[str, Tensor] = field(default_factory=dict)  # anything else worth plotting


class ReconstructionTrainer:
    """Trains one generator to reproduce the HR image."""

    uses_cuda_graphs = False  # if True, `step` marks where a step begins, as CUDA graphs need

    def __init__(
        self,
        generator: Engine,
        criterion: Criterion,
        ema: ExponentialMovingAverage,
        memory_format: torch.memory_format = torch.contiguous_format,
        teacher: Teacher | None = None,
    ) -> None:
        self.generator, self.criterion, self.ema, self.memory_format = (
            generator,
            criterion,
            ema,
            memory_format,
        )
        self.teacher = teacher

    @property
    def engines(self) -> dict[str, Engine]:
        """Name -> engine; what a checkpoint holds."""
        return {"generator": self.generator}

    def learners(self, number: int) -> dict[str, Engine]:
        """Return the engines that learn in update `number` of the run, by name."""
        return self.engines

    def step(self, batch: Batch, number: int) -> StepResult:
        """Learn from one micro-batch of update `number` (0, 1, …) of the run."""
        if self.uses_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        lr = _to_input(batch.lr).contiguous(memory_format=self.memory_format)
        sr = self.generator(lr)
        losses = self.criterion(sr, batch.hr, averaged_output(self.criterion, self.ema, lr))
        if self.teacher is not None:
            losses |= self.teacher.losses(sr, lr)
        at_boundary = self.generator.is_gradient_accumulation_boundary()
        backward_and_step(self.generator, torch.stack(list(losses.values())).sum())
        if at_boundary:
            self.ema.update(self.generator.module, self.generator.weights)
        return StepResult({name: loss.detach() for name, loss in losses.items()})


class AdversarialTrainer:
    """Trains a generator against a discriminator: two engines, two optimizers, one batch.

    The generator learns first, from its losses and the discriminator as it is; then the
    discriminator learns. The generator's gradient flows through the discriminator's module with
    its weights frozen, never through its engine, so the discriminator does not change in the
    generator's part. The discriminator sees the generator's output detached. Each engine scales
    its own FP16 loss and skips its own overflows.
    """

    uses_cuda_graphs = False  # if True, `step` marks where a step begins, as CUDA graphs need

    def __init__(
        self,
        generator: Engine,
        discriminator: Engine,
        criterion: Criterion,
        ema: ExponentialMovingAverage,
        spec: AdversarialSpec,
        memory_format: torch.memory_format = torch.contiguous_format,
        teacher: Teacher | None = None,
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
        self.teacher = teacher
        self._noise = 0.0  # standard deviation of this step's instance noise
        # The last micro-batch's logits, from the discriminator's own part.
        self.logits: dict[str, Tensor] = {}

    @property
    def engines(self) -> dict[str, Engine]:
        """Name -> engine; what a checkpoint holds."""
        return {"generator": self.generator, "discriminator": self.discriminator}

    def learners(self, number: int) -> dict[str, Engine]:
        """Return the engines that learn in update `number` of the run, by name."""
        every = {
            "generator": self.spec.generator_every,
            "discriminator": self.spec.discriminator_every,
        }
        return {name: engine for name, engine in self.engines.items() if number % every[name] == 0}

    def step(self, batch: Batch, number: int) -> StepResult:
        """Learn from one micro-batch of update `number` (0, 1, …) of the run."""
        if self.uses_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        spec = self.spec
        self._noise = spec.instance_noise.sigma * max(0.0, 1 - number / spec.instance_noise.steps)
        lr = _to_input(batch.lr).contiguous(memory_format=self.memory_format)
        hr = unit_range(batch.hr, torch.float32).contiguous(memory_format=self.memory_format)
        learners = self.learners(number)
        with torch.set_grad_enabled("generator" in learners):
            sr = self.generator(lr).float()
        losses = self._update_generator(lr, sr, hr) if "generator" in learners else {}
        statistics = _colour_drift(sr.detach(), hr)
        if "discriminator" in learners:
            statistics |= self._update_discriminator(sr.detach(), hr)
        return StepResult(losses, statistics)

    def _update_generator(self, lr: Tensor, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        losses = self.criterion(sr, hr, averaged_output(self.criterion, self.ema, lr))
        if self.teacher is not None:
            losses |= self.teacher.losses(sr, lr)
        with frozen(self.discriminator.module):
            fake = self._logits(self.discriminator.module, sr)
            real = None
            if self.loss.sees_real:
                with torch.no_grad():
                    real = self._logits(self.discriminator.module, hr)
            losses["adversarial"] = self.spec.weight * self.loss.generator(fake, real)
            at_boundary = self.generator.is_gradient_accumulation_boundary()
            backward_and_step(self.generator, torch.stack(list(losses.values())).sum())
        if at_boundary:
            self.ema.update(self.generator.module, self.generator.weights)
        return {name: loss.detach() for name, loss in losses.items()}

    def _update_discriminator(self, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        real, fake = self._logits(self.discriminator, hr), self._logits(self.discriminator, sr)
        loss = discriminator_loss(self.loss, real, fake, draw_labels(self.spec.labels, real))
        backward_and_step(self.discriminator, loss)
        self.logits = {"real": real.detach(), "fake": fake.detach()}
        return {
            "discriminator": loss.detach(),
            "d_real": self.logits["real"].mean(),
            "d_fake": self.logits["fake"].mean(),
        }

    def _logits(self, discriminator: Any, images: Tensor) -> Tensor:
        """Return float32 logits of float images in [0, 1], with this step's instance noise.

        The logits are copied, because with CUDA graphs the discriminator's next call overwrites
        what this one returned.
        """
        if self._noise:
            images = images + self._noise * torch.randn_like(images)
        return discriminator(images).to(torch.float32, copy=True)


def _to_input(lr: Tensor) -> Tensor:
    """Return LR as networks and compilers take it on every device: uint16 becomes float32."""
    return unit_range(lr, torch.float32) if lr.dtype == torch.uint16 else lr


def averaged_output(
    criterion: Criterion, ema: ExponentialMovingAverage, lr: Tensor
) -> Tensor | None:
    """Return the averaged network's SR of `lr`, in float32, if a loss needs it; otherwise None."""
    if not criterion.uses_averaged:
        return None
    with torch.no_grad():
        return ema.network(lr)


def indifferent_loss(trainer: ReconstructionTrainer | AdversarialTrainer) -> float | None:
    """Return the discriminator's loss if it cannot tell real from fake; None without one."""
    if isinstance(trainer, ReconstructionTrainer):
        return None
    logits = torch.zeros(1, 1)
    labels = Labels(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool))
    return float(discriminator_loss(trainer.loss, logits, logits, labels))


def _colour_drift(sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
    """Return the mean of SR - HR for each channel over the micro-batch, in levels of 0..255.

    `sr`, `hr`: (N, 3, H, W), floats in [0, 1].
    """
    drift = (sr - hr).mean(dim=(0, 2, 3)) * 255
    return {f"colour_drift_{name}": drift[i] for i, name in enumerate(("red", "green", "blue"))}
