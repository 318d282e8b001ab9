"""tools.crops.quality: flat crops and soft photographs are distinguished from ordinary ones."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset_photographs import blurred, crops, enlarged, photographs, recompressed, resized
from fabricate import shared
from tools.crops.quality import MIN_SHARPNESS, crop_gates, is_flat, is_soft, picture_gates

CUBIC, LINEAR, NEAREST, LANCZOS = (
    Image.Resampling.BICUBIC,
    Image.Resampling.BILINEAR,
    Image.Resampling.NEAREST,
    Image.Resampling.LANCZOS,
)
NAMES = sorted(photographs())


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_photographs_are_sharp(name):
    assert not is_soft(picture_gates(photographs()[name]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("factor", "kind"),
    [
        (2, CUBIC),
        (2, LINEAR),
        (2, LANCZOS),
        (3, CUBIC),
        (4, CUBIC),
        (1.5, NEAREST),
        (2, NEAREST),
        (4, NEAREST),
    ],
)
def test_enlarged_photographs_are_soft(name, factor, kind):
    pixels = enlarged(photographs()[name], factor, kind)
    assert is_soft(picture_gates(pixels))
    assert is_soft(picture_gates(np.ascontiguousarray(pixels.transpose(1, 0, 2))))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sigma", [1.5, 2, 3, 6, 20])
def test_blurred_photographs_are_soft(name, sigma):
    assert is_soft(picture_gates(blurred(photographs()[name], sigma)))


@pytest.mark.parametrize("name", NAMES)
def test_sharpness_does_not_depend_on_contrast(name):
    pixels = photographs()[name]
    faint = (pixels // 2 + 60).astype(np.uint8)
    assert not is_soft(picture_gates(faint))
    assert is_soft(picture_gates(enlarged(faint, 2)))


def test_a_sharp_subject_before_a_blurred_background_is_sharp():
    pixels = photographs()["chelsea.png"]
    height, width = pixels.shape[:2]
    soft = blurred(pixels, 4)
    soft[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = pixels[
        height // 4 : 3 * height // 4, width // 4 : 3 * width // 4
    ]
    assert not is_soft(picture_gates(soft))


def test_noise_does_not_hide_a_blurred_photograph():
    pixels = blurred(photographs()["china.jpg"], 2).astype(float)
    noisy = pixels + np.random.default_rng(0).normal(0, 2, (*pixels.shape[:2], 1))
    assert is_soft(picture_gates(np.clip(noisy, 0, 255).astype(np.uint8)))


def test_black_bars_neither_hide_nor_make_softness():
    pixels = photographs()["coffee.png"]
    bars = ((60, 60), (80, 80), (0, 0))
    assert not is_soft(picture_gates(np.pad(pixels, bars)))
    assert is_soft(picture_gates(np.pad(enlarged(pixels, 2), bars)))


def test_crops_of_enlarged_photographs_are_soft():
    gates = [
        crop_gates(crop)
        for name in NAMES
        if name != "retina.jpg"  # enlarged crops of it are nearly flat
        for crop in crops(enlarged(photographs()[name], 2), 128)
    ]
    busy = [gate for gate in gates if not is_flat(gate)]
    assert len(busy) > 30
    assert all(is_soft(gate, name="sharpness") for gate in busy)


def test_the_threshold_is_an_argument():
    gates = picture_gates(photographs()["coffee.png"])
    assert is_soft(gates, gates["source_sharpness"] + 0.01)
    assert not is_soft(gates, gates["source_sharpness"])
    crop = crop_gates(photographs()["coffee.png"])
    assert is_flat(crop, crop["gradient"] + 0.01)
    assert not is_flat(crop, crop["gradient"])


def _sky(noise: float) -> np.ndarray:
    ramp = np.linspace(150, 220, 256)[:, None, None] + np.zeros((1, 256, 3))
    return np.clip(ramp + np.random.default_rng(1).normal(0, noise, (256, 256, 1)), 0, 255).astype(
        np.uint8
    )


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((128, 128, 3), np.uint8), np.full((512, 512, 3), 255, np.uint8), _sky(0), _sky(0.5)],
    ids=["black", "white", "sky", "hazy sky"],
)
def test_flat_crops_are_flat(pixels):
    gates = crop_gates(pixels)
    assert is_flat(gates)
    assert picture_gates(pixels)["source_sharpness"] < MIN_SHARPNESS


def test_ordinary_crops_are_not_flat():
    gates = [crop_gates(crop) for crop in crops(photographs()["china.jpg"], 128)]
    assert sum(map(is_flat, gates)) <= 1
    assert not any(is_flat(crop_gates(crop)) for crop in crops(photographs()["chelsea.png"], 128))


def test_gradient_and_entropy_are_what_they_say():
    ramp = np.arange(64, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    gates = crop_gates(np.ascontiguousarray(ramp))
    assert gates["gradient"] == pytest.approx(1, rel=0.04)
    assert gates["entropy"] == 6  # 64 gray levels, equally frequent
    diagonal = crop_gates(np.ascontiguousarray(ramp + ramp.transpose(1, 0, 2)))
    assert diagonal["gradient"] == pytest.approx(2**0.5, rel=0.04)
    assert crop_gates(np.zeros((64, 64, 3), np.uint8))["entropy"] == 0


@pytest.mark.parametrize(
    "shape", [(8, 8), (9, 31), (33, 64), (65, 67), (128, 64), (301, 77), (1, 300)]
)
def test_any_size_gives_finite_numbers_that_json_holds(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    if min(shape) < 8:
        with pytest.raises(ValueError, match="8 pixels"):
            crop_gates(pixels)
        return
    gates = {**crop_gates(pixels), **picture_gates(pixels)}
    assert json.loads(json.dumps(gates, allow_nan=False)) == gates
    assert all(len(f"{value:.4g}") <= 9 for value in gates.values() if isinstance(value, float))
    assert {name for name, value in gates.items() if isinstance(value, str)} == {
        "hash",
        "source_hash",
    }
    assert gates == {**crop_gates(pixels.copy()), **picture_gates(pixels.copy())}


def test_benchmark_photographs_pass_and_their_enlargements_do_not():
    paths = (
        sorted(shared("data/kodak").glob("*.png"))
        + sorted(shared("data/sunhays80").glob("*.png"))[::4]
    )
    pictures = [cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) for path in paths]
    assert not any(is_soft(picture_gates(pixels)) for pixels in pictures)
    for change in (
        lambda p: enlarged(p, 2),
        lambda p: recompressed(enlarged(p, 2), 85),
        lambda p: blurred(p, 1.5),
    ):
        assert all(is_soft(picture_gates(change(pixels))) for pixels in pictures[::3])


def test_reducing_a_soft_photograph_makes_it_sharp_again():
    soft = enlarged(photographs()["coffee.png"], 2)
    assert is_soft(picture_gates(soft))
    assert not is_soft(picture_gates(resized(soft, 0.5)))
