"""The DALI graph and the loader, by their pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from conftest import photograph
from pipeline.cli import UserError
from pipeline.data.loader import Batch, Loader
from pipeline.data.reader import CropSource, Position
from pipeline.data.sampling import Sampler, anchor
from pipeline.images import cubic_resize

CPU = torch.device("cpu")
CROP = 32


def source(root: Path, names: list[str], *, scale: int = 2, rank: int = 0, world_size: int = 1, micro_batch: int = 4,
           seed: int = 0) -> CropSource:
    return CropSource(root, names, Sampler(len(names), seed), crop=CROP, scale=scale,
                      position=Position(rank, world_size, micro_batch))


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
    """CHW as the loader gives it -> HWC as it was cut from the file."""
    image = pixels.transpose(2, 1, 0) if transposed else pixels.transpose(1, 2, 0)
    image = image[:, ::-1] if horizontal else image
    return image[::-1] if vertical else image


def test_hr_is_the_drawn_crop_turned_exactly(tmp_path: Path) -> None:
    names = images(tmp_path, ".npy")
    crops = source(tmp_path, names, micro_batch=40)
    batch, = batches(crops, 0, 1)
    draws = crops.sampler.draw(0, 40)
    seen = set()
    for i, file in enumerate(draws.files):
        whole = np.load(tmp_path / names[file])
        top, left = (anchor(f, length, CROP, 2) for f, length in
                     ((draws.top[i], whole.shape[0]), (draws.left[i], whole.shape[1])))
        turned = (int(draws.flip_vertical[i]), int(draws.flip_horizontal[i]), int(draws.transpose[i]))
        seen.add(turned)
        np.testing.assert_array_equal(undone(batch.hr[i].numpy(), *turned), whole[top:top + CROP, left:left + CROP])
    assert len(seen) == 8


@pytest.mark.parametrize("scale", [2, 4])
def test_lr_is_the_cubic_of_hr_and_turned_with_it(tmp_path: Path, scale: int) -> None:
    names = images(tmp_path, ".npy")
    turned = source(tmp_path, names, scale=scale, micro_batch=24)
    batch, = batches(turned, 0, 1)
    straight = source(tmp_path, names, scale=scale, micro_batch=24)
    straight.sampler.augment = False
    plain, = batches(straight, 0, 1)
    draws = turned.sampler.draw(0, 24)
    for i in range(24):
        how = (int(draws.flip_vertical[i]), int(draws.flip_horizontal[i]), int(draws.transpose[i]))
        np.testing.assert_array_equal(undone(batch.lr[i].numpy(), *how), undone(plain.lr[i].numpy(), 0, 0, 0))
    # DALI repeats the outermost pixels where the kernel reaches over the edge.
    around, low = 4 * scale, CROP // scale
    padded = torch.nn.functional.pad(batch.hr.double(), (around,) * 4, mode="replicate")
    reference = cubic_resize(padded, (low + 8, low + 8))[..., 4:-4, 4:-4].clamp(0, 255)
    assert (batch.lr.double() - reference).abs().max() < 0.501  # rounded to the nearest level, nothing else


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
    batch, = batches(crops, 0, 1)
    draws = crops.sampler.draw(0, 4)
    whole = cv2.imread(str(tmp_path / names[draws.files[0]]))[..., ::-1]
    top, left = anchor(draws.top[0], 72, CROP, 2), anchor(draws.left[0], 60, CROP, 2)
    how = (int(draws.flip_vertical[0]), int(draws.flip_horizontal[0]), int(draws.transpose[0]))
    difference = undone(batch.hr[0].numpy(), *how).astype(int) - whole[top:top + CROP, left:left + CROP]
    assert abs(difference).max() <= 2  # JPEG decoders may round differently


def test_pixels_are_the_same_for_one_two_and_four_ranks(tmp_path: Path) -> None:
    names = images(tmp_path, ".npy", count=7)

    def global_batches(world_size: int, accumulation: int) -> list[list[str]]:
        micro = 8 // (world_size * accumulation)
        shares = [batches(source(tmp_path, names, rank=rank, world_size=world_size, micro_batch=micro), 0,
                          3 * accumulation) for rank in range(world_size)]
        steps = []
        for step in range(3):
            ordered = [share[step * accumulation + i] for i in range(accumulation) for share in shares]
            steps.append([hashlib.sha256(batch.hr[i].numpy().tobytes() + batch.lr[i].numpy().tobytes()).hexdigest()
                          for batch in ordered for i in range(micro)])
        return steps

    alone = global_batches(1, 1)
    assert len({sample for step in alone for sample in step}) > 20
    assert global_batches(2, 1) == alone
    assert global_batches(4, 1) == alone
    assert global_batches(2, 2) == alone


def test_starting_anywhere_gives_what_would_have_come_there(tmp_path: Path) -> None:
    names = images(tmp_path, ".npy", count=5)
    whole = batches(source(tmp_path, names), 0, 6)
    for start in (1, 3, 5):  # in mid-epoch and across the end of one
        for expected, got in zip(whole[start:], batches(source(tmp_path, names), start, 6 - start), strict=True):
            assert got.index == expected.index
            assert torch.equal(got.hr, expected.hr)
            assert torch.equal(got.lr, expected.lr)


def damaged(root: Path, how: str) -> str:
    """The name of a file that cannot be trained on."""
    if how == "truncated png":
        images(root, ".png", count=1)
        (root / "bad.png").write_bytes((root / "0.png").read_bytes()[:2000])
        return "bad.png"
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


@pytest.mark.parametrize("how", ["truncated png", "text", "small png", "truncated npy", "float npy", "small npy",
                                 "missing"])
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
