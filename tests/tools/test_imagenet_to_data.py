"""tools/imagenet_to_data.py as a process: a tar of tars to crops, restarts, damage, errors."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_corpus import (
    CHECKOUT,
    assert_user_error,
    bad_files,
    encoded,
    good_files,
    photograph,
    run_tool,
    stamped_tree,
    tree,
    write_files,
)
from pipeline.cli import UserError
from tools.crops.grid import halved
from tools.imagenet_to_data import Options, main

# Waves are not photographs, but the gates are not tested here.
PLAIN = ("--size", 48, "--min-sharpness", 0, "--min-gradient", 0, "--keep-duplicates")


def tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def jpeg(height: int, width: int, seed: int) -> bytes:
    return encoded(photograph(height, width, seed), "jpeg", quality=95)


def imagenet(classes: int = 3, images: int = 4, height: int = 120, width: int = 160) -> bytes:
    """A tar with one tar of JPEGs per class, with ImageNet's names."""
    return tar(
        {
            f"n{number:08}.tar": tar(
                {
                    f"n{number:08}_{image}.JPEG": jpeg(height, width, 10 * number + image)
                    for image in range(images)
                }
            )
            for number in range(classes)
        }
    )


def records(out: Path) -> list[dict]:
    """The manifest's lines."""
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text("utf-8").splitlines()]


def rejects(out: Path) -> dict[str, tuple[str, str]]:
    """Photo -> (gate, reason)."""
    path = out / "rejects.jsonl"
    lines = (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    )
    return {line["photo"]: (line["gate"], line["reason"]) for line in lines}


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Path:
    """An ImageNet of three classes, which no test changes."""
    path = tmp_path_factory.mktemp("archives") / "train.tar"
    path.write_bytes(imagenet())
    return path


def test_crops_are_the_members_pixels(train, tmp_path):
    out = tmp_path / "out"
    result = run_tool("imagenet_to_data", train, "--out", out, *PLAIN)
    assert (result.returncode, result.stderr) == (0, "")
    seen = set()
    for record in records(out):
        _, inner, member = record["photo"].split("/")
        number, image = int(inner[1:9]), int(member[10:-5])
        pixels = halved(np.asarray(Image.open(io.BytesIO(jpeg(120, 160, 10 * number + image)))))
        top, left = record["top"], record["left"]
        crop = np.load(out / record["path"])
        assert np.array_equal(crop, pixels[top : top + 48, left : left + 48])
        assert record["sha256"] == hashlib.sha256(crop.tobytes()).hexdigest()
        assert record["path"] == f"{record['photo']}/x2_000_000.npy"
        seen.add(record["photo"])
    assert seen == {
        f"train.tar/n{number:08}.tar/n{number:08}_{image}.JPEG"
        for number in range(3)
        for image in range(4)
    }
    assert "12 photos cut into 12 crops" in result.stdout
    assert {record["path"] for record in records(out)} == {
        name for name in tree(out) if name.endswith(".npy")
    }


def test_packing_and_threads_do_not_matter(train, tmp_path):
    """The same members under the same names give the same bytes, however they are packed."""
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz/train.tar").write_bytes(gzip.compress(train.read_bytes(), 1))
    os.utime(tmp_path / "gz/train.tar", ns=(0, 0))
    for name, source, threads in (
        ("one", train, 1),
        ("three", train, 3),
        ("packed", tmp_path / "gz/train.tar", 2),
    ):
        result = run_tool(
            "imagenet_to_data", source, "--out", tmp_path / name, *PLAIN, "--threads", threads
        )
        assert result.returncode == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    npy = {name: digest for name, digest in tree(tmp_path / "one").items() if name.endswith(".npy")}
    assert npy == {
        name: digest for name, digest in tree(tmp_path / "packed").items() if name.endswith(".npy")
    }


def test_the_crops_make_a_training_set(train, tmp_path):
    """The other tools accept them: each member of a class is a photograph of its own."""
    assert (
        run_tool("imagenet_to_data", train, "--out", tmp_path / "data/ImageNet", *PLAIN).returncode
        == 0
    )
    result = run_tool(
        "select_training_files", "--data-dir", tmp_path / "data", "--validation-photo", "*_2.JPEG*"
    )
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "data/training_file_list.txt").read_text().splitlines()) == 9
    assert len((tmp_path / "data/validation_file_list.txt").read_text().splitlines()) == 3


