"""Numbers of analyze_images.py, compared with numpy on all pixels at once."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset_corpus import (
    assert_user_error,
    bad_files,
    encoded,
    npy,
    photograph,
    run_tool,
    write_files,
)
from tools import analyze_images
from tools.analyze_images import histograms, moments, percentile


def corpus() -> dict[str, np.ndarray]:
    """Images of many sizes and brightnesses: name -> uint8 RGB pixels."""
    images = {
        f"{number:02d}.npy": photograph(20 + 7 * number, 90 - 5 * number, number)
        // (1 + number % 3)
        for number in range(10)
    }
    images["deep/clipped.png"] = np.random.default_rng(0).choice(np.uint8([0, 255]), (31, 17, 3))
    images["black.png"] = np.zeros((5, 6, 3), np.uint8)
    return images


def write(folder: Path) -> dict[str, np.ndarray]:
    images = corpus()
    write_files(
        folder,
        {
            name: npy(pixels) if name.endswith("npy") else encoded(pixels, "png")
            for name, pixels in images.items()
        },
    )
    return images


@pytest.mark.parametrize("threads", [1, 4])
def test_mean_and_deviation_are_those_of_all_pixels(threads: int, tmp_path: Path) -> None:
    images = write(tmp_path / "data")
    result = run_tool(
        "analyze_images",
        "--data-dir",
        tmp_path / "data",
        "--json",
        tmp_path / "out.json",
        "--threads",
        threads,
    )
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "out.json").read_text())
    pixels = np.concatenate([image.reshape(-1, 3) for image in images.values()]).astype(
        np.longdouble
    )
    assert (numbers["images"], numbers["pixels"], numbers["unreadable"]) == (12, len(pixels), 0)
    for channel, name in enumerate(("red", "green", "blue")):
        row, levels = numbers["channels"][name], pixels[:, channel]
        assert row["mean"] == pytest.approx(float(levels.mean()), rel=1e-14)
        assert row["std"] == pytest.approx(float(levels.std()), rel=1e-13)
        assert row["mean_01"] == pytest.approx(float((levels / 255).mean()), rel=1e-14)
        assert row["std_01"] == pytest.approx(float((levels / 255).std()), rel=1e-13)
        assert (row["min"], row["max"]) == (levels.min(), levels.max())
        assert row["share_at_0"] == pytest.approx(float((levels == 0).mean()), rel=1e-14)
        assert row["share_at_255"] == pytest.approx(float((levels == 255).mean()), rel=1e-14)
        for percent, level in row["percentiles"].items():
            assert level == np.percentile(levels.astype(int), int(percent), method="inverted_cdf")
        means = [image[..., channel].mean() for image in images.values()]
        assert row["std_of_image_means"] == pytest.approx(np.std(means), rel=1e-12)
        assert (
            numbers["histograms"][name] == np.bincount(levels.astype(int), minlength=256).tolist()
        )
    luma = {
        name: float(image.reshape(-1, 3).mean(0) @ [0.299, 0.587, 0.114])
        for name, image in images.items()
    }
    assert numbers["mean_luma"] == pytest.approx(
        float(pixels.mean(0) @ np.array([0.299, 0.587, 0.114]))
    )
    assert numbers["std_of_image_mean_luma"] == pytest.approx(np.std(list(luma.values())))
    assert numbers["darkest"] == {"name": "black.png", "mean_luma": 0}
    assert numbers["brightest"]["name"] == max(luma, key=luma.get)
    assert numbers["height"] == [5, 83]
    assert f"{numbers['channels']['red']['mean']:.4f}" in result.stdout


def test_histograms_are_exact_beyond_what_float32_counts() -> None:
    # 17.6 million equal pixels; float32 is exact up to 16.8 million
    pixels = np.full((4200, 4200, 3), 7, np.uint8)
    pixels[0, 0] = 8
    counts = histograms(pixels)
    assert counts[:, 7].tolist() == [4200 * 4200 - 1] * 3
    assert counts[:, 8].tolist() == [1, 1, 1]
    random = np.random.default_rng(1).integers(0, 256, (123, 457, 3), np.uint8)
    expected = [np.bincount(random[..., channel].ravel(), minlength=256) for channel in range(3)]
    np.testing.assert_array_equal(histograms(random), expected)


def test_moments_do_not_cancel() -> None:
    counts = [0] * 256
    # one pixel in 10^15: any floating-point sum of squares would lose it
    counts[254], counts[255] = (10**15, 1)
    mean, std = moments(counts)
    assert mean == pytest.approx(254 + 1e-15, abs=1e-13)
    assert std == pytest.approx(10**-7.5, rel=1e-9)
    assert moments([0] * 200 + [5] + [0] * 55) == (200, 0)
    assert percentile([1] * 100 + [0] * 156, 50) == 49


def test_a_list_and_a_sample(tmp_path: Path) -> None:
    images = write(tmp_path / "data")
    (tmp_path / "data/training_file_list.txt").write_text("00.npy\ndeep/clipped.png\n")
    result = run_tool(
        "analyze_images",
        "--list",
        tmp_path / "data/training_file_list.txt",
        "--json",
        tmp_path / "a",
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "a").read_text())["pixels"] == sum(
        images[name].size // 3 for name in ("00.npy", "deep/clipped.png")
    )
    (tmp_path / "elsewhere.txt").write_text("00.npy\n")
    result = run_tool(
        "analyze_images", "--list", tmp_path / "elsewhere.txt", "--data-dir", tmp_path / "data"
    )
    assert "1 image," in result.stdout
    runs = [
        run_tool(
            "analyze_images",
            "--data-dir",
            tmp_path / "data",
            "--sample",
            5,
            "--seed",
            seed,
            "--json",
            tmp_path / f"{name}.json",
        ).returncode
        for name, seed in (("one", 1), ("again", 1), ("two", 2))
    ]
    assert runs == [0, 0, 0]
    one, again, two = ((tmp_path / f"{name}.json").read_text() for name in ("one", "again", "two"))
    assert json.loads(one)["images"] == 5
    assert one == again != two


def test_pixels_are_those_that_crops_are_cut_from(tmp_path: Path) -> None:
    clear = np.dstack([photograph(40, 40), np.zeros((40, 40), np.uint8)])  # over white: white
    write_files(
        tmp_path,
        {
            "gray.png": encoded(Image.fromarray(photograph(40, 40)).convert("L"), "png"),
            "clear.png": encoded(clear, "png"),
            "photo.jpg": cv2.imencode(".jpg", photograph(40, 40))[1].tobytes(),
        },
    )
    assert (
        run_tool(
            "analyze_images", "--data-dir", tmp_path, "--json", tmp_path / "out.json"
        ).returncode
        == 0
    )
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["pixels"] == 3 * 1600
    assert numbers["brightest"] == {"name": "clear.png", "mean_luma": pytest.approx(255)}


def test_unreadable_files_are_named_and_the_rest_counts(tmp_path: Path) -> None:
    write_files(
        tmp_path / "data",
        {
            **bad_files(),
            "good.png": encoded(photograph(30, 30), "png"),
            "short.npy": npy(photograph(30, 30))[:-1],
        },
    )
    result = run_tool("analyze_images", "--data-dir", tmp_path / "data")
    assert result.returncode == 1
    assert result.stderr == ""
    assert "1 image," in result.stdout
    assert f"{len(bad_files()) + 1} could not be read" in result.stdout
    for name in (*bad_files(), "short.npy"):
        assert f"could not be read: {name}: " in result.stdout
    (tmp_path / "data/good.png").unlink()
    none = run_tool("analyze_images", "--data-dir", tmp_path / "data")
    assert none.returncode == 1
    assert none.stderr.startswith("error: none of the")


def test_user_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_files(tmp_path / "data", {"a.png": encoded(photograph(30, 30), "png")})
    data = ("--data-dir", tmp_path / "data")
    for arguments, words in (
        ((("--data-dir", tmp_path / "missing")), ["no such folder"]),
        ((("--data-dir", tmp_path / "empty")), ["no images"]),
        ((("--list", tmp_path / "no.txt")), ["no.txt", "no such file list"]),
        (((*data, "--sample", 0)), ["--sample 0"]),
        (((*data, "--max-megapixels", 0)), ["--max-megapixels"]),
        (((*data, "--json", tmp_path / "nowhere/x.json")), ["--json", "cannot be written"]),
    ):
        assert_user_error(run_tool("analyze_images", *arguments), *words)


def test_memory_does_not_grow_with_the_number_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def decode(*_: object, **__: object) -> np.ndarray:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return np.zeros((8, 8, 3), np.uint8).view(Counted)

    monkeypatch.setattr(analyze_images, "decode_file", decode)
    monkeypatch.setattr(analyze_images, "histograms", lambda _: np.ones((3, 256), np.int64))
    write_files(tmp_path, {f"{number}.png": b"" for number in range(300)})
    assert analyze_images.main(analyze_images.Options(data_dir=tmp_path, threads=2)) == 0
    assert 1 <= most <= 2
