"""The step `interlace`: lines of two fields, against Keys' cubic in float64, and what it draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from conftest import photograph
from pipeline.data.degradations.steps.interlace import KINDS, InterlaceSpec
from steps import applied, check_kind, draws_of, moved, shares, unclipped


def drawn(kind: str, parity: int = 0) -> dict[str, Any]:
    moves = {"offset": [0.4, -3.3]} if kind in ("combing", "blend") else {}
    return {"kind": kind, "parity": parity, **moves}


def by_formula(image: np.ndarray, one: dict[str, Any]) -> np.ndarray:
    image = image.astype(np.float64)
    out, kind = image.copy(), one["kind"]
    for i in range(one["parity"], len(image), 2):
        above = image[i - 1 if i else 1]
        below = image[i + 1 if i + 1 < len(image) else i - 1]
        if kind == "bob":
            out[i] = (above + below) / 2
        elif kind == "line_doubling":
            out[i] = above
        else:
            out[i] = moved(image, one["offset"])[i]
    if kind != "blend":
        return out
    last = len(out) - 1
    lines = [(out[max(i - 1, 0)] + 2 * out[i] + out[min(i + 1, last)]) / 4 for i in range(last + 1)]
    return np.stack(lines)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parity", [0, 1])
def test_every_kind_is_the_formula(kind: str, parity: int) -> None:
    one = drawn(kind, parity)
    check_kind("interlace", one)
    for image in (photograph(3, 20, 19), unclipped(4, 13, 18)):
        np.testing.assert_allclose(
            applied("interlace", image, one), by_formula(image, one), atol=1e-2
        )


def test_draws_follow_shares_and_ranges() -> None:
    section = {"kind": {"combing": 3, "bob": 1}, "motion": [2, 5], "vertical_motion": [-1, 0]}
    drawn = draws_of("interlace", section, 2000)
    assert shares(drawn)["bob"] == pytest.approx(0.25, abs=0.04)
    assert shares(drawn, "parity")["1"] == pytest.approx(0.5, abs=0.04)
    offsets = np.array([one["offset"] for one in drawn if one["kind"] == "combing"])
    assert ((offsets[:, 0] >= -1) & (offsets[:, 0] <= 0)).all()
    assert ((np.abs(offsets[:, 1]) >= 2) & (np.abs(offsets[:, 1]) <= 5)).all()
    assert (offsets[:, 1] > 0).mean() == pytest.approx(0.5, abs=0.05)


def test_bad_sections_are_refused() -> None:
    with pytest.raises(ValidationError, match="no kind named 'comb'"):
        InterlaceSpec(kind="comb")
    with pytest.raises(ValidationError, match=r"within 0\.\.256"):
        InterlaceSpec(motion=[-3, 3])
