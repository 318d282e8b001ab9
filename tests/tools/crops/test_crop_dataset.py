"""Second runs of a cutter on datasets that were cleaned, damaged, changed or interrupted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dataset_corpus import (
    UNGATED,
    assert_user_error,
    encoded,
    photograph,
    run_tool,
    tree,
    wheel_photograph,
    write_files,
)
from pipeline.data.image_files import TRAINING_LIST, VALIDATION_LIST, read_file_list


@pytest.fixture
def photos(tmp_path) -> Path:
    write_files(
        tmp_path / "photos",
        {
            f"{name}.png": encoded(photograph(100, 150, seed), "png")
            for seed, name in enumerate("abc")
        },
    )
    return tmp_path / "photos"


def cut(photos: Path, out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_tool("images_to_data", photos, out, "--size", 48, *(arguments or UNGATED))


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def paths(out: Path, photo: str) -> set[str]:
    return {record["path"] for record in records(out) if record["photo"] == photo}


def test_crops_of_a_photo_that_is_gone_stay_even_if_one_is_lost(photos, tmp_path):
    out = tmp_path / "out"
    assert cut(photos, out).returncode == 0
    (photos / "b.png").unlink()
    (out / "b.png/x1_000_001.npy").unlink()
    before = tree(out / "b.png")
    assert cut(photos, out).returncode == 0
    assert tree(out / "b.png") == before != {}
    left = [record for record in records(out) if record["photo"] == "b.png"]
    assert {f"b.png/{name}" for name in before} == {record["path"] for record in left}
    assert {record["folder_crops"] for record in left} == {len(before)}


def test_a_source_that_broke_keeps_its_crops(photos, tmp_path):
    out = tmp_path / "out"
    assert cut(photos, out).returncode == 0
    before, whole = tree(out / "b.png"), (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(whole[:500])
    result = cut(photos, out)
    assert result.returncode == 1
    assert "b.png: truncated" in result.stdout
    assert tree(out / "b.png") == before
    assert paths(out, "b.png") == {f"b.png/{name}" for name in before}
    (photos / "b.png").write_bytes(encoded(photograph(100, 150, 9), "png"))
    assert cut(photos, out).returncode == 0
    assert tree(out / "b.png").keys() == before.keys()
    assert tree(out / "b.png") != before
    assert len(paths(out, "b.png")) == len(records(out)) / 3


def test_what_was_cleaned_away_is_not_made_again(tmp_path):
    """A crop of a benchmark image that --clean moved must not return with the next photograph."""
    astronaut = wheel_photograph("astronaut.png")
    write_files(tmp_path / "photos", {"a.png": encoded(astronaut, "png")})
    write_files(
        tmp_path / "benchmark", {"a.png": encoded(astronaut[100:300, 60:260].copy(), "png")}
    )
    out = tmp_path / "data/out"
    arguments = ["--size", 128]
    assert run_tool("images_to_data", tmp_path / "photos", out, *arguments).returncode == 0
    count = len(records(out))
    assert (
        run_tool(
            "check_training_data",
            "--data-dir",
            tmp_path / "data",
            "--min-size",
            64,
            "--against",
            tmp_path / "benchmark",
            "--clean",
        ).returncode
        == 1
    )
    moved = len(list((tmp_path / "data/quarantine").rglob("*.npy")))
    assert 0 < moved < count
    write_files(tmp_path / "photos", {"b.png": encoded(wheel_photograph("coffee.png"), "png")})
    for _ in range(2):
        assert run_tool("images_to_data", tmp_path / "photos", out, *arguments).returncode == 0
        assert (
            len([record for record in records(out) if record["photo"] == "a.png"]) == count - moved
        )
        assert len(list((out / "a.png").glob("*.npy"))) == count - moved
    assert paths(out, "b.png")


def test_a_broken_crop_that_was_cleaned_away_is_made_again(photos, tmp_path):
    out = tmp_path / "data/out"
    assert cut(photos, out).returncode == 0
    before = tree(out)
    content = bytearray((out / "a.png/x1_000_000.npy").read_bytes())
    content[3000] ^= 1
    (out / "a.png/x1_000_000.npy").write_bytes(content)
    assert (
        run_tool(
            "check_training_data",
            "--data-dir",
            tmp_path / "data",
            "--min-size",
            48,
            *UNGATED,
            "--clean",
        ).returncode
        == 1
    )
    assert not (out / "a.png/x1_000_000.npy").exists()
    assert cut(photos, out).returncode == 0
    crops = {name: digest for name, digest in tree(out).items() if name.endswith(".npy")}
    assert crops == {name: digest for name, digest in before.items() if name.endswith(".npy")}


def test_a_copy_is_cut_once_its_original_is_another_photograph(tmp_path):
    astronaut = encoded(wheel_photograph("astronaut.png"), "png")
    write_files(tmp_path / "photos", {"a.png": astronaut, "b.png": astronaut})
    out = tmp_path / "out"
    assert cut(tmp_path / "photos", out, "--num-scales", 1).returncode == 0
    assert not paths(out, "b.png")
    write_files(tmp_path / "photos", {"a.png": encoded(wheel_photograph("coffee.png"), "png")})
    assert cut(tmp_path / "photos", out, "--num-scales", 1).returncode == 0
    assert paths(out, "a.png")
    assert paths(out, "b.png")


def test_a_benchmark_that_grew_or_cannot_be_read_is_noticed(photos, tmp_path):
    write_files(tmp_path / "sets", {"one.png": encoded(wheel_photograph("chelsea.png"), "png")})
    arguments = ["--against", tmp_path / "sets", "--num-scales", 1]
    assert cut(photos, tmp_path / "out", *arguments).returncode in (0, 1)
    write_files(tmp_path / "sets", {"two.png": encoded(wheel_photograph("coffee.png"), "png")})
    assert_user_error(cut(photos, tmp_path / "out", *arguments), "against_files")
    write_files(
        tmp_path / "sets", {"two.png": encoded(wheel_photograph("coffee.png"), "png")[:5000]}
    )
    for tool in (
        ["images_to_data", photos, tmp_path / "new"],
        ["check_training_data", "--data-dir", photos],
    ):
        assert_user_error(
            run_tool(*tool, "--against", tmp_path / "sets"), "two.png", "cannot be read"
        )
    assert not (tmp_path / "new").exists()


def test_crops_of_a_run_that_was_stopped_are_not_listed(photos, tmp_path):
    """Their sources are unknown, so as photographs of their own they could end up on both sides."""
    out = tmp_path / "data/out"
    assert cut(photos, out).returncode == 0
    shutil.copytree(out / "a.png", out / "z.png")
    result = run_tool("select_training_files", "--data-dir", tmp_path / "data")
    assert result.returncode == 0
    assert f"omitted {len(list((out / 'z.png').iterdir()))} files" in result.stdout
    listed = [
        name
        for file in (TRAINING_LIST, VALIDATION_LIST)
        for name in read_file_list(tmp_path / "data" / file, tmp_path / "data")
    ]
    assert sorted(listed) == sorted(f"out/{record['path']}" for record in records(out))


@pytest.mark.parametrize(
    "tool",
    [
        "images_to_data",
        "check_training_data",
        "select_training_files",
        "analyze_images",
        "list_data_folders",
        "convert_dataset",
    ],
)
def test_a_pipe_with_the_name_of_an_image_is_passed_by(tmp_path, tool):
    write_files(
        tmp_path / "data",
        {
            "good.png": encoded(photograph(100, 100), "png"),
            "more.png": encoded(photograph(100, 100, 2), "png"),
        },
    )
    for name in ("pipe.png", "pipe.npy"):
        os.mkfifo(tmp_path / "data" / name)
    os.symlink("pipe.png", tmp_path / "data/link.png")
    arguments = {
        "images_to_data": [tmp_path / "data", tmp_path / "out", "--size", 48],
        "select_training_files": ["--data-dir", tmp_path / "data", "--min-size", 1],
        "check_training_data": ["--data-dir", tmp_path / "data", "--min-size", 1],
        "convert_dataset": [tmp_path / "data", tmp_path / "out", "--to", "npy"],
    }
    gates = UNGATED if tool in ("images_to_data", "check_training_data") else ()
    result = run_tool(tool, *arguments.get(tool, ["--data-dir", tmp_path / "data"]), *gates)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "arguments", [["images_to_data"], ["check_training_data"], ["check_training_data", "--fast"]]
)
def test_a_file_far_larger_than_its_pixels_is_not_read(tmp_path, arguments):
    """The file is sparse, so that it costs nothing; reading it would fill the memory."""
    write_files(
        tmp_path / "data",
        {
            "good.png": encoded(photograph(100, 100), "png"),
            "huge.png": encoded(photograph(100, 100, 3), "png"),
        },
    )
    os.truncate(tmp_path / "data/huge.png", 3 << 40)
    if arguments[0] == "images_to_data":
        arguments = [*arguments, tmp_path / "data", tmp_path / "out", "--size", 48]
    else:
        arguments = [*arguments, "--data-dir", tmp_path / "data", "--min-size", 1]
    result = run_tool(*arguments, *UNGATED)
    assert (result.returncode, result.stderr) == (1, "")
    assert "huge.png: 3298534883328 bytes" in result.stdout


def test_a_photo_that_became_a_link_to_itself_ends_nothing(photos, tmp_path):
    out = tmp_path / "out"
    assert cut(photos, out).returncode == 0
    before = tree(out / "b.png")
    (photos / "b.png").unlink()
    os.symlink("b.png", photos / "b.png")
    write_files(photos, {"d.png": encoded(photograph(100, 150, 7), "png")})
    result = cut(photos, out)
    assert (result.returncode, result.stderr) == (0, "")
    assert tree(out / "b.png") == before
    assert paths(out, "d.png")


def test_a_full_disk_while_rejects_are_written_is_one_line(tmp_path):
    write_files(
        tmp_path / "photos",
        {f"{number:03}.png": encoded(photograph(40, 40), "png") for number in range(60)},
    )
    (tmp_path / "disk").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(tmp_path / "disk")],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        assert_user_error(
            cut(tmp_path / "photos", tmp_path / "disk/out"), "cannot be written", "free disk space"
        )
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)
