"""Oklab chroma and luma against their definitions in NumPy, gradients by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from fabricate import picture
from pipeline.cli import UserError
from pipeline.colour_spaces import oklab_to_rgb, rgb_to_oklab
from pipeline.losses import Criterion
from pipeline.losses.colour import Luma, OklabChroma

LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(images: np.ndarray) -> np.ndarray:
    """Convert sRGB, (..., 3) in [0, 1], as Ottosson's page describes."""
    linear = np.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ LMS.T) @ OKLAB.T


def blurred(planes: np.ndarray, sigma: float) -> np.ndarray:
    """Blur NHWC where the window, three sigma on either side, fits."""
    radius = int(np.ceil(3 * sigma))
    if not sigma:
        return planes
    for axis in (1, 2):
        planes = gaussian_filter1d(planes, sigma, axis=axis, radius=radius)
    return planes[:, radius:-radius, radius:-radius]


def images() -> tuple[np.ndarray, np.ndarray]:
    """Return similar SR and HR, float64 NHWC in [0, 1]."""
    hr = np.stack([picture(40, 33, seed) for seed in range(2)]) / 255
    noise = np.random.default_rng(0).normal(0, 0.05, hr.shape)
    return np.clip(0.9 * hr + noise + (0.02, 0.0, -0.02), 0, 1), hr


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


@pytest.mark.parametrize("sigma", [0, 1.5, 3])
def test_the_losses_are_their_definitions(sigma: float) -> None:
    sr, hr = images()
    difference = blurred(oklab(sr) - oklab(hr), sigma)
    chroma = np.sqrt((difference[..., 1:] ** 2).sum(-1) + 1e-6).mean()
    luma = np.abs(difference[..., 0]).mean()
    assert min(chroma, luma) > 3e-3
    for loss, expected in ((OklabChroma(sigma), chroma), (Luma(sigma), luma)):
        assert loss(tensor(sr), tensor(hr)).item() == pytest.approx(expected, abs=1e-9)
        single = loss(tensor(sr).float(), tensor(hr).float()).item()
        assert single == pytest.approx(expected, abs=1e-5)


def test_chroma_ignores_brightness_and_luma_ignores_chroma_and_fine_texture() -> None:
    hr = torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64)
    lab = rgb_to_oklab(hr)
    brighter, tinted = lab.clone(), lab.clone()
    brighter[:, 0] += 0.05
    tinted[:, 1] += 0.03
    brighter, tinted = oklab_to_rgb(brighter), oklab_to_rgb(tinted)
    assert OklabChroma()(brighter, hr).item() == pytest.approx(1e-3, rel=1e-3)
    assert OklabChroma()(tinted, hr).item() == pytest.approx(0.03, rel=1e-2)
    assert Luma()(brighter, hr).item() == pytest.approx(0.05, rel=1e-3)
    assert Luma()(tinted, hr).item() < 1e-6
    chequered = hr + 0.1 * (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).sub(0.5)
    assert Luma(0)(chequered, hr).item() > 20 * Luma()(chequered, hr).item()


@pytest.mark.parametrize("loss", [OklabChroma(), OklabChroma(0.6), Luma(0.6), Luma(0)])
def test_gradients(loss: torch.nn.Module) -> None:
    sr, hr = (
        0.05
        + 0.9
        * torch.rand(1, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    assert torch.autograd.gradcheck(lambda x: loss(x, hr), (sr.requires_grad_(),))


def test_black_gray_and_values_out_of_range_have_finite_gradients() -> None:
    for value in (-0.1, 0.0, 0.5, 1.2):
        sr = torch.full((1, 3, 24, 24), value, requires_grad=True)
        for loss in (OklabChroma(), Luma()):
            sr.grad = None
            loss(sr, torch.zeros(1, 3, 24, 24)).backward()
            assert torch.isfinite(sr.grad).all()


def test_wrong_parameters_and_small_crops_are_one_line() -> None:
    for sigma in (-1, 51, True, "x"):
        with pytest.raises(UserError, match=r"'luma': sigma .* is not a number from 0 to 50"):
            Criterion({"luma": {"weight": 1, "sigma": sigma}})
    with pytest.raises(UserError, match="'luma' with sigma 3 needs a crop of at least 19 pixels"):
        Luma()(torch.rand(1, 3, 40, 18), torch.rand(1, 3, 40, 18))
