"""Validation: the same number for any number of ranks, by the same LR as training."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from conftest import photograph
from fabricate import tiny_network
from pipeline.cli import UserError
from pipeline.images import cubic_resize, to_bytes, unit_range
from pipeline.metrics.psnr_ssim import luma
from pipeline.validation import ValidationSet


class FakeRanks:
    """Ranks that run one after another: `gather` is given everybody's values in the second round."""

    def __init__(self, rank: int, world_size: int, shares: list | None = None) -> None:
        self.rank, self.world_size, self.shares, self.device = rank, world_size, shares, torch.device("cpu")
        self.given: object = None

    def gather(self, value: object) -> list:
        self.given = value
        return self.shares or [value] * self.world_size


def psnr_of(root: Path, names: list[str], world_size: int, limit: int = 100) -> float:
    network = tiny_network(global_residual="bicubic")
    shares = []
    for rank in range(world_size):
        ranks = FakeRanks(rank, world_size, [[0.0] * len(names)] * world_size)
        ValidationSet(root, names, 2, limit, ranks).psnr(network)
        shares.append(ranks.given)
    results = {ValidationSet(root, names, 2, limit, FakeRanks(rank, world_size, shares)).psnr(network)
               for rank in range(world_size)}
    assert len(results) == 1
    return results.pop()


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    for i in range(5):
        pixels = photograph(i, 61 + i, 80 - 3 * i)
        if i % 2:
            cv2.imwrite(str(tmp_path / f"{i}.png"), pixels[..., ::-1])
        else:
            np.save(tmp_path / f"{i}.npy", pixels)
    return [f"{i}.{'png' if i % 2 else 'npy'}" for i in range(5)]


def test_the_mean_is_the_same_for_any_number_of_ranks(tmp_path: Path, images: list[str]) -> None:
    alone = psnr_of(tmp_path, images, 1)
    assert 10 < alone < 60
    assert [psnr_of(tmp_path, images, n) for n in (2, 3, 4)] == [alone] * 3


def test_it_is_the_papers_psnr(tmp_path: Path, images: list[str]) -> None:
    network = tiny_network(global_residual="bicubic")
    validation = ValidationSet(tmp_path, images, 2, 100, FakeRanks(0, 1))
    expected = []
    for name in images:
        pair = validation.pair(name)
        assert pair.hr.shape[-2] == 2 * pair.lr.shape[-2]
        with torch.inference_mode():
            sr = to_bytes(network(pair.lr))
        inner = [luma(image[..., 2:-2, 2:-2], rounded=True).numpy() for image in (pair.hr, sr)]
        expected.append(peak_signal_noise_ratio(*inner, data_range=255))
    assert validation.psnr(network) == pytest.approx(np.mean(expected), abs=1e-9)


def test_lr_is_made_as_in_training(tmp_path: Path, images: list[str]) -> None:
    pair = ValidationSet(tmp_path, images, 2, 100, FakeRanks(0, 1)).pair(images[0])
    reference = cubic_resize(unit_range(pair.hr, torch.float64), (pair.lr.shape[-2], pair.lr.shape[-1])) * 255
    error = (pair.lr.double() - reference.clamp(0, 255)).abs()[..., 3:-3, 3:-3]  # edges: repeated, not renormalised
    assert error.max() < 0.501


def test_a_limit_spreads_over_the_list(tmp_path: Path, images: list[str]) -> None:
    assert ValidationSet(tmp_path, images, 2, 2, FakeRanks(0, 1)).names == [images[0], images[2]]


def test_stopping_in_the_middle_gives_no_number(tmp_path: Path, images: list[str]) -> None:
    validation = ValidationSet(tmp_path, images, 2, 100, FakeRanks(0, 1))
    assert validation.psnr(tiny_network(), lambda done, share: done < 3) is None


def test_a_bad_file_is_named(tmp_path: Path, images: list[str]) -> None:
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:900])
    with pytest.raises(UserError, match=r"1\.png"):
        ValidationSet(tmp_path, images, 2, 100, FakeRanks(0, 1))
    np.save(tmp_path / "0.npy", photograph(0, 20, 90))
    with pytest.raises(UserError, match=r"0\.npy: 20x90 is too small to validate at scale 2"):
        ValidationSet(tmp_path, images, 2, 100, FakeRanks(0, 1))
