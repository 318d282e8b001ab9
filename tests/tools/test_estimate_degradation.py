"""estimate_degradation.py: its table, its numbers as JSON, and its preset."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from dataset_corpus import (
    assert_user_error,
    bad_files,
    encoded,
    npy,
    run_tool,
    wheel_photograph,
    write_files,
)
from pipeline.cli import UserError
from tools.crops.grid import halved
from tools.estimate_degradation import Options, main


def low_quality_files() -> dict[str, bytes]:
    """Two JPEGs, one that was cropped and saved as PNG, an enlarged, noisy picture, and a WebP."""
    sharp = halved(wheel_photograph("coffee.png"))
    rng = np.random.default_rng(0)
    jpeg = encoded(sharp, "jpeg", quality=60, subsampling=2)
    pixels = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    large = cv2.resize(halved(sharp), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(np.rint(large + rng.normal(0, 3, large.shape)), 0, 255).astype(np.uint8)
    return {
        "web/a.jpg": encoded(cv2.GaussianBlur(sharp, (0, 0), 1.2), "jpeg", quality=70),
        "web/b.jpg": encoded(sharp, "jpeg", quality=80, subsampling=0),
        "saved/c.png": encoded(pixels[2:, 7:], "png"),
        "saved/d.npy": npy(noisy),
        "web/e.webp": encoded(sharp, "webp", quality=50),
    }


def test_the_numbers_and_the_preset(tmp_path: Path) -> None:
    write_files(tmp_path / "lr", low_quality_files())
    outputs = "--out", tmp_path / "made.yaml", "--json", tmp_path / "made.json"
    result = run_tool("estimate_degradation", tmp_path / "lr", *outputs, "--threads", 1)
    assert result.returncode == 0, result.stderr
    for words in ("saved/: 2 images", "web/: 3 images", "all images: 5 images", "wrote "):
        assert words in result.stdout
    numbers = json.loads((tmp_path / "made.json").read_text())
    images = {image["name"]: image for image in numbers["images"]}
    found = {name: image["jpeg"] for name, image in images.items()}
    assert found["web/a.jpg"] == {
        "quality": 70,
        "subsampling": "420",
        "offset": [0, 0],
        "is_file": True,
        "is_standard": True,
    }
    assert (found["web/b.jpg"]["quality"], found["web/b.jpg"]["subsampling"]) == (80, "444")
    assert found["saved/c.png"] == {
        "quality": 60,
        "subsampling": "420",
        "offset": [6, 1],
        "is_file": False,
        "is_standard": True,
    }
    assert found["saved/d.npy"] is found["web/e.webp"] is None
    assert abs(images["web/e.webp"]["webp_quality"] - 50) <= 1
    assert images["web/e.webp"]["subsampling"] == "420"
    assert 0.8 < images["web/a.jpg"]["blur"] < 1.6
    assert images["web/b.jpg"]["blur"] < 0.35
    enlarged = images["saved/d.npy"]
    assert abs(enlarged["enlargement"] - 2) < 0.02
    # The same noise in R, G and B is weaker in Y, Cb and Cr.
    assert abs(enlarged["luma_noise"] - 0.669 * 3) < 0.6
    assert abs(enlarged["chroma_noise"] - 0.64 * 3) < 0.6
    assert numbers["folders"]["."]["jpeg"] == {"count": 3, "low": 62, "median": 70, "high": 78}
    assert numbers["not_measured"] == 0

    text = (tmp_path / "made.yaml").read_text()
    preset = yaml.safe_load(text)
    assert preset["name"] == "chain"
    kinds = [next(iter(step)) for step in preset["steps"]]
    assert kinds == ["one_of", "noise", "one_of"]
    sizes, _, codecs = preset["steps"]
    shrink = sizes["one_of"][0]["steps"][0]["resize"]
    assert sizes["one_of"][0]["probability"] == 0.2
    assert shrink == {"of": "lr", "factor": [0.5, 0.5]}
    assert codecs["one_of"][0] == {
        "probability": 0.6,
        "steps": [
            {
                "compress": {
                    "codec": "jpeg",
                    "quality": [62, 78],
                    "subsampling": {"420": 2, "444": 1},
                }
            }
        ],
    }
    webp = codecs["one_of"][1]["steps"][0]["compress"]
    assert webp["codec"] == "webp"
    assert abs(webp["quality"][0] - 50) <= 1
    assert codecs["one_of"][2] == {"probability": 0.2, "steps": []}
    # Each step has its reason above it.
    lines = text.splitlines()
    steps = [number for number, line in enumerate(lines) if line.startswith("- ")]
    assert len(steps) == 3
    assert all(lines[number - 1].startswith("# ") for number in steps)
    assert "3 of 5 images" in text

    again = run_tool("estimate_degradation", tmp_path / "lr", *outputs, "--threads", 2)
    assert again.returncode == 0
    assert (tmp_path / "made.yaml").read_text() == text
    assert json.loads((tmp_path / "made.json").read_text()) == numbers


def test_clean_photographs_need_no_more_than_shrinking(tmp_path: Path) -> None:
    sharp = halved(wheel_photograph("coffee.png"))
    write_files(tmp_path / "clean", {"sharp.png": encoded(sharp, "png")})
    result = run_tool("estimate_degradation", tmp_path / "clean", "--out", tmp_path / "out.yaml")
    assert result.returncode == 0, result.stderr
    preset = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert preset["steps"] == [{"resize": {"to": "lr"}}]


def test_files_that_cannot_be_measured_are_named(tmp_path: Path) -> None:
    sharp = halved(wheel_photograph("coffee.png"))
    files = {"good.png": encoded(sharp, "png"), "tiny.png": encoded(sharp[:40], "png")}
    write_files(tmp_path / "lr", {**files, "cut.jpg": bad_files()["cut.jpg"]})
    out = "--out", tmp_path / "out.yaml"
    result = run_tool("estimate_degradation", tmp_path / "lr", *out)
    assert result.returncode == 1
    assert result.stderr == ""
    assert "not measured: tiny.png: 40x300: too small" in result.stdout
    assert "not measured: cut.jpg: truncated" in result.stdout
    assert "1 image in" in result.stdout
    (tmp_path / "lr/good.png").unlink()
    none = run_tool("estimate_degradation", tmp_path / "lr", *out)
    assert none.returncode == 1
    assert none.stderr.startswith("error: none of the images (2) could be measured")


def test_user_errors(tmp_path: Path) -> None:
    sharp = halved(wheel_photograph("coffee.png"))
    write_files(tmp_path / "lr", {"a.png": encoded(sharp[:64, :64], "png")})
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.yaml").write_text("name: chain\n")
    lr, out = tmp_path / "lr", tmp_path / "out.yaml"
    for options, words in (
        (Options(tmp_path / "missing", out), "no such folder"),
        (Options(tmp_path / "empty", out), "no images below this folder; give the folder of the"),
        (Options(lr, out, sample=0), "--sample 0: must be at least 1"),
        (Options(lr, out, threads=-1), "--threads -1"),
        (Options(lr, out, max_megapixels=0), "--max-megapixels 0"),
        (Options(lr, tmp_path), "is a folder; give a file"),
        (Options(lr, tmp_path / "nowhere/x.yaml"), "no such folder .*; make it, or choose"),
        (Options(lr, tmp_path / "mine.yaml"), "exists and was not written by this tool"),
        (Options(lr, out, json=tmp_path / "nowhere/x.json"), "--json .* no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            main(options)
    assert (tmp_path / "mine.yaml").read_text() == "name: chain\n"
    result = run_tool("estimate_degradation", lr, "--out", tmp_path / "mine.yaml")
    assert_user_error(result, "--out", "mine.yaml", "choose another file")
