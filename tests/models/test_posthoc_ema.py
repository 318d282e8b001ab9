"""Power-function averages, and averages of other lengths made from their snapshots, against sums
over the whole trajectory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.models.ema import ExponentialMovingAverage
from pipeline.models.posthoc_ema import (
    LARGEST_ERROR,
    WIDEST,
    WIDTHS,
    coefficients,
    exponent,
    is_snapshot_step,
    sampled,
)

LAST = 9000  # updates; from 8,192 on, one of two is sampled


def weights_of(end: int, width: float) -> np.ndarray:
    """Return the weight of each of the updates 1 to `end` in the average of `width` at `end`."""
    weights, before = np.zeros(end + 1), 0
    power, last = exponent(width) + 1, sampled(end)
    for update in range(1, end + 1):
        if sampled(update) == update:
            weights[update] = (update / last) ** power - (before / last) ** power
            before = update
    return weights[1:]


class Trajectory:
    """A network whose weights drift and tremble, with its averages and their snapshots."""

    def __init__(self, widths: tuple[float, ...]) -> None:
        generator = np.random.default_rng(0)
        times = np.arange(1, LAST + 1)[:, None]
        drift = generator.normal(size=(1, 12)) * np.log(times + 10) * 0.1
        self.path = drift + generator.normal(size=(LAST, 12)) * 0.01 + 0.3
        network = nn.Linear(4, 3, bias=False)
        self.ema = ExponentialMovingAverage(network, 0.99, widths)
        self.snapshots: dict[int, dict[float, torch.Tensor]] = {}
        for update, row in enumerate(torch.from_numpy(self.path).float(), 1):
            with torch.no_grad():
                network.weight.copy_(row.view(3, 4))
            self.ema.update(network)
            if is_snapshot_step(update, LAST, 48) or update == LAST:
                self.snapshots[update] = {
                    width: weights[0].double().flatten()
                    for width, weights in self.ema.power.items()
                }

    def tracked(self, width: float) -> np.ndarray:
        return self.ema.power[width][0].double().numpy().flatten()


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    return Trajectory((*WIDTHS, 0.03, 0.07, 0.2))


def test_the_exponent_gives_the_width() -> None:
    for width in (0.01, 0.05, 0.1, 0.2, WIDEST):
        gamma = exponent(width)
        assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(width**2)
    assert exponent(WIDEST) == pytest.approx(0, abs=1e-12)  # the plain mean
    # their figure: 6.94 and 16.97 for the two that a run keeps
    assert [round(exponent(width), 2) for width in WIDTHS] == [16.97, 6.94]
    for width in (0, WIDEST * 1.01, -1, float("nan")):
        with pytest.raises(ValueError, match="sigma_rel"):
            exponent(width)


def test_weights_have_the_mean_and_the_width_of_the_power_function() -> None:
    updates = np.arange(1, 2001)
    for width in (0.02, 0.05, 0.1, 0.25):
        weights, gamma = weights_of(2000, width), exponent(width)
        mean = float(weights @ updates)
        deviation = float(np.sqrt(weights @ (updates - mean) ** 2))
        assert weights.sum() == pytest.approx(1)
        assert mean / 2000 == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
        assert deviation / 2000 == pytest.approx(width, rel=1e-3)


def test_one_update_of_every_block_is_sampled() -> None:
    taken = [update for update in range(1, 70_000) if sampled(update) == update]
    assert taken[:8191] == [*range(1, 8192)]
    for block, first, last in ((2, 8192, 16_384), (4, 16_384, 32_768), (8, 32_768, 65_536)):
        own = [update for update in taken if first <= update < last]
        assert [update // block for update in own] == list(range(first // block, last // block))
        # evenly over the places in a block, so that no period of the training is met
        counts = np.bincount([update % block for update in own], minlength=block)
        assert counts.min() >= 0.9 * len(own) / block
    newest = 0
    for update in range(1, 20_000):
        newest = update if sampled(update) == update else newest
        assert sampled(update) == newest


def test_the_tracked_averages_are_the_sums(trajectory: Trajectory) -> None:
    for width in trajectory.ema.power:
        exact = weights_of(LAST, width) @ trajectory.path
        np.testing.assert_allclose(trajectory.tracked(width), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.2])
def test_another_length_is_the_directly_tracked_average(
    trajectory: Trajectory, width: float
) -> None:
    ends = [update for update in trajectory.snapshots for _ in WIDTHS]
    widths = [width for _ in trajectory.snapshots for width in WIDTHS]
    ((factors, error),) = coefficients(ends, widths, LAST, [width])
    stored = torch.stack(
        [trajectory.snapshots[end][w] for end, w in zip(ends, widths, strict=True)]
    )
    found = factors @ stored.numpy()
    assert len(trajectory.snapshots) <= 49
    assert factors.sum() == pytest.approx(1)
    assert error < 0.03
    assert np.abs(found - trajectory.tracked(width)).max() < 1e-4
    # neither of the two kept averages would do
    for kept in WIDTHS:
        assert np.abs(trajectory.tracked(kept) - trajectory.tracked(width)).max() > 1e-3


def test_the_error_is_that_of_the_weights() -> None:
    ends, widths = [200, 200, 400, 400], [*WIDTHS, *WIDTHS]
    for width in (0.05, 0.07, 0.16):
        ((factors, error),) = coefficients(ends, widths, 400, [width])
        made = sum(
            factor * np.append(weights_of(end, own), np.zeros(400 - end))
            for factor, end, own in zip(factors, ends, widths, strict=True)
        )
        wanted = weights_of(400, width)
        assert error == pytest.approx(
            np.linalg.norm(made - wanted) / np.linalg.norm(wanted), rel=1e-6, abs=1e-9
        )
    (_, exact), (_, large) = coefficients(ends, widths, 400, [0.05, 0.01])
    assert exact < 1e-9
    assert large > LARGEST_ERROR


def test_snapshots_are_bounded_and_spaced_as_the_averages_grow() -> None:
    for total in (7, 20, 400, 30_000):
        for most in (6, 24, 48):
            steps = [step for step in range(1, total + 1) if is_snapshot_step(step, total, most)]
            assert min(total, most // 2) <= len(steps) <= max(most, 20)
            late = [step for step in steps if step > total / 4]
            gaps = [(after - before) / before for before, after in pairwise(late)]
            assert all(gap <= 2 / (most // 3) for gap in gaps if total > 20)
    assert not is_snapshot_step(0, 100, 48)


def test_state_of_the_averages_is_that_of_a_network() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ema = ExponentialMovingAverage(network, 0.9, WIDTHS)
    for _ in range(3):
        network(torch.rand(2, 3, 8, 8))
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(torch.randn_like(weight))
        ema.update(network)
    other = ExponentialMovingAverage(network, 0.9, WIDTHS)
    for width in WIDTHS:
        state = ema.power_state(width)
        network.load_state_dict(state)  # strict
        assert torch.equal(state["1.running_var"], ema.network[1].running_var)
        other.load_power_state(width, state)
        for restored, weight in zip(other.power[width], ema.power[width], strict=True):
            assert torch.equal(restored, weight)
    assert not torch.equal(ema.power[0.05][0], ema.power[0.10][0])
