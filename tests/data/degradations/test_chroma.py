"""The step `chroma`: every subsampling against a formula in float64, and what it draws."""

from __future__ import annotations

import itertools
from typing import Any

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from conftest import photograph
from pipeline.data.degradations.steps.chroma import FACTORS, ChromaSpec
from steps import applied, check_kind, draws_of, shares, unclipped

WEIGHTS = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
}  # of R and B
CENTERED = {"center": "yx", "left": "y", "top_left": ""}


def drawn(kind: str, **others: str) -> dict[str, Any]:
    one = {"kind": kind, "down": "box", "up": "linear"}
    one |= {"siting": "center", "matrix": "bt601", "range": "full"} | others
    for name in ("siting", "matrix", "range"):
        one.setdefault(f"decoded_{name}", one[name])
    return one


def value(line: np.ndarray, place: int) -> np.ndarray:
    return line[min(max(place, 0), len(line) - 1)]


def shrunk(line: np.ndarray, factor: int, kernel: str, middle: bool) -> np.ndarray:
    samples = []
    for first in range(0, len(line), factor):
        center = first + ((factor - 1) / 2 if middle else 0)
        if kernel == "nearest":
            samples.append(value(line, int(center)))
            continue
        total, weight = 0, 0
        for place in range(first - 8, first + 9):
            if kernel == "box":  # what both the pixel and the box cover
                begin = max(place - 0.5, center - factor / 2)
                part = max(0, min(place + 0.5, center + factor / 2) - begin)
            else:
                part = max(0, 1 - abs(place - center) / factor)
            total, weight = total + part * value(line, place), weight + part
        samples.append(total / weight)
    return np.stack(samples)


def keys(x: float) -> float:
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0


def enlarged(
    samples: np.ndarray, length: int, factor: int, kernel: str, middle: bool
) -> np.ndarray:
    pixels = []
    for pixel in range(length):
        at = (pixel - ((factor - 1) / 2 if middle else 0)) / factor
        if kernel == "nearest":  # the first of two that are equally near
            pixels.append(min(range(-1, len(samples) + 1), key=lambda i: (abs(i - at), i)))
            pixels[-1] = value(samples, pixels[-1])
        else:
            weigh = keys if kernel == "cubic" else lambda x: max(0, 1 - abs(x))
            near = range(int(np.floor(at)) - 1, int(np.floor(at)) + 3)
            pixels.append(sum(weigh(i - at) * value(samples, i) for i in near))
    return np.stack(pixels)


def matrix(name: str) -> np.ndarray:
    red, blue = WEIGHTS[name]
    luma = np.array([red, 1 - red - blue, blue])
    return np.stack([luma, ([0, 0, 1] - luma) / (2 - 2 * blue), ([1, 0, 0] - luma) / (2 - 2 * red)])


def by_formula(image: np.ndarray, one: dict[str, Any]) -> np.ndarray:
    ycc = image.astype(np.float64) @ matrix(one["matrix"]).T
    if one["range"] == "limited":
        ycc = ycc * np.array([219, 224, 224]) / 255 + [16, 0, 0]
    chroma = ycc[..., 1:]
    for axis, (name, factor) in enumerate(zip("yx", FACTORS[one["kind"]], strict=True)):
        line = np.moveaxis(chroma, axis, 0)
        samples = shrunk(line, factor, one["down"], name in CENTERED[one["siting"]])
        middle = name in CENTERED[one["decoded_siting"]]
        chroma = np.moveaxis(enlarged(samples, len(line), factor, one["up"], middle), 0, axis)
    ycc = np.concatenate([ycc[..., :1], chroma], -1)
    if one["decoded_range"] == "limited":
        ycc = (ycc - [16, 0, 0]) * 255 / np.array([219, 224, 224])
    return ycc @ np.linalg.inv(matrix(one["decoded_matrix"])).T


