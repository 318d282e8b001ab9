"""tools/images_to_data.py as a process: bytes, restarts, errors."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import warm
from dataset_corpus import (
    CHECKOUT,
    UNGATED,
    assert_user_error,
    bad_files,
    deep_png,
    encoded,
    good_files,
    photograph,
    run_tool,
    stamped_tree,
    tree,
    write_files,
)
from pipeline.data.image_files import npy_layout
from pipeline.data.image_pixels import to_8_bits
from tools.crops.grid import halved
from tools.images import encode


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Good photographs of several sizes, in folders, next to files that are not photographs."""
    folder = tmp_path_factory.mktemp("photos")
    write_files(
        folder,
        {
            "a.png": encoded(photograph(150, 210, 1), "png"),
            "a.jpg": encoded(photograph(150, 210, 1), "jpeg"),
            "deep/er/b.PNG": encoded(photograph(64, 130, 2), "png"),
            "deep/ö c.webp": encoded(photograph(140, 90, 3), "webp"),
            "small.png": encoded(photograph(30, 400, 4), "png"),
            "notes.txt": b"no photograph",
            ".hidden.png": b"junk",
            "quarantine/bad.png": b"junk",
        },
    )
    os.symlink("/", folder / "linked_folder")
    return folder


def cut(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run images_to_data.py without its quality gates, which have their own tests."""
    return run_tool("images_to_data", *arguments, *UNGATED)


def rejects(out: Path) -> list[dict]:
    """The lines of rejects.jsonl."""
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text("utf-8").splitlines()]


def records(out: Path) -> list[dict]:
    """The manifest's lines."""
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text("utf-8").splitlines()]


