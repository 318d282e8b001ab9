"""tools/list_data_folders.py: the listing, compared with manifests, lists and files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import warm
from dataset_corpus import (
    CHECKOUT,
    UNGATED,
    assert_user_error,
    dataset_hash,
    encoded,
    npy,
    photograph,
    run_tool,
    stamped_tree,
    write_files,
)
from pipeline.data.image_files import MANIFEST, TRAINING_LIST, VALIDATION_LIST
from tools.crops.manifest import CropRecord, format_lines, iterate_records


def crop(path: str, photo: str, **more: object) -> CropRecord:
    """A record of a 32x32 crop."""
    values = {
        "scale": 1,
        "top": 0,
        "left": 0,
        "size": 32,
        "bytes": 3200,
        "decoder": "test 1",
        "gates": {},
        "photo_bytes": 1,
        "photo_mtime_ns": 1,
        "folder_crops": 1,
        **more,
    }
    return CropRecord(path, photo, sha256=hashlib.sha256(path.encode()).hexdigest(), **values)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Two sources that were cut (one with a broken photo), five loose images, both lists."""
    folder = tmp_path_factory.mktemp("list")
    for source, count in (("one", 4), ("two", 3)):
        files = {
            f"{number}.png": encoded(photograph(130, 200, seed=number), "png")
            for number in range(count)
        }
        write_files(folder / "photos" / source, {**files, "broken.png": files["0.png"][:-500]})
        made = run_tool(
            "images_to_data",
            folder / "photos" / source,
            folder / "data" / source,
            "--size",
            64,
            *UNGATED,
        )
        assert made.returncode == 1, made.stderr
    loose = {
        f"loose/deep/{number}.png": encoded(photograph(50 + number, 80), "png")
        for number in range(5)
    }
    write_files(folder / "data", {**loose, "top.npy": npy(photograph(40, 40))})
    assert (
        run_tool(
            "select_training_files", "--data-dir", folder / "data", "--validation-count", 2
        ).returncode
        == 0
    )
    return folder / "data"


@pytest.fixture
def changed(dataset, tmp_path) -> Path:
    """A copy of the dataset that a test may change."""
    return shutil.copytree(dataset, tmp_path / "copy")


