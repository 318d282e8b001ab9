"""Mixed samples: each kind by its definition, and independence of how the batch is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import photograph
from pipeline.cli import UserError
from pipeline.config.recipe import load_recipe, recipe_differences
from pipeline.data.dataset import Dataset, Folder
from pipeline.data.loader import Loader
from pipeline.data.mixing import Mix, draw, mix, partner
from pipeline.data.source import CropSource, Position
from pipeline.data.spec import MIXES, DataSpec, MixingSpec
from pipeline.distributed.ranks import Ranks
from pipeline.images import cubic_resize
from pipeline.training.memory import _micro_batches
from pipeline.training.options import TrainOptions, make_plan
from pipeline.training.setup import check_stages

SCALE, LOW = 2, 16
MIXUP, BLUR = "data.mixing.kinds=mixup", "data.mixing.kinds=cutblur"
DTYPES = [torch.uint8, torch.uint16]


def batch(dtype: torch.dtype, count: int = 4, scale: int = SCALE) -> tuple[torch.Tensor, ...]:
    """Return LR and HR of unrelated samples."""
    high = 256 if dtype == torch.uint8 else 65536
    random = np.random.default_rng(0)
    return tuple(
        torch.from_numpy(random.integers(0, high, (count, 3, side, side)).astype(np.uint16)).to(
            dtype
        )
        for side in (LOW, LOW * scale)
    )


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and np.array_equal(one.numpy(), other.numpy())


def resized(image: torch.Tensor, side: int) -> np.ndarray:
    """Return a CHW image of `side` pixels as float64, in its own levels."""
    levels = torch.from_numpy(image.numpy().astype(np.float64))
    return cubic_resize(levels[None], (side, side))[0].numpy()


def assert_rounded(found: torch.Tensor, exact: np.ndarray) -> None:
    white = 255 if found.dtype == torch.uint8 else 65535
    error = np.abs(found.numpy().astype(np.float64) - exact.clip(0, white))
    assert error.max() <= 0.5 + 1e-6 * white


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixup_is_the_weighted_mean(dtype: torch.dtype) -> None:
    sides = batch(dtype)
    mixed = mix(*sides, [Mix("mixup", 0.3, 0, 0, 1, True), None, None, None])
    for before, after in zip(sides, mixed, strict=True):
        first, second = (before[n].numpy().astype(np.float64) for n in (0, 1))
        assert_rounded(after[0], 0.7 * first + 0.3 * second)
        assert equal(after[1:], before[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_cutmix_takes_the_box_from_the_partner(dtype: torch.dtype) -> None:
    sides = batch(dtype)
    mixed = mix(*sides, [None, None, None, Mix("cutmix", 0, 3, 5, 7, True)])
    for before, after, factor in zip(sides, mixed, (1, SCALE), strict=True):
        expected = before.numpy().copy()
        rows, columns = slice(3 * factor, 10 * factor), slice(5 * factor, 12 * factor)
        expected[3, :, rows, columns] = expected[2, :, rows, columns]
        assert np.array_equal(after.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_resizemix_takes_the_whole_partner_into_the_box(dtype: torch.dtype) -> None:
    sides = batch(dtype)
    mixed = mix(*sides, [None, Mix("resizemix", 0, 3, 5, 7, True), None, None])
    for before, after, factor in zip(sides, mixed, (1, SCALE), strict=True):
        rows, columns = slice(3 * factor, 10 * factor), slice(5 * factor, 12 * factor)
        assert_rounded(after[1, :, rows, columns], resized(before[0], 7 * factor))
        outside = np.ones(before.shape, bool)
        outside[1, :, rows, columns] = False
        assert np.array_equal(after.numpy()[outside], before.numpy()[outside])


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cutblur_makes_a_part_of_lr_sharp(dtype: torch.dtype, is_inside: bool, scale: int) -> None:
    lr, hr = batch(dtype, scale=scale)
    after, target = mix(lr, hr, [None, None, Mix("cutblur", 0, 3, 5, 7, is_inside), None])
    assert equal(target, hr)
    inside = np.zeros((3, LOW, LOW), bool)
    inside[:, 3:10, 5:12] = True
    sharp = inside if is_inside else ~inside
    exact = resized(hr[2], LOW) if scale > 1 else hr[2].numpy().astype(np.float64)
    assert_rounded(after[2][torch.from_numpy(sharp)], exact[sharp])
    assert np.array_equal(after[2].numpy()[~sharp], lr[2].numpy()[~sharp])
    others = [0, 1, 3]
    assert np.array_equal(after.numpy()[others], lr.numpy()[others])


def test_partners_are_mixed_from_their_unmixed_pixels() -> None:
    lr, hr = batch(torch.uint8, 2)
    drawn = Mix("cutmix", 0, 0, 0, LOW, True)
    after, target = mix(lr, hr, [drawn, drawn])
    assert equal(after, lr.flip(0))
    assert equal(target, hr.flip(0))
    assert [partner(n) for n in range(6)] == [1, 0, 3, 2, 5, 4]


def test_draws_follow_the_recipe() -> None:
    kinds = {"cutblur": 3.0, "mixup": 1.0}
    spec = MixingSpec(probability=0.4, kinds=kinds, share=(0.1, 0.3), side=(0.25, 0.5))
    draws = draw(spec, 7, 0, 4000, LOW)
    mixed = [drawn for drawn in draws if drawn]
    assert len(mixed) / len(draws) == pytest.approx(0.4, abs=0.03)
    assert {drawn.kind for drawn in mixed} == set(kinds)
    blurred = [drawn for drawn in mixed if drawn.kind == "cutblur"]
    assert len(blurred) / len(mixed) == pytest.approx(0.75, abs=0.04)
    assert np.mean([drawn.is_inside for drawn in mixed]) == pytest.approx(0.5, abs=0.05)
    shares = [drawn.share for drawn in mixed]
    assert 0.1 <= min(shares) < 0.11 < 0.29 < max(shares) <= 0.3
    assert {drawn.side for drawn in mixed} == set(range(4, 9))
    half = [one for one in draw(MixingSpec(probability=1, side=0.5), 0, 0, 1000, LOW) if one]
    assert {(one.top, one.left) for one in half} == {(y, x) for y in range(9) for x in range(9)}
    assert all(drawn.top + drawn.side <= LOW for drawn in mixed)
    reordered = spec.model_copy(update={"kinds": dict(reversed(kinds.items()))})
    assert draw(reordered, 7, 0, 50, LOW) == draws[:50]
    assert draw(spec, 8, 0, 50, LOW) != draws[:50]
    assert [one for first in range(0, 50, 5) for one in draw(spec, 7, first, 5, LOW)] == draws[:50]
    whole = MixingSpec(probability=1, side=(1, 1))
    assert {drawn.side for drawn in draw(whole, 0, 0, 20, LOW) if drawn} == {LOW}


def stream(
    root: Path, start: int = 0, rank: int = 0, world_size: int = 1, micro: int = 8, **data: Any
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return LR and HR of one rank's share of samples 8 x `start` to 23, by number."""
    names = []
    for i in range(7):
        pixels = photograph(i, 72, 60)
        np.save(root / f"{i}.npy", pixels.astype(np.uint16) * 257 if "depth" in data else pixels)
        names.append(f"{i}.npy")
    spec = DataSpec(crop=LOW * SCALE, **{"degradation": "gaussian", **data})
    source = CropSource.of_dataset(
        Dataset((Folder(root, names, []),)),
        spec,
        scale=SCALE,
        seed=3,
        position=Position(rank, world_size, micro),
    )
    per_step = 8 // (world_size * micro)
    loader = Loader(source, start * per_step, torch.device("cpu"), threads=1, prefetch=2)
    try:
        return {
            source.first_sample(batch.index) + i: (lr, hr)
            for batch in (next(loader) for _ in range((3 - start) * per_step))
            for i, (lr, hr) in enumerate(zip(batch.lr.numpy(), batch.hr.numpy(), strict=True))
        }
    finally:
        loader.close()


