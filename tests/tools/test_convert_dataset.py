"""Conversions change the storage format but no pixel; nothing is half done or silently reduced."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from conftest import run_python
from dataset_corpus import (
    CHECKOUT,
    UNGATED,
    assert_user_error,
    deep_png,
    encoded,
    npy,
    photograph,
    run_tool,
    stamped_tree,
    tree,
    write_files,
)
from pipeline.data.image_files import read_file_list
from tools.crops.manifest import CropRecord, format_lines, iterate_lines
from tools.images import decode_file, encode


def record(path: str, pixels: np.ndarray, size: int, **more: object) -> CropRecord:
    return CropRecord(
        path,
        "a.png",
        1,
        0,
        0,
        pixels.shape[0],
        size,
        hashlib.sha256(pixels).hexdigest(),
        "opencv",
        {"gradient": 3.5, "hash": "ff" * 32},
        1000,
        123456789,
        3,
        **more,
    )


def make_dataset(root: Path, form: str = "npy", count: int = 3) -> dict[str, np.ndarray]:
    """A dataset of one source with manifest, settings, rejects and lists.

    Returns name without suffix -> pixels.
    """
    crops = {
        f"DIV2K/a.png/x1_{number:03d}_000": photograph(64, 64, number) for number in range(count)
    }
    write_files(root, {f"{name}.{form}": encode(pixels, form) for name, pixels in crops.items()})
    names = [f"{name}.{form}" for name in crops]
    records = [
        record(
            name.removeprefix("DIV2K/"),
            pixels,
            (root / name).stat().st_size,
            lr=name.removeprefix("DIV2K/") if not number else None,
            time=1.5 if number else None,
        )
        for number, (name, pixels) in enumerate(zip(names, crops.values(), strict=True))
    ]
    (root / "DIV2K/manifest.jsonl").write_text(format_lines(records))
    (root / "DIV2K/dataset.json").write_text(
        json.dumps({"size": 64, "format": form, "photos": "../../photos"})
    )
    (root / "DIV2K/rejects.jsonl").write_text('{"photo": "b.png", "gate": "size"}\n')
    (root / "training_file_list.txt").write_text("".join(f"{name}\n" for name in names[1:]))
    (root / "validation_file_list.txt").write_text(f"{names[0]}\n")
    return crops


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_tool("convert_dataset", *arguments)


def pixels_of(folder: Path, form: str) -> dict[str, np.ndarray]:
    # the folder of a photo is called a.png
    return {
        path.relative_to(folder).with_suffix("").as_posix(): decode_file(path, depth=None)
        for path in folder.rglob(f"*.{form}")
        if path.is_file()
    }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, pixels in one.items():
        np.testing.assert_array_equal(pixels, other[name])


@pytest.mark.parametrize("form", ["png", "webp", "jp2"])
def test_there_and_back_gives_the_very_same_files(form: str, tmp_path: Path) -> None:
    crops = make_dataset(tmp_path / "data")
    before = stamped_tree(tmp_path / "data")
    there = convert(tmp_path / "data", tmp_path / "there", "--to", form, "--threads", 2)
    assert there.returncode == 0, there.stderr + there.stdout
    assert stamped_tree(tmp_path / "data") == before
    assert_same(pixels_of(tmp_path / "there", form), crops)
    assert "3 images converted and verified" in there.stdout
    assert not list((tmp_path / "there").rglob("*.tmp"))
    back = convert(tmp_path / "there", tmp_path / "back", "--to", "npy")
    assert back.returncode == 0, back.stderr
    (tmp_path / "back/conversion.json").unlink()
    old, new = tree(tmp_path / "data"), tree(tmp_path / "back")
    assert {name: new[name] for name in new if not name.endswith("dataset.json")} == {
        name: old[name] for name in old if not name.endswith("dataset.json")
    }
    # The photographs' folder is stored relative to the dataset, and the sizes are those of the
    # original format again.
    assert json.loads((tmp_path / "back/DIV2K/dataset.json").read_text()) == json.loads(
        (tmp_path / "data/DIV2K/dataset.json").read_text()
    )


def test_the_bookkeeping_follows(tmp_path: Path) -> None:
    crops = make_dataset(tmp_path / "data")
    assert convert(tmp_path / "data", tmp_path / "deeper/out", "--to", "webp").returncode == 0
    out = tmp_path / "deeper/out"
    old = [record for _, record in iterate_lines(tmp_path / "data/DIV2K/manifest.jsonl")]
    new = [record for _, record in iterate_lines(out / "DIV2K/manifest.jsonl")]
    assert len(new) == len(old) == 3
    for one, other in zip(old, new, strict=True):
        assert other.path == one.path.replace(".npy", ".webp")
        assert other.lr == (one.lr and one.lr.replace(".npy", ".webp"))
        assert other.bytes == (out / "DIV2K" / other.path).stat().st_size != one.bytes
        assert (other.sha256, other.gates, other.time, other.photo) == (
            one.sha256,
            one.gates,
            one.time,
            one.photo,
        )
    names = sorted(f"{name}.webp" for name in crops)
    assert read_file_list(out / "validation_file_list.txt", out) == names[:1]
    assert read_file_list(out / "training_file_list.txt", out) == names[1:]
    settings = json.loads((out / "DIV2K/dataset.json").read_text())
    assert (settings["format"], settings["size"]) == ("webp", 64)
    assert (out / "DIV2K" / settings["photos"]).resolve() == tmp_path / "photos"
    assert (out / "DIV2K/rejects.jsonl").read_text() == (
        tmp_path / "data/DIV2K/rejects.jsonl"
    ).read_text()


def test_any_images_in_any_folders(tmp_path: Path) -> None:
    pixels = photograph(40, 52)
    opaque = np.dstack([pixels, np.full((40, 52), 255, np.uint8)])
    write_files(
        tmp_path / "in",
        {
            "a.JPG": encoded(pixels, "jpeg"),
            "b c/d.png": encoded(pixels, "png"),
            "b c/e.tif": encoded(pixels, "tiff"),
            "gray.bmp": encoded(Image.fromarray(pixels).convert("L"), "bmp"),
            "opaque.png": encoded(opaque, "png"),
            "h.npy": npy(pixels),
            "notes.txt": b"no image",
        },
    )
    result = convert(tmp_path / "in", tmp_path / "out", "--to", "png")
    assert result.returncode == 0, result.stdout
    expected = {
        path.relative_to(tmp_path / "in").with_suffix("").as_posix(): decode_file(path)
        for path in (tmp_path / "in").rglob("*.*")
        if path.suffix != ".txt"
    }
    assert_same(pixels_of(tmp_path / "out", "png"), expected)
    # A file that already has the format is copied byte by byte.
    assert (tmp_path / "out/b c/d.png").read_bytes() == (tmp_path / "in/b c/d.png").read_bytes()
    assert (
        sorted(
            path.suffix
            for path in (tmp_path / "out").rglob("*.*")
            if path.name != "conversion.json"
        )
        == [".png"] * 6
    )


def test_what_would_lose_something_is_refused_and_the_rest_is_done(tmp_path: Path) -> None:
    pixels = photograph(40, 52)
    clear = np.dstack([pixels, np.full((40, 52), 90, np.uint8)])
    write_files(
        tmp_path / "in",
        {
            "good.png": encoded(pixels, "png"),
            "deep.png": deep_png(pixels.astype(np.uint16) * 257),
            "clear.png": encoded(clear, "png"),
            "cmyk.jpg": encoded(Image.fromarray(pixels).convert("CMYK"), "jpeg"),
            "cut.png": encoded(pixels, "png")[:-90],
            "cut.npy_": b"",
            "short.npy": npy(pixels)[:-1],
        },
    )
    (tmp_path / "in/training_file_list.txt").write_text("good.png\nclear.png\n")
    result = convert(tmp_path / "in", tmp_path / "out", "--to", "npy", "--remove-source")
    assert result.returncode == 1, result.stderr
    for words in (
        "clear.png: transparency",
        "cmyk.jpg: colour mode CMYK",
        "cut.png: ",
        "short.npy: truncated",
        "2 images converted",
        "4 could not be converted",
    ):
        assert words in result.stdout, result.stdout
    deep = pixels.astype(np.uint16) * 257
    assert_same(pixels_of(tmp_path / "out", "npy"), {"good": pixels, "deep": deep})
    assert (tmp_path / "out/training_file_list.txt").read_text() == "good.npy\n"
    # After failures, the bookkeeping and all failed files stay where they were.
    assert (tmp_path / "in/training_file_list.txt").exists()
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == [
        "clear.png",
        "cmyk.jpg",
        "cut.npy_",
        "cut.png",
        "short.npy",
        "training_file_list.txt",
    ]


def test_pixels_that_the_manifest_does_not_know_are_not_carried_on(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    rotten = tmp_path / "data/DIV2K/a.png/x1_001_000.npy"
    content = bytearray(rotten.read_bytes())
    content[-7] ^= 1
    rotten.write_bytes(content)
    result = convert(tmp_path / "data", tmp_path / "out", "--to", "png")
    assert result.returncode == 1
    assert "x1_001_000.npy: the pixels differ from those that the manifest" in result.stdout
    assert [record.path for _, record in iterate_lines(tmp_path / "out/DIV2K/manifest.jsonl")] == [
        "a.png/x1_000_000.png",
        "a.png/x1_002_000.png",
    ]


def test_a_collision_is_found_before_anything_is_written(tmp_path: Path) -> None:
    write_files(
        tmp_path / "in",
        {
            "x/a.png": encoded(photograph(40, 40), "png"),
            "x/a.jpg": encoded(photograph(40, 40), "jpeg"),
        },
    )
    result = convert(tmp_path / "in", tmp_path / "out", "--to", "npy")
    assert_user_error(result, "x/a.jpg", "x/a.png", "x/a.npy", "rename")
    assert not (tmp_path / "out").exists()


def test_user_errors(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for source, out, words in (
        ("missing", "out", ["no such folder"]),
        ("data", "data/out", ["into itself"]),
        ("data", "data", ["itself"]),
        ("data/DIV2K", "data", ["itself"]),
        ("data", "other", ["contains files", "new OUT"]),
        ("empty", "out", ["no images"]),
        ("data", "other/mine.txt", ["not a folder"]),
    ):
        assert_user_error(convert(tmp_path / source, tmp_path / out, "--to", "png"), *words)
    assert_user_error(convert(tmp_path / "data", tmp_path / "out", "--to", "gif"), "gif")
    assert_user_error(
        convert(tmp_path / "data", tmp_path / "out", "--to", "png", "--max-megapixels", 0),
        "megapixels",
    )
    (tmp_path / "data/training_file_list.txt").write_text("../outside.npy\n")
    assert_user_error(convert(tmp_path / "data", tmp_path / "out", "--to", "png"), "outside.npy")
    (tmp_path / "data/training_file_list.txt").unlink()
    assert tree(tmp_path) == {
        name: digest for name, digest in before.items() if "training" not in name
    }


def test_a_second_run_does_nothing_and_another_conversion_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    assert convert(tmp_path / "data", tmp_path / "out", "--to", "png").returncode == 0
    images = {
        name: stamp
        for name, stamp in stamped_tree(tmp_path / "out").items()
        if name.endswith(".png")
    }
    again = convert(tmp_path / "data", tmp_path / "out", "--to", "png")
    assert again.returncode == 0
    assert "0 images converted" in again.stdout
    assert "already there: 3" in again.stdout
    assert {
        name: stamp
        for name, stamp in stamped_tree(tmp_path / "out").items()
        if name.endswith(".png")
    } == images
    assert_user_error(convert(tmp_path / "data", tmp_path / "out", "--to", "webp"), "started as")
    # A source that changed is converted again.
    write_files(tmp_path / "data", {"new.npy": npy(photograph(50, 50, 9))})
    changed = tmp_path / "data/new.npy"
    assert convert(tmp_path / "data", tmp_path / "out", "--to", "png").returncode == 0
    changed.write_bytes(npy(photograph(50, 50, 10)))
    assert "1 image converted" in convert(tmp_path / "data", tmp_path / "out", "--to", "png").stdout
    np.testing.assert_array_equal(decode_file(tmp_path / "out/new.png"), photograph(50, 50, 10))


def keep_time(path: Path, content: bytes) -> None:
    """Write new content with the old modification time, as archives with whole-second stamps do."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_equal_time_does_not_make_new_pixels_the_old_ones(tmp_path: Path) -> None:
    write_files(
        tmp_path / "in", {"a.npy": npy(photograph(50, 50, 1)), "b.npy": npy(photograph(50, 50, 2))}
    )
    assert convert(tmp_path / "in", tmp_path / "out", "--to", "webp").returncode == 0
    keep_time(tmp_path / "in/a.npy", npy(photograph(50, 50, 3)))
    result = convert(tmp_path / "in", tmp_path / "out", "--to", "webp", "--remove-source")
    assert result.returncode == 1, result.stdout
    assert "not converted: a.npy: " in result.stdout
    assert "exists with other pixels" in result.stdout
    # b was compared and removed
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "in/a.npy"), photograph(50, 50, 3))
    assert_same(
        pixels_of(tmp_path / "out", "webp"),
        {"a": photograph(50, 50, 1), "b": photograph(50, 50, 2)},
    )
    # Without --remove-source, the copy follows its source.
    assert "1 image converted" in convert(tmp_path / "in", tmp_path / "out", "--to", "webp").stdout
    assert_same(
        pixels_of(tmp_path / "out", "webp"),
        {"a": photograph(50, 50, 3), "b": photograph(50, 50, 2)},
    )


