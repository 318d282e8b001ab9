from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import types
from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convert_to_onnx
import warm
from fabricate import CHECKOUT, make_run, picture, tiny_network, tiny_saved, write_images
from pipeline import cli
from pipeline.cli import RunError, UserError
from pipeline.export import conversion, parity, tensorrt_file
from pipeline.export.int8 import Int8
from pipeline.export.network_files import OnnxNetwork, OpenVinoNetwork
from pipeline.export.onnx_file import INPUT, Form, convert, with_form
from pipeline.export.parity import LIMITS, Limit
from pipeline.models import build_generator
from pipeline.models.vapsr import VapSR
from pipeline.models.weights import SavedNetwork, read_network, write_network
from pipeline.run_folder import run_network_file

CPU = torch.device("cpu")
SMALL = {"num_features": 8, "num_blocks": 1}
ALL = [  # every network of the table; among them every form
    ("vapsr", 4, {**SMALL, "num_attention_features": 12}, Form(io="uint8", layout="nhwc")),
    ("srresnet", 1, SMALL, Form(io="uint8", layout="nhwc", half=True)),
    ("msrresnet", 3, SMALL, Form(layout="nhwc", half=True)),
    ("rrdbnet", 1, {**SMALL, "num_grow_ch": 4}, Form()),  # pixel-unshuffles: odd sizes are extended
    ("compact", 1, {"num_features": 8, "num_conv": 1}, Form(io="uint8", opset=18)),
    ("spandrel", 2, {"arch": "Compact", "num_feat": 8, "num_conv": 1}, Form(half=True)),
    ("vapsr", 1, {**SMALL, "num_attention_features": 8, "global_residual": "bicubic"}, Form()),
    (
        "spandrel",
        1,
        {"arch": "NAFNet", "width": 8, "enc_blk_nums": [1], "dec_blk_nums": [1]}
        | {"middle_blk_num": 1},
        Form(),
    ),
]


def saved_network(name, scale, params):
    """Return a network whose output ranges over about 0.1 to 0.9; a fresh one's is near 0."""
    torch.manual_seed(0)
    network = build_generator(name, scale, **params).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return SavedNetwork(name, scale, params, network.state_dict(), {"recipe": "demo", "step": "7"})


@pytest.fixture(scope="module")
def photos():
    return parity.photographs(None)


@pytest.fixture(scope="module")
def other():
    """A small VapSR x2 and the content of its ONNX file."""
    saved = tiny_saved(1)
    return saved, convert(saved, saved.build(), Form())


def convert_command(output, **options):
    defaults = {
        "input": None,
        "io": "float",
        "layout": "nchw",
        "half": False,
        "opset": 20,
        "images": None,
        "openvino": False,
        "tensorrt": False,
    }
    return conversion.run_conversion(output=output, **{**defaults, **options})


@functools.cache
def converted(index):
    """Return the network of a line of `ALL`, and the content of its ONNX file."""
    name, scale, params, form = ALL[index]
    saved = saved_network(name, scale, params)
    network = saved.build()
    content = convert(saved, network, form)
    # The network itself is left unchanged.
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    return saved, content


@pytest.mark.parametrize("index", range(len(ALL)), ids=[f"{case[0]} x{case[1]}" for case in ALL])
def test_every_network_at_any_size(tmp_path, photos, index):
    name, scale, _, form = ALL[index]
    saved, content = converted(index)
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    run = OnnxNetwork(path, CPU)
    batches = parity.checks(saved.build(), form, photos)
    assert {check.size[0] for check in batches} == {1, 2, 3}
    assert any(check.size[1] % 2 and check.size[2] % 2 for check in batches)
    table = parity.compare("ONNX Runtime", run, batches, LIMITS[form.io, form.half])
    assert table.count("\n") == len(batches)
    for check in batches:
        found = run(check.images)
        assert found.dtype == check.images.dtype
        assert found.shape == form.shape(
            check.size[0], check.size[1] * scale, check.size[2] * scale
        )
        # Constant images would agree trivially.
        assert np.ptp(check.expected) > (20 if form.io == "uint8" else 0.05)
    model = onnx.load(path)
    props = {prop.key: prop.value for prop in model.metadata_props}
    assert {
        "architecture": name,
        "scale": str(scale),
        "recipe": "demo",
        "step": "7",
        "io": form.io,
        "layout": form.layout,
    }.items() <= props.items()
    assert model.opset_import[0].version == form.opset
    assert str(CHECKOUT).encode() not in model.SerializeToString()


