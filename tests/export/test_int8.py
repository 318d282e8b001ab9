"""`convert_to_onnx.py --int8`: the loss is measured correctly and limited, and INT8 is used."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import convert_to_onnx
from fabricate import picture, run_command, write_images
from pipeline import cli
from pipeline.cli import UserError
from pipeline.export import int8
from pipeline.export.int8 import (
    CALIBRATING,
    MEASURING,
    Int8,
    calibration_images,
    gather,
    low_resolution,
    measure_drop,
)
from pipeline.export.onnx_file import Form
from pipeline.export.parity import Photograph, read_photographs
from pipeline.images import cubic_resize, unit_range
from pipeline.libraries import openvino_core
from pipeline.metrics.psnr_ssim import psnr_y
from pipeline.models.vapsr import VapSR
from pipeline.models.weights import SavedNetwork, write_network

PARAMS = {
    "num_features": 16,
    "num_attention_features": 16,
    "num_blocks": 2,
    "global_residual": "bicubic",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a network that is cubic upscaling plus a small random output of convolutions."""
    torch.manual_seed(0)
    network = VapSR(scale=2, **PARAMS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    write_network(path, SavedNetwork("vapsr", 2, PARAMS, network.state_dict()))
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders of photographs for calibration and for measurement."""
    folder = tmp_path_factory.mktemp("photos")
    shipped = [
        photo.pixels[0].permute(1, 2, 0).numpy()
        for photo in read_photographs(None, "", 1, MEASURING)
    ]
    write_images(
        folder / "calibrate", {"a.png": shipped[0][:150, :200], "b.png": shipped[1][100:300, :100]}
    )
    write_images(
        folder / "measure", {"c.png": shipped[2][:101, 50:170], "d.png": shipped[1][:80, 300:421]}
    )
    return folder


def run(capsys, *arguments):
    return run_command(capsys, convert_to_onnx, *arguments)


def quantize(capsys, weights, photos, output, *arguments):
    return run(
        capsys,
        "--input",
        weights,
        "--output",
        output,
        "--int8",
        "--calibrate",
        photos / "calibrate",
        "--measure",
        photos / "measure",
        "--calibration-images",
        4,
        "--keep-last",
        1,
        *arguments,
    )


@pytest.fixture(scope="module")
def made(weights, photos, tmp_path_factory):
    """Files for both backends, one with float and one with uint8 images, and the output."""
    folder = tmp_path_factory.mktemp("made")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        for arguments in (
            ["--output", str(folder / "net.onnx")],
            [
                "--output",
                str(folder / "net_ov.onnx"),
                "--openvino",
                "--io",
                "uint8",
                "--layout",
                "nhwc",
            ],
        ):
            with pytest.raises(SystemExit) as stop:
                cli.run(
                    convert_to_onnx.Options,
                    convert_to_onnx.main,
                    [
                        "--input",
                        str(weights),
                        "--int8",
                        "--calibrate",
                        str(photos / "calibrate"),
                        "--measure",
                        str(photos / "measure"),
                        "--calibration-images",
                        "4",
                        "--keep-last",
                        "1",
                        "--max-drop",
                        "9",
                        *arguments,
                    ],
                )
            assert not stop.value.code
    return folder, "\n".join(lines)


def upscaled_by_onnx(file, lr):
    """Upscale a uint8 HWC image with a file that takes NCHW floats."""
    images = lr.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    sr = onnxruntime.InferenceSession(file).run(None, {"input": images})[0]
    return np.clip(np.rint(sr[0].transpose(1, 2, 0) * 255), 0, 255).astype(np.uint8)


def luma(image):
    """Return MATLAB's Y, rounded to integers."""
    return np.rint(16 + (image.astype(np.float64) @ [65.481, 128.553, 24.966]) / 255)


def test_the_drop_is_that_of_the_papers_psnr(made, photos):
    folder, output = made
    drops = []
    for name in ("c.png", "d.png"):
        hr = np.asarray(Image.open(photos / "measure" / name))
        hr = hr[: hr.shape[0] // 2 * 2, : hr.shape[1] // 2 * 2]
        planes = torch.from_numpy(hr / 255.0).permute(2, 0, 1)[None].float()
        small = cubic_resize(planes, (hr.shape[0] // 2, hr.shape[1] // 2))
        lr = np.clip(np.rint(small[0].permute(1, 2, 0).numpy() * 255), 0, 255).astype(np.uint8)
        before, after = (
            peak_signal_noise_ratio(
                luma(hr)[2:-2, 2:-2],
                luma(upscaled_by_onnx(folder / file, lr))[2:-2, 2:-2],
                data_range=255,
            )
            for file in ("net.onnx", "net_int8.onnx")
        )
        line = re.search(
            rf"ONNX Runtime in INT8[^$]*?{name} +([\d.]+) +([\d.]+) +([-+][\d.]+)", output
        )
        assert float(line[1]) == pytest.approx(before, abs=6e-4)
        assert float(line[2]) == pytest.approx(after, abs=6e-4)
        assert float(line[3]) == pytest.approx(before - after, abs=6e-4)
        drops.append(before - after)
    described = dict(
        onnxruntime.InferenceSession(folder / "net_int8.onnx").get_modelmeta().custom_metadata_map
    )
    assert float(described["psnr_y_drop"]) == pytest.approx(np.mean(drops), abs=1e-3)
    assert float(described["max_psnr_y_drop"]) == pytest.approx(max(drops), abs=1e-3)
    assert max(np.abs(drops)) > 1e-3  # there is something to measure


def test_the_files_say_how_they_were_made(made):
    folder, _ = made
    described = dict(
        onnxruntime.InferenceSession(folder / "net_int8.onnx").get_modelmeta().custom_metadata_map
    )
    model = openvino_core().read_model(folder / "net_ov_int8.xml")
    for key, value in {
        "dtype": "int8",
        "architecture": "vapsr",
        "scale": "2",
        "calibration_images": "4",
        "calibration_seed": "0",
        "calibration_photographs": "2",
        "measured_photographs": "2",
        "float32_last_convolutions": "1",
    }.items():
        assert described[key] == value
        assert model.get_rt_info(["vastscale", key]).astype(str) == value
    assert described.keys() >= {"psnr_y_drop", "io", "layout", "range"}


def test_convolutions_are_computed_in_int8_except_the_last(made, tmp_path):
    folder, output = made
    count = int(re.search(r"net_int8\.onnx .*: (\d+) convolutions in INT8", output)[1])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(folder / "net_int8.onnx", options)
    run_as = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert run_as.count("QLinearConv") == count
    dense = [
        node
        for node in onnx.load(folder / "net.onnx").graph.node
        if node.op_type == "Conv"
        and not any(attribute.name == "group" and attribute.i != 1 for attribute in node.attribute)
    ]
    assert count == len(dense) - 1
    compiled = openvino_core().compile_model(
        folder / "net_ov_int8.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    weights = [
        node.input(1).get_element_type().get_type_name()
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) == "Convolution"
    ]
    assert weights.count("i8") == count
    assert weights.count("f32") >= 1


@pytest.mark.parametrize("size", [(1, 21, 33), (2, 64, 47)])
def test_sizes_and_batches_stay_free(made, size):
    folder, _ = made
    images = np.stack([picture(*size[1:], seed) for seed in range(size[0])])
    sr = onnxruntime.InferenceSession(folder / "net_int8.onnx").run(
        None, {"input": images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)}
    )[0]
    exact = onnxruntime.InferenceSession(folder / "net.onnx").run(
        None, {"input": images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)}
    )[0]
    assert 1e-4 < np.sqrt(np.square(sr - exact).mean()) < 0.03
    by_bytes = openvino_core().compile_model(folder / "net_ov_int8.xml", "CPU")(images)[0]
    assert by_bytes.dtype == np.uint8
    assert by_bytes.shape == (size[0], 2 * size[1], 2 * size[2], 3)
    assert np.sqrt(np.square(by_bytes.transpose(0, 3, 1, 2) / 255 - exact).mean()) < 0.03


def test_a_network_that_loses_too_much_is_not_written(weights, photos, capsys, tmp_path):
    (tmp_path / "net_int8.onnx").write_bytes(b"the old one")
    status, stdout, err = quantize(capsys, weights, photos, tmp_path / "net.onnx", "--max-drop", 0)
    drop = float(re.search(r"mean +[\d.]+ +[\d.]+ +([-+][\d.]+)", stdout)[1])
    assert drop > 0
    assert status == 1
    assert err.startswith(
        f"error: INT8 loses {drop:.3f} dB of PSNR-Y on average over 2 photographs, but --max-drop "
        "allows 0; no file is written. "
    )
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net_int8.onnx"]
    assert (tmp_path / "net_int8.onnx").read_bytes() == b"the old one"


def test_the_same_seed_gives_the_same_file(made, weights, photos, capsys, tmp_path):
    status, _, _ = quantize(capsys, weights, photos, tmp_path / "net.onnx", "--max-drop", 9)
    assert status == 0
    assert (tmp_path / "net_int8.onnx").read_bytes() == (made[0] / "net_int8.onnx").read_bytes()


def test_crops_depend_on_the_seed_use_every_photograph_and_half_are_reduced(photos):
    calibrating = read_photographs(photos / "calibrate", "--calibrate", 9, ())
    first, again, other = (calibration_images(calibrating, 2, 8, seed) for seed in (0, 0, 1))
    assert len(first) == 8
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not all(
        one.shape == two.shape and torch.equal(one, two)
        for one, two in zip(first, other, strict=True)
    )
    assert all(crop.dtype == torch.uint8 and max(crop.shape[-2:]) <= 96 for crop in first)

    def is_part(crop, image):
        height, width = crop.shape[-2:]
        places = image.unfold(2, height, 1).unfold(3, width, 1)
        return bool((places == crop[:, :, None, None]).flatten(4).all(4).all(1).any())

    parts = [[is_part(crop, photo.pixels) for photo in calibrating] for crop in first]
    assert [any(part) for part in parts].count(True) == 4
    assert all(any(part[number] for part in parts) for number in range(2))


def test_a_network_that_restores_is_measured_on_jpegs_and_to_the_border():
    """An undegraded photograph would be its own result, and INT8's error all of the drop."""
    photo = Photograph("a.png", torch.from_numpy(picture(70, 90)).permute(2, 0, 1)[None])
    shown = []

    def spoil_border(images):
        shown.append(torch.from_numpy(images))
        spoilt = images.copy()
        spoilt[..., 0] = 0
        return spoilt

    form = Form()
    (score,) = measure_drop(lambda images: images, spoil_border, [photo], 1, form)
    lr = low_resolution(photo.pixels, 1)
    assert torch.equal(shown[0], unit_range(lr, torch.float32))
    assert 20 < score.fp32 == psnr_y(lr, photo.pixels) < 45
    assert score.int8 < score.fp32
    assert low_resolution(photo.pixels, 2).shape == (1, 3, 35, 45)


def test_shipped_photographs_that_calibrate_do_not_measure():
    assert not set(CALIBRATING) & set(MEASURING)
    material = gather(Int8())
    assert (len(material.calibrating), len(material.measuring)) == (3, 3)


def test_a_photograph_cannot_calibrate_and_measure(photos, tmp_path):
    image = np.asarray(Image.open(photos / "measure" / "c.png"))
    write_images(tmp_path / "calibrate", {"another name.png": image})
    with pytest.raises(
        UserError, match=r"'c\.png' of --measure is the same as 'another name\.png' of --calibrate"
    ):
        gather(Int8(calibrate=tmp_path / "calibrate", measure=photos / "measure"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--max-drop", "0.2"], "--max-drop needs --int8; add --int8, or omit it"),
        (
            ["--int8", "--half"],
            "--int8 quantises the FP32 network, but --half writes an FP16 one; omit one of them",
        ),
        (["--int8", "--max-drop", "-1"], "--max-drop -1 must be a number of dB, 0 or more"),
        (["--int8", "--keep-last", "-1"], "--keep-last -1 must be 0 or more"),
        (["--int8", "--calibration-images", "0"], "--calibration-images 0 must be from 1 to 10000"),
        (["--int8", "--calibrate", "nowhere"], "folder 'nowhere' of --calibrate does not exist"),
        (
            ["--int8", "--measure", "small"],
            r"'s\.png' of --measure is smaller than 64x64; remove it",
        ),
    ],
)
def test_bad_options_are_one_line(weights, capsys, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "small", {"s.png": picture(63, 90)})
    status, _, err = run(capsys, "--input", weights, "--output", "net.onnx", *arguments)
    assert status == 2
    assert re.search(line, err)
    assert err.count("\n") == 1
    assert not (tmp_path / "net.onnx").exists()


def test_at_least_one_convolution_must_be_quantised(weights, photos, capsys, tmp_path):
    status, _, err = quantize(capsys, weights, photos, tmp_path / "net.onnx", "--keep-last", 99)
    assert status == 2
    assert "of which --keep-last keeps 99 in FP32" in err
    assert not (tmp_path / "net_int8.onnx").exists()


def test_the_defaults_of_the_command_are_those_of_the_module():
    options = vars(convert_to_onnx.Options(output="a"))
    assert {name: options[name] for name in convert_to_onnx.INT8} == vars(int8.Int8())
