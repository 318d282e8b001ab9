"""Benchmarks in all their layouts, several models at once, self-ensemble, and intervals."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess

import numpy as np
import pytest
import torch

import warm
from evaluate import Options
from fabricate import (
    CHECKOUT,
    make_run,
    picture,
    shared,
    tiny_network,
    tiny_saved,
    write_images,
)
from pipeline.cli import RunError, UserError
from pipeline.evaluation import Work, measure_sets, scoring, upscaler_of
from pipeline.evaluation.command import run_evaluation
from pipeline.evaluation.image_sets import find_benchmark, find_folder
from pipeline.evaluation.models import choose_models
from pipeline.evaluation.scoring import ImageScores, measure_image, upscale
from pipeline.evaluation.tables import (
    csv_text,
    difference,
    differences,
    headline,
    interval,
    markdown,
    set_values,
    table,
)
from pipeline.images import to_bytes
from pipeline.inference.tiles import Upscaler
from pipeline.inference.torch_backend import SelfEnsemble, TorchBackend
from pipeline.metrics import METRICS, load_measures
from pipeline.models.weights import write_network

LAYOUTS = {  # name: the preset, its files, and where its HR and LR images are then found
    "SelfExSR": (
        "set5",
        ("Set5/image_SRF_4/img_001_SRF_4_HR.png", "Set5/image_SRF_4/img_001_SRF_4_LR.png"),
        "Set5/image_SRF_4",
        "beside",
    ),
    "SelfExSR, all scales in one": (
        "urban100",
        (
            "Urban100/img_001_SRF_4_HR.png",
            "Urban100/img_001_SRF_4_LR.png",
            "Urban100/img_001_SRF_2_HR.png",
            "Urban100/img_001_SRF_2_LR.png",
        ),
        "Urban100",
        "beside",
    ),
    "by scale, HR only": ("b100", ("bsd100/x4/1_SRF_4_HR.png",), "bsd100/x4", None),
    "BasicSR's test sets": (
        "set14",
        ("Set14/GTmod12/baboon.png", "Set14/LRbicx4/baboon.png", "Set14/original/baboon.png"),
        "Set14/GTmod12",
        "Set14/LRbicx4",
    ),
    "EDSR's": (
        "set5",
        (
            "benchmark/Set5/HR/baby.png",
            "benchmark/Set5/LR_bicubic/X4/babyx4.png",
            "benchmark/Set5/LR_bicubic/X2/babyx2.png",
        ),
        "benchmark/Set5/HR",
        "benchmark/Set5/LR_bicubic/X4",
    ),
    "DIV2K's": (
        "div2k",
        (
            "DIV2K/DIV2K_valid_HR/0801.png",
            "DIV2K/DIV2K_valid_LR_bicubic/X4/0801x4.png",
            "DIV2K/DIV2K_train_HR/0001.png",
        ),
        "DIV2K/DIV2K_valid_HR",
        "DIV2K/DIV2K_valid_LR_bicubic/X4",
    ),
    "DIV2K's, unpacked here": (
        "div2k",
        ("DIV2K_valid_HR/0801.png", "DIV2K_valid_LR_bicubic/X4/0801x4.png"),
        "DIV2K_valid_HR",
        "DIV2K_valid_LR_bicubic/X4",
    ),
    "beside each other": (
        "set5",
        ("Set5_HR/baby.png", "Set5_LR_x4/baby.png"),
        "Set5_HR",
        "Set5_LR_x4",
    ),
    "PIRM's": (
        "pirm",
        ("PIRM_valset/Original/1.png", "PIRM_valset/4x_downsampled/1.png"),
        "PIRM_valset/Original",
        "PIRM_valset/4x_downsampled",
    ),
    "HR folder": ("b100", ("BSD100_HR/1.png",), "BSD100_HR", None),
    "LR of this scale": ("set5", ("set5/HR/a.png", "set5/LR/a.png"), "set5/HR", "set5/LR"),
    "LR of another scale": (
        "set5",
        ("set5/HR/a.png", "set5/LR/a.png", "LR is x2"),
        "set5/HR",
        None,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_benchmark_is_found_in_every_usual_layout(tmp_path, layout):
    key, files, hr, lr = LAYOUTS[layout]
    low = 24 if files[-1] == "LR is x2" else 12
    for file in files:
        if file.endswith(".png"):
            is_low = (
                any(mark in file for mark in ("LR", "X4/", "X2/", "x4/", "downsampled"))
                and "_HR" not in file
            )
            folder, name = (tmp_path / file).parent, file.rpartition("/")[2]
            write_images(folder, {name: picture(low, low) if is_low else picture(50, 49)})
    found = find_benchmark(tmp_path, key, 4)
    assert found.hr == tmp_path / hr
    assert found.lr == (None if lr in (None, "beside") else tmp_path / lr)
    assert found.lr_made_by == ("bicubic" if lr is None else None)
    assert len(found.pairs) == 1
    large, small = found.pairs[0].load(4)
    assert (tuple(large.shape), tuple(small.shape)) == ((1, 3, 48, 48), (1, 3, 12, 12))
    assert "1 images in" in found.note
    assert "not comparable" in found.note


def scores_of(networks, data):
    """Return the networks' scores on a set of images."""
    upscalers = {title: upscaler_of(network) for title, network in networks.items()}
    return measure_sets(Work([data], upscalers, load_measures(METRICS.values())))[0]


