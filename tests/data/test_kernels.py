"""Blur kernels: their shapes and spectra, and their application by DALI."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from conftest import photograph
from pipeline.data.degradations.kernels import (
    delta_kernel,
    gaussian_kernel,
    generalized_kernel,
    offset_gaussian,
    plateau_kernel,
    sinc_kernel,
    with_box,
)

SHAPES = {
    "gaussian": lambda size: gaussian_kernel(size, 2.5, 0.9, 0.6),
    "thin gaussian": lambda size: gaussian_kernel(size, 3.0, 0.02, -2.1),
    "generalized": lambda size: generalized_kernel(size, 2.5, 0.9, 0.6, 0.5),
    "steep generalized": lambda size: generalized_kernel(size, 0.2, 0.2, 0.6, 4.0),
    "plateau": lambda size: plateau_kernel(size, 2.5, 0.9, 0.6, 1.5),
    "sinc": lambda size: sinc_kernel(size, 1.3),
    "delta": delta_kernel,
}


def filtered(
    image: np.ndarray,
    kernel: np.ndarray,
    out: tuple[int, int] | None = None,
    *,
    linear: bool = False,
) -> np.ndarray:
    """Filter an HWC image with DALI and resize it, not antialiased, to `out` (height, width)."""
    from nvidia.dali import fn, pipeline_def, types

    filter2d = getattr(fn, "filter", None) or fn.experimental.filter  # its name before DALI 2.4

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> Any:
        pixels = fn.external_source(lambda: [image], batch=True, layout="HWC")
        result = filter2d(pixels, fn.external_source(lambda: [kernel], batch=True))
        if out:
            interpolation = types.INTERP_LINEAR if linear else types.INTERP_NN
            result = fn.resize(
                result, resize_y=out[0], resize_x=out[1], interp_type=interpolation, antialias=False
            )
        return result

    return np.array(graph().run()[0].as_array()[0])


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_are_normalised_and_their_own_mirror_image(name: str) -> None:
    for size in (1, 7, 21, 31):
        kernel = SHAPES[name](size)
        assert kernel.shape == (size, size)
        assert kernel.dtype == np.float32
        assert kernel.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], rtol=1e-5, atol=1e-9)
        assert kernel.argmax() == kernel.size // 2
    with pytest.raises(ValueError, match="20"):
        SHAPES[name](20)


@pytest.mark.parametrize(
    ("sigma_x", "sigma_y", "theta"), [(2, 2, 0), (3, 1, 0), (3, 1, 0.5), (1.2, 2.4, -1.1)]
)
def test_a_gaussian_has_the_covariance_asked_for(
    sigma_x: float, sigma_y: float, theta: float
) -> None:
    kernel = gaussian_kernel(51, sigma_x, sigma_y, theta).astype(np.float64)
    y, x = np.mgrid[-25:26, -25:26]
    turn = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    expected = turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T
    got = [
        [(kernel * x * x).sum(), (kernel * x * y).sum()],
        [(kernel * x * y).sum(), (kernel * y * y).sum()],
    ]
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_kernels_are_the_published_functions() -> None:
    arguments = (21, 2.5, 0.9, 0.6)
    gaussian = gaussian_kernel(*arguments)
    np.testing.assert_allclose(generalized_kernel(*arguments, 1.0), gaussian, rtol=1e-5)
    # At one offset, relative to the middle: d = (3, -2) in a kernel rotated by 0.6.
    along, across = 3 * math.cos(0.6) - 2 * math.sin(0.6), -3 * math.sin(0.6) - 2 * math.cos(0.6)
    quadratic = (along / 2.5) ** 2 + (across / 0.9) ** 2
    for kernel, expected in (
        (gaussian, math.exp(-quadratic / 2)),
        (generalized_kernel(*arguments, 0.5), math.exp(-0.5 * quadratic**0.5)),
        (plateau_kernel(*arguments, 1.5), 1 / (1 + quadratic**1.5)),
    ):
        assert kernel[10 - 2, 10 + 3] / kernel[10, 10] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cutoff", [math.pi / 3, 2.0, math.pi])
def test_sinc_is_that_of_the_bessel_function(cutoff: float) -> None:
    kernel = sinc_kernel(21, cutoff)
    y, x = np.mgrid[-10:11, -10:11]
    radius = np.hypot(x, y)
    # Bessel's integral; the trapezoidal rule over a whole period is exact up to rounding.
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    j1 = np.cos(angles - cutoff * radius[..., None] * np.sin(angles)).mean(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(
            radius == 0, cutoff**2 / (4 * np.pi), cutoff * j1 / (2 * np.pi * radius)
        )
    np.testing.assert_allclose(kernel, expected / expected.sum(), atol=2e-8)


def test_sinc_passes_low_frequencies_alone() -> None:
    cutoff = 1.5
    response = np.abs(np.fft.fft2(sinc_kernel(201, cutoff), (512, 512)))
    frequency = 2 * np.pi * np.fft.fftfreq(512)
    radius = np.hypot(frequency[:, None], frequency[None])
    assert np.abs(response[radius < 0.8 * cutoff] - 1).max() < 0.05
    assert response[radius > 1.2 * cutoff].max() < 0.05
    assert np.abs(response[radius < 0.8 * cutoff] - 1).mean() < 0.01
    assert response[radius > 1.2 * cutoff].mean() < 0.01


def test_dali_correlates() -> None:
    image = photograph(1, 40, 50)
    kernel = np.zeros((5, 5), np.float32)
    kernel[0, 1] = 1  # the pixel two rows above and one column to the left
    np.testing.assert_array_equal(filtered(image, kernel)[2:, 1:], image[:-2, :-1])
    np.testing.assert_array_equal(filtered(image, delta_kernel()), image)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("sigma", [0.01, 0.8, 1.6, 2.4])
def test_offset_gaussian_and_nearest_weigh_around_the_centres_of_lr_pixels(
    scale: int, sigma: float
) -> None:
    height, width = 20 * scale, 26 * scale
    image = photograph(2, height, width)
    got = filtered(image, offset_gaussian(sigma, scale), (20, 26))

    def weights(length: int) -> np.ndarray:
        """Return (length / scale, length) weights of every pixel, with border reflections added."""
        around = length - 1
        places = np.pad(np.arange(length), around, mode="reflect")
        centres = scale * np.arange(length // scale) + (scale - 1) / 2
        squares = (np.arange(-around, length + around) - centres[:, None]) ** 2
        gaussian = np.exp((squares.min() - squares) / (2 * sigma**2))
        gaussian /= gaussian.sum(1, keepdims=True)
        return gaussian @ (places[:, None] == np.arange(length))

    expected = np.einsum(
        "iy,jx,yxc->ijc", weights(height), weights(width), image.astype(np.float64), optimize=True
    )
    assert np.abs(got - expected).max() < 0.51  # rounded to the nearest level


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Return the PSNR in dB without the border pixels, whose filter uses the reflected image."""
    error = ((one - other)[6:-6, 6:-6].astype(np.float64) ** 2).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def area(image: np.ndarray, size: int) -> np.ndarray:
    """Return the mean over each output pixel's area, with partial pixels at its edges."""
    ends = np.arange(size + 1) * len(image) / size
    first = np.arange(len(image))
    shares = np.minimum(ends[1:, None], first + 1) - np.maximum(ends[:-1, None], first)
    shares = shares.clip(0, 1) * size / len(image)
    return np.einsum("iy,jx,yxc->ijc", shares, shares, image.astype(np.float64), optimize=True)


