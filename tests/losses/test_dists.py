"""DISTS against the authors' package with the same random VGG16, and its metric."""

from __future__ import annotations

import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fabricate import picture, random_vgg
from pipeline.cli import UserError
from pipeline.libraries import import_torchvision
from pipeline.losses import Criterion
from pipeline.losses.dists import Dists, DistsDistance, _channel_weights
from pipeline.losses.trunks import VGG16_BLOCKS
from pipeline.metrics import METRICS, Trunk, load_measures, measure


@pytest.fixture(scope="module")
def distance(vgg16: str) -> DistsDistance:
    return DistsDistance(vgg16)


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    """The authors' network with the same VGG16 and their learned weights."""
    models = import_torchvision().models
    from DISTS_pytorch import DISTS_pt

    with torch.device("meta"):
        features = models.vgg16(weights=None).features
    features.load_state_dict(
        {
            key.removeprefix("features."): tensor.float()
            for key, tensor in random_vgg(VGG16_BLOCKS).items()
        },
        assign=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DISTS_pt.models, "vgg16", lambda pretrained: SimpleNamespace(features=features)
        )
        module = DISTS_pt.DISTS(load_weights=False)
    for layer in module.modules():
        if isinstance(layer, torch.nn.ReLU):
            layer.inplace = False
    alpha, beta = _channel_weights()
    module.alpha.data, module.beta.data = alpha.view(1, -1, 1, 1), beta.view(1, -1, 1, 1)
    return module


def pairs(height: int = 48, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two HR images and a distorted version of each, float NCHW."""
    hr = torch.stack([torch.from_numpy(picture(height, width, seed)) for seed in range(2)])
    hr = hr.permute(0, 3, 1, 2) / 255
    noise = torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))
    return (hr + torch.tensor([0.05, 0.2]).view(2, 1, 1, 1) * noise).clamp(0, 1), hr


@pytest.mark.parametrize("size", [(48, 64), (37, 51)])
def test_values_and_gradients_are_those_of_the_authors(distance, original, size) -> None:
    sr, hr = pairs(*size)
    first, second = sr.clone().requires_grad_(), sr.clone().requires_grad_()
    expected, found = original(first, hr, require_grad=True), distance(second, hr)
    assert found.detach().tolist() == pytest.approx(expected.detach().tolist(), abs=1e-6, rel=1e-5)
    assert found.min() > 1e-3
    assert found[0] < found[1]
    expected.sum().backward()
    found.sum().backward()
    assert torch.allclose(
        first.grad, second.grad, rtol=1e-4, atol=1e-5 * first.grad.abs().max().item()
    )


def test_the_gradient_is_that_of_finite_differences(vgg16) -> None:
    distance = DistsDistance(vgg16).double()
    sr, hr = (images[:1, :, :17, :19].double() for images in pairs())
    assert torch.autograd.gradcheck(
        lambda images: distance(images, hr), (sr.requires_grad_(),), fast_mode=True, atol=1e-6
    )


def test_equal_images_have_distance_0_and_near_ones_keep_their_digits(distance) -> None:
    sr, hr = pairs()
    with torch.no_grad():
        assert distance(hr, hr).tolist() == [0, 0]
        near = hr + 0.01 * (sr - hr)
        exactly = copy.deepcopy(distance).double()(near.double(), hr.double())
        assert distance(near, hr).tolist() == pytest.approx(exactly.tolist(), rel=0.01)


def test_the_learned_weights_are_the_published_ones() -> None:
    alpha, beta = _channel_weights()
    assert (len(alpha), len(beta)) == (1475, 1475)
    assert (alpha.sum() + beta.sum()).item() == pytest.approx(1, abs=1e-6)
    # As in the file of the authors' repository.
    assert alpha.sum().item() == pytest.approx(0.8760, abs=1e-4)
    assert alpha.max().item() == pytest.approx(0.0211, abs=1e-4)
    assert beta.max().item() == pytest.approx(0.0205, abs=1e-4)


@pytest.mark.parametrize(("precision", "cosine"), [("float16", 0.98), ("bfloat16", 0.9)])
def test_16_bits_give_nearly_the_same_loss_and_gradient(
    vgg16: str, precision: str, cosine: float
) -> None:
    found = []
    for dtype in ("float32", precision):
        criterion = Criterion({"dists": {"weight": 0.5, "weights": vgg16, "precision": dtype}})
        sr, hr = pairs(32, 32)
        sr.requires_grad_()
        loss = criterion(sr, hr)["dists"]
        assert loss.dtype == torch.float32
        loss.backward()
        found.append((loss.item(), sr.grad))
    (exact, gradient), (near, other) = found
    assert near == pytest.approx(exact, rel=0.01)
    assert near != exact, "or it was not computed in 16 bits"
    assert F.cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > cosine


def test_features_beyond_the_range_of_16_bits_when_squared(tmp_path) -> None:
    state = random_vgg(VGG16_BLOCKS)
    state["features.2.weight"] = state["features.2.weight"] * 300
    torch.save(state, tmp_path / "large.pth")
    found = []
    for precision in ("float32", "float16"):
        criterion = Criterion(
            {"dists": {"weight": 1, "weights": str(tmp_path / "large.pth"), "precision": precision}}
        )
        found.append(criterion(*pairs(32, 32))["dists"].item())
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_the_loss_is_the_mean_and_reaches_sr_alone(vgg16, distance) -> None:
    sr, hr = pairs()
    criterion = Criterion({"dists": {"weight": 0.25, "weights": vgg16}})
    sr, hr = sr.requires_grad_(), hr.requires_grad_()
    value = criterion(sr, hr)["dists"]
    with torch.no_grad():
        assert value.item() == pytest.approx(0.25 * distance(sr, hr).mean().item(), rel=1e-6)
    value.backward()
    assert hr.grad is None
    assert (sr.grad != 0).float().mean() > 0.9
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    with torch.no_grad():
        # the gradient points to larger distances
        step = 0.01 / sr.grad.norm() * sr.grad
        assert distance(sr - step, hr).mean() < distance(sr, hr).mean()


def test_the_metric_is_measured_if_its_trunk_is_named(vgg16, distance) -> None:
    sr, hr = ((images * 255).round().to(torch.uint8) for images in pairs())
    assert not load_measures([METRICS["dists"]])
    measures = load_measures([METRICS["dists"]], {"dists": Trunk("vgg", vgg16)})
    with torch.no_grad():
        expected = distance(sr, hr).mean().item()
    assert measure(sr, hr, 0, measures) == {"dists": pytest.approx(expected, rel=1e-5)}
    deep = ((images.to(torch.int32) * 257).to(torch.uint16) for images in (sr, hr))
    assert measure(*deep, 0, measures) == {"dists": pytest.approx(expected, rel=1e-5)}
    assert METRICS["dists"].is_better(0.1, 0.2)
    with pytest.raises(ValueError, match="smaller than the 17x17 pixels that DISTS needs"):
        measure(sr[..., :20], hr[..., :20], 2, measures)


def test_what_cannot_be_meant_is_one_line(vgg16, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="'dists' needs images of at least 17x17 pixels"):
        Dists(vgg16)(torch.rand(1, 3, 16, 40), torch.rand(1, 3, 16, 40))
    with pytest.raises(UserError, match="the loss 'dists': precision 'fp8' is not one of auto"):
        Criterion({"dists": {"weight": 1, "precision": "fp8"}})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="the loss 'dists': the weights of the trunk 'vgg' are mis"):
        Criterion({"dists": 1.0})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install them with: pip install dists-pytorch==0\.1"):
        Criterion({"dists": {"weight": 1, "weights": vgg16}})
