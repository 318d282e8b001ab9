from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.cli import UserError
from pipeline.models.common import BatchNorm2d, SpectralConv2d
from pipeline.models.discriminators import (
    AttentionGate,
    AttentionUNetDiscriminator,
    PatchDiscriminator,
    UNetDiscriminator,
    VGGDiscriminator,
    build_discriminator,
    frozen,
)

KINDS = {
    "vgg": {},
    "vgg-instance": {"norm": "instance"},
    "vgg-none": {"norm": "none"},
    "vgg-flatten": {"head": "flatten"},
    "vgg-wide": {"feature_kernel": 5},
    "unet": {},
    "unet-plain": {"skip_connections": False},
    "attention_unet": {},
    "patch": {"num_layers": 2},
}
NAMES = ("vgg", "unet", "attention_unet", "patch")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(kind, crop=32, num_features=4, **params):
    return build_discriminator(
        kind.split("-")[0], crop, num_features=num_features, **KINDS[kind], **params
    )


def crops(count=2, height=32, width=32):
    return torch.rand(count, 3, height, width)


def judged(network, images):
    """Return all logits of each image, of all scales."""
    logits = network(images)
    scales = [logits] if isinstance(logits, torch.Tensor) else logits
    return torch.cat([part.flatten(1) for part in scales], dim=1)


def snapshot(network):
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


def equal_states(first, second):
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key])
        for key in first
    )


def cast_parameters(network, dtype):
    """Cast as DeepSpeed does without `buffer_dtype`."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def published_vgg_names(num_stages):
    layers = [f"{stage}_{layer}" for stage in range(num_stages) for layer in (0, 1)]
    norms = [
        f"bn{layer}.{kind}"
        for layer in layers[1:]
        for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    return {
        *(f"conv{layer}.weight" for layer in layers),
        "conv0_0.bias",
        *norms,
        "linear1.weight",
        "linear1.bias",
        "linear2.weight",
        "linear2.bias",
    }


@pytest.mark.parametrize(("crop", "num_stages"), [(128, 5), (256, 6)])
@pytest.mark.parametrize("head", ["pool", "flatten"])
def test_vgg_is_the_published_one(crop, num_stages, head):
    with torch.device("meta"):
        network = VGGDiscriminator(crop=crop, head=head)
    assert set(network.state_dict()) == published_vgg_names(num_stages)
    assert tuple(network.linear1.weight.shape) == (100, 512 * 4 * 4)
    if crop == 128:
        assert count(network) == 14_499_401


def test_vgg_of_96_has_the_published_positions():
    with torch.device("meta"):
        network = VGGDiscriminator(crop=96, head="flatten")
    assert set(network.state_dict()) == published_vgg_names(5)
    assert count(network) == 14_499_401 - (16 - 9) * 512 * 100


def plain_vgg(state, images, num_stages):
    """The published network from its description: batch norm in training, 4x4 positions."""
    x = F.leaky_relu(
        F.conv2d(images, state["conv0_0.weight"], state["conv0_0.bias"], padding=1), 0.2
    )
    for layer in [f"{stage}_{layer}" for stage in range(num_stages) for layer in (0, 1)][1:]:
        x = F.conv2d(x, state[f"conv{layer}.weight"], stride=1 + int(layer[-1]), padding=1)
        mean, variance = (
            x.mean((0, 2, 3), keepdim=True),
            x.var((0, 2, 3), keepdim=True, unbiased=False),
        )
        weight, bias = (state[f"bn{layer}.{kind}"].view(1, -1, 1, 1) for kind in ("weight", "bias"))
        x = F.leaky_relu((x - mean) / (variance + 1e-5).sqrt() * weight + bias, 0.2)
    x = F.leaky_relu(
        F.linear(x.reshape(len(x), -1), state["linear1.weight"], state["linear1.bias"]), 0.2
    )
    return F.linear(x, state["linear2.weight"], state["linear2.bias"])


@pytest.mark.parametrize("crop", [32, 64])
def test_vgg_forward_is_the_description(crop):
    network = build("vgg", crop).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = crops(3, crop, crop).double()
    expected = plain_vgg(network.state_dict(), images, network.num_stages)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-10)
    assert expected.std() > 0.01


class PlainUNet(nn.Module):
    """Real-ESRGAN's network from torch's own modules, for sides that are multiples of 8."""

    def __init__(self, features):
        super().__init__()
        down = [
            nn.Conv2d(features << level, features << (level + 1), 4, 2, 1, bias=False)
            for level in range(3)
        ]
        up = [
            nn.Conv2d(features << level, features << (level - 1), 3, 1, 1, bias=False)
            for level in (3, 2, 1)
        ]
        same = [nn.Conv2d(features, features, 3, 1, 1, bias=False) for _ in range(2)]
        convs = [
            nn.Conv2d(3, features, 3, 1, 1),
            *map(nn.utils.spectral_norm, down + up + same),
            nn.Conv2d(features, 1, 3, 1, 1),
        ]
        for number, conv in enumerate(convs):
            self.add_module(f"conv{number}", conv)

    def forward(self, x):
        def act(number, x):
            return F.leaky_relu(getattr(self, f"conv{number}")(x), 0.2)

        kept = [act(0, x)]
        for number in (1, 2, 3):
            kept.append(act(number, kept[-1]))
        x = kept.pop()
        for number in (4, 5, 6):
            x = (
                act(number, F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
                + kept.pop()
            )
        return self.conv9(act(8, act(7, x)))


def test_unet_is_the_published_one_and_its_spectral_norm_torchs():
    """The same tensors load strictly; two training steps and an evaluation are bit-identical."""
    ours, theirs = build("unet"), PlainUNet(4)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for _ in range(2):
        images = crops(2, 40, 48)
        for network in (ours, theirs):
            network(images).square().mean().backward()
    assert equal_states(ours.state_dict(), theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            ours.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-8
        )
    images = crops(1, 32, 32)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-6, atol=1e-7)
    assert equal_states(ours.state_dict(), theirs.state_dict())


def test_unet_has_the_published_size():
    assert count(UNetDiscriminator(crop=256)) == 4_376_897


def expected_shapes(kind, height, width):
    """Shapes of the logits of two images, one per scale."""
    if kind.startswith("vgg"):
        return [(2, 1)]
    if kind.startswith("unet"):
        return [(2, 1, height, width)]
    sides = [(height, width), (-(-height // 2), -(-width // 2))]
    if kind == "patch":
        sides = [(height // 4 - 2, width // 4 - 2) for height, width in sides]
    return [(2, 1, *pair) for pair in sides]


def plain_patches(features):
    """The network of pix2pix for a patch of 70 x 70, from torch's own modules."""
    norm = nn.utils.spectral_norm
    widths = [(features << level, features << (level + 1)) for level in range(3)]
    return nn.Sequential(
        nn.Conv2d(3, features, 4, 2, 1),
        nn.LeakyReLU(0.2),
        *(
            layer
            for (few, many), stride in zip(widths, (2, 2, 1), strict=True)
            for layer in (norm(nn.Conv2d(few, many, 4, stride, 1)), nn.LeakyReLU(0.2))
        ),
        nn.Conv2d(features * 8, 1, 4, 1, 1),
    )


