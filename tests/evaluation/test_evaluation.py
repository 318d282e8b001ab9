from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import warm
from fabricate import (
    CHECKOUT,
    identity_network,
    make_run,
    picture,
    ramp,
    run_command,
    shared,
    tiny_network,
    tiny_saved,
    write_images,
)
from pipeline.cli import UserError
from pipeline.data.image_pixels import read_rgb
from pipeline.evaluation import (
    Work,
    find_folder,
    find_pairs,
    format_table,
    measure_sets,
    scoring,
    upscaler_of,
)
from pipeline.evaluation.pictures import write_views
from pipeline.evaluation.scoring import DRIFTS, ImageScores, measure_image, upscale
from pipeline.evaluation.tables import SetScores, as_json
from pipeline.images import cubic_resize, to_bytes
from pipeline.inference.torch_backend import TorchBackend
from pipeline.metrics import METRICS, Trunk, load_measures, measure
from pipeline.models.vapsr import VapSR
from pipeline.models.weights import read_network, write_network


def evaluate_py(*arguments, cwd):
    return subprocess.run(
        [warm.python(), str(CHECKOUT / "evaluate.py"), *map(str, arguments)],
        cwd=cwd,
        timeout=120,
        capture_output=True,
        text=True,
    )


def names(pairs):
    return [(pair.name, pair.hr.name, pair.lr and pair.lr.name) for pair in pairs]


def test_pairs_side_by_side(tmp_path):
    image = picture(8, 8)
    write_images(
        tmp_path,
        dict.fromkeys(("b_HR.png", "b_LR.png", "a_HR.png", "a_LR.png", "a_other.png"), image),
    )
    assert names(find_pairs(tmp_path, None, 2)) == [
        ("a", "a_HR.png", "a_LR.png"),
        ("b", "b_HR.png", "b_LR.png"),
    ]
    (tmp_path / "b_LR.png").unlink()
    with pytest.raises(
        UserError,
        match=r"1 of 2 HR images in .* no LR image beside them; the first is 'b_HR.png'",
    ):
        find_pairs(tmp_path, None, 2)
    (tmp_path / "a_LR.png").unlink()
    assert names(find_pairs(tmp_path, None, 2)) == [
        ("a", "a_HR.png", None),
        ("b", "b_HR.png", None),
    ]


@pytest.mark.parametrize(
    "lr_name", ["a.png", "a.jpg", "ax3.png", "a_x3.png", "aX3.png", "a_LR.png", "a-lq.png"]
)
def test_pairs_in_two_folders(tmp_path, lr_name):
    hr = write_images(tmp_path / "hr", {"a.png": picture(9, 9), "b.png": picture(9, 9)})
    lr = write_images(
        tmp_path / "lr", {lr_name: picture(3, 3), "b.png": picture(3, 3), "c.png": picture(3, 3)}
    )
    assert names(find_pairs(hr, lr, 3)) == [("a", "a.png", lr_name), ("b", "b.png", "b.png")]


def test_names_with_dots_and_in_any_order_pair(tmp_path):
    hr = write_images(
        tmp_path / "hr", dict.fromkeys(("b.v1.png", "b.v2.png", "b-c.png", "b.png"), picture(9, 9))
    )
    lr = write_images(
        tmp_path / "lr",
        dict.fromkeys(("b.v2x3.png", "b.v1x3.png", "b-c.png", "b.png"), picture(3, 3)),
    )
    assert names(find_pairs(hr, lr, 3)) == [
        ("b", "b.png", "b.png"),
        ("b-c", "b-c.png", "b-c.png"),
        ("b.v1", "b.v1.png", "b.v1x3.png"),
        ("b.v2", "b.v2.png", "b.v2x3.png"),
    ]