def test_crops_are_the_photographs_pixels(photos, tmp_path):
    out = tmp_path / "out"
    result = cut(photos, out, "--size", 48)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    pyramids = {"a.png": {1: photograph(150, 210, 1)}, "deep/er/b.PNG": {1: photograph(64, 130, 2)}}
    for name in ("a.jpg", "deep/ö c.webp"):  # lossy, so halved first
        pyramids[name] = {2: halved(np.asarray(Image.open(photos / name).convert("RGB")))}
    pyramids["a.png"][2] = halved(pyramids["a.png"][1])
    seen = {}
    for record in records(out):
        pixels = np.load(out / record["path"])
        assert npy_layout(out / record["path"])[1:] == (48, 48, 8)
        top, left = record["top"], record["left"]
        assert np.array_equal(
            pixels, pyramids[record["photo"]][record["scale"]][top : top + 48, left : left + 48]
        )
        assert record["sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
        key = record["photo"], record["scale"]
        seen[key] = seen.get(key, 0) + 1
    assert seen == {("a.png", 1): 12, ("a.png", 2): 2, ("a.jpg", 2): 2, ("deep/er/b.PNG", 1): 2}
    assert {record["path"] for record in records(out)} == {
        name for name in tree(out) if name.endswith(".npy")
    }
    assert "4 photos" not in result.stdout  # the .webp is 70x45 after halving
    assert "3 photos cut into 18 crops" in result.stdout
    assert "rejected small.png: too small: 30x400" in result.stdout
    assert "for what and why; a smaller --size keeps small ones" in result.stdout
    assert {entry["photo"]: entry["gate"] for entry in rejects(out)} == {
        "small.png": "size",
        "deep/ö c.webp": "size",
    }
    assert "too small: 140x90 (70x45 after halving" in rejects(out)[0]["reason"]


def test_thread_count_does_not_matter_and_seed_does(photos, tmp_path):
    for name, arguments in {
        "one": ["--threads", 1],
        "three": ["--threads", 3],
        "seed": ["--seed", 7],
    }.items():
        assert cut(photos, tmp_path / name, "--size", 48, *arguments).returncode == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    assert {*tree(tmp_path / "one")} == {*tree(tmp_path / "seed")}
    assert tree(tmp_path / "one") != tree(tmp_path / "seed")


@pytest.mark.parametrize("form", ["png", "webp"])
def test_encoded_crops_hold_the_same_pixels(photos, tmp_path, form):
    for name in ("npy", form):
        assert cut(photos, tmp_path / name, "--size", 48, "--format", name).returncode == 0
    for raw, other in zip(records(tmp_path / "npy"), records(tmp_path / form), strict=True):
        assert (raw["sha256"], raw["top"], raw["left"]) == (
            other["sha256"],
            other["top"],
            other["left"],
        )
        image = Image.open(tmp_path / form / other["path"])
        assert image.format.lower() == form
        assert np.array_equal(np.asarray(image), np.load(tmp_path / "npy" / raw["path"]))


def test_encoders_are_exact_on_noise():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for form in ("png", "webp"):
        decoded = cv2.imdecode(np.frombuffer(encode(noise, form), np.uint8), cv2.IMREAD_COLOR_RGB)
        assert np.array_equal(decoded, noise)


def test_cover_lossy_size_and_number_of_scales(photos, tmp_path):
    result = cut(
        photos, tmp_path / "out", "--size", 48, "--cover", "--keep-lossy-size", "--num-scales", 1
    )
    assert result.returncode == 0
    counts = {}
    for record in records(tmp_path / "out"):
        assert record["scale"] == 1
        counts[record["photo"]] = counts.get(record["photo"], 0) + 1
    assert counts == {"a.png": 20, "a.jpg": 20, "deep/er/b.PNG": 6, "deep/ö c.webp": 6}


def test_a_single_photograph(photos, tmp_path):
    """Also beside its crops; a second photograph is added to them."""
    write_files(
        tmp_path,
        {
            "a.png": (photos / "a.png").read_bytes(),
            "b.png": (photos / "deep/er/b.PNG").read_bytes(),
        },
    )
    for number, name in enumerate(("a.png", "b.png"), 1):
        result = cut(tmp_path / name, tmp_path / "out", "--size", 48)
        assert result.returncode == 0
        assert "no longer" not in result.stdout
        assert len({record["photo"] for record in records(tmp_path / "out")}) == number


def test_every_kind_of_photograph(tmp_path):
    write_files(tmp_path / "photos", good_files())
    write_files(tmp_path / "photos/bad", bad_files())
    result = cut(tmp_path / "photos", tmp_path / "out", "--size", 48)
    assert result.returncode == 1, result.stderr
    assert result.stderr == ""
    assert {record["photo"] for record in records(tmp_path / "out")} == {*good_files()}
    refused = rejects(tmp_path / "out")
    assert sorted(entry["photo"] for entry in refused) == sorted(
        f"bad/{name}" for name in bad_files()
    )
    assert {entry["gate"] for entry in refused} == {"decode"}
    assert not (tmp_path / "out/bad").exists()


def test_more_than_twenty_rejects_are_listed_in_the_file(tmp_path):
    write_files(tmp_path / "photos", {f"{number:02}.png": b"text" for number in range(25)})
    result = cut(tmp_path / "photos", tmp_path / "out", "--size", 48)
    assert result.returncode == 1
    assert result.stdout.count("\nrejected ") == 20
    assert "... and 5 more in" in result.stdout
    assert len(rejects(tmp_path / "out")) == 25


def test_decompression_bomb_is_rejected_undecoded(tmp_path):
    write_files(
        tmp_path / "photos",
        {
            "bomb.png": encoded(Image.new("L", (4000, 1000)), "png"),
            "fine.png": encoded(photograph(50, 50), "png"),
        },
    )
    arguments = [tmp_path / "photos", tmp_path / "out", "--size", 48, "--max-megapixels", 3.9]
    result = cut(*arguments)
    assert result.returncode == 1
    assert "rejected bomb.png: 1000x4000 is 4 megapixels, above the limit of 3.9" in result.stdout


@pytest.mark.parametrize("bytes_written", [0, 3000, 9000, 20_000])
def test_killed_run_goes_on_where_it_was(tmp_path, bytes_written):
    write_files(
        tmp_path / "photos",
        {
            f"{number:02}.png": encoded(photograph(200, 260, number), "png", compress_level=1)
            for number in range(40)
        },
    )
    arguments = ["--size", "32", "--format", "webp", "--threads", "2"]
    assert cut(tmp_path / "photos", tmp_path / "whole", *arguments).returncode == 0
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [
            sys.executable,
            str(CHECKOUT / "tools/images_to_data.py"),
            str(tmp_path / "photos"),
            str(out),
            *arguments,
            *UNGATED,
        ],
        stdout=subprocess.DEVNULL,
    )
    manifest = out / "manifest.jsonl"
    deadline = time.monotonic() + 60
    while not (manifest.exists() and manifest.stat().st_size >= bytes_written):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(records_so_far(manifest)) < len(records(tmp_path / "whole"))
    # Traces of an unlucky kill: a torn line, a half-written crop, a crop of a photo in no manifest.
    with open(manifest, "a") as file:
        file.write('{"path": "30.png/x1_0')
    write_files(out, {"39.png/x1_000_000.webp.tmp": b"half", "39.png/x4_009_009.webp": b"orphan"})
    assert cut(tmp_path / "photos", out, *arguments).returncode == 0
    assert tree(out) == tree(tmp_path / "whole")
    before = stamped_tree(out)
    result = cut(tmp_path / "photos", out, *arguments)
    assert "0 photos cut into 0 crops" in result.stdout
    assert "already there: 40 photos" in result.stdout
    assert stamped_tree(out) == before


def records_so_far(manifest: Path) -> list[str]:
    """Complete lines of a manifest that may end in a torn one."""
    return manifest.read_text().split("\n")[:-1]


