"""The step `banding`: against formulas in float64, and what it draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from conftest import photograph
from pipeline.data.degradations.steps.banding import BandingSpec
from steps import applied, check_kind, draws_of, shares, unclipped


@pytest.mark.parametrize("kind", ["rgb", "luma"])
def test_what_holds_for_every_kind(kind: str) -> None:
    check_kind("banding", {"kind": kind, "levels": 11})


@pytest.mark.parametrize("count", [2, 9, 64, 1024])
@pytest.mark.parametrize("image", [photograph(3, 30, 41), unclipped(4, 21, 38)])
def test_levels_are_the_nearest_of_equally_spaced_ones(image: np.ndarray, count: int) -> None:
    steps = (count - 1) / 255
    got = applied("banding", image, {"kind": "rgb", "levels": count})
    nearest = np.round(image.clip(0, 255).astype(np.float64) * steps) / steps
    np.testing.assert_allclose(got, nearest, atol=1e-3)
    assert len(np.unique(got)) <= count


@pytest.mark.parametrize("image", [photograph(3, 30, 41), unclipped(4, 21, 38)])
def test_only_luma_is_quantised(image: np.ndarray) -> None:
    got = applied("banding", image, {"kind": "luma", "levels": 9}).astype(np.float64)
    weights, step = np.array([0.299, 0.587, 0.114]), 255 / 8
    luma = got @ weights
    np.testing.assert_allclose(luma, np.round(luma / step) * step, atol=1e-3)
    assert np.abs(luma - (image @ weights).clip(0, 255)).max() <= step / 2 + 1e-3
    # The differences between channels are chroma.
    np.testing.assert_allclose(np.diff(got), np.diff(image.astype(np.float64)), atol=1e-3)


def test_draws_follow_shares_and_ranges() -> None:
    drawn = draws_of("banding", {"kind": {"rgb": 1, "luma": 3}, "levels": [4, 64]}, 2000)
    assert shares(drawn)["luma"] == pytest.approx(0.75, abs=0.04)
    levels = [one["levels"] for one in drawn]
    assert (min(levels), max(levels)) == (4, 64)
    assert np.median(levels) == pytest.approx(16, abs=2)
    drawn = draws_of("banding", {"bits": [4, 6]}, 300)
    assert set(shares(drawn, "levels")) == {"16", "32", "64"}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"levels": [1, 4]}, r"within 2\.\.65536"),
        ({"bits": 0}, r"within 1\.\.16"),
        ({"bits": 5, "levels": 32}, "levels or bits, not both"),
    ],
)
def test_bad_sections_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        BandingSpec(**section)
