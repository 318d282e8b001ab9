"""Degradations against reference code, by the distribution of their parameters, and for purity."""

from __future__ import annotations

import json
import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from scipy import stats

from conftest import SMALL, photograph, run_python
from pipeline.data.dataset import Dataset, Folder
from pipeline.data.degradations import build_degradation, kernels
from pipeline.data.degradations.base import KEYS, WORDS, LrNoise, NoiseSpec, Parameters
from pipeline.data.degradations.realesrgan import RealEsrgan, RealEsrganSpec
from pipeline.data.reader import low_resolution, training_pipeline
from pipeline.data.source import CropSource, Position, Sample
from pipeline.data.spec import DataSpec

CROP = 48
NUMBERS = 2 * (WORDS - KEYS)  # uniform numbers per sample
ROUNDS = ("first", "second")


def photographs(root: Path, *sizes: tuple[int, int], suffix: str = ".npy") -> list[str]:
    """Write files of low contrast, 40..215, in `sizes` (height, width); return their names."""
    names = []
    for i, size in enumerate(sizes):
        pixels = (40 + photograph(i, *size) * (175 / 255)).astype(np.uint8)
        names.append(f"{i}{suffix}")
        if suffix == ".npy":
            np.save(root / names[-1], pixels)
        else:
            assert cv2.imwrite(str(root / names[-1]), pixels[..., ::-1])
    return names


def source(
    root: Path,
    names: list[str],
    *,
    scale: int,
    micro_batch: int,
    seed: int = 0,
    crop: int = CROP,
    lr_paths: dict[str, str] | None = None,
    degrades_on_host: bool = False,
    **data: Any,
) -> CropSource:
    return CropSource.of_dataset(
        Dataset((Folder(root, names, [], lr_paths),)),
        DataSpec(crop=crop, **data),
        scale=scale,
        seed=seed,
        position=Position(0, 1, micro_batch),
        degrades_on_host=degrades_on_host,
    )


def made(
    crops: CropSource, count: int = 1, threads: int = 1
) -> tuple[list[Sample], np.ndarray, np.ndarray]:
    """Return samples of the first `count` micro-batches, HR and LR (n, 3, height, width)."""
    pipeline = training_pipeline(crops, 0, device_id=None, threads=threads, prefetch=1)
    hr, lr = zip(
        *([np.array(side.as_array()) for side in pipeline.run()] for _ in range(count)), strict=True
    )
    return (
        crops.samples(0, count * crops.position.micro_batch),
        np.concatenate(hr),
        np.concatenate(lr),
    )


def undone(pixels: np.ndarray, sample: Sample) -> np.ndarray:
    """Undo the symmetry: CHW from the graph to HWC as in the file."""
    image = pixels.transpose(2, 1, 0) if sample.transpose else pixels.transpose(1, 2, 0)
    image = image[:, ::-1] if sample.flip_horizontal else image
    return image[::-1] if sample.flip_vertical else image


