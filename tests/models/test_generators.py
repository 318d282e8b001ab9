from __future__ import annotations

import re

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from pipeline.export.onnx_file import ByteNetwork
from pipeline.images import to_bytes
from pipeline.models import spandrel
from pipeline.models.common import BatchNorm2d
from pipeline.models.compact import SRVGGNetCompact
from pipeline.models.msrresnet import MSRResNet
from pipeline.models.rrdbnet import RRDBNet
from pipeline.models.srresnet import SRResNet
from pipeline.models.vapsr import bicubic_kernel, cubic_upscale
from pipeline.models.weights import SavedNetwork, read_network, write_network

SMALL = {
    SRResNet: {"num_features": 8, "num_blocks": 2},
    MSRResNet: {"num_features": 8, "num_blocks": 2},
    RRDBNet: {"num_features": 8, "num_blocks": 2, "num_grow_ch": 4},
    SRVGGNetCompact: {"num_features": 8, "num_conv": 3},
}
SCALES = {
    SRResNet: (1, 2, 4, 8),
    MSRResNet: (1, 2, 3, 4),
    RRDBNet: (1, 2, 4),
    SRVGGNetCompact: (1, 2, 3, 4),
}
VARIANTS = [
    (network_class, scale, {}) for network_class, scales in SCALES.items() for scale in scales
] + [
    (MSRResNet, 4, {"global_residual": "bilinear"}),
    (MSRResNet, 3, {"global_residual": "bilinear"}),
    (RRDBNet, 4, {"fusion_kernel": 1}),
    (RRDBNet, 2, {"hr_kernel": 5}),
    (RRDBNet, 4, {"activation": "prelu"}),
    (SRVGGNetCompact, 4, {"activation": "relu"}),
    (SRVGGNetCompact, 2, {"activation": "leakyrelu"}),
]