@pytest.mark.parametrize(
    ("ratio", "least", "least_torch", "gain"),
    [(1.5, 40, 31, 0), (2, 100, 100, 0), (3, 100, 100, 60), (4, 48, 48, 14), (5.3, 55, 41, 24)],
)
def test_with_box_linear_sampling_averages_areas(
    ratio: float, least: float, least_torch: float, gain: float
) -> None:
    size = 80
    image = photograph(3, round(size * ratio), round(size * ratio)).astype(np.float32)
    plain = filtered(image, delta_kernel(), (size, size), linear=True)
    boxed = filtered(image, with_box(delta_kernel(), ratio), (size, size), linear=True)
    expected = area(image, size)
    assert psnr(boxed, expected) > least
    assert psnr(boxed, expected) >= psnr(plain, expected) + gain
    # torch's area mode is adaptive average pooling: whole pixels, in windows that overlap unless
    # the ratio is an integer.
    pooled = (
        torch.nn.functional.interpolate(
            torch.from_numpy(image.transpose(2, 0, 1)[None]), (size, size), mode="area"
        )[0]
        .numpy()
        .transpose(1, 2, 0)
    )
    assert psnr(boxed, pooled) > least_torch


def test_with_box_convolves() -> None:
    kernel = gaussian_kernel(21, 2.5, 0.9, 0.6)
    for ratio in (0.7, 1.0, 1.7, 2.0):
        assert with_box(kernel, ratio) is kernel
    for ratio in (1.8, 3.0, 4.4, 6.6):
        box = with_box(delta_kernel(), ratio)
        grown = with_box(kernel, ratio)
        assert box.sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_array_equal(box, box[::-1, ::-1])
        side = 21 + len(box) - 1
        expected = np.fft.irfft2(np.fft.rfft2(kernel, (64, 64)) * np.fft.rfft2(box, (64, 64)))[
            :side, :side
        ]
        np.testing.assert_allclose(grown, expected, atol=1e-7)