def test_the_comparison_detects_other_weights_and_a_shift_of_one_level(tmp_path, photos, other):
    saved, content = other
    (tmp_path / "net.onnx").write_bytes(content)
    run = OnnxNetwork(tmp_path / "net.onnx", CPU)
    parity.compare("it", run, parity.checks(saved.build(), Form(), photos), Limit(90))
    wrong = parity.checks(tiny_network(0), Form(), photos)
    with pytest.raises(
        RunError, match=r"it differs from PyTorch on 1 x 64x64: .* dB .*; required: 90 dB"
    ):
        parity.compare("it", run, wrong, Limit(90))
    nearly = tiny_network(1)
    with torch.no_grad():
        nearly.conv_body.bias[0] += 1e-3
    with pytest.raises(RunError, match="differs"):
        parity.compare("it", run, parity.checks(nearly, Form(), photos), Limit(90))
    form = Form(io="uint8")
    levels = parity.checks(saved.build(), form, photos)
    answers = {check.images.shape: check.expected for check in levels}
    parity.compare("it", lambda images: answers[images.shape], levels, LIMITS["uint8", False])
    for shift in (1, 2):  # applied to every value, while rounding ties change only a few of them
        with pytest.raises(RunError, match="required: 60 dB and a difference of at most 1 level"):
            parity.compare(
                "it",
                lambda images, shift=shift: answers[images.shape].astype(int) + shift,
                levels,
                LIMITS["uint8", False],
            )


@pytest.mark.parametrize(
    "wrong", [lambda expected: np.full_like(expected, np.nan), lambda expected: expected[:, :, 1:]]
)
def test_the_comparison_detects_nan_and_wrong_sizes(photos, wrong):
    batches = parity.checks(tiny_network(), Form(), photos)
    answers = {check.images.shape: wrong(check.expected) for check in batches}
    with pytest.raises(RunError, match=r"differs|turns .* into"):
        parity.compare("it", lambda images: answers[images.shape], batches, Limit(60))


def test_a_failed_comparison_leaves_no_file_under_its_name(tmp_path, monkeypatch, capsys, other):
    write_network(tmp_path / "net.safetensors", tiny_saved(0))
    output = tmp_path / "out" / "net.onnx"
    output.parent.mkdir()
    output.write_bytes(b"an older one")
    monkeypatch.setattr(conversion, "convert", lambda saved, network, form: other[1])
    with pytest.raises(SystemExit) as stopped:
        cli.run(
            convert_to_onnx.Options,
            convert_to_onnx.main,
            ["--input", str(tmp_path / "net.safetensors"), "--output", str(output)],
        )
    assert stopped.value.code == 1
    assert output.read_bytes() == b"an older one"
    assert [path.name for path in sorted(output.parent.iterdir())] == [
        "net.onnx",
        "net.onnx.failed",
    ]
    captured = capsys.readouterr()
    assert "-> x2" not in captured.out
    assert re.fullmatch(
        r"error: ONNX Runtime differs from PyTorch on 1 x 64x64: .*net\.onnx\.failed' is kept "
        r"for inspection: do not use it\n",
        captured.err,
    )


def test_networks_with_windows_are_compared_in_fp32_first(tmp_path, monkeypatch):
    """A mask of the wrong size leaves SwinIR at 66 dB, which FP16's limit of 60 dB allows."""
    forms = []

    def write(path, saved, network, form, photos):
        forms.append(form)
        path.write_bytes(b"")

    write_network(tmp_path / "net.pth", tiny_saved())
    monkeypatch.setattr(conversion, "_write_onnx", write)
    options = {"input": tmp_path / "net.pth", "layout": "nhwc"}
    assert convert_command(tmp_path / "net.onnx", half=True, **options) == 0
    assert forms == [Form(layout="nhwc", half=True)]
    monkeypatch.setattr(VapSR, "is_convolutional", False, raising=False)
    for half, io in ((True, "uint8"), (False, "float")):
        forms.clear()
        assert convert_command(tmp_path / "net.onnx", half=half, io=io, **options) == 0
        assert forms == list(dict.fromkeys([Form(layout="nhwc"), Form(io, "nhwc", half)]))