def test_only_what_changed_is_made_again(photos, tmp_path):
    source = tmp_path / "photos"
    write_files(
        source,
        {
            f"{name}.png": encoded(photograph(150, 210, seed), "png")
            for seed, name in enumerate("abcd")
        },
    )
    out = tmp_path / "out"
    assert cut(source, out, "--size", 48).returncode == 0
    before = stamped_tree(out)
    write_files(
        source,
        {
            "b.png": encoded(photograph(60, 60, 9), "png"),
            "e.png": encoded(photograph(60, 60, 5), "png"),
        },
    )
    (out / "c.png/x1_000_000.npy").unlink()  # lost
    os.truncate(out / "d.png/x2_000_000.npy", 100)  # after a power failure
    result = cut(source, out, "--size", 48)
    assert "4 photos cut into 30 crops" in result.stdout
    assert "already there: 1 photo" in result.stdout
    after = stamped_tree(out)
    assert {name: stamp for name, stamp in after.items() if name.startswith("a.png/")} == {
        name: stamp for name, stamp in before.items() if name.startswith("a.png/")
    }
    assert {name for name in after if name.startswith("b.png/")} == {"b.png/x1_000_000.npy"}
    assert np.array_equal(np.load(out / "e.png/x1_000_000.npy").shape, (48, 48, 3))
    assert {record["path"] for record in records(out)} == {
        name for name in after if name.endswith(".npy")
    }
    for name in ("c.png", "d.png"):
        assert {path: after[path][0] for path in after if path.startswith(name)} == {
            path: before[path][0] for path in before if path.startswith(name)
        }


def test_photographs_that_went_keep_their_crops(tmp_path):
    write_files(
        tmp_path / "photos", {f"{name}.png": encoded(photograph(50, 50), "png") for name in "ab"}
    )
    assert cut(tmp_path / "photos", tmp_path / "out", "--size", 48).returncode == 0
    (tmp_path / "photos/a.png").unlink()
    result = cut(tmp_path / "photos", tmp_path / "out", "--size", 48)
    assert result.returncode == 0
    assert ": 1; their crops in" in result.stdout
    assert (tmp_path / "out/a.png/x1_000_000.npy").exists()


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["--size", 64], "size = 48, now size = 64"),
        (["--format", "png"], "format"),
        (["--seed", 1], "seed = 0, now seed = 1"),
        (["--cover"], "cover = false, now cover = true"),
        (["--keep-lossy-size"], "keep_lossy_size"),
        (["--num-scales", 2], "num_scales = null, now num_scales = 2"),
    ],
)
def test_other_settings_are_refused(photos, dataset, arguments, setting):
    before = stamped_tree(dataset)
    arguments = arguments if "--size" in arguments else ["--size", 48, *arguments]
    assert_user_error(cut(photos, dataset, *arguments), setting, "another OUT")
    assert stamped_tree(dataset) == before


@pytest.fixture(scope="module")
def dataset(photos, tmp_path_factory) -> Path:
    """A finished dataset that no test changes."""
    out = tmp_path_factory.mktemp("dataset") / "out"
    assert cut(photos, out, "--size", 48).returncode == 0
    return out


def test_other_photographs_are_refused(dataset, tmp_path):
    write_files(tmp_path, {"a.png": encoded(photograph(50, 50), "png")})
    assert_user_error(cut(tmp_path, dataset, "--size", 48), "photos =", "dataset.json")


def test_two_runs_at_once_are_refused(photos, dataset):
    with open(dataset / "dataset.json") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_user_error(cut(photos, dataset, "--size", 48), "another images_to_data.py")


