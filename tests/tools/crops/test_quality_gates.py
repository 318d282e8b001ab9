"""Quality gates of images_to_data.py and check_training_data.py, with each kind of bad picture."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset_corpus import assert_user_error, encoded, run_tool, wheel_photograph, write_files
from fabricate import shared

# Decoded photographs from wheels: sharp, and of different subjects.
SHARP = {name: wheel_photograph(name) for name in ("astronaut.png", "chelsea.png", "coffee.png")}


def resized(pixels: np.ndarray, factor: float) -> np.ndarray:
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=method)


def planted() -> dict[str, bytes]:
    """File -> content; the first letters give the expected outcome.

    Originals sort before their copies.
    """
    astronaut, chelsea, coffee = SHARP.values()
    halfway = astronaut.copy()
    halfway[:, : halfway.shape[1] // 2] = 200  # one half is a wall
    return {
        "a_good.png": encoded(astronaut, "png"),
        "b_good.png": encoded(chelsea, "png"),
        "c_same.png": encoded(astronaut, "png"),
        "d_near.jpg": encoded(
            resized(astronaut, 2), "jpeg", quality=85
        ),  # halved again, because it is lossy
        "e_near.png": encoded(resized(chelsea, 0.9), "png"),
        "f_soft.png": encoded(cv2.GaussianBlur(resized(coffee, 1.2)[:300, :400], (0, 0), 6), "png"),
        "g_half.png": encoded(resized(coffee, 2), "png"),  # enlarged; only its half is sharp
        "h_wall.png": encoded(np.full((300, 300, 3), 128, np.uint8), "png"),
        "i_part.png": encoded(np.ascontiguousarray(halfway[:, ::-1]), "png"),
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gates") / "photos"
    write_files(root, planted())
    return root


@pytest.fixture(scope="module")
def cut(photos) -> tuple[list[dict], list[dict]]:
    """Run images_to_data.py with its default gates; returns (manifest, rejects)."""
    result = run_tool("images_to_data", photos, photos.parent / "out", "--size", 128)
    assert (result.returncode, result.stderr) == (0, "")
    return tuple(
        [json.loads(line) for line in (photos.parent / "out" / name).read_text().splitlines()]
        for name in ("manifest.jsonl", "rejects.jsonl")
    )


def test_each_planted_kind_is_caught_when_cutting(cut):
    records, rejects = cut
    whole = {
        entry["photo"]: entry["gate"] for entry in rejects if entry["whole"] and "top" not in entry
    }
    assert whole == {
        "c_same.png": "duplicate",
        "d_near.jpg": "near-duplicate",
        "e_near.png": "near-duplicate",
        "f_soft.png": "soft",
    } | {"h_wall.png": whole["h_wall.png"]}
    assert whole["h_wall.png"] in ("soft", "flat")
    reasons = {entry["photo"]: entry["reason"] for entry in rejects}
    assert "the same file as a_good.png" in reasons["c_same.png"]
    assert "nearly the same picture as b_good.png" in reasons["e_near.png"]
    scales = {
        name: {record["scale"] for record in records if record["photo"] == name}
        for name in planted()
    }
    assert scales["g_half.png"] == {2, 4}, "cut from the size at which it is sharp"
    assert scales["a_good.png"] == {1, 2, 4}
    assert {record["photo"] for record in records} == {
        "a_good.png",
        "b_good.png",
        "g_half.png",
        "i_part.png",
    }


def test_flat_crops_are_dropped_and_the_others_of_the_photo_stay(cut):
    records, rejects = cut
    flat = [
        entry for entry in rejects if entry["gate"] == "flat" and entry["photo"] == "i_part.png"
    ]
    assert len(flat) >= 4
    width = SHARP["astronaut.png"].shape[1]
    for entry in flat:
        assert entry["left"] * entry["scale"] >= width // 2 - 128 * entry["scale"], (
            "flat only on the wall's side"
        )
    assert any(record["photo"] == "i_part.png" for record in records)


def test_the_manifest_holds_what_the_gates_measured(cut):
    for record in cut[0]:
        gates = record["gates"]
        assert gates.keys() == {
            "gradient",
            "sharpness",
            "entropy",
            "hash",
            "source_sharpness",
            "source_hash",
            "source_sha256",
        }
        assert gates["gradient"] >= 1
        assert record["decoder"].startswith(("opencv ", "pillow ", "libspng ", "simplejpeg "))


def test_gates_can_be_turned_off(photos, tmp_path):
    result = run_tool(
        "images_to_data",
        photos,
        tmp_path / "out",
        "--size",
        128,
        "--min-gradient",
        0,
        "--min-sharpness",
        0,
        "--keep-duplicates",
    )
    assert result.returncode == 0
    records = [
        json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()
    ]
    assert {record["photo"] for record in records} == {*planted()}
    assert not (tmp_path / "out/rejects.jsonl").exists()


def test_rejects_are_not_looked_at_again(photos, cut):
    result = run_tool("images_to_data", photos, photos.parent / "out", "--size", 128)
    assert f"already there: {len(planted())} photos" in result.stdout
    assert result.returncode == 0


def bad(stdout: str) -> dict[str, str]:
    return dict(
        line.removeprefix("bad: ").split(": ", 1)
        for line in stdout.splitlines()
        if line.startswith("bad: ")
    )


def test_each_planted_kind_is_caught_when_checking(photos):
    """On a folder of plain images without a manifest."""
    reasons = bad(run_tool("check_training_data", "--data-dir", photos, "--min-size", 128).stdout)
    assert {*reasons} == {
        "c_same.png",
        "d_near.jpg",
        "e_near.png",
        "f_soft.png",
        "g_half.png",
        "h_wall.png",
    }
    assert reasons["c_same.png"].startswith("the same file as a_good.png")
    assert reasons["e_near.png"].startswith("nearly the same image as b_good.png")
    assert reasons["d_near.jpg"].startswith("blurred or upscaled"), "twice as large as it was sharp"
    assert reasons["f_soft.png"].startswith("blurred or upscaled")
    assert reasons["g_half.png"].startswith("blurred or upscaled")
    assert reasons["h_wall.png"].startswith("flat")


@pytest.mark.parametrize("fast", [[], ["--fast"]])
def test_copies_are_found_across_sources(tmp_path, fast):
    """Also by the hashes in the manifests alone."""
    for source, name in (
        ("one", "astronaut.png"),
        ("two", "astronaut.png"),
        ("two", "chelsea.png"),
    ):
        write_files(tmp_path / "photos" / source, {name: encoded(SHARP[name], "png")})
    for source in ("one", "two"):
        assert (
            run_tool(
                "images_to_data",
                tmp_path / "photos" / source,
                tmp_path / "data" / source,
                "--size",
                128,
                "--cover",
            ).returncode
            == 0
        )
    arguments = ["--data-dir", tmp_path / "data", "--min-size", 128, *fast]
    reasons = bad(run_tool("check_training_data", *arguments).stdout)
    assert {name.split("/x")[0] for name in reasons} == {"two/astronaut.png"}
    assert all(" one/astronaut.png/x" in reason for reason in reasons.values())
    assert len(reasons) == len(list((tmp_path / "data/one").rglob("*.npy")))


def test_clean_moves_what_the_gates_found(tmp_path):
    write_files(
        tmp_path, {name: content for name, content in planted().items() if name[0] in "abch"}
    )
    assert (
        run_tool(
            "check_training_data", "--data-dir", tmp_path, "--min-size", 128, "--clean"
        ).returncode
        == 1
    )
    report = [
        json.loads(line) for line in (tmp_path / "quarantine/report.jsonl").read_text().splitlines()
    ]
    assert {entry["path"]: entry["gate"] for entry in report} == {
        "c_same.png": "duplicate",
        "h_wall.png": "flat",
    }
    assert (
        run_tool("check_training_data", "--data-dir", tmp_path, "--min-size", 128).returncode == 0
    )


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Path:
    """A benchmark of two images; one is also among the training photographs."""
    root = tmp_path_factory.mktemp("benchmark")
    write_files(
        root,
        {
            "coffee.png": encoded(SHARP["coffee.png"], "png"),
            "wheel.png": encoded(wheel_photograph("rocket.jpg"), "png"),
        },
    )
    return root


def test_leakage_is_reported_and_left_out(benchmark, tmp_path):
    coffee = SHARP["coffee.png"]
    write_files(
        tmp_path / "photos",
        {
            "astronaut.png": encoded(SHARP["astronaut.png"], "png"),
            "chelsea.png": encoded(SHARP["chelsea.png"], "png"),
            "part.png": encoded(np.ascontiguousarray(coffee[37:293, 101:357]), "png"),
            "whole.jpg": encoded(resized(coffee, 2), "jpeg", quality=90),
        },
    )
    result = run_tool(
        "images_to_data",
        tmp_path / "photos",
        tmp_path / "out",
        "--size",
        128,
        "--against",
        benchmark,
    )
    assert result.returncode == 0, result.stderr
    rejects = [
        json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    ]
    assert {entry["photo"] for entry in rejects if entry["gate"] == "leak"} == {
        "part.png",
        "whole.jpg",
    }
    assert all("coffee.png" in entry["reason"] for entry in rejects if entry["gate"] == "leak")
    reasons = bad(
        run_tool(
            "check_training_data",
            "--data-dir",
            tmp_path / "photos",
            "--min-size",
            128,
            "--min-sharpness",
            0,
            "--against",
            benchmark,
        ).stdout
    )
    assert {*reasons} == {"part.png", "whole.jpg"}
    assert all("near-identical to the benchmark image" in reason for reason in reasons.values())


def test_bad_gates_are_refused(photos, tmp_path):
    for arguments, words in (
        (["--min-gradient", -1], ("--min-gradient -1",)),
        (["--against", tmp_path / "gone"], ("gone",)),
        (["--against", tmp_path], ("no ",)),
    ):
        assert_user_error(
            run_tool("images_to_data", photos, tmp_path.parent / "none", *arguments), *words
        )
        assert_user_error(run_tool("check_training_data", "--data-dir", photos, *arguments), *words)
    assert_user_error(
        run_tool("check_training_data", "--data-dir", photos, "--fast", "--against", photos),
        "--against",
    )


@pytest.mark.parametrize(
    ("name", "size", "most_flat"), [("kodak", 256, 0.05), ("sunhays80", 256, 0.06)]
)
def test_ordinary_photographs_are_not_thrown_away(tmp_path, name, size, most_flat):
    """No photograph of the reference sets counts as soft or a copy.

    Of their crops, only clear skies and the like are dropped.
    """
    photos = shared(f"data/{name}")
    assert (
        run_tool(
            "images_to_data", photos, tmp_path / "out", "--size", size, "--num-scales", 1
        ).returncode
        == 0
    )
    crops = len((tmp_path / "out/manifest.jsonl").read_text().splitlines())
    rejects = tmp_path / "out/rejects.jsonl"
    gates = (
        Counter(json.loads(line)["gate"] for line in rejects.read_text().splitlines())
        if rejects.exists()
        else {}
    )
    assert {*gates} <= {"flat"}
    assert gates.get("flat", 0) <= most_flat * crops
