from __future__ import annotations

import copy
import json
import subprocess

import pytest
import torch
from test_spandrel import tiny as tiny_spandrel
from torch import nn

import warm
from fabricate import CHECKOUT, TINY, make_run, shared, tiny_network, tiny_saved
from pipeline import cli
from pipeline.config.recipe import load_recipe
from pipeline.models import build_generator, comparison
from pipeline.models.discriminators import build_discriminator
from pipeline.models.info import Options, describe, format_report, main, receptive_field
from pipeline.models.spandrel import ARCHITECTURES, CONVOLUTIONAL
from pipeline.models.weights import write_network
from pipeline.run_folder import run_network_file


@pytest.fixture
def info(capsys):
    """Run the command in this process; return exit status, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.run(Options, main, [str(argument) for argument in arguments], ends_with_reader=True)
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def numbers(info):
    """Return the output of the command with --json."""

    def run(*arguments):
        status, output, complaint = info(*arguments, "--json")
        assert (status, complaint) == (0, "")
        return json.loads(output)

    return run


def test_vapsr_is_the_papers():
    """Zhou et al. 2022, table 2: 342K parameters and 19.5 G multiply-adds at 1280x720."""
    report = describe(build_generator("vapsr", 4), "VapSR", 4, (180, 320))
    assert report.parameters == 342_220
    assert report.multiply_adds / 1e9 == pytest.approx(19.5, rel=0.02)
    assert report.float32_bytes == 4 * 342_220
    assert report.float16_bytes == 2 * 342_220


def test_multiply_adds_are_those_of_the_kernels():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.PReLU(),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.PixelShuffle(2),
    )
    report = describe(network, "", 2, (10, 14))
    expected = [140 * 3 * 8 * 9, 0, 140 * 8 * 25, 140 * 8 * 12, 0]
    assert [layer.multiply_adds for layer in report.layers] == expected
    assert report.multiply_adds == sum(expected)
    assert [layer.output for layer in report.layers] == [(8, 10, 14)] * 3 + [
        (12, 10, 14),
        (3, 20, 28),
    ]
    assert [layer.type for layer in report.layers] == [
        "Conv2d",
        "PReLU",
        "Conv2d",
        "Conv2d",
        "PixelShuffle",
    ]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("vapsr", {"num_blocks": 2}),
        ("srresnet", {}),
        ("msrresnet", {}),
        ("rrdbnet", {"num_blocks": 1}),
        ("compact", {}),
    ],
)
def test_layers_hold_all_parameters_of_every_network(name, params):
    network = build_generator(name, 4, **params)
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    was_training = network.training
    report = describe(network, name, 4, (48, 64))
    assert sum(layer.parameters for layer in report.layers) == report.parameters
    assert report.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert not [layer.name for layer in report.layers if layer.output is None]
    assert sum(layer.multiply_adds for layer in report.layers) <= report.multiply_adds
    assert report.receptive_field not in ("global", "not measured")
    assert network.training == was_training  # the measurement leaves no trace
    assert all(torch.equal(network.state_dict()[key], tensor) for key, tensor in state.items())


def influence(network, scale, side=41):
    """Return height and width of the pixels that the central outputs depend on.

    Computed by autograd in float64.
    """
    network = network.double()
    images = torch.rand(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    at = side // 2 * scale
    network(images)[..., at : at + scale, at : at + scale].square().sum().backward()
    hit = images.grad[0].ne(0).any(0)
    return tuple(
        int(hit.any(axis).nonzero().max() - hit.any(axis).nonzero().min() + 1) for axis in (1, 0)
    )


@pytest.mark.parametrize(
    ("network", "scale"),
    [
        (nn.Conv2d(3, 3, 5, padding=2), 1),
        (nn.Conv2d(3, 3, (3, 7), padding=(1, 3), bias=False), 1),
        (
            nn.Sequential(
                nn.Conv2d(3, 4, 3, padding=4, dilation=4), nn.GELU(), nn.Conv2d(4, 3, 3, padding=1)
            ),
            1,
        ),
        (
            nn.Sequential(
                nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(3, 3, 3, padding=1)
            ),
            2,
        ),
        (
            nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(6, 12, 1), nn.PixelShuffle(2)
            ),
            2,
        ),
        (nn.ConvTranspose2d(3, 3, 6, stride=2, padding=2), 2),
        (tiny_network(scale=2, num_blocks=1), 2),
        (tiny_network(scale=3, num_blocks=1, projection_kernel=3), 3),
    ],
    ids=str,
)
def test_the_receptive_field_is_autograds(network, scale):
    measured = receptive_field(network.eval(), scale)
    assert measured == influence(network, scale)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_of_spandrel_is_described(arch):
    network = tiny_spandrel(arch)
    report = describe(network, "", 2, (16, 24))
    assert report.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert report.multiply_adds > 16 * 24 * 100
    if arch in CONVOLUTIONAL:
        # In evaluation, PLKSR overwrites what autograd needs; only batch norm has a larger reach in
        # training.
        assert report.receptive_field == influence(network.train(arch != "SwiftSRGAN"), 2, side=47)
    else:
        assert "receptive field  not measured" in format_report(report)


@pytest.mark.parametrize(
    ("scale", "params"),
    [
        (2, {}),
        (4, {"num_blocks": 1}),
        (3, {"projection_kernel": 3}),
        (2, {"global_residual": "bicubic"}),
    ],
)
def test_the_receptive_field_is_what_vapsr_says(scale, params):
    network = tiny_network(scale=scale, **params)
    assert receptive_field(network, scale) == (2 * network.receptive_radius + 1,) * 2


def test_with_strides_inside_the_farthest_view_counts():
    """Against float64 arithmetic, with a NaN at each of the 8 phases of the U-Net's strides."""
    network = build_discriminator("unet", 32, num_features=2).eval()
    images = torch.rand(1, 3, 8, 160)
    left, right = [], []
    for column in range(64, 72):
        spoilt = images.double()
        spoilt[..., column] = torch.nan
        reached = copy.deepcopy(network).double()(spoilt).isnan()[0, 0].any(0).nonzero()
        left.append(column - int(reached.min()))
        right.append(int(reached.max()) - column)
    assert len(set(left)) == len(set(right)) == 8
    assert receptive_field(network, 1) == (max(left) + 1 + max(right),) * 2