def test_unpaired_images_are_named(tmp_path):
    hr = write_images(tmp_path / "hr", {"a.png": picture(9, 9)})
    lr = write_images(tmp_path / "lr", {"ax2.png": picture(3, 3)})
    with pytest.raises(
        UserError,
        match=r"1 of 1 HR images have no LR image in .*; the first is 'a.png' \(looked",
    ):
        find_pairs(hr, lr, 3)
    write_images(hr, {"a.bmp": picture(9, 9)})
    with pytest.raises(UserError, match=r"contains both 'a.bmp' and 'a.png'"):
        find_pairs(hr, None, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no HR images"):
        find_pairs(tmp_path / "empty", None, 3)
    with pytest.raises(UserError, match=r"the folder of LR images .* does not exist"):
        find_pairs(lr, tmp_path / "nowhere", 3)


def test_sizes_must_agree_and_odd_ones_are_cropped(tmp_path):
    folder = write_images(tmp_path, {"a_HR.png": picture(13, 18), "a_LR.png": picture(6, 9)})
    hr, lr = find_pairs(folder, None, 2)[0].load(2)
    assert (tuple(hr.shape), tuple(lr.shape)) == ((1, 3, 12, 18), (1, 3, 6, 9))
    with pytest.raises(
        UserError,
        match=r"a_LR.png' is 9x6 .* 3 its HR image must be 27x18, but .*a_HR.png' is 18x12",
    ):
        find_pairs(folder, None, 3)[0].load(3)


def test_a_missing_lr_image_is_made_by_bicubic_downscaling(tmp_path):
    pixels = picture(25, 31)
    hr, lr = find_pairs(write_images(tmp_path, {"a.png": pixels}), None, 3)[0].load(3)
    cut = torch.from_numpy(pixels[:24, :30].copy()).permute(2, 0, 1)[None]
    assert torch.equal(hr, cut)
    assert torch.equal(lr, to_bytes(cubic_resize(cut / 255, (8, 10))))


def test_every_kind_of_image_becomes_8_bit_rgb(tmp_path):
    pixels = picture(12, 10)
    gray = pixels[..., 0]
    # 16-bit values that are just nearer to `gray` than to the next 8-bit level.
    gray16 = (gray.astype(int) * 257 + 128 * (gray < 255)).astype(np.uint16)
    expected_gray = np.repeat(gray[..., None], 3, axis=2)
    alpha = np.concatenate([pixels, np.full_like(pixels[..., :1], 7)], axis=2)
    palette = Image.fromarray(pixels).quantize(16)
    images = {
        "gray.png": (Image.fromarray(gray), expected_gray),
        "gray16.png": (Image.fromarray(gray16), expected_gray),
        "alpha.png": (
            Image.fromarray(alpha),
            np.rint((pixels * 7.0 + 255 * 248) / 255),
        ),  # over white, as in the tools
        "palette.png": (palette, np.asarray(palette.convert("RGB"))),
        "bits.png": (Image.fromarray(gray > 127), expected_gray // 128 * 255),
    }
    for name, (image, expected) in images.items():
        image.save(tmp_path / name)
        found = read_rgb(tmp_path / name)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected, err_msg=name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "alpha.png").read_bytes()[:200])
    with pytest.raises(UserError, match=r"cut.png' cannot be read"):
        read_rgb(tmp_path / "cut.png")


def scores_of(network, folder, scale=2, trunks=None):
    """Return a network's scores on a folder."""
    work = Work(
        [find_folder(folder, None, scale)],
        {"net": upscaler_of(network)},
        load_measures(METRICS.values(), trunks),
    )
    return measure_sets(work)[0]


def views_of(network, folder, scale=2):
    """Return every image of a folder as measured."""
    measures = load_measures(METRICS.values())
    return [
        measure_image({"net": upscaler_of(network)}, pair, scale, measures)
        for pair in find_pairs(folder, None, scale)
    ]