def assert_same(one: dict[int, Any], other: dict[int, Any]) -> None:
    assert one.keys() == other.keys()
    for number, sides in one.items():
        for a, b in zip(sides, other[number], strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b), number


@pytest.mark.parametrize("more", [{}, {"depth": 16}], ids=["8 bits", "16 bits"])
def test_mixed_samples_depend_only_on_the_seed_and_their_number(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    mixing = {"mixing": {"probability": 0.7}, **more}
    whole, plain = stream(tmp_path, **mixing), stream(tmp_path, **more)
    assert len(whole) == 24
    assert 10 < sum(not np.array_equal(whole[k][0], plain[k][0]) for k in whole) < 23
    pairs = stream(tmp_path, rank=0, world_size=2, micro=2, **mixing)
    pairs |= stream(tmp_path, rank=1, world_size=2, micro=2, **mixing)
    assert_same(pairs, whole)
    later = stream(tmp_path, start=2, micro=4, **mixing)
    assert_same(later, {k: whole[k] for k in range(16, 24)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixing": {"kinds": ["mixup", "cutout"]}}, "cutout"),
        ({"mixing": {"kinds": {}}}, "at least 1"),
        ({"mixing": {"kinds": {"mixup": 0}}}, "greater than 0"),
        ({"mixing": {"probability": 1.5}}, "less than or equal to 1"),
        ({"mixing": {"share": [0.5, 0.2]}}, "[0.5, 0.2] is not a range"),
        ({"mixing": {"side": 1.5}}, "numbers within 0..1"),
        ({"mixing": {"alpha": 1}}, "alpha"),
        ({"mixing": {"probability": 0.5}}, "cutblur would change nothing"),
    ],
)
def test_wrong_keys_are_one_line(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("demo", {"data.degradation": "bicubic", "data.mixing": data["mixing"]})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_kinds_may_be_names() -> None:
    assert MixingSpec(kinds="cutmix").kinds == {"cutmix": 1}
    assert MixingSpec(kinds=["mixup", "cutmix"]).kinds == {"mixup": 1, "cutmix": 1}
    assert tuple(MixingSpec().kinds) == MIXES
    assert not MixingSpec().has_partners
    assert not MixingSpec(probability=1, kinds="cutblur").has_partners
    off, on = (
        load_recipe("demo", {"data.mixing": {"probability": chance, "kinds": "mixup"}})
        for chance in (0, 0.5)
    )
    assert any("data.mixing.probability" in line for line in recipe_differences(off, on))


@pytest.mark.parametrize(("override", "sizes"), [(MIXUP, [2, 4, 6]), (BLUR, [1, 2, 3, 4, 6])])
def test_a_shortage_of_memory_splits_no_pair(
    dataset: Path, override: str, sizes: list[int]
) -> None:
    options = ("data.mixing.probability=1", "data.degradation=gaussian", override)
    plan = make_plan(TrainOptions(options, recipe="demo", dataset_dir=(dataset,)))
    assert _micro_batches(plan, 12, 11) == sizes


def test_a_micro_batch_that_is_no_whole_number_of_pairs_is_refused(dataset: Path) -> None:
    def check(*overrides: str) -> None:
        options = (
            "data.mixing.probability=1",
            "data.crop=32",
            "generator.num_features=8",
            *overrides,
        )
        plan = make_plan(TrainOptions(options, recipe="demo", dataset_dir=(dataset,)))
        check_stages([plan, plan], Ranks())

    with pytest.raises(UserError, match=r"in pairs, but it has 3; set ds\.train_batch_size"):
        check(MIXUP, "ds.train_batch_size=6", "ds.gradient_accumulation_steps=2")
    check(MIXUP, "ds.train_batch_size=6")
    check(BLUR, "ds.train_batch_size=3", "data.degradation=gaussian")
