"""Every command works in folders and with files whose names libraries could misread: as patterns,
formats, protocols, shell code or options. What a library cannot open is refused before anything is
written."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import warm
from conftest import ROOT, SMALL, environment, photograph
from fabricate import make_run
from pipeline.cli import UserError
from pipeline.data.image_files import is_listable, read_file_list
from pipeline.files import check_utf8
from tools.files import name_fault

HOSTILE = """SR [x2] *? v1 it's "q" `x` 2:1 100%d %s #1 {x} $(touch no) a\\b;c&d|e
-日本"""
"""Glob patterns, quotes, a protocol, formats, shell code and a line break in one folder name."""
NOT_UTF8 = os.fsdecode(b"caf\xe9")
TRAIN = (
    "launch/local.py",
    *("--recipe", "demo", "--dataset-dir", "data", "--output-dir", "run", *SMALL),
    *("generator={name: compact, num_features: 4, num_conv: 2}", "previews.count=1"),
    *("validate_every=2", "save_every=2"),
)
CUT = ("--threads", "1", "--min-sharpness", "0", "--size")
CPU = ("--device", "cpu", "--model", "run")
COMMANDS: dict[str, tuple[str, ...]] = {
    "images": ("tools/images_to_data.py", "photos", "data/images", *CUT, "96"),
    "pairs": ("tools/pairs_to_data.py", "hr", "lr", "--scale", "2", "--out", "pairs", *CUT, "64"),
    "film": ("tools/video_to_data.py", "Film:2 %d.mkv", "--out", "films", *CUT, "64"),
    "tar": ("tools/imagenet_to_data.py", "a [b] 1:2.tar", "--out", "tars", *CUT, "64"),
    "remux": ("tools/mkv_to_mp4.py", "Film:2 %d.mkv"),
    "clean": ("tools/check_training_data.py", "--data-dir", "data", "--clean", "--min-size", "64"),
    "select": ("tools/select_training_files.py", "--data-dir", "data"),
    "convert": ("tools/convert_dataset.py", "data", "png", "--to", "png", "--threads", "1"),
    "list": ("tools/list_data_folders.py", "--data-dir", "data"),
    "monitor": ("tools/monitor_folder.py", "data", "--count", "1", "--interval", "0.1"),
    "analyze": ("tools/analyze_images.py", "--data-dir", "data", "--json", "a.json"),
    "estimate": ("tools/estimate_degradation.py", "hr", "--json", "e.json"),
    "report": (
        "tools/dataset_report.py",
        "--data-dir",
        "data",
        "--out",
        "r.html",
        "--samples",
        "4",
    ),
    "train": (*TRAIN, "steps=2"),
    "resume": (*TRAIN, "steps=4"),
    "show": ("tools/show_batch.py", "--run", "run", "--dataset-dir", "data", "b.png"),
    "plot": ("tools/plot_run.py", "run", "-o", "plot.png"),
    "evaluate": (
        *("evaluate.py", *CPU, "--hr", "test", "--procs", "1", "--out", "ev", "--json", "ev.json"),
        *("--html", "ev.html"),
    ),
    "upscale": ("upscale.py", *CPU, "test", "-o", "up"),
    "upscale a film": ("upscale.py", *CPU, "Film:2 %d.mkv", "-o", "Up:2 %d.mp4"),
    "export": ("export_trained_model.py", "run", "--output-dir", "exported"),
    "compare": ("tools/crop_compare.py", "test/1.png", "test/2.png", "--auto", "1"),
}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [warm.python(), str(ROOT / words[0]), *words[1:]],
        cwd=folder,
        env=environment(),
        capture_output=True,
        timeout=120,
        check=False,
    )


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        Image.fromarray(pixels).save(file, "PNG")


def halved(pixels: np.ndarray) -> np.ndarray:
    height, width = (side // 2 for side in pixels.shape[:2])
    return pixels.reshape(height, 2, width, 2, 3).mean((1, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, subprocess.CompletedProcess[bytes]]]:
    """The folder after all commands ran in it, in order, and how each of them ended."""
    folder = tmp_path_factory.mktemp("paths") / HOSTILE
    for number in range(2):
        save(folder / "photos" / f"[{number}] 100%d:x.png", photograph(number, 200, 200))
        hr = photograph(5 + number, 128, 128)
        save(folder / "hr" / f"{number}*.png", hr)
        save(
            folder / "lr" / f"{number}*x2.png",
            hr.reshape(64, 2, 64, 2, 3).mean((1, 3)).astype("u1"),
        )
        save(folder / "test" / f"{number + 1}.png", photograph(9 + number, 32, 32))
    save(folder / "test" / "two\nlines.png", photograph(3, 32, 32))
    save(folder / "test" / f"{NOT_UTF8}.png", photograph(4, 32, 32))
    with tarfile.open(folder / "a [b] 1:2.tar", "w") as archive:
        archive.add(folder / "photos", "in")
    with av.open(f"file:{folder}/Film:2 %d.mkv", "w") as film:
        stream = film.add_stream("libx264", rate=10)
        stream.height = stream.width = 160
        frame = av.VideoFrame.from_ndarray(photograph(8, 160, 160), format="rgb24")
        film.mux([*stream.encode(frame), *stream.encode(None)])
    return folder, {name: run(folder, *words) for name, words in COMMANDS.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_works_in_a_folder_of_any_name(
    done: tuple[Path, dict[str, subprocess.CompletedProcess[bytes]]], name: str
) -> None:
    result = done[1][name]
    assert result.returncode == 0, (result.stdout + result.stderr).decode()
    assert b"Traceback" not in result.stderr


def test_the_commands_wrote_where_they_were_told(
    done: tuple[Path, dict[str, subprocess.CompletedProcess[bytes]]],
) -> None:
    folder, results = done
    assert [path.name for path in folder.parent.iterdir()] == [HOSTILE]
    assert b"continuing from step 2 of 4" in results["resume"].stdout
    for name in ("Up:2 %d.mp4", "Film:2 %d.mp4", "ev.html", "plot.png"):
        assert (folder / name).stat().st_size > 100, name
    assert {path.name for path in (folder / "up").iterdir()} == {
        "1.png",
        "2.png",
        "two\nlines.png",
        f"{NOT_UTF8}.png",
    }
    assert {path.name for path in (folder / "data" / "images").iterdir() if path.is_dir()} == {
        "[0] 100%d:x.png",
        "[1] 100%d:x.png",
    }
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".failed"))]


@pytest.mark.parametrize(
    ("words", "library"),
    [
        ((*TRAIN, "--output-dir", f"{NOT_UTF8}/run"), "safetensors"),
        ((*TRAIN, "--log-dir", f"{NOT_UTF8}/logs"), "TensorBoard"),
        (("export_trained_model.py", "run", "--output-dir", NOT_UTF8), "safetensors"),
        (("convert_to_onnx.py", "--input", "run", "--output", f"{NOT_UTF8}/n.onnx"), "ONNX"),
    ],
    ids=["run", "logs", "export", "onnx"],
)
def test_a_path_that_a_library_cannot_open_is_refused_before_anything_is_written(
    dataset: Path, tmp_path: Path, words: tuple[str, ...], library: str
) -> None:
    (tmp_path / "data").symlink_to(dataset)
    make_run(tmp_path, "run", (3,), best=3)
    before = sorted(tmp_path.rglob("*"))
    result = run(tmp_path, *words)
    error = result.stderr.decode()
    assert result.returncode == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert f"{library} " in error
    assert "not UTF-8" in error
    assert "caf\\udce9" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_files_whose_names_no_list_can_hold_are_left_out_with_a_line(tmp_path: Path) -> None:
    """A dataset of plain images, pairs and photographs, each with such names among good ones."""
    for number, name in enumerate(("good", "also good\u3000", "two\nlines", NOT_UTF8)):
        pixels = photograph(number, 96, 96)
        for folder in ("plain", "hr"):
            save(tmp_path / folder / f"{name}.png", pixels)
        save(tmp_path / "lr" / f"{name}.png", halved(pixels))
    result = run(tmp_path, "tools/select_training_files.py", "--data-dir", "plain")
    assert result.returncode == 0, result.stderr.decode()
    assert b"omitted 2 files whose names a file list cannot hold" in result.stdout
    named = [
        name
        for which in ("training", "validation")
        for name in read_file_list(tmp_path / "plain" / f"{which}_file_list.txt", tmp_path)
    ]
    assert sorted(named) == ["also good\u3000.png", "good.png"]
    for words in (
        ("tools/images_to_data.py", "hr", "crops", *CUT, "64"),
        ("tools/pairs_to_data.py", "hr", "lr", "--scale", "2", "--out", "pairs", *CUT, "64"),
    ):
        result = run(tmp_path, *words)
        printed = result.stdout.decode()
        assert (result.returncode, result.stderr) == (1, b""), result.stderr.decode()
        assert "rejected: 2 unreadable" in printed
        assert printed.count("control characters or is not UTF-8; rename it") == 2
        folders = [path.name for path in (tmp_path / words[-2 - len(CUT)]).iterdir()]
        assert {"good.png", "also good\u3000.png"} == {
            name for name in folders if name.endswith(".png")
        }


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (("tools/images_to_data.py", "-dash", "out"), "write ./-dash"),
        (("upscale.py", "-dash"), "write ./-dash"),
        (("tools/images_to_data.py", "two\nlines", "out"), "two\\nlines: no such folder"),
        (("upscale.py", NOT_UTF8, "-o", "out"), "caf\\udce9' does not exist"),
    ],
)
def test_an_error_about_a_path_is_one_line_with_a_way_out(
    tmp_path: Path, words: tuple[str, ...], way_out: str
) -> None:
    (tmp_path / "-dash").mkdir()
    result = run(tmp_path, *words)
    error = result.stderr.decode()
    assert result.returncode == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert way_out in error
    assert [path.name for path in tmp_path.iterdir()] == ["-dash"]


def test_names_are_judged_as_files_hold_them() -> None:
    for name in ("a [b].png", "日本\u3000語.png", "no\u00a0break.png", "100%d:x.png"):
        assert not name_fault(name)
        assert is_listable(name)
        check_utf8(name, "nobody")
    for name in ("two\nlines", "a\rb", NOT_UTF8):
        assert "rename it" in name_fault(name)
        assert not is_listable(name)
    assert name_fault("bell\x07")
    assert name_fault("line\u2028separator")
    with pytest.raises(UserError, match=r"'caf\\udce9': a library cannot open"):
        check_utf8(NOT_UTF8, "a library")
