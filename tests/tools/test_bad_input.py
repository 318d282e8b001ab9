"""Bad input of every kind in one table, with images_to_data.py and check_training_data.py."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from dataset_corpus import CHECKOUT, UNGATED, encoded, npy, photograph, run_tool, tree, write_files

SIZE = 48


def huge_png(side: int) -> bytes:
    """A small, valid PNG of `side` x `side` pixels of one colour: a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    deflate = zlib.compressobj(1)
    rows = bytes(100 * (1 + side // 8))
    data = b"".join(deflate.compress(rows) for _ in range(side // 100)) + deflate.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


GOOD = encoded(photograph(96, 120, 1), "png")


class Case(NamedTuple):
    """A bad file, the message expected from both tools, and whether --fast detects it."""

    name: str
    content: bytes
    cutter: str | None  # message of images_to_data.py; None: it ignores or accepts the file
    checker: str | None  # message of check_training_data.py; None: the file is good
    fast: bool = True


TABLE = [
    Case("truncated.png", GOOD[:-500], "truncated", "truncated"),
    Case(
        "truncated.jpg", encoded(photograph(200, 200, 2), "jpeg")[:-300], "truncated", "truncated"
    ),
    Case(
        "truncated.webp",
        encoded(photograph(200, 200, 2), "webp", lossless=True)[:-9],
        "truncated",
        "truncated",
    ),
    Case("truncated.bmp", encoded(photograph(96, 96, 2), "bmp")[:-9], "truncated", "truncated"),
    Case("truncated.tif", encoded(photograph(96, 96, 2), "tiff")[:-400], "truncated", "truncated"),
    Case(
        "truncated.jp2", encoded(photograph(96, 96, 2), "jpeg2000")[:-50], "truncated", "truncated"
    ),
    Case("truncated.npy", npy(photograph(96, 96))[:-1], None, "truncated"),
    Case("rotten.png", GOOD[:3000] + bytes([GOOD[3000] ^ 1]) + GOOD[3001:], "CRC", "CRC"),
    Case("zero_byte.png", b"", "empty file", "empty file"),
    Case("zero_byte.npy", b"", None, "empty file"),
    Case("zeros.jpg", bytes(4000), "zero bytes", "zero bytes"),
    Case("mislabelled.jpg", GOOD, None, None),  # a PNG with the wrong suffix; its content counts
    Case("text.png", b"<html>404 Not Found</html>", "not an image", "not an image"),
    Case("movie.png", b"\0\0\0 ftypisom" + bytes(500), "video", "video"),
    Case("tiny.png", encoded(photograph(1, 1), "png"), "too small: 1x1", "1x1 is too small"),
    Case("tiny.npy", npy(photograph(1, 1)), None, "1x1 is too small"),
    Case(
        "bomb.png",
        huge_png(40_000),
        "1600 megapixels, above the limit",
        "1600 megapixels, above the limit",
    ),
]
NAMES = [case.name for case in TABLE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All bad files, all kinds of bad links, and one good photograph."""
    root = tmp_path_factory.mktemp("bad") / "photos"
    write_files(root, {case.name: case.content for case in TABLE})
    write_files(root, {"good.png": encoded(photograph(96, 120, 5), "png")})
    os.symlink("nowhere.png", root / "dangling.png")
    os.symlink("loop.png", root / "loop.png")  # a link to itself
    os.symlink(".", root / "circle")  # a folder that contains itself
    os.symlink("/proc/self/mem", root / "disk.png")  # gives the same read error as a failing disk
    return root


@pytest.fixture(scope="module")
def cut(folder) -> tuple[dict[str, str], subprocess.CompletedProcess[str]]:
    """Photograph -> reason why images_to_data.py rejected it."""
    out = folder.parent / "out"
    result = run_tool("images_to_data", folder, out, "--size", SIZE, *UNGATED)
    lines = (out / "rejects.jsonl").read_text().splitlines()
    return {entry["photo"]: entry["reason"] for entry in map(json.loads, lines)}, result


def checked(
    folder: Path, *arguments: str
) -> tuple[dict[str, str], subprocess.CompletedProcess[str]]:
    result = run_tool(
        "check_training_data", "--data-dir", folder, "--min-size", SIZE, *UNGATED, *arguments
    )
    lines = [
        line.split(": ", 2)
        for line in result.stdout.splitlines()
        if line.startswith(("bad: ", "could not"))
    ]
    return {path: reason for _, path, reason in lines}, result


@pytest.fixture(scope="module")
def full(folder):
    return checked(folder)


@pytest.fixture(scope="module")
def fast(folder):
    return checked(folder, "--fast")


@pytest.mark.parametrize("case", TABLE, ids=NAMES)
def test_the_cutter_names_the_reason(cut, case):
    assert (case.cutter is None) == (case.name not in cut[0])
    assert (case.cutter or "") in cut[0].get(case.name, "")


@pytest.mark.parametrize("case", TABLE, ids=NAMES)
def test_the_checker_names_the_reason(full, case):
    assert (case.checker is None) == (case.name not in full[0])
    assert (case.checker or "") in full[0].get(case.name, "")


@pytest.mark.parametrize("case", TABLE, ids=NAMES)
def test_the_fast_check_sees_it_too(fast, case):
    assert (case.checker is None or not case.fast) == (case.name not in fast[0])


def test_links_and_a_failing_disk(cut, full):
    for reasons, _ in (cut, full):
        assert {"dangling.png", "loop.png", "disk.png"} <= reasons.keys()
        assert "Input/output error" in reasons["disk.png"]
        assert not any(name.startswith("circle/") for name in reasons)
    assert "links to folders were not followed: circle" in full[1].stdout


def test_exit_statuses_and_what_is_good(folder, cut, full, fast):
    for _, result in (cut, full, fast):
        assert (result.returncode, result.stderr) == (1, "")
    assert {path.name for path in (folder.parent / "out").iterdir() if path.is_dir()} == {
        "good.png",
        "mislabelled.jpg",
    }


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/usr/bin/setpriv").exists(), reason="needs setpriv, as root"
)
def test_unreadable_files_are_named_and_kept(tmp_path):
    """Run without root's right to read everything."""
    write_files(tmp_path / "photos", {"good.png": GOOD, "secret.png": GOOD})
    (tmp_path / "photos/secret.png").chmod(0)
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    command = [
        *drop,
        sys.executable,
        str(CHECKOUT / "tools/check_training_data.py"),
        "--data-dir",
        str(tmp_path / "photos"),
        "--clean",
        "--min-size",
        str(SIZE),
        *UNGATED,
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd="/"
    )
    assert result.returncode == 1, result.stderr
    assert "could not be read: secret.png: Permission denied" in result.stdout
    assert (tmp_path / "photos/secret.png").exists()


def fill(folder: Path, kilobytes: int) -> Callable[[], None]:
    """Mount a file system of this many kilobytes on `folder`.

    Returns a function that unmounts it.
    """
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    return lambda: subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [40, 64, 96])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, kilobytes):
    write_files(
        tmp_path / "photos",
        {f"{seed}.png": encoded(photograph(160, 160, seed), "png") for seed in range(6)},
    )
    whole, small = tmp_path / "whole", tmp_path / "disk/small"
    assert (
        run_tool("images_to_data", tmp_path / "photos", whole, "--size", SIZE, *UNGATED).returncode
        == 0
    )
    unmount = fill(tmp_path / "disk", kilobytes)
    try:
        result = run_tool("images_to_data", tmp_path / "photos", small, "--size", SIZE, *UNGATED)
        assert result.returncode == 2, result.stdout
        assert result.stderr.count("\n") == 1
        assert "continues where it stopped" in result.stderr
        written = tree(small)
        assert not [name for name in written if name.endswith(".tmp")]
        crops = {name: digest for name, digest in written.items() if name.endswith(".npy")}
        assert crops == {name: tree(whole)[name] for name in crops}, (
            "each crop is there whole or not at all"
        )
        subprocess.run(["mount", "-o", "remount,size=4m", str(tmp_path / "disk")], check=True)
        assert (
            run_tool(
                "images_to_data", tmp_path / "photos", small, "--size", SIZE, *UNGATED
            ).returncode
            == 0
        )
        assert {name: digest for name, digest in tree(small).items() if name != "dataset.json"} == {
            name: digest for name, digest in tree(whole).items() if name != "dataset.json"
        }
    finally:
        unmount()
