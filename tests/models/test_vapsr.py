from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from fabricate import TINY, tiny_network
from pipeline.cli import UserError
from pipeline.colour_spaces import oklab_to_rgb, rgb_to_oklab
from pipeline.images import cubic_resize, to_bytes
from pipeline.models import build_generator
from pipeline.models.vapsr import VapSR, bicubic_kernel, cubic_upscale

VAPSR_S = {"num_features": 32, "num_blocks": 11, "conv_groups": 2}


def plain_vapsr(state, images, scale, groups=1):
    """The network from its description, with only functions."""

    def conv(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    first = x = conv(images, "conv_first", padding=1)
    for block in range(len({name.split(".")[1] for name in state if name.startswith("body.")})):
        name = f"body.{block}"
        u = F.gelu(conv(x, f"{name}.proj_1", padding=state[f"{name}.proj_1.weight"].shape[-1] // 2))
        gate = conv(u, f"{name}.atten_branch.pointwise")
        gate = conv(gate, f"{name}.atten_branch.depthwise", padding=2, groups=gate.shape[1])
        gate = conv(
            gate,
            f"{name}.atten_branch.depthwise_dilated",
            padding=6,
            dilation=3,
            groups=gate.shape[1],
        )
        x = x + conv(u * gate, f"{name}.proj_2")
        mean = x.mean(dim=1, keepdim=True)
        variance = (x - mean).square().mean(dim=1, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        weight, bias = (
            state[f"{name}.pixel_norm.{kind}"].view(1, -1, 1, 1) for kind in ("weight", "bias")
        )
        x = x * weight + bias
    x = first + conv(x, "conv_body", padding=1, groups=groups)
    x = conv(x, "upsampler.0", padding=1)
    if scale == 1:
        return x
    if scale == 4:
        x = F.leaky_relu(F.pixel_shuffle(x, 2), 0.1)
        return F.pixel_shuffle(conv(x, "upsampler.3", padding=1), 2)
    return F.pixel_shuffle(conv(F.leaky_relu(x, 0.1), "upsampler.2", padding=1), scale)


@pytest.mark.parametrize(("params", "count"), [({}, 342_220), (VAPSR_S, 154_956)])
def test_parameter_counts_are_the_papers(params, count):
    assert sum(parameter.numel() for parameter in VapSR(scale=4, **params).parameters()) == count


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("params", [{}, {"projection_kernel": 3}, {"conv_groups": 2}])
def test_forward_is_the_description(scale, params):
    network = tiny_network(scale=scale, **params).double()
    images = torch.rand(2, 3, 13, 17, dtype=torch.float64)
    expected = plain_vapsr(network.state_dict(), images, scale, groups=params.get("conv_groups", 1))
    assert expected.shape == (2, 3, 13 * scale, 17 * scale)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [2, 4])
def test_signed_values_give_the_bytes_of_the_network_that_takes_bytes(scale):
    """catid/upsampling feeds bytes / 127.5 - 1 and truncates output * 127.5 + 128 to bytes."""
    network = tiny_network(scale=scale, projection_kernel=3, value_range="signed").double()
    images = torch.randint(0, 256, (2, 3, 13, 17), dtype=torch.uint8)
    signed = plain_vapsr(network.state_dict(), images.double() / 127.5 - 1, scale)
    with torch.inference_mode():
        unit = network(images)
    torch.testing.assert_close(unit * 2 - 1, signed, rtol=0, atol=1e-10)
    expected = (signed * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    assert expected.unique().numel() > 20
    assert torch.equal(to_bytes(unit), expected)


def test_tensors_are_named_as_in_the_released_files():
    block = (
        "proj_1",
        "atten_branch.pointwise",
        "atten_branch.depthwise",
        "atten_branch.depthwise_dilated",
        "proj_2",
        "pixel_norm",
    )
    expected = {
        f"{layer}.{kind}"
        for kind in ("weight", "bias")
        for layer in (
            "conv_first",
            *(f"body.{index}.{layer}" for index in range(2) for layer in block),
            "conv_body",
            "upsampler.0",
            "upsampler.3",
        )
    }
    assert set(VapSR(scale=4, num_blocks=2).state_dict()) == expected
    assert set(VapSR(scale=4, num_blocks=2, global_residual="bicubic").state_dict()) == expected | {
        "residual_kernel"
    }


@pytest.mark.parametrize("residual", ["none", "bicubic"])
def test_bytes_and_floats_give_the_same(residual):
    network = tiny_network(global_residual=residual)
    images = torch.randint(0, 256, (2, 3, 12, 15), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(network(images), network(images / 255))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_output_follows_the_weights(dtype):
    network = tiny_network(global_residual="bicubic").to(dtype)
    images = torch.randint(0, 256, (1, 3, 9, 10), dtype=torch.uint8)
    assert network(images).dtype == dtype


@pytest.mark.parametrize("residual", ["none", "bicubic"])
def test_compiles_without_a_graph_break(residual):
    torch.manual_seed(1)
    network = tiny_network(global_residual=residual)
    images = torch.randint(0, 256, (1, 3, 12, 15), dtype=torch.uint8)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), network(images), rtol=0, atol=1e-6)


def layout_copies(network, images):
    """Count tensors that are copied, down to the kernels, only to change their memory format."""
    with torch.inference_mode(), profile() as profiler:
        network(images)
    return sum(event.count for event in profiler.key_averages() if event.key == "aten::clone")


def test_channels_last_stays_so_without_copies_and_gives_the_same():
    network = tiny_network(scale=4)
    images = torch.rand(2, 3, 12, 16)
    with torch.inference_mode():
        expected = network(images)
        assert layout_copies(network, images) > 0  # so that the count below can fail
        network, images = (item.to(memory_format=torch.channels_last) for item in (network, images))
        assert layout_copies(network, images) == 0
        assert network.body(network.conv_first(images)).is_contiguous(
            memory_format=torch.channels_last
        )
        torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("value_range", ["unit", "signed"])
def test_with_the_residual_training_starts_at_bicubic(scale, value_range):
    images = torch.rand(1, 3, 20, 24)
    sr = VapSR(scale=scale, **TINY, global_residual="bicubic", value_range=value_range)(images)
    bicubic = cubic_resize(images, (20 * scale, 24 * scale))
    inner = (..., slice(3 * scale, -3 * scale), slice(3 * scale, -3 * scale))
    assert (sr - bicubic)[inner].abs().max() < 1e-5


@pytest.mark.parametrize("residual", ["none", "bicubic"])
def test_initial_values_are_the_documented_ones(residual):
    torch.manual_seed(0)
    network = VapSR(scale=4, num_blocks=2, global_residual=residual)
    small = ("conv_first", "conv_body") if residual == "bicubic" else ()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert torch.equal(module.weight, torch.full((48,), 0.1))
            assert not module.bias.any()
        elif isinstance(module, torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            gain = 0.1 if name in small else 1
            if residual == "bicubic" and name == "upsampler.3":
                gain = 0
            assert module.weight.std().item() == pytest.approx(gain * fan_in**-0.5, rel=0.1)
            assert not module.bias.any()


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_cubic_upscale_repeats_the_border(scale):
    images = torch.rand(2, 3, 7, 9, dtype=torch.float64)
    larger = cubic_resize(F.pad(images, (6, 6, 6, 6), mode="replicate"), (19 * scale, 21 * scale))
    expected = larger[..., 6 * scale : -6 * scale, 6 * scale : -6 * scale]
    assert (cubic_upscale(images, bicubic_kernel(scale), scale) - expected).abs().max() < 1e-6


def test_every_layer_learns_from_the_second_step_on():
    torch.manual_seed(0)
    network = VapSR(scale=2, **TINY, global_residual="bicubic")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (network(torch.rand(1, 3, 24, 24)) - torch.rand(1, 3, 48, 48)).abs().mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


@pytest.mark.parametrize(
    ("scale", "params"),
    [
        (2, {}),
        (4, {}),
        (3, {"projection_kernel": 3}),
        (2, {"global_residual": "bicubic"}),
        (1, {"global_residual": "bicubic"}),
    ],
)
def test_receptive_radius_is_exact(scale, params):
    network = tiny_network(scale=scale, **params).double()
    radius = network.receptive_radius
    width = 2 * radius + 9
    images = torch.rand(1, 3, 3, width, dtype=torch.float64)
    changed = images.clone()
    changed[..., 0] = 1 - changed[..., 0]  # the leftmost LR column
    with torch.inference_mode():
        differs = (network(images) != network(changed)).any(dim=2).any(dim=1)[0]
    assert not differs[(radius + 1) * scale :].any()
    # Within an LR pixel, the nearest outputs have the longest reach; at x4 the last convolution
    # works at twice the LR size.
    assert differs[: (radius - 1) * scale].all()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"scale": 5}, "scale 5 is not one of"),
        ({"scale": 2.0}, "scale 2.0 is not one of"),
        ({"num_blocks": 0}, "num_blocks 0 is not a whole number above 0"),
        ({"num_features": "48"}, "num_features '48' is not"),
        ({"conv_groups": 5}, "not a multiple of conv_groups 5"),
        ({"projection_kernel": 2}, "projection_kernel 2 is neither 1 nor 3"),
        ({"scale": 1, "upsampler_features": 56}, "56: x1 has no upsampler; omit it"),
        ({"scale": 4, "upsampler_features": 30}, "30 is not a multiple of 4"),
        ({"global_residual": "cubic"}, "'cubic' is neither 'none' nor 'bicubic'"),
        ({"value_range": "bytes"}, "'bytes' is neither 'unit' nor 'signed'"),
    ],
)
def test_bad_values_are_refused(change, rule):
    with pytest.raises(ValueError, match=rule):
        VapSR(**{"scale": 2, **change})