def test_patch_is_pix2pixs_network_at_each_scale_of_pix2pixhd():
    """The same tensors load strictly, and two training steps agree."""
    ours = build_discriminator("patch", 100, num_features=2, num_scales=3)
    theirs = nn.ModuleList(plain_patches(2) for _ in range(3))
    theirs.load_state_dict(
        {key.removeprefix("scales."): value for key, value in ours.state_dict().items()}
    )
    for _ in range(2):
        images = crops(2, 100, 117)
        logits = ours(images)
        sum(part.square().mean() for part in logits).backward()
        for part, network in zip(logits, theirs, strict=True):
            expected = network(images)
            torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-7)
            expected.square().mean().backward()
            images = F.avg_pool2d(images, 3, 2, 1, count_include_pad=False)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            ours.get_parameter(f"scales.{name}").grad, parameter.grad, rtol=1e-4, atol=1e-7
        )


def test_patch_and_attention_have_the_sizes_that_they_state():
    assert count(PatchDiscriminator(crop=128, num_scales=1)) == 2_764_737  # pix2pix's number
    assert count(AttentionUNetDiscriminator(crop=128, num_scales=1)) == 5_340_356
    assert count(PatchDiscriminator(crop=128, num_features=8)) == 2 * count(
        PatchDiscriminator(crop=128, num_features=8, num_scales=1)
    )


