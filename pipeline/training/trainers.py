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
    mean_over_scales,
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

    While `skips_turns` is set, the discriminator judges HR and SR without learning from them. Set
    it between updates only; `pipeline.training.health.TurnRule` decides.
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
        self.skips_turns = False
        self._noise = 0.0  # standard deviation of this step's instance noise
        # The last micro-batch's logits of each scale, from the discriminator's own part.
        self.logits: dict[str, list[Tensor]] = {}

    @property
    def engines(self) -> dict[str, Engine]:
        """Name -> engine; what a checkpoint holds."""
        return {"generator": self.generator, "discriminator": self.discriminator}

    def learners(self, number: int) -> dict[str, Engine]:
        """Return the engines that learn in update `number` of the run, by name."""
        learns = {
            "generator": number % self.spec.generator_every == 0,
            "discriminator": self._has_turn(number) and not self.skips_turns,
        }
        return {name: engine for name, engine in self.engines.items() if learns[name]}

    def _has_turn(self, number: int) -> bool:
        """Return whether it is the discriminator's turn in update `number`."""
        return number % self.spec.discriminator_every == 0

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
        if self._has_turn(number):
            statistics |= self._take_turn(sr.detach(), hr)
        return StepResult(losses, statistics)

    def _update_generator(self, lr: Tensor, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        losses = self.criterion(sr, hr, averaged_output(self.criterion, self.ema, lr))
        if self.teacher is not None:
            losses |= self.teacher.losses(sr, lr)
        with frozen(self.discriminator.module):
            fake = self._logits(self.discriminator.module, sr)
            real: list[Tensor] | list[None] = [None] * len(fake)
            if self.loss.sees_real:
                with torch.no_grad():
                    real = self._logits(self.discriminator.module, hr)
            losses["adversarial"] = self.spec.weight * mean_over_scales(
                [self.loss.generator(*pair) for pair in zip(fake, real, strict=True)]
            )
            at_boundary = self.generator.is_gradient_accumulation_boundary()
            backward_and_step(self.generator, torch.stack(list(losses.values())).sum())
        if at_boundary:
            self.ema.update(self.generator.module, self.generator.weights)
        return {name: loss.detach() for name, loss in losses.items()}

    def _take_turn(self, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Let the discriminator judge and, unless it skips its turns, learn."""
        if self.skips_turns:
            with torch.no_grad(), frozen(self.discriminator.module):
                loss = self._judge(self.discriminator.module, sr, hr)
        else:
            loss = self._judge(self.discriminator, sr, hr)
            backward_and_step(self.discriminator, loss)
        statistics = {
            "discriminator": loss.detach(),
            "d_real": mean_over_scales([logits.mean() for logits in self.logits["real"]]),
            "d_fake": mean_over_scales([logits.mean() for logits in self.logits["fake"]]),
        }
        if self.spec.adaptive:
            # The share of turns that were skipped, once it is averaged over updates.
            statistics["d_turns_skipped"] = torch.full_like(loss, float(self.skips_turns))
        return statistics

    def _judge(self, discriminator: Any, sr: Tensor, hr: Tensor) -> Tensor:
        """Return the discriminator's loss, and remember its logits."""
        real, fake = self._logits(discriminator, hr), self._logits(discriminator, sr)
        # One label per sample, whatever the number of its logits.
        labels = draw_labels(self.spec.labels, real[0])
        self.logits = {
            "real": [logits.detach() for logits in real],
            "fake": [logits.detach() for logits in fake],
        }
        return mean_over_scales(
            [discriminator_loss(self.loss, *pair, labels) for pair in zip(real, fake, strict=True)]
        )

    def _logits(self, discriminator: Any, images: Tensor) -> list[Tensor]:
        """Return each scale's float32 logits of float images in [0, 1], with this step's noise.

        The logits are copied, because with CUDA graphs the discriminator's next call overwrites
        what this one returned.
        """
        if self._noise:
            images = images + self._noise * torch.randn_like(images)
        judged = discriminator(images)
        scales = [judged] if isinstance(judged, Tensor) else judged
        return [logits.to(torch.float32, copy=True) for logits in scales]


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
