"""benchmark_formats.py measures the user's own files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset_corpus import (
    assert_user_error,
    bad_files,
    encoded,
    npy,
    photograph,
    run_tool,
    stamped_tree,
    write_files,
)
from tools import benchmark_formats
from tools.benchmark_formats import BenchmarkImages, FormatMeter, LoaderSettings
from tools.images import FORMATS, encode

FAST = ("--seconds", 0, "--skip-loader")


def dataset(folder: Path) -> list[np.ndarray]:
    pixels = [photograph(80, 96, seed) for seed in range(6)]
    write_files(folder, {f"a/{number}.npy": npy(image) for number, image in enumerate(pixels[:3])})
    write_files(
        folder,
        {f"b/{number}.png": encoded(image, "png") for number, image in enumerate(pixels[3:])},
    )
    return pixels


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    pixels = dataset(tmp_path / "data")
    before = stamped_tree(tmp_path / "data")
    result = run_tool(
        "benchmark_formats",
        tmp_path / "data",
        *FAST,
        "--json",
        tmp_path / "out.json",
        "--threads",
        2,
    )
    assert result.returncode == 0, result.stderr
    assert stamped_tree(tmp_path / "data") == before
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert (numbers["images"], numbers["threads"], numbers["loader"]) == (6, 2, None)
    assert numbers["megapixels"] == pytest.approx(6 * 80 * 96 / 1e6)
    assert [row["format"] for row in numbers["formats"]] == ["as it is", *FORMATS]
    raw = sum(image.nbytes for image in pixels)
    sizes = {form: sum(len(encode(image, form)) for image in pixels) for form in FORMATS}
    sizes["as it is"] = sum(path.stat().st_size for path in (tmp_path / "data").rglob("*.*"))
    for row in numbers["formats"]:
        assert row["megabytes"] == pytest.approx(sizes[row["format"]] / 1e6)
        assert row["of_raw"] == pytest.approx(sizes[row["format"]] / raw)
        assert (row["encode"] is None) == (row["format"] == "as it is")
        assert row["loader"] is None
        for speed in filter(None, (row["encode"], row["decode"])):
            assert speed["wall"] > 0
            assert speed["core"] > 0
        assert f"{row['of_raw']:.3f}" in result.stdout
    smallest = min(FORMATS, key=sizes.get)
    assert f"smallest: {smallest}" in result.stdout


def test_the_loader_is_the_trainings_own(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    dataset(tmp_path / "data")
    result = run_tool(
        "benchmark_formats",
        tmp_path / "data",
        "--seconds",
        0.05,
        "--formats",
        "npy",
        "png",
        "--crop",
        1000,
        "--micro-batch",
        3,
        "--json",
        tmp_path / "out.json",
    )
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "out.json").read_text())
    # the largest that the images allow
    assert numbers["loader"] == {"crop": 80, "micro_batch": 3, "device_id": None}
    assert all(row["loader"]["wall"] > 0 for row in numbers["formats"])
    assert "fastest to train from" in result.stdout


def test_the_loader_counts_its_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("pipeline.data.reader")
    seen = []

    class Pipeline:
        def run(self) -> None:
            seen.append(1)

    def pipeline(source: object, index: int, **settings: object) -> Pipeline:
        assert (source.crop, source.position.micro_batch, index) == (32, 5, 0)
        assert settings == {"device_id": None, "threads": 2, "prefetch": benchmark_formats.PREFETCH}
        return Pipeline()

    clock = iter(np.arange(0, 100, 0.5))
    monkeypatch.setattr(reader, "training_pipeline", pipeline)
    monkeypatch.setattr(benchmark_formats.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(benchmark_formats.time, "process_time", lambda: 0.0)
    (tmp_path / "a.npy").write_bytes(npy(photograph(40, 40)))
    images = BenchmarkImages([tmp_path / "a.npy"], [photograph(40, 40)])
    meter = FormatMeter(images, tmp_path, 2, 2.0, LoaderSettings(32, 5, None))
    speed = meter._loader_speed([tmp_path / "a.npy"])
    measured = len(seen) - benchmark_formats.WARM_UP - benchmark_formats.PREFETCH
    assert measured == 4  # the clock advances half a second per reading
    assert speed.wall == pytest.approx(measured * 5 / 2.5)


def test_no_torch(tmp_path: Path) -> None:
    """The loader's pipeline runs without importing torch, so no torch is needed to measure."""
    pytest.importorskip("nvidia.dali")
    (tmp_path / "a.npy").write_bytes(npy(photograph(40, 40)))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})\n"
        "from pathlib import Path\n"
        "from tools import benchmark_formats\n"
        f"options = benchmark_formats.Options((Path({str(tmp_path / 'a.npy')!r}),), seconds=0, "
        "formats=('npy',))\n"
        "assert benchmark_formats.main(options) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    import subprocess

    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_format_that_changes_a_pixel_is_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.cli import RunError

    image = photograph(40, 40)
    meter = FormatMeter(BenchmarkImages([tmp_path / "a.npy"], [image]), tmp_path, 1, 0, None)
    meter.format("png")
    monkeypatch.setattr(benchmark_formats, "encode", lambda pixels, form: encode(pixels ^ 1, form))
    with pytest.raises(RunError, match="identical pixels"):
        meter.format("png")


def test_the_sample_is_seeded_and_bad_files_are_named(tmp_path: Path) -> None:
    dataset(tmp_path / "data")
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        run = run_tool(
            "benchmark_formats",
            tmp_path / "data",
            *FAST,
            "--count",
            2,
            "--seed",
            seed,
            "--formats",
            "png",
            "--json",
            tmp_path / f"{number}.json",
        )
        assert "2 of 6 images" in run.stdout
        runs.append(
            json.loads((tmp_path / f"{number}.json").read_text())["formats"][1]["megabytes"]
        )
    assert runs[0] == runs[1] != runs[2]
    write_files(tmp_path / "data", bad_files())
    result = run_tool("benchmark_formats", tmp_path / "data", *FAST, "--formats", "npy")
    assert result.returncode == 1
    for name in bad_files():
        assert name in result.stdout
    only_bad = run_tool("benchmark_formats", tmp_path / "data/cut.png", *FAST)
    assert only_bad.returncode == 1
    assert only_bad.stderr.startswith("error: none of the drawn images (1) could be read")


def test_user_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_files(
        tmp_path,
        {
            "a.png": encoded(photograph(30, 30), "png"),
            "note.txt": b"",
            "thin.npy": npy(photograph(1, 30)),
        },
    )
    for arguments, word in (
        ((tmp_path / "missing",), "no such folder"),
        ((tmp_path / "empty",), "no images"),
        ((tmp_path / "note.txt",), "not an image"),
        ((tmp_path / "a.png", "--count", 0), "--count"),
        ((tmp_path / "a.png", "--formats", "png", "png"), "once"),
        ((tmp_path / "a.png", "--seconds", -1), "--seconds -1"),
        ((tmp_path / "thin.npy",), "no training crop"),
    ):
        assert_user_error(run_tool("benchmark_formats", *arguments), word)
