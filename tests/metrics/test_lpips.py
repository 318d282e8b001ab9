"""LPIPS against the package lpips with the same weights, and against a published value."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from conftest import run_python
from fabricate import picture, shared
from pipeline.cli import UserError
from pipeline.libraries import import_torchvision
from pipeline.losses import Criterion
from pipeline.losses.perceptual import LPIPS_SMALLEST_SIDES, Lpips, LpipsDistance
from pipeline.metrics.lpips import LpipsMetric

RELEASED = {"alex": "weights/lpips_alex_trunk.pth", "squeeze": "weights/lpips_squeeze_trunk.pth"}


def original(network: str, state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """The package's LPIPS, with a random trunk (fixed seed) or with `state` ("features.N…")."""
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lpips

        torch.manual_seed(0)
        module = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    if state is not None:
        module.net.load_state_dict(
            {key: state[f"features.{key.split('.', 1)[1]}"] for key in module.net.state_dict()}
        )
    return module


def features_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"features.{key.split('.', 1)[1]}": tensor
        for key, tensor in module.net.state_dict().items()
    }


@pytest.fixture(scope="module")
def squeeze(tmp_path_factory) -> tuple[torch.nn.Module, str]:
    """lpips' own SqueezeNet with random weights, and a file with them."""
    module = original("squeeze")
    path = tmp_path_factory.mktemp("trunks") / "squeeze.pth"
    torch.save(features_of(module), path)
    return module, str(path)