@pytest.mark.parametrize("removes", [False, True])
@pytest.mark.parametrize("form", ["npy", "png"])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_damaged_copy_is_made_again(
    form: str, removes: bool, is_recorded: bool, tmp_path: Path
) -> None:
    crops = make_dataset(tmp_path / "data", "webp")
    if not is_recorded:
        (tmp_path / "data/DIV2K/manifest.jsonl").unlink()
    assert convert(tmp_path / "data", tmp_path / "out", "--to", form).returncode == 0
    cut, flipped = (tmp_path / f"out/DIV2K/a.png/x1_{number:03d}_000.{form}" for number in (0, 2))
    keep_time(cut, cut.read_bytes()[:-700])
    if not removes:  # a readable copy that differs may be another image's, see above
        pixels = decode_file(flipped).copy()
        pixels[7, 7] ^= 1
        keep_time(flipped, encode(pixels, form))
    result = convert(
        tmp_path / "data", tmp_path / "out", "--to", form, *(["--remove-source"] if removes else [])
    )
    assert result.returncode == 0, result.stdout
    assert f"{'1 image' if removes else '2 images'} converted" in result.stdout
    assert_same(pixels_of(tmp_path / "out", form), crops)
    assert bool(pixels_of(tmp_path / "data", "webp")) is not removes


