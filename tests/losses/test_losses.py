"""Pixel losses (values by hand, gradients by finite differences), and the terms of a recipe."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.cli import UserError
from pipeline.losses import LOSSES, Criterion
from pipeline.losses.pixel import Charbonnier, l1, mse

NEED_FILES = {"vgg_feature", "vgg_patch", "contextual", "lpips", "dists"}  # tested next to this


def test_values() -> None:
    sr, hr = torch.tensor([[[[0.5, 0.0]]]]), torch.tensor([[[[0.25, 1.0]]]])
    assert l1(sr, hr).item() == pytest.approx((0.25 + 1) / 2)
    assert mse(sr, hr).item() == pytest.approx((0.0625 + 1) / 2)
    for epsilon in (1e-3, 0.5):
        expected = (math.sqrt(0.0625 + epsilon**2) + math.sqrt(1 + epsilon**2)) / 2
        assert Charbonnier(epsilon)(sr, hr).item() == pytest.approx(expected)
    assert Charbonnier()(sr, hr).item() == pytest.approx(Charbonnier(1e-3)(sr, hr).item())


@pytest.mark.parametrize("loss", [l1, mse, Charbonnier()])
def test_gradients(loss) -> None:
    torch.manual_seed(0)
    sr = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    hr = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, hr), (sr,))


def test_the_criterion_weighs_and_takes_bytes() -> None:
    torch.manual_seed(0)
    sr, hr = torch.rand(2, 3, 4, 4), torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    criterion = Criterion({"l1": 0.5, "mse": 2})
    losses = criterion(sr, hr)
    assert criterion.weights == {"l1": 0.5, "mse": 2.0}
    assert list(losses) == ["l1", "mse"]
    assert losses["l1"].item() == pytest.approx(0.5 * (sr - hr.float() / 255).abs().mean().item())
    assert losses["mse"].item() == pytest.approx(2 * (sr - hr.float() / 255).square().mean().item())
    deep = (hr.to(torch.int32) * 257).to(torch.uint16)
    assert Criterion({"l1": 0.5, "mse": 2})(sr, deep) == losses
    half = Criterion({"l1": 1.0})(sr.half(), hr)["l1"]
    assert half.dtype == torch.float32  # the mean of many FP16 values is not computed in FP16


def test_a_term_may_have_parameters() -> None:
    sr, hr = torch.tensor([[[[0.5]]]]), torch.tensor([[[[0.25]]]])
    criterion = Criterion({"charbonnier": {"weight": 2, "epsilon": 0.75}, "mse": {"weight": 1}})
    losses = criterion(sr, hr)
    assert criterion.weights == {"charbonnier": 2.0, "mse": 1.0}
    assert losses["charbonnier"].item() == pytest.approx(2 * math.sqrt(0.0625 + 0.5625))
    assert losses["mse"].item() == pytest.approx(0.0625)


def test_autocast_does_not_reach_the_losses() -> None:
    torch.manual_seed(0)
    sr, hr = torch.rand(1, 3, 24, 24), torch.rand(1, 3, 24, 24)
    criterion = Criterion({"ms_ssim": 1.0})
    expected = criterion(sr, hr)["ms_ssim"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(criterion(sr, hr)["ms_ssim"], expected)


def test_every_cheap_loss_reaches_all_pixels_at_float32() -> None:
    torch.manual_seed(0)
    hr = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    for name in set(LOSSES) - NEED_FILES:
        sr = torch.rand(2, 3, 24, 24, dtype=torch.bfloat16, requires_grad=True)
        loss = Criterion({name: 0.5})(sr, hr, torch.rand(2, 3, 24, 24))[name]
        assert (loss.dtype, loss.shape) == (torch.float32, ())
        loss.backward()
        assert torch.isfinite(sr.grad).all()
        assert (sr.grad != 0).float().mean() > 0.9, name


def test_floats_must_be_in_the_unit_range() -> None:
    sr = torch.rand(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], but it is in \[-1, 1\]"):
        Criterion({"l1": 1.0})(sr, torch.tensor([-1.0, 1.0] * 24).view(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"but it is in \[0, 255\]"):
        Criterion({"l1": 1.0})(sr, torch.tensor([0.0, 255.0] * 24).view(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "at least one loss is needed; choose from l1, mse"),
        ({"charbonier": 1.0}, "no loss named 'charbonier'; did you mean 'charbonnier'"),
        ({"l1": 0}, "the weight of 'l1' is 0, but must be a number above 0"),
        ({"l1": -1.0}, "the weight of 'l1' is -1.0"),
        ({"l1": float("nan")}, "the weight of 'l1' is nan"),
        ({"l1": float("inf")}, "the weight of 'l1' is inf"),
        ({"l1": True}, "the weight of 'l1' is True"),
        ({"l1": "much"}, "the weight of 'l1' is 'much'"),
        ({"l1": None}, "the weight of 'l1' is None"),
        ({"charbonnier": {"epsilon": 1e-3}}, "'charbonnier' has no weight; give it one"),
        (
            {"charbonnier": {"weight": 1, "epsilom": 1e-3}},
            "has no parameter 'epsilom'; did you mean 'epsilon'",
        ),
        (
            {"charbonnier": {"weight": 1, "epsilon": 0}},
            "'charbonnier': epsilon 0 is not a number above 0",
        ),
        (
            {"charbonnier": {"weight": 1, "epsilon": "x"}},
            "'charbonnier': epsilon 'x' is not a number above 0",
        ),
        (
            {"charbonnier": {"weight": 1, "epsilon": math.inf}},
            "'charbonnier': epsilon inf is not a number above 0",
        ),
        (
            {"charbonnier": {"weight": 1, "epsilon": True}},
            "'charbonnier': epsilon True is not a number above 0",
        ),
        (
            {"ms_ssim": {"weight": 1, "scales": 2.0}},
            "'ms_ssim': scales 2.0 is not an integer from 1 to 5",
        ),
        (
            {"ms_ssim": {"weight": 1, "scales": [1]}},
            "'ms_ssim': scales [1] is not an integer from 1 to 5",
        ),
        (
            {"vgg_feature": {"weight": 1, "weights": 5}},
            "'vgg19' are 5, which is not a path",
        ),
        (
            {"lpips": {"weight": 1, "network": ["alex"]}},
            "'lpips': network ['alex'] is not one of alex, squeeze, vgg",
        ),
        ({"l1": {"weight": 1, "sr": 2}}, "'l1' has no parameter 'sr'; choose from weight"),
        (
            {"fft": {"weight": 1, "norm": "forward"}},
            "'fft': norm 'forward' is neither 'backward' nor 'ortho'",
        ),
        ({"tv": {"weight": 1, "distance": "l3"}}, "'tv': distance 'l3' is neither"),
        (
            {"ms_ssim": {"weight": 1, "scales": 6}},
            "'ms_ssim': scales 6 is not an integer from 1 to 5",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line(terms, message) -> None:
    with pytest.raises(UserError) as caught:
        Criterion(terms)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
