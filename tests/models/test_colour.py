from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from fabricate import picture, tiny_network
from pipeline.colour_spaces import oklab_to_rgb, rgb_to_oklab, rgb_to_ycbcr, ycbcr_to_rgb
from pipeline.models.colour import SPACES, InColourSpace, in_colour_space
from pipeline.models.rrdbnet import RRDBNet
from pipeline.models.srresnet import SRResNet
from pipeline.models.vapsr import VapSR, bicubic_kernel, cubic_upscale

CONVERSIONS = {"ycbcr": (rgb_to_ycbcr, ycbcr_to_rgb), "oklab": (rgb_to_oklab, oklab_to_rgb)}
# Oklab of red, lime, blue, white and black, as in CSS Color 4 and its libraries.
OKLAB = {
    (1, 0, 0): (0.62796, 0.22486, 0.12585),
    (0, 1, 0): (0.86644, -0.23389, 0.17950),
    (0, 0, 1): (0.45201, -0.03246, -0.31153),
    (1, 1, 1): (1, 0, 0),
    (0, 0, 0): (0, 0, 0),
}
# ITU-T T.871 (JFIF), divided by 255.
YCBCR = {
    (1, 0, 0): (0.299, 0.331264, 1),
    (0, 1, 0): (0.587, 0.168736, 0.081312),
    (0, 0, 1): (0.114, 1, 0.418688),
    (1, 1, 1): (1, 0.5, 0.5),
    (0, 0, 0): (0, 0.5, 0.5),
}


def pixels(colours):
    """Return colours as one image, N x 3 x 1 x 1."""
    return torch.tensor(list(colours), dtype=torch.float32)[:, :, None, None]


