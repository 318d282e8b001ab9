"""tools/pairs_to_data.py as a process: matching, alignment, and files that are not pairs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset_corpus import (
    UNGATED,
    assert_user_error,
    deep_png,
    encoded,
    photograph,
    run_tool,
    stamped_tree,
    tree,
    write_files,
)
from dataset_photographs import blurred, photographs, recompressed
from fabricate import shared
from pipeline.cli import UserError
from pipeline.data.image_files import TRAINING_LIST, VALIDATION_LIST, read_file_list
from pipeline.data.pair_matching import NamePair, match_pairs
from tools.crops.leakage import BenchmarkIndex
from tools.crops.pairs import correlation, has_swapped_colors, shift, tone_fault

SCALE = 4


def reduced(pixels: np.ndarray) -> np.ndarray:
    """The LR side: means of 4x4 pixels, which would show a shift by a single HR pixel."""
    height, width = (side // SCALE for side in pixels.shape[:2])
    return cv2.resize(
        pixels[: height * SCALE, : width * SCALE], (width, height), interpolation=cv2.INTER_AREA
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """HR photographs and their LR sides, named as in DIV2K, as in SelfExSR, and equally."""
    root = tmp_path_factory.mktemp("pairs")
    photos = {
        "0001": photograph(130, 203, 1),
        "img_001_SRF_4": photograph(96, 96, 2),
        "same": photograph(101, 99, 3),
    }
    write_files(
        root / "HR",
        {
            "0001.png": encoded(photos["0001"], "png"),
            "same.png": encoded(photos["same"], "png"),
            "img_001_SRF_4_HR.png": encoded(photos["img_001_SRF_4"], "png"),
        },
    )
    write_files(
        root / "LR",
        {
            "X4/0001x4.png": encoded(reduced(photos["0001"]), "png"),
            "same.bmp": encoded(reduced(photos["same"]), "bmp"),
            "img_001_SRF_4_LR.png": encoded(reduced(photos["img_001_SRF_4"]), "png"),
        },
    )
    return root / "HR", root / "LR"


def cut(folders: tuple[Path, Path], out: Path, *arguments: object):
    return run_tool(
        "pairs_to_data",
        *folders,
        "--scale",
        SCALE,
        "--out",
        out,
        "--size",
        48,
        *UNGATED,
        *arguments,
    )


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arguments", [(), ("--cover", "--format", "webp", "--seed", 5)])
def test_crops_stay_aligned(folders, tmp_path, arguments):
    """Each LR crop is, to the pixel, the reduction of its HR crop."""
    result = cut(folders, tmp_path / "out", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    by_path = {record["path"]: record for record in records(tmp_path / "out")}
    hr_records = [record for record in by_path.values() if "lr" in record]
    assert len(hr_records) * 2 == len(by_path) >= 16
    for record in hr_records:
        lr_record = by_path[record["lr"]]
        assert lr_record["role"] == "lr"
        assert (record["top"], record["left"]) == (
            lr_record["top"] * SCALE,
            lr_record["left"] * SCALE,
        )
        hr, lr = (_pixels(tmp_path / "out" / path) for path in (record["path"], record["lr"]))
        assert (hr.shape, lr.shape) == ((48, 48, 3), (12, 12, 3))
        assert np.array_equal(reduced(hr), lr)


def test_pairs_of_one_size(tmp_path):
    """At scale 1, LR is degraded but not reduced; another size or a shift is no pair."""
    photos = {f"{i}.png": photograph(130, 150, i) for i in range(3)}
    sides = {name: recompressed(pixels, 20) for name, pixels in photos.items()}
    sides["1.png"] = sides["1.png"][:65, :75]
    sides["2.png"] = np.roll(sides["2.png"], 3, axis=1)
    for folder, images in (("HR", photos), ("LR", sides)):
        files = {name: encoded(pixels, "png") for name, pixels in images.items()}
        write_files(tmp_path / folder, files)
    arguments = ("--scale", 1, "--out", tmp_path / "data/x1", "--size", 48, *UNGATED)
    result = run_tool("pairs_to_data", tmp_path / "HR", tmp_path / "LR", *arguments)
    assert "1 pair cut" in result.stdout
    rejects = (tmp_path / "data/x1/rejects.jsonl").read_text()
    assert "at --scale 1, LR must be 130x150" in rejects
    assert "LR is shifted relative to HR by 0 rows and" in rejects
    made = {record["path"]: record for record in records(tmp_path / "data/x1")}
    for record in (record for record in made.values() if "lr" in record):
        assert record["lr"] == record["path"].replace(".npy", "_lr1.npy")
        rows, columns = (slice(record[side], record[side] + 48) for side in ("top", "left"))
        for name, whole in ((record["path"], photos), (record["lr"], sides)):
            pixels = np.load(tmp_path / "data/x1" / name)
            assert np.array_equal(pixels, whole["0.png"][rows, columns])
    gates = ("--min-size", 48, "--min-gradient", 0, "--min-sharpness", 0)
    checked = run_tool("check_training_data", "--data-dir", tmp_path / "data", *gates)
    assert f"{len(made)} good, 0 bad" in checked.stdout


def _pixels(path: Path) -> np.ndarray:
    return np.load(path) if path.suffix == ".npy" else cv2.imread(str(path))[..., ::-1]


def test_a_second_run_changes_nothing_and_a_lost_side_is_made_again(folders, tmp_path):
    assert cut(folders, tmp_path).returncode == 0
    before = stamped_tree(tmp_path)
    assert "already there: 3 pairs" in cut(folders, tmp_path).stdout
    assert stamped_tree(tmp_path) == before
    (tmp_path / "0001.png/x1_000_000_lr4.npy").unlink()
    assert "1 pair cut" in cut(folders, tmp_path).stdout
    assert tree(tmp_path).keys() == before.keys()


def test_the_lists_hold_hr_alone_and_the_checker_takes_both(folders, tmp_path):
    assert cut(folders, tmp_path / "data/pairs").returncode == 0
    result = run_tool(
        "check_training_data",
        "--data-dir",
        tmp_path / "data",
        "--min-size",
        48,
        "--min-sharpness",
        0,
    )
    assert result.returncode == 0, result.stdout
    assert run_tool("select_training_files", "--data-dir", tmp_path / "data").returncode == 0
    listed = [
        name
        for file in (TRAINING_LIST, VALIDATION_LIST)
        for name in read_file_list(tmp_path / "data" / file, tmp_path / "data")
    ]
    assert sorted(listed) == sorted(
        f"pairs/{record['path']}" for record in records(tmp_path / "data/pairs") if "lr" in record
    )


def test_what_is_no_pair_is_turned_away(tmp_path):
    pixels = photograph(96, 96, 1)
    write_files(
        tmp_path / "HR",
        {
            f"{name}.png": encoded(pixels, "png")
            for name in ("good", "mirrored", "other", "large", "broken", "alone")
        },
    )
    write_files(
        tmp_path / "LR",
        {
            "good.png": encoded(reduced(pixels), "png"),
            "mirrored.png": encoded(reduced(pixels)[:, ::-1].copy(), "png"),
            "other.png": encoded(reduced(photograph(96, 96, 9)), "png"),
            "large.png": encoded(pixels[:25, :24], "png"),
            "broken.png": b"text",
            "lonely.png": encoded(reduced(pixels), "png"),
        },
    )
    result = cut((tmp_path / "HR", tmp_path / "LR"), tmp_path / "out")
    assert result.returncode == 1
    assert {record["photo"] for record in records(tmp_path / "out")} == {"good.png"}
    rejects = [
        json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    ]
    assert {entry["photo"]: entry["gate"] for entry in rejects} == {
        "mirrored.png": "pair",
        "other.png": "pair",
        "large.png": "pair",
        "broken.png": "decode",
    }
    reasons = {entry["photo"]: entry["reason"] for entry in rejects}
    assert "LR must be 24x24" in reasons["large.png"]
    assert "differ in content" in reasons["mirrored.png"]
    assert "no partner: alone.png" in result.stdout
    assert "no partner: lonely.png" in result.stdout


def test_names():
    hr = ["a/0001.png", "img_2_HR.png", "c.webp"]
    lr = ["0001x4.png", "b/img_2_LR.png", "c_x4.png", "d.png"]
    assert match_pairs(hr, lr, 4) == (
        [
            NamePair("a/0001.png", "0001x4.png"),
            NamePair("c.webp", "c_x4.png"),
            NamePair("img_2_HR.png", "b/img_2_LR.png"),
        ],
        ["d.png"],
    )
    for mark in ("x4", "x4m", "x4w", "x4d", "_x4", "-X4", "_LR", "_lq"):
        assert match_pairs(["0001.png"], [f"0001{mark}.png"], 4)[0], mark
    assert not match_pairs(["0001.png"], ["0001x2.png"], 4)[0]  # made for another scale
    with pytest.raises(UserError, match=r"a/1\.png and b/1\.png"):
        match_pairs(["a/1.png", "b/1.png"], ["1.png"], 4)


@pytest.mark.parametrize(
    ("hr", "lr", "pairs", "lonely"),
    [
        (
            ["bridge_x4.png", "view_lr.png", "a_HR.png"],
            ["bridge_x4.png", "view_lr.png", "a_HR.bmp"],
            {
                "bridge_x4.png": "bridge_x4.png",
                "view_lr.png": "view_lr.png",
                "a_HR.png": "a_HR.bmp",
            },
            [],
        ),
        (
            ["c1/1.png", "c2/1.png"],
            ["c1/1.png", "c2/1.png"],
            {"c1/1.png": "c1/1.png", "c2/1.png": "c2/1.png"},
            [],
        ),
        (
            ["c1/1_HR.png", "c2/1_HR.png"],
            ["c1/1x4.png", "c2/1x4.png"],
            {"c1/1_HR.png": "c1/1x4.png", "c2/1_HR.png": "c2/1x4.png"},
            [],
        ),
        (["c1/1.png", "c2/1.png"], ["c1/1.png"], {"c1/1.png": "c1/1.png"}, ["c2/1.png"]),
        (["1.png", "1x4.png"], ["1x4.png"], {"1x4.png": "1x4.png"}, ["1.png"]),
        (["deep/1.png"], ["X4/1.png", "X4/2x4.png"], {"deep/1.png": "X4/1.png"}, ["X4/2x4.png"]),
    ],
)
def test_the_most_alike_names_are_partners(hr, lr, pairs, lonely):
    """Side marks count only if the full names do not match; folders, if names repeat."""
    assert match_pairs(hr, lr, 4) == (
        [NamePair(name, pairs[name]) for name in sorted(pairs)],
        lonely,
    )


def test_one_folder_may_hold_both_sides(tmp_path):
    """As in SelfExSR's archives, which also contain results of other methods."""
    pixels = photograph(96, 96, 2)
    write_files(
        tmp_path / "both",
        {
            "img_001_SRF_4_HR.png": encoded(pixels, "png"),
            "img_001_SRF_4_LR.png": encoded(reduced(pixels), "png"),
            "img_001_SRF_4_bicubic.png": encoded(pixels, "png"),
            "img_002_SRF_4_HR.png": encoded(pixels, "png"),
        },
    )
    result = cut((tmp_path / "both", tmp_path / "both"), tmp_path / "out")
    assert {record["photo"] for record in records(tmp_path / "out")} == {"img_001_SRF_4_HR.png"}
    assert "no partner: img_002_SRF_4_HR.png" in result.stdout
    assert "files omitted because no name matches theirs: 1\n" in result.stdout
    assert "differ in content" not in result.stdout


