"""The ways of benchmarks/inference.py give the same image, and a wrong image is shown as such."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import inference, inference_loops
from benchmarks.inference import Options
from fabricate import picture, tiny_saved, write_images
from pipeline.cli import UserError
from pipeline.export.onnx_file import Form, convert
from pipeline.models.weights import write_network


@pytest.fixture
def weights(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # monkeypatch restores what the benchmark sets
    write_network(tmp_path / "net.safetensors", tiny_saved(0))
    yield tmp_path / "net.safetensors"
    torch.set_num_threads(threads)


def test_every_way_is_measured_and_compared(weights, tmp_path, capsys):
    other = tiny_saved(5)
    (tmp_path / "other.onnx").write_bytes(convert(other, other.build(), Form()))
    ways = (
        "eager",
        "channels-last",
        "bf16",
        "fp16",
        "onnx",
        "onnx-fp16",
        "onnx-int8",
        "openvino",
        "openvino-int8",
    )
    assert (
        inference.main(
            Options(
                model=weights,
                size="24x32",
                rounds=2,
                ways=ways,
                files=(tmp_path / "other.onnx",),
                device="cpu",
                json=tmp_path / "out.json",
            )
        )
        == 0
    )
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [*ways, "other.onnx"]
    assert (rows["eager"]["ratio"], rows["eager"]["psnr"]) == (1.0, None)
    for name in ("channels-last", "onnx", "openvino"):
        assert rows[name]["psnr"] is None or rows[name]["psnr"] > 110
    for name in ("bf16", "fp16", "onnx-fp16", "onnx-int8", "openvino-int8"):
        assert 20 < rows[name]["psnr"] < 100
    assert rows["other.onnx"]["psnr"] < 20  # the image of other weights
    for row in rows.values():
        assert row["least"] <= row["milliseconds"] <= row["greatest"]
        assert row["megapixels"] == pytest.approx(24 * 32 * 4 / row["milliseconds"] / 1e3)
    assert "vapsr x2, LR 32x24, CPU, 1 threads; medians of 2 rounds" in capsys.readouterr().out


def test_threads_reach_pytorch_and_the_runtimes(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "_table", lambda *_: "")
    seen = {}

    def look(*_):
        from pipeline.export.network_files import usable_threads

        seen.update(torch=torch.get_num_threads(), runtimes=usable_threads())
        return {"eager": lambda: torch.zeros(1, 3, 48, 64)}

    monkeypatch.setattr(inference, "_calls", look)
    inference.main(Options(model=weights, size="24x32", threads=2, rounds=1, device="cpu"))
    assert seen == {"torch": 2, "runtimes": 2}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"size": "24"}, "--size 24 must be HxW"),
        ({"size": "0x3"}, "--size 0x3 must be HxW"),
        ({"ways": ("fast",)}, "--ways: unknown 'fast'; choose from eager, "),
        ({"threads": 0}, "--threads and --rounds"),
        ({"files": ("no.onnx",)}, "'no.onnx' of --files must be an existing .onnx or .xml file"),
        ({"ways": ("openvino",), "device": "meta"}, "no device|only on the CPU"),
    ],
)
def test_bad_options_are_refused(weights, change, line):
    from pathlib import Path

    change = {
        name: tuple(map(Path, value)) if name == "files" else value
        for name, value in change.items()
    }
    with pytest.raises(UserError, match=line):
        inference.main(Options(model=weights, **{"device": "cpu", "size": "24x32", **change}))


def test_a_file_of_another_scale_is_refused(weights, tmp_path):
    other = tiny_saved(5, scale=4)
    (tmp_path / "x4.onnx").write_bytes(convert(other, other.build(), Form()))
    with pytest.raises(
        UserError, match=r"x4.onnx gives \(1, 3, 96, 128\), but the model gives \(1, 3, 48, 64\)"
    ):
        inference.main(
            Options(
                model=weights,
                size="24x32",
                ways=("eager",),
                files=(tmp_path / "x4.onnx",),
                device="cpu",
            )
        )


def test_whole_commands_over_a_folder_make_the_same_pictures(
    weights, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(
        tmp_path / "lr", {f"{index}.png": picture(20 + index, 31, index) for index in range(2)}
    )
    commands = ("tile-loop", "bare-onnx", "onnx")
    assert (
        inference.main(
            Options(
                model=weights,
                rounds=1,
                ways=commands,
                folder=tmp_path / "lr",
                json=tmp_path / "out.json",
            )
        )
        == 0
    )
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert list(rows) == [*commands]
    assert (rows["tile-loop"]["ratio"], rows["tile-loop"]["psnr"]) == (1.0, None)
    for row in rows.values():
        assert row["psnr"] is None or row["psnr"] > 60
        assert 0 < row["cpu_seconds"] < 60
        assert 20e6 < row["peak_bytes"] < 4e9
    assert "2 pictures of " in capsys.readouterr().out


def test_a_tile_loop_joins_its_pieces(monkeypatch):
    monkeypatch.setattr(inference_loops, "LARGEST_TILE", 50)
    monkeypatch.setattr(
        inference_loops, "by_torch", lambda model: lambda image: image.repeat(2, 0).repeat(2, 1)
    )
    image = picture(170, 90, 0).astype(np.float32) / 255
    np.testing.assert_array_equal(
        inference_loops.by_tiles("")(image), image.repeat(2, 0).repeat(2, 1)
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"ways": ("eager",)}, "--ways: unknown 'eager'; choose from bare-onnx, "),
        ({}, "no .png pictures in '.*' of --folder"),
    ],
)
def test_a_folder_that_cannot_be_measured_is_refused(weights, tmp_path, change, line):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=line):
        inference.main(Options(model=weights, folder=tmp_path / "empty", **change))


def test_png_levels_are_measured_beside_libpng(tmp_path, capsys):
    write_images(tmp_path, {"0.png": picture(64, 96)})
    assert inference.main(Options(png=tmp_path, rounds=1)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines[2:]] == [
        "libpng, level 6",
        "OpenCV",
        *(f"--png-level {level}" for level in range(1, 13)),
    ]
    assert float(lines[2].split()[-1]) == 1.0
    assert all(float(line.split()[-2]) > 1 for line in lines[2:])
