"""VGG19 features against torchvision's with the same random weights, and lookup of trunks."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from conftest import run_python
from fabricate import random_vgg
from pipeline import losses
from pipeline.cli import UserError
from pipeline.libraries import import_torchvision
from pipeline.losses import LOSSES, Criterion, trunks
from pipeline.losses.perceptual import VggFeature, VggLoss
from pipeline.losses.trunks import (
    TRUNK_FILES,
    VGG19_BLOCKS,
    find_trunk,
    trunk_dtype,
    trunk_layout,
    vgg_features,
    vgg_layer_indices,
)
from pipeline.training.options import VGG19_LOSSES

NUMBER_OF_CONVOLUTIONS = 16


@pytest.fixture(scope="module")
def trunk() -> dict[str, torch.Tensor]:
    return random_vgg(VGG19_BLOCKS)


@pytest.fixture(scope="module")
def weights(trunk, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("trunks") / "vgg19.pth"
    torch.save(
        {**trunk, "classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)},
        path,
    )
    return str(path)


@pytest.fixture(scope="module")
def reference(trunk) -> nn.Sequential:
    """torchvision's VGG19 with these weights, and ReLUs that do not overwrite features."""
    models = import_torchvision().models
    with torch.device("meta"):
        features = models.vgg19(weights=None).features
    features.load_state_dict(
        {key.removeprefix("features."): tensor.float() for key, tensor in trunk.items()},
        assign=True,
    )
    for layer in features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return features.eval()


def pictures(seed: int = 0, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, side, side, generator=generator), torch.rand(
        2, 3, side, side, generator=generator
    )


def normalised(images: torch.Tensor) -> torch.Tensor:
    import_torchvision()
    from torchvision.models import VGG19_Weights

    transform = VGG19_Weights.IMAGENET1K_V1.transforms()
    return (images - torch.tensor(transform.mean).view(1, 3, 1, 1)) / torch.tensor(
        transform.std
    ).view(1, 3, 1, 1)


def test_layers_have_the_papers_names() -> None:
    places = vgg_layer_indices(VGG19_BLOCKS)
    assert len(places) == NUMBER_OF_CONVOLUTIONS
    assert (
        places["conv1_1"],
        places["conv1_2"],
        places["conv2_2"],
        places["conv3_4"],
        places["conv5_4"],
    ) == (0, 2, 7, 16, 34)
    with torch.device("meta"):
        layers = vgg_features(VGG19_BLOCKS)
    assert sorted(places.values()) == [
        n for n, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)
    ]
    assert all(isinstance(layers[place + 1], nn.ReLU) for place in places.values())


@pytest.mark.parametrize("before_activation", [True, False])
@pytest.mark.parametrize("name", ["conv1_1", "conv2_2", "conv5_4"])
def test_features_are_torchvisions_bit_for_bit(weights, reference, name, before_activation) -> None:
    images, _ = pictures()
    loss = VggFeature({name: 1.0}, before_activation, weights=weights)
    place = vgg_layer_indices(VGG19_BLOCKS)[name] + (0 if before_activation else 1)
    assert len(loss.trunk.features) == place + 1  # deeper layers are dropped
    with torch.no_grad():
        expected = reference[: place + 1](normalised(images))
        assert torch.equal(loss.trunk(images)[place], expected)
        assert (expected < 0).any() == before_activation


def test_the_input_is_normalised_as_torchvision_does() -> None:
    import_torchvision()
    from torchvision.transforms.functional import normalize

    images, _ = pictures()
    assert torch.equal(
        normalised(images), normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )


def test_several_layers_are_added_up_by_their_weights(weights, reference) -> None:
    sr, hr = pictures()
    layers = {"conv1_2": 0.1, "conv3_4": 2.0, "conv2_1": 1}
    for distance, function in (("l1", F.l1_loss), ("l2", F.mse_loss)):
        loss = VggFeature(layers, distance=distance, weights=weights)
        with torch.no_grad():
            expected = sum(
                weight
                * function(
                    *(
                        reference[: vgg_layer_indices(VGG19_BLOCKS)[name] + 1](normalised(images))
                        for images in (sr, hr)
                    )
                )
                for name, weight in layers.items()
            )
            assert loss(sr, hr).item() == pytest.approx(expected.item(), rel=1e-6)
        single = VggFeature({"conv3_4": 2.0}, distance=distance, weights=weights)
        assert 0 < single(sr, hr).item() < expected.item()