def test_a_missing_benchmark_is_named(tmp_path):
    with pytest.raises(
        UserError,
        match=r"folder of benchmarks .*nowhere' does not exist; give it with --benchmarks DIR",
    ):
        find_benchmark(tmp_path / "nowhere", "set5", 4)
    (tmp_path / "BSD100" / "HR").mkdir(parents=True)
    with pytest.raises(
        UserError,
        match=r"no benchmark b100 in .* folder B100 or BSD100 or BSDS100 with images in it",
    ):
        find_benchmark(tmp_path, "b100", 4)
    write_images(tmp_path / "BSD100" / "HR", {"a.png": picture(48, 48)})
    write_images(tmp_path / "BSD100" / "LRbicx4", {"b.png": picture(12, 12)})
    # An error, instead of making the LR image silently.
    with pytest.raises(UserError, match="1 of 1 HR images have no LR image in"):
        find_benchmark(tmp_path, "b100", 4)


def test_bicubic_on_set5_has_the_published_scores():
    shared("data/set5/x4")
    found = find_benchmark(shared("data"), "set5", 4)
    assert found.note == ""
    means = scores_of({"net": tiny_network(scale=4)}, found).mean("bicubic")
    assert (means["psnr_y"], means["ssim_y"]) == (
        pytest.approx(28.4189, abs=5e-4),
        pytest.approx(0.81021, abs=2e-5),
    )
    assert (means["psnr_y_float"], means["ssim_y_float"]) == (
        pytest.approx(28.4318, abs=5e-4),
        pytest.approx(0.81126, abs=2e-5),
    )