@pytest.mark.parametrize(("num_layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_of_patch_judges_a_square_of_that_size(num_layers, field):
    """Every pixel of the square has a gradient, and none outside."""
    network = PatchDiscriminator(crop=256, num_features=2, num_layers=num_layers, num_scales=1)
    images = torch.rand(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
    (logits,) = network.double()(images)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    rows, columns = (images.grad[0].abs().sum((0, axis)).nonzero().flatten() for axis in (1, 2))
    assert len(rows) == len(columns) == field == network.receptive_field
    assert rows[-1] - rows[0] == columns[-1] - columns[0] == field - 1


@pytest.mark.parametrize(
    ("name", "params", "smallest"),
    [
        ("patch", {}, 47),
        ("patch", {"num_scales": 1}, 32),
        ("patch", {"num_scales": 3}, 93),
        ("patch", {"num_layers": 4}, 95),
        ("attention_unet", {}, 32),
        ("attention_unet", {"num_scales": 3}, 64),
    ],
)
def test_the_smallest_crop_still_gives_logits_at_every_scale(name, params, smallest):
    network = build_discriminator(name, smallest, num_features=1, **params)
    assert all(part.numel() for part in network(crops(1, smallest, smallest)))
    with pytest.raises(UserError, match=f"crop {smallest - 1} is not .* at least {smallest} pix"):
        build_discriminator(name, smallest - 1, num_features=1, **params)


def spectral(conv):
    """Return a normalised weight by its definition."""
    return conv.weight_orig / torch.dot(conv.weight_u, conv.weight_orig.flatten(1) @ conv.weight_v)


def test_an_attention_gate_weighs_as_the_paper_says():
    gate = AttentionGate(4, 6).eval()
    fine, coarse = torch.randn(2, 4, 13, 18), torch.randn(2, 6, 6, 9)
    mixed = F.conv2d(fine, spectral(gate.fine), stride=2)
    mixed = mixed + F.conv2d(coarse, spectral(gate.coarse), gate.coarse.bias)
    weights = torch.sigmoid(F.conv2d(mixed.relu(), gate.score.weight, gate.score.bias))
    weights = F.interpolate(weights, (13, 18), mode="bilinear", align_corners=False)
    torch.testing.assert_close(gate(fine, coarse), fine * weights, rtol=1e-5, atol=1e-6)
    assert weights.std() > 0.01
    nn.init.constant_(gate.score.bias, -100)  # closed
    assert gate(fine, coarse).abs().max() < 1e-6


def test_what_a_closed_gate_hides_does_not_count():
    """With all gates closed, only the decoder's own way is left, as in the U-Net without skips."""
    network = build("attention_unet").scales[0].eval()
    for gate in (network.gate4, network.gate5, network.gate6):
        nn.init.constant_(gate.score.bias, -100)
    images = crops(1)
    features = images
    for conv in (network.conv0, network.conv1, network.conv2, network.conv3):
        features = F.leaky_relu(conv(features), 0.2)
    for conv in (network.conv4, network.conv5, network.conv6):
        features = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
        features = F.leaky_relu(conv(features), 0.2)
        features = torch.cat((features, torch.zeros_like(features)), 1)
    features = F.leaky_relu(network.conv8(F.leaky_relu(network.conv7(features), 0.2)), 0.2)
    torch.testing.assert_close(network(images), network.conv9(features), rtol=1e-5, atol=1e-6)


def test_a_wider_feature_kernel_widens_the_convolutions_with_stride_1():
    with torch.device("meta"):
        network = VGGDiscriminator(crop=64, feature_kernel=5)
    kernels = {
        name: module.kernel_size[0]
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    assert kernels == {name: 5 if name.endswith("_0") else 4 for name in kernels}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("crop", [32, 33, 45, 47, 48, 91, 96, 101, 128, 192])
def test_any_crop_gives_logits(kind, crop):
    network = build(kind, crop, num_features=2)
    logits = network(crops(2, crop, crop))
    scales = [logits] if isinstance(logits, torch.Tensor) else logits
    assert [tuple(part.shape) for part in scales] == expected_shapes(kind, crop, crop)
    assert all(torch.isfinite(part).all() for part in scales)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"vgg-flatten"}))
def test_images_of_other_sizes_are_judged_too(kind):
    network = build(kind, 64).eval()
    for height, width in ((64, 64), (70, 33), (257, 40)):
        logits = network(crops(2, height, width))
        scales = [logits] if isinstance(logits, torch.Tensor) else logits
        assert [tuple(part.shape) for part in scales] == expected_shapes(kind, height, width)


def test_the_flat_head_takes_its_crop_alone():
    with pytest.raises(ValueError, match=r"images of \(48, 64\) pixels do not fit the crop"):
        build("vgg-flatten", 64)(crops(2, 48, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_logits_and_not_probabilities(kind):
    network = build(kind)
    ends = (".conv9", "linear2", ".6") if hasattr(network, "scales") else ("conv9", "linear2")
    last = [module for name, module in network.named_modules() if name.endswith(ends)]
    assert len(last) == (2 if hasattr(network, "scales") else 1)
    for value in (50, -50):
        for module in last:
            nn.init.constant_(module.bias, value)
        assert (judged(network, crops(4)) / value).min() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_floats_give_the_same(kind):
    network = build(kind).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(judged(network, images), judged(network, images / 255))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_and_pixel_gets_a_gradient(kind):
    network = build(kind)
    images = crops(4).requires_grad_()
    judged(network, images).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert (images.grad.abs() > 0).float().mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_no_bias_is_cancelled_by_a_norm(kind):
    network = build(kind)
    names = dict(network.named_modules())
    for name, module in names.items():
        if isinstance(module, nn.Conv2d):
            norm = name.replace("conv", "bn")
            assert (module.bias is None) == (norm != name and norm in names), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [nn.Module.to, cast_parameters], ids=["all", "parameters"])
def test_half_precision_trains_and_agrees_with_float32(kind, dtype, cast):
    network = build(kind, 48, num_features=8)
    half = cast(copy.deepcopy(network), dtype)
    images = crops(4, 48, 48)
    results = []
    for judge in (network, half):
        pixels = images.clone().requires_grad_()
        for _ in range(2):
            logits = judged(judge, pixels)
        F.softplus(-logits.float()).mean().backward()
        results.append((logits, pixels.grad))
        assert all(torch.isfinite(parameter.grad).all() for parameter in judge.parameters())
    (logits, gradient), (half_logits, half_gradient) = results
    assert half_logits.dtype == dtype
    torch.testing.assert_close(half_logits.float(), logits, rtol=0.05, atol=0.05)
    assert F.cosine_similarity(half_gradient.flatten(), gradient.flatten(), dim=0) > 0.9
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            torch.testing.assert_close(half.get_buffer(name).float(), buffer, rtol=0.05, atol=0.02)


def test_batch_norm_statistics_stay_float32_where_only_the_weights_are_cast():
    norm = BatchNorm2d(6)
    reference = nn.BatchNorm2d(6)
    cast_parameters(norm, torch.bfloat16)
    for _ in range(30):
        features = (3 + 2 * torch.randn(4, 6, 5, 5)).bfloat16()
        assert norm(features).dtype == torch.bfloat16
        reference(features.float())
    assert norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean, reference.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, reference.running_var, rtol=1e-5, atol=1e-6)
    assert norm.num_batches_tracked == 30


def test_batch_norm_is_torchs_in_float32():
    ours, theirs = BatchNorm2d(6), nn.BatchNorm2d(6)
    for network in (ours, theirs):
        torch.manual_seed(3)
        nn.init.normal_(network.weight)
    features = torch.randn(4, 6, 5, 5)
    assert torch.equal(ours(features), theirs(features))
    assert equal_states(ours.state_dict(), theirs.state_dict())
    assert torch.equal(ours.eval()(features), theirs.eval()(features))


def largest_singular_value(conv):
    """Return that of the weight a 3x3 convolution uses, measured with one image per kernel tap."""
    taps = torch.eye(conv.weight_orig[0].numel()).view(-1, *conv.weight_orig.shape[1:])
    with torch.no_grad():
        return torch.linalg.matrix_norm(conv(taps)[..., 1, 1], 2).item()


def test_spectral_norm_brings_the_largest_singular_value_to_1():
    conv = SpectralConv2d(6, 10, 3, 1)
    with torch.no_grad():
        conv.weight_orig.mul_(7)
    for _ in range(50):
        conv(torch.zeros(1, 6, 3, 3))
    assert largest_singular_value(conv) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spectral_norms_are_right_from_the_first_pass_on(dtype):
    networks = nn.ModuleList(
        [
            UNetDiscriminator(crop=32, num_features=16),
            AttentionUNetDiscriminator(crop=32, num_features=8, num_scales=1),
            PatchDiscriminator(crop=32, num_features=8, num_scales=1),
        ]
    )
    for name, conv in cast_parameters(networks, dtype).named_modules():
        if isinstance(conv, SpectralConv2d):
            matrix = conv.weight_orig.detach().float().flatten(1)
            sigma = torch.dot(conv.weight_u, torch.mv(matrix, conv.weight_v)).item()
            assert sigma == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=0.1), name


