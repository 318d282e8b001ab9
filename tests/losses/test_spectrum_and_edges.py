"""Focal frequency and Sobel losses against NumPy and SciPy, gradients by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate

from fabricate import picture
from pipeline.cli import UserError
from pipeline.losses import Criterion
from pipeline.losses.focal_frequency import FocalFrequency
from pipeline.losses.sobel import Sobel


def images(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return similar SR and HR, float64 NCHW in [0, 1]."""
    hr = np.stack([picture(height, width, seed) for seed in range(2)]).transpose(0, 3, 1, 2) / 255
    noise = np.random.default_rng(0).normal(0, 0.05, hr.shape)
    return np.clip(0.9 * hr + 0.02 + noise, 0, 1), hr


def focal_weights(difference: np.ndarray, alpha: float) -> np.ndarray:
    """Return the weight of each frequency of one plane."""
    weights = np.abs(np.fft.fft2(difference, norm="ortho")) ** alpha
    return weights / weights.max()


def patches(plane: np.ndarray, factor: int) -> list[np.ndarray]:
    return [part for row in np.split(plane, factor, 0) for part in np.split(row, factor, 1)]


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_focal_frequency_is_its_definition(alpha: float, factor: int) -> None:
    sr, hr = images(24, 30)
    values = [
        (focal_weights(part, alpha) * np.abs(np.fft.fft2(part, norm="ortho")) ** 2).mean()
        for plane in (sr - hr).reshape(-1, 24, 30)
        for part in patches(plane, factor)
    ]
    loss, expected = FocalFrequency(alpha, factor), np.mean(values)
    assert loss(torch.tensor(sr), torch.tensor(hr)).item() == pytest.approx(expected, rel=1e-9)
    single = loss(torch.tensor(sr).float(), torch.tensor(hr).float()).item()
    assert single == pytest.approx(expected, abs=1e-5, rel=1e-4)
    if alpha == 0:  # Parseval
        assert expected == pytest.approx(((sr - hr) ** 2).mean())


def test_focal_frequencys_weights_get_no_gradient() -> None:
    """The gradient is that of the weighted sum of squares with constant weights."""
    sr, hr = images(8, 10)
    found = torch.tensor(sr, requires_grad=True)
    FocalFrequency()(found, torch.tensor(hr)).backward()
    expected = np.empty_like(sr)
    for place in np.ndindex(sr.shape[:2]):
        weights = focal_weights((sr - hr)[place], 1)
        spectrum = np.fft.fft2((sr - hr)[place], norm="ortho")
        expected[place] = 2 * np.fft.ifft2(weights * spectrum, norm="ortho").real / sr.size
    np.testing.assert_allclose(found.grad, expected, atol=1e-12)


def test_focal_frequency_of_equal_images_is_0_with_a_gradient_of_0() -> None:
    hr = torch.rand(1, 3, 8, 8)
    sr = hr.clone().requires_grad_()
    loss = FocalFrequency()(sr, hr)
    loss.backward()
    assert loss.item() == 0
    assert (sr.grad == 0).all()


def sobel(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kernel = np.outer([1, 2, 1], [-1, 0, 1]) / 8
    return tuple(
        correlate(images, k[None, None], mode="nearest")[..., 1:-1, 1:-1]
        for k in (kernel.T, kernel)
    )


def test_sobel_is_its_definition() -> None:
    sr, hr = images(21, 34)
    first, second = sobel(sr), sobel(hr)
    vectors = np.sqrt(sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) + 1e-6)
    lengths = [np.sqrt(down**2 + across**2 + 1e-6) for down, across in (first, second)]
    magnitudes = np.abs(lengths[0] - lengths[1])
    for compare, expected in (("vectors", vectors.mean()), ("magnitudes", magnitudes.mean())):
        loss = Sobel(compare)
        assert loss(torch.tensor(sr), torch.tensor(hr)).item() == pytest.approx(expected, abs=1e-12)
        single = loss(torch.tensor(sr).float(), torch.tensor(hr).float()).item()
        assert single == pytest.approx(expected, abs=1e-5)


def test_sobel_measures_slopes_in_white_per_pixel() -> None:
    ramp = torch.linspace(0, 1, 33, dtype=torch.float64).expand(1, 3, 20, 33)
    flat = torch.zeros_like(ramp)
    assert Sobel()(ramp, flat).item() == pytest.approx(1 / 32, rel=1e-3)
    assert Sobel("magnitudes")(ramp, ramp.flip(-1)).item() == pytest.approx(0, abs=1e-12)
    assert Sobel()(ramp, ramp.flip(-1)).item() == pytest.approx(2 / 32, rel=1e-3)


@pytest.mark.parametrize("loss", [Sobel(), Sobel("magnitudes"), FocalFrequency(0, 2)])
def test_gradients(loss: torch.nn.Module) -> None:
    sr, hr = (
        torch.rand(2, 2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    assert torch.autograd.gradcheck(lambda x: loss(x, hr), (sr.requires_grad_(),))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"focal_frequency": {"weight": 1, "alpha": -1}}, "alpha -1 is not a number from 0 on"),
        ({"focal_frequency": {"weight": 1, "alpha": True}}, "alpha True is not a number"),
        ({"focal_frequency": {"weight": 1, "patch_factor": 0}}, "patch_factor 0 is not an integer"),
        ({"focal_frequency": {"weight": 1, "patch_factor": 2.0}}, "patch_factor 2.0 is not an"),
        ({"focal_frequency": {"weight": 1, "patches": 2}}, "has no parameter 'patches'"),
        ({"sobel": {"weight": 1, "compare": "l1"}}, "compare 'l1' is neither 'vectors' nor"),
    ],
)
def test_wrong_parameters_are_one_line(terms: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Criterion(terms)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_crop_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UserError, match="cannot divide a crop of 12x10 into 3x3 patches"):
        FocalFrequency(1, 3)(torch.rand(1, 3, 10, 12), torch.rand(1, 3, 10, 12))
