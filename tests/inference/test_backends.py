"""`upscale.py --backend`: every backend matches PyTorch, conversions are kept, the fastest wins."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tifffile
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import convert_to_onnx
import upscale
from conftest import run_python
from fabricate import picture, run_command, tiny_saved
from pipeline import cli
from pipeline.export import onnx_file
from pipeline.export.network_files import FILE_BACKENDS
from pipeline.export.onnx_file import Form, convert, describe
from pipeline.export.openvino_file import write_openvino
from pipeline.inference import choosing
from pipeline.inference.conversion_cache import BackendVerdict as Verdict
from pipeline.inference.conversion_cache import ConversionCache, Original
from pipeline.inference.devices import CPU
from pipeline.inference.tiles import Upscaler
from pipeline.inference.torch_backend import TorchBackend
from pipeline.models import build_generator
from pipeline.models.weights import SavedNetwork, read_network, write_network

NAMES = ("color.png", "alpha.png", "gray.png", "deep.tif")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Use one thread, as for the other tests of upscale.py; the backends read the variable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with weights, pictures of several modes and odd sizes, and a cache for all tests."""
    folder = tmp_path_factory.mktemp("work")
    write_network(folder / "tiny.safetensors", tiny_saved(0))
    pictures = folder / "pictures"
    pictures.mkdir()
    image = picture(61, 83, 1)
    Image.fromarray(image).save(pictures / "color.png")
    Image.fromarray(np.dstack([image, picture(61, 83, 2)[..., 0] | 8])).save(pictures / "alpha.png")
    Image.fromarray(picture(33, 17, 3)[..., 0]).save(pictures / "gray.png")
    tifffile.imwrite(
        pictures / "deep.tif", picture(40, 45, 4).astype(np.uint16) * 257 + 100, photometric="rgb"
    )
    return folder


@pytest.fixture
def kept(work, monkeypatch):
    """The folder of converted networks that is shared by all tests that use this fixture."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    return work / "cache" / "vastscale" / "converted"


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder of converted networks for a single test; it does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vastscale" / "converted"


@pytest.fixture(scope="module")
def conversion(work):
    """The network as an ONNX file, as the cache keeps it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(work / "conversion"))
        cache = ConversionCache(Original(work / "tiny.safetensors", CPU, "auto"))
        cache.title(FILE_BACKENDS["onnx"])
    (file,) = (work / "conversion" / "vastscale" / "converted").glob("*.onnx")
    return file


@pytest.fixture
def converted(alone, conversion):
    """As `alone`, but the network has been converted already; nothing has been measured yet."""
    alone.mkdir(parents=True)
    shutil.copy2(conversion, alone)
    return alone


def run(capsys, *arguments):
    return run_command(capsys, upscale, *arguments)


def upscaled(capsys, work, out, *arguments, model="tiny.safetensors", names=NAMES):
    """Run the command successfully; return the results as arrays and its output."""
    inputs = [work / "pictures" / name for name in names]
    status, told, err = run(
        capsys, *inputs, "-o", out, "--model", work / model, "--format", "tif", *arguments
    )
    assert (status, err) == (0, "")
    return [tifffile.imread(out / f"{Path(name).stem}.tif") for name in names], told


@pytest.fixture(scope="module")
def expected(work, tmp_path_factory):
    """PyTorch's results for the pictures, untiled."""
    out = tmp_path_factory.mktemp("expected")
    with pytest.raises(SystemExit) as stop:
        cli.run(
            upscale.Options,
            upscale.main,
            [
                str(work / "pictures"),
                "-o",
                str(out),
                "--model",
                str(work / "tiny.safetensors"),
                "--backend",
                "torch",
                "--format",
                "tif",
            ],
        )
    assert not stop.value.code
    return [tifffile.imread(out / f"{Path(name).stem}.tif") for name in NAMES]


def assert_near(found, expected, levels=1, deep_levels=1):
    """Compare results; `deep_levels` (of 65535) is the tolerance for 16-bit ones."""
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        allowed = deep_levels if one.dtype == np.uint16 else levels
        assert np.abs(one.astype(int) - other.astype(int)).max() <= allowed
    assert found[-1].std() > 1000  # 16 bits, and a picture