def test_every_kind_of_photograph_and_every_bad_one(tmp_path):
    good, bad = good_files(), bad_files()
    (tmp_path / "mix.tar").write_bytes(
        tar(
            {
                **{f"good/{name}": data for name, data in good.items()},
                "bad.tar": tar(bad),
                "notes.txt": b"text",
                "._x.jpg": b"mac",
            }
        )
    )
    result = run_tool("imagenet_to_data", tmp_path / "mix.tar", "--out", tmp_path / "out", *PLAIN)
    assert (result.returncode, result.stderr) == (1, "")
    assert {record["photo"] for record in records(tmp_path / "out")} == {
        f"mix.tar/good/{name}" for name in good
    }
    found = rejects(tmp_path / "out")
    assert set(found) == {f"mix.tar/bad.tar/{name}" for name in bad}
    assert {gate for gate, _ in found.values()} == {"decode"}
    assert "skipped: 1 hidden, 1 other" in result.stdout
    assert not (tmp_path / "out/mix.tar/bad.tar").exists()


def test_the_rest_goes_on_after_damage(train, tmp_path):
    """Truncated JPEG, corrupt header in a class, truncated outer archive: each is reported, the
    others are cut."""
    inner = bytearray(tar({f"{image}.JPEG": jpeg(120, 160, image) for image in range(4)}))
    block = 512 + len(jpeg(120, 160, 0)) + -len(jpeg(120, 160, 0)) % 512
    inner[block + 3] ^= 0x55
    whole = tar(
        {
            "a.tar": tar({"cut.JPEG": jpeg(120, 160, 5)[:-400], "fine.JPEG": jpeg(120, 160, 6)}),
            "b.tar": bytes(inner),
            "c.tar": tar({"c.JPEG": jpeg(120, 160, 7), "d.JPEG": jpeg(120, 160, 8)}),
        }
    )
    (tmp_path / "t.tar").write_bytes(whole[: whole.rindex(jpeg(120, 160, 8)) + 3000])
    result = run_tool(
        "imagenet_to_data", tmp_path / "t.tar", train, "--out", tmp_path / "out", *PLAIN
    )
    assert (result.returncode, result.stderr) == (1, "")
    photos = {record["photo"] for record in records(tmp_path / "out")}
    assert {photo for photo in photos if photo.startswith("t.tar")} == {
        "t.tar/a.tar/fine.JPEG",
        "t.tar/b.tar/0.JPEG",
        "t.tar/c.tar/c.JPEG",
    }
    assert len(photos) == 3 + 12
    found = rejects(tmp_path / "out")
    assert set(found) == {"t.tar/a.tar/cut.JPEG", "t.tar/b.tar", "t.tar/c.tar", "t.tar"}
    assert "corrupt header" in found["t.tar/b.tar"][1]
    assert "truncated within c.tar" in found["t.tar"][1]
    assert "rejected t.tar: it is truncated" in result.stdout
    # reported again by the second run, because nothing was repaired
    before = stamped_tree(tmp_path / "out/t.tar")
    result = run_tool(
        "imagenet_to_data", tmp_path / "t.tar", train, "--out", tmp_path / "out", *PLAIN
    )
    assert result.returncode == 1
    assert "0 photos cut into 0 crops" in result.stdout
    assert rejects(tmp_path / "out") == found
    assert stamped_tree(tmp_path / "out/t.tar") == before