def pairs(side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two HR images and a distorted version of each, float NCHW."""
    hr = (
        torch.stack([torch.from_numpy(picture(side, side, seed)) for seed in range(2)]).permute(
            0, 3, 1, 2
        )
        / 255
    )
    noise = torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))
    return (hr + torch.tensor([0.05, 0.2]).view(2, 1, 1, 1) * noise).clamp(0, 1), hr


@pytest.mark.parametrize("network", ["alex", "squeeze", "vgg"])
def test_values_and_gradients_are_those_of_the_package(network, tmp_path) -> None:
    module = original(network)
    torch.save(features_of(module), tmp_path / "trunk.pth")
    ours = LpipsDistance(network, str(tmp_path / "trunk.pth"))
    sr, hr = pairs()
    first, second = sr.clone().requires_grad_(), sr.clone().requires_grad_()
    expected, found = module(first, hr, normalize=True).flatten(), ours(second, hr)
    assert found.detach().tolist() == pytest.approx(expected.detach().tolist(), rel=1e-6)
    assert found.min() > 1e-4
    expected.sum().backward()
    found.sum().backward()
    assert torch.allclose(
        first.grad, second.grad, rtol=1e-4, atol=1e-7 * first.grad.abs().max().item()
    )


@pytest.mark.parametrize("network", sorted(RELEASED))
def test_released_trunks_give_the_packages_values(network) -> None:
    path = shared(RELEASED[network])
    module, metric = (
        original(network, torch.load(path, weights_only=True)),
        LpipsMetric(network, str(path)),
    )
    sr, hr = pairs()
    with torch.no_grad():
        expected = module(sr, hr, normalize=True).flatten().tolist()
    assert metric.each(sr, hr) == pytest.approx(expected, rel=1e-4)
    assert expected[0] < expected[1]


def test_the_value_that_torchmetrics_documents() -> None:
    path = shared(RELEASED["squeeze"])
    torch.manual_seed(42)
    first, second = torch.rand(10, 3, 100, 100) * 2 - 1, torch.rand(10, 3, 100, 100) * 2 - 1
    value = LpipsMetric("squeeze", str(path))((first + 1) / 2, (second + 1) / 2)
    assert value == pytest.approx(0.1005, abs=5e-5)


def test_equal_images_have_distance_0(squeeze) -> None:
    _, hr = pairs()
    metric = LpipsMetric("squeeze", squeeze[1])
    assert metric.each(hr, hr) == [0.0, 0.0]
    noisy = metric.each((hr + 0.1 * torch.rand(hr.shape)).clamp(0, 1), hr)
    assert min(noisy) > 0


def test_the_metric_takes_bytes_and_floats_alike(squeeze) -> None:
    sr, hr = ((images * 255).round().to(torch.uint8) for images in pairs())
    metric = LpipsMetric("squeeze", squeeze[1])
    values = metric.each(sr, hr)
    assert values == metric.each(sr.float() / 255, hr) == metric.each(sr, hr.float() / 255)
    deep = (sr.to(torch.int32) * 257).to(torch.uint16)
    assert metric.each(deep, hr) == pytest.approx(values, rel=1e-5)
    assert values == pytest.approx(
        [metric.each(sr[n : n + 1], hr[n : n + 1])[0] for n in range(2)], rel=1e-4
    )
    with torch.no_grad():
        expected = squeeze[0](sr.float() / 127.5 - 1, hr.float() / 127.5 - 1).flatten().tolist()
    assert values == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda sr: sr * 2 - 1, r"SR is in \[-1, .*\]; LPIPS takes floats in \[0, 1\], uint8"),
        (lambda sr: sr * 255, r"SR is in \[0, 255\]; LPIPS takes"),
        (lambda sr: sr + 1e-3, r"SR is in \[0.001, 1.001\]"),
        (lambda sr: sr * float("nan"), "SR is in .nan, nan."),
        (lambda sr: (sr * 255).int(), "SR is torch.int32; LPIPS takes uint8"),
        (lambda sr: sr[:, :1], r"must be RGB \(N, 3, H, W\) of the same shape"),
        (lambda sr: sr[..., 1:], r"must be RGB \(N, 3, H, W\) of the same shape"),
    ],
)
def test_the_metric_refuses_other_images(squeeze, spoil, message) -> None:
    metric = LpipsMetric("squeeze", squeeze[1])
    sr, hr = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    sr[0, 0, 0, 0], sr[0, 0, 0, 1] = 0, 1
    assert metric(sr, hr) > 0
    with pytest.raises(ValueError, match=message):
        metric(spoil(sr), hr)


def test_the_loss_is_the_mean_and_reaches_sr_alone(squeeze) -> None:
    sr, hr = pairs()
    criterion = Criterion({"lpips": {"weight": 0.25, "network": "squeeze", "weights": squeeze[1]}})
    loss = criterion._losses["lpips"]
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not any(module.training for module in loss.modules())
    sr, hr = sr.requires_grad_(), hr.requires_grad_()
    value = criterion(sr, hr)["lpips"]
    metric = LpipsMetric("squeeze", squeeze[1])(sr.detach(), hr.detach())
    assert value.item() == pytest.approx(0.25 * metric, rel=1e-6)
    value.backward()
    assert hr.grad is None
    assert torch.isfinite(sr.grad).all()
    assert (sr.grad != 0).float().mean() > 0.9
    with torch.no_grad():
        # the gradient points to larger distances
        assert loss(sr - 0.01 / sr.grad.norm() * sr.grad, hr) < loss(sr, hr)


def test_the_gradient_is_finite_where_a_pixel_has_no_features(squeeze, tmp_path) -> None:
    state = {key: tensor.clone() for key, tensor in features_of(squeeze[0]).items()}
    state["features.0.bias"].fill_(-100)  # the first activation zeroes everything
    torch.save(state, tmp_path / "blind.pth")
    sr, hr = pairs()
    sr.requires_grad_()
    Lpips("squeeze", str(tmp_path / "blind.pth"))(sr, hr).backward()
    assert torch.isfinite(sr.grad).all()


@pytest.mark.parametrize("network", sorted(LPIPS_SMALLEST_SIDES))
def test_the_smallest_image_is_known(network) -> None:
    module, smallest = original(network), LPIPS_SMALLEST_SIDES[network]
    with torch.no_grad():
        assert torch.isfinite(module(*torch.rand(2, 1, 3, smallest, smallest))).all()
        with pytest.raises(RuntimeError):
            module(*torch.rand(2, 1, 3, smallest - 1, smallest - 1))


def test_images_that_are_too_small_are_one_line(squeeze) -> None:
    with pytest.raises(
        UserError, match="'lpips' needs images of at least 17x17 pixels, but they are 16x40"
    ):
        Lpips("squeeze", squeeze[1])(torch.rand(1, 3, 16, 40), torch.rand(1, 3, 16, 40))


def test_what_cannot_be_meant_is_one_line(squeeze, tmp_path, monkeypatch) -> None:
    with pytest.raises(
        UserError, match="the loss 'lpips': network 'resnet' is not one of alex, squeeze, vgg"
    ):
        Criterion({"lpips": {"weight": 1, "network": "resnet"}})
    with pytest.raises(
        UserError, match=r"'lpips': .* is not the trunk 'alex' in torchvision's layout"
    ):
        Criterion({"lpips": {"weight": 1, "network": "alex", "weights": squeeze[1]}})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"download https://download.pytorch.org/models/alexnet-owt-7be5be79.pth to ",
    ):
        Criterion({"lpips": 1.0})
    assert list(Path(tmp_path).iterdir()) == []


def test_building_leaves_the_random_numbers_alone(squeeze) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Lpips("squeeze", squeeze[1])
    assert torch.equal(torch.rand(3), expected)


def test_the_library_says_nothing(squeeze) -> None:
    code = (
        "import sys, torch\n"
        "from pipeline.metrics.lpips import LpipsMetric\n"
        "metric = LpipsMetric('squeeze', sys.argv[1])\n"
        "metric(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))\n"
    )
    done = run_python(code, squeeze[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