@pytest.mark.parametrize("backend", FILE_BACKENDS)
@pytest.mark.parametrize("tile", [0, 32])
def test_every_backend_makes_the_images_of_pytorch(
    work, kept, expected, capsys, tmp_path, backend, tile
):
    found, told = upscaled(capsys, work, tmp_path, "--backend", backend, "--tile", tile)
    assert_near(found, expected)
    title = FILE_BACKENDS[backend].title
    assert re.search(
        rf"\(vapsr x2\) on cpu with {title} [\d.]+ \(converted, kept in .*converted\); 4 files",
        told,
    )


def test_a_network_is_converted_once_and_a_broken_file_is_made_anew(
    work, alone, expected, capsys, tmp_path, monkeypatch
):
    upscaled(capsys, work, tmp_path / "1", "--backend", "onnx")
    (file,) = alone.glob("*.onnx")
    content, when = file.read_bytes(), file.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(onnx_file, "convert", lambda *_: pytest.fail("converted again"))
        found, told = upscaled(capsys, work, tmp_path / "2", "--backend", "onnx")
    assert_near(found, expected)
    assert "converting" not in told
    assert file.stat().st_mtime_ns == when
    file.write_bytes(content[:-7])
    assert_near(upscaled(capsys, work, tmp_path / "3", "--backend", "onnx")[0], expected)
    assert file.read_bytes() == content
    write_network(work / "other.safetensors", tiny_saved(7))
    upscaled(
        capsys,
        work,
        tmp_path / "4",
        "--backend",
        "onnx",
        model="other.safetensors",
        names=("gray.png",),
    )
    assert len(list(alone.glob("*.onnx"))) == 2


