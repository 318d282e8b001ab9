"""Training of one network towards the HR image."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.data.loader import Batch
from pipeline.engine.engine import descend
from pipeline.losses import Criterion
from pipeline.models.ema import ExponentialMovingAverage
from pipeline.outcome import Outcome


class ReconstructionTrainer:
    """A generator that learns from what its output is beside the HR image."""

    def __init__(self, generator: Any, criterion: Criterion, ema: ExponentialMovingAverage,
                 memory_format: torch.memory_format = torch.contiguous_format) -> None:
        self.generator, self.criterion, self.ema, self.memory_format = generator, criterion, ema, memory_format

    @property
    def engines(self) -> dict[str, Any]:
        """Name -> DeepSpeed engine: what a checkpoint must hold."""
        return {"generator": self.generator}

    def learners(self, number: int) -> list[Any]:
        """The engines that learn in update `number` of the run."""
        return [self.generator]

    def step(self, batch: Batch, number: int) -> Outcome:
        """Learn from one micro-batch of update `number` (0, 1, …) of the run."""
        lr = batch.lr.contiguous(memory_format=self.memory_format)
        losses = self.criterion(self.generator(lr), batch.hr)
        at_boundary = self.generator.is_gradient_accumulation_boundary()
        descend(self.generator, torch.stack(list(losses.values())).sum())
        if at_boundary:
            self.ema.update(self.generator.module)
        return Outcome({name: loss.detach() for name, loss in losses.items()})