def test_a_copy_that_is_the_source_itself_is_no_copy(tmp_path: Path) -> None:
    write_files(
        tmp_path / "in", {"h/a.npy": npy(photograph(40, 40)), "b.npy": npy(photograph(40, 40, 1))}
    )
    assert convert(tmp_path / "in", tmp_path / "out", "--to", "npy").returncode == 0
    (tmp_path / "out/h/a.npy").unlink()
    (tmp_path / "out/h").rmdir()
    (tmp_path / "out/h").symlink_to(tmp_path / "in/h")
    result = convert(tmp_path / "in", tmp_path / "out", "--to", "npy", "--remove-source")
    assert result.returncode == 1
    assert "h/a.npy: " in result.stdout
    assert "is the same file" in result.stdout
    assert list(tree(tmp_path / "in")) == ["h/a.npy"]


def test_copies_without_a_source_are_named_and_stay(tmp_path: Path) -> None:
    crops = make_dataset(tmp_path / "data", count=4)
    assert "no longer ha" not in convert(tmp_path / "data", tmp_path / "out", "--to", "png").stdout
    moved = tmp_path / "data/quarantine/DIV2K/a.png/x1_002_000.npy"
    moved.parent.mkdir(parents=True)
    (tmp_path / "data/DIV2K/a.png/x1_002_000.npy").rename(moved)
    result = convert(tmp_path / "data", tmp_path / "out", "--to", "png")
    assert result.returncode == 0, result.stdout
    assert "no longer has a source: DIV2K/a.png/x1_002_000.png\n" in result.stdout
    assert f"images in {tmp_path / 'out'} that no longer have a source: 1;" in result.stdout
    assert_same(pixels_of(tmp_path / "out", "png"), crops)


