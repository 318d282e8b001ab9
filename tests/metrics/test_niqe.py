"""NIQE against BasicSR's, its fit to photographs, and its file of parameters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.io import savemat
from scipy.stats import gennorm

import evaluate
from conftest import photograph
from fabricate import picture, tiny_saved, write_images
from pipeline.cli import UserError
from pipeline.evaluation.command import run_evaluation
from pipeline.images import cubic_resize
from pipeline.metrics import METRICS, Trunk, load_measures, measure
from pipeline.metrics.niqe import (
    NiqeMetric,
    _fitted,
    _halved,
    fit,
    niqe,
    read_parameters,
    sharp_features,
    write_parameters,
)
from pipeline.models.weights import write_network
from tools.fit_niqe import Options, main


def some_parameters() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    mean, factor = generator.uniform(0.1, 3, 36), generator.normal(size=(36, 36))
    return mean, factor @ factor.T / 36 + 0.1 * np.eye(36)


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]


@pytest.fixture
def file(tmp_path: Path) -> str:
    write_parameters(tmp_path / "niqe.npz", *some_parameters())
    return str(tmp_path / "niqe.npz")


@pytest.mark.parametrize(
    ("seed", "size", "border", "exact", "released"),
    [  # of BasicSR 1.4.2's calculate_niqe with these parameters, in float64 and as released
        (0, (300, 400), 0, 21.785836823622958, 21.786003480422846),
        (0, (300, 400), 4, 21.83867712730233, 21.838712728141008),
        (3, (200, 300), 0, 21.976739342416703, 21.97641207052375),
        (3, (200, 300), 4, 21.954160671815767, 21.954281773319803),
    ],
)
def test_it_is_basicsrs(
    file: str, seed: int, size: tuple[int, int], border: int, exact: float, released: float
) -> None:
    (one,) = load_measures([METRICS["niqe"]], {"niqe": Trunk("natural", file)})
    image = tensor(photograph(seed, *size))
    value = measure(image, torch.zeros_like(image), border, [one])["niqe"]
    assert value == pytest.approx(exact, abs=1e-9)
    assert value == pytest.approx(released, abs=1e-3)


def test_the_shape_of_a_distribution_is_found() -> None:
    generator = np.random.default_rng(0)
    for shape in (0.7, 1.0, 2.0, 4.0):
        sizes = np.abs(gennorm.rvs(shape, size=(4, 300, 300), random_state=generator))
        # The areas on the two sides are in the ratio of the scales.
        values = np.where(generator.random(sizes.shape) < 1 / 3, -1.5 * sizes, 3 * sizes)
        found, left, right = _fitted(values)
        assert found == pytest.approx([shape] * 4, rel=0.03)
        assert left == pytest.approx([1.5] * 4, rel=0.05)
        assert right == pytest.approx([3.0] * 4, rel=0.05)


def test_the_half_size_is_matlabs() -> None:
    plane = photograph(0, 96, 192)[..., 1].astype(np.float64)
    expected = cubic_resize(torch.from_numpy(plane)[None, None], (48, 96))[0, 0].numpy()
    # At the edges torch renormalizes the kernel, where MATLAB mirrors the image.
    assert _halved(plane)[3:-3, 3:-3] == pytest.approx(expected[3:-3, 3:-3], abs=1e-3)
    assert _halved(np.full((96, 96), 7.0)) == pytest.approx(np.full((48, 48), 7.0))


def test_blocks_of_one_colour_do_not_count(file: str) -> None:
    mean, covariance = read_parameters(file)
    plane = photograph(0, 192, 288)[..., 1].astype(np.float64)
    bordered = np.hstack([plane, np.tile(plane[:, -1:], 4), np.full((192, 200), 90.0)])
    bordered[:, 288:] = 90.0
    assert math.isfinite(niqe(bordered, mean, covariance))
    assert niqe(np.full((300, 300), 90.0), mean, covariance) == math.inf
    assert METRICS["niqe"].limited(math.inf) == 100


def test_fewer_pixels_than_it_needs_are_refused(file: str) -> None:
    (one,) = load_measures([METRICS["niqe"]], {"niqe": Trunk("natural", file)})
    image = tensor(picture(195, 300))
    with pytest.raises(ValueError, match="smaller than the 192x192 pixels that NIQE needs"):
        measure(image, image, 2, [one])


def natural(seed: int, height: int = 400, width: int = 500) -> np.ndarray:
    """Blurred noise of many sizes: like photographs, it has most of its power in coarse detail."""
    generator = np.random.default_rng(seed)
    plane = np.zeros((height, width))
    for octave in range(7):
        coarse = generator.standard_t(4, (height >> octave, width >> octave))
        plane += 2.0**octave * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    plane = 128 + 40 * (plane - plane.mean()) / plane.std()
    return np.repeat(np.clip(plane, 0, 255).round().astype(np.uint8)[..., None], 3, axis=-1)


def test_fitted_to_a_folder_it_prefers_what_is_like_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_images(tmp_path / "photos", {f"{i}.png": natural(i) for i in range(8)})
    options = Options(photos, tmp_path / "niqe.npz")
    assert main(options) == 0
    assert "sharp blocks of 8 images" in capsys.readouterr().out
    metric = NiqeMetric(weights=str(tmp_path / "niqe.npz"))
    sharp = natural(99)
    scores = [
        metric(tensor(pixels))
        for pixels in (
            sharp,
            cv2.GaussianBlur(sharp, (0, 0), 0.7),
            cv2.GaussianBlur(sharp, (0, 0), 1.5),
        )
    ]
    assert scores == sorted(scores)
    noise = np.random.default_rng(0).normal(0, 25, sharp.shape)
    noisy = np.clip(sharp + noise, 0, 255).astype(np.uint8)
    assert metric(tensor(noisy)) > scores[0]
    assert metric(tensor(sharp.astype(np.uint16) * 257)) == scores[0]
    with pytest.raises(UserError, match="--force"):
        main(options)
    (photos / "bad.png").write_bytes(b"no image")
    assert main(Options(photos, tmp_path / "again.npz")) == 1
    assert "could not be read: bad.png" in capsys.readouterr().out
    assert NiqeMetric(weights=str(tmp_path / "again.npz"))(tensor(sharp)) == scores[0]


def test_evaluate_measures_it_beside_the_others(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hr = write_images(tmp_path / "hr", {"0.png": photograph(0, 200, 200)})
    write_network(tmp_path / "net.pth", tiny_saved(scale=2))
    options = evaluate.Options(
        hr=hr,
        model=(tmp_path / "net.pth",),
        out=tmp_path / "out",
        html=tmp_path / "page",
        niqe=Path(file),
    )
    assert run_evaluation(options) == 0
    mean = json.loads((tmp_path / "out" / "evaluation.json").read_text())["mean"]
    bicubic, model = (f"{mean[method]['niqe']:.3f}" for method in ("bicubic", "model"))
    assert f"NIQE, lower is better         bicubic {bicubic}   model {model}\n" in (
        capsys.readouterr().out
    )
    assert "| PSNR-Y / SSIM-Y / NIQE" in (tmp_path / "out" / "evaluation.md").read_text()
    assert model in (tmp_path / "page" / "index.html").read_text()
    with pytest.raises(UserError, match=r"--dists-weights x\.pth without --dists; add --dists vgg"):
        run_evaluation(evaluate.Options(hr=hr, model=options.model, dists_weights=Path("x.pth")))


def test_the_fit_takes_sharp_blocks_only() -> None:
    plane = natural(0, 384, 480)[..., 0].astype(np.float64)
    blurred = plane.copy()
    blurred[:, 240:] = cv2.GaussianBlur(plane, (0, 0), 6)[:, 240:]
    whole, half = ([tuple(row) for row in sharp_features(one)] for one in (plane, blurred))
    assert 10 < len(whole) <= 20
    assert 4 <= len(half) <= 12  # four rows of the two and a half sharp columns
    assert len(set(whole) & set(half)) >= 4  # and those far from the blur are the same
    mean, covariance = fit([sharp_features(natural(i)[..., 0].astype(float)) for i in range(8)])
    assert (mean.shape, covariance.shape) == ((36,), (36, 36))
    with pytest.raises(UserError, match=r"at least 72 sharp blocks .* but the images have 1\d"):
        fit([sharp_features(plane)])


def test_files_of_parameters(tmp_path: Path, file: str) -> None:
    mean, covariance = some_parameters()
    found = read_parameters(file)
    assert np.array_equal(found[0], mean)
    assert np.array_equal(found[1], covariance)
    savemat(tmp_path / "m.mat", {"mu_prisparam": mean[None], "cov_prisparam": covariance})
    assert np.array_equal(read_parameters(str(tmp_path / "m.mat"))[1], covariance)
    with pytest.raises(UserError, match=r"NIQE needs a file of parameters: .*tools/fit_niqe.py"):
        NiqeMetric()
    with pytest.raises(UserError, match=r"cannot read .*none.npz \(No such file"):
        NiqeMetric(weights=str(tmp_path / "none.npz"))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    (tmp_path / "text.npz").write_text("text")
    for name in ("other.npz", "text.npz"):
        with pytest.raises(UserError, match=f"{name} does not hold NIQE's parameters"):
            NiqeMetric(weights=str(tmp_path / name))
    write_parameters(tmp_path / "nan.npz", mean * np.nan, covariance)
    with pytest.raises(UserError, match=r"nan.npz: mean or covariance is not finite"):
        NiqeMetric(weights=str(tmp_path / "nan.npz"))
