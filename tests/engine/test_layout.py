"""Choosing the faster layout: few steps for slow networks, more for fast ones, and more if rounds
disagree."""

from __future__ import annotations

import threading

import pytest
import torch

from pipeline.engine import layout
from pipeline.engine.layout import faster_layout
from pipeline.timing import said_if_slow


class Clock:
    """Step times from a list, or constant ones; a contiguous step is `ratio` times as fast."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, seconds: float, ratios: list[float]
    ) -> None:
        self.now, self.seconds, self.ratios, self.steps, self.batches = 0.0, seconds, ratios, 0, []
        self.sides: set[int] = set()
        monkeypatch.setattr(layout, "_step_seconds", self._step)
        monkeypatch.setattr(layout.time, "perf_counter", lambda: self.now)

    def _step(self, network: torch.nn.Module, images: torch.Tensor) -> float:
        number, self.steps = self.steps // 2, self.steps + 1
        is_contiguous = images.is_contiguous()
        ratio = self.ratios[min(number, len(self.ratios) - 1)]
        took = self.seconds * len(images) / (ratio if is_contiguous else 1.0)
        self.now += took
        self.batches.append(len(images))
        self.sides.add(images.shape[-1])
        return took


@pytest.fixture
def network() -> torch.nn.Module:
    return torch.nn.Conv2d(3, 4, 3)


def find(network: torch.nn.Module) -> str:
    return faster_layout(network, 16, 8, torch.device("cpu"))


@pytest.mark.parametrize(
    ("ratio", "wanted"), [(1.05, "channels_last"), (1.3, "contiguous"), (0.5, "channels_last")]
)
def test_contiguous_must_be_clearly_faster(network, monkeypatch, ratio, wanted) -> None:
    clock = Clock(monkeypatch, 0.01, [ratio])
    assert find(network) == wanted
    assert clock.now < 1.3
    assert set(clock.batches[2:]) == {2}


def test_a_slow_network_takes_a_few_steps_of_one_image(network, monkeypatch) -> None:
    clock = Clock(monkeypatch, 0.8, [1.3])
    assert find(network) == "contiguous"
    assert set(clock.batches) == {1}
    assert clock.steps == 4
    assert clock.now < 3.2


def test_rounds_that_disagree_are_repeated_for_a_while(network, monkeypatch) -> None:
    clock = Clock(monkeypatch, 0.1, [1.0, 1.0, 2.0, 0.6, 2.0, 0.6])  # the first step is not counted
    find(network)
    assert 1.0 < clock.now < 4.0
    calm = Clock(monkeypatch, 0.1, [1.0])
    find(network)
    assert calm.now < 1.6
    assert calm.steps < clock.steps


@pytest.mark.parametrize(("patch", "side"), [(48, 48), (1024, layout.LARGEST_PATCH)])
def test_large_crops_are_measured_on_a_part(network, monkeypatch, patch, side) -> None:
    clock = Clock(monkeypatch, 0.01, [1.3])
    assert faster_layout(network, 16, patch, torch.device("cpu")) == "contiguous"
    assert clock.sides == {side}


def test_it_measures_a_real_network(network) -> None:
    assert find(network) in layout.LAYOUTS


def test_what_takes_long_is_said_while_it_runs_and_nothing_else() -> None:
    said, heard = [], threading.Event()
    with said_if_slow(lambda text: (said.append(text), heard.set()), "measuring", 0.01):
        assert heard.wait(5)
    with said_if_slow(said.append, "quick", 60):
        pass
    assert said == ["measuring"]
