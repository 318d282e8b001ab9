"""MS-SSIM against scikit-image, the spectrum against its definition, total variation by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from fabricate import picture
from pipeline.cli import UserError
from pipeline.losses.pixel import FourierL1, MsSsim, TotalVariation, smallest_side

PAPER_WEIGHTS = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])


def images(height: int, width: int, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return similar SR and HR, float64 NHWC in [0, 1]."""
    hr = np.stack([picture(height, width, seed) for seed in range(count)]) / 255
    noise = np.random.default_rng(0).normal(0, 0.05, hr.shape)
    return np.clip(0.9 * hr + 0.02 + noise, 0, 1), hr


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array).permute(0, 3, 1, 2) for array in arrays]


def halved(plane: np.ndarray) -> np.ndarray:
    plane = np.pad(plane, [(0, side % 2) for side in plane.shape], mode="edge")
    return (plane[::2, ::2] + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2]) / 4


def reference(a: np.ndarray, b: np.ndarray, scales: int) -> float:
    """Return MS-SSIM of two planes by scikit-image.

    With an enormous K1, its luminance factor is 1 and only the contrast remains.
    """
    weights = PAPER_WEIGHTS[:scales] / PAPER_WEIGHTS[:scales].sum()
    product = 1.0
    for scale, weight in enumerate(weights):
        if scale:
            a, b = halved(a), halved(b)
        product *= (
            structural_similarity(
                a,
                b,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=1.0,
                K1=0.01 if scale == scales - 1 else 1e8,
            )
            ** weight
        )
    return product


@pytest.mark.parametrize(
    ("height", "width", "scales"),
    [
        (11, 30, 1),
        (21, 40, 2),
        (41, 44, 3),
        (96, 96, 4),
        (97, 130, 4),
        (160, 200, 4),
        (161, 171, 5),
        (192, 192, 5),
    ],
)
def test_ms_ssim_is_that_of_scikit_image_at_every_scale(height, width, scales) -> None:
    sr, hr = images(height, width, count=2)
    expected = np.mean(
        [reference(sr[n, ..., c], hr[n, ..., c], scales) for n in range(2) for c in range(3)]
    )
    assert 0.01 < 1 - expected < 0.9  # not a trivial comparison
    assert MsSsim()(*tensors(sr, hr)).item() == pytest.approx(1 - expected, abs=1e-9)
    assert MsSsim()(*(tensor.float() for tensor in tensors(sr, hr))).item() == pytest.approx(
        1 - expected, abs=1e-5
    )


def test_ms_ssim_with_fewer_scales_than_fit() -> None:
    sr, hr = images(96, 96)
    for scales in (1, 2, 3):
        expected = np.mean([reference(sr[0, ..., c], hr[0, ..., c], scales) for c in range(3)])
        assert MsSsim(scales)(*tensors(sr, hr)).item() == pytest.approx(1 - expected, abs=1e-9)


def test_ms_ssim_of_equal_images_is_0_and_falls_with_the_noise() -> None:
    hr = tensors(images(64, 64)[1])[0]
    noise = torch.randn(hr.shape, generator=torch.Generator().manual_seed(0), dtype=hr.dtype)
    losses = [MsSsim()(hr + sigma * noise, hr).item() for sigma in (0, 0.02, 0.05, 0.1, 0.3)]
    assert losses[0] == pytest.approx(0, abs=1e-12)
    assert losses == sorted(losses)
    assert losses[-1] > 10 * losses[1]


def test_ms_ssim_refuses_crops_that_are_too_small() -> None:
    assert [smallest_side(scales) for scales in range(1, 6)] == [11, 21, 41, 81, 161]
    with pytest.raises(UserError, match=r"at least 11 pixels for 1 scale\(s\), but it is 10"):
        MsSsim()(torch.rand(1, 3, 30, 10), torch.rand(1, 3, 30, 10))
    with pytest.raises(UserError, match=r"at least 161 pixels for 5 scale\(s\), but it is 160"):
        MsSsim(5)(torch.rand(1, 3, 160, 200), torch.rand(1, 3, 160, 200))
    for scales in (0, 6, 2.5, True, "3"):
        with pytest.raises(ValueError, match="not an integer from 1 to 5"):
            MsSsim(scales)


@pytest.mark.parametrize(
    ("loss", "side"),
    [
        (MsSsim(), 22),
        (FourierL1(), 6),
        (FourierL1("ortho"), 5),
        (TotalVariation(), 5),
        (TotalVariation("l1"), 5),
    ],
)
def test_gradients(loss, side) -> None:
    sr, hr = (
        torch.rand(
            1, 2, side, side + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 1)
    )
    assert torch.autograd.gradcheck(lambda x: loss(x, hr), (sr.requires_grad_(),))


def test_ms_ssim_has_a_gradient_for_images_that_run_against_each_other() -> None:
    hr = tensors(images(96, 96)[1])[0].float()
    generator = torch.Generator().manual_seed(0)
    noise = 3 * torch.rand(hr.shape, generator=generator) - 1
    for sr in (1 - hr, torch.zeros_like(hr), torch.full_like(hr, 0.5), noise):
        sr = sr.clone().requires_grad_()
        loss = MsSsim()(sr, hr)
        loss.backward()
        assert 0 < loss.item() < 1
        assert torch.isfinite(sr.grad).all()
        assert (sr.grad.abs().amax(dim=(-2, -1)) > 1e-12).all()  # in every channel


@pytest.mark.parametrize("start", ["noise", "negative"])
def test_ms_ssim_descends(start) -> None:
    hr = tensors(images(44, 44)[1])[0].float()
    noise = torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))
    sr = (0.5 + 0.1 * noise if start == "noise" else 1 - hr).clone().requires_grad_()
    optimizer = torch.optim.Adam([sr], lr=0.02)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = MsSsim()(sr, hr)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < 0.5 < losses[0], losses[::30]


def test_ms_ssim_takes_channels_last() -> None:
    sr, hr = tensors(*images(48, 48))
    last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (sr, hr)]
    assert MsSsim()(*last).item() == pytest.approx(MsSsim()(sr, hr).item(), abs=1e-12)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9)])
def test_the_spectrum_loss_is_its_definition(height, width) -> None:
    sr, hr = images(height, width, count=2)
    spectra = [np.fft.rfft2(image, axes=(1, 2)) for image in (sr, hr)]
    expected = np.mean(
        [np.abs(spectra[0].real - spectra[1].real), np.abs(spectra[0].imag - spectra[1].imag)]
    )
    assert FourierL1()(*tensors(sr, hr)).item() == pytest.approx(expected)
    assert FourierL1("ortho")(*tensors(sr, hr)).item() == pytest.approx(
        expected / np.sqrt(height * width)
    )


def test_total_variation_by_hand() -> None:
    # down: .25, 0, -.75; across: .5, .5, .25, -.25
    sr = torch.tensor([[[[0.0, 0.5, 1.0], [0.25, 0.5, 0.25]]]])
    down, across = (0.0625 + 0.5625) / 3, (0.25 + 0.25 + 0.0625 + 0.0625) / 4
    assert TotalVariation()(sr, sr).item() == pytest.approx(2 * (down + across))
    assert TotalVariation("l1")(sr, sr).item() == pytest.approx(1 / 3 + 1.5 / 4)
    assert TotalVariation()(torch.full((1, 3, 4, 4), 0.3), sr).item() == 0
