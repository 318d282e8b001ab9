"""The steps `halo` and `ringing`, against their formulas, and what they draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import ndimage

from conftest import photograph
from pipeline.data.degradations.steps.halo import HaloSpec
from pipeline.data.degradations.steps.ringing import RingingSpec
from steps import applied, check_kind, draws_of, shares, unclipped

IMAGES = (photograph(3, 61, 47), unclipped(2, 40, 53))
HALO = {
    "kind": "both", "radius": 4.0, "amount": 1.5, "threshold": 5.0, "luma": False,
    "horizontal": False,
}  # fmt: skip
HALOS = [
    HALO,
    {**HALO, "kind": "bright", "luma": True},
    {**HALO, "kind": "dark", "horizontal": True},
    {**HALO, "overshoot": 6.0},
    {**HALO, "overshoot": 0.0, "luma": True, "horizontal": True},
]
RINGINGS = [
    {"kind": "horizontal", "cutoff": 1.3, "lobes": 5},
    {"kind": "both", "cutoff": 2.0, "lobes": 3},
]


def edge(height: int = 20, width: int = 60) -> np.ndarray:
    """Return an image of 60 on the left and 180 on the right."""
    image = np.full((height, width, 3), 60, np.uint8)
    image[:, width // 2 :] = 180
    return image


@pytest.mark.parametrize("drawn", HALOS)
def test_a_halo_is_its_formula(drawn: dict[str, object]) -> None:
    axes = (1,) if drawn["horizontal"] else (0, 1)
    for image in IMAGES:
        floats = image.astype(np.float64)
        lines = floats - ndimage.gaussian_filter(floats, 2.0, mode="mirror", axes=axes)
        if drawn["luma"]:
            lines = np.repeat(lines @ np.array([[0.299], [0.587], [0.114]]), 3, axis=2)
        lines = np.sign(lines) * np.maximum(np.abs(lines) - 5, 0)
        if drawn["kind"] == "bright":
            lines = np.maximum(lines, 0)
        if drawn["kind"] == "dark":
            lines = np.minimum(lines, 0)
        expected = floats + 1.5 * lines
        if "overshoot" in drawn:
            size = (1 if drawn["horizontal"] else 9, 9, 1)
            low, high = ndimage.minimum_filter(floats, size), ndimage.maximum_filter(floats, size)
            expected = np.clip(expected, low - drawn["overshoot"], high + drawn["overshoot"])
        assert np.abs(applied("halo", image, drawn) - expected).max() < 1


def test_lines_are_on_their_sides_of_an_edge() -> None:
    row = applied("halo", edge(), HALO)[10, :, 0]
    assert row[30:33].min() > 185
    assert row[27:30].max() < 55
    bright = applied("halo", edge(), {**HALO, "kind": "bright"})[10, :, 0]
    assert bright.min() == 60
    assert bright.max() > 200
    dark = applied("halo", edge(), {**HALO, "kind": "dark"})[10, :, 0]
    assert dark.max() == 180
    assert dark.min() < 40
    limited = applied("halo", edge(), {**HALO, "overshoot": 8.0})[10, :, 0]
    assert (limited.min(), limited.max()) == (52, 188)
    # Far from the edge and where edges are weaker than the threshold, nothing changes.
    assert (row[:18] == 60).all()
    assert (row[42:] == 180).all()
    faint = edge() // 60 * 3 + 100
    assert (applied("halo", faint, HALO) == faint).all()
    # A horizontal edge has no lines if only rows are sharpened.
    turned = np.ascontiguousarray(edge(60, 60).transpose(1, 0, 2))
    assert np.abs(applied("halo", turned, {**HALO, "horizontal": True}) - turned).max() < 1e-3


@pytest.mark.parametrize("drawn", RINGINGS)
def test_ringing_is_a_truncated_sinc(drawn: dict[str, object]) -> None:
    places = np.arange(-60, 61)
    line = np.sinc(drawn["cutoff"] * places / math.pi)
    line[np.abs(places) * drawn["cutoff"] >= drawn["lobes"] * math.pi] = 0
    line /= line.sum()
    for image in IMAGES:
        expected = image.astype(np.float64)
        for axis in (0, 1) if drawn["kind"] == "both" else (1,):
            expected = ndimage.correlate1d(expected, line, axis, mode="mirror")
        assert np.abs(applied("ringing", image, drawn) - expected).max() < 1


def test_ripples_follow_an_edge() -> None:
    """As many as were asked for, half a period of the cutoff apart, the first as Gibbs says."""
    image, cutoff = edge(12, 160), 1.0
    row = applied("ringing", image, {"kind": "horizontal", "cutoff": cutoff, "lobes": 6})[6, :, 0]
    assert 0.06 < (row.max() - 180) / 120 < 0.12
    ripples = np.flatnonzero(np.diff(np.sign(np.diff(row[80:110]))))
    assert 5 <= len(ripples) <= 6
    assert np.diff(ripples).mean() == pytest.approx(math.pi / cutoff, abs=0.5)
    assert np.abs(row[110:] - 180).max() < 1e-3
    # An image below the cutoff passes.
    wave = 128 + 60 * np.cos(0.4 * np.arange(160, dtype=np.float32))
    smooth = np.ascontiguousarray(np.broadcast_to(wave[None, :, None], (12, 160, 3)))
    got = applied("ringing", smooth, {"kind": "both", "cutoff": 1.6, "lobes": 12})
    assert np.abs(got - smooth)[:, 30:130].max() < 4


@pytest.mark.parametrize("drawn", HALOS)
def test_every_halo_holds_for_any_image(drawn: dict[str, object]) -> None:
    check_kind("halo", drawn)


@pytest.mark.parametrize("drawn", RINGINGS)
def test_every_ringing_holds_for_any_image(drawn: dict[str, object]) -> None:
    check_kind("ringing", drawn)


def test_draws_are_in_their_ranges() -> None:
    section = {"kind": {"bright": 3, "dark": 1}, "luma": 0.2, "horizontal": 0.6, "amount": [1, 2]}
    drawn = draws_of("halo", section, 2000)
    assert abs(shares(drawn)["dark"] - 0.25) < 0.03
    assert abs(shares(drawn, "luma")["True"] - 0.2) < 0.03
    assert abs(shares(drawn, "horizontal")["True"] - 0.6) < 0.04
    assert all(
        1 <= one["amount"] < 2
        and 2 <= one["radius"] < 5
        and 4 <= one["threshold"] < 12
        and "overshoot" not in one
        for one in drawn
    )
    drawn = draws_of("halo", {"overshoot": [2, 9]}, 50)
    assert all(2 <= one["overshoot"] < 9 for one in drawn)
    drawn = draws_of("ringing", {"lobes": [2, 4], "cutoff": [2, 3.1416]}, 500)
    assert shares(drawn, "lobes").keys() == {"2", "3", "4"}
    assert abs(shares(drawn)["both"] - 0.5) < 0.06
    assert all(2 <= one["cutoff"] <= math.pi for one in drawn)


@pytest.mark.parametrize(
    ("spec", "section", "words"),
    [
        (HaloSpec, {"kind": "white"}, "no kind named 'white'; choose from both, bright, dark"),
        (HaloSpec, {"radius": 40}, "within 0.5..30"),
        (RingingSpec, {"kind": "vertical"}, "no kind named 'vertical'"),
        (RingingSpec, {"cutoff": 4}, "within 0.1..3.1416"),
        (RingingSpec, {"lobes": 0}, "within 1..16"),
    ],
)
def test_bad_sections_are_refused(spec: type, section: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        spec.model_validate(section)
    assert words in str(refused.value)