@pytest.mark.parametrize("kind", FACTORS)
def test_every_subsampling_is_the_formula(kind: str) -> None:
    image = unclipped(3, 21, 30)
    for down, up, siting, decoded in itertools.product(
        ("box", "linear", "nearest"),
        ("nearest", "linear", "cubic"),
        ("center", "left"),
        ("left", "top_left"),
    ):
        one = drawn(kind, down=down, up=up, siting=siting, decoded_siting=decoded)
        np.testing.assert_allclose(applied("chroma", image, one), by_formula(image, one), atol=2e-3)


@pytest.mark.parametrize("kind", FACTORS)
def test_what_holds_for_every_kind(kind: str) -> None:
    check_kind("chroma", drawn(kind, up="cubic"))
    check_kind("chroma", drawn(kind, siting="left", up="nearest", decoded_matrix="bt709"))


def test_420_in_the_middle_is_opencvs_area_and_linear_resize() -> None:
    image = photograph(3, 32, 46).astype(np.float32)
    ycc = image @ matrix("bt601").T
    small = cv2.resize(ycc[..., 1:], (23, 16), interpolation=cv2.INTER_AREA)
    ycc[..., 1:] = cv2.resize(small, (46, 32), interpolation=cv2.INTER_LINEAR)
    expected = ycc @ np.linalg.inv(matrix("bt601")).T
    np.testing.assert_allclose(applied("chroma", image, drawn("420")), expected, atol=2e-3)


@pytest.mark.parametrize("encoded", WEIGHTS)
@pytest.mark.parametrize("decoded", WEIGHTS)
def test_another_matrix_or_range_shifts_colors_as_by_formula(encoded: str, decoded: str) -> None:
    image = unclipped(4, 13, 18)
    for first, second in itertools.product(("full", "limited"), repeat=2):
        names = {"matrix": encoded, "decoded_matrix": decoded}
        one = drawn("422", **names, range=first, decoded_range=second)
        np.testing.assert_allclose(applied("chroma", image, one), by_formula(image, one), atol=2e-3)
    same = drawn("444", matrix=encoded, decoded_matrix=encoded)
    np.testing.assert_allclose(applied("chroma", image, same), image, atol=1e-3)


def test_another_siting_moves_chroma_by_half_a_pixel() -> None:
    ramp = np.zeros((16, 40, 3), np.float32)
    ramp[..., 2] = 4 * np.arange(40)
    one = drawn("422", siting="left", decoded_siting="center", down="linear")
    difference = (applied("chroma", ramp, one) - ramp) @ matrix("bt601").T
    np.testing.assert_allclose(difference[:, 8:-8, 0], 0, atol=1e-3)  # luma stays
    np.testing.assert_allclose(difference[:, 8:-8, 1], -0.5 * 4 * 0.5, atol=1e-3)


def test_draws_follow_shares() -> None:
    section = {
        "kind": {420: 3, 411: 1},
        "up": "nearest",
        "siting": "left",
        "decoded_siting": {"same": 1, "center": 1},
        "decoded_matrix": {"same": 3, "bt709": 1},
    }
    drawn = draws_of("chroma", section, 2000)
    assert shares(drawn)["411"] == pytest.approx(0.25, abs=0.04)
    assert shares(drawn, "decoded_siting")["left"] == pytest.approx(0.5, abs=0.04)
    assert shares(drawn, "decoded_matrix")["bt709"] == pytest.approx(0.25, abs=0.04)
    assert shares(drawn, "down") == pytest.approx({"box": 0.5, "linear": 0.5}, abs=0.04)
    assert shares(drawn, "up") == {"nearest": 1.0}
    assert shares(drawn, "decoded_range") == {"full": 1.0}


def test_an_unknown_subsampling_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"no kind named '421'; did you mean '4"):
        ChromaSpec(kind=421)
    with pytest.raises(ValidationError, match=r"no kind named 'bt602'; did you mean 'bt601'"):
        ChromaSpec(matrix="bt602")
