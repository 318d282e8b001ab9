"""The ways of benchmarks/loader.py deliver the same kind of batches from the same images."""

from __future__ import annotations

import gc
import multiprocessing
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from nvidia.dali.pipeline import Pipeline

from benchmarks import loader
from benchmarks.loader import Cost, Setting
from benchmarks.loader_ways import DALI_NUMPY, DALI_PNG, HOST, OPERATORS, OURS, TORCH_PNG, WAYS
from conftest import photograph
from pipeline.cli import RunError, UserError

Batches = dict[str, list[np.ndarray]]
SIZE, CROP, LOW = 48, 32, 16


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Six images that the benchmark has cut from three photographs."""
    folder = tmp_path_factory.mktemp("crops")
    photos = tmp_path_factory.mktemp("photos")
    for i in range(3):
        cv2.imwrite(str(photos / f"{i}.png"), photograph(i, SIZE + 5, 2 * SIZE + 3))
    made = Setting(folder, CROP, 2, 16, 1)
    assert loader.cut_photographs([photos], made, SIZE, 100) == 6
    return made


@pytest.fixture(scope="module")
def batches(setting: Setting) -> Batches:
    """The first batch of each way; torch's comes from a process of its own, because it forks."""
    return {
        name: loader._in_child(loader.first_batch, way, setting)
        if name == TORCH_PNG
        else loader.first_batch(way, setting)
        for name, way in WAYS.items()
    }


@pytest.fixture(scope="module")
def tried(setting: Setting) -> Batches:
    return {name: loader.first_batch(way, setting) for name, way in OPERATORS.items()}


def place(crop: np.ndarray, images: list[np.ndarray]) -> tuple[int, int, int, int] | None:
    """Return (image, top, left, symmetry) of an HWC crop."""
    side = crop.shape[0]
    for symmetry in range(8):
        turned = np.rot90(crop, symmetry % 4)
        turned = turned[:, ::-1] if symmetry >= 4 else turned
        for i, image in enumerate(images):
            starts = image[: image.shape[0] - side + 1, : image.shape[1] - side + 1]
            for top, left in np.argwhere((starts == turned[0, 0]).all(2)):
                if np.array_equal(image[top : top + side, left : left + side], turned):
                    return i, int(top), int(left), symmetry
    return None


def places(batch: np.ndarray, images: list[np.ndarray]) -> list[tuple[int, int, int, int] | None]:
    channels_last = batch if batch.shape[-1] == 3 else batch.transpose(0, 2, 3, 1)
    return [place(crop, images) for crop in channels_last]


def test_the_three_folders_hold_the_same_images(setting: Setting) -> None:
    for npy, png, lr in zip(*map(setting.files, ("npy", "png", "lr_png")), strict=True):
        image = np.load(npy)
        assert image.shape == (SIZE, SIZE, 3)
        np.testing.assert_array_equal(cv2.imread(str(png))[..., ::-1], image)
        reference = (
            loader._cubic_lr(image.transpose(2, 0, 1)[None], 2)[0].transpose(1, 2, 0).clip(0, 255)
        )
        assert abs(cv2.imread(str(lr))[..., ::-1] - reference).max() < 0.501


def test_all_ways_deliver_the_same_shapes_and_the_cubic_of_their_hr(
    setting: Setting, batches: Batches, tried: Batches
) -> None:
    loader.check(batches, WAYS, setting)
    loader.check(tried, OPERATORS, setting)