def test_copies_whose_source_was_removed_are_not_called_surplus(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    rotten = tmp_path / "data/DIV2K/a.png/x1_001_000.npy"
    content = rotten.read_bytes()
    rotten.write_bytes(content[:-1])
    assert (
        convert(tmp_path / "data", tmp_path / "out", "--to", "png", "--remove-source").returncode
        == 1
    )
    rotten.write_bytes(content)
    for more in ([], ["--remove-source"]):
        result = convert(tmp_path / "data", tmp_path / "out", "--to", "png", *more)
        assert result.returncode == 0, result.stdout
        assert "no longer ha" not in result.stdout
    assert len(pixels_of(tmp_path / "out", "png")) == 3


def test_the_tool_that_made_the_pairs_goes_on_in_the_converted_folder(tmp_path: Path) -> None:
    pixels = photograph(96, 96)
    half = cv2.resize(pixels, (48, 48), interpolation=cv2.INTER_AREA)
    write_files(tmp_path, {"HR/a.png": encoded(pixels, "png"), "LR/a.png": encoded(half, "png")})
    cut = partial(
        run_tool,
        "pairs_to_data",
        tmp_path / "HR",
        tmp_path / "LR",
        "--scale",
        2,
        "--size",
        48,
        *UNGATED,
    )
    assert cut("--out", tmp_path / "crops").returncode == 0
    out = tmp_path / "deep/down/webp"
    assert convert(tmp_path / "crops", out, "--to", "webp").returncode == 0
    result = cut("--out", out, "--format", "webp")
    assert result.returncode == 0, result.stderr
    assert "already there: 1 pair" in result.stdout
    assert convert(tmp_path / "crops", tmp_path / "jp2", "--to", "jp2").returncode == 0
    assert_user_error(
        cut("--out", tmp_path / "jp2", "--format", "webp"), 'started with format = "jp2"'
    )


def test_the_places_of_all_sources_follow(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    settings = {
        "format": "npy",
        "photos": "../../HR",
        "lr": "../../LR",
        "videos": "../../films",
        "tool": "..",
        "against": ["/benchmarks"],
    }
    (tmp_path / "data/DIV2K/dataset.json").write_text(json.dumps(settings))
    assert convert(tmp_path / "data", tmp_path / "deep/out", "--to", "png").returncode == 0
    assert json.loads((tmp_path / "deep/out/DIV2K/dataset.json").read_text()) == settings | {
        "format": "png",
        "photos": "../../../HR",
        "lr": "../../../LR",
        "videos": "../../../films",
    }


def test_a_sparse_file_is_one_bad_image(tmp_path: Path) -> None:
    write_files(
        tmp_path / "in", dict.fromkeys(["a.png", "b.png"], encoded(photograph(40, 40), "png"))
    )
    os.truncate(tmp_path / "in/a.png", 3 << 40)
    result = convert(tmp_path / "in", tmp_path / "out", "--to", "npy")
    assert (result.returncode, result.stderr) == (1, "")
    assert "not converted: a.png: " in result.stdout
    assert "1 image converted" in result.stdout


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    assert convert(tmp_path / "data", tmp_path / "out", "--to", "png").returncode == 0
    with open(tmp_path / "out/conversion.json", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_user_error(
            convert(tmp_path / "data", tmp_path / "out", "--to", "png"),
            "another convert_dataset.py",
        )


def test_remove_source_leaves_one_copy(tmp_path: Path) -> None:
    crops = make_dataset(tmp_path / "data")
    (tmp_path / "data/DIV2K/LICENCE.txt").write_text("CC0")
    result = convert(tmp_path / "data", tmp_path / "out", "--to", "webp", "--remove-source")
    assert result.returncode == 0, result.stdout
    assert list(tree(tmp_path / "data")) == ["DIV2K/LICENCE.txt"]
    assert_same(pixels_of(tmp_path / "out", "webp"), crops)
    assert len(list(iterate_lines(tmp_path / "out/DIV2K/manifest.jsonl"))) == 3


@pytest.mark.parametrize(("form", "kills"), [("png", 3), ("jp2", 1)])
def test_killed_at_any_time_it_goes_on(form: str, kills: int, tmp_path: Path) -> None:
    """After several SIGKILLs, no file is incomplete under its own name, and all exist."""
    crops = make_dataset(tmp_path / "data", count=80)
    command = [
        sys.executable,
        str(CHECKOUT / "tools/convert_dataset.py"),
        str(tmp_path / "data"),
        str(tmp_path / "out"),
        "--to",
        form,
        "--remove-source",
        "--threads",
        "2",
    ]
    for kill in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        wanted = 10 * (kill + 1)
        while (
            len(list((tmp_path / "out").rglob(f"x1_*.{form}"))) < wanted and process.poll() is None
        ):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)  # ends only after the JPEG 2000 encoding processes
        done = pixels_of(tmp_path / "out", form)
        assert len(done) >= wanted
        left = pixels_of(tmp_path / "data", "npy")
        assert {*done} | {*left} == {*crops}  # nothing was removed that is not safely stored
        assert_same({name: crops[name] for name in done}, done)
    result = convert(*command[2:])
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same(pixels_of(tmp_path / "out", form), crops)
    assert len(list(iterate_lines(tmp_path / "out/DIV2K/manifest.jsonl"))) == 80
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert not (tmp_path / "data").exists()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    script = (
        "import sys, resource, runpy, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    result = run_python(
        script,
        str(CHECKOUT / "tools/convert_dataset.py"),
        str(tmp_path / "data"),
        str(tmp_path / "out"),
        "--to",
        "png",
    )
    assert_user_error(result, "cannot be written", "continues where it stopped")
    assert not [
        path
        for path in (tmp_path / "out").rglob("*")
        if path.suffix in (".png", ".tmp") and path.is_file()
    ]