def test_a_wide_field_is_found_and_a_global_one_is_called_so():
    wide = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=8, dilation=8) for _ in range(20)))
    assert receptive_field(wide, 1) == (321, 321)

    class Attention(nn.Module):
        def forward(self, images):
            return images * images.mean((2, 3), keepdim=True)

    assert receptive_field(Attention(), 1) is None
    assert "receptive field  global" in format_report(describe(Attention(), "", 1, (8, 8)))


def test_layers_that_never_run_are_said_to():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.dead = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, images):
            return self.conv(images)

    report = describe(Dead(), "", 1, (8, 8))
    assert [(layer.name, layer.output) for layer in report.layers] == [
        ("conv", (3, 8, 8)),
        ("dead", None),
    ]
    assert "never run" in format_report(report)


def test_the_command_prints_an_aligned_table():
    command = [
        warm.python(),
        "-m",
        "pipeline.models.info",
        "vapsr_x4",
        "generator.global_residual=none",
    ]
    result = subprocess.run(
        command, cwd=CHECKOUT, timeout=120, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "generator of recipe vapsr_x4: vapsr x4"
    table = lines[2 : lines.index("", 3)]
    assert table[0].split() == ["layer", "type", "output", "parameters", "MMACs"]
    # a column starts at one position
    assert len({line.rindex(line.split()[2]) for line in table}) == 1
    assert len({len(line) for line in table}) == 1
    assert table[1].split() == ["conv_first", "Conv2d", "48x180x320", "1,344", "74.6"]
    assert "parameters       342,220" in lines
    assert "multiply-adds    19.52 GMACs (39.03 GFLOPs) for 320x180 -> 1280x720" in lines
    assert "receptive field  345 x 345 input pixels" in lines
    assert "weights          1.37 MB in float32, 0.68 MB in float16" in lines


def test_json_has_the_numbers_of_the_table(numbers):
    report = numbers("vapsr_x4", "generator.num_blocks=2", "--hr", 640, 360)
    assert report["input_size"] == [90, 160]
    assert report["parameters"] == sum(layer["parameters"] for layer in report["layers"])
    assert report["receptive_field"] == [41, 41]
    assert report["gmacs"] == pytest.approx(report["multiply_adds"] / 1e9)
    assert report["layers"][0] == {
        "name": "conv_first",
        "type": "Conv2d",
        "output": [48, 90, 160],
        "parameters": 1344,
        "multiply_adds": 90 * 160 * 3 * 48 * 9,
    }


def test_files_and_run_folders_are_described(tmp_path, numbers):
    saved = tiny_saved(scale=3)
    count = sum(tensor.numel() for tensor in saved.state_dict.values())
    for name in ("a.pth", "a.safetensors"):
        write_network(tmp_path / name, saved)
        report = numbers(tmp_path / name, "--hr", 96, 96)
        assert (report["parameters"], report["scale"]) == (count, 3)
    run = make_run(tmp_path, steps=(100,), best=100, **TINY)
    report = numbers(run, "--hr", 96, 96)
    assert report["title"] == f"vapsr x2 of {run}"
    assert (
        numbers(run_network_file(run, 100, ema=True), "--hr", 96, 96)["layers"] == report["layers"]
    )


def test_the_released_file_is_described(numbers):
    report = numbers(shared("weights/VapSR_X4.pth"))
    assert report["parameters"] == 342_220
    assert report["receptive_field"] == [345, 345]


@pytest.mark.parametrize(
    ("name", "count", "field"),
    [
        ("vgg", 14_499_401, "global"),
        ("unet", 4_376_897, [65, 65]),
        ("attention_unet", 2 * 5_340_356, [65, 65]),
        ("patch", 2 * 2_764_737, [70, 70]),
    ],
)
def test_the_discriminator_of_a_recipe_is_described(numbers, name, count, field):
    report = numbers(
        "vapsr_x4",
        "data.crop=128",
        "adversarial.weight=0.005",
        f"adversarial.discriminator.name={name}",
        "--part",
        "discriminator",
    )
    assert report["title"] == f"discriminator of recipe vapsr_x4: {name} at crop 128"
    assert (report["parameters"], report["receptive_field"], report["input_size"]) == (
        count,
        field,
        [128, 128],
    )
    # A 3x3 kernel at each pixel, or a 4x4 one at every second.
    per_pixel = 16 / 4 if name == "patch" else 9
    assert report["layers"][0]["multiply_adds"] == 128 * 128 * 3 * 64 * per_pixel


def test_the_effective_field_is_that_of_the_weights(tmp_path, numbers):
    """A network whose attention blocks do nothing sees no more than its four other convolutions."""
    saved = tiny_saved(scale=2, num_blocks=2)
    for name, tensor in saved.state_dict.items():
        if "proj_2" in name or name.startswith("conv_body"):
            tensor.zero_()
    write_network(tmp_path / "a.pth", saved)
    report = numbers(tmp_path / "a.pth", "--hr", 96, 96, "--effective")
    assert report["receptive_field"] == [2 * (4 + 2 * 8) + 1] * 2
    assert 3 <= report["effective_field"] <= 7
    assert numbers(tmp_path / "a.pth", "--hr", 96, 96)["effective_field"] is None


def test_the_table_has_a_row_for_each_network(info, monkeypatch, tmp_path):
    measured = {"rate": 12.345, "bytes": 3 << 20}
    monkeypatch.setattr(comparison, "_in_its_own_process", lambda *_: measured)
    monkeypatch.setattr(comparison, "_conversions", lambda _: ("yes", "static"))
    checks = [{"id": "speed.vapsr_s_x2.fp16.eager.b64", "value": 1234.5}]
    (tmp_path / "a.json").write_text(json.dumps({"checks": checks}))
    status, output, _ = info(
        "--table",
        "--recipes",
        "vapsr_s_x2",
        "--hr",
        "640",
        "360",
        "--selfcheck",
        tmp_path / "a.json",
    )
    assert status == 0
    (row,) = comparison.read_table(output)
    report = describe(
        build_generator("vapsr", 2, **load_recipe("vapsr_s_x2").generator.params), "", 2, (180, 320)
    )
    assert row == comparison.Row(
        ("vapsr_s_x2",),
        {
            "network": "vapsr x2",
            "parameters": f"{report.parameters:,}",
            "GMACs": f"{report.multiply_adds / 1e9:.1f}",
            "field": str(report.receptive_field[0]),
            "effective": row.cells["effective"],
            "training": "12.3",
            "inference": "12.3",
            "MiB": "3 / 3",
            "ONNX": "yes",
            "OpenVINO": "static",
            "GPU": "1,234",
        },
    )
    assert 1 <= int(row.cells["effective"]) <= report.receptive_field[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("vapsr_x5",), "no recipe 'vapsr_x5'; did you mean"),
        (("none.pth",), "no weights file 'none.pth'"),
        (("none.CKPT",), "no weights file 'none.CKPT'"),
        (("vapsr_x4", "scale=5"), "network 'vapsr': scale 5 is not one of 1, 2, 3 and 4"),
        (("vapsr_x4", "generator.num_features=100000000"), "num_features 100000000 is above 65536"),
        (("vapsr_x4", "generator.num_features=60000"), "network 'vapsr' cannot be built with"),
        (("vapsr_x4", "generator.scale=4"), "network 'vapsr' has no parameter 'scale'"),
        (
            ("vapsr_x4", "generator.name=spandrel", "generator.arch=[SPAN]"),
            "arch ['SPAN'] is not a name",
        ),
        (
            ("none.pth", "generator.num_blocks=2"),
            "'none.pth' contains a generator's weights: overrides and --part",
        ),
        (
            ("vapsr_x4", "generator.num_blokcs=2"),
            "no parameter 'num_blokcs'; did you mean 'num_blocks'",
        ),
        (
            ("vapsr_x4", "ds.train_batch_size=2"),
            "ds.train_batch_size: the DeepSpeed config does not affect the network",
        ),
        (("vapsr_x4", "--part", "discriminator"), "recipe vapsr_x4 has no discriminator"),
        (("vapsr_x4", "--hr", "16", "720"), "--hr 16 720: both sides must be 32 to 32768 pixels"),
        ((), "RECIPE|FILE|RUN"),
        (("vapsr_x4", "--write"), "--write belongs to --table; add --table, or omit it"),
        (("vapsr_x4", "--table"), "--table compares generators of recipes"),
        (("--table", "--recipes", "vapsr_x5"), "--recipes vapsr_x5: no such recipe; did you mean"),
        (("--table", "--seconds", "0"), "--seconds 0 must be above 0"),
        (("--table", "--write", "--hr", "640", "360"), "has multiply-adds for 1280x720; omit --hr"),
        (
            ("esrgan_x4", "--part", "discriminator", "--effective"),
            "--effective measures generators; omit --part",
        ),
    ],
)
def test_errors_are_one_line(info, arguments, words):
    status, output, complaint = info(*arguments)
    assert (status, output) == (2, "")
    assert complaint.startswith("error: ")
    assert words in complaint
    assert complaint.count("\n") == 1
