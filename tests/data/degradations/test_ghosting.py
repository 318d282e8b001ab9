"""The step `ghosting`: against Keys' cubic in float64, and what it draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from conftest import photograph
from pipeline.data.degradations.steps.ghosting import GhostingSpec
from steps import applied, check_kind, draws_of, moved, shares, unclipped


@pytest.mark.parametrize(
    ("kind", "strength", "offset"),
    [("echo", 0.3, [0.0, 7.4]), ("echo", -0.2, [0.0, 12.0]), ("blend", 0.5, [-1.3, 2.2])],
)
def test_a_share_is_the_copys(kind: str, strength: float, offset: list[float]) -> None:
    one = {"kind": kind, "strength": strength, "offset": offset}
    check_kind("ghosting", one)
    for image in (photograph(3, 20, 31), unclipped(4, 13, 18)):
        expected = (1 - strength) * image.astype(np.float64) + strength * moved(image, offset)
        np.testing.assert_allclose(applied("ghosting", image, one), expected, atol=1e-2)


def test_draws_follow_shares_and_ranges() -> None:
    section = {
        "kind": {"echo": 3, "blend": 1},
        "strength": [0.2, 0.3],
        "distance": [2, 5],
        "angle": [-90, 0],
        "negative": 0.25,
    }
    drawn = draws_of("ghosting", section, 2000)
    assert shares(drawn)["blend"] == pytest.approx(0.25, abs=0.04)
    for one in drawn:
        down, right = one["offset"]
        assert 0.2 <= abs(one["strength"]) < 0.3
        assert 2 <= math.hypot(down, right) <= 5 + 1e-9
        assert right >= 0
        assert down == 0 if one["kind"] == "echo" else down <= 0
    signs = [one["strength"] < 0 for one in drawn if one["kind"] == "echo"]
    assert np.mean(signs) == pytest.approx(0.25, abs=0.04)
    assert not any(one["strength"] < 0 for one in drawn if one["kind"] == "blend")


def test_bad_sections_are_refused() -> None:
    with pytest.raises(ValidationError, match="no kind named 'eco'"):
        GhostingSpec(kind="eco")
    with pytest.raises(ValidationError, match=r"within 0\.\.1"):
        GhostingSpec(strength=1.2)
