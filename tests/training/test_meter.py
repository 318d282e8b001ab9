"""The remaining time follows the pace of several log intervals, not of the last one alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.distributed.ranks import Ranks
from pipeline.training import meter
from pipeline.training.meter import NEW_PACE, TrainMeter
from pipeline.training.trainers import StepResult


def test_one_slow_interval_moves_the_remaining_time_by_its_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock.now)
    loader = SimpleNamespace(waited_seconds=0.0, step_seconds={}, num_workers=1)
    measured, remaining = TrainMeter(Ranks(), 100, 4), []
    for step, seconds in enumerate((9.0, 1.0, 1.0, 3.0), 1):
        clock.now += seconds
        measured.add(StepResult({"l1": torch.tensor(0.5)}, {}))
        measured.end_step(step, False, {}, loader)
        measured.drain()
        reading = measured.read(step, loader)
        remaining.append(reading.remaining_seconds)
    assert remaining[0] != remaining[0]  # the first step, which compiles, is not timed
    assert remaining[1:] == pytest.approx([98, 97, 96 * (1 + NEW_PACE * 2)])
    assert reading.images_per_second == pytest.approx(4 / 3)  # of the last interval
