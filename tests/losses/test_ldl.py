"""LDL against its definition in NumPy, gradients by finite differences, and what the trainers
give it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fabricate import picture
from pipeline.cli import UserError
from pipeline.data.loader import Batch
from pipeline.distributed.ranks import Ranks
from pipeline.losses import Criterion
from pipeline.losses.ldl import Ldl
from pipeline.models.ema import ExponentialMovingAverage
from pipeline.training import trainers
from pipeline.training.options import TrainOptions, make_plan
from pipeline.training.setup import check_stages


def images(height: int = 26, width: int = 31) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return SR, HR and the averaged network's SR, float64 NCHW in [0, 1]."""
    hr = np.stack([picture(height, width, seed) for seed in range(2)]).transpose(0, 3, 1, 2) / 255
    noise = np.random.default_rng(0).normal(0, 1, (2, *hr.shape))
    sr = 0.95 * hr + 0.02 + 0.08 * noise[0] * (noise[1] > 0.5)
    return np.clip(sr, 0, 1), hr, np.clip(hr + 0.04 * noise[1], 0, 1)


def artefacts(sr: np.ndarray, hr: np.ndarray, averaged: np.ndarray | None) -> np.ndarray:
    """Return the map of the paper, NHW, pixel by pixel."""
    maps = []
    for n in range(len(sr)):
        residual = np.abs(hr[n] - sr[n]).sum(0)
        padded = np.pad(residual, 3, mode="reflect")
        found = np.empty_like(residual)
        for y, x in np.ndindex(residual.shape):
            found[y, x] = padded[y : y + 7, x : x + 7].var(ddof=1)
        found *= residual.var(ddof=1) ** 0.2
        if averaged is not None:
            found[residual < np.abs(hr[n] - averaged[n]).sum(0)] = 0
        maps.append(found)
    return np.stack(maps)


@pytest.mark.parametrize("refine", [True, False])
def test_the_loss_is_its_definition(refine: bool) -> None:
    sr, hr, averaged = images()
    found = artefacts(sr, hr, averaged if refine else None)
    assert (found == 0).mean() > 0.2 if refine else (found > 0).all()
    expected = (found[:, None] * np.abs(sr - hr)).mean()
    assert expected > 1e-5
    tensors = [torch.tensor(array) for array in (sr, hr, averaged)]
    assert Ldl(refine)(*tensors).item() == pytest.approx(expected, rel=1e-9)
    single = Ldl(refine)(*(tensor.float() for tensor in tensors)).item()
    assert single == pytest.approx(expected, abs=1e-5, rel=1e-4)


def test_artefacts_count_more_than_an_equal_error_everywhere() -> None:
    hr = torch.full((1, 3, 32, 32), 0.5)
    even, spots = hr + 0.01, hr.clone()
    spots[..., ::8, ::8] += 0.64  # the same mean error
    assert (even - hr).abs().mean().item() == pytest.approx((spots - hr).abs().mean().item())
    assert Ldl(refine=False)(even, hr).item() < 1e-9
    assert Ldl(refine=False)(spots, hr).item() > 1e-4


@pytest.mark.parametrize("refine", [True, False])
def test_gradients(refine: bool) -> None:
    sr, hr, averaged = (torch.tensor(array[:1, :, :9, :10]) for array in images())
    assert torch.autograd.gradcheck(
        lambda x: Ldl(refine)(x, hr, averaged), (sr.requires_grad_(),), eps=1e-7
    )


def test_equal_images_have_no_loss_and_finite_gradients() -> None:
    hr = torch.rand(1, 3, 16, 16)
    sr = hr.clone().requires_grad_()
    loss = Ldl()(sr, hr, hr)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(sr.grad).all()


def test_the_criterion_gives_it_the_averaged_output_and_no_other_loss() -> None:
    sr, hr, averaged = (torch.tensor(array).float() for array in images())
    criterion = Criterion({"l1": 1.0, "ldl": 2.0})
    assert criterion.uses_averaged
    assert not Criterion({"l1": 1.0}).uses_averaged
    assert not Criterion({"ldl": {"weight": 1, "refine": False}}).uses_averaged
    losses = criterion(sr, hr, averaged.half())
    assert losses["ldl"].item() == pytest.approx(2 * Ldl()(sr, hr, averaged.half().float()).item())
    assert losses["l1"].item() == pytest.approx((sr - hr).abs().mean().item())
    with pytest.raises(AssertionError, match="uses_averaged"):
        criterion(sr, hr)
    with pytest.raises(UserError, match="'ldl': refine 'no' is neither true nor false"):
        Criterion({"ldl": {"weight": 1, "refine": "no"}})


class PlainEngine:
    """A network without a runtime."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.weights = module, list(module.parameters())

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images)

    def is_gradient_accumulation_boundary(self) -> bool:
        return True


def descend(engine: PlainEngine, loss: Tensor) -> None:
    gradients = torch.autograd.grad(loss, engine.weights)
    with torch.no_grad():
        for weight, gradient in zip(engine.weights, gradients, strict=True):
            weight.sub_(gradient)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images / 255)


def test_a_trainer_compares_with_the_averaged_network_before_the_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainers, "backward_and_step", descend)
    torch.manual_seed(0)
    network = Network()
    ema = ExponentialMovingAverage(network, 0.9)
    trainer = trainers.ReconstructionTrainer(PlainEngine(network), Criterion({"ldl": 1.0}), ema)
    lr, hr = (torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8) for _ in range(2))
    for number in range(3):
        with torch.no_grad():
            sr, averaged = network(lr), ema.network(lr)
            expected = Ldl()(sr, hr / 255, averaged).item()
            plain = Ldl(refine=False)(sr, hr / 255).item()
        found = trainer.step(Batch(lr, hr, number), number).losses["ldl"]
        assert found.item() == pytest.approx(expected, rel=1e-5)
        # At first both networks are the same, and the map is not refined.
        assert (expected < 0.99 * plain) == (number > 0)


def test_training_without_an_average_is_refused(dataset: Path) -> None:
    options = ("losses={l1: 1, ldl: 1}", "ema_decay=0", "generator.num_features=8")
    plan = make_plan(TrainOptions(options, recipe="demo", dataset_dir=(dataset,)))
    with pytest.raises(UserError, match="'ldl' compares with the averaged network, but ema_decay"):
        check_stages([plan, plan], Ranks())