def small(network_class, scale, seed=0, **params):
    """Return a network of a few thousand random parameters and random batch norm statistics."""
    torch.manual_seed(seed)
    network = network_class(scale=scale, **{**SMALL[network_class], **params})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for module in network.modules():
            if isinstance(module, BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def shapes(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def conv(state, images, name, padding=1):
    return F.conv2d(images, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=padding)


@pytest.mark.parametrize(
    ("network_class", "scale", "params", "expected"),
    [
        (SRResNet, 4, {}, 1_547_350),
        (SRResNet, 2, {}, 1_399_637),
        (SRResNet, 8, {}, 1_695_063),
        (MSRResNet, 4, {}, 1_517_571),
        (RRDBNet, 4, {}, 16_697_987),
        (RRDBNet, 2, {}, 16_703_171),
        (RRDBNet, 4, {"num_blocks": 6}, 4_467_779),
        (SRVGGNetCompact, 4, {}, 621_424),
        (SRVGGNetCompact, 4, {"num_conv": 32}, 1_213_296),
    ],
)
def test_parameter_counts_are_the_published_ones(network_class, scale, params, expected):
    with torch.device("meta"):
        assert count(network_class(scale=scale, **params)) == expected


@pytest.mark.parametrize(("network_class", "scale", "params"), VARIANTS)
def test_shapes_and_dtypes(network_class, scale, params):
    network = small(network_class, scale, **params)
    images = torch.randint(0, 256, (2, 3, 7, 10), dtype=torch.uint8)
    kept = images.clone()
    with torch.inference_mode():
        from_bytes = network(images)
        assert from_bytes.shape == (2, 3, 7 * scale, 10 * scale)
        assert from_bytes.dtype == torch.float32
        floats = images / 255
        assert torch.equal(network(floats), from_bytes)
        assert torch.equal(floats, kept / 255)  # the input is not changed in place
        assert network.bfloat16()(images).dtype == torch.bfloat16
        assert network.double()(images).dtype == torch.float64
    assert torch.equal(images, kept)


@pytest.mark.parametrize(("network_class", "scale", "params"), VARIANTS)
def test_every_parameter_gets_a_gradient_from_the_first_step_on(network_class, scale, params):
    torch.manual_seed(0)
    network = network_class(scale=scale, **{**SMALL[network_class], **params}).train()
    (
        network(torch.rand(2, 3, 12, 12)) - torch.rand(2, 3, 12 * scale, 12 * scale)
    ).abs().mean().backward()
    dead = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert dead == []


@pytest.mark.parametrize("network_class", SMALL)
def test_no_module_is_used_twice(network_class):
    network = network_class(scale=4, **SMALL[network_class])
    named = list(network.named_modules(remove_duplicate=False))
    assert len({id(module) for _, module in named}) == len(named)
    storages = [parameter.data_ptr() for parameter in network.parameters()]
    assert len(set(storages)) == len(storages)


def test_each_block_of_srresnet_learns_by_itself():
    torch.manual_seed(0)
    network = SRResNet(scale=4, num_features=8)
    assert len({id(block) for block in network.trunk}) == 16
    network(torch.rand(2, 3, 8, 8)).square().mean().backward()
    gradients = [block.rcb[0].weight.grad for block in network.trunk]
    assert all(
        not torch.allclose(first, second)
        for i, first in enumerate(gradients)
        for second in gradients[:i]
    )


@pytest.mark.parametrize(("network_class", "scale", "params"), VARIANTS)
def test_a_network_is_recognised_from_its_tensors_alone(network_class, scale, params):
    network = small(network_class, scale, **params)
    found = [other.recognise(shapes(network)) for other in SMALL]
    if params.get("activation") in ("relu", "leakyrelu"):
        assert found == [None] * len(SMALL)  # the tensors do not reveal which of the two
        return
    ((position, (found_scale, found_params)),) = (
        (i, f) for i, f in enumerate(found) if f is not None
    )
    assert (list(SMALL)[position], found_scale) == (network_class, scale)
    assert found_params.items() >= {**SMALL[network_class], **params}.items()
    rebuilt = network_class(scale=found_scale, **found_params).eval()
    rebuilt.load_state_dict(network.state_dict(), strict=True)
    images = torch.rand(1, 3, 8, 9)
    with torch.inference_mode():
        assert torch.equal(rebuilt(images), network(images))


@pytest.mark.parametrize("network_class", SMALL)
def test_a_network_is_not_recognised_without_one_of_its_first_or_last_tensors(network_class):
    whole = shapes(small(network_class, 4))
    convolutions = [
        name for name, shape in whole.items() if len(shape) == 4 and "kernel" not in name
    ]
    for name in (convolutions[0], convolutions[-1]):
        assert (
            network_class.recognise({key: shape for key, shape in whole.items() if key != name})
            is None
        )
    assert network_class.recognise({}) is None
    assert network_class.recognise(dict.fromkeys(whole, (1,))) is None


def plain_srresnet(state, images):
    """The network from the paper with only functions; batch norms as in evaluation."""

    def norm(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{kind}"].view(1, -1, 1, 1)
            for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def prelu(x, name):
        return torch.where(x > 0, x, x * state[f"{name}.weight"])

    first = x = prelu(conv(state, images, "conv1.0", padding=4), "conv1.1")
    for block in range(2):
        y = prelu(
            norm(conv(state, x, f"trunk.{block}.rcb.0"), f"trunk.{block}.rcb.1"),
            f"trunk.{block}.rcb.2",
        )
        x = x + norm(conv(state, y, f"trunk.{block}.rcb.3"), f"trunk.{block}.rcb.4")
    x = first + norm(conv(state, x, "conv2.0"), "conv2.1")
    for stage in range(len([name for name in state if name.endswith("upsample_block.0.weight")])):
        name = f"upsampling.{stage}.upsample_block"
        x = prelu(F.pixel_shuffle(conv(state, x, f"{name}.0"), 2), f"{name}.2")
    return conv(state, x, "conv3", padding=4)


def plain_msrresnet(state, images, scale):
    x = F.leaky_relu(conv(state, images, "conv_first"), 0.1)
    for block in range(2):
        x = x + conv(state, F.relu(conv(state, x, f"body.{block}.conv1")), f"body.{block}.conv2")
    stages = {1: (), 4: (("upconv1", 2), ("upconv2", 2))}.get(scale, (("upconv1", scale),))
    for name, step in stages:
        x = F.leaky_relu(F.pixel_shuffle(conv(state, x, name), step), 0.1)
    x = conv(state, F.leaky_relu(conv(state, x, "conv_hr"), 0.1), "conv_last")
    if "residual_kernel" in state:
        return x + cubic_upscale(images, bicubic_kernel(scale), scale)
    size = (images.shape[2] * scale, images.shape[3] * scale)
    return x + F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def plain_rrdbnet(state, images, activation="leakyrelu", rdb_scale=0.2, rrdb_scale=0.2):
    def activated(x, name):
        slope = state.get(f"{name}.weight", {"leakyrelu": 0.2, "relu": 0.0}.get(activation))
        return torch.where(x > 0, x, x * slope)

    def dense_block(x, name):
        seen = [x]
        for layer in range(1, 5):
            new = conv(state, torch.cat(seen, 1), f"{name}.conv{layer}")
            seen.append(activated(new, f"{name}.act{layer}"))
        fusion = state[f"{name}.conv5.weight"].shape[-1]
        return x + rdb_scale * conv(state, torch.cat(seen, 1), f"{name}.conv5", padding=fusion // 2)

    first = x = conv(state, images, "conv_first")
    for block in range(2):
        y = x
        for number in (1, 2, 3):
            y = dense_block(y, f"body.{block}.rdb{number}")
        x = x + rrdb_scale * y
    x = first + conv(state, x, "conv_body")
    for number in (1, 2):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = activated(conv(state, x, f"conv_up{number}"), f"act_up{number}")
    last = state["conv_hr.weight"].shape[-1] // 2
    x = activated(conv(state, x, "conv_hr", padding=last), "act_hr")
    return conv(state, x, "conv_last", padding=last)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_srresnet_is_the_papers(scale):
    network, images = small(SRResNet, scale).double(), torch.rand(2, 3, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(
        network(images), plain_srresnet(network.state_dict(), images), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("residual", ["bicubic", "bilinear"])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_msrresnet_is_basicsrs(scale, residual):
    network = small(MSRResNet, scale, global_residual=residual).double()
    images = torch.rand(2, 3, 9, 11, dtype=torch.float64)
    expected = plain_msrresnet(network.state_dict(), images, scale)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"fusion_kernel": 1, "rdb_residual_scale": 0.5, "rrdb_residual_scale": 0.9},
        {"rdb_residual_scale": 0.3},
        {"hr_kernel": 5, "activation": "relu"},
        {"activation": "prelu"},
    ],
)
def test_every_knob_of_rrdbnet_turns_something(params):
    network = small(RRDBNet, 4, **params).double()
    images = torch.rand(2, 3, 9, 11, dtype=torch.float64)
    expected = plain_rrdbnet(
        network.state_dict(),
        images,
        params.get("activation", "leakyrelu"),
        params.get("rdb_residual_scale", 0.2),
        params.get("rrdb_residual_scale", 0.2),
    )
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-10)


def test_weight_init_scale_is_that_of_the_dense_blocks():
    usual, larger = (
        small(RRDBNet, 4, weight_init_scale=factor).state_dict() for factor in (0.1, 0.5)
    )
    noise = small(RRDBNet, 4, weight_init_scale=1e-12).state_dict()
    for name in usual:
        factor = 5 if name.startswith("body.") and name.endswith("weight") else 1
        expected = factor * (usual[name] - noise[name]) + noise[name]
        torch.testing.assert_close(larger[name], expected, rtol=1e-5, atol=1e-6)


def test_files_of_rrdbnet_with_other_knobs_are_ours_alone(tmp_path):
    """Spandrel opens no other kernels, and applies leaky ReLU whatever the activation."""
    for params in ({"hr_kernel": 5}, {"activation": "prelu"}, {"activation": "relu"}):
        network = small(RRDBNet, 4, num_grow_ch=32, **params)
        saved = {**SMALL[RRDBNet], "num_grow_ch": 32, **params}
        path = tmp_path / "a.safetensors"
        write_network(path, SavedNetwork("rrdbnet", 4, saved, network.state_dict()))
        found = read_network(path)
        images = torch.rand(1, 3, 8, 8)
        with torch.inference_mode():
            sr = network(images)
            assert torch.equal(found.build()(images), sr)
            theirs = spandrel.read(network.state_dict())
            if params == {"hr_kernel": 5}:
                assert theirs is None
            else:
                assert (theirs.model.eval()(images) - sr).abs().max() > 1e-3
                assert theirs.model.hyperparameters["act"] == RRDBNet.UNSEEN["activation"]


@pytest.mark.parametrize("scale", [1, 3])
def test_compact_adds_the_nearest_upscale(scale):
    network = small(SRVGGNetCompact, scale)
    with torch.no_grad():
        for parameter in network.body[-1].parameters():
            parameter.zero_()
    images = torch.rand(1, 3, 5, 6)
    nearest = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    assert torch.equal(network(images), nearest)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_msrresnet_starts_at_the_interpolated_image(scale):
    torch.manual_seed(0)
    images = torch.rand(1, 3, 12, 12)
    with torch.inference_mode():
        bicubic = cubic_upscale(images, bicubic_kernel(scale), scale)
        assert (MSRResNet(scale=scale)(images) - bicubic).abs().max() < 1e-2
        bilinear = F.interpolate(images, scale_factor=scale, mode="bilinear")
        assert (
            MSRResNet(scale=scale, global_residual="bilinear")(images) - bilinear
        ).abs().max() < 1e-2


def test_srresnet_starts_with_images_of_a_sane_size():
    torch.manual_seed(0)
    assert SRResNet(scale=4, num_features=32)(torch.rand(2, 3, 12, 12)).std() < 1


def test_tensors_are_named_as_in_the_files_of_the_field():
    def layers(network):
        return {
            name.removesuffix(".weight") for name in shapes(network) if name.endswith(".weight")
        }

    ends = {"conv_first", "conv_hr", "conv_last"}
    assert layers(MSRResNet(scale=4, **SMALL[MSRResNet])) == ends | {"upconv1", "upconv2"} | {
        f"body.{block}.conv{layer}" for block in range(2) for layer in (1, 2)
    }
    assert layers(MSRResNet(scale=3, **SMALL[MSRResNet])) == ends | {"upconv1"} | {
        f"body.{block}.conv{layer}" for block in range(2) for layer in (1, 2)
    }
    assert layers(MSRResNet(scale=1, **SMALL[MSRResNet])) == ends | {
        f"body.{block}.conv{layer}" for block in range(2) for layer in (1, 2)
    }
    assert layers(RRDBNet(scale=2, **SMALL[RRDBNet])) == ends | {
        "conv_body",
        "conv_up1",
        "conv_up2",
    } | {
        f"body.{block}.rdb{dense}.conv{layer}"
        for block in range(2)
        for dense in (1, 2, 3)
        for layer in range(1, 6)
    }
    assert layers(SRVGGNetCompact(scale=2, **SMALL[SRVGGNetCompact])) == {
        f"body.{layer}" for layer in range(9)
    }
    assert shapes(MSRResNet(scale=2)).keys() - shapes(
        MSRResNet(scale=2, global_residual="bilinear")
    ).keys() == {"residual_kernel"}


def as_2021(name):
    """Return the name of one of our tensors in the SRGAN-PyTorch of late 2021."""
    name = re.sub(r"^conv([123])\.", r"conv_block\1.", name).replace(".rcb.", ".rc_block.")
    return re.sub(
        r"upsampling\.(\d+)\.upsample_block\.(\d)",
        lambda match: f"upsampling.{3 * int(match[1]) + int(match[2])}",
        name,
    )


def as_early_2022(name):
    return re.sub(r"^conv([123])\.", r"conv_block\1.", name)


def as_mid_2021(name):
    layers = ("conv1", "bn1", "prelu", "conv2", "bn2")
    name = re.sub(r"\.rcb\.(\d)\.", lambda match: f".{layers[int(match[1])]}.", name)
    return re.sub(
        r"^upsampling\.(\d+)\.upsample_block\.(\d)\.",
        lambda match: f"subpixel_conv.{match[1]}.{'prelu' if match[2] == '2' else 'conv'}.",
        name,
    )


@pytest.mark.parametrize("renamed", [as_2021, as_early_2022, as_mid_2021])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_files_of_srgan_pytorch_are_converted(renamed, scale):
    network = small(SRResNet, scale)
    state = network.state_dict()
    foreign = {renamed(name): tensor for name, tensor in state.items()}
    assert not foreign.keys() <= state.keys()
    assert (
        SRResNet.recognise({name: tuple(tensor.shape) for name, tensor in foreign.items()}) is None
    )
    converted = SRResNet.convert(foreign)
    assert converted.keys() == state.keys()
    assert all(converted[name] is state[name] for name in state)
    assert SRResNet.recognise(shapes(network)) == (scale, SMALL[SRResNet])


def test_files_with_one_block_in_all_places_load_into_blocks_of_their_own():
    source = SRResNet(scale=4, num_features=8)
    source.trunk = torch.nn.Sequential(*[source.trunk[0]] * 16)  # how such files were made
    state = source.eval().state_dict()
    assert state["trunk.0.rcb.0.weight"].data_ptr() == state["trunk.15.rcb.0.weight"].data_ptr()
    converted = SRResNet.convert({as_2021(name): tensor for name, tensor in state.items()})
    scale, params = SRResNet.recognise(
        {name: tuple(tensor.shape) for name, tensor in converted.items()}
    )
    assert (scale, params["num_blocks"]) == (4, 16)
    network = SRResNet(scale=scale, **params).eval()
    network.load_state_dict(converted, strict=True)
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(network(images), source(images))
    with torch.no_grad():
        network.trunk[0].rcb[0].weight.zero_()
    assert network.trunk[15].rcb[0].weight.any()


def test_what_is_no_file_of_the_network_is_not_converted():
    own = small(SRResNet, 4).state_dict()
    assert SRResNet.convert(own) is None
    with_tanh = {
        name.replace("conv_block3.", "conv_block3.0."): tensor
        for name, tensor in ((as_2021(name), tensor) for name, tensor in own.items())
    }
    assert SRResNet.convert(with_tanh) is None
    for network_class in (MSRResNet, RRDBNet, SRVGGNetCompact):
        other = small(network_class, 4).state_dict()
        assert SRResNet.convert(other) is None
        assert RRDBNet.convert(other) is None


def second_esrgan_names(name):
    name = re.sub(r"^body\.(\d+)\.rdb(\d)\.", r"RRDB_trunk.\1.RDB\2.", name)
    return (
        re.sub(r"^conv_up", "upconv", name)
        .replace("conv_body.", "trunk_conv.")
        .replace("conv_hr.", "HRconv.")
    )


def first_esrgan_names(name):
    name = re.sub(r"^body\.(\d+)\.rdb(\d)\.(conv\d)\.", r"model.1.sub.\1.RDB\2.\3.0.", name)
    for ours, place in (
        ("conv_first", "0"),
        ("conv_body", "1.sub.2"),
        ("conv_up1", "3"),
        ("conv_up2", "6"),
        ("conv_hr", "8"),
        ("conv_last", "10"),
    ):
        name = name.replace(f"{ours}.", f"model.{place}.")
    return name


def esrdgan_names(name):
    name = re.sub(
        r"^body\.(\d+)\.rdb(\d)\.conv(\d)\.",
        lambda found: (
            f"model.1.module.{found[1]}.rdbs.{int(found[2]) - 1}."
            + ("LFF." if found[3] == "5" else f"conv{found[3]}.conv.0.")
        ),
        name,
    )
    for ours, place in (
        ("conv_first", "0"),
        ("conv_body", "1.module.2"),
        ("conv_up1", "2.upconv.1"),
        ("conv_up2", "3.upconv.1"),
        ("conv_hr", "4"),
        ("conv_last", "6"),
    ):
        name = name.replace(f"{ours}.", f"model.{place}.")
    return name


@pytest.mark.parametrize("renamed", [second_esrgan_names, first_esrgan_names, esrdgan_names])
def test_files_of_esrgan_and_esrdgan_are_converted(renamed):
    state = small(RRDBNet, 4).state_dict()
    foreign = {renamed(name): tensor for name, tensor in state.items()}
    assert (
        RRDBNet.recognise({name: tuple(tensor.shape) for name, tensor in foreign.items()}) is None
    )
    converted = RRDBNet.convert(foreign)
    assert converted.keys() == state.keys()
    assert all(converted[name] is state[name] for name in state)


@pytest.mark.parametrize(
    ("network_class", "tail"),
    [
        (MSRResNet, {"upsample.0.weight": (32, 8, 3, 3)}),
        (SRResNet, {"upsampler.0.weight": (32, 8, 3, 3)}),
    ],
)
def test_another_upsampler_is_not_taken_for_x1(network_class, tail):
    whole = shapes(small(network_class, 1))
    assert network_class.recognise(whole)[0] == 1
    assert network_class.recognise({**whole, **tail}) is None


def test_esrgan_plus_is_not_claimed():
    state = small(RRDBNet, 4).state_dict()
    for names in (lambda name: name, second_esrgan_names, first_esrgan_names, esrdgan_names):
        plus = {
            names(name): tensor
            for name, tensor in {
                **state,
                "body.0.rdb1.conv1x1.weight": torch.zeros(4, 8, 1, 1),
            }.items()
        }
        assert (
            RRDBNet.recognise({name: tuple(tensor.shape) for name, tensor in plus.items()}) is None
        )
        assert RRDBNet.convert(plus) is None


def spandrel_model(path):
    pytest.importorskip("pipeline.libraries").import_torchvision()
    spandrel = pytest.importorskip("spandrel", reason="spandrel is not installed")
    return spandrel.ModelLoader(device="cpu").load_from_file(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("network_class", "scale", "params", "architecture"),
    [
        (RRDBNet, 4, {"num_grow_ch": 32}, "ESRGAN"),
        (RRDBNet, 2, {"num_grow_ch": 32}, "ESRGAN"),
        (RRDBNet, 1, {"num_grow_ch": 32}, "ESRGAN"),
        (SRVGGNetCompact, 1, {}, "Compact"),
        (SRVGGNetCompact, 2, {}, "Compact"),
        (SRVGGNetCompact, 3, {}, "Compact"),
        (SRVGGNetCompact, 4, {"num_features": 12}, "Compact"),
    ],
)
def test_spandrel_opens_our_files_and_computes_the_same(
    tmp_path, network_class, scale, params, architecture, suffix
):
    network = small(network_class, scale, **params)
    path = tmp_path / f"a{suffix}"
    if suffix == ".pth":
        torch.save({"params_ema": network.state_dict()}, path)
    else:
        safetensors.torch.save_file(network.state_dict(), path)
    opened = spandrel_model(path)
    assert (opened.architecture.id, opened.scale, opened.input_channels) == (architecture, scale, 3)
    # the second must be padded to be unshuffled at x1 and x2
    for height, width in ((12, 16), (13, 15)):
        images = torch.rand(2, 3, height, width)
        with torch.inference_mode():
            torch.testing.assert_close(
                opened.model.eval()(images), network(images), rtol=0, atol=1e-6
            )


@pytest.mark.parametrize(("network_class", "scale", "params"), VARIANTS)
def test_nothing_beyond_the_receptive_radius_is_seen(network_class, scale, params):
    network = small(
        network_class,
        scale,
        **{
            **params,
            "num_features": 4,
            **({} if network_class is SRVGGNetCompact else {"num_blocks": 1}),
        },
    ).double()
    radius = network.receptive_radius
    images = torch.rand(1, 3, 4, 4 * (radius // 4) + 16, dtype=torch.float64)
    images[..., 0] = torch.nan  # the leftmost LR column; a NaN passes even the smallest weights
    with torch.inference_mode():
        differs = network(images).isnan().any(dim=2).any(dim=1)[0]
    assert not differs[(radius + 1) * scale :].any()
    # Unshuffling makes the radius a multiple of its factor, up to twice that minus one above the
    # reach.
    slack = 2 * getattr(network, "unshuffle", 1)
    assert differs[: (radius + 1 - slack) * scale].any(dim=0)
    assert differs[(radius - slack) * scale : (radius + 1) * scale].any()


@pytest.mark.parametrize("scale", [1, 2])
def test_tiles_of_a_folding_network_join_without_a_seam(scale):
    network = small(RRDBNet, scale, num_blocks=1).double()
    halo = network.receptive_radius
    assert halo % network.unshuffle == 0
    images = torch.rand(1, 3, 4, 2 * halo + 24, dtype=torch.float64)
    with torch.inference_mode():
        whole = network(images)[..., (halo + 12) * scale :]
        right = network(images[..., 12:])[..., halo * scale :]
    torch.testing.assert_close(right, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32])
def test_batch_norm_keeps_float32_statistics_beside_half_weights(weights):
    torch.manual_seed(0)
    norm, plain = BatchNorm2d(4), torch.nn.BatchNorm2d(4)
    for parameter in norm.parameters():
        # as in DeepSpeed: the parameters, not the buffers
        parameter.data = parameter.data.to(weights)
    features = (torch.randn(8, 4, 6, 6) * 3 + 1).to(weights)
    for _ in range(3):
        found, expected = norm(features), plain(features.float())
    assert found.dtype == weights
    torch.testing.assert_close(
        found.float(), expected, rtol=0, atol=0.05 if weights != torch.float32 else 1e-6
    )
    assert norm.running_mean.dtype == torch.float32
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(norm, name), getattr(plain, name), rtol=1e-3, atol=1e-4)
    found.float().square().mean().backward()
    assert norm.weight.grad.dtype == weights
    expected = plain.eval()(features.float())
    torch.testing.assert_close(norm.eval()(features).float(), expected, rtol=0, atol=0.05)


def test_batch_norm_keeps_its_statistics_where_a_batch_overflows():
    norm, images = BatchNorm2d(3).train(), torch.randn(4, 3, 8, 8)
    norm(images)
    kept = norm.running_mean.clone(), norm.running_var.clone()
    images[1, 2, 3, 4] = float("inf")
    norm(images)
    assert torch.isfinite(norm.running_mean).all()
    assert torch.isfinite(norm.running_var).all()
    torch.testing.assert_close(
        (norm.running_mean[2], norm.running_var[2]), (kept[0][2], kept[1][2]), rtol=0, atol=0
    )
    assert not torch.equal(norm.running_mean[:2], kept[0][:2])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_srresnet_trains_with_half_weights_and_float32_statistics(half):
    network = small(SRResNet, 4).train()
    for parameter in network.parameters():
        parameter.data = parameter.data.to(half)
    sr = network(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
    assert sr.dtype == half
    sr.float().square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


@pytest.mark.parametrize("network_class", SMALL)
def test_compiles_without_a_graph_break(network_class):
    network = small(network_class, 4 if network_class is not RRDBNet else 2)
    images = torch.randint(0, 256, (1, 3, 7, 9), dtype=torch.uint8)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), network(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_go_in_and_rounded_bytes_come_out(layout, dtype):
    network = small(MSRResNet, 2).to(dtype)
    images = torch.randint(0, 256, (2, 3, 6, 9), dtype=torch.uint8)
    with torch.inference_mode():
        values = network(images)
        found = ByteNetwork(network, layout)(
            images if layout == "nchw" else images.permute(0, 2, 3, 1)
        )
    assert values.dtype == dtype
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    found = found if layout == "nchw" else found.permute(0, 3, 1, 2)
    levels = (values.double() * 255).clamp(0, 255)
    assert torch.equal(found, to_bytes(values))
    assert (found.double() - levels).abs().max() <= 0.5 + 1e-4
    assert not torch.equal(found, levels.to(torch.uint8))  # truncation would differ


def test_byte_network_follows_its_weights_and_refuses_what_is_no_bytes():
    module = ByteNetwork(small(MSRResNet, 2))
    images = torch.randint(0, 256, (1, 3, 6, 9), dtype=torch.uint8)
    with torch.inference_mode():
        expected = to_bytes(module.network(images)).int()
        assert (module.bfloat16()(images).int() - expected).abs().max() <= 3
    with pytest.raises(ValueError, match=r"images are torch.float32, but must be torch.uint8"):
        module(images.float())
    with pytest.raises(ValueError, match="layout 'hwc' must be 'nchw' or 'nhwc'"):
        ByteNetwork(module.network, "hwc")


@pytest.mark.parametrize(
    ("network_class", "change", "rule"),
    [
        (SRResNet, {"scale": 3}, "scale 3 is not one of 1, 2, 4 and 8"),
        (SRResNet, {"num_blocks": 0}, "num_blocks 0 is not"),
        (SRResNet, {"scale": True}, "scale True"),
        (SRResNet, {"num_features": 8.0}, "num_features 8.0 is not a whole"),
        (MSRResNet, {"scale": 8}, "scale 8 is not one of 1, 2, 3 and 4"),
        (
            MSRResNet,
            {"global_residual": "none"},
            "global_residual 'none' is not one of 'bicubic', 'bilinear'",
        ),
        (RRDBNet, {"scale": 8}, "scale 8 is not one of 1, 2 and 4"),
        (RRDBNet, {"scale": 3}, "scale 3"),
        (RRDBNet, {"fusion_kernel": 2}, "fusion_kernel 2 is neither 1 nor 3"),
        (RRDBNet, {"fusion_kernel": 1.0}, "fusion_kernel 1.0 is neither"),
        (RRDBNet, {"fusion_kernel": True}, "fusion_kernel True is neither"),
        (RRDBNet, {"hr_kernel": 1}, "hr_kernel 1 is neither 3 nor 5"),
        (RRDBNet, {"activation": "gelu"}, "activation 'gelu' is not one of 'leakyrelu', 'relu'"),
        (RRDBNet, {"weight_init_scale": 0}, "weight_init_scale 0 is not a number above 0"),
        (RRDBNet, {"num_blocks": 10**8}, "num_blocks 100000000 is above 65536"),
        (RRDBNet, {"rdb_residual_scale": 0}, "rdb_residual_scale 0 is not a number above 0"),
        (
            RRDBNet,
            {"rrdb_residual_scale": float("nan")},
            "rrdb_residual_scale nan is not a number above 0",
        ),
        (RRDBNet, {"num_grow_ch": -1}, "num_grow_ch -1 is not"),
        (
            SRVGGNetCompact,
            {"activation": "gelu"},
            "activation 'gelu' is not one of 'prelu', 'relu', 'leakyrelu'",
        ),
        (SRVGGNetCompact, {"num_conv": "16"}, "num_conv '16' is not a whole number"),
        (SRVGGNetCompact, {"scale": 0}, "scale 0 is not one of 1, 2, 3 and 4"),
    ],
)
def test_bad_values_are_refused(network_class, change, rule):
    with pytest.raises(ValueError, match=rule):
        network_class(**{"scale": 2, **SMALL[network_class], **change})
