"""tools.crops.grid: positions of the crops."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_corpus import photograph
from tools.crops.grid import cover_grid, crop_grid, halved, pyramid

SIDES = st.integers(1, 300)
SIZES = st.integers(16, 64)
PINNED = [(14, 4), (14, 56), (14, 116), (65, 1), (65, 50), (65, 117)]


def _count(height, width, size, crops):
    """Count the crops that contain each pixel; fails if a crop extends beyond the edge."""
    counts = np.zeros((height, width), int)
    for crop in crops:
        assert crop.top >= 0
        assert crop.left >= 0
        window = counts[crop.top : crop.top + size, crop.left : crop.left + size]
        assert window.shape == (size, size)
        window += 1
    return counts


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIZES, st.text(max_size=5))
def test_jittered_grid_packs_without_overlap(height, width, size, key):
    crops = crop_grid(height, width, size, key)
    assert len(crops) == (height // size) * (width // size)
    assert _count(height, width, size, crops).max() <= 1
    assert len({(crop.row, crop.column) for crop in crops}) == len(crops)
    assert crops == crop_grid(height, width, size, key)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIZES)
def test_cover_grid_covers_with_the_fewest_crops(height, width, size):
    crops = cover_grid(height, width, size)
    if min(height, width) < size:
        assert crops == []
        return
    assert len(crops) == -(-height // size) * -(-width // size)
    assert _count(height, width, size, crops).min() == 1
    if len(crops) > 1 and height % size == 0 and width % size == 0:
        assert _count(height, width, size, crops).max() == 1


def test_gaps_reach_everywhere_and_depend_on_the_key():
    tops = {crop_grid(40, 32, 32, str(key))[0].top for key in range(300)}
    assert tops == set(range(9))
    assert crop_grid(500, 500, 64, "a") != crop_grid(500, 500, 64, "b")


def test_the_grid_never_changes():
    """Pinned, because datasets made on different days and machines must agree.

    See LAYOUT_VERSION in tools/crops/dataset.py.
    """
    assert [crop[2:] for crop in crop_grid(120, 170, 48, "0/1/kodak/1.png")] == PINNED


def test_halving_is_the_rounded_mean_of_four():
    pixels = photograph(41, 63)
    even = pixels[:40, :62].astype(int)
    mean = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2] + 2) // 4
    assert np.array_equal(halved(pixels), mean)


def test_pyramid_sizes():
    pixels = photograph(200, 330)
    assert [(scale, *reduced.shape[:2]) for scale, reduced in pyramid(pixels, 48, 1, None)] == [
        (1, 200, 330),
        (2, 100, 165),
        (4, 50, 82),
    ]
    assert [scale for scale, _ in pyramid(pixels, 48, 2, None)] == [2, 4]
    assert [scale for scale, _ in pyramid(pixels, 48, 2, 1)] == [2]
    assert list(pyramid(pixels, 201, 1, None)) == []
    assert np.array_equal(next(pyramid(pixels, 48, 4, None))[1], halved(halved(pixels)))