def test_build_generator_builds_and_names_the_nearest():
    assert (
        sum(parameter.numel() for parameter in build_generator("vapsr", 4, **VAPSR_S).parameters())
        == 154_956
    )
    with pytest.raises(UserError, match="no network named 'vapsrr'; did you mean 'vapsr'"):
        build_generator("vapsrr", 2)
    with pytest.raises(UserError, match="no parameter 'num_blokcs'; did you mean 'num_blocks'"):
        build_generator("vapsr", 2, num_blokcs=3)
    with pytest.raises(UserError, match="network 'vapsr': scale 7"):
        build_generator("vapsr", 7)
    with pytest.raises(UserError, match="no parameter 'color_space'; did you mean 'colour_space'"):
        build_generator("vapsr", 2, color_space="y")


def test_build_generator_puts_any_network_into_a_colour_space():
    torch.manual_seed(0)
    plain = build_generator("vapsr", 2, **TINY)
    torch.manual_seed(0)
    network = build_generator("vapsr", 2, **TINY, colour_space="oklab")
    assert plain.state_dict().keys() == network.state_dict().keys()
    images = torch.rand(1, 3, 8, 9)
    with torch.inference_mode():
        torch.testing.assert_close(
            network(images), oklab_to_rgb(plain(rgb_to_oklab(images))), rtol=0, atol=1e-6
        )
    with pytest.raises(UserError, match="network 'vapsr': colour_space 'lab' is not one of"):
        build_generator("vapsr", 2, **TINY, colour_space="lab")
