"""Curves of runs as a picture: plotted values, logs found, one-line errors."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_corpus import assert_user_error
from pipeline.cli import run as run_command
from tools.plot_run import PANELS, Options, draw, find_logs, main, moving_mean, points, read_log


def write_log(folder: Path, steps: int, *, adversarial: bool = False) -> Path:
    """A log as training writes it: a validation every fourth line and one non-finite loss."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(10, 10 * steps + 1, 10):
        values = {"loss": None if step == 30 else 1 / step, "lr": 1e-4, "gradient_norm": 0.1}
        if adversarial:
            values |= {
                "d_real": 0.5,
                "d_fake": -0.5,
                "discriminator_gradient_norm": 0.2,
                **{f"colour_drift_{name}": 0.1 for name in ("red", "green", "blue")},
            }
        lines.append({"event": "train", "step": step, "time": 1.0, **values})
        if step % 40 == 0:
            lines.append(
                {"event": "validation", "step": step, "time": 1.0, "psnr_y": 30 + step / 100}
            )
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plot(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which saves seconds."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as stop,
    ):
        run_command(Options, main, list(words))
    return subprocess.CompletedProcess(words, stop.value.code, stdout.getvalue(), stderr.getvalue())


def test_the_values_drawn_are_those_of_the_log(tmp_path: Path) -> None:
    log = read_log(write_log(tmp_path / "run", 8))
    assert points(log, "train", "loss") == (
        [10, 20, 40, 50, 60, 70, 80],
        [1 / s for s in (10, 20, 40, 50, 60, 70, 80)],
    )
    assert points(log, "validation", "psnr_y") == ([40, 80], [30.4, 30.8])
    assert points(log, "validation", "lpips") == ([], [])


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = write_log(tmp_path / "run", 8)
    with open(path, "a") as file:
        file.write('{"event": "train", "st')
    assert len(read_log(path)) == 10


@pytest.mark.parametrize("width", [1, 2, 3, 4, 9])
def test_the_moving_mean_is_numpys_inside_and_shorter_at_the_ends(width: int) -> None:
    values = np.random.default_rng(3).normal(size=20).tolist()
    means = moving_mean(values, width)
    inner = np.convolve(values, np.full(width, 1 / width), mode="valid")
    before = (width - 1) // 2
    assert np.allclose(means[before : before + len(inner)], inner)
    assert np.isclose(means[0], np.mean(values[: width // 2 + 1]))
    assert len(means) == 20


def test_each_curve_leaves_its_colour_where_its_values_are() -> None:
    log = [{"event": "train", "step": step, "loss": 1.0} for step in range(0, 100, 10)]
    picture = draw({"a": log}, PANELS[:1], 1, "png")
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    # matplotlib's first colour
    blue = np.abs(pixels - np.array([0x1F, 0x77, 0xB4])).max(axis=-1) < 40
    rows = np.flatnonzero(blue.any(axis=1))
    assert len(rows) > 0
    assert rows.max() - rows.min() < 5, "a constant is a level line"
    assert blue.any(axis=0).sum() > pixels.shape[1] / 2


def test_runs_stages_and_log_files_are_found(tmp_path: Path) -> None:
    plain = write_log(tmp_path / "plain", 8)
    psnr, gan = (
        write_log(tmp_path / "staged/psnr", 8),
        write_log(tmp_path / "staged/gan", 8, adversarial=True),
    )
    assert find_logs([tmp_path / "plain", tmp_path / "staged"]) == {
        "plain": plain,
        "staged psnr": psnr,
        "staged gan": gan,
    }
    assert find_logs([gan]) == {"gan": gan}
    assert find_logs([plain, gan], ["A", "B"]) == {"A": plain, "B": gan}


def test_the_command_draws_what_there_is(tmp_path: Path) -> None:
    write_log(tmp_path / "runs/one", 8)
    (tmp_path / "runs/one/checkpoints/step-00000080").mkdir(parents=True)
    (tmp_path / "runs/one/checkpoints/step-00000080/MANIFEST.json").touch()
    done = plot()
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "training.png: training loss, validation PSNR-Y, dB, gradient norm, learning rate of one\n"
    )
    with Image.open(tmp_path / "training.png") as plain:
        assert plain.size[0] > 1000
    write_log(tmp_path / "runs/gan", 8, adversarial=True)
    done = plot("runs/one", "runs/gan", "--out", "both.svg", "--smooth", "3")
    assert done.returncode == 0, done.stderr
    assert "mean logit of the discriminator" in done.stdout
    assert "colour drift of SR, levels" in done.stdout
    assert "</svg>" in (tmp_path / "both.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing",), "missing: contains no log.jsonl"),
        (("run", "--out", "x.bmp"), "--out x.bmp: the name must end in .png, .svg, .pdf"),
        (("run", "--names", "a", "b"), "--names has 2 names for 1 runs; give one per run"),
        (("run", "run"), "two runs have the name 'run'; give different ones with --names"),
        (("run", "--smooth", "0"), "--smooth 0: must be at least 1 log line"),
        (("other.json",), "other.json: line 1 is not a line of a training log"),
        (("empty",), "nothing to plot yet"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    write_log(tmp_path / "run", 4)
    write_log(tmp_path / "empty", 0)
    (tmp_path / "other.json").write_text("[1, 2]\n")
    done = plot(*arguments)
    assert_user_error(done, message)
    assert not (tmp_path / "training.png").exists()