def whole(sample: Sample, scale: int) -> np.ndarray:
    """Return the sample's photograph, cropped to a multiple of the scale."""
    pixels = np.load(sample.path)
    return np.ascontiguousarray(
        pixels[: pixels.shape[0] // scale * scale, : pixels.shape[1] // scale * scale]
    )


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((np.asarray(one, np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


# The LR of a crop must be that part of the whole photograph's LR, with HR's symmetry.


def nine_places_and_inside(root: Path, scale: int) -> list[str]:
    """Return one photograph with 3 x 3 crop positions, all at its edges, and one with many."""
    side = CROP + 2 * scale
    return photographs(root, (side + 1, side + scale - 1), (2 * CROP + 40, 2 * CROP + 31))


def of_the_whole(crops: CropSource) -> tuple[list[Sample], list[np.ndarray], list[np.ndarray]]:
    """Return samples, their LR as in the file, and that part of the whole photograph's LR."""
    scale, degradation = crops.scale, crops.spec.degradation
    samples, hr, lr = made(crops)
    wholes = {
        sample.path: low_resolution(whole(sample, scale), degradation, scale, seed=0, number=0)
        for sample in {sample.path: sample for sample in samples}.values()
    }
    parts = []
    for sample, pixels in zip(samples, hr, strict=True):
        at = (slice(sample.top, sample.top + CROP), slice(sample.left, sample.left + CROP))
        np.testing.assert_array_equal(undone(pixels, sample), whole(sample, scale)[at])
        parts.append(
            wholes[sample.path][tuple(slice(s.start // scale, s.stop // scale) for s in at)]
        )
    return (
        samples,
        [undone(pixels, sample) for pixels, sample in zip(lr, samples, strict=True)],
        parts,
    )


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("augment", [False, True])
def test_bicubic_lr_of_a_crop_is_the_crop_of_the_lr_of_the_whole(
    tmp_path: Path, scale: int, augment: bool
) -> None:
    names = nine_places_and_inside(tmp_path, scale)
    samples, lr, parts = of_the_whole(
        source(tmp_path, names, scale=scale, micro_batch=120, augment=augment)
    )
    for got, expected in zip(lr, parts, strict=True):
        np.testing.assert_array_equal(got, expected)
    places = {
        (sample.top // scale, sample.left // scale)
        for sample in samples
        if sample.path.endswith("0.npy")
    }
    assert places == set(product(range(3), repeat=2))
    margin = 2 * scale
    insides = [
        sample
        for sample in samples
        if sample.region[2:] == (CROP + 2 * margin, CROP + 2 * margin)
        and sample.region[:2] == (sample.top - margin, sample.left - margin)
    ]
    assert len(insides) > 20
    assert len(
        {(sample.flip_vertical, sample.flip_horizontal, sample.transpose) for sample in samples}
    ) == (8 if augment else 1)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("sigma", [0.8, 1.6, 3.0])
def test_gaussian_lr_of_a_crop_is_the_crop_of_the_lr_of_the_whole(
    tmp_path: Path, scale: int, sigma: float
) -> None:
    names = nine_places_and_inside(tmp_path, scale)
    degradation = {"name": "gaussian", "sigma": sigma}
    for augment in (False, True):
        crops = source(
            tmp_path, names, scale=scale, micro_batch=120, augment=augment, degradation=degradation
        )
        _, lr, parts = of_the_whole(crops)
        difference = np.abs(np.array(lr, int) - np.array(parts))
        # The products are summed in another order: about one sum in 10,000 is close enough to a
        # half to round differently.
        assert difference.max() <= 1
        assert difference.mean() < 2e-4


@pytest.mark.parametrize("degradation", ["bicubic", "gaussian"])
def test_without_its_surroundings_lr_of_a_crop_is_another(
    tmp_path: Path, degradation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops = source(
        tmp_path,
        nine_places_and_inside(tmp_path, 4),
        scale=4,
        micro_batch=40,
        degradation=degradation,
    )
    monkeypatch.setattr(type(crops.degradation), "surroundings", property(lambda _: 0))
    samples, lr, parts = of_the_whole(crops)
    length = CROP // 4
    inner = (slice(3, length - 3), slice(3, length - 3))
    differences = [
        np.abs(got.astype(int) - expected) for got, expected in zip(lr, parts, strict=True)
    ]
    for sample, difference in zip(samples, differences, strict=True):
        assert sample.region[2:] == (CROP, CROP)
        assert difference[inner].max() <= 1
        assert difference.max() >= 1  # at its border
    assert max(difference.max() for difference in differences) > 5


def gaussian_weights(length: int, scale: int, sigma: float) -> np.ndarray:
    """Return (length / scale, length) weights of every pixel, with border reflections added."""
    around = length - 1
    places = np.pad(np.arange(length), around, mode="reflect")
    centres = scale * np.arange(length // scale) + (scale - 1) / 2
    gaussian = np.exp(
        -((np.arange(-around, length + around) - centres[:, None]) ** 2) / (2 * sigma**2)
    )
    return gaussian / gaussian.sum(1, keepdims=True) @ (places[:, None] == np.arange(length))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_gaussian_weighs_around_the_centre_of_each_lr_pixel(tmp_path: Path, scale: int) -> None:
    names = nine_places_and_inside(tmp_path, scale)
    crops = source(
        tmp_path,
        names,
        scale=scale,
        micro_batch=40,
        degradation={"name": "gaussian", "sigma": (0.4, 3)},
    )
    samples, _, lr = made(crops)
    for sample, pixels in zip(samples, lr, strict=True):
        image = whole(sample, scale).astype(np.float64)
        down, right = (
            gaussian_weights(length, scale, sample.degradation["sigma"])
            for length in image.shape[:2]
        )
        rows, columns = (
            slice(at // scale, (at + CROP) // scale) for at in (sample.top, sample.left)
        )
        expected = np.einsum("iy,jx,yxc->ijc", down[rows], right[columns], image, optimize=True)
        # rounded; the kernel ends at 4 sigma
        assert np.abs(undone(pixels, sample) - expected).max() < 0.52
    sigmas = [sample.degradation["sigma"] for sample in crops.samples(0, 2000)]
    assert stats.kstest(sigmas, "uniform", (0.4, 2.6)).pvalue > 1e-3


@pytest.mark.parametrize("on_host", [False, True])
def test_realesrgan_lr_is_turned_with_hr(tmp_path: Path, on_host: bool) -> None:
    names = photographs(tmp_path, (128, 120), (150, 140))
    degradation = {"name": "realesrgan", "surroundings": 48}
    turned, plain = (
        source(
            tmp_path,
            names,
            scale=2,
            micro_batch=40,
            augment=augment,
            degradation=degradation,
            degrades_on_host=on_host,
        )
        for augment in (True, False)
    )
    samples, _, lr = made(turned)
    others, _, lr_plain = made(plain)
    for sample, other, got, expected in zip(samples, others, lr, lr_plain, strict=True):
        assert sample.degradation == other.degradation
        got, expected = undone(got, sample), expected.transpose(1, 2, 0)
        np.testing.assert_array_equal(got, expected)


# Random parameters of Real-ESRGAN, against the published options
# (options/train_realesrnet_x4plus.yml).

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "first": {
        "blur": 1.0,
        "sigma": (0.2, 3),
        "resize": (0.2, 0.7, 0.1),
        "factor": (0.15, 1.5),
        "noise": (1, 30),
        "poisson": (0.05, 3),
    },
    "second": {
        "blur": 0.8,
        "sigma": (0.2, 1.5),
        "resize": (0.3, 0.4, 0.3),
        "factor": (0.3, 1.2),
        "noise": (1, 25),
        "poisson": (0.05, 2.5),
    },
}
SHAPES = {
    "iso": 0.45,
    "aniso": 0.25,
    "generalized_iso": 0.12,
    "generalized_aniso": 0.03,
    "plateau_iso": 0.12,
    "plateau_aniso": 0.03,
}
SIZES = dict.fromkeys(range(7, 22, 2), 1.0)
MODES = dict.fromkeys(("area", "linear", "cubic"), 1.0)
COUNT = 20_000
REGION = 400


def assert_shares(values: Iterable[Any], shares: Mapping[Any, float]) -> None:
    """Chi-square test at 1 in 1,000; values without a share must not occur."""
    counted = Counter(values)
    assert set(counted) <= {name for name, share in shares.items() if share}
    total, count = sum(shares.values()), sum(counted.values())
    expected = [count * share / total for share in shares.values() if share]
    observed = [counted[name] for name, share in shares.items() if share]
    assert len(expected) == 1 or stats.chisquare(observed, expected).pvalue > 1e-3


def assert_even(values: Sequence[float], low: float, high: float) -> None:
    """Kolmogorov-Smirnov test of uniformity at 1 in 1,000."""
    assert len(values) > 200
    assert low <= min(values)
    assert max(values) <= high
    assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3


def share(probability: float) -> dict[bool, float]:
    return {True: probability, False: 1 - probability}


@pytest.fixture(scope="module")
def drawn() -> list[Parameters]:
    degradation = RealEsrgan(RealEsrganSpec(), 4)
    numbers = np.random.default_rng(8).random((COUNT, NUMBERS)).tolist()
    return [degradation.draw(iter(row), REGION, REGION) for row in numbers]


@pytest.mark.parametrize("part", ROUNDS)
def test_realesrgan_draws_the_published_blurs(drawn: list[Parameters], part: str) -> None:
    published = PUBLISHED[part]
    blurs = [parameters[part]["blur"] for parameters in drawn]
    assert_shares((blur["shape"] != "none" for blur in blurs), share(published["blur"]))
    blurs = [blur for blur in blurs if blur["shape"] != "none"]
    assert_shares((blur["shape"] == "sinc" for blur in blurs), share(0.1))
    assert_shares((blur["shape"] for blur in blurs if blur["shape"] != "sinc"), SHAPES)
    assert_shares((blur["size"] for blur in blurs if blur["shape"] == "sinc"), SIZES)
    assert_shares((blur["size"] for blur in blurs if blur["shape"] != "sinc"), SIZES)
    for is_small, low in ((True, math.pi / 3), (False, math.pi / 5)):
        assert_even(
            [
                blur["cutoff"]
                for blur in blurs
                if blur["shape"] == "sinc" and (blur["size"] < 13) == is_small
            ],
            low,
            math.pi,
        )
    isotropic = [
        blur for blur in blurs if blur["shape"] in ("iso", "generalized_iso", "plateau_iso")
    ]
    anisotropic = [
        blur for blur in blurs if blur["shape"] in ("aniso", "generalized_aniso", "plateau_aniso")
    ]
    assert all(blur["sigma"][0] == blur["sigma"][1] and "theta" not in blur for blur in isotropic)
    assert_even([blur["sigma"][0] for blur in isotropic], *published["sigma"])
    for axis in (0, 1):
        assert_even([blur["sigma"][axis] for blur in anisotropic], *published["sigma"])
    sigmas = np.array([blur["sigma"] for blur in anisotropic]).T
    assert abs(np.corrcoef(sigmas)[0, 1]) < 4 / len(anisotropic) ** 0.5
    assert_even([blur["theta"] for blur in anisotropic], -math.pi, math.pi)


@pytest.mark.parametrize("part", ROUNDS)
def test_realesrgan_draws_the_published_exponents(drawn: list[Parameters], part: str) -> None:
    blurs = [parameters[part]["blur"] for parameters in drawn]
    generalized, plateau = (
        [blur["beta"] for blur in blurs if blur["shape"].startswith(kind)]
        for kind in ("generalized", "plateau")
    )
    assert_shares((beta < 1 for beta in generalized), share(0.5))
    assert_even([beta for beta in generalized if beta < 1], 0.5, 1)
    assert_even([beta for beta in generalized if beta >= 1], 1, 4)
    assert_shares((beta == 1 for beta in plateau), share(0.5))
    assert_even([beta for beta in plateau if beta != 1], 1, 2)
    assert all(
        "beta" not in blur for blur in blurs if blur["shape"] in ("iso", "aniso", "sinc", "none")
    )


@pytest.mark.parametrize("part", ROUNDS)
def test_realesrgan_draws_the_published_sizes(drawn: list[Parameters], part: str) -> None:
    published, rounds = PUBLISHED[part], [parameters[part] for parameters in drawn]
    assert_shares(
        (one["resize"] for one in rounds),
        dict(zip(("up", "down", "keep"), published["resize"], strict=True)),
    )
    low, high = published["factor"]
    assert_even([one["factor"] for one in rounds if one["resize"] == "up"], 1, high)
    assert_even([one["factor"] for one in rounds if one["resize"] == "down"], low, 1)
    assert {one["factor"] for one in rounds if one["resize"] == "keep"} == {1.0}
    assert_shares((one["mode"] for one in rounds), MODES)
    full = REGION if part == "first" else REGION // 4
    before = (
        [REGION] * COUNT
        if part == "first"
        else [parameters["first"]["size"][0] for parameters in drawn]
    )
    for one, length in zip(rounds, before, strict=True):
        assert one["size"] == [int(full * one["factor"])] * 2
        assert one["ratio"] == length / one["size"][0]


@pytest.mark.parametrize("part", ROUNDS)
def test_realesrgan_draws_the_published_noise_and_jpeg(drawn: list[Parameters], part: str) -> None:
    published, rounds = PUBLISHED[part], [parameters[part] for parameters in drawn]
    assert_shares((one["noise"] for one in rounds), {"gaussian": 0.5, "poisson": 0.5})
    assert_even([one["level"] for one in rounds if one["noise"] == "gaussian"], *published["noise"])
    assert_even(
        [one["level"] for one in rounds if one["noise"] == "poisson"], *published["poisson"]
    )
    assert_shares((one["gray"] for one in rounds), share(0.4))
    # Uniform over 30..95 and rounded: the two ends get half the share.
    assert_shares(
        (one["jpeg"] for one in rounds), {30: 0.5, **dict.fromkeys(range(31, 95), 1.0), 95: 0.5}
    )


def test_realesrgan_draws_the_published_end(drawn: list[Parameters]) -> None:
    finals = [parameters["final"] for parameters in drawn]
    assert_shares((final["mode"] for final in finals), MODES)
    assert_shares((final["sinc_first"] for final in finals), share(0.5))
    assert_shares(("sinc" in final for final in finals), share(0.8))
    sincs = [final["sinc"] for final in finals if "sinc" in final]
    assert_shares((size for size, _ in sincs), SIZES)
    for is_small in (True, False):
        assert_even(
            [cutoff for size, cutoff in sincs if (size < 13) == is_small], math.pi / 3, math.pi
        )


def test_realesrgan_draws_every_parameter_for_itself(drawn: list[Parameters]) -> None:
    """No two parameters, of the same or of different rounds, use the same random number."""

    def fraction(value: float, bounds: tuple[float, float]) -> float:
        return (value - bounds[0]) / (bounds[1] - bounds[0])

    def numbers(part: str, one: Parameters) -> dict[str, float]:
        published, blur = PUBLISHED[part], one["blur"]
        low, high = {
            "up": (1, published["factor"][1]),
            "down": (published["factor"][0], 1),
            "keep": (0, 2),
        }[one["resize"]]
        return {
            "is blurred": blur["shape"] != "none",
            "is sinc": blur["shape"] == "sinc",
            "shape": [*SHAPES, "sinc", "none"].index(blur["shape"])
            if blur["shape"] in SHAPES
            else 1.0,
            "kernel size": blur.get("size", 14),
            "sigma": fraction(blur.get("sigma", [1])[0], published["sigma"]),
            "theta": blur.get("theta", 0),
            "direction": ("up", "keep", "down").index(one["resize"]),
            "factor": fraction(one["factor"], (low, high)),
            "mode": list(MODES).index(one["mode"]),
            "noise": one["noise"] == "poisson",
            "gray": one["gray"],
            "jpeg": one["jpeg"],
            "level": fraction(
                one["level"], published["noise" if one["noise"] == "gaussian" else "poisson"]
            ),
        }

    rows = []
    for parameters in drawn:
        row = {
            f"{part} {name}": value
            for part in ROUNDS
            for name, value in numbers(part, parameters[part]).items()
        }
        final = parameters["final"]
        row |= {
            "last mode": list(MODES).index(final["mode"]),
            "sinc first": final["sinc_first"],
            "last sinc": "sinc" in final,
            "last size": final.get("sinc", (14, 2.0))[0],
            "last cutoff": final.get("sinc", (14, 2.1))[1],
        }
        rows.append(row)
    names = [name for name in rows[0] if name != "first is blurred"]  # all of them are
    values = np.array([[row[name] for name in names] for row in rows], np.float64).T
    correlations = np.corrcoef(values)
    related = {
        frozenset(f"{part} {name}" for name in pair)
        for part in ROUNDS
        for pair in (
            ("is blurred", "is sinc"),
            ("is sinc", "shape"),
            ("is sinc", "sigma"),
            ("is blurred", "sigma"),
            ("is blurred", "shape"),
            ("shape", "sigma"),
            ("is blurred", "kernel size"),
            ("shape", "theta"),
        )
    }
    for i, one in enumerate(names):
        for j, other in enumerate(names[:i]):
            if frozenset((one, other)) not in related:
                assert abs(correlations[i, j]) < 4.5 / COUNT**0.5, (one, other)


def test_each_sample_uses_as_many_numbers_as_any_other() -> None:
    """Changing a share in a recipe must not change any other random choice of a sample."""
    random = np.random.default_rng(1)
    left = set()
    for other in (
        RealEsrganSpec(),
        RealEsrganSpec(final_sinc_prob=0, first={"sinc_prob": 1}, second={"blur_prob": 0}),
    ):
        degradation, noise = RealEsrgan(other, 4), LrNoise(NoiseSpec(probability=0.5))
        for row in random.random((300, NUMBERS)).tolist():
            randoms = iter(row)
            degradation.place(randoms)
            json.dumps(degradation.draw(randoms, 400, 400))
            noise.draw(randoms)
            left.add(len(list(randoms)))
    assert len(left) == 1


def test_the_crop_lies_anywhere_in_its_surroundings() -> None:
    for scale in (2, 3, 4):
        degradation = RealEsrgan(RealEsrganSpec(), scale)
        places = [
            degradation.place(iter(row))
            for row in np.random.default_rng(2).random((5000, 2)).tolist()
        ]
        for axis in (0, 1):
            assert_shares(
                (place[axis] for place in places), dict.fromkeys(range(0, 145, scale), 1.0)
            )


# Pixels of Real-ESRGAN, against a chain of NumPy, torch and OpenCV.


def kernel_of(blur: Parameters) -> np.ndarray:
    shape = blur["shape"]
    if shape == "none":
        return np.ones((1, 1))
    if shape == "sinc":
        return kernels.sinc_kernel(blur["size"], blur["cutoff"])
    numbers = blur["size"], *blur["sigma"], blur.get("theta", 0.0)
    if shape in ("iso", "aniso"):
        return kernels.gaussian_kernel(*numbers)
    make = kernels.generalized_kernel if shape.startswith("generalized") else kernels.plateau_kernel
    return make(*numbers, blur["beta"])


def blurred(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    radius = len(kernel) // 2
    padded = np.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="reflect").transpose(
        2, 0, 1
    )[:, None]
    weights = torch.from_numpy(np.asarray(kernel, np.float64))[None, None]
    return (
        torch.nn.functional.conv2d(torch.from_numpy(padded), weights)[:, 0].permute(1, 2, 0).numpy()
    )


def cubic(length: int, size: int) -> np.ndarray:
    """Return (size, length) weights of Keys' cubic, a = -0.5, not antialiased, borders repeated."""
    centres = (np.arange(size) + 0.5) * length / size - 0.5
    weights = np.zeros((size, length))
    for tap in range(-1, 3):
        places = np.floor(centres) + tap
        d = np.abs(centres - places)
        values = np.where(d < 1, 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * (d**3 - 5 * d**2 + 8 * d - 4))
        np.add.at(weights, (np.arange(size), places.clip(0, length - 1).astype(int)), values)
    return weights


def area(length: int, size: int) -> np.ndarray:
    """Return (size, length): each pixel's share of the area that an output pixel covers."""
    ends, first = np.arange(size + 1) * length / size, np.arange(length)
    return (
        (np.minimum(ends[1:, None], first + 1) - np.maximum(ends[:-1, None], first)).clip(0, 1)
        * size
        / length
    )


def resized(image: np.ndarray, size: Sequence[int], mode: str) -> np.ndarray:
    if mode == "linear":
        planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))[None])
        return (
            torch.nn.functional.interpolate(planes, tuple(size), mode="bilinear")[0]
            .permute(1, 2, 0)
            .numpy()
        )
    weights = area if mode == "area" else cubic
    return np.einsum(
        "iy,jx,yxc->ijc",
        weights(image.shape[0], size[0]),
        weights(image.shape[1], size[1]),
        image,
        optimize=True,
    )


def rounded(image: np.ndarray) -> np.ndarray:
    return np.rint(image).clip(0, 255).astype(np.uint8)


def through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    bgr = np.ascontiguousarray(rounded(image)[..., ::-1])
    encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float64)


def reference(pixels: np.ndarray, drawn: Parameters, scale: int) -> np.ndarray:
    """The published chain without noise, with this project's cubic and area averaging."""
    image, final, quality = pixels.astype(np.float64), drawn["final"], drawn["second"]["jpeg"]
    for part in ROUNDS:
        one = drawn[part]
        image = resized(blurred(image, kernel_of(one["blur"])), one["size"], one["mode"])
        image = through_jpeg(image, one["jpeg"]) if part == "first" else image
    kernel = kernels.sinc_kernel(*final["sinc"]) if "sinc" in final else np.ones((1, 1))
    low = pixels.shape[0] // scale, pixels.shape[1] // scale
    if final["sinc_first"]:
        return rounded(through_jpeg(blurred(resized(image, low, final["mode"]), kernel), quality))
    return rounded(blurred(resized(through_jpeg(image, quality), low, final["mode"]), kernel))


STILL = {"noise_range": 0, "gaussian_noise_prob": 1}


def with_references(crops: CropSource, areas: int, most: int) -> Iterator[tuple[Sample, float]]:
    """Return samples with `areas` area resizings, at most `most`, and their PSNR in dB."""
    samples, _, lr = made(crops)
    chosen = [
        i for i, sample in enumerate(samples) if modes_of(sample.degradation).count("area") == areas
    ][:most]
    assert len(chosen) == most
    for i in chosen:
        sample = samples[i]
        top, left, height, width = sample.region
        expected = reference(
            np.load(sample.path)[top : top + height, left : left + width],
            sample.degradation,
            crops.scale,
        )
        at = tuple(
            slice(start // crops.scale, (start + crops.crop) // crops.scale)
            for start in (sample.top - top, sample.left - left)
        )
        yield sample, psnr(lr[i].transpose(1, 2, 0), expected[at])


def modes_of(drawn: Parameters) -> list[str]:
    return [drawn[part]["mode"] for part in ("first", "second", "final")]


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_realesrgan_is_the_published_chain(tmp_path: Path, scale: int, on_host: bool) -> None:
    degradation = {"name": "realesrgan", "first": STILL, "second": STILL, "surroundings": 60}
    crops = source(
        tmp_path,
        photographs(tmp_path, (144, 120), (100, 150)),
        scale=scale,
        micro_batch=40,
        crop=72,
        augment=False,
        degradation=degradation,
        degrades_on_host=on_host,
    )
    found = list(with_references(crops, 0, 8))
    assert {sample.degradation["final"]["sinc_first"] for sample, _ in found} == {True, False}
    # Most bytes are equal; a sum that rounds differently can change a JPEG coefficient.
    assert min(value for _, value in found) > (36 if on_host else 40)
    assert np.median([value for _, value in found]) > (50 if on_host else 55)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_realesrgan_averages_areas(tmp_path: Path, scale: int, on_host: bool) -> None:
    best = STILL | {"jpeg_range": 100}  # so that JPEG coefficients do not change
    crops = source(
        tmp_path,
        photographs(tmp_path, (132, 144), (120, 160)),
        scale=scale,
        micro_batch=24,
        crop=72,
        augment=False,
        degrades_on_host=on_host,
        degradation={"name": "realesrgan", "first": best, "second": best, "surroundings": 60},
    )
    averaged = enlarged = 0
    for sample, value in with_references(crops, 1, 7):
        drawn = sample.degradation
        ratios = (
            drawn["first"]["ratio"],
            drawn["second"]["ratio"],
            drawn["second"]["size"][0] / (sample.region[2] // scale),
        )
        ratio = ratios[modes_of(drawn).index("area")]
        averaged, enlarged = averaged + (ratio > 1), enlarged + (ratio < 1)
        # enlarging is linear, whereas area resizing would repeat pixels
        assert value > (45 if ratio >= 1 else 38)
    assert averaged > 1
    assert enlarged > 0


LUMA = np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("part", ROUNDS)
@pytest.mark.parametrize("is_gray", [True, False])
@pytest.mark.parametrize("is_gaussian", [True, False])
def test_realesrgan_noise_is_as_strong_as_drawn(
    tmp_path: Path, part: str, is_gray: bool, is_gaussian: bool, on_host: bool
) -> None:
    np.save(tmp_path / "0.npy", (50 + photograph(3, 180, 144) * (100 / 255)).astype(np.uint8))
    # Only noise, and JPEG with coarse colour only: luma shows the strength. Nothing reaches 0 or
    # 255.
    nothing = STILL | {"blur_prob": 0, "resize_prob": (0, 0, 1), "jpeg_range": 100}
    noisy = nothing | {
        "noise_range": (6, 12),
        "poisson_scale_range": (1, 2),
        "gray_noise_prob": float(is_gray),
        "gaussian_noise_prob": float(is_gaussian),
    }

    def lr(**rounds: Any) -> tuple[list[Sample], np.ndarray]:
        degradation = {
            "name": "realesrgan",
            "final_sinc_prob": 0,
            "surroundings": 16,
            "first": nothing,
            "second": nothing,
            **rounds,
        }
        samples, _, made_lr = made(
            source(
                tmp_path,
                ["0.npy"],
                scale=1,
                micro_batch=4,
                crop=128,
                degradation=degradation,
                degrades_on_host=on_host,
            )
        )
        return samples, made_lr.transpose(0, 2, 3, 1).astype(np.float64)

    for sample, got, still in zip(*lr(**{part: noisy}), lr()[1], strict=True):
        residual = (got - still) @ LUMA
        if is_gray:
            variance = 1 if is_gaussian else (still @ LUMA).mean()
            assert (got - still - residual[..., None]).std() < 1.2  # the same in all channels
        else:
            variance = (LUMA**2 * (np.ones_like(still) if is_gaussian else still)).sum(-1).mean()
        assert residual.std() == pytest.approx(
            sample.degradation[part]["level"] * variance**0.5, rel=0.03
        )
        # Photon counts are integers: with a factor near 1, rounding to bytes can be biased.
        assert abs(residual.mean()) < 4 * residual.std() / residual.size**0.5 + 0.1 + 0.4 * (
            not is_gaussian
        )


# Noise on LR.


@pytest.mark.parametrize(
    ("degradation", "on_host"),
    [("bicubic", False), ("gaussian", False), ("realesrgan", False), ("realesrgan", True)],
)
def test_lr_noise_is_as_strong_as_drawn(tmp_path: Path, degradation: str, on_host: bool) -> None:
    names = photographs(tmp_path, (120, 130), (140, 128))
    keywords = {
        "scale": 2,
        "micro_batch": 16,
        "crop": 96,
        "degradation": degradation,
        "degrades_on_host": on_host,
    }
    samples, hr, noisy = made(
        source(tmp_path, names, lr_noise={"probability": 0.6, "sigma": (2, 8)}, **keywords)
    )
    _, hr_still, still = made(source(tmp_path, names, **keywords))
    assert {sample.noise_sigma > 0 for sample in samples} == {True, False}
    np.testing.assert_array_equal(hr, hr_still)
    for sample, one, other in zip(samples, noisy, still, strict=True):
        if sample.noise_sigma == 0:
            np.testing.assert_array_equal(one, other)
            continue
        residual = one.astype(np.float64) - other
        unclipped = residual[(other > 35) & (other < 220)]
        assert unclipped.size > 2000
        # Both sides are rounded, which adds 1/12 to the variance, except that realesrgan's were
        # bytes already.
        sigma = (sample.noise_sigma**2 + (1 if degradation == "realesrgan" else 2) / 12) ** 0.5
        assert unclipped.std() == pytest.approx(sigma, rel=4 / (2 * unclipped.size) ** 0.5)
        assert abs(unclipped.mean()) < 4 * sigma / unclipped.size**0.5 + 0.02
        across = np.corrcoef(residual.reshape(3, -1))[np.triu_indices(3, 1)]
        assert np.abs(across).max() < 0.1


def test_lr_noise_is_drawn_as_often_as_asked_for(tmp_path: Path) -> None:
    names = photographs(tmp_path, (64, 64))
    for degradation in ("bicubic", "realesrgan"):
        crops = source(
            tmp_path,
            names,
            scale=4,
            micro_batch=1,
            degradation=degradation,
            lr_noise={"probability": 0.3, "sigma": (1, 6)},
        )
        sigmas = [sample.noise_sigma for sample in crops.samples(0, 4000)]
        assert_shares((sigma > 0 for sigma in sigmas), share(0.3))
        assert_even([sigma for sigma in sigmas if sigma > 0], 1, 6)


# A sample is a pure function of its number.

MIXED = (
    (CROP, CROP),
    (CROP, 90),
    (CROP + 7, CROP + 1),
    (100, CROP + 3),
    (160, 170),
    (77, 211),
    (300, 260),
)
"""Sizes: exactly the crop's, smaller than crop and surroundings in one direction or in both,
larger."""
WAYS: Mapping[str, Any] = {
    "bicubic": "bicubic",
    "gaussian": {"name": "gaussian", "sigma": (0.5, 2.5)},
    "realesrgan": {"name": "realesrgan", "surroundings": 96},
    "paired": "paired",
}


def mixed_files(root: Path, scale: int) -> tuple[list[str], dict[str, str]]:
    """Return (HR names, HR name -> path of LR) of `.npy` and `.png` files."""
    names, lr_paths = [], {}
    for i, (height, width) in enumerate(MIXED):
        suffix = (".npy", ".png")[i % 2]
        for name, size in (
            (f"{i}", (height, width)),
            (f"{i}_lr", (height // scale, width // scale)),
        ):
            pixels = photograph(i, *size)
            if suffix == ".npy":
                np.save(root / f"{name}.npy", pixels)
            else:
                assert cv2.imwrite(str(root / f"{name}.png"), pixels)
        names.append(f"{i}{suffix}")
        lr_paths[names[-1]] = str(root / f"{i}_lr{suffix}")
    return names, lr_paths


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [3, 4])
def test_a_sample_is_a_function_of_its_number(tmp_path: Path, way: str, scale: int) -> None:
    names, lr_paths = mixed_files(tmp_path, scale)

    def run(
        micro_batch: int, threads: int, degradation: Any = WAYS[way]
    ) -> tuple[list[Sample], np.ndarray, ...]:
        return made(
            source(
                tmp_path,
                names,
                scale=scale,
                micro_batch=micro_batch,
                lr_paths=lr_paths,
                degradation=degradation,
                lr_noise={"probability": 0.5},
                brightness={"probability": 0.5},
            ),
            24 // micro_batch,
            threads,
        )

    samples, hr, lr = run(1, 1)
    assert {sample.path for sample in samples} == {str(tmp_path / name) for name in names}
    extent = (
        CROP + build_degradation(DataSpec(degradation=WAYS[way]).degradation, scale).surroundings
    )
    for sample in samples:
        height, width = MIXED[names.index(Path(sample.path).name)]
        height, width = height // scale * scale, width // scale * scale
        top, left, region_height, region_width = sample.region
        assert (region_height, region_width) == (min(extent, height), min(extent, width))
        assert 0 <= top <= sample.top <= sample.top + CROP <= top + region_height <= height
        assert 0 <= left <= sample.left <= sample.left + CROP <= left + region_width <= width
    assert len({pixels.tobytes() for pixels in lr}) == 24
    for micro_batch, threads in ((3, 2), (8, 1)):
        others, other_hr, other_lr = run(micro_batch, threads)
        assert others == samples
        np.testing.assert_array_equal(other_hr, hr)
        np.testing.assert_array_equal(other_lr, lr)
    np.testing.assert_array_equal(run(8, 1, "bicubic")[1], hr)  # no degradation may change HR


# Extreme values in recipes.

LIMITS: Mapping[str, Any] = {
    "smallest kernels": {"blur_kernel_size": 7},
    "largest kernels": {"blur_kernel_size": 31},
    "down": {"resize_range": (0.05, 1), "resize_prob": (0, 1, 0)},
    "up": {"resize_range": (1, 4), "resize_prob": (1, 0, 0)},
    "both": {"resize_range": (0.05, 4)},
    "worst JPEG": {"jpeg_range": 1},
    "best JPEG": {"jpeg_range": 100},
    "smallest sigma": {"blur_sigma": 1e-3, "sinc_prob": 0},
    "smallest exponents": {"betag_range": 1e-3, "betap_range": 1e-3, "sinc_prob": 0},
    "sincs alone": {"sinc_prob": 1},
    "nothing but JPEG": {"blur_prob": 0, "resize_prob": (0, 0, 1)} | STILL,
    "poisson": {"gaussian_noise_prob": 0, "poisson_scale_range": (0, 3)},
}


def assert_plausible(hr: np.ndarray, lr: np.ndarray, scale: int, least: float) -> None:
    """Assert that LR shows the same as HR, by the correlation with the mean over each LR pixel.

    It must be at least `least` times a perfect one.
    """
    count, _, height, width = hr.shape
    means = hr.reshape(count, 3, height // scale, scale, width // scale, scale).mean((3, 5))
    assert lr.shape == means.shape
    assert np.corrcoef(means.ravel(), lr.ravel())[0, 1] > least
    assert abs(means.mean() - lr.mean()) < 12


@pytest.mark.parametrize("limit", LIMITS)
def test_realesrgan_at_the_limits_of_its_recipe(tmp_path: Path, limit: str) -> None:
    names = photographs(tmp_path, (64, 64), (65, 200), (230, 96), (250, 251))
    degradation = {"name": "realesrgan", "first": LIMITS[limit], "second": LIMITS[limit]}
    for scale, surroundings in ((2, 1024), (8, 0)):
        crops = source(
            tmp_path,
            names,
            scale=scale,
            micro_batch=10,
            crop=64,
            degradation=degradation | {"surroundings": surroundings},
        )
        for drawn in (crops.make(0), crops.make(1)):
            for column in drawn:
                for array in column:
                    assert np.isfinite(array).all()
        _, hr, lr = made(crops)
        assert_plausible(hr, lr, scale, 0.3 if limit == "worst JPEG" else 0.6)


@pytest.mark.parametrize("scale", [2, 3, 8])
def test_the_smallest_crops(tmp_path: Path, scale: int) -> None:
    crop = 9 if scale == 3 else 8
    names = photographs(tmp_path, (crop, crop), (crop, 64), (64, 65))
    for degradation in WAYS.values():
        if degradation == "paired":
            continue
        _, hr, lr = made(
            source(tmp_path, names, scale=scale, micro_batch=40, crop=crop, degradation=degradation)
        )
        assert hr.shape == (40, 3, crop, crop)
        assert_plausible(hr, lr, scale, 0.4)


@pytest.mark.parametrize("sigma", [1e-3, 20])
@pytest.mark.parametrize("scale", [2, 3, 8])
def test_gaussian_at_the_limits_of_its_recipe(tmp_path: Path, sigma: float, scale: int) -> None:
    names = photographs(tmp_path, (48, 48), (90, 120))
    crops = source(
        tmp_path,
        names,
        scale=scale,
        micro_batch=10,
        augment=False,
        degradation={"name": "gaussian", "sigma": sigma},
    )
    samples, hr, lr = made(crops)
    if sigma == 20:
        assert_plausible(hr, lr, scale, 0.3)
        return
    # the one or four pixels at each centre
    for sample, one, other in zip(samples, hr, lr, strict=True):
        assert not sample.transpose
        first, last = (scale - 1) // 2, scale // 2
        nearest = np.mean(
            [one[:, i::scale, j::scale] for i in (first, last) for j in (first, last)], axis=0
        )
        assert np.abs(nearest - other).max() <= 0.5


def test_no_kernel_warns() -> None:
    for limit in LIMITS.values():
        degradation = RealEsrgan(RealEsrganSpec(first=limit, second=limit), 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for row in np.random.default_rng(4).random((40, NUMBERS)).tolist():
                drawn = degradation.draw(iter(row), 96, 88)
                for name, array in degradation.arrays(drawn, list(range(KEYS))).items():
                    if name.endswith("kernel"):
                        assert array.sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("highest", [1.2, 4])
def test_each_array_of_realesrgan_is_used(tmp_path: Path, highest: float) -> None:
    """DALI warns about unused inputs."""
    degradation = {"name": "realesrgan", "second": {"resize_range": (0.3, highest)}}
    crops = source(
        tmp_path, photographs(tmp_path, (64, 64)), scale=4, micro_batch=1, degradation=degradation
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(crops)


def test_no_two_noises_of_a_sample_share_their_keys(tmp_path: Path) -> None:
    crops = source(
        tmp_path,
        photographs(tmp_path, (90, 100)),
        scale=2,
        micro_batch=6,
        degradation="realesrgan",
        lr_noise={"probability": 1},
    )
    columns = dict(zip(crops.columns, crops.make(0), strict=True))
    fields = [
        set(columns[f"{part}_{name}"][i].ravel().tolist())
        for i in range(6)
        for part in (*ROUNDS, "noise")
        for name in ("rows", "columns")
    ]
    assert min(len(field) for field in fields) > 7
    for i, field in enumerate(fields):
        for other in fields[:i]:
            assert len(field & other) < 3  # out of 2^31 keys


def test_a_degradation_is_a_file_and_a_row(dataset: Path, tmp_path: Path) -> None:
    """A new degradation is accepted by recipes, makes its LR and can be trained with.

    It takes the pixel at the corner of each LR pixel.
    """
    (tmp_path / "corner.py").write_text(
        textwrap.dedent('''
        """LR by taking one pixel in `scale`, without a filter."""
        from typing import Literal

        from pipeline.data.degradations.base import Degradation, DegradationSpec


        class CornerSpec(DegradationSpec):
            name: Literal["corner"] = "corner"
            darker: int = 0


        class Corner(Degradation):
            Spec = CornerSpec
            surroundings = 0

            def lr(self, nodes, region, size, on_device, *, as_float):
                from nvidia.dali import fn, types

                crop = fn.slice(region, start=nodes["start"], shape=size, axes=[0, 1])
                picked = fn.resize(
                    crop,
                    size=[side // self.scale for side in size],
                    interp_type=types.INTERP_NN,
                    antialias=False,
                )
                dtype = types.FLOAT if as_float else types.UINT8
                return fn.cast(picked - self.spec.darker, dtype=dtype)
    ''')
    )
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from pathlib import Path
        import numpy as np
        import corner
        from pipeline.data import degradations
        degradations.KINDS.append(corner.Corner)
        from pipeline.cli import UserError
        from pipeline.config.recipe import load_recipe
        from pipeline.data.reader import low_resolution
        from pipeline.training.options import TrainOptions
        from pipeline.training.run import main

        pixels = np.random.default_rng(0).integers(16, 256, (32, 48, 3)).astype(np.uint8)
        recipe = load_recipe("demo", {{"data.degradation": {{"name": "corner", "darker": 3}}}})
        spec = recipe.data.degradation
        lr = low_resolution(pixels, spec, 2, seed=0, number=0)
        picked = lr.astype(int) + 3
        assert (picked == pixels[1::2, 1::2]).all() or (picked == pixels[::2, ::2]).all()
        try:
            load_recipe("demo", {{"data.degradation": {{"name": "corner", "drker": 3}}}})
        except UserError as error:
            words = "data.degradation.drker: unknown key; did you mean 'darker'?"
            assert words in str(error), error
        overrides = (*{SMALL!r}, "steps=2", "data.degradation=corner")
        sys.exit(main(TrainOptions(
            overrides=overrides,
            recipe="demo",
            dataset_dir=(Path({str(dataset)!r}),),
            output_dir=Path({str(tmp_path / "run")!r}),
        )))
    """
    done = run_python(code, flags=("-W", "ignore"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished at step 2" in done.stdout