def test_pairs_of_16_bits_are_measured_in_16_bits(tmp_path):
    """The input differs from HR by less than 8 bits can tell."""
    near = ramp()
    near[20, 30] += 1
    for name, pixels in (("a_HR", ramp()), ("a_LR", near)):
        (tmp_path / f"{name}.png").write_bytes(imagecodecs.png_encode(pixels))
    found = find_folder(tmp_path, None, 1)
    assert "images of 16 bits: 1 of 1 (such as 'a_HR.png')" in found.note
    (pair,) = found.pairs
    views = measure_image(
        {"net": upscaler_of(identity_network())}, pair, 1, load_measures([METRICS["psnr_rgb"]])
    )
    expected = 10 * np.log10(65535**2 * 64 * 64)  # one step in each channel of one pixel
    for method in ("input", "net"):
        assert views.scores.methods[method]["psnr_rgb"] == pytest.approx(expected)
        assert views.pixels[method].dtype == torch.uint8  # for pictures


def test_16_bit_hr_is_reduced_in_16_bits(tmp_path):
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(ramp()))
    (pair,) = find_pairs(tmp_path, None, 2)
    hr, lr = pair.load(2)
    assert hr.dtype == lr.dtype == torch.uint16
    exact = cubic_resize(hr.double(), (32, 32)).clamp(0, 65535)
    assert (lr.double() - exact).abs().max() < 0.6


def test_the_network_and_bicubic_are_measured(tmp_path):
    folder = write_images(tmp_path, {"a.png": picture(40, 48, 1), "b.png": picture(50, 33, 2)})
    network = tiny_network(scale=2)
    result, views = scores_of(network, folder), views_of(network, folder)
    for pair, image, shown in zip(find_pairs(folder, None, 2), result.images, views, strict=True):
        hr, lr = pair.load(2)
        with torch.inference_mode():
            sr = to_bytes(network(lr))
        bicubic = to_bytes(cubic_resize(lr / 255, tuple(hr.shape[-2:])))
        assert image == shown.scores
        assert image.name == pair.name
        drift = (
            (bicubic[..., 2:-2, 2:-2].double() - hr[..., 2:-2, 2:-2]).mean(dim=(0, 2, 3)).tolist()
        )
        assert image.methods["bicubic"] == {
            **measure(bicubic, hr, 2),
            **dict(zip(DRIFTS, drift, strict=True)),
        }
        expected = measure(sr, hr, 2)
        # other memory layouts round differently
        assert {name: image.methods["net"][name] for name in expected} == pytest.approx(
            expected, abs=1e-3
        )
        assert torch.equal(shown.hr, hr)
        assert torch.equal(shown.pixels["bicubic"], bicubic)
        assert (shown.pixels["net"].int() - sr.int()).abs().max() <= 1
    for method in ("bicubic", "net"):
        for metric, mean in result.mean(method).items():
            assert mean == pytest.approx(
                np.mean([image.methods[method][metric] for image in result.images])
            )


def test_an_untrained_residual_network_gains_nothing(tmp_path):
    folder = write_images(tmp_path, {"a.png": picture(64, 64)})
    result = scores_of(VapSR(scale=2, num_blocks=1, global_residual="bicubic"), folder)
    # Their borders differ a little.
    assert abs(result.mean("net")["psnr_y"] - result.mean("bicubic")["psnr_y"]) < 0.02


def test_too_small_images_are_refused(tmp_path):
    folder = write_images(tmp_path, {"a.png": picture(12, 40)})
    with pytest.raises(
        UserError, match=r"a.png': an image of 12x40 .* than the 11x11 pixels that SSIM-Y needs"
    ):
        scores_of(tiny_network(), folder)


@pytest.mark.parametrize("residual", ["none", "bicubic"])
def test_tiles_give_the_same_as_the_whole_image(monkeypatch, residual):
    network = tiny_network(scale=2, global_residual=residual)
    lr = torch.from_numpy(picture(200, 231)).permute(2, 0, 1)[None]
    whole = upscale(upscaler_of(network), lr)
    monkeypatch.setattr(scoring, "WHOLE_IMAGE_PIXELS", 128 * 128)
    upscaler = upscaler_of(network)
    pieces = []
    monkeypatch.setattr(
        TorchBackend,
        "forward",
        lambda self, images, precision, call=TorchBackend.forward: (
            pieces.append(images.shape) or call(self, images, precision)
        ),
    )
    tiled = upscale(upscaler, lr)
    assert len(pieces) > 3
    assert max(count * height * width for count, height, width, _ in pieces) <= 128 * 128
    differences = (tiled.int() - whole.int()).abs()
    assert differences.max() <= 1  # sums in another order round differently
    assert (differences > 0).float().mean() < 1e-3