def test_bad_usage(photos, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert_user_error(cut(tmp_path / "gone", out), "gone: no such folder")
    assert_user_error(cut(tmp_path / "empty", out), "no images (PNG, JPEG")
    assert_user_error(cut(photos, out, "--size", 31), "--size 31", "32 to 8192")
    assert_user_error(cut(photos, out, "--max-megapixels", 0), "--max-megapixels")
    assert_user_error(cut(photos, out, "--num-scales", 0), "--num-scales")
    assert_user_error(cut(photos, out, "--threads", -1), "--threads -1")
    assert_user_error(cut(photos, photos), "neither may lie within the other")
    assert_user_error(cut(photos, photos / "crops"), "neither may lie within the other")
    assert_user_error(cut(photos / "deep", photos), "neither may lie within the other")
    assert_user_error(cut(photos, photos / "a.png"), "a.png")
    assert not (photos / "crops").exists()


def test_an_unknown_flag_names_the_nearest(photos, tmp_path):
    result = cut(photos, tmp_path / "out", "--seeed", 1)
    assert result.returncode == 2
    assert "--seed" in result.stderr
    assert not (tmp_path / "out").exists()


def test_only_too_small_photographs_is_no_success(tmp_path):
    write_files(tmp_path / "photos", {"a.png": encoded(photograph(40, 40), "png")})
    result = cut(tmp_path / "photos", tmp_path / "out", "--size", 48)
    assert result.returncode == 1
    assert "0 photos cut into 0 crops" in result.stdout


def test_a_full_disk_is_one_line(photos, tmp_path):
    """A file in place of a photo's folder stands for all reasons why a crop cannot be written."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").write_bytes(b"in the way")
    assert_user_error(
        cut(photos, tmp_path / "out", "--size", 48),
        "a.png",
        "cannot be written",
        "continues where it stopped",
    )
    (tmp_path / "out/a.png").unlink()
    assert cut(photos, tmp_path / "out", "--size", 48).returncode == 0


def test_the_tools_need_no_torch(photos, tmp_path):
    """With torch made unimportable, crops are still cut, checked and listed."""
    write_files(
        tmp_path, {"block/torch/__init__.py": b"raise ImportError('no torch on this machine')"}
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "block")}
    out = tmp_path / "data/out"
    for arguments in (
        ["images_to_data", photos, out, "--size", "48", *UNGATED],
        ["check_training_data", "--data-dir", out, "--min-size", "48", *UNGATED],
        ["select_training_files", "--data-dir", out],
    ):
        command = [
            warm.python(),
            str(CHECKOUT / f"tools/{arguments[0]}.py"),
            *map(str, arguments[1:]),
        ]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stderr


def deep_photograph(height: int, width: int) -> np.ndarray:
    low = np.random.default_rng(7).integers(0, 256, (height, width, 3))
    return (photograph(height, width, 5).astype(np.uint16) * 256 + low).astype(np.uint16)


def test_depth_16_keeps_what_the_photographs_have(tmp_path):
    """From photographs to crops, through the checker, to PNG and back, bit for bit."""
    deep, plain = deep_photograph(150, 210), photograph(150, 210, 6)
    photos, out = tmp_path / "photos", tmp_path / "out"
    write_files(photos, {"deep.png": deep_png(deep), "plain.png": encoded(plain, "png")})
    arguments = (photos, out, "--size", 64, "--depth", 16)
    result = cut(*arguments)
    assert result.returncode == 0, result.stderr
    pyramids = {"deep.png": {1: deep, 2: halved(deep)}, "plain.png": {1: plain, 2: halved(plain)}}
    found = {}
    for record in records(out):
        whole = pyramids[record["photo"]][record["scale"]]
        top, left = record["top"], record["left"]
        found[record["path"]] = np.load(out / record["path"])
        assert found[record["path"]].dtype == whole.dtype
        np.testing.assert_array_equal(
            found[record["path"]], whole[top : top + 64, left : left + 64]
        )
    assert {pixels.dtype for pixels in found.values()} == {np.dtype("u1"), np.dtype("<u2")}
    before = stamped_tree(out)
    assert cut(*arguments).returncode == 0
    assert stamped_tree(out) == before
    assert_user_error(cut(photos, out, "--size", 64), "started with depth = 16, now depth = 8")
    assert_user_error(cut(*arguments, "--format", "webp"), "--depth 16: WebP holds 8 bits")

    result = run_tool("check_training_data", "--data-dir", out, "--min-size", 64, *UNGATED)
    assert result.returncode == 0, result.stdout
    deep_count = sum(pixels.dtype == np.uint16 for pixels in found.values())
    assert (
        f"mixed depths: {deep_count} images have 16 bits per value and "
        f"{len(found) - deep_count} have 8; " in result.stdout
    )
    for source, target, form in ((out, "png", "png"), (tmp_path / "png", "npy", "npy")):
        result = run_tool("convert_dataset", source, tmp_path / target, "--to", form)
        assert result.returncode == 0, result.stdout
    for path, pixels in found.items():
        np.testing.assert_array_equal(np.load(tmp_path / "npy" / path), pixels)
    result = run_tool(
        "check_training_data", "--data-dir", tmp_path / "png", "--min-size", 64, *UNGATED
    )
    assert result.returncode == 0, result.stdout  # the manifest's hashes are those of uint16 pixels


def test_without_depth_crops_have_8_bits(tmp_path):
    deep = deep_photograph(80, 90)
    write_files(tmp_path / "photos", {"deep.png": deep_png(deep)})
    assert cut(tmp_path / "photos", tmp_path / "out", "--size", 64).returncode == 0
    (record,) = records(tmp_path / "out")
    crop = np.load(tmp_path / "out" / record["path"])
    top, left = record["top"], record["left"]
    np.testing.assert_array_equal(crop, to_8_bits(deep)[top : top + 64, left : left + 64])
    assert "depth" not in json.loads((tmp_path / "out/dataset.json").read_text())
