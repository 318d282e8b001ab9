"""Data of more than 8 bits: depths of datasets, and 16-bit batches, verified by their pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray

from conftest import photograph
from fabricate import identity_network, ramp
from pipeline.cli import UserError
from pipeline.config.recipe import Recipe, recipe_differences, recipe_of
from pipeline.data.dataset import Dataset, Folder
from pipeline.data.degradations.steps import STEPS
from pipeline.data.depth import Depths
from pipeline.data.image_files import (
    TRAINING_LIST,
    VALIDATION_LIST,
    load_npy,
    npy_layout,
    read_npy,
    write_file_list,
)
from pipeline.data.image_pixels import in_depth, read_rgb, to_8_bits
from pipeline.data.loader import Batch, Loader
from pipeline.data.reader import low_resolution
from pipeline.data.source import CropSource, Position
from pipeline.data.spec import DataSpec
from pipeline.images import cubic_resize, to_bytes, to_pixels, to_tensor, unit_range
from pipeline.metrics import measure
from pipeline.models.compact import SRVGGNetCompact
from pipeline.training.options import TrainOptions, make_plan
from reading_corpus import ADOBE, GAMMA, SRGB, profile, srgb_tone

CPU = torch.device("cpu")
CROP = 32
Deep = NDArray[np.uint16]
WRITERS = {
    ".npy": lambda path, pixels: np.save(path, pixels),
    ".png": lambda path, pixels: path.write_bytes(imagecodecs.png_encode(pixels)),
    ".tif": lambda path, pixels: tifffile.imwrite(path, pixels, photometric="rgb"),
}


def deep_photograph(seed: int, height: int = 72, width: int = 60) -> Deep:
    """Return a photograph with odd lower bytes, uint16 (height, width, 3)."""
    low = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return (photograph(seed, height, width).astype(np.uint16) * 256 + low).astype(np.uint16)


def written(folder: Path, suffix: str, images: list[Any]) -> list[str]:
    folder.mkdir(exist_ok=True)
    names = [f"{i}{suffix}" for i in range(len(images))]
    for name, pixels in zip(names, images, strict=True):
        WRITERS[suffix](folder / name, pixels)
    return names


def source(
    folder: Path,
    names: list[str],
    *,
    lr: dict[str, str] | None = None,
    scale: int = 2,
    micro_batch: int = 6,
    degrades_on_host: bool = False,
    **data: Any,
) -> CropSource:
    spec = DataSpec(**{"crop": CROP, "augment": False, "depth": 16, **data})
    return CropSource.of_dataset(
        Dataset((Folder(folder, names, [], lr),)),
        spec,
        scale=scale,
        seed=0,
        position=Position(0, 1, micro_batch),
        degrades_on_host=degrades_on_host,
    )


def batches(crops: CropSource, count: int = 1) -> list[Batch]:
    loader = Loader(crops, 0, CPU, threads=1, prefetch=1)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def as_hwc(image: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def test_npy_layout_of_uint16(tmp_path: Path) -> None:
    pixels = deep_photograph(0)
    np.save(tmp_path / "a.npy", pixels)
    layout = npy_layout(tmp_path / "a.npy")
    assert (layout.height, layout.width, layout.depth, layout.row_bytes) == (72, 60, 16, 360)
    np.testing.assert_array_equal(load_npy(tmp_path / "a.npy"), pixels)
    part = read_npy(str(tmp_path / "a.npy"), layout, (5, 7, 20, 30), bytearray(20 * 360))
    np.testing.assert_array_equal(part, pixels[5:25, 7:37])
    # NumPy writes the header of version 2 differently
    with open(tmp_path / "b.npy", "wb") as file:
        np.lib.format.write_array(file, pixels, version=(2, 0))
    np.testing.assert_array_equal(load_npy(tmp_path / "b.npy"), pixels)
    np.save(tmp_path / "big.npy", pixels.astype(">u2"))
    with pytest.raises(UserError, match="little-endian uint16"):
        npy_layout(tmp_path / "big.npy")
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:-2])
    with pytest.raises(UserError, match=rf"need a file of {len(content)} bytes"):
        npy_layout(tmp_path / "a.npy")


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("augment", [False, True])
def test_every_format_gives_the_exact_crop(tmp_path: Path, suffix: str, augment: bool) -> None:
    images = [deep_photograph(i) for i in range(3)]
    crops = source(tmp_path, written(tmp_path, suffix, images), augment=augment, micro_batch=24)
    (batch,) = batches(crops)
    assert batch.hr.dtype == batch.lr.dtype == torch.uint16
    for i, sample in enumerate(crops.samples(0, 24)):
        whole = images[int(Path(sample.path).stem)]
        part = whole[sample.top : sample.top + CROP, sample.left : sample.left + CROP]
        part = part[::-1] if sample.flip_vertical else part
        part = part[:, ::-1] if sample.flip_horizontal else part
        part = part.transpose(1, 0, 2) if sample.transpose else part
        np.testing.assert_array_equal(as_hwc(batch.hr[i]), part)


def test_lr_is_the_cubic_of_hr_to_a_sixteenth_of_a_level(tmp_path: Path) -> None:
    """Rounded to 16 bits, and not to 8."""
    crops = source(tmp_path, written(tmp_path, ".npy", [deep_photograph(0)]), augment=True)
    (batch,) = batches(crops)
    reference = cubic_resize(batch.hr.double(), (CROP // 2, CROP // 2)).clamp(0, 65535)
    inner = (..., slice(2, -2), slice(2, -2))  # the border depends on pixels around the crop
    assert (batch.lr.double() - reference)[inner].abs().max() < 0.6


def test_mixed_files_are_converted_to_the_depth_of_the_run(tmp_path: Path) -> None:
    deep, plain = deep_photograph(0), photograph(1, 72, 60)
    np.save(tmp_path / "deep.npy", deep)
    np.save(tmp_path / "plain.npy", plain)
    (tmp_path / "plain.png").write_bytes(imagecodecs.png_encode(plain))
    (tmp_path / "deep.png").write_bytes(imagecodecs.png_encode(deep))
    names = sorted(path.name for path in tmp_path.iterdir())
    pixels = {"deep": deep, "plain": plain.astype(np.uint16) * 257}
    for depth in (16, 8):
        crops = source(tmp_path, names, micro_batch=16, depth=depth)
        (batch,) = batches(crops)
        seen = set()
        for i, sample in enumerate(crops.samples(0, 16)):
            whole = pixels[Path(sample.path).stem]
            part = whole[sample.top : sample.top + CROP, sample.left : sample.left + CROP]
            np.testing.assert_array_equal(
                as_hwc(batch.hr[i]), part if depth == 16 else to_8_bits(part)
            )
            seen.add(Path(sample.path).name)
        assert seen == set(names)


def test_pixels_of_8_bits_give_the_same_network_input_in_both_depths(tmp_path: Path) -> None:
    names = written(tmp_path, ".npy", [photograph(0, 72, 60)])
    (plain,), (deep,) = (batches(source(tmp_path, names, depth=depth)) for depth in (8, 16))
    assert torch.equal(unit_range(plain.hr, torch.float32), unit_range(deep.hr, torch.float32))
    assert torch.equal(plain.hr, to_bytes(unit_range(deep.hr, torch.float32)))
    difference = unit_range(plain.lr, torch.float32) - unit_range(deep.lr, torch.float32)
    assert 0 < difference.abs().max() < 0.51 / 255  # the 8-bit LR is rounded, this one is not


@pytest.mark.parametrize(
    "degradation", ["bicubic", {"name": "gaussian"}, {"name": "realesrgan"}], ids=str
)
def test_degradations_differ_from_8_bits_only_by_rounding(tmp_path: Path, degradation: Any) -> None:
    names = written(tmp_path, ".npy", [photograph(0, 120, 120)])
    data = {"degradation": degradation, "augment": True}
    for on_host in (False, True):
        plain, deep = (
            batches(source(tmp_path, names, depth=depth, degrades_on_host=on_host, **data))[0].lr
            for depth in (8, 16)
        )
        levels = deep.double() / 257
        if degradation == {"name": "realesrgan"}:  # JPEG within it makes a level of each half
            assert (plain.double() - levels).abs().mean() < 0.5
        else:
            assert (plain.double() - levels).abs().max() < 0.51
            assert (levels != levels.round()).any()


def test_noise_and_brightness_are_not_rounded_to_8_bits(tmp_path: Path) -> None:
    names = written(tmp_path, ".npy", [photograph(0, 120, 120)])
    noise = {"probability": 1.0, "sigma": (1.0, 10.0)}
    brightness = {"probability": 1.0, "range": (0.7, 1.1)}
    plain, deep = (
        batches(source(tmp_path, names, depth=depth, lr_noise=noise, brightness=brightness))[0]
        for depth in (8, 16)
    )
    for before, after in zip((plain.hr, plain.lr), (deep.hr, deep.lr), strict=True):
        levels = after.double() / 257
        # brightness is rounded before LR is made, so LR may be two roundings away
        assert (before.double() - levels).abs().max() < 1.2
        assert (levels != levels.round()).any()


def test_sharpened_hr_and_chains_are_not_rounded_to_8_bits(tmp_path: Path) -> None:
    names = written(tmp_path, ".npy", [photograph(0, 160, 160)])
    chain = {"name": "chain", "steps": [{"blur": {"sigma": 1.0}}]}
    for degradation, on_host in (("bicubic", False), (chain, True)):
        data = {"degradation": degradation, "sharpen_hr": True, "degrades_on_host": on_host}
        plain, deep = (
            batches(source(tmp_path, names, depth=depth, **data))[0] for depth in (8, 16)
        )
        for before, after in zip((plain.hr, plain.lr), (deep.hr, deep.lr), strict=True):
            levels = after.double() / 257
            assert (before.double() - levels).abs().max() < 1.2
            assert (levels != levels.round()).any()


@pytest.mark.parametrize("step", STEPS)
def test_no_step_of_a_chain_rounds_to_8_bits(tmp_path: Path, step: str) -> None:
    """LR of 16 bits differs from LR of 8 by rounding; only dithering makes levels of its own."""
    names = written(tmp_path, ".npy", [photograph(0, 80, 80)])
    data = {"degradation": {"name": "chain", "steps": [{step: {}}], "surroundings": 16}}
    plain, deep = (
        batches(source(tmp_path, names, depth=depth, micro_batch=2, threads=1, **data))[0].lr
        for depth in (8, 16)
    )
    levels = deep.double() / 257
    assert deep.dtype == torch.uint16
    assert (plain.double() - levels).abs().mean() < 0.6
    assert (levels != levels.round()).any() == (step != "dither")


def test_low_resolution_of_a_whole_image(tmp_path: Path) -> None:
    pixels = deep_photograph(0, 64, 48)
    lr = low_resolution(pixels, DataSpec().degradation, 2, seed=0, number=0)
    tensor = torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None]
    reference = cubic_resize(tensor, (32, 24))[0].permute(1, 2, 0).clamp(0, 65535).numpy()
    assert lr.dtype == np.uint16
    assert np.abs(lr - reference)[2:-2, 2:-2].max() < 0.6


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_10_bit_ramp_survives_loader_and_identity_network(tmp_path: Path, suffix: str) -> None:
    """Loader, identity network, saved file: bit for bit, for paired LR and for HR."""
    written(tmp_path / "hr", suffix, [ramp().repeat(2, 0).repeat(2, 1)])
    names = written(tmp_path / "lr", suffix, [ramp()])
    lr = {name: str(tmp_path / "lr" / name) for name in names}
    (batch,) = batches(
        source(tmp_path / "hr", names, lr=lr, degradation="paired", crop=128, micro_batch=1)
    )
    with torch.inference_mode():
        output = to_pixels(identity_network()(batch.lr), 16)
    saved = tmp_path / "out.png"
    saved.write_bytes(imagecodecs.png_encode(as_hwc(output[0])))
    np.testing.assert_array_equal(read_rgb(saved, 16), ramp())
    assert len(np.unique(read_rgb(saved, 16)[..., 0])) == 1024


def test_depths_of_a_dataset_are_counted_and_named(tmp_path: Path) -> None:
    written(tmp_path, ".npy", [deep_photograph(0), photograph(1, 72, 60), photograph(2, 72, 60)])
    (tmp_path / "9.png").write_bytes(imagecodecs.png_encode(deep_photograph(3)))
    training, validation = ["0.npy", "1.npy", "missing.npy"], ["2.npy", "9.png"]
    depths = Dataset((Folder(tmp_path, training, validation),)).depths
    assert depths.counts == {8: 2, 16: 2}
    assert (depths.chosen("auto"), depths.chosen(8), depths.chosen(16)) == (16, 8, 16)
    assert depths.line(16) == (
        f"mixed depths: 2 files have 16 bits per value ({tmp_path}/0.npy) and 2 have 8 "
        f"({tmp_path}/1.npy); batches have 16 bits, and the files of 8 are scaled to them "
        "(data.depth=8: round to 8)"
    )
    assert depths.line(8).endswith("; data.depth: 8 rounds them to 8")
    plain = Dataset((Folder(tmp_path, ["1.npy"], ["2.npy"]),)).depths
    assert (plain.chosen("auto"), plain.line(8)) == (8, "")
    assert "all files have 8" in plain.line(16)
    deep = Dataset((Folder(tmp_path, ["0.npy"], ["9.png"]),)).depths
    assert deep.line(16) == "files of 16 bits per value: all; batches have 16 bits"


def test_only_some_files_of_long_lists_are_looked_at(tmp_path: Path) -> None:
    (name,) = written(tmp_path, ".npy", [deep_photograph(0)])
    depths = Depths()
    depths.look_at([str(tmp_path / name)] * 5000)
    assert depths.counts[16] == 512
    assert "all of the 512 files looked at" in depths.line(16)


def test_a_wide_profile_is_converted_in_16_bits(tmp_path: Path) -> None:
    deep = deep_photograph(0) // 2 + 16384  # colours within sRGB
    tifffile.imwrite(
        tmp_path / "wide.tif", deep, photometric="rgb", iccprofile=profile(b"RGB ", GAMMA)
    )
    linear = (deep / 65535) ** GAMMA @ ADOBE.T @ np.linalg.inv(SRGB).T
    converted = read_rgb(tmp_path / "wide.tif", 16)
    assert converted.dtype == np.uint16
    assert np.abs(converted / 257 - 255 * srgb_tone(linear)).max() < 0.3
    assert np.abs(converted - deep.astype(int)).max() > 10 * 257


def test_a_run_has_one_depth_and_refuses_another(tmp_path: Path) -> None:
    written(tmp_path, ".npy", [deep_photograph(0), photograph(1, 72, 60)])
    lists = (TRAINING_LIST, ["0.npy", "1.npy"]), (VALIDATION_LIST, ["1.npy"])
    for name, names in lists:
        write_file_list(tmp_path / name, names)

    def recipe(*overrides: str) -> Recipe:
        options = TrainOptions(overrides, recipe="demo", dataset_dir=(tmp_path,))
        return make_plan(options).recipe

    assert recipe().data.depth == recipe("data.depth=auto").data.depth == 16
    assert recipe("data.depth=8").data.depth == 8
    (line,) = recipe_differences(recipe("data.depth=8"), recipe())
    assert line == "data.depth: 8 in the run, 16 asked for"
    earlier = recipe("data.depth=8").model_dump(mode="json")
    del earlier["data"]["depth"]  # written before there were depths, by a run in 8 bits
    assert recipe_differences(recipe_of(earlier, "a run"), recipe()) == [line]
    assert recipe_differences(recipe_of(earlier, "a run"), recipe("data.depth=8")) == []
    with pytest.raises(UserError, match=r"data\.depth"):
        recipe("data.depth=12")


def smooth(seed: int, side: int = 96) -> Deep:
    """Return a dark, smooth gradient, uint16 (side, side, 3), of about 12 levels of 8 bits."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    planes = []
    for _ in range(3):
        angle, phase, waves = (
            rng.uniform(0, 2 * np.pi),
            rng.uniform(0, 2 * np.pi),
            rng.uniform(1, 2),
        )
        wave = np.sin(2 * np.pi * waves * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        planes.append(257 * (rng.uniform(20, 60) + 6 * wave))
    return np.rint(np.stack(planes, axis=2)).astype(np.uint16)


def trained(folder: Path, names: list[str], depth: int) -> SRVGGNetCompact:
    """Train a small network on the loader's batches of `depth` bits."""
    torch.manual_seed(0)
    network = SRVGGNetCompact(scale=2, num_features=8, num_conv=1)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    crops = source(folder, names, depth=depth, augment=True, micro_batch=4, threads=1)
    for batch in batches(crops, 150):
        optimizer.zero_grad()
        loss = (network(batch.lr) - unit_range(batch.hr, torch.float32)).abs().mean()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks so small that threads only wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.mark.usefixtures("one_thread")
def test_training_in_16_bits_avoids_the_banding_of_8(tmp_path: Path) -> None:
    """The same network and samples: only the depth of the run differs."""
    names = written(tmp_path, ".npy", [smooth(i) for i in range(8)])
    scores: dict[int, list[float]] = {8: [], 16: []}
    for depth in scores:
        network = trained(tmp_path, names, depth)
        for seed in range(100, 104):
            hr = smooth(seed)
            lr = low_resolution(in_depth(hr, depth), DataSpec().degradation, 2, seed=0, number=0)
            with torch.inference_mode():
                sr = to_pixels(network(to_tensor(lr)), depth)
            deep = to_tensor(in_depth(as_hwc(sr[0]), 16))
            scores[depth].append(measure(deep, to_tensor(hr), 2)["psnr_rgb"])
    for in_8, in_16 in zip(scores[8], scores[16], strict=True):
        assert in_16 > in_8 + 2, scores


def test_half_precision_holds_white_of_16_bits() -> None:
    white = torch.tensor([65535], dtype=torch.int32).to(torch.uint16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = unit_range(white, dtype)
        assert (found.dtype, found.item()) == (dtype, 1.0)