def test_the_norm_is_part_of_the_gradient():
    """Against finite differences in float64."""
    conv = SpectralConv2d(2, 3, 3, 1).double().eval()
    features = torch.randn(1, 2, 4, 4, dtype=torch.float64)

    def judge(weight):
        return torch.func.functional_call(conv, {"weight_orig": weight}, (features,))

    assert torch.autograd.gradcheck(judge, conv.weight_orig.detach().clone().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_power_iterations_and_statistics_advance_in_training_only(kind):
    network = build(kind)
    before = snapshot(network)
    network.eval()(crops())
    assert equal_states(network.state_dict(), before)
    network.train()(crops())
    assert equal_states(network.state_dict(), before) == (
        not any(key.endswith(("running_mean", "weight_u")) for key in before)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_leaves_no_trace_and_the_gradient_is_autograds(kind):
    network = build(kind)
    judged(network, crops()).mean().backward()
    images = crops(3).requires_grad_()
    before, gradients = (
        snapshot(network),
        {name: p.grad.clone() for name, p in network.named_parameters()},
    )
    with frozen(network) as judge:
        assert judge is network
        logits = judged(judge, images)
    F.softplus(-logits).mean().backward()  # after the context, as in the generator's step
    assert equal_states(network.state_dict(), before)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter.grad, gradients[name])
    # Again without freezing, on a copy, whose spectral norms must not advance before the
    # comparison.
    twin = copy.deepcopy(network)
    for module in twin.modules():
        if isinstance(module, SpectralConv2d):
            module.is_iterating = False
    pixels = images.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.softplus(-judged(twin, pixels)).mean(), pixels)
    torch.testing.assert_close(images.grad, expected, rtol=1e-5, atol=1e-9)
    assert expected.abs().max() > 0