def image_scores(name, model, bicubic):
    names = [metric.name for metric, _, _ in load_measures(METRICS.values())]
    return ImageScores(
        name,
        {
            method: dict.fromkeys((*names, *DRIFTS), value)
            for method, value in (("nearest", 1.0), ("bicubic", bicubic), ("net", model))
        },
    )


def test_the_table_shows_the_scores():
    result = SetScores(None, [image_scores("a", 32.0, 30.0), image_scores("long_name", 33.0, 32.5)])
    lines = format_table(result, "net", 3).splitlines()
    assert lines[0].split() == [
        "image",
        "PSNR-Y",
        "bicubic",
        "PSNR-Y",
        "model",
        "gain",
        "SSIM-Y",
        "bicubic",
        "SSIM-Y",
        "model",
    ]
    assert lines[2].split() == ["a", "30.000", "32.000", "+2.000", "30.0000", "32.0000"]
    assert lines[5].split() == ["mean", "31.250", "32.500", "+1.250", "31.2500", "32.5000"]
    assert len({len(line) for line in lines[:6]}) == 1
    assert (
        "BT.601 luma rounded to uint8, as in the papers; 3 pixels are cropped from every border"
        in lines[7]
    )
    assert lines[9:] == [
        "  Y not rounded, as in BasicSR  bicubic 31.250 dB / 31.2500   model 32.500 dB / 32.5000",
        "  RGB                           bicubic 31.250 dB / 31.2500   model 32.500 dB / 32.5000",
        "  colour drift, levels R G B    bicubic +31.25 +31.25 +31.25   model +32.50 +32.50 +32.50",
        "  nearest, Y as in the papers   1.000 dB / 1.0000",
    ]


def test_a_network_that_restores_is_compared_with_its_input(tmp_path, capsys):
    sides = {f"{i}.png": picture(40 + i, 60, i) for i in range(2)}
    hr = write_images(tmp_path / "hr", sides)
    noise = np.random.default_rng(0).normal(0, 12, (60, 60, 3))
    lr = write_images(
        tmp_path / "lr",
        {
            name: np.clip(pixels + noise[: len(pixels)], 0, 255).astype(np.uint8)
            for name, pixels in sides.items()
        },
    )
    saved = tiny_saved(1, scale=1, global_residual="bicubic")
    write_network(tmp_path / "net.pth", saved)
    arguments = ("--model", tmp_path / "net.pth", "--hr", hr, "--out", tmp_path / "out")
    status, printed, _ = run_command(
        capsys, evaluate, *arguments, "--lr", lr, "--html", tmp_path / "html"
    )
    assert status == 0
    assert "PSNR-Y input" in printed
    assert "no border is cropped" in printed
    assert "hr: net over input" in printed
    text = (tmp_path / "html/index.html").read_text()
    assert "gain over the input, dB" in text
    assert "No border is cropped." in text
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert list(report["mean"]) == ["model", "input"]
    assert set(report["benchmarks"][0]["mean"]) == {"input", "net"}
    for place, name in enumerate(sides):
        pixels = [torch.from_numpy(read_rgb(side / name))[None] for side in (lr, hr)]
        before, after = (image.permute(0, 3, 1, 2) for image in pixels)
        expected = measure(before, after, 0)
        found = report["images"][place]["input"]
        assert {key: found[key] for key in expected} == expected
        difference = (before.double() - after.double()).mean(dim=(0, 2, 3))
        assert [found[key] for key in DRIFTS] == pytest.approx(difference.tolist())
    words = f"{printed} {text} {(tmp_path / 'out/evaluation.md').read_text()}"
    assert "bicubic" not in words
    assert "nearest" not in words

    status, _, error = run_command(capsys, evaluate, *arguments)
    assert status == 2
    assert "(x1), so its input cannot be made by downscaling; give degraded images" in error
    write_images(tmp_path / "small", {name: pixels[:39] for name, pixels in sides.items()})
    status, _, error = run_command(capsys, evaluate, *arguments, "--lr", tmp_path / "small")
    assert status == 2
    assert "at scale 1 its HR image must be 60x39" in error