def test_hostile_names_stay_within_out(tmp_path):
    names = [
        "../../../up.jpg",
        "/abs.jpg",
        "C:\\win.jpg",
        "new\nline.jpg",
        "manifest.jsonl",
        "x2_000_000.npy",
        "a",
        "a/b",
        "same.jpg",
        "./same.jpg",
        "ö" * 400,
    ]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for seed, name in enumerate(names):
            info, data = tarfile.TarInfo(name), jpeg(120, 160, seed)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "t.tar").write_bytes(file.getvalue())
    result = run_tool(
        "imagenet_to_data", tmp_path / "t.tar", "--out", tmp_path / "deep/out", *PLAIN
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len(records(tmp_path / "deep/out")) == len(names)
    assert {path.name for path in tmp_path.iterdir()} == {"t.tar", "deep"}
    assert {path.name for path in (tmp_path / "deep/out").iterdir()} == {
        "t.tar",
        "manifest.jsonl",
        "dataset.json",
    }
    before = stamped_tree(tmp_path / "deep/out/t.tar")
    result = run_tool(
        "imagenet_to_data", tmp_path / "t.tar", "--out", tmp_path / "deep/out", *PLAIN
    )
    assert f"already there: {len(names)} photos" in result.stdout
    assert stamped_tree(tmp_path / "deep/out/t.tar") == before


def test_what_was_too_small_and_what_would_keep_it(tmp_path):
    sizes = {
        "large.JPEG": (260, 300),
        "fits96.JPEG": (192, 300),
        "fits64.JPEG": (150, 300),
        "tiny.JPEG": (30, 300),
    }
    files = {name: jpeg(*size, seed) for seed, (name, size) in enumerate(sizes.items())}
    files["lossless.png"] = encoded(photograph(100, 100), "png")
    (tmp_path / "t.tar").write_bytes(tar(files))
    arguments = (tmp_path / "t.tar", "--out", tmp_path / "out", *PLAIN[2:])
    result = run_tool("imagenet_to_data", *arguments)
    assert result.returncode == 0
    assert "1 photo cut into 1 crop " in result.stdout
    advice = (
        "photos too small for --size 128: 4; --size 96 would keep 2, --size 64 would keep 3, "
        "--keep-lossy-size would keep 2 at this size"
    )
    assert advice in result.stdout
    assert {record["size"] for record in records(tmp_path / "out")} == {128}
    result = run_tool("imagenet_to_data", *arguments)  # not read again, but reported
    assert "already there: 5 photos" in result.stdout
    assert advice in result.stdout
    for size, kept in ((96, 3), (64, 4)):
        assert (
            f"{kept} photos cut into"
            in run_tool(
                "imagenet_to_data",
                tmp_path / "t.tar",
                "--out",
                tmp_path / str(size),
                *PLAIN[2:],
                "--size",
                size,
            ).stdout
        )
    assert (
        "3 photos cut"
        in run_tool(
            "imagenet_to_data",
            tmp_path / "t.tar",
            "--out",
            tmp_path / "full",
            *PLAIN[2:],
            "--keep-lossy-size",
        ).stdout
    )


def test_only_too_small_photographs_is_no_success(tmp_path):
    (tmp_path / "t.tar").write_bytes(tar({"a.jpg": jpeg(60, 60, 0)}))
    result = run_tool("imagenet_to_data", tmp_path / "t.tar", "--out", tmp_path / "out")
    assert result.returncode == 1
    assert "0 photos cut into 0 crops" in result.stdout


def test_killed_run_goes_on_where_it_was(tmp_path):
    (tmp_path / "t.tar").write_bytes(imagenet(3, 16, 200, 260))
    arguments = [*map(str, PLAIN[2:]), "--size", "32", "--format", "webp", "--threads", "2"]
    assert (
        run_tool(
            "imagenet_to_data", tmp_path / "t.tar", "--out", tmp_path / "whole", *arguments
        ).returncode
        == 0
    )
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [
            sys.executable,
            str(CHECKOUT / "tools/imagenet_to_data.py"),
            str(tmp_path / "t.tar"),
            "--out",
            str(out),
            *arguments,
        ],
        stdout=subprocess.DEVNULL,
    )
    manifest = out / "manifest.jsonl"
    deadline = time.monotonic() + 60
    while not (manifest.exists() and manifest.stat().st_size > 5000):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {json.loads(line)["photo"] for line in manifest.read_text().split("\n")[:-1]}
    assert 0 < len(done) < 48
    result = run_tool("imagenet_to_data", tmp_path / "t.tar", "--out", out, *arguments)
    assert result.returncode == 0
    assert tree(out) == tree(tmp_path / "whole")
    before = stamped_tree(out)
    result = run_tool("imagenet_to_data", tmp_path / "t.tar", "--out", out, *arguments)
    assert "0 photos cut into 0 crops" in result.stdout
    assert "already there: 48 photos" in result.stdout
    assert stamped_tree(out) == before


def test_finished_members_are_not_even_read(train, tmp_path):
    """A second run over a plain archive reads headers only; the photographs may even be erased."""
    path = tmp_path / "train.tar"
    content = bytearray(train.read_bytes())
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert run_tool("imagenet_to_data", path, "--out", tmp_path / "out", *PLAIN).returncode == 0
    before = tree(tmp_path / "out")
    start = content.find(b"\xff\xd8\xff")
    while start >= 0:
        content[start : start + 2000] = bytes(2000)
        start = content.find(b"\xff\xd8\xff", start)
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    result = run_tool("imagenet_to_data", path, "--out", tmp_path / "out", *PLAIN)
    assert result.returncode == 0
    assert "already there: 12 photos" in result.stdout
    assert tree(tmp_path / "out") == before


def test_changed_archives_are_cut_anew_others_stay(train, tmp_path):
    write_files(tmp_path, {"b.tar": tar({"x.jpg": jpeg(120, 160, 1), "y.jpg": jpeg(120, 160, 2)})})
    out = tmp_path / "out"
    assert run_tool("imagenet_to_data", tmp_path / "b.tar", "--out", out, *PLAIN).returncode == 0
    # an archive may be added later
    result = run_tool("imagenet_to_data", train, "--out", out, *PLAIN)
    assert "12 photos cut into 12 crops" in result.stdout
    before = stamped_tree(out)
    write_files(tmp_path, {"b.tar": tar({"x.jpg": jpeg(120, 160, 3), "z.jpg": jpeg(120, 160, 4)})})
    os.utime(tmp_path / "b.tar", ns=(2, 2))
    result = run_tool("imagenet_to_data", train, tmp_path / "b.tar", "--out", out, *PLAIN)
    assert result.returncode == 0
    assert "2 photos cut into 2 crops" in result.stdout
    assert "already there: 12 photos" in result.stdout
    after = stamped_tree(out)
    assert {name: stamp for name, stamp in after.items() if name.startswith("train.tar/")} == {
        name: stamp for name, stamp in before.items() if name.startswith("train.tar/")
    }
    assert {name for name in after if name.startswith("b.tar/")} == {
        "b.tar/x.jpg/x2_000_000.npy",
        "b.tar/z.jpg/x2_000_000.npy",
    }
    assert after["b.tar/x.jpg/x2_000_000.npy"] != before["b.tar/x.jpg/x2_000_000.npy"]


