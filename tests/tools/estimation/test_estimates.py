"""Noise, blur, enlargement, levels, bars and interlacing of images with known ones."""

from __future__ import annotations

import functools

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset_corpus import encoded, wheel_photograph
from tools.crops.grid import halved
from tools.estimation import jpeg, levels, noise, sharpness


@functools.cache
def scene() -> np.ndarray:
    """A sharp photograph, uint8 RGB (200, 300, 3)."""
    return halved(wheel_photograph("coffee.png"))


def luma_of(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def with_noise(sigma: float) -> np.ndarray:
    """The photograph with the same white noise in all channels."""
    field = np.random.default_rng(0).normal(0, sigma, scene().shape[:2])
    return np.clip(np.rint(scene() + field[..., None]), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("sigma", [1.5, 4, 10, 20])
def test_white_noise(sigma: float) -> None:
    assert noise.white_noise(luma_of(with_noise(sigma))) == pytest.approx(sigma, rel=0.15)


def test_texture_is_no_noise() -> None:
    assert noise.white_noise(luma_of(scene())) < 1
    assert noise.white_noise(np.full((40, 40), 77, np.float32)) == 0


def test_noise_below_a_jpeg() -> None:
    for quality in (50, 75, 90):
        for sigma in (8.0, 15.0):
            data = encoded(with_noise(sigma), "jpeg", quality=quality)
            luma = luma_of(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))
            found, visible = noise.noise_below_jpeg(
                jpeg.block_dct(luma, (0, 0)), jpeg.table(quality)
            )
            assert visible < sigma
            assert found == pytest.approx(sigma, rel=0.2)
            if (quality, sigma) == (50, 8):  # the pixels themselves do not show it any more
                assert noise.white_noise(luma) < 0.7 * sigma


def test_noise_that_a_jpeg_hides_is_not_invented() -> None:
    data = encoded(scene(), "jpeg", quality=40)
    luma = luma_of(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))
    found, visible = noise.noise_below_jpeg(jpeg.block_dct(luma, (0, 0)), jpeg.table(40))
    assert found == 0
    assert 3 < visible < 8


@pytest.mark.parametrize("sigma", [0.0, 0.8, 1.4, 2.5, 4.0])
def test_blur(sigma: float) -> None:
    luma = luma_of(scene())
    if sigma:
        luma = cv2.GaussianBlur(luma, (0, 0), sigma)
    edge = sharpness.edge_sigma(luma)
    assert edge is not None
    assert sharpness.blur_sigma(edge) == pytest.approx(sigma, abs=0.35)


def test_edges_of_jpeg_blocks_do_not_count() -> None:
    data = encoded(cv2.GaussianBlur(scene(), (0, 0), 2), "jpeg", quality=30)
    luma = luma_of(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))
    assert sharpness.edge_sigma(luma, grid=(0, 0)) == pytest.approx(2, abs=0.3)


def test_no_edges_no_blur() -> None:
    assert sharpness.edge_sigma(np.full((80, 80), 9, np.float32)) is None


@pytest.mark.parametrize("factor", [1.5, 2, 2.5, 3, 4])
@pytest.mark.parametrize("kernel", ["BILINEAR", "BICUBIC", "NEAREST"])
def test_enlargement(factor: float, kernel: str) -> None:
    height, width = scene().shape[:2]
    image = Image.fromarray(scene())
    small = image.resize((round(width / factor), round(height / factor)), Image.Resampling.BOX)
    large = np.asarray(small.resize((width, height), Image.Resampling[kernel]))
    found = sharpness.find_enlargement(luma_of(large))
    assert found is not None
    assert found.factor == pytest.approx(factor, rel=0.02)
    assert found.is_repeated == (kernel == "NEAREST")


@pytest.mark.parametrize("factor", [1, 0.75, 0.67, 0.6])
def test_shrinking_is_no_enlargement(factor: float) -> None:
    photograph = wheel_photograph("coffee.png")
    shrunk = cv2.resize(photograph, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    assert sharpness.find_enlargement(luma_of(shrunk)) is None


def test_levels_in_use() -> None:
    assert levels.used_levels(scene()) == 256
    assert levels.used_levels(scene() // 8 * 8) == pytest.approx(32, abs=1)
    stretched = np.clip((scene().astype(int) - 40) * 255 // 180, 0, 255).astype(np.uint8)
    assert levels.used_levels(stretched) == pytest.approx(181, abs=2)
    assert levels.used_levels(scene()[:50, :50]) is None


def test_black_bars() -> None:
    luma = np.pad(luma_of(scene()), ((20, 24), (0, 9)))
    assert levels.black_bars(luma) == (20, 24, 0, 9)
    assert levels.black_bars(luma_of(scene())) == (0, 0, 0, 0)
    assert levels.black_bars(np.zeros((30, 30), np.float32)) == (0, 0, 0, 0)
    shadow = np.tile(np.arange(256, dtype=np.float32), (100, 1))
    assert levels.black_bars(shadow)[2] < 4


def test_interlaced_lines() -> None:
    luma = luma_of(scene())
    moved = luma.copy()
    moved[1::2] = np.roll(luma, 6, axis=1)[1::2]
    assert levels.combed_share(luma) < 0.02
    assert levels.combed_share(moved) > 0.1
