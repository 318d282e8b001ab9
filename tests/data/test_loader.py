"""The DALI graph and the loader, verified by their pixels."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from conftest import photograph
from pipeline.cli import RunError, UserError
from pipeline.data import image_access
from pipeline.data.dataset import Dataset, Folder, read_dataset
from pipeline.data.image_access import Part
from pipeline.data.image_pixels import read_rgb
from pipeline.data.loader import Batch, Loader
from pipeline.data.sampling import anchor
from pipeline.data.source import CropSource, Position
from pipeline.data.spec import DataSpec
from pipeline.images import cubic_resize
from reading_corpus import profile as made_profile

CPU = torch.device("cpu")
CROP = 32


def source(
    root: Path,
    names: list[str],
    *,
    scale: int = 2,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int = 4,
    seed: int = 0,
    augment: bool = True,
    **data: Any,
) -> CropSource:
    spec = DataSpec(crop=CROP, augment=augment, **data)
    return CropSource.of_dataset(
        Dataset((Folder(root, names, []),)),
        spec,
        scale=scale,
        seed=seed,
        position=Position(rank, world_size, micro_batch),
    )


def batches(crops: CropSource, start: int, count: int) -> list[Batch]:
    loader = Loader(crops, start, CPU, threads=1, prefetch=2)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def images(root: Path, suffix: str, count: int = 6, size: tuple[int, int] = (72, 60)) -> list[str]:
    names = []
    for i in range(count):
        pixels = photograph(i, *size)
        name = f"{i}{suffix}"
        if suffix == ".npy":
            np.save(root / name, pixels)
        else:
            assert cv2.imwrite(str(root / name), pixels[..., ::-1])
        names.append(name)
    return names


def undone(pixels: np.ndarray, vertical: int, horizontal: int, transposed: int) -> np.ndarray:
    """Undo the symmetry: CHW from the loader to HWC as in the file."""
    image = pixels.transpose(2, 1, 0) if transposed else pixels.transpose(1, 2, 0)
    image = image[:, ::-1] if horizontal else image
    return image[::-1] if vertical else image


def test_hr_is_the_drawn_crop_turned_exactly(tmp_path: Path) -> None:
    names = images(tmp_path, ".npy")
    crops = source(tmp_path, names, micro_batch=40)
    (batch,) = batches(crops, 0, 1)
    draws = crops.sampler.draw(0, 40)
    seen = set()
    for i, file in enumerate(draws.files):
        whole = np.load(tmp_path / names[file])
        top, left = (
            anchor(f, length, CROP, 2)
            for f, length in ((draws.top[i], whole.shape[0]), (draws.left[i], whole.shape[1]))
        )
        turned = (
            int(draws.flip_vertical[i]),
            int(draws.flip_horizontal[i]),
            int(draws.transpose[i]),
        )
        seen.add(turned)
        np.testing.assert_array_equal(
            undone(batch.hr[i].numpy(), *turned), whole[top : top + CROP, left : left + CROP]
        )
    assert len(seen) == 8


@pytest.mark.parametrize("scale", [2, 4])
def test_lr_is_the_cubic_of_hr_and_turned_with_it(tmp_path: Path, scale: int) -> None:
    names = images(tmp_path, ".npy")
    turned = source(tmp_path, names, scale=scale, micro_batch=24)
    (batch,) = batches(turned, 0, 1)
    (plain,) = batches(source(tmp_path, names, scale=scale, micro_batch=24, augment=False), 0, 1)
    draws = turned.sampler.draw(0, 24)
    for i in range(24):
        how = (int(draws.flip_vertical[i]), int(draws.flip_horizontal[i]), int(draws.transpose[i]))
        np.testing.assert_array_equal(
            undone(batch.lr[i].numpy(), *how), undone(plain.lr[i].numpy(), 0, 0, 0)
        )
    reference = cubic_resize(batch.hr.double(), (CROP // scale, CROP // scale)).clamp(0, 255)
    inner = (..., slice(2, -2), slice(2, -2))  # the border also depends on pixels around the crop
    # only rounded to the nearest level
    assert (batch.lr.double() - reference)[inner].abs().max() < 0.501


def test_every_storage_format_gives_the_same_batches(tmp_path: Path) -> None:
    folders = {}
    for kind in ("npy", "png", "mixed"):
        (tmp_path / kind).mkdir()
        names = images(tmp_path / kind, ".npy" if kind == "npy" else ".png")
        if kind == "mixed":
            images(tmp_path / kind, ".npy", count=3)
            names = ["0.npy", "1.npy", "2.npy", *names[3:]]
        folders[kind] = batches(source(tmp_path / kind, names, micro_batch=6), 0, 3)
    for kind in ("png", "mixed"):
        for one, other in zip(folders["npy"], folders[kind], strict=True):
            assert torch.equal(one.hr, other.hr)
            assert torch.equal(one.lr, other.lr)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp", ".tif", ".jp2"])
def test_encoded_files_are_read(tmp_path: Path, suffix: str) -> None:
    names = images(tmp_path, suffix)
    crops = source(tmp_path, names)
    (batch,) = batches(crops, 0, 1)
    draws = crops.sampler.draw(0, 4)
    whole = cv2.imread(str(tmp_path / names[draws.files[0]]))[..., ::-1]
    top, left = anchor(draws.top[0], 72, CROP, 2), anchor(draws.left[0], 60, CROP, 2)
    how = (int(draws.flip_vertical[0]), int(draws.flip_horizontal[0]), int(draws.transpose[0]))
    difference = (
        undone(batch.hr[0].numpy(), *how).astype(int) - whole[top : top + CROP, left : left + CROP]
    )
    assert abs(difference).max() <= 2  # JPEG decoders may round differently


def test_pixels_are_the_same_for_one_two_and_four_ranks(tmp_path: Path) -> None:
    names = images(tmp_path, ".npy", count=7)

    def global_batches(world_size: int, accumulation: int) -> list[list[str]]:
        micro = 8 // (world_size * accumulation)
        shares = [
            batches(
                source(tmp_path, names, rank=rank, world_size=world_size, micro_batch=micro),
                0,
                3 * accumulation,
            )
            for rank in range(world_size)
        ]
        steps = []
        for step in range(3):
            ordered = [
                share[step * accumulation + i] for i in range(accumulation) for share in shares
            ]
            steps.append(
                [
                    hashlib.sha256(
                        batch.hr[i].numpy().tobytes() + batch.lr[i].numpy().tobytes()
                    ).hexdigest()
                    for batch in ordered
                    for i in range(micro)
                ]
            )
        return steps

    alone = global_batches(1, 1)
    assert len({sample for step in alone for sample in step}) > 20
    assert global_batches(2, 1) == alone
    assert global_batches(4, 1) == alone
    assert global_batches(2, 2) == alone


def test_starting_anywhere_gives_what_would_have_come_there(tmp_path: Path) -> None:
    names = images(tmp_path, ".npy", count=5)
    whole = batches(source(tmp_path, names), 0, 6)
    for start in (1, 3, 5):  # within an epoch and across its end
        for expected, got in zip(
            whole[start:], batches(source(tmp_path, names), start, 6 - start), strict=True
        ):
            assert got.index == expected.index
            assert torch.equal(got.hr, expected.hr)
            assert torch.equal(got.lr, expected.lr)


def damaged(root: Path, how: str) -> str:
    """Return the name of a file that cannot be used for training."""
    if how == "truncated png":
        images(root, ".png", count=1)
        (root / "bad.png").write_bytes((root / "0.png").read_bytes()[:2000])
        return "bad.png"
    if how == "truncated jpeg":
        images(root, ".jpg", count=1)
        (root / "bad.jpg").write_bytes((root / "0.jpg").read_bytes()[:-400])
        return "bad.jpg"
    if how == "text":
        (root / "bad.jpg").write_text("not an image at all")
        return "bad.jpg"
    if how == "small png":
        cv2.imwrite(str(root / "bad.png"), photograph(0, 20, 60))
        return "bad.png"
    if how == "truncated npy":
        np.save(root / "whole.npy", photograph(0, 64, 64))
        (root / "bad.npy").write_bytes((root / "whole.npy").read_bytes()[:-100])
    elif how == "float npy":
        np.save(root / "bad.npy", photograph(0, 64, 64).astype(np.float32))
    elif how == "small npy":
        np.save(root / "bad.npy", photograph(0, 64, 31))
    return "bad.npy"


@pytest.mark.parametrize(
    "how",
    ["truncated png", "text", "small png", "truncated npy", "float npy", "small npy", "missing"],
)
def test_a_bad_file_is_named(tmp_path: Path, how: str) -> None:
    bad = damaged(tmp_path, how)
    names = [*images(tmp_path, ".npy", count=3), bad]
    with pytest.raises(UserError) as caught:
        batches(source(tmp_path, names), 0, 4)
    assert str(tmp_path / bad) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_closing_in_the_middle_leaves_no_thread(tmp_path: Path) -> None:
    loader = Loader(source(tmp_path, images(tmp_path, ".npy")), 0, CPU, threads=1, prefetch=2)
    next(loader)
    loader.close()
    assert not loader._thread.is_alive()
    with pytest.raises(StopIteration):
        next(loader)


def pairs(root: Path, suffix: str, count: int = 5) -> list[str]:
    """Create unrelated HR and LR files, so that neither can be made from the other."""
    names = images(root, suffix, count)
    for i, name in enumerate(names):
        lr = photograph(100 + i, 36, 30)
        target = root / f"{Path(name).stem}_lr2{suffix}"
        if suffix == ".npy":
            np.save(target, lr)
        else:
            cv2.imwrite(str(target), lr[..., ::-1])
    return names


def paired_source(
    root: Path, names: list[str], lr_root: Path | None = None, **position: int
) -> CropSource:
    (root / "training_file_list.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "validation_file_list.txt").write_text(f"{names[0]}\n")
    dataset = read_dataset([root], paired_scale=2, lr_roots=[lr_root] if lr_root else [])
    return CropSource.of_dataset(
        dataset,
        DataSpec(crop=CROP, degradation="paired"),
        scale=2,
        seed=0,
        position=Position(position.get("rank", 0), position.get("world_size", 1), 8),
    )


@pytest.mark.parametrize("suffix", [".npy", ".png"])
def test_pairs_share_one_anchor_and_one_symmetry(tmp_path: Path, suffix: str) -> None:
    names = pairs(tmp_path, suffix)
    crops = paired_source(tmp_path, names)
    seen = set()
    for start, batch in enumerate(batches(crops, 0, 4)):
        for i, sample in enumerate(crops.samples(8 * start, 8)):
            hr, lr = (
                cv2.imread(path)[..., ::-1] if suffix == ".png" else np.load(path)
                for path in (sample.path, sample.lr_path)
            )
            turned = (sample.flip_vertical, sample.flip_horizontal, sample.transpose)
            seen.add(turned)
            top, left = sample.top, sample.left
            np.testing.assert_array_equal(
                undone(batch.hr[i].numpy(), *turned), hr[top : top + CROP, left : left + CROP]
            )
            np.testing.assert_array_equal(
                undone(batch.lr[i].numpy(), *turned),
                lr[top // 2 : top // 2 + CROP // 2, left // 2 : left // 2 + CROP // 2],
            )
    assert len(seen) == 8


def test_pairs_in_folders_of_their_own_are_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "HR").mkdir()
    (tmp_path / "LR" / "X2").mkdir(parents=True)
    names = pairs(tmp_path / "HR", ".png")
    for name in names:
        stem = Path(name).stem
        (tmp_path / "HR" / f"{stem}_lr2.png").rename(tmp_path / "LR" / "X2" / f"{stem}x2.png")
    crops = paired_source(tmp_path / "HR", names, tmp_path / "LR")
    assert crops.samples(0, 1)[0].lr_path == str(
        tmp_path / "LR/X2" / f"{Path(crops.samples(0, 1)[0].path).stem}x2.png"
    )
    batches(crops, 0, 2)
    (tmp_path / "LR/X2/3x2.png").rename(tmp_path / "LR/X2/other.png")
    with pytest.raises(
        UserError, match=r"HR/3\.png: no matching LR file in .*LR \(1 of 5 files have none\)"
    ):
        paired_source(tmp_path / "HR", names, tmp_path / "LR")


def test_a_pair_of_the_wrong_size_is_named(tmp_path: Path) -> None:
    names = pairs(tmp_path, ".npy")
    np.save(tmp_path / "2_lr2.npy", photograph(0, 36, 31))
    with pytest.raises(
        UserError, match=r"2_lr2\.npy: 36x31 is not 1/2 of 72x60, the size of .*2\.npy"
    ):
        batches(paired_source(tmp_path, names), 0, 4)


def test_brightness_is_drawn_changes_hr_and_lr_follows(tmp_path: Path) -> None:
    names = images(tmp_path, ".npy")
    wanted = {"brightness": {"probability": 0.5, "range": [0.4, 0.9]}}
    (plain,) = batches(source(tmp_path, names, micro_batch=64), 0, 1)
    crops = source(tmp_path, names, micro_batch=64, **wanted)
    (batch,) = batches(crops, 0, 1)
    factors = np.array([sample.brightness for sample in crops.samples(0, 64)])
    changed = factors != 1
    assert 20 < changed.sum() < 44
    assert factors[changed].min() > 0.4
    assert factors[changed].max() < 0.9
    for i, factor in enumerate(factors):
        error = batch.hr[i].double() - plain.hr[i].double() * factor
        assert error.abs().max() <= 0.5 + 1e-3
        if factor == 1:
            assert torch.equal(batch.lr[i], plain.lr[i])
    # LR is made from the same brightened HR that the network is trained on.
    reference = cubic_resize(batch.hr.double(), (CROP // 2, CROP // 2)).clamp(0, 255)
    assert (batch.lr.double() - reference)[..., 2:-2, 2:-2].abs().max() < 0.501


def test_noise_on_lr_is_drawn_and_leaves_hr_alone(tmp_path: Path) -> None:
    (tmp_path / "gray.npy").touch()
    np.save(tmp_path / "gray.npy", np.full((72, 60, 3), 128, np.uint8))
    crops = source(
        tmp_path, ["gray.npy"], micro_batch=64, lr_noise={"probability": 0.5, "sigma": [2, 12]}
    )
    (batch,) = batches(crops, 0, 1)
    assert (batch.hr == 128).all()
    sigmas = np.array([sample.noise_sigma for sample in crops.samples(0, 64)])
    assert 20 < (sigmas > 0).sum() < 44
    for lr, sigma in zip(batch.lr.double(), sigmas, strict=True):
        # 768 values
        assert lr.std().item() == pytest.approx(np.sqrt(sigma**2 + 1 / 12) if sigma else 0, rel=0.1)
        assert abs(lr.mean().item() - 128) < 4 * max(sigma, 0.01) / np.sqrt(lr.numel())


KINDS = {
    "npy": {},
    "png": {},
    "mixed": {},
    "cached": {"cache_gb": 1},
    "multiplier": {"multiplier": 3},
    "weights": {"weights": [1.0, 3.0]},
    "pairs": {"degradation": "paired"},
    "gaussian": {"degradation": "gaussian"},
    "realesrgan": {"degradation": "realesrgan"},
    "everything": {
        "degradation": "realesrgan",
        "multiplier": 2,
        "weights": [2.0, 1.0],
        "cache_gb": 1,
        "brightness": {"probability": 0.5},
        "lr_noise": {"probability": 0.5},
    },
}


def dataset_of(root: Path, kind: str) -> Dataset:
    """Create two folders of 5 and 3 files for kinds with weights, otherwise one."""
    (root / "a").mkdir()
    names = pairs(
        root / "a",
        ".npy" if kind in {"npy", "pairs", "multiplier", "gaussian", "realesrgan"} else ".png",
    )
    if kind in {"mixed", "everything"}:
        images(root / "a", ".npy", count=2)
        names = ["0.npy", "1.npy", *names[2:]]
    lr_paths = {
        name: str(root / "a" / f"{Path(name).stem}_lr2{Path(name).suffix}") for name in names
    }
    folders = [Folder(root / "a", names, [], lr_paths)]
    if "weights" in KINDS[kind]:
        (root / "b").mkdir()
        folders.append(Folder(root / "b", images(root / "b", ".npy", count=3, size=(40, 90)), []))
    return Dataset(tuple(folders))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_the_same_from_any_step_on_any_number_of_ranks(
    tmp_path: Path, kind: str
) -> None:
    """Pixel hashes of global batches must not change.

    They are compared for 1, 2 and 4 ranks, 2 with accumulation, and a change within an epoch.
    """
    dataset, spec = dataset_of(tmp_path, kind), DataSpec(crop=CROP, **KINDS[kind])

    def hashes(world_size: int, accumulation: int, first_step: int, steps: int) -> list[list[str]]:
        micro = 8 // (world_size * accumulation)
        shares = [
            batches(
                CropSource.of_dataset(
                    dataset, spec, scale=2, seed=5, position=Position(rank, world_size, micro)
                ),
                first_step * accumulation,
                steps * accumulation,
            )
            for rank in range(world_size)
        ]
        return [
            [
                hashlib.sha256(
                    share[step * accumulation + i].hr[j].numpy().tobytes()
                    + share[step * accumulation + i].lr[j].numpy().tobytes()
                ).hexdigest()
                for i in range(accumulation)
                for share in shares
                for j in range(micro)
            ]
            for step in range(steps)
        ]

    alone = hashes(1, 1, 0, 4)  # 32 samples: several epochs
    assert len({sample for step in alone for sample in step}) > 24
    assert hashes(2, 1, 1, 2) == alone[1:3]
    assert hashes(4, 1, 2, 2) == alone[2:]
    assert hashes(2, 2, 3, 1) == alone[3:]


def test_a_cache_changes_no_pixel_and_keeps_within_its_room(tmp_path: Path) -> None:
    names = images(tmp_path, ".png", count=6)
    plain = batches(source(tmp_path, names), 0, 6)
    for gigabytes in (1, 3 * 72 * 60 * 3 / 2**30):  # capacity for all, for three
        crops = source(tmp_path, names, cache_gb=gigabytes)
        for one, other in zip(plain, batches(crops, 0, 6), strict=True):
            assert torch.equal(one.hr, other.hr)
            assert torch.equal(one.lr, other.lr)
        assert len(crops.cache._kept) == (6 if gigabytes == 1 else 3)


@pytest.mark.parametrize(
    "how",
    [
        "truncated png",
        "text",
        "small png",
        "truncated npy",
        "float npy",
        "small npy",
        "missing",
        "truncated jpeg",
    ],
)
@pytest.mark.parametrize("cache_gb", [0, 1])
def test_a_bad_file_is_skipped_counted_and_replaced(
    tmp_path: Path, how: str, cache_gb: float
) -> None:
    bad = damaged(tmp_path, how)
    names = [*images(tmp_path, ".npy", count=7), bad]
    skipping = {"on_error": "skip", "cache_gb": cache_gb}
    crops = source(tmp_path, names, **skipping)
    got = batches(crops, 0, 8)  # 4 epochs of 8
    skips = [skip for batch in got for skip in batch.skipped]
    assert len(skips) >= 4
    assert {skip.path for skip in skips} == {str(tmp_path / bad)}
    expected = [
        number for number in range(32) if names[crops.sampler.draw(number, 1).files[0]] == bad
    ]
    assert sorted({skip.sample for skip in skips}) == expected
    # Replacements are pure functions of the sample's number, too: the same from another start and
    # on two ranks.
    again = batches(source(tmp_path, names, **skipping), 4, 4)
    for one, other in zip(got[4:], again, strict=True):
        assert torch.equal(one.hr, other.hr)
    shares = [
        batches(source(tmp_path, names, rank=rank, world_size=2, micro_batch=2, **skipping), 0, 8)
        for rank in range(2)
    ]
    for i, batch in enumerate(got):
        assert torch.equal(batch.hr, torch.cat([share[i].hr for share in shares]))
    good = [np.load(tmp_path / name).reshape(-1, 3) for name in names[:-1]]
    assert all(
        any((batch.hr[j, :, 0, 0].numpy() == pixels).all(1).any() for pixels in good)
        for batch in got
        for j in range(4)
    )


@pytest.mark.parametrize("fault", ["its header tells", "decoding tells"])
def test_the_batches_before_a_bad_file_come_however_far_ahead_it_is_found(
    tmp_path: Path, fault: str
) -> None:
    names = images(tmp_path, ".png", count=40)
    crops = source(tmp_path, names)
    bad = tmp_path / names[crops.sampler.draw(17, 1).files[0]]  # of the fifth of ten batches
    data = bytearray(bad.read_bytes())
    if fault == "its header tells":
        bad.write_bytes(data[:100])
    else:
        data[len(data) // 2] ^= 255
        bad.write_bytes(data)
    loader = Loader(crops, 0, CPU, threads=1, prefetch=6)
    try:
        assert loader.is_ahead(4)
        assert not loader.is_ahead(5)
        for i in range(4):
            assert next(loader).index == i
        with pytest.raises(UserError, match=rf"{bad.name}: .*\(sample 17\)"):
            next(loader)
    finally:
        loader.close()


def test_too_many_bad_files_stop_it(tmp_path: Path) -> None:
    names = images(tmp_path, ".png", count=10)
    for name in names[:3]:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:300])
    assert batches(source(tmp_path, names, on_error="skip", max_bad_files=0.3), 0, 6)
    with pytest.raises(
        UserError,
        match=r"3 of 10 files are bad, but data\.max_bad_files 0\.2 allows only 2 \(.*\.png: ",
    ):
        batches(source(tmp_path, names, on_error="skip", max_bad_files=0.2), 0, 6)


def test_the_disks_fault_is_not_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    names = images(tmp_path, ".npy", count=3)
    monkeypatch.setattr("pipeline.data.image_access.npy_layout", fail)
    with pytest.raises(
        RunError, match=r"\.npy: Input/output error; the disk or the network failed"
    ):
        batches(source(tmp_path, names, on_error="skip"), 0, 1)


@pytest.mark.parametrize("what", ["directory", "loop", "pipe"])
@pytest.mark.parametrize("suffix", [".npy", ".png"])
def test_what_is_no_plain_file_is_a_bad_file(tmp_path: Path, what: str, suffix: str) -> None:
    bad = tmp_path / f"bad{suffix}"
    {
        "directory": bad.mkdir,
        "loop": lambda: bad.symlink_to(bad.name),
        "pipe": lambda: os.mkfifo(bad),
    }[what]()
    names = [*images(tmp_path, ".npy", count=3), bad.name]
    with pytest.raises(UserError, match=rf"bad\{suffix}: .*\(sample \d\)"):
        batches(source(tmp_path, names), 0, 2)
    skips = [
        skip
        for batch in batches(source(tmp_path, names, on_error="skip"), 0, 2)
        for skip in batch.skipped
    ]
    assert {skip.path for skip in skips} == {str(bad)}


def test_a_sample_says_where_it_came_from(tmp_path: Path) -> None:
    names = images(tmp_path, ".npy")
    crops = source(tmp_path, names, degradation="realesrgan", brightness={"probability": 1})
    sample = crops.samples(17, 1)[0]
    assert sample == crops.samples(15, 4)[2]
    assert sample.number == 17
    json.dumps(sample.as_dict())


class FlatReader:
    """A new kind of file: a text with height, width and one level."""

    is_decoded_in_graph = False

    def reads(self, path: str) -> bool:
        return path.endswith(".flat")

    def open(self, path: str) -> FlatImage:
        return FlatImage(*map(int, Path(path).read_text().split()))


class FlatImage:
    profile = ""

    def __init__(self, height: int, width: int, level: int) -> None:
        self.height, self.width, self.level = height, width, level

    def part(self, region: tuple[int, int, int, int]) -> Part:
        return Part(region, pixels=np.full((*region[2:], 3), self.level, np.uint8))


def test_a_kind_of_file_is_one_row_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_access, "READERS", (FlatReader, *image_access.READERS))
    names = images(tmp_path, ".png", 2) + images(tmp_path, ".npy", 2)
    for level in (7, 99):
        (tmp_path / f"{level}.flat").write_text(f"60 70 {level}")
        names.append(f"{level}.flat")
    crops = source(tmp_path, names)
    samples = crops.samples(0, 12)
    assert len({sample.path for sample in samples}) == 6
    for batch, first in zip(batches(crops, 0, 3), (0, 4, 8), strict=True):
        for hr, sample in zip(batch.hr, samples[first : first + 4], strict=True):
            if sample.path.endswith(".flat"):
                assert (hr == int(Path(sample.path).stem)).all()
            else:
                assert hr.float().std() > 1


def test_another_colour_profile_is_named(tmp_path: Path) -> None:
    """For an uncached file, a cached one, and LR; the pixels are those that every command reads."""
    profile = made_profile(b"RGB ", 1.4)
    names = images(tmp_path, ".png", 3)
    with PIL.Image.open(tmp_path / "1.png") as image:
        image.save(tmp_path / "1.png", icc_profile=profile)
    for options in ({}, {"cache_gb": 1}):
        crops = source(tmp_path, names, augment=False, **options)
        assert crops.profile_note() == ""
        (made,) = batches(crops, 0, 1)
        assert (
            "1.png has the colour profile Wide test: files with a profile other"
            in crops.profile_note()
        )
        assert [*crops.profiles] == [str(tmp_path / "1.png")]
        for hr, sample in zip(made.hr, crops.samples(0, 4), strict=True):
            whole = read_rgb(sample.path)[
                sample.top : sample.top + CROP, sample.left : sample.left + CROP
            ]
            np.testing.assert_array_equal(hr.permute(1, 2, 0).numpy(), whole)
