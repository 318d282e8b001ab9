"""Losses: values by hand, gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.losses import LOSSES, Criterion
from pipeline.recipe import LOSSES as KNOWN


def test_values() -> None:
    sr, hr = torch.tensor([[[[0.5, 0.0]]]]), torch.tensor([[[[0.25, 1.0]]]])
    assert LOSSES["l1"](sr, hr).item() == pytest.approx((0.25 + 1) / 2)
    assert LOSSES["mse"](sr, hr).item() == pytest.approx((0.0625 + 1) / 2)
    expected = (math.sqrt(0.0625 + 1e-6) + math.sqrt(1 + 1e-6)) / 2
    assert LOSSES["charbonnier"](sr, hr).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients(name: str) -> None:
    torch.manual_seed(0)
    sr = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    hr = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, hr), (sr,))


def test_the_criterion_weighs_and_takes_bytes() -> None:
    torch.manual_seed(0)
    sr, hr = torch.rand(2, 3, 4, 4), torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    losses = Criterion({"l1": 0.5, "mse": 2.0})(sr, hr)
    assert set(losses) == {"l1", "mse"}
    assert losses["l1"].item() == pytest.approx(0.5 * (sr - hr.float() / 255).abs().mean().item())
    assert losses["mse"].item() == pytest.approx(2 * (sr - hr.float() / 255).square().mean().item())
    half = Criterion({"l1": 1.0})(sr.half(), hr)["l1"]
    assert half.dtype == torch.float32  # the mean of many half numbers is not taken in half


def test_recipes_know_all_losses() -> None:
    assert set(KNOWN) == set(LOSSES)
