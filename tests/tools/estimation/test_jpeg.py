"""Quality, block grid and chroma subsampling of JPEGs, from files and pixels; WebP quality."""

from __future__ import annotations

import functools

import cv2
import numpy as np
import pytest

from dataset_corpus import encoded, photograph, wheel_photograph
from tools.crops.grid import halved
from tools.estimation import chroma, jpeg, webp

SUBSAMPLINGS = {"444": 0, "422": 1, "420": 2}


@functools.cache
def scene() -> np.ndarray:
    """A photograph with details in all chroma samples, uint8 RGB (200, 300, 3)."""
    return halved(wheel_photograph("coffee.png"))


def planes(pixels: np.ndarray) -> list[np.ndarray]:
    """Y, Cb and Cr of BT.601, full range, Cb and Cr around 0, float32."""
    luma = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return [luma, (pixels[..., 2] - luma) / 1.772, (pixels[..., 0] - luma) / 1.402]


def resaved(quality: int, subsampling: str = "444") -> np.ndarray:
    """The photograph after JPEG, without its first 3 rows and 5 columns."""
    data = encoded(scene(), "jpeg", quality=quality, subsampling=SUBSAMPLINGS[subsampling])
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)[3:, 5:]


def test_the_quality_of_a_file_is_that_given_to_libjpeg() -> None:
    image = photograph(16, 16)
    for quality in range(1, 101):
        tables = jpeg.read_tables(encoded(image, "jpeg", quality=quality))
        assert tables is not None
        assert (tables.quality, tables.is_standard) == (quality, True)


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_a_file_states_its_subsampling(subsampling: str) -> None:
    data = encoded(photograph(32, 32), "jpeg", subsampling=SUBSAMPLINGS[subsampling])
    assert jpeg.read_tables(data).subsampling == subsampling


def test_the_quality_of_a_webp_file_is_that_given_to_libwebp() -> None:
    for quality in range(0, 101, 4):
        data = encoded(scene()[:96, :128], "webp", quality=quality)
        assert webp.quality_of(data) == pytest.approx(quality, abs=1)
    assert webp.quality_of(encoded(scene()[:32, :32], "webp", lossless=True)) is None
    assert webp.quality_of(data[:40]) is not None  # the header is enough
    assert webp.quality_of(data[:16]) is None
    assert webp.quality_of(b"") is None


def test_gray_files_and_tables_of_other_encoders() -> None:
    gray = jpeg.read_tables(encoded(photograph(16, 16)[..., 0], "jpeg", quality=70))
    assert (gray.quality, gray.is_standard, gray.subsampling) == (70, True, "gray")
    tables = [(jpeg.table(62, is_chroma=number == 1) + 1).ravel().tolist() for number in range(2)]
    other = jpeg.read_tables(encoded(photograph(16, 16), "jpeg", qtables=tables))
    assert other.is_standard is False
    assert abs(other.quality - 62) <= 2


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("quality", [50, 75, 95])
def test_saved_again_the_quality_grid_and_subsampling_are_found(
    quality: int, subsampling: str
) -> None:
    pixels = resaved(quality, subsampling)
    clipped = ((pixels == 0) | (pixels == 255)).any(axis=2)
    luma, blue, red = planes(pixels)
    trace = jpeg.find_trace(luma, clipped)
    assert trace is not None
    assert (trace.quality, trace.offset) == (quality, (5, 3))
    assert chroma.after_jpeg(blue, red, trace, clipped) == subsampling


def test_only_quality_100_leaves_no_trace() -> None:
    trace = jpeg.find_trace(planes(resaved(99))[0])
    assert (trace.quality, trace.offset) == (99, (5, 3))
    assert jpeg.find_trace(planes(resaved(100))[0]) is None


def test_without_jpeg_no_trace_is_found() -> None:
    assert jpeg.find_trace(planes(scene())[0]) is None
    rng = np.random.default_rng(0)
    assert jpeg.find_trace(rng.normal(128, 20, (200, 200)).astype(np.float32)) is None
    assert jpeg.find_trace(np.full((64, 64), 90, np.float32)) is None
    noisy = resaved(60) + rng.normal(0, 6, (197, 295, 1))
    assert jpeg.find_trace(planes(noisy)[0]) is None


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_subsampled_chroma_without_jpeg(axes: tuple[int, ...]) -> None:
    luma, *colors = planes(scene())
    height, width = luma.shape
    small = width // (2 if 1 in axes else 1), height // (2 if 0 in axes else 1)
    again = [
        cv2.resize(cv2.resize(plane, small, interpolation=cv2.INTER_AREA), (width, height))
        for plane in colors
    ]
    assert chroma.in_turns(*colors) == "444"
    assert chroma.in_turns(*again) == {(0,): "440", (1,): "422", (0, 1): "420"}[axes]
