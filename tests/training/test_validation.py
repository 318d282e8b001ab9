"""Validation: equal scores for any number of ranks, on the same LR as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from conftest import photograph
from fabricate import tiny_network
from pipeline.cli import UserError
from pipeline.config.recipe import BestSpec, load_recipe
from pipeline.data.dataset import Dataset, Folder
from pipeline.images import cubic_resize, to_bytes, unit_range
from pipeline.metrics.psnr_ssim import luma
from pipeline.training.validation import ValidationSet, is_better


class FakeRanks:
    """Ranks that run one after another: in the second round `gather` returns everybody's values."""

    def __init__(self, rank: int, world_size: int, shares: list | None = None) -> None:
        self.rank, self.world_size, self.shares, self.device = (
            rank,
            world_size,
            shares,
            torch.device("cpu"),
        )
        self.given: object = None

    def gather(self, value: object) -> list:
        self.given = value
        return self.shares or [value] * self.world_size


def validation_set(
    root: Path, names: list[str], limit: int, ranks: FakeRanks, **data: Any
) -> ValidationSet:
    recipe = load_recipe(
        "demo",
        {"validation_images": limit, **{f"data.{key}": value for key, value in data.items()}},
    )
    is_paired = recipe.data.degradation.name == "paired"
    lr_paths = (
        {name: str(root / f"{Path(name).stem}_lr2{Path(name).suffix}") for name in names}
        if is_paired
        else None
    )
    return ValidationSet(Dataset((Folder(root, [], names, lr_paths),)).validation, recipe, ranks)


def psnr_of(root: Path, names: list[str], world_size: int, limit: int = 100) -> float:
    network = tiny_network(global_residual="bicubic")
    shares = []
    for rank in range(world_size):
        ranks = FakeRanks(rank, world_size, [[{"psnr_y": 0.0}] * len(names)] * world_size)
        validation_set(root, names, limit, ranks).measure(network)
        shares.append(ranks.given)
    results = {
        validation_set(root, names, limit, FakeRanks(rank, world_size, shares)).measure(network)[
            "psnr_y"
        ]
        for rank in range(world_size)
    }
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
    validation = validation_set(tmp_path, images, 100, FakeRanks(0, 1))
    expected = []
    for name in images:
        pair = validation.pair(images.index(name))
        assert pair.hr.shape[-2] == 2 * pair.lr.shape[-2]
        with torch.inference_mode():
            sr = to_bytes(network(pair.lr))
        inner = [luma(image[..., 2:-2, 2:-2], rounded=True).numpy() for image in (pair.hr, sr)]
        expected.append(peak_signal_noise_ratio(*inner, data_range=255))
    assert validation.measure(network)["psnr_y"] == pytest.approx(np.mean(expected), abs=1e-9)


def test_lr_is_made_as_in_training(tmp_path: Path, images: list[str]) -> None:
    pair = validation_set(tmp_path, images, 100, FakeRanks(0, 1)).pair(0)
    reference = (
        cubic_resize(unit_range(pair.hr, torch.float64), (pair.lr.shape[-2], pair.lr.shape[-1]))
        * 255
    )
    # edges: repeated, not renormalised
    error = (pair.lr.double() - reference.clamp(0, 255)).abs()[..., 3:-3, 3:-3]
    assert error.max() < 0.501


def test_a_limit_spreads_over_the_list(tmp_path: Path, images: list[str]) -> None:
    chosen = validation_set(tmp_path, images, 2, FakeRanks(0, 1))
    assert [chosen.pair(place).name for place in range(len(chosen))] == [images[0], images[2]]


def test_stopping_in_the_middle_gives_no_number(tmp_path: Path, images: list[str]) -> None:
    validation = validation_set(tmp_path, images, 100, FakeRanks(0, 1))
    assert validation.measure(tiny_network(), lambda done, share: done < 3) is None


def test_a_bad_file_is_named(tmp_path: Path, images: list[str]) -> None:
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:900])
    with pytest.raises(UserError, match=r"1\.png"):
        validation_set(tmp_path, images, 100, FakeRanks(0, 1))
    np.save(tmp_path / "0.npy", photograph(0, 20, 90))
    with pytest.raises(UserError, match=r"0\.npy: 20x90 is too small to validate at scale 2"):
        validation_set(tmp_path, images, 100, FakeRanks(0, 1))


@pytest.mark.parametrize("degradation", ["gaussian", "realesrgan"])
def test_lr_is_degraded_the_same_way_every_time(
    tmp_path: Path, images: list[str], degradation: str
) -> None:
    alone = validation_set(tmp_path, images, 100, FakeRanks(0, 1), degradation=degradation)
    second = validation_set(tmp_path, images, 100, FakeRanks(1, 2), degradation=degradation)
    plain = validation_set(tmp_path, images, 100, FakeRanks(0, 1))
    for place in range(len(second)):  # the same on another rank, among another number of ranks
        assert torch.equal(second.pair(place).lr, alone.pair(2 * place + 1).lr)
    for place in range(len(alone)):
        assert torch.equal(alone.pair(place).hr, plain.pair(place).hr)
        assert not torch.equal(alone.pair(place).lr, plain.pair(place).lr)


def test_lr_is_read_where_pairs_are_trained(tmp_path: Path, images: list[str]) -> None:
    names = [name for name in images if name.endswith(".npy")]
    for i, name in enumerate(names):
        height, width = (side // 2 for side in np.load(tmp_path / name).shape[:2])
        np.save(tmp_path / f"{Path(name).stem}_lr2.npy", photograph(50 + i, height, width))
    pairs = validation_set(tmp_path, names, 100, FakeRanks(0, 1), degradation="paired")
    for place, name in enumerate(names):
        lr = np.load(tmp_path / f"{Path(name).stem}_lr2.npy")
        np.testing.assert_array_equal(pairs.pair(place).lr[0].permute(1, 2, 0).numpy(), lr)
    np.save(tmp_path / f"{Path(names[0]).stem}_lr2.npy", photograph(0, 9, 9))
    with pytest.raises(UserError, match=r"0_lr2\.npy: 9x9 is not 1/2 of"):
        validation_set(tmp_path, names, 100, FakeRanks(0, 1), degradation="paired")


@pytest.mark.parametrize(
    ("new", "best", "metric", "floor", "expected"),
    [
        ((30, None), None, "psnr", None, True),
        ((30, None), (29, None), "psnr", None, True),
        ((30, None), (30, None), "psnr", None, False),
        ((20, 0.1), (30, 0.2), "lpips", None, True),
        ((30, 0.2), (20, 0.1), "lpips", None, False),
        ((26, 0.1), (30, 0.2), "lpips", 27, False),  # below the floor, and the other is above it
        ((28, 0.3), (26, 0.1), "lpips", 27, True),
        ((28, 0.1), (30, 0.2), "lpips", 27, True),
        ((26, 0.3), (25, 0.1), "lpips", 27, True),  # both below: the one nearer to the floor wins
        ((25, 0.1), (26, 0.3), "lpips", 27, False),
    ],
)
def test_the_best_step_is_chosen_by_the_recipes_rule(
    new: tuple, best: tuple | None, metric: str, floor: float | None, expected: bool
) -> None:
    spec = BestSpec(metric=metric, psnr_floor=floor)
    found, before = (
        scores
        and {
            name: score
            for name, score in zip(("psnr_y", "lpips"), scores, strict=True)
            if score is not None
        }
        for scores in (new, best)
    )
    assert is_better(found, before, spec) is expected