def test_several_models_nearest_and_bicubic_on_the_same_images(tmp_path):
    data = find_folder(write_images(tmp_path, {"a.png": picture(41, 48, 1)}), None, 2)
    networks = {"A": tiny_network(1).train(), "B": tiny_network(2)}
    scores = scores_of(networks, data)
    assert networks["A"].training
    assert not networks["B"].training
    assert scores.methods == ["nearest", "bicubic", "A", "B"]
    lr = data.pairs[0].load(2)[1]
    upscaler = upscaler_of(networks["B"])
    shown = measure_image({"B": upscaler}, data.pairs[0], 2, load_measures(METRICS.values()))
    assert torch.equal(
        shown.pixels["nearest"], lr[..., np.arange(40) // 2, :][..., np.arange(48) // 2]
    )
    assert torch.equal(shown.pixels["B"], upscale(upscaler, lr))
    assert (
        scores_of({"B": networks["B"]}, data).images[0].methods["B"]
        == scores.images[0].methods["B"]
    )


class Marked(torch.nn.Module):
    """Nearest x2 with gradients that show where the top and the left of the image are."""

    scale, receptive_radius = 2, 1

    def forward(self, lr):
        sr = lr.repeat_interleave(2, -1).repeat_interleave(2, -2) / 255
        return (
            sr
            * torch.linspace(0.5, 0.7, sr.shape[-2])[:, None]
            * torch.linspace(0.9, 1.1, sr.shape[-1])
        )


def test_the_self_ensemble_is_the_mean_over_eight_symmetries():
    lr = torch.from_numpy(picture(14, 22)).permute(2, 0, 1)[None]
    network, parts = Marked(), []
    for array in (lr, lr.flip(-1)):
        for turns in range(4):
            output = torch.rot90(network(torch.rot90(array, turns, (2, 3))), -turns, (2, 3))
            parts.append(output.flip(-1) if len(parts) >= 4 else output)
    upscaler = upscaler_of(network, self_ensemble=True)
    found = upscale(upscaler, lr)
    assert torch.equal(found, to_bytes(sum(parts) / 8))
    assert not torch.equal(found, upscale(upscaler_of(network), lr))
    assert (to_bytes(torch.stack(parts).std(0)) > 0).any()
    for turns in range(4):  # the ensemble commutes with all eight symmetries
        for array in (lr, lr.flip(-1)):
            turned = torch.rot90(
                upscale(upscaler, torch.rot90(array, turns, (2, 3))), -turns, (2, 3)
            )
            turned = turned if array is lr else turned.flip(-1)
            assert (turned.int() - found.int()).abs().max() <= 1


def test_the_self_ensemble_in_tiles_equals_that_of_the_whole_image(monkeypatch):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 5, padding=2), torch.nn.PixelShuffle(2))
    network.scale, network.receptive_radius = 2, 2
    network.register_forward_pre_hook(lambda _, images: images[0] / 255)
    lr = torch.from_numpy(picture(164, 190)).permute(2, 0, 1)[None]
    whole = upscale(upscaler_of(network, self_ensemble=True), lr)
    monkeypatch.setattr(scoring, "WHOLE_IMAGE_PIXELS", 120 * 120)
    sizes = []
    monkeypatch.setattr(
        SelfEnsemble,
        "forward",
        lambda self, images, precision, call=SelfEnsemble.forward: (
            sizes.append(images.shape) or call(self, images, precision)
        ),
    )
    assert (
        upscale(upscaler_of(network, self_ensemble=True), lr).int() - whole.int()
    ).abs().max() <= 1
    assert len(sizes) > 2


class Cramped(torch.nn.Module):
    """Nearest x2 on a machine with memory for at most `room` pixels."""

    scale, receptive_radius = 2, 1

    def __init__(self, room, sizes):
        super().__init__()
        self.room, self.sizes = room, sizes

    def __deepcopy__(self, _):
        return self

    def forward(self, lr):
        self.sizes.append(lr.shape[0] * lr.shape[-2] * lr.shape[-1])
        if self.sizes[-1] > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lr.repeat_interleave(2, -1).repeat_interleave(2, -2) / 255


def test_images_that_do_not_fit_into_memory_are_tiled():
    lr = torch.from_numpy(picture(200, 250)).permute(2, 0, 1)[None]
    sizes = []
    found = upscale(upscaler_of(Cramped(room=13_000, sizes=sizes)), lr)
    assert torch.equal(found, lr.repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert sizes[0] == 50_000
    assert sizes[-1] <= 13_000
    with pytest.raises(RunError, match="for one tile; choose a smaller network or --device cpu"):
        upscale(upscaler_of(Cramped(room=3, sizes=[])), lr)
    with pytest.raises(
        RunError, match="for one tile; choose a smaller --tile, a smaller network or --device cpu"
    ):
        upscale(Upscaler(TorchBackend(Cramped(room=3, sizes=[]), torch.device("cpu")), tile=64), lr)
    network = torch.nn.Conv2d(4, 4, 1)
    network.scale, network.receptive_radius = 2, 1
    with pytest.raises(RuntimeError, match="should be the same"):
        upscale(upscaler_of(network), lr)


def scored(**columns):
    """Return scores of images with a PSNR-Y and SSIM-Y for every method."""
    return [
        ImageScores(
            f"image {index}",
            {
                method: {"psnr_y": value, "ssim_y": value / 100}
                for method, value in zip(columns, values, strict=True)
            },
        )
        for index, values in enumerate(zip(*columns.values(), strict=True))
    ]


def test_intervals_are_seeded_paired_and_of_the_right_width():
    values = np.random.default_rng(3).normal(30, 2, 100).tolist()
    found = interval(values)
    assert found == interval(values)
    assert found != interval(values, seed=1)
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * np.std(values) / 10, rel=0.05)
    draws = np.random.default_rng(9).integers(0, 100, (4000, 100))  # the textbook bootstrap
    low, high = np.quantile(np.asarray(values)[draws].mean(1), [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.05), pytest.approx(high, abs=0.05))
    # Images differ by 2 dB, the models by 0.1 dB on each: only a paired comparison sees that.
    better = difference(scored(A=[value + 0.1 for value in values], B=values), "A", "B", "psnr_y")
    assert better.interval.low == pytest.approx(0.1)
    assert better.verdict == "better"