def test_json_has_null_for_infinity(tmp_path):
    data = find_folder(write_images(tmp_path, {"a.png": picture(24, 24)}), None, 2)
    report = as_json(
        [SetScores(data, [image_scores("a", math.inf, 30.0)])],
        [{"title": "net", "file": "x"}],
        2,
        device="cpu",
        self_ensemble=False,
    )
    assert json.loads(json.dumps(report, allow_nan=False))["mean"]["model"]["psnr_y"] is None
    assert report["images"][0]["bicubic"]["psnr_y"] == 30.0
    assert report["model"] == {"file": "x"}


@pytest.mark.parametrize(("height", "width"), [(200, 300), (300, 20), (24, 24), (1000, 700)])
def test_pictures_of_any_shape(tmp_path, height, width):
    folder = write_images(
        tmp_path / "hr",
        {
            "a_very_long_name_that_does_not_fit_below_a_column_of_the_sheet.png": picture(
                height, width
            )
        },
    )
    network = VapSR(scale=2, num_features=4, num_attention_features=4, num_blocks=1)
    written = write_views(views_of(network, folder)[0], tmp_path / "out")
    with Image.open(written) as sheet:
        assert sheet.width == 3 * 448 + 4 * 16
        assert np.asarray(sheet).std() > 20


def test_the_magnified_square_is_where_bicubic_fails(tmp_path):
    pixels = np.full((256, 256, 3), 128, dtype=np.uint8)
    pixels[128:240, 112:224] = np.where(np.indices((112, 112)).sum(0) % 2, 255, 0)[..., None]
    write_images(tmp_path / "hr", {"a.png": pixels})
    sheet = np.asarray(
        Image.open(write_views(views_of(tiny_network(), tmp_path / "hr")[0], tmp_path / "out"))
    )
    # The lower panel of the HR column.
    magnified = sheet[16 + 448 + 16 :, 16 + 2 * 464 :][:448, :448]
    np.testing.assert_array_equal(magnified[::4, ::4], pixels[126:238, 112:224])