def test_frozen_normalises_by_the_batch_as_in_training():
    network = build("vgg")
    images = 0.2 * crops(3)
    with frozen(network):
        judged = network(images)
    evaluated = copy.deepcopy(network).eval()(images)
    assert torch.equal(judged, network(images))
    assert (judged - evaluated).abs().max() > 1e-3
    with frozen(network.eval()):
        # eval mode uses the running statistics as usual
        assert not torch.equal(network(images), judged)


@pytest.mark.parametrize("kind", NAMES)
def test_frozen_restores_every_flag_also_after_an_exception_and_when_nested(kind):
    network = build(kind)
    parameters = list(network.parameters())
    parameters[0].requires_grad_(False)
    for module in network.modules():
        if isinstance(module, BatchNorm2d):
            module.track_running_stats = False
            break

    def flags():
        return [p.requires_grad for p in parameters] + [
            getattr(module, flag)
            for module in network.modules()
            for flag in ("track_running_stats", "is_iterating", "training")
            if hasattr(module, flag)
        ]

    def fail():
        with frozen(network), frozen(network):
            assert not any(p.requires_grad for p in parameters)
            raise KeyError

    before = flags()
    with pytest.raises(KeyError):
        fail()
    assert flags() == before
    assert True in before
    assert False in before


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_of_the_generators_step_between_two_of_the_discriminators_changes_nothing(kind):
    """A frozen pass between HR, generated images and their backward pass changes nothing."""
    results = []
    for has_generators_step in (False, True):
        torch.manual_seed(1)
        network, real, fake = build(kind), crops(3), crops(3)
        on_real = judged(network, real)
        if has_generators_step:
            with frozen(network):
                judged(network, fake.clone().requires_grad_()).sum().backward()
        (F.softplus(-on_real) + F.softplus(judged(network, fake))).mean().backward()
        results.append(
            {**snapshot(network), **{f"{n}.grad": p.grad for n, p in network.named_parameters()}}
        )
    assert equal_states(*results)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("is_training", [True, False])
def test_a_backward_pass_may_come_after_later_passes(kind, is_training):
    gradients = []
    for later_passes in (0, 2):
        torch.manual_seed(1)
        network = build(kind).train(is_training)
        loss = judged(network, crops(3)).square().mean()
        network.train()
        for _ in range(later_passes):
            network(crops(3))
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert equal_states(*gradients)


