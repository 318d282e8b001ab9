"""The step `pixelate`: against means of blocks in float64, OpenCV's area, and what it draws."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from conftest import photograph
from pipeline.data.degradations.steps.pixelate import PixelateSpec
from steps import applied, check_kind, draws_of, shares, unclipped


@pytest.mark.parametrize(("block", "offset"), [(1, [0, 0]), (3, [2, 0]), (8, [7, 3]), (50, [0, 9])])
def test_blocks_are_means(block: int, offset: list[int]) -> None:
    check_kind("pixelate", {"block": block, "offset": offset})
    for image in (photograph(3, 21, 38), unclipped(4, 30, 17)):
        rows, columns = (
            (np.arange(length) + start) // block
            for length, start in zip(image.shape[:2], offset, strict=True)
        )
        expected = np.zeros(image.shape)
        for row in set(rows):
            for column in set(columns):
                inside = np.ix_(rows == row, columns == column)
                expected[inside] = image[inside].astype(np.float64).mean((0, 1))
        got = applied("pixelate", image, {"block": block, "offset": offset})
        np.testing.assert_allclose(got, expected, atol=1e-2)


def test_whole_blocks_are_opencvs_area() -> None:
    image = photograph(3, 24, 40).astype(np.float32)
    small = cv2.resize(image, (10, 6), interpolation=cv2.INTER_AREA)
    got = applied("pixelate", image, {"block": 4, "offset": [0, 0]})
    np.testing.assert_allclose(got, small.repeat(4, 0).repeat(4, 1), atol=1e-2)


def test_draws_are_integers_within_their_ranges() -> None:
    drawn = draws_of("pixelate", {"block": [2, 4]}, 1500)
    assert shares(drawn, "block") == pytest.approx(dict.fromkeys("234", 1 / 3), abs=0.05)
    assert {tuple(one["offset"]) for one in drawn if one["block"] == 2} == {
        (i, j) for i in (0, 1) for j in (0, 1)
    }


def test_a_bad_block_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"within 1\.\.256"):
        PixelateSpec(block=[0, 4])