def test_a_cache_that_cannot_be_written_is_no_error(work, expected, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    found, told = upscaled(capsys, work, tmp_path / "out", "--backend", "onnx")
    assert_near(found, expected)
    assert "(converted, not kept: " in told


def conversion_of(work):
    return ConversionCache(Original(work / "tiny.safetensors", CPU, "auto"))


def judged(conversion, **verdicts):
    for name, verdict in verdicts.items():
        conversion.keep_verdict(FILE_BACKENDS[name], verdict)


@pytest.mark.parametrize(
    ("openvino", "onnx_runtime", "line"),
    [
        (
            Verdict(share=0.5),
            Verdict(share=0.8),
            r"with OpenVINO [\d.]+ \(converted, kept in .*, 2\.0 times as fast as",
        ),
        (
            Verdict(share=0.9),
            Verdict(share=0.8),
            r"with ONNX Runtime [\d.]+ \(converted, kept in .*, 1\.2 times as fast as",
        ),
        (Verdict(reason="it broke"), Verdict(share=0.8), r"with ONNX Runtime [\d.]+ \("),
        (
            Verdict(share=1.1),
            Verdict(share=1.3),
            r"with PyTorch [\d.]+ \(OpenVINO and ONNX Runtime measured slower here\)",
        ),
        (
            Verdict(reason="it broke"),
            Verdict(reason="it broke"),
            r"with PyTorch [\d.]+ \(it broke\)",
        ),
        (
            None,
            Verdict(share=1.3),
            r"with PyTorch [\d.]+ \(OpenVINO: conversion would take longer than it saves\)",
        ),
        (
            None,
            None,
            r"with PyTorch [\d.]+ "
            r"\(OpenVINO and ONNX Runtime: conversion would take longer than it saves\)",
        ),
    ],
)
def test_the_fastest_as_measured_is_chosen(
    work, request, capsys, tmp_path, openvino, onnx_runtime, line
):
    request.getfixturevalue("converted" if openvino else "alone")
    verdicts = {"openvino": openvino, "onnx": onnx_runtime}
    judged(conversion_of(work), **{name: verdict for name, verdict in verdicts.items() if verdict})
    _, told = upscaled(capsys, work, tmp_path / "out", names=("gray.png",))
    assert re.search(rf"on cpu {line}", told), told


def test_much_work_is_worth_a_conversion_which_measures_both(
    work, alone, expected, capsys, tmp_path, monkeypatch
):
    for name in ("EXPORT_SECONDS", "CHECKED_PIXELS", "TIMING_SECONDS"):
        monkeypatch.setattr(choosing, name, 0)
    found, told = upscaled(capsys, work, tmp_path / "out")
    assert_near(found, expected)
    assert told.startswith(
        f"converting {choosing.short_path(work / 'tiny.safetensors')} for OpenVINO and ONNX Runtime"
    )
    verdicts = [conversion_of(work).verdict(kind) for kind in FILE_BACKENDS.values()]
    assert all(not verdict.reason and 0.02 < verdict.share < 50 for verdict in verdicts)
    shares = {
        kind.title: verdict.share
        for kind, verdict in zip(FILE_BACKENDS.values(), verdicts, strict=True)
    }
    fastest = min({**shares, "PyTorch": 1.0}.items(), key=lambda item: item[1])[0]
    assert f"on cpu with {fastest} " in told


def test_a_runtime_with_other_images_is_refused_and_not_tried_again(
    work, converted, expected, capsys, tmp_path, monkeypatch
):
    class Wrong(FILE_BACKENDS["onnx"].load):
        def __call__(self, images):
            return super().__call__(images) * 0.99

    kind = choosing.BackendKind(**{**vars(FILE_BACKENDS["onnx"]), "load": Wrong})
    monkeypatch.setattr(choosing, "FILE_BACKENDS", {"onnx": kind})
    for name in ("EXPORT_SECONDS", "CHECKED_PIXELS", "TIMING_SECONDS"):
        monkeypatch.setattr(choosing, name, 0)
    found, told = upscaled(capsys, work, tmp_path / "1")
    assert_near(found, expected)
    assert re.search(
        r"with PyTorch [\d.]+ \(ONNX Runtime [\d.]+ differs from PyTorch on 1 x 64x64: .* dB", told
    )
    _, told = upscaled(capsys, work, tmp_path / "2")
    assert "converting" not in told
    status, _, err = run(
        capsys,
        work / "pictures",
        "-o",
        tmp_path / "3",
        "--model",
        work / "tiny.safetensors",
        "--backend",
        "onnx",
    )
    assert status == 2
    assert err.startswith("error: --backend onnx cannot be used: ONNX Runtime ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("missing", "backend", "package"),
    [
        ("openvino", "openvino", "openvino"),
        ("onnxruntime", "onnx", "onnxruntime"),
        ("onnxscript", "onnx", "onnxscript"),
    ],
)
def test_a_backend_that_is_not_installed_is_one_line(
    work, alone, capsys, tmp_path, monkeypatch, missing, backend, package
):
    monkeypatch.setitem(sys.modules, missing, None)
    status, _, err = run(
        capsys,
        work / "pictures",
        "-o",
        tmp_path,
        "--model",
        work / "tiny.safetensors",
        "--backend",
        backend,
    )
    assert (status, err) == (
        2,
        f"error: --backend {backend} needs a package that is not installed; run: pip install "
        f"{package}, or omit --backend\n",
    )


def test_pytorch_serves_where_nothing_else_is_installed(work, alone, capsys, tmp_path, monkeypatch):
    for package in ("openvino", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    _, told = upscaled(capsys, work, tmp_path, names=("gray.png",))
    assert "(other backends need openvino or onnxruntime, not installed)" in told


# Network files


@pytest.fixture(scope="module")
def files(work):
    """The network as files of several forms."""
    saved = read_network(work / "tiny.safetensors")
    for name, form in (
        ("float", Form()),
        ("bytes", Form(io="uint8", layout="nhwc")),
        ("half", Form(half=True)),
    ):
        (work / f"{name}.onnx").write_bytes(convert(saved, saved.build(), form))
    write_openvino(work / "float.onnx", work / "float.xml", describe(saved, Form()))
    return work


@pytest.mark.parametrize(
    ("name", "backend", "deep_levels"),
    [
        ("float.onnx", "onnx", 1),
        ("float.onnx", "openvino", 1),
        ("float.xml", "auto", 60),  # of weights in FP16
        ("bytes.onnx", "onnx", 400),
        ("bytes.onnx", "openvino", 400),
        ("half.onnx", "onnx", 120),
    ],
)
@pytest.mark.parametrize("tile", [0, 32])
def test_a_network_file_is_a_model(
    files, alone, expected, capsys, tmp_path, name, backend, deep_levels, tile
):
    found, told = upscaled(
        capsys, files, tmp_path / "out", "--backend", backend, "--tile", tile, model=name
    )
    assert_near(found, expected, deep_levels=deep_levels)
    assert "(file used unchanged" in told
    assert ("uint8: 16-bit pictures are reduced to 8 bits" in told) == (name == "bytes.onnx")
    # what was found out; nothing was converted
    assert {path.suffix for path in alone.iterdir()} == {".json"}


@pytest.fixture(scope="module")
def one_size(tmp_path_factory):
    """SwinIR x2 as files for images of 96x112, and the network in PyTorch."""
    folder = tmp_path_factory.mktemp("one size")
    params = {"arch": "SwinIR", "embed_dim": 12, "depths": [2], "num_heads": [2], "img_size": 16}
    torch.manual_seed(0)
    network = build_generator("spandrel", 2, **params).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    write_network(folder / "net.pth", SavedNetwork("spandrel", 2, params, network.state_dict()))
    command = ("--input", folder / "net.pth", "--output", folder / "net.onnx", "--openvino")
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(io.StringIO()):
        cli.run(
            convert_to_onnx.Options,
            convert_to_onnx.main,
            [str(argument) for argument in (*command, "--shape", "1x3x96x112")],
        )
    assert not stop.value.code
    return folder, network


@pytest.mark.parametrize(("file", "levels"), [("net.onnx", 1), ("net.xml", 2)])
def test_a_network_of_one_size_takes_images_of_any(one_size, alone, capsys, tmp_path, file, levels):
    folder, network = one_size
    on_cpu = Upscaler(TorchBackend(network, torch.device("cpu")))
    # 150 and 201 are no multiples of the windows' 8 pixels.
    sizes = {"tiles": (150, 201), "whole": (96, 112), "flat": (30, 300), "small": (31, 40)}
    for name, size in sizes.items():
        image = picture(*size)
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        shown = image[None]
        if name in ("flat", "small"):  # the network sees them extended by reflection
            sides = (96 - size[0], max(0, 112 - size[1]))
            shown = np.pad(shown, ((0, 0), *((0, side) for side in sides), (0, 0)), "reflect")
        large = on_cpu(shown, shown.dtype, is_deep=False, advance=lambda _: None)
        expected = large[0, : 2 * size[0], : 2 * size[1]].astype(int)
        status, told, err = run(
            capsys,
            tmp_path / f"{name}.png",
            "-o",
            tmp_path / "out" / f"{name}.png",
            "--model",
            folder / file,
        )
        assert (status, err) == (0, "")
        assert "spandrel x2" in told
        found = np.asarray(Image.open(tmp_path / "out" / f"{name}.png")).astype(int)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= levels, name


def foreign(path, *, height="height", width="width", white=1.0, multiple=1, **change):
    """Write an ONNX file of another program: nearest x3, by a convolution and a DepthToSpace."""
    weight = np.zeros((27, 3, 3, 3), np.float32)
    for output in range(27):
        weight[output, output // 9, 1, 1] = 1
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("DepthToSpace", ["y"], ["z"], blocksize=3, mode="CRD"),
    ]
    if multiple > 1:  # fails at other sizes, as networks with windows do
        nodes[:0] = [
            helper.make_node("SpaceToDepth", ["x0"], ["s"], blocksize=multiple),
            helper.make_node("DepthToSpace", ["s"], ["x"], blocksize=multiple),
        ]
    graph = helper.make_graph(
        nodes,
        "net",
        [
            helper.make_tensor_value_info(
                "x0" if multiple > 1 else "x",
                TensorProto.FLOAT,
                change.get("input", [1, 3, height, width]),
            )
        ],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("backend", FILE_BACKENDS)
@pytest.mark.parametrize("form", [{}, {"multiple": 4}, {"height": 48, "width": 80}])
def test_a_foreign_file_shows_its_scale_and_sizes_by_running(work, capsys, tmp_path, form, backend):
    file = foreign(tmp_path / "foreign.onnx", **form)
    found, told = upscaled(capsys, work, tmp_path / "out", "--backend", backend, model=file)
    for name, one in zip(NAMES[:3], found, strict=False):
        pixels = np.asarray(Image.open(work / "pictures" / name))
        np.testing.assert_array_equal(one, pixels.repeat(3, 0).repeat(3, 1))
    assert "(network x3)" in told


@pytest.mark.parametrize(
    ("make", "arguments", "line"),
    [
        (lambda folder: folder / "none.onnx", (), "no file '.*none.onnx' of --model"),
        (
            lambda folder: foreign(folder / "a.onnx"),
            ("--backend", "torch"),
            r"--backend torch does not read .onnx files; choose auto or openvino or onnx",
        ),
        (
            lambda folder: foreign(folder / "a.onnx"),
            ("--precision", "fp16"),
            "--precision fp16 is for weights; ",
        ),
        (
            lambda folder: foreign(folder / "a.onnx", input=[1, 3, 64]),
            (),
            r"cannot load|takes input of shape \(1, 3, 64\), but images",
        ),
        (
            lambda folder: foreign(folder / "a.onnx", height=32, width=48),
            ("--tile", "32"),
            "--tile 32: the network takes",
        ),
        (
            lambda folder: (folder / "a.onnx").write_bytes(b"no") and folder / "a.onnx",
            (),
            "cannot load '.*a.onnx'",
        ),
        (
            lambda folder: (folder / "a.xml").write_bytes(b"no") and folder / "a.xml",
            (),
            "cannot load '.*a.xml'",
        ),
        (
            lambda folder: (folder / "a.xml").write_bytes(b"no") and folder / "a.xml",
            ("--backend", "onnx"),
            "--backend onnx does not read .xml files; choose auto or openvino",
        ),
    ],
)
def test_a_file_that_cannot_serve_is_one_line(work, capsys, tmp_path, make, arguments, line):
    file = make(tmp_path)
    status, _, err = run(
        capsys, work / "pictures", "-o", tmp_path / "out", "--model", file, *arguments
    )
    assert status == 2
    assert re.search(line, err), err
    assert err.count("\n") == 1


def test_what_convert_to_onnx_wrote_upscales(work, expected, capsys, tmp_path):
    status, _, _ = run_command(
        capsys,
        convert_to_onnx,
        "--input",
        work / "tiny.safetensors",
        "--output",
        tmp_path / "net.onnx",
        "--openvino",
    )
    assert status == 0
    found, told = upscaled(capsys, work, tmp_path / "out", model=tmp_path / "net.xml", names=NAMES)
    assert "(vapsr x2) on cpu with OpenVINO" in told
    assert_near(found, expected, deep_levels=60)  # weights are FP16
    assert os.path.getsize(tmp_path / "net.bin") > 0


# Without torch


@pytest.mark.parametrize("kind", FILE_BACKENDS)
def test_torch_is_not_imported_where_another_backend_computes(
    work, converted, expected, tmp_path, kind
):
    """Upscale pictures of every mode, tiled and resized, with an earlier run's conversion."""
    code = (
        "import sys, upscale\nfrom pipeline import cli\n"
        "try:\n    cli.run(upscale.Options, upscale.main)\n"
        "finally:\n    print('imported:', *sorted({'torch', 'torchvision', 'av'} & "
        "sys.modules.keys()))\n"
    )
    common = [
        str(work / "pictures"),
        "--model",
        str(work / "tiny.safetensors"),
        "--format",
        "tif",
        "--force",
    ]
    for arguments, imported in (
        (["--backend", kind, "--tile", "32"], " torch"),
        (["--backend", kind], ""),
        (["--backend", kind, "--tile", "32"], ""),
        (["--backend", kind, "--scale", "3"], ""),
    ):
        out = tmp_path / str(len(arguments))
        done = run_python(code, *common, "-o", str(out), *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == f"imported:{imported}"
        if "--scale" not in arguments:
            assert_near(
                [tifffile.imread(out / f"{Path(name).stem}.tif") for name in NAMES], expected
            )


def test_a_network_file_needs_torch_once_at_most(files, alone, tmp_path):
    code = (
        "import sys, upscale\nfrom pipeline import cli\n"
        "try:\n    cli.run(upscale.Options, upscale.main)\n"
        "finally:\n    print('imported:', *sorted({'torch'} & sys.modules.keys()))\n"
    )
    for imported in (" torch", ""):
        done = run_python(
            code,
            str(files / "pictures" / "gray.png"),
            "--model",
            str(files / "float.onnx"),
            "--force",
            "-o",
            str(tmp_path / "out"),
            cwd=tmp_path,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == f"imported:{imported}"
