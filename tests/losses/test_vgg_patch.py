"""The patch-wise perceptual loss against unfolded patches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fabricate import picture
from pipeline.cli import UserError
from pipeline.losses import Criterion
from pipeline.losses.vgg_patch import VggPatch, patch_distances


def features(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hr = torch.randn(shape, generator=generator, dtype=dtype)
    return hr + 0.3 * torch.randn(shape, generator=generator, dtype=dtype), hr


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_value_is_that_of_unfolded_patches(size: int) -> None:
    sr, hr = features(2, 5, 6, 8)
    unfolded = [F.unfold(part, size) for part in (sr, hr)]  # (N, channels * size^2, patches)
    expected = (1 - F.cosine_similarity(*unfolded, dim=1)).view(2, 7 - size, 9 - size)
    torch.testing.assert_close(patch_distances(sr, hr, size), expected, rtol=1e-6, atol=1e-9)


def test_the_gradient_is_that_of_finite_differences() -> None:
    sr, hr = features(1, 3, 4, 5)
    assert torch.autograd.gradcheck(
        lambda x: patch_distances(x, hr, 3), (sr.requires_grad_(),), atol=1e-6
    )


def test_near_patches_keep_their_digits_and_empty_ones_have_a_finite_gradient() -> None:
    sr, hr = features(1, 64, 8, 8)
    near = hr + 1e-4 * (sr - hr)
    single = patch_distances(near.float(), hr.float(), 3)
    torch.testing.assert_close(single.double(), patch_distances(near, hr, 3), rtol=0.01, atol=1e-12)
    assert patch_distances(hr.float(), hr.float(), 3).abs().max() == 0
    empty = torch.zeros(1, 4, 5, 5, requires_grad=True)
    distances = patch_distances(empty, torch.zeros(1, 4, 5, 5), 3)
    distances.sum().backward()
    assert distances.detach().abs().max() == 0
    assert torch.isfinite(empty.grad).all()


def pictures(side: int = 32) -> tuple[Tensor, Tensor]:
    hr = torch.from_numpy(picture(side, side, 0)).permute(2, 0, 1)[None] / 255
    noise = torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))
    return (hr + 0.1 * noise).clamp(0, 1), hr


def test_the_loss_is_the_weighted_sum_over_layers_and_the_mean_over_sizes(vgg19: str) -> None:
    sr, hr = pictures()
    layers = {"conv2_2": 0.5, "conv3_4": 2.0}
    loss = VggPatch(layers, sizes=[2, 5], weights=vgg19)
    with torch.no_grad():
        expected = sum(
            weight * (patch_distances(*pair, 2).mean() + patch_distances(*pair, 5).mean()) / 2
            for weight, *pair in zip(
                layers.values(), loss.trunk(sr).values(), loss.trunk(hr).values(), strict=True
            )
        )
        assert loss(sr, hr).item() == pytest.approx(expected.item(), rel=1e-6)
        assert loss(hr, hr).item() == 0
        assert loss(0.5 * sr + 0.25, hr) < 2  # a cosine distance is at most 2 times the weights


@pytest.mark.parametrize(
    ("precision", "error", "cosine"), [("float16", 0.01, 0.98), ("bfloat16", 0.05, 0.9)]
)
def test_16_bits_give_nearly_the_same_loss_and_gradient(
    vgg19: str, precision: str, error: float, cosine: float
) -> None:
    found = []
    for dtype in ("float32", precision):
        term = {"weight": 0.5, "weights": vgg19, "precision": dtype}
        sr, hr = pictures()
        sr.requires_grad_()
        loss = Criterion({"vgg_patch": term})(sr, hr)["vgg_patch"]
        assert loss.dtype == torch.float32
        loss.backward()
        found.append((loss.item(), sr.grad))
    (exact, gradient), (near, other) = found
    assert near == pytest.approx(exact, rel=error)
    assert near != exact, "or it was not computed in 16 bits"
    assert F.cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > cosine


@pytest.mark.parametrize("sizes", [[], 3, [0], [3, True], ["3"], [2.0]])
def test_what_cannot_be_meant_is_one_line(vgg19: str, sizes) -> None:
    with pytest.raises(UserError, match=r"'vgg_patch': sizes .* is not a list of integers from 1"):
        Criterion({"vgg_patch": {"weight": 1, "sizes": sizes}})


def test_the_largest_patch_must_fit_into_the_crop(vgg19: str) -> None:
    loss = VggPatch(weights=vgg19)  # conv3_4 has a fourth of the sides, and patches of 7
    assert torch.isfinite(loss(torch.rand(1, 3, 28, 28), torch.rand(1, 3, 28, 28)))
    with pytest.raises(UserError, match="'vgg_patch' needs images of at least 28x28 pixels"):
        loss(torch.rand(1, 3, 27, 40), torch.rand(1, 3, 27, 40))
