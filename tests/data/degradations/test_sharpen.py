"""The step `sharpen` and the sharpening of HR, against their formulas, Pillow and SciPy."""

from __future__ import annotations

import cv2
import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
from pydantic import ValidationError
from scipy import ndimage

from conftest import photograph
from pipeline.data.degradations.host import Workspace, filtered
from pipeline.data.degradations.kernels import gaussian_kernel
from pipeline.data.degradations.steps.sharpen import SharpenSpec, sharpened_hr
from steps import applied, check_kind, draws_of, shares, unclipped

IMAGES = (photograph(3, 61, 47), unclipped(2, 40, 53))


def published_usm(image: np.ndarray, side: int, weight: float, threshold: float) -> np.ndarray:
    """BasicSR's USMSharp in float64, of levels in 0..255."""
    line = cv2.getGaussianKernel(side, 0)[:, 0]

    def blur(planes: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            planes = ndimage.correlate1d(planes, line, axis, mode="mirror")
        return planes

    image = image.astype(np.float64) / 255
    residual = image - blur(image)
    mask = (np.abs(residual) * 255 > threshold).astype(np.float64)
    soft = blur(mask)
    sharp = np.clip(image + weight * residual, 0, 1)
    return 255 * (soft * sharp + (1 - soft) * image)


def test_hr_is_sharpened_as_published() -> None:
    for image in (photograph(3, 96, 80), photograph(4, 60, 71).astype(np.float32)):
        before, workspace = image.copy(), Workspace()
        got = sharpened_hr(image, workspace)
        assert (image == before).all()
        assert got.dtype == np.float32
        assert got.min() >= 0
        assert got.max() <= 255
        expected = published_usm(image, 51, 0.5, 10)
        assert np.abs(got - expected).max() < 1
        assert np.abs(got - expected).mean() < 0.05
        assert np.abs(got - image).max() > 10
        # Also if HR is in memory of the workspace.
        blurred = filtered(image, gaussian_kernel(9, 1, 1, 0), workspace)
        expected = published_usm(blurred, 51, 0.5, 10)
        assert np.abs(sharpened_hr(blurred, workspace) - expected).max() < 1


@pytest.mark.parametrize(("sigma", "side"), [(2.0, 11), (3.2, 19), (8.0, 51)])
def test_usm_has_opencvs_kernels(sigma: float, side: int) -> None:
    drawn = {"kind": "usm", "sigma": sigma, "amount": 1.5, "threshold": 6.0}
    got = applied("sharpen", IMAGES[0], drawn)
    assert np.abs(got - published_usm(IMAGES[0], side, 1.5, 6)).max() < 1


@pytest.mark.parametrize("threshold", [0.0, 5.0])
def test_unsharp_is_its_formula(threshold: float) -> None:
    drawn = {"kind": "unsharp", "sigma": 1.5, "amount": 1.2, "threshold": threshold}
    for image in IMAGES:
        floats = image.astype(np.float64)
        detail = floats - ndimage.gaussian_filter(
            floats, 1.5, mode="mirror", truncate=4, axes=(0, 1)
        )
        expected = floats + 1.2 * np.where(np.abs(detail) > threshold, detail, 0)
        near = np.abs(np.abs(detail) - threshold) < 0.1  # either side of the threshold
        off = np.where(near & (threshold > 0), 0, applied("sharpen", image, drawn) - expected)
        assert np.abs(off).max() < 1


def test_unsharp_is_nearly_pillows() -> None:
    """Pillow blurs with three boxes and rounds, hence the tolerance."""
    image = photograph(5, 80, 90)
    got = applied(
        "sharpen", image, {"kind": "unsharp", "sigma": 2.0, "amount": 1.5, "threshold": 3.0}
    )
    mask = PIL.ImageFilter.UnsharpMask(radius=2, percent=150, threshold=3)
    expected = np.asarray(PIL.Image.fromarray(image).filter(mask), np.float32)
    off = np.abs(np.clip(got, 0, 255) - expected)[8:-8, 8:-8]
    assert off.mean() < 1
    assert off.mean() < 0.1 * np.abs(expected - image)[8:-8, 8:-8].mean()


@pytest.mark.parametrize("kind", ["unsharp", "usm"])
@pytest.mark.parametrize("threshold", [0.0, 4.0])
def test_every_kind_holds_for_any_image(kind: str, threshold: float) -> None:
    check_kind("sharpen", {"kind": kind, "sigma": 2.0, "amount": 0.8, "threshold": threshold})


def test_draws_are_in_their_ranges() -> None:
    drawn = draws_of("sharpen", {"kind": {"unsharp": 3, "usm": 1}, "sigma": [1, 2]}, 2000)
    assert abs(shares(drawn)["usm"] - 0.25) < 0.03
    for one in drawn:
        assert 1 <= one["sigma"] < 2
        assert 0.3 <= one["amount"] < 1.5
        assert 0 <= one["threshold"] < 3
    for section, words in (
        ({"kind": "unsharpen"}, "did you mean 'unsharp'"),
        ({"amount": [1, 30]}, "within 0..20"),
        ({"radius": 2}, "Extra inputs"),
    ):
        with pytest.raises(ValidationError) as refused:
            SharpenSpec.model_validate(section)
        assert words in str(refused.value)
