"""The step `shift`: against Keys' cubic in float64, and what it draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from skimage.transform import AffineTransform, warp

from conftest import photograph
from pipeline.data.degradations.steps.shift import ShiftSpec
from steps import applied, check_kind, draws_of, moved, shares, unclipped

TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
KINDS: dict[str, dict[str, Any]] = {
    "image": {"offsets": [[0.3, -1.7]]},
    "channels": {"offsets": [[0.3, -1.7], [-0.5, 0.0]]},
    "chroma": {"offsets": [[0.0, 2.4]]},
    "radial": {"scales": [0.03, -0.02]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_holds_for_every_kind(kind: str) -> None:
    check_kind("shift", {"kind": kind} | KINDS[kind])


@pytest.mark.parametrize("image", [photograph(3, 30, 41), unclipped(4, 21, 38)])
@pytest.mark.parametrize("offset", [[0.3, -1.7], [0.0, 0.5], [-6.0, 0.0]])
def test_the_image_moves(image: np.ndarray, offset: list[float]) -> None:
    got = applied("shift", image, {"kind": "image", "offsets": [offset]})
    np.testing.assert_allclose(got, moved(image, offset), atol=1e-2)


def test_red_and_blue_move_separately() -> None:
    image = unclipped(4, 21, 38)
    got = applied("shift", image, {"kind": "channels"} | KINDS["channels"])
    np.testing.assert_allclose(got[..., 0], moved(image[..., 0], [0.3, -1.7]), atol=1e-2)
    np.testing.assert_array_equal(got[..., 1], image[..., 1])
    np.testing.assert_allclose(got[..., 2], moved(image[..., 2], [-0.5, 0.0]), atol=1e-2)


def test_chroma_moves_and_luma_stays() -> None:
    image = unclipped(4, 21, 38)
    got = applied("shift", image, {"kind": "chroma"} | KINDS["chroma"]) @ TO_YCC.T
    ycc = image @ TO_YCC.T
    np.testing.assert_allclose(got[..., 0], ycc[..., 0], atol=1e-2)
    np.testing.assert_allclose(got[..., 1:], moved(ycc[..., 1:], [0.0, 2.4]), atol=1e-2)


def test_red_and_blue_are_scaled_from_the_middle() -> None:
    # A smooth image, because scikit-image's cubic is another one.
    y, x = np.mgrid[:40, :51]
    image = (128 + 60 * np.sin(x / 7) * np.cos(y / 6))[..., None].repeat(3, -1)
    got = applied("shift", image.astype(np.float32), {"kind": "radial", "scales": [0.03, -0.02]})
    for channel, scale in ((0, 1.03), (1, 1), (2, 0.98)):
        middle = np.array([25.0, 19.5])
        place = AffineTransform(scale=scale, translation=middle * (1 - scale))
        expected = warp(image[..., channel], place.inverse, order=3, mode="edge")
        inside = (slice(3, -3), slice(3, -3))
        np.testing.assert_allclose(got[..., channel][inside], expected[inside], atol=0.2)


def test_draws_follow_shares_and_ranges() -> None:
    section = {
        "kind": {"image": 1, "channels": 2, "radial": 1},
        "distance": [1, 2],
        "angle": [0, 90],
        "scale": [-0.01, 0.01],
    }
    drawn = draws_of("shift", section, 2000)
    assert shares(drawn)["channels"] == pytest.approx(0.5, abs=0.04)
    for one in drawn:
        if one["kind"] == "radial":
            assert all(abs(scale) <= 0.01 for scale in one["scales"])
            assert len(one["scales"]) == 2
            continue
        assert len(one["offsets"]) == (2 if one["kind"] == "channels" else 1)
        for down, right in one["offsets"]:
            assert down >= 0
            assert right >= 0
            assert 1 <= math.hypot(down, right) <= 2 + 1e-9


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "chanels"}, "no kind named 'chanels'; did you mean 'channels'"),
        ({"distance": [-1, 1]}, r"within 0\.\.64"),
        ({"scale": 1.01}, r"within -0\.1\.\.0\.1"),
    ],
)
def test_bad_sections_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ShiftSpec(**section)