def test_the_command_on_the_newest_run(tmp_path):
    run = make_run(tmp_path / "runs", "demo", best=100)
    hr = write_images(tmp_path / "hr", {"a.png": picture(40, 48, 1), "b.png": picture(50, 33, 2)})
    done = evaluate_py("--hr", hr, "--scale", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # under two seconds: no progress bar
    file = run / "checkpoints" / "step-00000100" / "generator_ema.safetensors"
    report = json.loads((tmp_path / "results" / "demo" / "evaluation.json").read_text())
    assert report["model"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert report["model"]["metadata"] == {"recipe": "demo", "step": "100"}
    assert (report["scale"], report["data"]["lr_made_by"]) == (2, "bicubic")
    assert {path.name for path in (tmp_path / "results" / "demo").iterdir()} == {
        "a.png",
        "b.png",
        "evaluation.csv",
        "evaluation.json",
        "evaluation.md",
    }
    result = scores_of(read_network(file).build(), hr)
    assert report["mean"]["model"] == pytest.approx(result.mean("net"), abs=1e-3)
    assert report["mean"]["bicubic"] == pytest.approx(result.mean("bicubic"))
    assert re.search(
        rf"^mean +{result.mean('bicubic')['psnr_y']:.3f} ", done.stdout, flags=re.MULTILINE
    )


def test_the_command_reports_errors_in_one_line(tmp_path):
    hr = write_images(tmp_path / "hr", {"a.png": picture(40, 48)})
    write_network(tmp_path / "x3.pth", tiny_saved(scale=3))
    (tmp_path / "file").write_text("")
    cases = {
        "no run with a checkpoint in 'runs'; train one first": ("--hr", hr),
        "--scale 2 contradicts the model, which is x3": (
            "--hr",
            hr,
            "--model",
            "x3.pth",
            "--scale",
            2,
        ),
        "the folder of HR images 'nowhere' does not exist": (
            "--hr",
            "nowhere",
            "--model",
            "x3.pth",
        ),
        "no device 'abacus' here": ("--hr", hr, "--model", "x3.pth", "--device", "abacus"),
        "cannot create the folder 'file": ("--hr", hr, "--model", "x3.pth", "--out", "file/deeper"),
    }
    for message, arguments in cases.items():
        done = evaluate_py(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith("error: ")
        assert message in done.stderr


def test_lpips_and_colour_drift_are_measured(tmp_path):
    trunk = str(shared("weights/lpips_alex_trunk.pth"))
    hr = picture(64, 64)
    write_images(tmp_path / "hr", {"a.png": hr})
    trunks = {"lpips": Trunk("alex", trunk)}
    redder = ReddishTwin()
    result = scores_of(redder, tmp_path / "hr", trunks=trunks)
    lr = find_pairs(tmp_path / "hr", None, 2)[0].load(2)[1]
    sr, original = to_bytes(redder(lr)), torch.from_numpy(hr).permute(2, 0, 1)[None]
    model, bicubic = result.mean("net"), result.mean("bicubic")
    lpips = measure(sr, original, 2, load_measures([METRICS["lpips"]], trunks))["lpips"]
    assert model["lpips"] == pytest.approx(lpips, abs=1e-6)
    assert model["drift_red"] - bicubic["drift_red"] > 5
    assert abs(model["drift_blue"] - bicubic["drift_blue"]) < 1
    line = (
        f"  LPIPS, lower is better        bicubic {bicubic['lpips']:.4f}   model "
        f"{model['lpips']:.4f}\n"
    )
    assert line in format_table(result, "net", 2)
    write_network(tmp_path / "a.pth", tiny_saved(scale=2))
    done = evaluate_py(
        "--hr", tmp_path / "hr", "--model", "a.pth", "--lpips-weights", trunk, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "without --lpips; add --lpips alex, squeeze or vgg" in done.stderr


class ReddishTwin(torch.nn.Module):
    """Nearest upscaling with ten levels more red."""

    scale, receptive_radius = 2, 1

    def forward(self, lr):
        return lr.repeat_interleave(2, -1).repeat_interleave(2, -2) / 255 + torch.tensor(
            [10 / 255, 0, 0]
        ).view(3, 1, 1)


def test_set5_x4_gives_the_published_numbers():
    folder = shared("data/set5/x4")
    network = read_network(shared("weights/VapSR_X4.pth"), "params_ema").build()
    result = scores_of(network, folder, 4)
    assert len(result.images) == 5
    model, bicubic = result.mean("net"), result.mean("bicubic")
    assert bicubic["psnr_y"] == pytest.approx(28.4189, abs=0.005)
    assert bicubic["ssim_y"] == pytest.approx(0.81021, abs=0.0002)
    assert bicubic["psnr_y_float"] == pytest.approx(28.4318, abs=0.005)
    assert bicubic["ssim_y_float"] == pytest.approx(0.81126, abs=0.0002)
    assert model["psnr_y"] == pytest.approx(32.380, abs=0.005)
    assert model["psnr_y_float"] == pytest.approx(32.402, abs=0.005)
    assert model["ssim_y"] == pytest.approx(0.8963, abs=0.0002)
    assert model["ssim_y_float"] == pytest.approx(0.8974, abs=0.0002)
