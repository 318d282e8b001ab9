"""The step `noise`: each kind against its formula in float64, and what it draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from conftest import photograph
from pipeline.data.degradations import noise
from pipeline.data.degradations.steps.noise import KINDS, NoiseSpec, perlin
from steps import applied, check_kind, draws_of, shares, unclipped

WORDS = [2**64 - 59, 5]
HEIGHT, WIDTH = 61, 70
GRAY_LEVEL = np.full((HEIGHT, WIDTH, 3), 127.5, np.float32)
FROM_YCC = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])  # BT.601
EXTRA: dict[str, dict[str, Any]] = {
    "salt_and_pepper": {"level": 0.1, "salt": 0.3},
    "perlin": {"feature_size": 9.3, "octaves": 3},
    "grain": {"grain_size": 0.8},
}


def drawn(kind: str, **others: Any) -> dict[str, Any]:
    basis = {"kind": kind, "level": 11.0, "gray": False, "words": WORDS}
    return basis | EXTRA.get(kind, {}) | others


def quantiles(channels: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """The upper 16 bits of the product of a row's and a column's word."""
    keys = noise.noise_keys((WORDS[0], WORDS[1]), height, width, channels)
    return (keys.rows * keys.columns) >> 16


def normal(channels: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.array(noise.normal_table())[quantiles(channels, height, width)]


def uniform(channels: int) -> np.ndarray:
    return ((quantiles(channels) + 0.5) / 65536 - 0.5) * math.sqrt(12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("others", [{"gray": False}, {"gray": True}])
def test_what_holds_for_every_kind(kind: str, others: dict[str, Any]) -> None:
    check_kind("noise", drawn(kind, **others))


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "perlin", "grain"])
def test_noise_in_luma_and_chroma_holds_too(kind: str) -> None:
    check_kind("noise", drawn(kind, space="ycc", chroma_level=5.0))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(("kind", "field"), [("gaussian", normal), ("uniform", uniform)])
def test_white_noise_is_a_table_of_the_words(kind: str, field: Any, channels: int) -> None:
    image = unclipped(3, HEIGHT, WIDTH)
    got = applied("noise", image, drawn(kind, gray=channels == 1))
    np.testing.assert_allclose(got, image + 11 * field(channels), atol=1e-3)


@pytest.mark.parametrize("channels", [3, 1])
def test_salt_and_pepper_replace_their_shares(channels: int) -> None:
    image = unclipped(3, HEIGHT, WIDTH)
    got = applied("noise", image, drawn("salt_and_pepper", gray=channels == 1))
    place = np.broadcast_to(quantiles(channels) / 65536, image.shape)
    np.testing.assert_array_equal(got, np.where(place < 0.03, 255, np.where(place < 0.1, 0, image)))
    assert (got == 255).mean() == pytest.approx(0.03, abs=0.01)
    assert (got == 0).mean() == pytest.approx(0.07, abs=0.015)


def perlin_by_formula(feature_size: float, octaves: int) -> np.ndarray:
    """One octave after another, pixel by pixel and corner by corner (Perlin 2002)."""
    random = np.random.Philox(key=np.array(WORDS, np.uint64))
    total, variance = np.zeros((13, 17, 3)), 0.0
    for octave in range(octaves):
        cell, amplitude = feature_size / 2**octave, 0.5**octave
        top, left = (int(word) / 2**64 for word in random.random_raw(2))
        rows = int(12.5 / cell + top) + 2
        columns = int(16.5 / cell + left) + 2
        words = random.random_raw(rows * columns * 3 // 8 + 1)
        turns = [word >> 8 * i & 255 for word in map(int, words) for i in range(8)]
        for i, j, channel in np.ndindex(13, 17, 3):
            y, x = (i + 0.5) / cell + top, (j + 0.5) / cell + left
            for row in (int(y), int(y) + 1):
                for column in (int(x), int(x) + 1):
                    angle = turns[(row * columns + column) * 3 + channel] * 2 * math.pi / 256
                    weight = 1.0
                    for distance in (abs(y - row), abs(x - column)):
                        t = 1 - distance
                        weight *= 6 * t**5 - 15 * t**4 + 10 * t**3
                    slope = math.sin(angle) * (y - row) + math.cos(angle) * (x - column)
                    total[i, j, channel] += amplitude * weight * slope
        variance += amplitude**2
    of_one_octave = (
        4 * (181 / 462) * (535 / 18018)
    )  # the integral of the squared weights and slopes
    return total / math.sqrt(variance * of_one_octave)


def test_perlin_noise_is_that_of_the_paper() -> None:
    got = perlin((WORDS[0], WORDS[1]), 13, 17, 3, 9.3, 3)  # cells of 9.3, 4.7 and 2.3 pixels
    np.testing.assert_allclose(got, perlin_by_formula(9.3, 3), atol=1e-5)
    # A fourth octave would have cells below 2 pixels.
    np.testing.assert_array_equal(got, perlin((WORDS[0], WORDS[1]), 13, 17, 3, 9.3, 4))


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "perlin", "grain"])
def test_level_is_the_standard_deviation(kind: str) -> None:
    image = np.full((500, 500, 3), 127.5, np.float32)
    got = applied("noise", image, drawn(kind, words=[3, 4])) - image
    assert got.mean() == pytest.approx(0, abs=0.5)
    assert got.std() == pytest.approx(11, rel=0.02)


def test_grain_is_smoothed_noise_that_fades_in_black_and_white() -> None:
    side, sigma = 3, 0.8
    taps = np.exp(-(np.arange(-side, side + 1) ** 2) / (2 * sigma**2))
    kernel = np.outer(taps, taps) / (taps.sum() ** 2)
    wide = normal(3, HEIGHT + 2 * side, WIDTH + 2 * side)
    z = sum(
        kernel[i, j] * wide[i : i + HEIGHT, j : j + WIDTH] for i, j in np.ndindex(kernel.shape)
    ) / np.sqrt((kernel**2).sum())
    for image in (GRAY_LEVEL, photograph(3, HEIGHT, WIDTH), unclipped(3, HEIGHT, WIDTH)):
        luma = (image @ np.array([0.299, 0.587, 0.114]) / 255).clip(0, 1)
        expected = image + 11 * 2 * np.sqrt(luma * (1 - luma))[..., None] * z
        np.testing.assert_allclose(applied("noise", image, drawn("grain")), expected, atol=1e-2)


def test_luma_and_chroma_have_strengths_of_their_own() -> None:
    image = unclipped(3, HEIGHT, WIDTH)
    got = applied("noise", image, drawn("gaussian", space="ycc", chroma_level=4.0))
    z = normal(3) * (11, 4, 4)
    np.testing.assert_allclose(got, image + z @ FROM_YCC.T, atol=1e-3)
    only_luma = applied("noise", image, drawn("uniform", space="ycc", chroma_level=0.0)) - image
    np.testing.assert_allclose(only_luma, only_luma[..., :1].repeat(3, -1), atol=1e-4)


def test_draws_follow_shares_and_ranges() -> None:
    section = {
        "kind": {"gaussian": 1, "perlin": 2, "salt_and_pepper": 1, "grain": 1},
        "space": {"rgb": 1, "ycc": 3},
        "sigma": [2, 7],
        "chroma_sigma": [8, 9],
        "feature_size": [4, 64],
        "octaves": [1, 3],
        "amount": 0.01,
    }
    drawn = draws_of("noise", section, 3000)
    assert shares(drawn)["perlin"] == pytest.approx(0.4, abs=0.03)
    by_kind = {
        kind: [one for one in drawn if one["kind"] == kind] for kind in NoiseSpec(**section).kind
    }
    assert shares(by_kind["gaussian"], "space")["ycc"] == pytest.approx(0.75, abs=0.05)
    assert all(2 <= one["level"] < 7 for one in by_kind["grain"] + by_kind["perlin"])
    assert all(8 <= one["chroma_level"] < 9 for one in drawn if one.get("space"))
    assert {one["level"] for one in by_kind["salt_and_pepper"]} == {0.01}
    assert not any("space" in one for one in by_kind["salt_and_pepper"])
    sizes = [one["feature_size"] for one in by_kind["perlin"]]
    assert min(sizes) >= 4 and max(sizes) < 64  # noqa: PT018
    assert np.median(sizes) == pytest.approx(16, rel=0.1)
    assert set(shares(by_kind["perlin"], "octaves")) == {"1", "2", "3"}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "perlinn"}, "did you mean 'perlin'"),
        ({"octaves": [0, 2]}, "within 1..8"),
        ({"feature_size": 1}, "within 2..1024"),
        ({"amount": [0, 1.5]}, "within 0..1"),
        ({"kind": "poisson", "space": "ycc"}, "poisson and salt_and_pepper need space rgb"),
    ],
)
def test_bad_sections_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        NoiseSpec(**section)