def test_twins_among_archives_are_turned_away(tmp_path):
    photo = jpeg(300, 400, 1)
    write_files(
        tmp_path,
        {
            "a.tar": tar({"in.tar": tar({"1.jpg": photo, "2.jpg": photo})}),
            "b.tar": tar({"3.jpg": photo}),
        },
    )
    result = run_tool(
        "imagenet_to_data",
        tmp_path / "a.tar",
        tmp_path / "b.tar",
        "--out",
        tmp_path / "out",
        *PLAIN[:-1],
    )
    assert result.returncode == 0
    assert {record["photo"] for record in records(tmp_path / "out")} == {"a.tar/in.tar/1.jpg"}
    assert {photo: gate for photo, (gate, _) in rejects(tmp_path / "out").items()} == {
        "a.tar/in.tar/2.jpg": "duplicate",
        "b.tar/3.jpg": "duplicate",
    }


def test_a_bomb_among_archives_is_given_up(tmp_path):
    bomb = gzip.compress(tar({"0.jpg": jpeg(120, 160, 1), "zeros.bin": bytes(400 << 20)}), 1)
    write_files(tmp_path, {"bomb.tar.gz": bomb, "c.tar": tar({"1.jpg": jpeg(120, 160, 2)})})
    result = run_tool(
        "imagenet_to_data",
        tmp_path / "bomb.tar.gz",
        tmp_path / "c.tar",
        "--out",
        tmp_path / "out",
        *PLAIN,
        "--max-expansion",
        20,
    )
    assert (result.returncode, result.stderr) == (1, "")
    assert {record["photo"] for record in records(tmp_path / "out")} == {
        "bomb.tar.gz/0.jpg",
        "c.tar/1.jpg",
    }
    assert "20 times its size" in rejects(tmp_path / "out")["bomb.tar.gz"][1]


def test_bad_usage(train, tmp_path):
    out = tmp_path / "out"
    os.mkfifo(tmp_path / "fifo.tar")
    write_files(
        tmp_path,
        {
            "text.tar": b"no tar" * 200,
            "other/train.tar": tar({"a.jpg": b"x"}),
            ".hidden.tar": tar({"a": b"x"}),
            "manifest.jsonl": tar({"a": b"x"}),
        },
    )
    for archive, words in {
        "fifo.tar": "not a regular file",
        "text.tar": "not a tar archive",
        "gone.tar": "no such file",
        ".hidden.tar": "rename",
        "manifest.jsonl": "rename",
        "other/train.tar": "same name",
    }.items():
        with pytest.raises(UserError, match=words):
            main(Options(archives=(train, tmp_path / archive), out=out))
    with pytest.raises(UserError, match="within the other"):
        main(Options(archives=(train,), out=train.parent))
    for name, value in {
        "size": 31,
        "max_megapixels": 0,
        "max_member_mb": 0,
        "max_expansion": 0,
        "threads": -1,
    }.items():
        with pytest.raises(UserError, match="--" + name.replace("_", "-")):
            main(Options(archives=(train,), out=out, **{name: value}))
    assert_user_error(
        run_tool("imagenet_to_data", train, tmp_path / "fifo.tar", "--out", out), "fifo.tar"
    )
    assert_user_error(run_tool("imagenet_to_data", "--out", out), "no archive")
    assert_user_error(run_tool("imagenet_to_data", train), "--out")
    assert not out.exists()


def test_other_settings_are_refused(train, tmp_path):
    assert run_tool("imagenet_to_data", train, "--out", tmp_path / "out", *PLAIN).returncode == 0
    before = stamped_tree(tmp_path / "out")
    assert_user_error(
        run_tool("imagenet_to_data", train, "--out", tmp_path / "out", *PLAIN, "--size", 32), "size"
    )
    write_files(tmp_path, {"photos/a.jpg": jpeg(120, 160, 1)})
    assert_user_error(
        run_tool("images_to_data", tmp_path / "photos", tmp_path / "out", *PLAIN), "another OUT"
    )
    assert stamped_tree(tmp_path / "out") == before