def test_the_channels_are_rgb_and_normalised(trunk, tmp_path) -> None:
    state = dict(trunk)
    state["features.0.weight"], state["features.0.bias"] = torch.zeros(64, 3, 3, 3), torch.zeros(64)
    for channel in range(3):  # the first three filters copy red, green and blue
        state["features.0.weight"][channel, channel, 1, 1] = 1
    torch.save(state, tmp_path / "copy.pth")
    images, _ = pictures()
    features = VggFeature({"conv1_1": 1.0}, weights=str(tmp_path / "copy.pth")).trunk(images)[0]
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        assert torch.allclose(features[:, channel], (images[:, channel] - mean) / std, atol=1e-6)


def test_swapped_channels_are_another_image(weights) -> None:
    _, hr = pictures()
    sr = hr.clone()
    sr[:, 0] = 1 - sr[:, 0]
    loss = VggFeature({"conv2_2": 1.0}, weights=weights)
    with torch.no_grad():
        assert abs(loss(sr.flip(1), hr.flip(1)) / loss(sr, hr) - 1) > 0.01


def test_gradients_reach_the_network_and_nothing_else(weights) -> None:
    sr, hr = pictures()
    criterion = Criterion(
        {"vgg_feature": {"weight": 0.5, "layers": {"conv5_4": 1.0}, "weights": weights}}
    )
    loss = criterion._losses["vgg_feature"]
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not any(module.training for module in loss.modules())
    assert {tensor.dtype for tensor in loss.state_dict().values()} == {torch.float32}
    sr.requires_grad_()
    hr.requires_grad_()
    value = criterion(sr, hr)["vgg_feature"]
    assert value.item() == pytest.approx(0.5 * VggFeature(weights=weights)(sr, hr).item())
    value.backward()
    assert hr.grad is None
    assert torch.isfinite(sr.grad).all()
    assert (sr.grad != 0).float().mean() > 0.9
    with torch.no_grad():
        assert loss(hr, hr).item() == 0
        # the gradient points to larger distances
        assert loss(sr - 0.01 / sr.grad.norm() * sr.grad, hr) < loss(sr, hr)


def test_bytes_and_floats_are_the_same_image(weights) -> None:
    loss = VggFeature({"conv2_1": 1.0}, weights=weights)
    bytes_ = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    sr = torch.rand(1, 3, 16, 16)
    assert torch.equal(loss(sr, bytes_), loss(sr, bytes_.float() / 255))


def test_the_crop_must_leave_something_for_the_deepest_layer(weights) -> None:
    loss = VggFeature(weights=weights)
    assert torch.isfinite(loss(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)))
    with pytest.raises(UserError, match="at least 16x16 pixels, but they are 40x15"):
        loss(torch.rand(1, 3, 40, 15), torch.rand(1, 3, 40, 15))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layers": {"conv5_5": 1.0}}, "VGG19 has no layer 'conv5_5'; did you mean 'conv5_"),
        ({"layers": {}}, "is not a table of layer: weight"),
        ({"layers": ["conv5_4"]}, "is not a table of layer: weight"),
        ({"layers": {"conv5_4": 0}}, "weight 0 of layer 'conv5_4' is not a number above 0"),
        ({"layers": {"conv5_4": "x"}}, "weight 'x' of layer 'conv5_4' is not a number above 0"),
        ({"distance": "l3"}, "distance 'l3' is neither"),
        ({"before_activation": "yes"}, "before_activation 'yes' is neither"),
        ({"layer": "conv5_4"}, "no parameter 'layer'; did you mean 'layers'"),
    ],
)
def test_what_cannot_be_meant_is_one_line(weights, params, message) -> None:
    with pytest.raises(UserError) as caught:
        Criterion({"vgg_feature": {"weight": 1, "weights": weights, **params}})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trunk_is_found_by_name_or_in_the_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, file in TRUNK_FILES.items():
        cached = tmp_path / "hub" / "checkpoints" / file
        with pytest.raises(UserError) as caught:
            find_trunk(name)
        for part in (
            f"https://download.pytorch.org/models/{file}",
            str(cached),
            "--vgg-weights FILE" if name == "vgg19" else "--lpips-weights FILE in evaluate.py",
            "nothing is downloaded",
        ):
            assert part in str(caught.value)
        assert not cached.parent.joinpath(file).exists()
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.touch()
        assert find_trunk(name) == cached
    with pytest.raises(
        UserError, match=r"no weights file '/nowhere/a.pth' for the trunk 'vgg19': download https"
    ):
        find_trunk("vgg19", "/nowhere/a.pth")
    (tmp_path / "mine.pth").touch()
    assert find_trunk("alex", str(tmp_path / "mine.pth")) == tmp_path / "mine.pth"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_trunk("alex", "~/mine.pth") == tmp_path / "mine.pth"
    with pytest.raises(UserError, match="no trunk named 'alexnet'; did you mean 'alex'"):
        find_trunk("alexnet")


