"""The step `blur`: kinds against OpenCV, SciPy and float64 formulas, and what it draws."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from pydantic import ValidationError
from scipy import ndimage

from conftest import photograph
from pipeline.data.degradations import kernels, realesrgan
from pipeline.data.degradations.steps.blur import BlurSpec, kernel
from steps import applied, check_kind, draws_of, shares, unclipped

DRAWN = {
    "gaussian": {"sigma": 1.7},
    "anisotropic": {"sigma_x": 3.0, "sigma_y": 0.6, "angle": 30.0},
    "generalized": {"side": 15, "sigma": 2.0, "beta": 2.5},
    "generalized_anisotropic": {
        "side": 21, "sigma_x": 1.0, "sigma_y": 3.0, "angle": -70.0, "beta": 0.6,
    },
    "plateau": {"side": 13, "sigma": 1.5, "beta": 1.6},
    "plateau_anisotropic": {
        "side": 17, "sigma_x": 2.0, "sigma_y": 0.8, "angle": 110.0, "beta": 1.1,
    },
    "sinc": {"side": 19, "cutoff": 1.1},
    "box": {"radius": 2.3},
    "lens": {"radius": 3.4},
    "motion": {"length": 9.5, "angle": 35.0},
    "median": {"radius": 1},
}  # fmt: skip
IMAGES = (photograph(3, 61, 47), unclipped(2, 40, 53))


def formula(drawn: dict[str, float]) -> np.ndarray:
    """The kernel in float64 by its definition; edges by 24 x 24 points per pixel."""
    kind, reach = str(drawn["kind"]), 24
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    theta = math.radians(drawn.get("angle", 0.0))
    if kind in ("box", "lens"):
        points = (np.arange(24) + 0.5) / 24 - 0.5
        y, x = (part[..., None, None] for part in (y, x))
        y, x = y + points[:, None], x + points
        half = drawn["radius"] + 0.5
        inside = (
            np.hypot(x, y) < drawn["radius"]
            if kind == "lens"
            else (np.maximum(abs(x), abs(y)) < half)
        )
        values = inside.mean((2, 3))
    elif kind == "motion":
        along, across = (
            x * math.cos(theta) + y * math.sin(theta),
            y * math.cos(theta) - x * math.sin(theta),
        )
        ends = np.clip((drawn["length"] + 1) / 2 - abs(along), 0, 1)
        values = ends * np.clip(1 - abs(across), 0, None)
    else:
        sigma_x, sigma_y = (drawn.get(f"sigma_{axis}", drawn.get("sigma", 1.0)) for axis in "xy")
        u, v = x * math.cos(theta) + y * math.sin(theta), y * math.cos(theta) - x * math.sin(theta)
        q = (u / sigma_x) ** 2 + (v / sigma_y) ** 2
        if kind.startswith("plateau"):
            values = 1 / (1 + q ** drawn["beta"])
        else:
            values = np.exp(-0.5 * q ** drawn.get("beta", 1.0))
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    values[np.maximum(abs(rows), abs(columns)) > drawn.get("side", 99) // 2] = 0
    return values / values.sum()


@pytest.mark.parametrize("kind", [kind for kind in DRAWN if kind not in ("sinc", "median")])
def test_a_blur_is_the_sum_of_its_formula(kind: str) -> None:
    drawn = {"kind": kind, **DRAWN[kind]}
    weights = formula(drawn)
    for image in IMAGES:
        expected = ndimage.correlate(image.astype(np.float64), weights[..., None], mode="mirror")
        assert np.abs(applied("blur", image, drawn) - expected).max() < 1


def test_whole_boxes_gaussians_lines_and_medians_are_opencvs_and_scipys() -> None:
    for image in IMAGES:
        got = applied("blur", image, {"kind": "box", "radius": 3.0})
        floats = image.astype(np.float32)
        assert np.abs(got - cv2.blur(floats, (7, 7))).max() < 0.5
        got = applied("blur", image, {"kind": "gaussian", "sigma": 2.0})
        assert np.abs(got - cv2.GaussianBlur(floats, (17, 17), 2.0)).max() < 0.5
        got = applied("blur", image, {"kind": "motion", "length": 7.0, "angle": 90.0})
        assert np.abs(got - cv2.blur(floats, (1, 7))).max() < 0.5
        got = applied("blur", image, {"kind": "sinc", "side": 19, "cutoff": 1.1})
        expected = cv2.filter2D(
            floats, -1, kernels.sinc_kernel(19, 1.1), borderType=cv2.BORDER_REFLECT_101
        )
        assert np.abs(got - expected).max() < 1
        for radius in (1, 2):
            got = applied("blur", image, {"kind": "median", "radius": radius})
            side = 2 * radius + 1
            expected = ndimage.median_filter(image, (side, side, 1), mode="nearest")
            assert got.dtype == image.dtype
            assert (got == expected).all()


def test_a_line_of_motion_has_its_length_and_direction() -> None:
    """Its variance is length^2 / 12 along the line, and less than half a pixel's across it."""
    for length, degrees in ((5.0, 0), (12.4, 0), (12.4, 30), (31.0, 45), (20.0, -100)):
        weights = kernels.motion_kernel(length, math.radians(degrees)).astype(np.float64)
        reach = len(weights) // 2
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        along, across = x * cos + y * sin, y * cos - x * sin
        assert (weights * along**2).sum() == pytest.approx(length**2 / 12, rel=0.05)
        assert (weights * across**2).sum() < 0.25
    flat = kernels.motion_kernel(1.0, 0.3)
    assert flat.max() == flat[len(flat) // 2, len(flat) // 2] > 0.5


@pytest.mark.parametrize("kind", DRAWN)
def test_every_kind_holds_for_any_image(kind: str) -> None:
    check_kind("blur", {"kind": kind, **DRAWN[kind]})


def test_the_largest_blurs_hold_for_the_smallest_images() -> None:
    for drawn in (
        {"kind": "gaussian", "sigma": 50.0},
        {"kind": "lens", "radius": 50.0},
        {"kind": "motion", "length": 101.0, "angle": 45.0},
    ):
        image = photograph(2, 8, 9)
        got = applied("blur", image, drawn)
        assert np.abs(got - image.mean((0, 1))).max() < 40
        assert got.std((0, 1)).max() < 0.3 * image.std((0, 1)).max()


def test_draws_are_in_their_ranges() -> None:
    section = {"kind": {"lens": 3, "motion": 1}, "radius": [2, 5], "length": 7, "angle": [10, 20]}
    drawn = draws_of("blur", section, 2000)
    assert abs(shares(drawn)["lens"] - 0.75) < 0.03
    for one in drawn:
        if one["kind"] == "lens":
            assert one.keys() == {"kind", "radius"}
            assert 2 <= one["radius"] < 5
        else:
            assert one["length"] == 7
            assert 10 <= one["angle"] < 20
    drawn = draws_of("blur", {"kind": "median", "median_radius": [1, 2]}, 200)
    assert shares(drawn, "radius").keys() == {"1", "2"}
    assert all(
        one.keys() == {"kind", "sigma"} and 1 <= one["sigma"] < 2
        for one in draws_of("blur", {"kind": "gaussian", "sigma": [1, 2]}, 50)
    )


def test_shapes_are_drawn_as_in_real_esrgan() -> None:
    section = {"kind": ["generalized", "plateau_anisotropic"], "sigma": [0.2, 3]}
    drawn = draws_of("blur", section, 3000)
    for kind, low, high in (("generalized", 0.5, 4), ("plateau_anisotropic", 1, 2)):
        ones = [one for one in drawn if one["kind"] == kind]
        betas = np.array([one["beta"] for one in ones])
        assert low <= betas.min()
        assert betas.max() <= high
        assert abs((betas <= 1).mean() - 0.5) < 0.05
        assert {one["side"] for one in ones} == set(range(7, 22, 2))
    assert all(("angle" in one) == ("sigma_x" in one) for one in drawn)
    for one in draws_of("blur", {"kind": "sinc", "size": 15}, 500):
        assert one["side"] in (7, 9, 11, 13, 15)
        assert math.pi / (3 if one["side"] < 13 else 5) <= one["cutoff"] <= math.pi
    drawn = draws_of("blur", {"kind": "sinc", "cutoff": 3.1416}, 3)
    assert all(one["cutoff"] == math.pi for one in drawn)
    # With a `size`, Gaussians have drawn sides too.
    drawn = draws_of("blur", {"kind": "anisotropic", "size": 9}, 100)
    assert {len(kernel(one)) for one in drawn} == {7, 9}


def test_kernels_are_those_of_the_real_esrgan_chain() -> None:
    names = dict(
        zip(
            realesrgan.KERNELS,
            (kind for kind in DRAWN if "sigma" in DRAWN[kind] or "sigma_x" in DRAWN[kind]),
            strict=True,
        )
    )
    random, seen = np.random.default_rng(2), set()
    for _ in range(200):
        blur = realesrgan._draw_blur(realesrgan.FirstRound(), iter(random.random(20).tolist()))
        kind = names.get(blur["shape"], "sinc")
        numbers = blur["size"], *blur.get("sigma", ()), blur.get("theta", 0.0)
        if kind == "sinc":
            expected = kernels.sinc_kernel(blur["size"], blur["cutoff"])
        elif kind.startswith("generalized"):
            expected = kernels.generalized_kernel(*numbers, blur["beta"])
        elif kind.startswith("plateau"):
            expected = kernels.plateau_kernel(*numbers, blur["beta"])
        else:
            expected = kernels.gaussian_kernel(*numbers)
        made = realesrgan._kernel({"blur": blur, "mode": "linear", "ratio": 1.0})
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-8)
        seen.add(kind)
    assert seen == {*names.values(), "sinc"}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "disc"}, "no kind named 'disc'"),
        ({"kind": "plateu"}, "did you mean 'plateau'"),
        ({"size": 12}, "12 must be odd; use 13"),
        ({"sigma": [3, 1]}, "[3, 1] is not a range"),
        ({"cutoff": [1, 4]}, "within 0.1..3.1416"),
        ({"median_radius": 3}, "within 1..2"),
        ({"radius": 0.2}, "within 0.5..50"),
    ],
)
def test_bad_sections_are_refused(section: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        BlurSpec.model_validate(section)
    assert words in str(refused.value)
