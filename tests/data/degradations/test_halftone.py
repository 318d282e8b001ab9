"""The step `halftone`: against a formula in float64, tones and screens of each ink, and draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from conftest import photograph
from pipeline.data.degradations.steps.halftone import HalftoneSpec
from steps import applied, check_kind, draws_of, shares, unclipped

ANGLES = {"gray": [45.0], "rgb": [15.0, 75.0, 0.0], "cmyk": [15.0, 75.0, 0.0, 45.0]}


def drawn(kind: str, shape: str = "dots", cell: float = 5.0, gcr: float = 0.7) -> dict[str, Any]:
    phases = [[0.1, 0.3], [0.5, 0.9], [0.2, 0.7], [0.8, 0.4]]
    return {
        "kind": kind,
        "shape": shape,
        "cell": cell,
        "angles": [angle + 3.0 for angle in ANGLES[kind]],
        "phases": phases[: len(ANGLES[kind])],
        "gcr": gcr,
    }


def covered(tone: np.ndarray, one: dict[str, Any], ink: int) -> np.ndarray:
    """Cover each pixel by its rank in the cell: the share of the cell where the screen is lower."""
    cell, angle = one["cell"], math.radians(one["angles"][ink])
    y, x = np.mgrid[: tone.shape[0], : tone.shape[1]] + 0.5
    across = (x * math.cos(angle) + y * math.sin(angle)) / cell + one["phases"][ink][0]
    down = (y * math.cos(angle) - x * math.sin(angle)) / cell + one["phases"][ink][1]
    less = np.minimum(tone, 1 - tone)
    if one["shape"] == "lines":
        rank = np.abs(2 * (down % 1) - 1)
        width = np.full_like(tone, 2 / cell)
    else:
        spot = np.cos(2 * np.pi * across) + np.cos(2 * np.pi * down)
        wave = np.cos((np.arange(4000) + 0.5) * np.pi / 4000)
        rank = (1 - np.arccos((spot[..., None] - wave).clip(-1, 1)) / np.pi).mean(-1)
        width = 2 * np.sqrt(np.pi * less) / cell
    width = width.clip(1e-4, 1)
    outside = np.sqrt(2 * less * width) - width / 2
    edge = np.where(less < width / 2, outside, less)
    edge = np.where(tone < 0.5, 1 - edge, edge)
    return ((rank - edge) / width + 0.5).clip(0, 1)


def by_formula(image: np.ndarray, one: dict[str, Any]) -> np.ndarray:
    light = image.clip(0, 255).astype(np.float64) / 255
    if one["kind"] == "gray":
        luma = light @ [0.299, 0.587, 0.114]
        return 255 * (1 - covered(1 - luma, one, 0))[..., None].repeat(3, -1)
    if one["kind"] == "rgb":
        return 255 * np.stack([covered(light[..., i], one, i) for i in range(3)], -1)
    black = one["gcr"] * (1 - light).min(-1)
    inks = (1 - light - black[..., None]) / (1 - black[..., None]).clip(1e-9)
    paper = 1 - covered(black, one, 3)
    return 255 * np.stack([(1 - covered(inks[..., i], one, i)) * paper for i in range(3)], -1)


@pytest.mark.parametrize("kind", ANGLES)
@pytest.mark.parametrize("shape", ["dots", "lines"])
def test_every_kind_is_the_formula(kind: str, shape: str) -> None:
    for image, cell in ((photograph(3, 21, 26), 4.3), (unclipped(4, 23, 18), 9.0)):
        one = drawn(kind, shape, cell)
        np.testing.assert_allclose(applied("halftone", image, one), by_formula(image, one), atol=1)


@pytest.mark.parametrize("kind", ANGLES)
@pytest.mark.parametrize("shape", ["dots", "lines"])
def test_what_holds_for_every_kind(kind: str, shape: str) -> None:
    check_kind("halftone", drawn(kind, shape, 3.3))


@pytest.mark.parametrize("kind", ANGLES)
@pytest.mark.parametrize("shape", ["dots", "lines"])
@pytest.mark.parametrize("cell", [2.3, 3.0, 8.0])
def test_an_even_tone_keeps_its_mean(kind: str, shape: str, cell: float) -> None:
    for level in (0, 4, 30, 128, 200, 252, 255):
        field = np.full((150, 170, 3), level, np.uint8)
        got = applied("halftone", field, drawn(kind, shape, cell, gcr=1.0))
        assert got.mean() == pytest.approx(level, abs=2.5)
        if level in (0, 255):
            np.testing.assert_allclose(got, level, atol=0.5)


@pytest.mark.parametrize("shape", ["dots", "lines"])
def test_a_screen_has_its_distance_and_angle(shape: str) -> None:
    one = drawn("gray", shape, 8.0) | {"angles": [30.0]}
    got = applied("halftone", np.full((256, 256, 3), 128, np.uint8), one)[..., 0]
    spectrum = np.abs(np.fft.fft2(got - got.mean()))
    row, column = np.unravel_index(spectrum[:, :128].argmax(), (256, 128))
    frequency = complex(column, row if row < 128 else row - 256) / 256
    assert abs(frequency) == pytest.approx(1 / 8, abs=1 / 256)
    turned = math.degrees(math.atan2(frequency.imag, frequency.real)) % 90
    assert turned == pytest.approx(30, abs=3)


def test_black_ink_replaces_gray() -> None:
    gray = np.full((64, 64, 3), 100, np.uint8)
    all_black = applied("halftone", gray, drawn("cmyk", gcr=1.0))
    np.testing.assert_allclose(all_black, all_black[..., :1].repeat(3, -1), atol=1e-3)
    no_black = applied("halftone", gray, drawn("cmyk", gcr=0.0))
    assert np.abs(np.diff(no_black)).max() > 250


def test_draws_follow_shares_and_ranges() -> None:
    section = {
        "kind": {"gray": 1, "cmyk": 3},
        "shape": ["dots", "lines"],
        "cell": [3, 4],
        "rotation": [-10, 10],
        "gcr": 0.5,
    }
    drawn = draws_of("halftone", section, 2000)
    assert shares(drawn)["cmyk"] == pytest.approx(0.75, abs=0.04)
    assert shares(drawn, "shape")["lines"] == pytest.approx(0.5, abs=0.04)
    for one in drawn:
        expected = ANGLES[one["kind"]]
        turned = {round(a - b, 6) for a, b in zip(one["angles"], expected, strict=True)}
        assert len(turned) == 1
        assert abs(turned.pop()) <= 10
        assert 3 <= one["cell"] < 4
        assert one.get("gcr", 0.5) == 0.5
        assert len(one["phases"]) == len(expected)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "cmy"}, "no kind named 'cmy'; did you mean 'cmyk'"),
        ({"cell": [1, 3]}, r"within 2\.\.64"),
        ({"angles": [15, 75, 0]}, "angles"),
        ({"gcr": 2}, r"within 0\.\.1"),
    ],
)
def test_bad_sections_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        HalftoneSpec(**section)