def test_vgg_weights_reach_all_losses_on_vgg19() -> None:
    built = {name for name, loss in LOSSES.items() if inspect.isclass(loss)}
    assert set(VGG19_LOSSES) == {name for name in built if issubclass(LOSSES[name], VggLoss)}
    assert all(LOSSES[name].name == name for name in VGG19_LOSSES)


def test_trunk_names_are_torchvisions() -> None:
    import_torchvision()
    from torchvision import models

    found = {
        "alex": models.AlexNet_Weights,
        "squeeze": models.SqueezeNet1_1_Weights,
        "vgg": models.VGG16_Weights,
        "vgg19": models.VGG19_Weights,
    }
    assert {name: kind.IMAGENET1K_V1.url for name, kind in found.items()} == {
        name: f"https://download.pytorch.org/models/{file}" for name, file in TRUNK_FILES.items()
    }


def test_a_missing_trunk_names_the_loss(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"the loss 'vgg_feature': the weights of the trunk 'vgg19' are missing: downl",
    ):
        Criterion({"vgg_feature": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_all_layouts_of_a_trunk_are_read(trunk, weights, tmp_path) -> None:
    bare = {key.removeprefix("features."): nn.Parameter(tensor) for key, tensor in trunk.items()}
    torch.save(bare, tmp_path / "bare.pth")
    safetensors.torch.save_file(trunk, tmp_path / "trunk.safetensors")
    sr, hr = pictures(side=16)
    expected = VggFeature(weights=weights)(sr, hr)
    for file in ("bare.pth", "trunk.safetensors"):
        assert torch.equal(VggFeature(weights=str(tmp_path / file))(sr, hr), expected)


def without_the_deepest(state):
    del state["features.34.weight"]


def with_another(state):
    state["features.37.weight"] = torch.zeros(1)


def of_another_width(state):
    state["features.0.weight"] = torch.zeros(32, 3, 3, 3)


def not_finite(state):
    state["features.2.bias"] = torch.full((64,), float("nan"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            without_the_deepest,
            "is not the trunk 'vgg19' in torchvision's layout: the tensor "
            "features.34.weight is missing",
        ),
        (with_another, "unexpected tensor '37.weight'"),
        (of_another_width, "features.0.weight is (32, 3, 3, 3) but must be (64, 3, 3, 3)"),
        (not_finite, "features.2.bias contains NaN or infinity"),
    ],
)
def test_a_trunk_is_read_strictly(trunk, tmp_path, spoil, message) -> None:
    state = dict(trunk)
    spoil(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError) as caught:  # even if the requested layer is there
        VggFeature({"conv1_1": 1.0}, weights=str(tmp_path / "a.pth"))
    assert message in str(caught.value)


class _Payload:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_files_of_no_use_are_one_line_each(tmp_path) -> None:
    torch.save({"a": _Payload(tmp_path / "executed")}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "epoch.pth").read_bytes()[:200])
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 4)
    for name, message in (
        ("code.pth", "not a readable"),
        ("list.pth", "not a state dict"),
        ("epoch.pth", "not a state dict"),
        ("cut.pth", "not a readable"),
        ("cut.safetensors", "not a readable"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            VggFeature(weights=str(tmp_path / name))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_building_leaves_the_random_numbers_alone(weights) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    VggFeature(weights=weights)
    assert torch.equal(torch.rand(3), expected)


def test_torchvision_imports_with_any_build_of_torch() -> None:
    code = (
        "from pipeline.libraries import import_torchvision as door\n"
        "import sys\n"
        "assert 'torch' not in sys.modules\n"
        "torchvision = door()\n"
        "assert door() is torchvision is sys.modules['torchvision']\n"
        "import torch\n"
        "assert torchvision.models.squeezenet1_1(weights=None)(torch.rand(1, 3, 64, 64)).shape == "
        "(1, 1000)\n"
        "torch.ops.torchvision.nms, torch.ops.torchvision.qnms\n"
        "import lpips\n"
        "import gc; gc.collect(); torch.ops.torchvision.nms.default\n"
    )
    done = run_python(code, flags=("-W", "error"))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_losses_do_not_import_torchvision_until_it_is_needed() -> None:
    code = (
        "import sys, pipeline.losses; sys.exit('torchvision' in sys.modules or 'lpips' in "
        "sys.modules)"
    )
    assert run_python(code).returncode == 0


@pytest.mark.parametrize("scale", [1.0, 65536.0, 1e-9])
def test_a_trunk_in_16_bits_gives_nearly_the_same_loss_and_gradient(weights, scale: float) -> None:
    """Whatever factor training multiplies the loss by: a loss scale, or a small weight."""
    found = []
    for precision in ("float32", "float16"):
        criterion = Criterion(
            {
                "vgg_feature": {
                    "weight": 1.0,
                    "weights": weights,
                    "precision": precision,
                    "layers": {"conv2_2": 0.5, "conv5_4": 1.0},
                }
            }
        )
        sr, hr = pictures(side=32)
        sr.requires_grad_()
        loss = criterion(sr, hr)["vgg_feature"]
        assert loss.dtype == torch.float32
        (loss * scale).backward()
        found.append((loss.item(), sr.grad / scale))
    (exact, gradient), (near, other) = found
    assert near == pytest.approx(exact, rel=1e-3)
    assert near != exact, "or it was not computed in 16 bits"
    assert F.cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > 0.97
    assert other.norm().item() == pytest.approx(gradient.norm().item(), rel=0.03)


def test_what_a_trunk_computes_in() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [trunk_dtype("auto", device) for device in (cpu, gpu)] == [torch.float32, torch.float16]
    assert [trunk_dtype("float32", gpu), trunk_dtype("bfloat16", cpu)] == [
        torch.float32,
        torch.bfloat16,
    ]
    with pytest.raises(
        UserError, match="precision 'fp8' is not one of auto, float32, float16, bfloat16"
    ):
        Criterion({"vgg_feature": {"weight": 1.0, "precision": "fp8"}})


@pytest.fixture(scope="session")
def alex(tmp_path_factory) -> str:
    features = import_torchvision().models.alexnet(weights=None).features
    path = tmp_path_factory.mktemp("trunks") / "alex.pth"
    torch.save(features.state_dict(), path)
    return str(path)


def terms(vgg16: str, vgg19: str, alex: str) -> dict[str, dict]:
    """A term of every loss that has a trunk; fewer layers than usual take less time."""
    layers = {"conv1_1": 0.5, "conv2_2": 1.0}
    return {
        **{name: {"weight": 1, "weights": vgg19, "layers": layers} for name in VGG19_LOSSES},
        "lpips": {"weight": 1, "weights": alex},
        "dists": {"weight": 1, "weights": vgg16},
    }


def test_all_trunks_compile_as_one_graph(vgg16, vgg19, alex) -> None:
    """Traced, but not compiled by Inductor, which would take a minute."""
    criterion = Criterion(terms(vgg16, vgg19, alex))
    assert len(criterion.trunks) == 3  # the losses on VGG19 share one
    sr, hr = pictures()

    def losses_and_gradient() -> tuple[list[float], torch.Tensor]:
        own = sr.clone().requires_grad_()
        losses = criterion(own, hr)
        sum(losses.values()).backward()
        return [loss.item() for loss in losses.values()], own.grad

    expected = losses_and_gradient()
    graphs = []
    for trunk in criterion.trunks:
        trunk.compile(
            backend=lambda graph, _: graphs.append(graph) or graph.forward,
            fullgraph=True,
            dynamic=False,
        )
    found = losses_and_gradient()
    # One each for SR and HR, and lpips is a single graph of both.
    assert len(graphs) == 2 * 2 + 1
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-7)
    losses_and_gradient()
    assert len(graphs) == 2 * 2 + 1, "nothing is traced again"


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_losses_on_vgg19_share_a_trunk_and_change_nothing(vgg19: str, precision: str) -> None:
    layers = {
        "vgg_feature": {"conv2_1": 1.0},
        "vgg_patch": {"conv2_2": 1.0, "conv1_2": 0.5},
        "contextual": {"conv2_2": 1.0},
    }
    weights = {"vgg_feature": 1.0, "vgg_patch": 0.01, "contextual": 0.1}
    given = {
        name: {
            "weight": weights[name],
            "weights": vgg19,
            "layers": layers[name],
            "precision": precision,
        }
        for name in layers
    }
    together, calls = Criterion(given), []
    (trunk,) = together.trunks
    trunk.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    sr, hr = pictures()
    values = together(sr.requires_grad_(), hr)
    assert list(values) == list(layers)
    assert calls == [False, True]
    sum(values.values()).backward()
    gradient = torch.zeros_like(sr)
    for name, term in given.items():
        own = sr.detach().clone().requires_grad_()
        alone = Criterion({name: term})(own, hr)[name]
        assert values[name].item() == pytest.approx(alone.item(), rel=1e-6)
        alone.backward()
        gradient += own.grad
    error = (sr.grad - gradient).norm() / gradient.norm()
    assert error < (1e-5 if precision == "float32" else 0.05)


def test_other_files_and_precisions_are_other_trunks(vgg19: str, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    other.write_bytes(Path(vgg19).read_bytes())
    first = {"weight": 1, "weights": vgg19, "layers": {"conv1_1": 1.0}}
    for change, number in (
        ({}, 1),
        ({"weights": str(other)}, 2),
        ({"precision": "bfloat16"}, 2),
    ):
        criterion = Criterion({"vgg_feature": first, "vgg_patch": {**first, **change}})
        assert len(criterion.trunks) == number


def test_features_of_hr_are_computed_without_gradient(vgg16, vgg19, alex) -> None:
    made = []
    criterion = Criterion(terms(vgg16, vgg19, alex))
    for loss in criterion._losses.values():
        for layer in loss.modules():
            # lpips weighs the differences of features with convolutions of 1x1.
            if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
                layer.register_forward_hook(lambda _, __, out: made.append(out.requires_grad))
    sr, hr = pictures()
    criterion(sr.requires_grad_(), hr.requires_grad_())
    assert made.count(True) == made.count(False) > 5


def test_trunks_are_channels_last_on_a_gpu_alone(vgg16, vgg19, alex, monkeypatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [trunk_layout(cpu), trunk_layout(gpu)] == [torch.preserve_format, torch.channels_last]
    found = []
    for layout in (torch.preserve_format, torch.channels_last):
        for module in (losses, trunks):
            monkeypatch.setattr(module, "trunk_layout", lambda _, layout=layout: layout)
        criterion = Criterion(terms(vgg16, vgg19, alex))
        weight = criterion.trunks[0].features[2].weight
        assert weight.is_contiguous() == (layout is torch.preserve_format)
        sr, hr = pictures()
        values = criterion(sr.requires_grad_(), hr)
        sum(values.values()).backward()
        found.append(([value.item() for value in values.values()], sr.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)