def listed(folder: Path) -> dict:
    """The output of --json."""
    result = run_tool("list_data_folders", "--data-dir", folder, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_numbers_are_those_of_manifests_and_files(dataset):
    before = stamped_tree(dataset)
    found = listed(dataset)
    assert stamped_tree(dataset) == before
    assert [source["folder"] for source in found["sources"]] == [".", "loose", "one", "two"]
    assert [source["has_manifest"] for source in found["sources"]] == [False, False, True, True]
    for source in found["sources"][2:]:
        records = list(iterate_records(dataset / source["folder"], [MANIFEST]))
        assert source["tool"] == "images_to_data"
        assert source["images"] == len(records) > 0
        assert source["photographs"] == len({record.photo for record in records})
        assert source["bytes"] == sum(
            (dataset / source["folder"] / record.path).stat().st_size for record in records
        )
        assert source["pixels"] == 64 * 64 * len(records)
        assert source["sizes"] == {"64": len(records)}
        assert source["formats"] == {"npy": len(records)}
        assert source["scales"] == {
            scale: sum(str(record.scale) == scale for record in records)
            for scale in {str(record.scale) for record in records}
        }
        assert source["rejects"] == {"decode": 1}
        assert source["hash"] == dataset_hash(dataset / source["folder"])
        assert source["missing"] == source["unlisted"] == 0
    loose = found["sources"][1]
    assert (loose["images"], loose["photographs"], loose["formats"]) == (5, 5, {"png": 5})
    assert loose["bytes"] == sum(path.stat().st_size for path in (dataset / "loose").rglob("*.png"))
    assert found["hash"] == dataset_hash(dataset, "one", "two")
    assert found["total"]["images"] == sum(source["images"] for source in found["sources"])
    assert found["warnings"] == []


def test_lists_are_counted_by_source(dataset):
    found = listed(dataset)
    for side, name in (("training", TRAINING_LIST), ("validation", VALIDATION_LIST)):
        names = (dataset / name).read_text().splitlines()
        assert found["lists"][side] == {"files": len(names), "not_there": 0}
        for source in found["sources"]:
            folders = [name.partition("/")[0] if "/" in name else "." for name in names]
            assert source[side] == folders.count(source["folder"])
    written = run_tool("select_training_files", "--data-dir", dataset, "--validation-count", 2)
    assert found["lists_hash"] in written.stdout


def test_table_has_a_line_a_source(dataset):
    result = run_tool("list_data_folders", "--data-dir", dataset)
    assert (result.returncode, result.stderr) == (0, "")
    found, lines = listed(dataset), result.stdout.splitlines()
    head = lines[0].split()
    for source, line in zip(found["sources"], lines[1:5], strict=True):
        assert line.split()[0] == source["folder"]
        assert f" {source['photographs']} " in line
        assert f" {source['images']} " in line
        if source["hash"]:
            assert line.endswith(source["hash"][:12])
    assert head[0] == "source"
    assert lines[5].startswith("total")
    assert f" {found['total']['images']} " in lines[5]
    assert found["hash"] in result.stdout
    assert "warning" not in result.stdout


def test_hash_is_the_same_elsewhere_and_tells_a_change(dataset, changed):
    assert listed(changed)["hash"] == listed(dataset)["hash"]
    assert listed(changed / "one")["hash"] == listed(dataset)["sources"][2]["hash"]
    lines = (changed / "one" / MANIFEST).read_text().splitlines(keepends=True)
    (changed / "one" / MANIFEST).write_text("".join(lines[::-1]))
    assert listed(changed)["hash"] == listed(dataset)["hash"], (
        "the order of the lines does not count"
    )
    record = json.loads(lines[0])
    record["sha256"] = "f" * 64
    (changed / "one" / MANIFEST).write_text(json.dumps(record) + "\n" + "".join(lines[1:]))
    found = listed(changed)
    assert found["hash"] != listed(dataset)["hash"]
    assert [
        source["hash"] == other["hash"]
        for source, other in zip(found["sources"], listed(dataset)["sources"], strict=True)
    ] == [True, True, False, True]


def test_warnings_name_what_is_missing_or_unused(changed):
    gone = next((changed / "two").rglob("*.npy"))
    gone.unlink()
    write_files(changed, {"new/1.png": encoded(photograph(40, 40), "png")})
    result = run_tool("list_data_folders", "--data-dir", changed)
    assert result.returncode == 0
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3
    assert warnings[0].startswith("warning: two: missing files: 1; ")
    assert warnings[1].startswith("warning: new: images in neither list: 1 of 1")
    assert ": missing files: 1; write" in warnings[2]
    training = (changed / TRAINING_LIST).read_text().splitlines()
    in_training = next(name for name in training if name.startswith("one/"))
    with open(changed / VALIDATION_LIST, "a") as file:
        file.write(f"{in_training}\n")
    found = listed(changed)
    assert found["total"]["photographs_in_both_lists"] == 1
    assert any("photographs in both lists: 1;" in warning for warning in found["warnings"])
    (changed / VALIDATION_LIST).unlink()
    assert f"no {VALIDATION_LIST}" in " ".join(listed(changed)["warnings"])
    assert listed(changed)["lists_hash"] is None


def test_pairs_films_and_quarantine(tmp_path):
    records = [
        crop("film/a.npy", "film.mp4", time=1.5),
        crop("film/b.npy", "film.mp4", time=2.5),
        crop("pair/x.npy", "pair.png", lr="pair/x_lr2.npy"),
        crop("pair/x_lr2.npy", "pair.png", size=16, role="lr"),
    ]
    write_files(tmp_path, {f"source/{record.path}": b"x" for record in records})
    write_files(
        tmp_path,
        {
            f"source/{MANIFEST}": format_lines(records).encode(),
            "quarantine/source/old.npy": b"x",
            f"other/{MANIFEST}": b"",
        },
    )
    report = [
        {"path": name, "moved_to": f"quarantine/{name}", "reason": "flat", "gate": "flat"}
        for name in ("source/old.npy", "source/moved_back.npy")
    ]
    (tmp_path / "quarantine/report.jsonl").write_text(
        "".join(json.dumps(entry) + "\n" for entry in report)
    )
    found = listed(tmp_path)
    empty, source = found["sources"]
    assert (empty["folder"], empty["images"]) == ("other", 0)
    assert (source["images"], source["lr_images"], source["photographs"], source["films"]) == (
        3,
        1,
        2,
        1,
    )
    assert (source["missing"], source["sizes"], source["pixels"]) == (0, {"32": 3}, 3 * 32 * 32)
    assert found["total"]["quarantine"] == 1


def test_hostile_names(tmp_path):
    names = [
        "line\nbreak.png",
        "\x1b[31mred.png",
        os.fsdecode(b"not-utf8-\xff.png"),
        "<script>.png",
    ]
    write_files(tmp_path, {f"{name}/{name}": encoded(photograph(20, 20), "png") for name in names})
    result = run_tool("list_data_folders", "--data-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    # head, sources, total, one warning: no lists
    assert len(result.stdout.splitlines()) == 1 + len(names) + 1 + 1
    assert "\x1b" not in result.stdout
    assert {source["folder"] for source in listed(tmp_path)["sources"]} == set(names)


def test_user_errors(tmp_path, dataset, changed):
    assert_user_error(
        run_tool("list_data_folders", "--data-dir", tmp_path / "none"), "no such folder", "none"
    )
    (tmp_path / "empty").mkdir()
    assert_user_error(
        run_tool("list_data_folders", "--data-dir", tmp_path / "empty"),
        "no images",
        "images_to_data.py",
    )
    assert_user_error(
        run_tool("list_data_folders", "--data-dir", dataset / "top.npy"), "not a folder"
    )
    path = changed / "one" / MANIFEST
    whole = path.read_bytes()
    path.write_bytes(b"nonsense\n" + whole)
    assert_user_error(run_tool("list_data_folders", "--data-dir", changed), "line 1", MANIFEST)
    path.write_text(json.dumps({**json.loads(whole.splitlines()[0]), "path": "\ud800.npy"}) + "\n")
    assert_user_error(
        run_tool("list_data_folders", "--data-dir", changed), "not a valid file name", MANIFEST
    )


def test_default_is_dataset_in_the_home_folder(dataset, tmp_path):
    (tmp_path / "dataset").symlink_to(dataset)
    result = subprocess.run(
        [warm.python(), str(CHECKOUT / "tools/list_data_folders.py"), "--json"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert json.loads(result.stdout)["hash"] == listed(dataset)["hash"]
