"""The step `scanlines`: against a sine wave in float64, and what it draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from conftest import photograph
from pipeline.data.degradations.steps.scanlines import ScanlinesSpec
from steps import applied, check_kind, draws_of, unclipped


@pytest.mark.parametrize(("strength", "period", "phase"), [(0.4, 3.7, 0.2), (1.0, 2.0, 0.0)])
def test_rows_are_darkened_by_a_sine_wave(strength: float, period: float, phase: float) -> None:
    one = {"strength": strength, "period": period, "phase": phase}
    check_kind("scanlines", one)
    for image in (photograph(3, 20, 31), unclipped(4, 13, 18)):
        got = applied("scanlines", image, one)
        for i, row in enumerate(image.astype(np.float64)):
            darker = strength * (1 - math.cos(2 * math.pi * (i / period + phase))) / 2
            np.testing.assert_allclose(got[i], row * (1 - darker), atol=1e-3)


def test_draws_are_within_their_ranges() -> None:
    drawn = draws_of("scanlines", {"strength": [0.1, 0.2], "period": [3, 4]}, 300)
    assert all(0.1 <= one["strength"] < 0.2 and 3 <= one["period"] < 4 for one in drawn)
    assert np.ptp([one["phase"] for one in drawn]) > 0.9


def test_bad_ranges_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"within 2\.\.256"):
        ScanlinesSpec(period=1)
    with pytest.raises(ValidationError, match=r"within 0\.\.1"):
        ScanlinesSpec(strength=[0, 2])
