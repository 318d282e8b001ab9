"""Logs of a run: JSON lines, TensorBoard, progress."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from comparison import logged
from conftest import command, run
from pipeline.files import AppendFile
from pipeline.monitor.journal import Journal, duration
from pipeline.training.meter import Reading


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_is_in_tensorboard_and_in_the_log(dataset: Path, tmp_path: Path) -> None:
    done = run(command(dataset, tmp_path / "run", "steps=4", "previews.count=3"))
    assert done.returncode == 0
    board = EventAccumulator(
        str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}
    ).Reload()
    scalars = board.Tags()["scalars"]
    for name in (
        "train/loss",
        "train/loss_l1",
        "train/lr",
        "train/images_per_second",
        "train/data_wait",
        "validation/psnr_y",
    ):
        assert name in scalars
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(
        [loss for _, loss in logged(tmp_path / "run", "train", "loss")], rel=1e-5
    )
    pictures = board.Tags()["images"]
    for photo in ("photos/10.npy", "photos/11.npy", "photos/12.npy"):
        assert {f"{photo}/input", f"{photo}/target", f"{photo}/output"} <= set(pictures)
    target = board.Images("photos/10.npy/target")[0]
    assert (target.height, target.width) == (84, 66)
    assert "images/s" in done.stdout
    assert "data wait" in done.stdout
    assert "ETA" in done.stdout
    assert done.stderr == ""  # no warnings about which a user can do nothing


def test_lost_work_is_forgotten_and_a_cut_line_too(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    for step in range(1, 6):
        journal.log("train", step, {"loss": 1.0 / step})
    journal.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"event": "train", "step": 6, "lo')
    journal = Journal(tmp_path, 3)
    journal.log("train", 4, {"loss": 0.5})
    journal.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 0.5),
    ]


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    journal.log("train", 1, {"loss": math.nan, "rate": math.inf, "lr": 0.1})
    journal.close()
    (line,) = lines(tmp_path)
    assert (line["loss"], line["rate"], line["lr"]) == (None, None, 0.1)


def test_a_log_that_cannot_be_written_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(tmp_path, 0)
    journal._lines = AppendFile(Path("/dev/full"))
    for step in range(3):
        journal.log("train", step, {"loss": 0.5})
    journal.picture(1, "a/b", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert (
        capsys.readouterr().out.count(
            "warning: the log cannot be written: [Errno 28] No space left on device: '/dev/full'"
        )
        == 1
    )


def test_a_distribution_is_taken_of_any_number_of_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    few = torch.randn(1, 1, 40, 50)
    many = torch.rand(17, 1, 1000, 1000)  # more than the 2^24 values that torch's quantile takes
    many[..., ::2] += 1  # every other column; an even stride would sample only one kind
    many[3, 0, 5, 7] = 1000
    journal = Journal(tmp_path, 0)
    journal.distribution(1, "few", few)
    journal.distribution(1, "many", many)
    journal.distribution(1, "broken", torch.tensor([1.0, math.nan]))
    journal.close()
    exact, taken = lines(tmp_path)
    assert exact["quantiles"] == few.flatten().quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    assert exact["mean"] == few.mean().item()
    assert taken["mean"] == many.mean().item()
    assert taken["quantiles"] == pytest.approx([0.1, 1, 1.9], abs=0.01)


def reading(losses: dict[str, float]) -> Reading:
    return Reading(losses, {"discriminator": 0.5}, 10.0, 0.0, 0.0, 60.0)


def test_a_step_without_losses_reports_none() -> None:
    """As when the generator learns only at every third step."""
    assert "loss" not in reading({}).as_dict()
    assert reading({}).as_dict()["discriminator"] == 0.5
    assert reading({}).text().startswith("loss -  ETA 1:00  10.0 images/s")
    both = reading({"l1": 0.25, "adversarial": 0.5})
    assert (both.as_dict()["loss"], both.as_dict()["loss_l1"]) == (0.75, 0.25)
    assert both.text().startswith("loss 0.75000  ")


def test_durations() -> None:
    assert [duration(s) for s in (0, 7.4, 65, 3600, 11_225)] == [
        "0:00",
        "0:07",
        "1:05",
        "1:00:00",
        "3:07:05",
    ]


def test_lines_that_a_full_disk_does_not_take_follow_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    journal = Journal(tmp_path, 0, said.append)
    journal.log("train", 1, {"loss": 1.0})
    write, is_full = AppendFile.write, True

    def limited(file: AppendFile, record: bytes) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.path))
        write(file, record)

    monkeypatch.setattr(AppendFile, "write", limited)
    journal.log("train", 2, {"loss": 2.0})
    journal.log("train", 3, {"loss": 3.0})
    assert len(lines(tmp_path)) == 1
    is_full = False
    journal.log("train", 4, {"loss": 4.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    is_full = True
    journal.log("train", 5, {"loss": 5.0})
    is_full = False
    journal.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert "No space left on device" in said[0]