def test_verdicts_say_what_is_not_significant():
    noise = np.random.default_rng(0).normal(0, 0.3, 20)
    base = np.linspace(25, 35, 20)
    images = scored(
        nearest=base - 2,
        bicubic=base,
        A=base + noise - noise.mean() + 0.01,
        B=base - 1 - 0.1 * noise,
    )
    verdicts = {
        (entry.method, entry.against, entry.metric): entry.verdict for entry in differences(images)
    }
    assert verdicts == {
        ("A", "bicubic", "psnr_y"): "difference not significant",
        ("A", "bicubic", "ssim_y"): "difference not significant",
        ("B", "bicubic", "psnr_y"): "worse",
        ("B", "bicubic", "ssim_y"): "worse",
        ("B", "A", "psnr_y"): "worse",
        ("B", "A", "ssim_y"): "worse",
    }
    assert difference(images[:4], "B", "bicubic", "psnr_y").verdict == "worse (on 4 images only)"
    assert difference(images[:1], "B", "bicubic", "psnr_y").verdict == "no interval: one image"
    same = difference(scored(A=[math.inf, 30.0], B=[math.inf, 30.0]), "A", "B", "psnr_y")
    assert (same.interval.mean, same.verdict) == (0.0, "difference not significant")
    assert difference(scored(A=[math.inf, 30.0], B=[31.0, 30.0]), "A", "B", "psnr_y").verdict == (
        "no interval: infinite PSNR"
    )
    lower = [
        ImageScores(str(index), {"A": {"lpips": 0.1}, "B": {"lpips": 0.2 + index / 100}})
        for index in range(12)
    ]
    assert difference(lower, "A", "B", "lpips").verdict == "better"


def test_tables_in_csv_markdown_and_json(tmp_path):
    data = find_folder(
        write_images(tmp_path / "a|b", {"x.png": picture(40, 48, 1), "y.png": picture(40, 48, 2)}),
        None,
        2,
    )
    measured = scores_of({"one": tiny_network()}, data)
    rows = list(csv.DictReader(csv_text([measured]).splitlines()))
    assert [(row["benchmark"], row["image"], row["method"]) for row in rows] == [
        ("a|b", image, method) for image in ("x", "y") for method in ("nearest", "bicubic", "one")
    ]
    assert float(rows[2]["psnr_y"]) == measured.images[0].methods["one"]["psnr_y"]
    lines = headline([measured])
    assert re.match(r"\| PSNR-Y / SSIM-Y \| a\\\|b \(2\) +\|$", lines[0])
    mean = measured.mean("one")
    assert lines[4].startswith("| one ")
    assert f"{mean['psnr_y']:.3f} / {mean['ssim_y']:.4f}" in lines[4]
    assert len({len(line) for line in lines}) == 1
    text = markdown([measured], 2)
    assert "Y not rounded, as in BasicSR" in text
    assert "(on 2 images only)" in text or "not significant" in text
    assert table([["a"], ["b\nc"]]) == ["| a   |", "|-----|", "| b c |"]
    values = json.loads(json.dumps(set_values(measured), allow_nan=False))
    assert values["mean"]["one"] == measured.mean("one")
    assert values["lr_made_by"] == "bicubic"