def test_openvino_has_a_comparison_of_its_own(tmp_path, photos, monkeypatch, capsys):
    saved, content = converted(0)
    form = ALL[0][-1]
    monkeypatch.setattr(conversion, "convert", lambda saved, network, form: content)
    write_network(tmp_path / "net.pth", saved)
    output = tmp_path / "net.onnx"
    images = write_images(
        tmp_path / "photos", {"a.png": picture(70, 90), "b.jpg": picture(20, 30, 1)}
    )
    options = {
        "input": tmp_path / "net.pth",
        "io": form.io,
        "layout": form.layout,
        "images": images,
        "openvino": True,
        "tensorrt": True,
    }
    assert convert_command(output, **options) == 0
    out = capsys.readouterr().out
    assert "OpenVINO (FP16 weights) against PyTorch" in out
    assert ("--minShapes=input:1x16x16x3" in out) is not tensorrt_file.is_installed()
    names = {"net.pth", "net.onnx", "net.xml", "net.bin", "photos"}
    assert {path.name for path in tmp_path.iterdir()} - {"net.engine"} == names
    run = OpenVinoNetwork(tmp_path / "net.xml", CPU)
    parity.compare(
        "OpenVINO", run, parity.checks(saved.build(), form, photos), LIMITS["uint8", True]
    )
    assert b'<architecture value="vapsr"' in (tmp_path / "net.xml").read_bytes()
    monkeypatch.setattr(
        conversion, "OpenVinoNetwork", lambda xml, device: lambda batch: np.zeros(1, np.uint8)
    )
    (tmp_path / "net.xml").write_text("an older one")
    with pytest.raises(RunError, match=r"net\.failed\.xml' is kept for inspection: do not use it"):
        convert_command(output, **options)
    assert (tmp_path / "net.xml").read_text() == "an older one"
    assert (tmp_path / "net.failed.bin").is_file()


WINDOWS = {"arch": "SwinIR", "embed_dim": 12, "depths": [2], "num_heads": [2], "img_size": 16}


def test_a_network_of_one_size(tmp_path, photos, capsys):
    saved = saved_network("spandrel", 2, WINDOWS)
    write_network(tmp_path / "net.pth", saved)
    output, options = tmp_path / "net.onnx", {"input": tmp_path / "net.pth", "openvino": True}
    with pytest.raises(
        UserError, match=r"write it for one size with convert_to_onnx\.py --shape 1x3x25"
    ):
        convert_command(output, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]
    # 44 is no multiple of the windows' 8 pixels: the network itself extends its images.
    assert convert_command(output, shape="2x3x48x44", layout="nhwc", **options) == 0
    out = capsys.readouterr().out
    assert "RGB float32 in [0, 1], (2, 48, 44, 3) -> x2; " in out
    assert out.count("  2 x 44x48") == 2 * 2  # four photographs, two backends
    props = {prop.key: prop.value for prop in onnx.load(output).metadata_props}
    assert (props["shape"], props["layout"]) == ("2x3x48x44", "nhwc")
    assert b'<shape value="2x3x48x44"' in (tmp_path / "net.xml").read_bytes()
    for file in (OnnxNetwork(output, CPU), OpenVinoNetwork(tmp_path / "net.xml", CPU)):
        assert file.inputs == [(2, 48, 44, 3)]
    wrong = saved.build()
    with torch.no_grad():
        wrong.conv_first.bias[0] += 1e-3
    batches = parity.checks(wrong, Form(layout="nhwc", size=(2, 48, 44)), photos)
    assert [check.size for check in batches] == [(2, 48, 44)] * 2
    with pytest.raises(RunError, match="differs from PyTorch on 2 x 44x48"):
        parity.compare("it", OnnxNetwork(output, CPU), batches, Limit(90))


def test_a_file_that_is_wrong_at_other_sizes_names_the_option(tmp_path, monkeypatch, other):
    """The exporter may record one size without an error; the comparison finds that out."""
    write_network(tmp_path / "net.pth", tiny_saved(0))
    monkeypatch.setattr(conversion, "convert", lambda saved, network, form: other[1])
    monkeypatch.setattr(VapSR, "is_convolutional", False, raising=False)
    with pytest.raises(RunError, match=r"differs .* --shape 1x3x256x256 writes .* one size$"):
        convert_command(tmp_path / "net.onnx", input=tmp_path / "net.pth")