@pytest.mark.parametrize("kind", [*NAMES, "vgg-instance"])
def test_training_goes_on_bit_for_bit_from_the_state_dict(kind):
    def steps(network, count):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(count):
            optimizer.zero_grad()
            F.softplus(judged(network, crops(3))).mean().backward()
            optimizer.step()

    network = build(kind)
    steps(network, 2)
    torch.manual_seed(9)
    resumed = build(kind)
    resumed.load_state_dict(snapshot(network))
    for one in (network, resumed):
        torch.manual_seed(7)
        steps(one, 2)
    assert equal_states(network.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("kind", NAMES)
def test_compiles_without_a_graph_break_frozen_or_not(kind):
    network = build(kind, **({"num_scales": 1} if kind == "attention_unet" else {}))
    plain = copy.deepcopy(network)
    network.compile(fullgraph=True, backend="aot_eager")
    images = crops()
    for judge in (network, plain):
        judged(judge, images).mean().backward()
        with frozen(judge):
            judge(images)
        judged(judge, images).mean().backward()
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], tensor, rtol=1e-4, atol=1e-6)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            network.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_gives_the_same(kind):
    network = build(kind).eval()
    images = crops()
    expected = judged(network, images)
    network, images = (item.to(memory_format=torch.channels_last) for item in (network, images))
    torch.testing.assert_close(judged(network, images), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build(kind).state_dict())
    assert equal_states(states[0], states[1])
    assert not equal_states(states[0], states[2])


def test_without_norms_the_signal_keeps_its_size():
    network = VGGDiscriminator(crop=64, num_features=16, norm="none")
    with torch.no_grad():
        features = crops(4, 64, 64) - 0.5
        first = features.square().mean()
        for layer in [
            f"{stage}_{layer}" for stage in range(network.num_stages) for layer in (0, 1)
        ]:
            features = F.leaky_relu(getattr(network, f"conv{layer}")(features), 0.2)
    assert 0.1 < features.square().mean() / first < 10


@pytest.mark.parametrize(
    ("kind", "change", "rule"),
    [
        ("vgg", {"crop": 31}, "crop 31 is not a whole number of at least 32 pixels"),
        ("unet", {"crop": 64.0}, r"crop 64\.0 is not a whole number"),
        ("vgg", {"num_features": 0}, "num_features 0 is not a whole number above 0"),
        ("unet", {"num_features": True}, "num_features True is not"),
        ("vgg", {"norm": "layer"}, "norm 'layer' is not one of 'batch', 'instance', 'none'"),
        ("vgg", {"head": "dense"}, "head 'dense' is not one of 'pool', 'flatten'"),
        ("vgg", {"feature_kernel": 4}, "feature_kernel 4 is neither 3 nor 5"),
        ("vgg", {"feature_kernel": 3.0}, r"feature_kernel 3\.0 is neither 3 nor 5"),
        ("unet", {"skip_connections": 1}, "skip_connections 1 is neither true nor false"),
        ("patch", {"num_layers": 9}, "num_layers 9 is above 8"),
        ("patch", {"num_scales": 0}, "num_scales 0 is not a whole number above 0"),
        ("attention_unet", {"num_scales": True}, "num_scales True is not a whole number"),
    ],
)
def test_bad_values_are_refused(kind, change, rule):
    params = {"crop": 64, **change}
    with pytest.raises(UserError, match=f"discriminator '{kind}': {rule}"):
        build_discriminator(kind, params.pop("crop"), **params)


def test_build_discriminator_names_the_nearest():
    with pytest.raises(UserError, match="no discriminator named 'unett'; did you mean 'unet'"):
        build_discriminator("unett", 64)
    with pytest.raises(
        UserError, match="'vgg' has no parameter 'num_feature'; did you mean 'num_features'"
    ):
        build_discriminator("vgg", 64, num_feature=3)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"crop": 64}, "has no parameter 'crop'"),
        ({"name": "unet"}, "has no parameter 'name'"),
        ({"self": 1}, "has no parameter 'self'"),
        ({"num_features": 10**8}, "num_features 100000000 is above 65536"),
        (
            {"num_features": 60000},
            r"cannot be built with {'num_features': 60000}; is it too large\? \(RuntimeError",
        ),
    ],
)
def test_what_no_discriminator_has_is_one_line(params, words):
    with pytest.raises(UserError, match=f"^discriminator 'vgg'.*{words}") as caught:
        build_discriminator("vgg", 64, **params)
    assert "\n" not in str(caught.value)