@pytest.mark.parametrize(("convert", "reference"), [(rgb_to_oklab, OKLAB), (rgb_to_ycbcr, YCBCR)])
def test_known_colours(convert, reference):
    torch.testing.assert_close(
        convert(pixels(reference)), pixels(reference.values()), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("space", CONVERSIONS)
def test_every_kind_of_colour_survives_the_round_trip(space):
    to_space, to_rgb = CONVERSIONS[space]
    torch.manual_seed(0)
    everywhere = torch.cartesian_prod(*[torch.linspace(0, 1, 18)] * 3).T.reshape(1, 3, 81, 72)
    darkest = torch.cartesian_prod(*[torch.arange(8) / 255] * 3).T.reshape(1, 3, 32, 16)
    overshooting = torch.rand(1, 3, 32, 32) * 1.4 - 0.2
    for images in (everywhere, darkest, torch.rand(1, 3, 64, 64), overshooting):
        assert (to_rgb(to_space(images)) - images).abs().max() < 5e-5  # a hundredth of a level
    assert to_space(darkest.half()).dtype == torch.float32
    # of the published digits
    assert (to_rgb(to_space(everywhere.double())) - everywhere).abs().max() < 5e-6


def test_ycbcr_is_that_of_jpeg():
    image = picture(40, 50)
    images = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    expected = np.asarray(Image.fromarray(image).convert("YCbCr")).astype(int)
    found = (rgb_to_ycbcr(images)[0].permute(1, 2, 0) * 255).round().numpy().astype(int)
    assert abs(found - expected).max() <= 1


def test_oklab_is_that_of_the_xyz_definition():
    """The definition goes from XYZ to Oklab; the matrix here directly from linear sRGB."""
    rgb = np.random.default_rng(0).random((200, 3))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = (
        linear
        @ np.array(
            [
                [0.4124564, 0.3575761, 0.1804375],
                [0.2126729, 0.7151522, 0.0721750],
                [0.0193339, 0.1191920, 0.9503041],
            ]
        ).T
    )
    lms = (
        xyz
        @ np.array(
            [
                [0.8189330101, 0.3618667424, -0.1288597137],
                [0.0329845436, 0.9293118715, 0.0361456387],
                [0.0482003018, 0.2643662691, 0.6338517070],
            ]
        ).T
    )
    expected = (
        np.cbrt(lms)
        @ np.array(
            [
                [0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660],
            ]
        ).T
    )
    found = rgb_to_oklab(torch.from_numpy(rgb)[:, :, None, None])[..., 0, 0].numpy()
    assert abs(found - expected).max() < 1e-3  # XYZ's white is rounded in both definitions


@pytest.mark.parametrize("space", CONVERSIONS)
def test_gradients_are_autograds_and_finite_everywhere(space):
    special = pixels(
        [
            (0, 0, 0),
            (1, 1, 1),
            (1, 0, 0),
            (0, 1, 0),
            (0, 0, 1),
            (-0.1, 0.5, 1.2),
            (0.04045,) * 3,
            (1e-9, 0, 1e-9),
        ]
    )
    for convert in CONVERSIONS[space]:
        images = special.clone().requires_grad_()
        convert(images).sum().backward()
        assert torch.isfinite(images.grad).all()
        assert images.grad[1].abs().max() > 0
    torch.manual_seed(0)
    inner = (0.2 + 0.6 * torch.rand(1, 3, 2, 2, dtype=torch.float64)).requires_grad_()
    for convert in CONVERSIONS[space]:
        assert torch.autograd.gradcheck(convert, (inner,))


@pytest.mark.parametrize("space", ["ycbcr", "oklab", "y"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_network_that_only_interpolates_does_so_in_its_space(space, scale):
    """An untrained VapSR with the cubic residual does only the conversion and the cubic upscale."""
    network = in_colour_space(
        VapSR(
            scale=scale,
            num_features=4,
            num_attention_features=4,
            num_blocks=1,
            global_residual="bicubic",
        ),
        space,
    )
    images = torch.from_numpy(picture(12, 14)).permute(2, 0, 1)[None]
    to_space, to_rgb = CONVERSIONS["oklab" if space == "oklab" else "ycbcr"]
    with torch.inference_mode():
        expected = to_rgb(cubic_upscale(to_space(images / 255), bicubic_kernel(scale), scale))
        assert (network(images) - expected).abs().max() < 1e-5
        assert torch.equal(network(images), network(images / 255))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_network(global_residual="bicubic"),
        lambda: SRResNet(scale=4, num_features=8, num_blocks=2).eval(),
        lambda: RRDBNet(scale=2, num_features=8, num_blocks=1, num_grow_ch=4),
    ],
)
def test_tensors_keep_their_names_and_all_of_them_learn(space, build):
    plain = build()
    names = list(plain.state_dict())
    network = in_colour_space(build(), space)
    assert list(network.state_dict()) == names
    assert [name for name, _ in network.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    assert isinstance(network, type(plain))
    assert isinstance(network, InColourSpace) == (space != "rgb")
    assert network.receptive_radius == plain.receptive_radius
    network.load_state_dict(plain.state_dict(), strict=True)
    images = torch.rand(2, 3, 10, 12)
    with torch.inference_mode():
        assert torch.equal(network(images), plain(images)) == (space == "rgb")
        assert torch.equal(copy.deepcopy(network)(images), network(images))
    network(images).square().mean().backward()
    assert all(
        parameter.grad.isfinite().all() and parameter.grad.any()
        for parameter in network.parameters()
    )


@pytest.mark.parametrize("space", ["ycbcr", "oklab", "y"])
def test_the_output_follows_the_weights_and_the_layout(space):
    network = in_colour_space(tiny_network(global_residual="bicubic"), space)
    images = torch.randint(0, 256, (1, 3, 9, 10), dtype=torch.uint8)
    with torch.inference_mode():
        expected = network(images)
        laid_out = network(images.contiguous(memory_format=torch.channels_last))
        assert laid_out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(laid_out, expected, rtol=0, atol=1e-4)
        half = network.bfloat16()(images)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().mean() < 0.02


@pytest.mark.parametrize("space", ["ycbcr", "oklab", "y"])
def test_compiles_without_a_graph_break(space):
    network = in_colour_space(tiny_network(), space)
    images = torch.randint(0, 256, (1, 3, 9, 10), dtype=torch.uint8)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), network(images), rtol=0, atol=1e-5)


def test_one_network_does_not_change_another():
    network, other = tiny_network(), tiny_network()
    in_colour_space(network, "oklab")
    assert type(other) is VapSR
    assert type(in_colour_space(tiny_network(), "oklab")) is type(network)


def test_bad_spaces_are_refused():
    with pytest.raises(
        ValueError, match="colour_space 'lab' is not one of 'rgb', 'ycbcr', 'oklab', 'y'"
    ):
        in_colour_space(tiny_network(), "lab")
    with pytest.raises(ValueError, match="already works in 'oklab'"):
        in_colour_space(in_colour_space(tiny_network(), "oklab"), "y")