def test_the_command_converts_the_newest_run(tmp_path):
    run = make_run(tmp_path / "runs", best=100, global_residual="bicubic")
    done = subprocess.run(
        [warm.python(), str(CHECKOUT / "convert_to_onnx.py"), "--output", "demo.onnx", "--half"],
        cwd=tmp_path,
        timeout=120,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "vapsr x2 of runs/demo/checkpoints/step-00000100/generator_ema.safetensors"
    assert lines[-1].startswith("demo.onnx  (0.0")
    assert (
        "RGB float16 in [0, 1], (batch, 3, height, width) -> x2; input 'input', output 'output'"
        in lines[-1]
    )
    props = {prop.key: prop.value for prop in onnx.load(tmp_path / "demo.onnx").metadata_props}
    assert (props["recipe"], props["step"], props["dtype"]) == ("demo", "100", "float16")
    expected = read_network(run_network_file(run, 100, ema=True)).build()
    lr = torch.rand(1, 3, 21, 34)
    found = OnnxNetwork(tmp_path / "demo.onnx", CPU)(lr.half().numpy())
    with torch.inference_mode():
        assert np.abs(found - expected(lr).numpy()).max() < 0.01


class FakeTensorRT(types.ModuleType):
    """A fake TensorRT package (the real one needs a GPU): accepts all calls, records shapes."""

    class NetworkDefinitionCreationFlag:
        STRONGLY_TYPED = 1

    def __init__(self, result):
        super().__init__("tensorrt")
        self.shapes = []
        self.Logger = MagicMock()
        builder = MagicMock()
        builder.create_optimization_profile().set_shape = lambda *shapes: self.shapes.append(shapes)
        builder.build_serialized_network.return_value = result
        self.Builder = lambda logger: builder
        self.OnnxParser = MagicMock()


def test_tensorrt_gets_the_shapes_of_the_layout(tmp_path, monkeypatch):
    package = FakeTensorRT(b"engine")
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    tensorrt_file.build(tmp_path / "a.onnx", tmp_path / "a.engine", Form(layout="nhwc"))
    assert (tmp_path / "a.engine").read_bytes() == b"engine"
    assert package.shapes == [("input", (1, 16, 16, 3), (1, 360, 640, 3), (4, 1080, 1920, 3))]
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(None))
    with pytest.raises(RunError, match="cannot build an engine"):
        tensorrt_file.build(tmp_path / "a.onnx", tmp_path / "b.engine", Form())
    assert not (tmp_path / "b.engine").exists()
    package.shapes.clear()
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    fixed = Form(size=(1, 64, 48))  # has no shapes to choose from
    tensorrt_file.build(tmp_path / "a.onnx", tmp_path / "a.engine", fixed)
    assert package.shapes == []
    package.Builder(None).create_builder_config().add_optimization_profile.assert_called_once()
    assert "Shapes" not in tensorrt_file.command("a.onnx", "a.engine", fixed)


class Deciding(nn.Module):
    """A network whose code depends on the image size."""

    scale = 2

    def forward(self, images):
        return F.interpolate(images, scale_factor=2, mode="nearest") * int(images.shape[2])


def test_errors_are_one_line(tmp_path):
    saved = SavedNetwork("spandrel", 2, {"arch": "SAFMN"}, {})
    with pytest.raises(
        UserError,
        match=r"'SAFMN' cannot be written as ONNX for images of any size: .*; write it for one "
        r"size with convert_to_onnx\.py --shape 1x3x256x256$",
    ) as caught:
        convert(saved, Deciding(), Form())
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    for message, options in {
        r"net\.pth' must end in \.onnx; use net\.onnx": {"output": tmp_path / "net.pth"},
        r"--opset 16 must be from 17 to 23": {"opset": 16},
        r"--shape '3x64x64' must be BATCHx3xHEIGHTxWIDTH in LR pixels": {"shape": "3x64x64"},
        r"--shape '1x3x0x64' must be .* such as 1x3x256x256": {"shape": "1x3x0x64"},
        r"--shape '1x3x9000x9000' must be .* at most 64 Mi in total": {"shape": "1x3x9000x9000"},
        r"--int8 runs .* several sizes, but --shape fixes one": {
            "shape": "1x3x64x64",
            "int8": Int8(),
        },
        r"no images in the folder .*empty' of --images": {"images": tmp_path / "empty"},
        r"folder .*none' of --images does not exist": {"images": tmp_path / "none"},
    }.items():
        with pytest.raises(UserError, match=message):
            convert_command(**{"output": tmp_path / "net.onnx", **options})
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png' cannot be read"):
        parity.photographs(tmp_path / "empty")


def test_small_photographs_are_reflected_and_all_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "MOST_PHOTOGRAPHS", 9)
    folder = write_images(
        tmp_path,
        {f"{number:02d}.png": np.full((5, 4, 3), number, np.uint8) for number in range(12)},
    )
    photos = parity.photographs(folder)
    assert len(photos) == 9
    batches = parity.checks(tiny_network(), Form(io="uint8"), photos)
    seen = {int(image[0, 0, 0]) for check in batches for image in check.images}
    assert seen == {int(photo[0, 0, 0, 0]) for photo in photos}
    gradient = torch.arange(4, dtype=torch.uint8).repeat(1, 3, 2, 1)
    assert parity.middle(gradient, 2, 10)[0, 0, 0].tolist() == [0, 1, 2, 3, 3, 2, 1, 0, 0, 1]
    assert parity.middle(gradient, 2, 2)[0, 0, 0].tolist() == [1, 2]


def test_forms():
    network = tiny_network()
    lr = torch.rand(1, 3, 6, 7)
    with torch.inference_mode():
        floats = with_form(network, Form(layout="nhwc"))(lr.permute(0, 2, 3, 1))
        assert torch.equal(floats.permute(0, 3, 1, 2), network(lr))
    assert tensorrt_file.command("a.onnx", "a.engine", Form()).startswith(
        "trtexec --onnx=a.onnx --saveEngine=a.engine --stronglyTyped "
        f"--minShapes={INPUT}:1x3x16x16 --optShapes="
    )
