"""The contextual loss against loops over points, as the paper defines it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fabricate import picture
from pipeline.cli import UserError
from pipeline.losses import Criterion
from pipeline.losses.contextual import Contextual, contextual_similarity


def by_loops(sr: Tensor, hr: Tensor, bandwidth: float) -> float:
    """Equations 2 to 5 and 1 of the paper for one pair of CHW feature maps; X is SR, Y is HR."""
    y = [hr[:, row, column] for row in range(hr.shape[1]) for column in range(hr.shape[2])]
    x = [sr[:, row, column] for row in range(sr.shape[1]) for column in range(sr.shape[2])]
    mean = sum(y) / len(y)
    affinities = []
    for one in x:
        distances = [
            1 - float((one - mean) @ (other - mean) / (one - mean).norm() / (other - mean).norm())
            for other in y
        ]
        relative = [distance / (min(distances) + 1e-5) for distance in distances]
        similarities = [math.exp((1 - distance) / bandwidth) for distance in relative]
        affinities.append([similarity / sum(similarities) for similarity in similarities])
    return sum(max(row[j] for row in affinities) for j in range(len(y))) / len(y)


def features(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hr = torch.rand(shape, generator=generator, dtype=dtype)
    return hr + 0.3 * torch.randn(shape, generator=generator, dtype=dtype), hr


@pytest.mark.parametrize("bandwidth", [0.1, 0.5])
def test_the_value_is_that_of_the_definition(bandwidth: float) -> None:
    sr, hr = features(2, 5, 4, 6)
    expected = [by_loops(*pair, bandwidth) for pair in zip(sr, hr, strict=True)]
    assert contextual_similarity(sr, hr, bandwidth).tolist() == pytest.approx(expected, rel=1e-9)
    single = contextual_similarity(sr.float(), hr.float(), bandwidth)
    assert single.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("parts", [1, 3, 24])
def test_parts_change_neither_value_nor_gradient(parts: int) -> None:
    sr, hr = features(2, 5, 4, 6)
    found = []
    for max_distances in (1 << 20, 2 * 24 * math.ceil(24 / parts)):
        own = sr.clone().requires_grad_()
        values = contextual_similarity(own, hr, 0.5, max_distances)
        values.log().sum().backward()
        found.append((values.detach(), own.grad))
    torch.testing.assert_close(found[0], found[1])


def test_the_gradient_is_that_of_finite_differences() -> None:
    sr, hr = features(1, 4, 3, 3)
    for max_distances in (1 << 20, 20):
        assert torch.autograd.gradcheck(
            lambda x, limit=max_distances: contextual_similarity(x, hr, 0.5, limit),
            (sr.requires_grad_(),),
        )


def test_where_the_points_are_does_not_matter() -> None:
    sr, hr = features(1, 8, 6, 6)
    shuffled = hr.flatten(2)[..., torch.randperm(36, generator=torch.Generator().manual_seed(1))]
    assert contextual_similarity(shuffled.view_as(hr), hr, 0.5).item() == pytest.approx(1, abs=1e-6)
    assert contextual_similarity(sr, hr, 0.5).item() < 0.9


def test_constant_features_have_a_finite_gradient() -> None:
    hr = torch.ones(1, 4, 3, 3)
    sr = torch.ones(1, 4, 3, 3, requires_grad=True)
    value = contextual_similarity(sr, hr, 0.5)
    value.log().sum().backward()
    assert 0 < value.item() <= 1
    assert torch.isfinite(sr.grad).all()


def test_memory_is_bounded() -> None:
    sr, hr = features(1, 2, 16, 16, dtype=torch.float32)
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest.append(result.numel())
            return result

    with Watch():
        contextual_similarity(sr, hr, 0.5, max_distances=8192)
    assert max(largest) == 8192  # of 256 * 256 distances


def pictures() -> tuple[Tensor, Tensor]:
    hr = torch.from_numpy(picture(32, 32, 0)).permute(2, 0, 1)[None] / 255
    noise = torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))
    return (hr + 0.3 * noise).clamp(0, 1), hr


def test_the_loss_is_the_weighted_sum_over_layers(vgg19: str) -> None:
    sr, hr = pictures()
    layers = {"conv2_2": 0.5, "conv3_4": 2.0}
    loss = Contextual(layers, bandwidth=0.2, weights=vgg19)
    with torch.no_grad():
        expected = sum(
            -weight * contextual_similarity(*pair, 0.2).log().mean()
            for weight, *pair in zip(
                layers.values(), loss.trunk(sr).values(), loss.trunk(hr).values(), strict=True
            )
        )
        assert loss(sr, hr).item() == pytest.approx(expected.item(), rel=1e-6)
        assert loss(hr, hr).item() < 0.1 * expected.item()


@pytest.mark.parametrize(
    ("precision", "error", "cosine"), [("float16", 0.01, 0.98), ("bfloat16", 0.05, 0.9)]
)
def test_16_bits_give_nearly_the_same_loss_and_gradient(
    vgg19: str, precision: str, error: float, cosine: float
) -> None:
    found = []
    for dtype in ("float32", precision):
        term = {"weight": 0.5, "weights": vgg19, "precision": dtype}
        sr, hr = pictures()
        sr.requires_grad_()
        loss = Criterion({"contextual": term})(sr, hr)["contextual"]
        assert loss.dtype == torch.float32
        loss.backward()
        found.append((loss.item(), sr.grad))
    (exact, gradient), (near, other) = found
    assert near == pytest.approx(exact, rel=error)
    assert near != exact, "or it was not computed in 16 bits"
    assert F.cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > cosine


@pytest.mark.parametrize("bandwidth", [0, -1, True, "x", float("inf"), float("nan")])
def test_what_cannot_be_meant_is_one_line(bandwidth) -> None:
    with pytest.raises(UserError, match=f"'contextual': bandwidth {bandwidth!r} is not a number a"):
        Criterion({"contextual": {"weight": 1, "bandwidth": bandwidth}})