def test_models_have_one_scale_and_unique_titles(tmp_path):
    for name in ("a/net.pth", "b/net.pth", "bicubic.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_network(tmp_path / name, tiny_saved(scale=2))
    write_network(tmp_path / "x3.pth", tiny_saved(scale=3))
    paths = [tmp_path / name for name in ("a/net.pth", "b/net.pth", "bicubic.pth", "bicubic.pth")]
    folder = tmp_path.name
    assert [model.title for model in choose_models(paths, 2)] == [
        "a/net",
        "b/net",
        f"{folder}/bicubic",
        f"{folder}/bicubic (2)",
    ]
    assert [model.title for model in choose_models(paths[2:3], 2)] == ["bicubic (2)"]
    with pytest.raises(
        UserError, match=r"different scales cannot be compared: .*net.pth' is x2, .*x3.pth' is x3"
    ):
        choose_models([paths[0], tmp_path / "x3.pth"], None)


def test_the_newest_run_is_named_if_no_model_is(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "runs", "first", scale=2)
    run_dir = make_run(tmp_path / "runs", "second", steps=(100, 300), scale=2)
    monkeypatch.chdir(tmp_path)
    (model,) = choose_models([], None)
    said = capsys.readouterr().out
    assert said == "model: none is named, so the newest run: runs/second\n"
    assert model.title == run_dir.name
    choose_models([run_dir], None)
    assert capsys.readouterr().out == ""


def test_the_command_with_models_benchmarks_and_a_folder(tmp_path, capsys):
    for seed in (1, 2):
        write_network(tmp_path / f"net{seed}.pth", tiny_saved(seed, scale=2))
    images = {"a.png": picture(40, 48, 1), "b.png": picture(50, 33, 2)}
    write_images(tmp_path / "sets" / "Set5" / "HR", images)
    write_images(tmp_path / "set5", images)
    options = Options(
        hr=tmp_path / "set5",
        benchmark=("set5", "set5"),
        benchmarks=tmp_path / "sets",
        model=(tmp_path / "net1.pth", tmp_path / "net2.pth"),
        out=tmp_path / "out",
        self_ensemble=True,
    )
    assert run_evaluation(options) == 0
    stdout = capsys.readouterr().out
    assert "| PSNR-Y / SSIM-Y | set5 (folder) (2) | Set5 (2)" in stdout
    assert "Set5: net2 over net1" in stdout
    assert "note: 2 images in" in stdout
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [entry["name"] for entry in report["benchmarks"]] == ["set5 (folder)", "Set5"]
    assert report["self_ensemble"] is True
    assert report["mean"]["model"] == report["benchmarks"][0]["mean"]["net1"]
    assert report["mean"]["bicubic"] == report["benchmarks"][1]["mean"]["bicubic"]
    assert (
        report["images"][0]["nearest"] == report["benchmarks"][0]["images"][0]["methods"]["nearest"]
    )
    assert [entry["title"] for entry in report["models"]] == ["net1", "net2"]
    assert len((tmp_path / "out" / "evaluation.csv").read_text().splitlines()) == 1 + 2 * 2 * 4
    assert sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")
    ) == ["Set5/a.png", "Set5/b.png", "set5 (folder)/a.png", "set5 (folder)/b.png"]


def test_the_command_line_takes_lists(tmp_path):
    write_network(tmp_path / "a.pth", tiny_saved(scale=2))
    cases = {
        (
            "--model",
            "a.pth",
            "a.pth",
            "--benchmark",
            "set5",
            "b100",
            "--benchmarks",
            ".",
        ): "no benchmark set5 in",
        (
            "--model",
            "a.pth",
        ): "no images to evaluate on; give a folder with --hr, or benchmarks with --benchmark",
        ("--model", "a.pth", "--benchmark", "set6"): "set6",
    }
    for arguments, message in cases.items():
        done = subprocess.run(
            [warm.python(), str(CHECKOUT / "evaluate.py"), *arguments],
            cwd=tmp_path,
            timeout=120,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert message in done.stderr
