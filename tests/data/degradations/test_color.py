"""The step `color`: against formulas in float64, and what it draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from conftest import photograph
from pipeline.data.degradations.steps.color import ColorSpec
from steps import applied, check_kind, draws_of, unclipped

NEUTRAL = {
    "black": 0.0,
    "white": 255.0,
    "gamma": 1.0,
    "temperature": 0.0,
    "contrast": 1.0,
    "brightness": 0.0,
    "hue": 0.0,
    "saturation": 1.0,
}
TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)  # BT.601
CHANGES: list[dict[str, float]] = [
    {"black": 20.0, "white": 230.0},
    {"black": -30.0, "white": 300.0},
    {"gamma": 1.7},
    {"gamma": 0.4},
    {"temperature": 0.2},
    {"contrast": 1.3, "brightness": -12.0},
    {"hue": 25.0},
    {"saturation": 0.3},
    {
        "black": 9.0,
        "white": 240.0,
        "gamma": 1.2,
        "temperature": -0.1,
        "contrast": 0.8,
        "brightness": 7.0,
        "hue": -160.0,
        "saturation": 1.5,
    },
    {"black": 9.0, "temperature": -0.1, "contrast": 0.8, "hue": 70.0, "saturation": 1.5},
]


def by_formula(image: np.ndarray, one: dict[str, float]) -> np.ndarray:
    """One change after another."""
    image = (image.astype(np.float64) - one["black"]) / (one["white"] - one["black"])
    image = 255 * np.sign(image) * np.abs(image) ** one["gamma"]
    image = image * [1 + one["temperature"], 1, 1 - one["temperature"]]
    image = (image - 127.5) * one["contrast"] + 127.5 + one["brightness"]
    luma, blue, red = np.moveaxis(image @ TO_YCC.T, -1, 0)
    chroma = (blue + 1j * red) * np.exp(1j * math.radians(one["hue"])) * one["saturation"]
    return np.stack([luma, chroma.real, chroma.imag], -1) @ np.linalg.inv(TO_YCC).T


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_the_formula(change: dict[str, float]) -> None:
    for image in (photograph(3, 20, 31), unclipped(4, 21, 18)):
        got = applied("color", image, NEUTRAL | change)
        np.testing.assert_allclose(got, by_formula(image, NEUTRAL | change), atol=0.02)
    check_kind("color", NEUTRAL | change)


def test_neutral_values_change_nothing() -> None:
    image = unclipped(4, 21, 18)
    np.testing.assert_allclose(applied("color", image, NEUTRAL), image, atol=1e-3)


def test_draws_are_independent_and_within_their_ranges() -> None:
    section: dict[str, Any] = {
        "black": [-5, 5],
        "white": 250,
        "gamma": [0.5, 2],
        "temperature": [-0.2, 0.2],
        "contrast": [0.5, 0.6],
        "brightness": [-20, -10],
        "hue": [-30, 30],
        "saturation": 0.0,
    }
    drawn = draws_of("color", section, 1000)
    for name, bounds in section.items():
        low, high = bounds if isinstance(bounds, list) else (bounds, bounds)
        assert all(low <= one[name] <= high for one in drawn)
    pairs = np.corrcoef([[one[name] for one in drawn] for name in ("black", "gamma", "hue")])
    assert np.abs(pairs - np.eye(3)).max() < 0.1


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"gamma": 0}, r"within 0\.1\.\.10"),
        ({"white": [100, 255]}, r"within 128\.\.511"),
        ({"black": [10, -10]}, "is not a range"),
        ({"temperature": 1}, r"within -0\.5\.\.0\.5"),
    ],
)
def test_bad_sections_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ColorSpec(**section)