def test_no_dali_pipeline_is_left_when_a_way_has_ended(setting: Setting) -> None:
    """Its threads would still run when the child exits, which occasionally aborts it."""

    def pipelines() -> int:
        return sum(type(kept) is Pipeline for kept in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = pipelines()
        for name in ("this loader, PNG, from its cache", "this loader, npy, realesrgan", DALI_PNG):
            loader.first_batch(WAYS[name], setting)
            assert pipelines() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("spoil", ["shape", "levels", "bytes", "host"])
def test_the_check_rejects_batches_that_are_not_comparable(
    setting: Setting, batches: Batches, spoil: str
) -> None:
    spoiled = {name: [array.copy() for array in batch] for name, batch in batches.items()}
    if spoil == "shape":
        spoiled[DALI_PNG][1] = spoiled[DALI_PNG][1][..., :-1]
    elif spoil == "levels":
        spoiled[TORCH_PNG][1][3, 1, 8, 8] += np.float32(2 / 255)
    elif spoil == "bytes":
        spoiled[loader.OURS_PNG][0][0, 0, 0, 0] ^= 1
    else:
        spoiled[DALI_NUMPY][0] = spoiled[DALI_NUMPY][0][:-1]
    names = {"shape": DALI_PNG, "levels": TORCH_PNG, "bytes": loader.OURS_PNG, "host": DALI_NUMPY}
    with pytest.raises(RunError, match=names[spoil]):
        loader.check(spoiled, WAYS, setting)


def test_every_crop_is_cut_out_of_an_image(setting: Setting, batches: Batches) -> None:
    images = [np.load(file) for file in setting.files("npy")]
    ours, regions = places(batches[OURS][0], images), places(batches[HOST][0], images)
    margin = batches[HOST][0].shape[1] - CROP
    for crop, region in zip(ours, regions, strict=True):
        assert region[0] == crop[0]
        assert region[3] == 0
        assert all(0 <= crop[axis] - region[axis] <= margin for axis in (1, 2))
    assert len({found[3] for found in ours}) > 4
    read = places(batches[DALI_NUMPY][0], images)
    assert {found[3] for found in read} == {0}
    assert len({found[:3] for found in read}) > 8


def test_the_ancestors_graph_cuts_turns_and_brightens(setting: Setting) -> None:
    images = [np.load(file) for file in setting.files("npy")]
    hr = loader.first_batch(WAYS[DALI_PNG], replace(setting, micro_batch=64))[0]
    found = [where for where in places(hr, images) if where]
    assert 0.6 * 64 < len(found) < 64  # a fifth is made brighter or darker
    assert {where[3] for where in found} == set(range(8))


def test_torch_pairs_lie_at_the_same_place(setting: Setting, batches: Batches) -> None:
    images = [np.load(file) for file in setting.files("npy")]
    small = [cv2.imread(str(file))[..., ::-1] for file in setting.files("lr_png")]
    hr, lr = (np.rint(array * 255).astype(np.uint8) for array in batches[TORCH_PNG])
    assert batches[TORCH_PNG][0].dtype == np.float32
    for high, low in zip(places(hr, images), places(lr, small), strict=True):
        assert high == (low[0], 2 * low[1], 2 * low[2], low[3])


def test_the_variants_change_the_cost_and_not_the_pixels(tried: Batches) -> None:
    for name in (
        "files mapped, the maps kept",
        "files mapped again",
        "np.load of whole files",
        "HR turned by DALI",
        "... and cut out by DALI",
        "flips and a transpose",
        "prefetch 1",
        "one thread",
    ):
        for one, other in zip(tried[name], tried[OURS], strict=True):
            np.testing.assert_array_equal(one, other)
    assert len(tried["without LR"]) == 1
    np.testing.assert_array_equal(tried["without LR"][0], tried[OURS][0])
    for name, twin in (
        ("rotate", "rotate, nearest pixel"),
        ("the margin cut off LR, not left out", OURS),
        ("... of CHW, after the transpose", "LR without the margin"),
    ):
        np.testing.assert_array_equal(tried[name][0], tried[twin][0])
        # The two passes are in another order.
        assert abs(tried[name][1].astype(int) - tried[twin][1]).max() <= 1


def _burn(pipe: Connection) -> None:
    while time.process_time() < 0.3:
        pass
    pipe.send("done")
    pipe.recv()


def test_the_cpu_time_of_children_counts_while_they_run() -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    before = loader._cpu_seconds() - time.process_time()
    child = context.Process(target=_burn, args=(there,))
    child.start()
    assert here.recv() == "done"
    # Not 0.3: the kernel's clock ticks every 10 ms.
    assert loader._cpu_seconds() - time.process_time() - before > 0.27
    here.send("end")
    child.join()
    assert loader._cpu_seconds() - time.process_time() - before > 0.27


def test_measuring_counts_whole_batches(setting: Setting) -> None:
    cost = loader.measure(WAYS[HOST], setting, 0.01)
    assert cost.images % setting.micro_batch == 0
    assert cost.images > 0
    assert cost.wall >= 0.01


def test_ratios_are_those_within_a_round() -> None:
    ours = [Cost(1, 2, 100), Cost(2, 2, 100), Cost(1, 1, 300)]
    other = [Cost(1, 1, 50), Cost(4, 1, 50), Cost(1, 1, 100)]
    assert loader._ratio(ours, other, "wall_rate") == (3, 2, 4)
    assert loader._ratio(ours, other, "core_rate") == (1, 1, 3)


def test_too_small_photographs_are_refused(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "small.png"), photograph(0, 40, 60))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="48x48"):
        loader.cut_photographs([tmp_path], Setting(tmp_path / "out", CROP, 2, 4, 1), SIZE, 10)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"scale": 3}, "--scale 3 must be 2, 4 or 8"),
        ({"batch": 0}, "--batch must be at least 1"),
        (
            {"only": ("nothing",)},
            "--only nothing: matches none of the ways; choose from this loader, npy, ",
        ),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        loader.main(loader.Options((tmp_path,), **wrong))