def test_folders_may_lie_in_one_another(tmp_path):
    pixels = photograph(96, 96, 2)
    write_files(
        tmp_path / "DIV2K",
        {"0001.png": encoded(pixels, "png"), "LR/X4/0001x4.png": encoded(reduced(pixels), "png")},
    )
    result = cut((tmp_path / "DIV2K", tmp_path / "DIV2K/LR"), tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    assert {record["photo"] for record in records(tmp_path / "out")} == {"0001.png"}


def degraded(lr: np.ndarray) -> dict[str, np.ndarray]:
    """Degradations after which an LR side is still a true one."""
    noise = np.random.default_rng(0).normal(0, 25, lr.shape)
    return {
        "as it is": lr,
        "noise": np.clip(lr + noise, 0, 255).astype(np.uint8),
        "JPEG": recompressed(lr, 30),
        "blur": blurred(lr, 2),
    }


def moved(lr: np.ndarray, down: int, right: int) -> np.ndarray:
    matrix = np.float32([[1, 0, right], [0, 1, down]])
    return cv2.warpAffine(lr, matrix, lr.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)


def assert_told_apart(hr: np.ndarray, lr: np.ndarray, shifts: tuple[tuple[int, int], ...]) -> None:
    """True pairs pass with any degradation of LR; shifted and colour-swapped ones do not."""
    for what, side in degraded(lr).items():
        assert shift(hr, side) == (0, 0), what
        assert not has_swapped_colors(hr, side), what
        assert has_swapped_colors(hr, side[..., ::-1].copy()), what
        for down, right in shifts:
            assert shift(hr, moved(side, down, right)) == (down, right), (what, down, right)


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "coffee.png"])
def test_shifts_and_swapped_colours_are_told_from_degradations(name):
    pixels = photographs()[name]
    height, width = (side // SCALE * SCALE for side in pixels.shape[:2])
    pixels = np.ascontiguousarray(pixels[:height, :width])
    assert_told_apart(pixels, reduced(pixels), ((0, 1), (-1, 0), (1, 1), (2, 0), (0, -2)))
    every_fourth = np.ascontiguousarray(pixels[::SCALE, ::SCALE])
    assert shift(pixels, every_fourth) == (0, 0)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_true_bicubic_pairs_pass(scale):
    """MATLAB's bicubic reduction, with which the published LR sides were made."""
    folder = shared(f"data/set5/x{scale}")
    for path in sorted(folder.glob("*_HR.png")):
        hr, lr = (_pixels(folder / name) for name in (path.name, path.name.replace("_HR", "_LR")))
        hr = np.ascontiguousarray(hr[: lr.shape[0] * scale, : lr.shape[1] * scale])
        assert_told_apart(hr, np.ascontiguousarray(lr), ((0, 1), (-1, 0)))
        assert correlation(hr, degraded(lr)["noise"]) > 0.9


def recoloured(lr: np.ndarray) -> dict[str, np.ndarray]:
    """LR sides of another brightness, contrast or colour, at the limits of what is accepted."""
    values = lr / 255
    worn = blurred(lr, 3) + np.random.default_rng(2).normal(0, 25, lr.shape)
    made = {
        "gamma 1/2.2": 255 * values ** (1 / 2.2),
        "gamma 2.2": 255 * values**2.2,
        "half as bright": lr / 2,
        "1.5 times as bright": lr * 1.5,
        "40 levels darker": lr - 40.0,
        "40 levels brighter": lr + 40.0,
        "half the contrast": (lr - 128.0) / 2 + 128,
        "white balance": lr * np.array([0.6, 1, 1.6]),
        "strong noise": lr + np.random.default_rng(1).normal(0, 50, lr.shape),
        "strong blur": blurred(lr, 3),
        "strong JPEG": recompressed(lr, 10),
        "blur, noise and JPEG": recompressed(np.clip(worn, 0, 255).astype(np.uint8), 30),
    }
    return {what: np.clip(side, 0, 255).round().astype(np.uint8) for what, side in made.items()}


def spoiled(lr: np.ndarray) -> dict[str, np.ndarray]:
    """LR sides that show nothing, or hardly anything."""
    return {
        "black": np.zeros_like(lr),
        "white": np.full_like(lr, 255),
        "grey": np.full_like(lr, 128),
        "a sixteenth of the brightness": lr // 16,
        "nearly black": np.random.default_rng(1).integers(0, 3, lr.shape).astype(np.uint8),
        "no red": lr * np.array([0, 1, 1], np.uint8),
    }


@pytest.mark.parametrize("folder", ["kodak", "sunhays80"])
def test_the_tone_of_lr_is_judged_on_real_photographs(folder):
    """Whole photographs, and crops of 192 pixels, as small as datasets have them."""
    for path in sorted(shared(f"data/{folder}").glob("*.png"))[::8]:
        photo = _pixels(path)
        whole = np.ascontiguousarray(photo[: photo.shape[0] // 4 * 4, : photo.shape[1] // 4 * 4])
        for hr in (whole, np.ascontiguousarray(whole[:192, :192])):
            lr = reduced(hr)
            for what, side in {**degraded(lr), **recoloured(lr)}.items():
                clipped = ((side == 0) | (side == 255)).mean(axis=(0, 1)).max()
                if clipped < 0.5:  # otherwise a colour of a bright sky, say, is lost
                    assert tone_fault(hr, side) == "", (path.name, hr.shape, what)
            if lr.std(axis=(0, 1)).min() > 8:
                for what, side in spoiled(lr).items():
                    assert "LR " in tone_fault(hr, side), (path.name, hr.shape, what)


def test_gray_and_flat_pairs_say_nothing():
    gray = np.repeat(photograph(96, 96)[..., :1], 3, axis=2)
    assert not has_swapped_colors(gray, reduced(gray)[..., ::-1].copy())
    for flat in (np.full((96, 96, 3), 128, np.uint8), gray // 64 + 100):
        assert shift(flat, reduced(flat)) == (0, 0)


def test_shifted_and_swapped_pairs_are_turned_away(tmp_path):
    pixels = photograph(160, 160, 1)
    lr = reduced(pixels)
    sides = {"good": lr, "shifted": moved(lr, 1, 0), "swapped": lr[..., ::-1].copy()}
    write_files(tmp_path / "HR", {f"{name}.png": encoded(pixels, "png") for name in sides})
    write_files(
        tmp_path / "LR", {f"{name}.png": encoded(side, "png") for name, side in sides.items()}
    )
    folders = tmp_path / "HR", tmp_path / "LR"
    assert cut(folders, tmp_path / "out").returncode == 1
    rejects = [
        json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    ]
    assert {entry["photo"]: entry["gate"] for entry in rejects} == {
        "shifted.png": "pair",
        "swapped.png": "pair",
    }
    reasons = {entry["photo"]: entry["reason"] for entry in rejects}
    assert "1 rows and 0 columns" in reasons["shifted.png"]
    assert "red and blue" in reasons["swapped.png"]
    assert cut(folders, tmp_path / "all", "--min-correlation", -1).returncode == 0
    assert {record["photo"] for record in records(tmp_path / "all")} == {
        f"{name}.png" for name in sides
    }


def test_pairs_of_another_tone_are_turned_away_and_found_by_the_checker(tmp_path):
    pixels = photograph(160, 160, 1)
    lr = reduced(pixels)
    sides = {"good": lr, "dark": recoloured(lr)["half as bright"], **spoiled(lr)}
    write_files(tmp_path / "HR", {f"{name}.png": encoded(pixels, "png") for name in sides})
    write_files(
        tmp_path / "LR", {f"{name}.png": encoded(side, "png") for name, side in sides.items()}
    )
    done = cut((tmp_path / "HR", tmp_path / "LR"), tmp_path / "out")
    assert done.returncode == 1, done.stdout
    assert {record["photo"] for record in records(tmp_path / "out")} == {"good.png", "dark.png"}
    # The same pairs in a dataset that no tool of ours made.
    for number, (name, side) in enumerate(sides.items()):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        np.save(folder / "x1_000_000.npy", np.roll(pixels, 16 * number, axis=1))
        np.save(folder / "x1_000_000_lr4.npy", np.roll(side, 4 * number, axis=1))
    checked = run_tool(
        "check_training_data", "--data-dir", tmp_path / "data", "--min-size", 32, *UNGATED
    )
    assert checked.returncode == 1, checked.stderr
    bad = {
        line.split("/")[0].removeprefix("bad: ")
        for line in checked.stdout.splitlines()
        if line.startswith("bad: ") and "/x1_000_000.npy: not a pair" in line
    }
    assert bad == sides.keys() - {"good", "dark"}, checked.stdout


def test_a_part_of_a_benchmark_within_a_large_picture_rejects_the_pair(tmp_path):
    """The whole picture has too many other parts for the search, but a crop reveals it."""
    benchmark, size = photographs()["astronaut.png"], 256
    pictures = [pixels for name, pixels in photographs().items() if name != "astronaut.png"]
    tiles = [pixels[:size, :size] for pixels in pictures if min(pixels.shape[:2]) >= size]
    clean = np.vstack(
        [
            np.hstack([tiles[(3 * row + column) % len(tiles)] for column in range(4)])
            for row in range(4)
        ]
    )
    leaking = clean.copy()
    leaking[512:768, 768:1024] = benchmark[40:296, 100:356]
    write_files(tmp_path / "bench", {"astronaut.png": encoded(benchmark, "png")})
    for name, pixels in (("clean", clean), ("leaking", leaking)):
        write_files(tmp_path / "HR", {f"{name}.png": encoded(pixels, "png", compress_level=1)})
        write_files(
            tmp_path / "LR", {f"{name}.png": encoded(reduced(pixels), "png", compress_level=1)}
        )
    assert BenchmarkIndex([tmp_path / "bench"]).find(leaking) is None, (
        "the test must need the crops"
    )
    run_tool(
        "pairs_to_data",
        tmp_path / "HR",
        tmp_path / "LR",
        "--scale",
        SCALE,
        "--out",
        tmp_path / "out",
        "--size",
        256,
        "--cover",
        "--against",
        tmp_path / "bench",
        *UNGATED,
    )
    assert {record["photo"] for record in records(tmp_path / "out")} == {"clean.png"}
    rejects = [
        json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    ]
    assert [(entry["photo"], entry["gate"], entry["whole"]) for entry in rejects] == [
        ("leaking.png", "leak", True)
    ]
    assert "astronaut.png" in rejects[0]["reason"]
    assert not list((tmp_path / "out").glob("leaking.png/*")), (
        "crops that were written before must go"
    )


def test_large_pictures_are_refused_by_a_flag_that_there_is(folders, tmp_path):
    result = cut(folders, tmp_path / "out", "--max-megapixels", 0.02)
    assert (
        "0001.png: 130x203 is 0 megapixels, above the limit of 0.02 (--max-megapixels)"
        in result.stdout
    )
    assert {record["photo"] for record in records(tmp_path / "out")} == {
        "img_001_SRF_4_HR.png",
        "same.png",
    }
    assert_user_error(cut(folders, tmp_path / "none", "--max-megapixels", 0), "--max-megapixels 0")


def test_files_of_holes_are_not_read(tmp_path):
    pixels = photograph(96, 96, 1)
    write_files(tmp_path / "HR", {name: encoded(pixels, "png") for name in ("a.png", "b.png")})
    write_files(
        tmp_path / "LR", {name: encoded(reduced(pixels), "png") for name in ("a.png", "b.png")}
    )
    os.truncate(tmp_path / "HR/a.png", 1 << 40)
    result = cut((tmp_path / "HR", tmp_path / "LR"), tmp_path / "out")
    assert result.returncode == 1, result.stderr
    assert "rejected a.png: a.png: " in result.stdout
    assert {record["photo"] for record in records(tmp_path / "out")} == {"b.png"}


def test_correlation_tells_pairs_from_others():
    pixels = photograph(200, 300, 4)
    noise = np.random.default_rng(0).normal(0, 15, reduced(pixels).shape)
    noisy = np.clip(reduced(pixels) + noise, 0, 255).astype(np.uint8)
    assert correlation(pixels, reduced(pixels)) > 0.99
    assert correlation(pixels, noisy) > 0.9
    assert correlation(pixels, noisy[::-1].copy()) < 0.6


def test_bad_usage(folders, tmp_path):
    out = tmp_path / "out"
    assert_user_error(cut((tmp_path / "gone", folders[1]), out), "gone: no such folder")
    assert_user_error(
        cut(folders, out, "--size", 50), "--size 50", "multiple of the scale 4", "such as 48"
    )
    assert_user_error(run_tool("pairs_to_data", *folders, "--scale", 0, "--out", out), "--scale 0")
    assert_user_error(
        run_tool(
            "pairs_to_data",
            *folders,
            "--scale",
            3,
            "--out",
            out,
            "--size",
            48,
            "--min-correlation",
            2,
        ),
        "--min-correlation 2",
    )
    assert_user_error(cut(folders, folders[0] / "crops"), "neither may lie within the other")
    write_files(tmp_path / "others", {"unlike.png": encoded(photograph(50, 50), "png")})
    assert_user_error(cut((folders[0], tmp_path / "others"), out), "no HR file has an LR file")
    assert not out.exists()


def test_depth_16_keeps_both_sides(tmp_path):
    low = np.random.default_rng(7).integers(0, 256, (120, 140, 3))
    hr = (photograph(120, 140, 5).astype(np.uint16) * 256 + low).astype(np.uint16)
    lr = cv2.resize(hr, (35, 30), interpolation=cv2.INTER_AREA)
    for side, pixels in (("hr", hr), ("lr", lr)):
        write_files(tmp_path / side, {"a.png": deep_png(pixels)})
    out = tmp_path / "out"
    result = cut((tmp_path / "hr", tmp_path / "lr"), out, "--depth", 16)
    assert result.returncode == 0, result.stderr
    for record in records(out):
        whole = lr if record.get("role") == "lr" else hr
        side, top, left = record["size"], record["top"], record["left"]
        np.testing.assert_array_equal(
            np.load(out / record["path"]), whole[top : top + side, left : left + side]
        )
    assert len(records(out)) >= 2
