from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fabricate import picture
from pipeline.metrics import METRICS, measure, psnr_ssim
from pipeline.metrics.psnr_ssim import luma, psnr, psnr_y, ssim

GAUSSIAN = {
    "gaussian_weights": True,
    "sigma": 1.5,
    "use_sample_covariance": False,
    "data_range": 255,
}


def as_tensor(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]


def pair(height, width, seed):
    hr = picture(height, width, seed)
    noise = np.random.default_rng(seed + 100).integers(-20, 21, hr.shape)
    return np.clip(hr.astype(int) + noise, 0, 255).astype(np.uint8), hr


def test_luma_is_matlabs():
    colours = np.array(
        [[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8
    )
    assert luma(as_tensor(colours), rounded=True).flatten().tolist() == [16, 235, 81, 145, 41]
    images = picture(40, 30)
    y = luma(as_tensor(images), rounded=False)
    assert (y.shape, y.dtype) == ((1, 1, 40, 30), torch.float64)
    np.testing.assert_allclose(y[0, 0].numpy(), rgb2ycbcr(images)[..., 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("height", "width", "border", "seed"), [(48, 64, 2, 0), (37, 41, 4, 1), (19, 60, 3, 2)]
)
def test_every_metric_equals_skimage(height, width, border, seed):
    sr, hr = pair(height, width, seed)
    found = measure(as_tensor(sr), as_tensor(hr), border)
    a, b = (image[border:-border, border:-border] for image in (sr, hr))
    a_y, b_y = (rgb2ycbcr(image)[..., 0] for image in (a, b))
    a_round, b_round = np.floor(a_y + 0.5), np.floor(b_y + 0.5)
    expected = {
        "psnr_y": peak_signal_noise_ratio(b_round, a_round, data_range=255),
        "ssim_y": structural_similarity(b_round, a_round, **GAUSSIAN),
        "psnr_y_float": peak_signal_noise_ratio(b_y, a_y, data_range=255),
        "ssim_y_float": structural_similarity(b_y, a_y, **GAUSSIAN),
        "psnr_rgb": peak_signal_noise_ratio(b, a, data_range=255),
        "ssim_rgb": structural_similarity(
            b.astype(float), a.astype(float), channel_axis=2, **GAUSSIAN
        ),
    }
    without_trunk = {name for name, metric in METRICS.items() if not metric.trunks}
    assert found.keys() == expected.keys() == without_trunk
    assert {name: abs(found[name] - expected[name]) < 1e-9 for name in found} == dict.fromkeys(
        found, True
    )
    assert found["psnr_y"] != found["psnr_y_float"]


def test_bands_do_not_change_psnr_y(monkeypatch):
    sr, hr = (as_tensor(pixels) for pixels in pair(301, 47, 3))
    whole = psnr(luma(sr, rounded=True), luma(hr, rounded=True))
    for band in (1, 64, 300, 1000):
        monkeypatch.setattr(psnr_ssim, "BAND", band)
        assert psnr_ssim.psnr_y(sr, hr) == whole


def test_psnr_in_numbers():
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(black, black + 255) == pytest.approx(0)
    assert psnr(black, black + 1) == pytest.approx(48.1308036, abs=1e-6)  # 20 log10 255


def test_equal_images_are_perfect_and_the_border_does_not_count():
    hr = as_tensor(picture(30, 30))
    sr = hr.clone()
    sr[..., :2, :] = 255 - sr[..., :2, :]
    perfect = {
        "psnr_y": math.inf,
        "ssim_y": 1,
        "psnr_y_float": math.inf,
        "ssim_y_float": 1,
        "psnr_rgb": math.inf,
        "ssim_rgb": 1,
    }
    assert measure(sr, hr, border=2) == pytest.approx(perfect)
    assert measure(sr, hr, border=1)["psnr_y"] < 40
    assert ssim(sr, hr) < 0.999


def test_what_cannot_be_measured_is_refused():
    image = as_tensor(picture(14, 40))
    with pytest.raises(
        ValueError,
        match=r"14x40 \(height x width\) less 2 pixels of border is smaller than the "
        "11x11 pixels that SSIM-Y needs",
    ):
        measure(image, image, border=2)
    for other in (image[..., :-1], image.float()):
        with pytest.raises(ValueError, match="uint8 or both uint16 RGB of the same shape"):
            measure(other, image, border=1)


def test_16_bits_are_measured_in_the_same_units():
    """8-bit pixels score the same in both types, but for the rounding of Y."""
    plain = [as_tensor(picture(40, 48, seed)) for seed in (0, 1)]
    deep = [(image.to(torch.int32) * 257).to(torch.uint16) for image in plain]
    before, after = measure(*plain, border=2), measure(*deep, border=2)
    for name, value in before.items():
        rounded = name in ("psnr_y", "ssim_y")
        assert after[name] == pytest.approx(value, rel=1e-2 if rounded else 1e-12), name
    with pytest.raises(ValueError, match="both uint16"):
        measure(plain[0], deep[1], border=2)


def test_psnr_y_of_16_bits_is_that_of_matlab_on_uint16():
    """MATLAB's rgb2ycbcr of uint16: Y is rounded to uint16; the peak is 65535."""
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 65536, (9, 300, 3)).astype(np.uint16) for _ in range(2))
    weights = np.array([65.481, 128.553, 24.966])
    y = [np.floor(image @ weights / 255 + 16 * 257 + 0.5) for image in (first, second)]
    expected = 10 * np.log10(65535**2 / np.square(y[0] - y[1]).mean())
    tensors = [torch.from_numpy(image).permute(2, 0, 1)[None] for image in (first, second)]
    assert psnr_y(*tensors) == pytest.approx(expected, abs=1e-6)
    one_off = tensors[0].clone()
    one_off[0, :, 0, 0] = torch.tensor([0, 0, 0], dtype=torch.uint16)
    tensors[0][0, :, 0, 0] = torch.tensor([1, 1, 1], dtype=torch.uint16)
    error = 1 / (9 * 300)  # Y differs by one step of 16 bits in one pixel
    assert psnr_y(tensors[0], one_off) == pytest.approx(10 * np.log10(65535**2 / error))
