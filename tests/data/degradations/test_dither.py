"""The step `dither`: error diffusion written out, Pillow's palettes, Bayer's matrices; draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
from pydantic import ValidationError

from conftest import photograph
from pipeline.data.degradations.steps.dither import DIFFUSIONS, KINDS, DitherSpec
from steps import applied, check_kind, draws_of, shares, unclipped

IMAGE = photograph(3, 41, 46)
BAYER_4 = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])
# (rows down, columns to the right, weight)
WEIGHTS = {
    "floyd_steinberg": (16, [(0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)]),
    "atkinson": (8, [(0, 1, 1), (0, 2, 1), (1, -1, 1), (1, 0, 1), (1, 1, 1), (2, 0, 1)]),
    "burkes": (
        32,
        [(0, 1, 8), (0, 2, 4), (1, -2, 2), (1, -1, 4), (1, 0, 8), (1, 1, 4), (1, 2, 2)],
    ),
    "sierra_lite": (4, [(0, 1, 2), (1, -1, 1), (1, 0, 1)]),
}


def drawn(kind: str, palette: str = "uniform", count: int = 4, matrix: int = 4) -> dict[str, Any]:
    one: dict[str, Any] = {"kind": kind, "palette": palette}
    one |= {"levels": count} if palette == "uniform" else {"colors": count}
    return one | ({"matrix": matrix} if kind == "ordered" else {})


def values(count: int) -> np.ndarray:
    return np.rint(np.arange(count) * 255 / (count - 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("palette", ["uniform", "median_cut", "octree"])
def test_what_holds_for_every_kind(kind: str, palette: str) -> None:
    check_kind("dither", drawn(kind, palette, 5))
    got = applied("dither", unclipped(3, 33, 41), drawn(kind, palette, 7))
    assert got.dtype == np.uint8
    if palette == "uniform":
        assert set(np.unique(got)) <= set(values(7))
    else:
        assert len(np.unique(got.reshape(-1, 3), axis=0)) <= 7


@pytest.mark.parametrize("count", [2, 3, 8, 256])
def test_ordered_dithering_compares_with_bayers_matrix(count: int) -> None:
    tiled = np.tile((BAYER_4 + 0.5) / 16, (11, 12))[:41, :46, None]
    place = np.floor(IMAGE.astype(float) * (count - 1) / 255 + tiled).astype(int)
    np.testing.assert_array_equal(
        applied("dither", IMAGE, drawn("ordered", count=count)), values(count)[place]
    )


@pytest.mark.parametrize("matrix", [2, 4, 8])
def test_a_gray_field_has_as_many_bright_pixels_as_it_is_bright(matrix: int) -> None:
    for share in range(matrix**2 + 1):
        field = np.full((16, 24, 3), 255 * share / matrix**2).round().astype(np.uint8)
        got = applied("dither", field, drawn("ordered", count=2, matrix=matrix))
        assert (got == 255).mean() == share / matrix**2


def diffused(plane: np.ndarray, nearest: np.ndarray, kind: str) -> np.ndarray:
    """Diffuse errors from left to right, row by row, in whole levels, as ffmpeg does."""
    (divisor, weights), work = WEIGHTS[kind], plane.astype(int)
    out = np.zeros_like(plane)
    for y, x in np.ndindex(plane.shape):
        out[y, x] = nearest[work[y, x]]
        error = work[y, x] - int(out[y, x])
        for down, right, weight in weights:
            row, column = y + down, x + right
            if row < len(plane) and 0 <= column < plane.shape[1]:
                part = int(error * weight / divisor)
                work[row, column] = min(255, max(0, work[row, column] + part))
    return out


@pytest.mark.parametrize("kind", DIFFUSIONS)
@pytest.mark.parametrize("count", [5])
def test_errors_are_diffused_as_published(kind: str, count: int) -> None:
    # The filter chooses the nearest color as people see it (Oklab), so take its choice as given: of
    # single pixels, whose errors reach no others.
    nearest = [
        applied("dither", np.full((1, 1, 3), level, np.uint8), drawn(kind, count=count))[0, 0, 0]
        for level in range(256)
    ]
    assert set(nearest) == set(values(count))
    got = applied("dither", IMAGE, drawn(kind, count=count))
    for channel in range(3):
        expected = diffused(IMAGE[..., channel], np.array(nearest), kind)
        np.testing.assert_array_equal(got[..., channel], expected)


@pytest.mark.parametrize("kind", ["ordered", "floyd_steinberg", "burkes", "sierra_lite"])
def test_local_means_are_kept(kind: str) -> None:
    image = np.zeros((64, 64, 3), np.uint8) + np.linspace(20, 235, 64).astype(np.uint8)[:, None]
    got = applied("dither", image, drawn(kind, count=3, matrix=8))
    for block in np.ndindex(4, 4):
        rows, columns = (slice(16 * i, 16 * i + 16) for i in block)
        assert got[rows, columns].mean() == pytest.approx(image[rows, columns].mean(), abs=6)


def test_floyd_and_steinbergs_weights_are_used() -> None:
    # Between two levels, the pattern is that of the formula in float64 where the errors are exact.
    plane = np.full((5, 6), 96, np.uint8)
    got = applied("dither", plane[..., None].repeat(3, -1), drawn("floyd_steinberg", count=2))
    work, expected = plane.astype(float), np.zeros_like(plane)
    for y, x in np.ndindex(plane.shape):
        expected[y, x] = 255 * (work[y, x] >= 128)
        for down, right, weight in WEIGHTS["floyd_steinberg"][1]:
            if y + down < 5 and 0 <= x + right < 6:
                work[y + down, x + right] += (work[y, x] - expected[y, x]) * weight / 16
    np.testing.assert_array_equal(got[..., 0], expected)


@pytest.mark.parametrize(
    ("palette", "method"),
    [("median_cut", PIL.Image.Quantize.MEDIANCUT), ("octree", PIL.Image.Quantize.FASTOCTREE)],
)
def test_palettes_and_floyd_steinberg_are_pillows(palette: str, method: Any) -> None:
    indexed = PIL.Image.fromarray(IMAGE).quantize(12, method)
    for kind, dither in (("floyd_steinberg", 3), ("none", 0)):
        expected = PIL.Image.fromarray(IMAGE).quantize(palette=indexed, dither=dither)
        got = applied("dither", IMAGE, drawn(kind, palette, 12))
        np.testing.assert_array_equal(got, np.asarray(expected.convert("RGB")))


def test_median_cut_takes_every_nth_pixel_of_large_images() -> None:
    image = photograph(3, 130, 97)  # more than 4096 pixels
    few = np.ascontiguousarray(image[::2, ::2])
    indexed = PIL.Image.fromarray(few).quantize(12, PIL.Image.Quantize.MEDIANCUT)
    expected = PIL.Image.fromarray(image).quantize(palette=indexed, dither=3)
    got = applied("dither", image, drawn("floyd_steinberg", "median_cut", 12))
    np.testing.assert_array_equal(got, np.asarray(expected.convert("RGB")))


def test_ordered_dithering_to_a_palette_takes_the_nearest_color_of_the_shifted_pixel() -> None:
    palette = np.array(PIL.Image.fromarray(IMAGE).quantize(12, 0).getpalette()).reshape(-1, 3)
    tiled = np.tile((BAYER_4 + 0.5) / 16, (11, 12))[:41, :46, None]
    shifted = (IMAGE + 255 / 12 ** (1 / 3) * (tiled - 0.5)).round().clip(0, 255)
    got = applied("dither", IMAGE, drawn("ordered", "median_cut", 12))
    distances = np.linalg.norm(shifted[:, :, None] - palette, axis=-1)
    # Pillow looks colors up by their upper 6 bits.
    assert (np.linalg.norm(shifted - got, axis=-1) <= distances.min(-1) + 2 * 4 * 3**0.5).all()
    assert (palette[distances.argmin(-1)] == got).all(-1).mean() > 0.9


def test_draws_follow_shares_and_ranges() -> None:
    section = {
        "kind": {"ordered": 1, "atkinson": 3},
        "palette": {"uniform": 1, "octree": 1},
        "matrix": 2,
        "levels": [2, 5],
        "colors": [4, 64],
    }
    drawn = draws_of("dither", section, 2000)
    assert shares(drawn)["ordered"] == pytest.approx(0.25, abs=0.04)
    assert shares(drawn, "matrix")["2"] == pytest.approx(0.25, abs=0.04)
    levels = [one for one in drawn if one["palette"] == "uniform"]
    assert shares(levels, "levels") == pytest.approx(dict.fromkeys("2345", 0.25), abs=0.05)
    colors = [one["colors"] for one in drawn if one["palette"] == "octree"]
    assert (min(colors), max(colors)) == (4, 64)
    assert np.median(colors) == pytest.approx(16, abs=2)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "floyd"}, "no kind named 'floyd'"),
        ({"colors": 512}, r"within 2\.\.256"),
        ({"levels": [1, 4]}, r"within 2\.\.256"),
        ({"matrix": 3}, "no kind named '3'; choose from 2, 4, 8"),
    ],
)
def test_bad_sections_are_refused(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DitherSpec(**section)
