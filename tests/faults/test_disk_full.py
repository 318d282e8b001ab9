"""A full or broken disk is named as such, costs no finished checkpoint, and not the last one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import upscale
from conftest import command, environment, photograph, run
from fabricate import contents_of, run_command, write_cubic
from lives import train
from mounts import fill, small_disk
from pipeline import cli
from pipeline.checkpoint import saving, spill
from pipeline.checkpoint.progress import Progress
from pipeline.checkpoint.saving import Saver
from pipeline.checkpoint_index import damage
from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.files import AppendFile, size_text, write_atomically
from pipeline.monitor.console import Console
from pipeline.monitor.journal import Journal
from pipeline.run_folder import checkpoint_dir, checkpoint_steps

KINDS = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EIO: "Input/output error",
    errno.EROFS: "Read-only file system",
    errno.EFBIG: "File too large",
}


def failing(number: int) -> Any:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# --- Checkpoints ---


@pytest.mark.parametrize("number", KINDS)
def test_a_failed_write_is_named_by_the_system_and_not_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    saver = Saver(tmp_path, contents_of(Ranks()), 2, Ranks())
    saver.begin(Progress(step=1))
    assert saver.wait() is None
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_all", failing(number))
        saver.begin(Progress(step=2))
        failure = str(saver.wait())
    assert failure.startswith(
        f"the checkpoint of step 2 could not be written: {KINDS[number]}: {tmp_path}"
    )
    assert failure.endswith("/generator/mp_rank_00_model_states.pt")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert damage(checkpoint_dir(tmp_path, 1)) == ""


def test_space_is_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        saver = Saver(disk, contents_of(Ranks()), 2, Ranks())
        # without an earlier checkpoint, the size of the copy in memory counts
        ballast = fill(disk, 4096)
        with monkeypatch.context() as patch:
            patch.setattr(saving, "_write_own_files", failing(errno.EIO))  # is not reached
            saver.begin(Progress(step=1))
            assert "No space left on device: " in str(saver.wait())
        ballast.unlink()
        saver.begin(Progress(step=1))
        assert saver.wait() is None
        size = sum(
            path.stat().st_size for path in checkpoint_dir(disk, 1).rglob("*") if path.is_file()
        )
        fill(disk, 8192)
        saver.begin(Progress(step=2))
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        assert str(saver.wait()) == (
            f"the checkpoint of step 2 could not be written: No space left on device: "
            f"{disk}/checkpoints has {size_text(free)} free, a checkpoint needs {size_text(size)}; "
            f"{size_text(size - free)} are missing"
        )
        assert checkpoint_steps(disk) == [1]
        assert damage(checkpoint_dir(disk, 1)) == ""


def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        saver = Saver(disk, contents_of(Ranks()), 2, Ranks())
        saver.begin(Progress(step=1))
        assert saver.wait() is None
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        saver.begin(Progress(step=2))
        assert "could not be written: Read-only file system: " in str(saver.wait())
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        saver.begin(Progress(step=2))
        assert saver.wait() is None
        assert checkpoint_steps(disk) == [1, 2]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    printed = ""
    assert process.stdout is not None
    while text not in printed:
        line = process.stdout.readline()
        assert line, printed
        printed += line
    return printed


def same_weights(one: Path, other: Path, step: int) -> bool:
    names = ("generator.safetensors", "generator_ema.safetensors")
    return all(
        (checkpoint_dir(one, step) / name).read_bytes()
        == (checkpoint_dir(other, step) / name).read_bytes()
        for name in names
    )


@pytest.fixture(scope="module")
def straight(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(dataset, run_dir, "steps=6", "save_every=3")
    return run_dir


def test_the_last_save_waits_for_space(dataset: Path, straight: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        arguments = command(dataset, disk / "run", "steps=6", "previews.count=2", "log_every=1")
        ballast = fill(disk, 60_000)
        with start(arguments) as process:
            printed = read_until(process, "waits and tries again")
            ballast.unlink()
            printed += read_until(process, "finished at step 6")
            assert process.wait(60) == 0
            assert process.stderr is not None
            assert process.stderr.read() == ""
        assert "the checkpoint of step 3 could not be written: No space left on device" in printed
        assert "training continues and will try again" in printed
        assert "the checkpoint of step 6 is written, after waiting" in printed
        assert checkpoint_steps(disk / "run") == [6]
        assert same_weights(straight, disk / "run", 6)
        # what was logged is whole, line by line and record by record
        for line in (disk / "run" / "log.jsonl").read_text().splitlines():
            json.loads(line)
        EventAccumulator(str(disk / "run" / "tensorboard")).Reload()


def test_the_wait_for_space_is_ended_by_a_signal(dataset: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        fill(disk, 60_000)
        with start(command(dataset, disk / "run", "steps=2")) as process:
            read_until(process, "CTRL+C ends the run without this checkpoint")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr is not None
            (line,) = process.stderr.read().splitlines()
        assert line.startswith("error: the checkpoint of step 2 could not be written: No space")


# --- --spill-dir ---


def test_the_last_checkpoint_is_spilled_and_moved_back(
    dataset: Path, straight: Path, tmp_path: Path
) -> None:
    place = tmp_path / "spill"
    with small_disk(tmp_path / "disk", "1m") as disk:
        run_dir = disk / "run"
        ballast = fill(disk, 100_000)
        arguments = command(dataset, run_dir, "steps=6")
        done = run([*arguments, "--spill-dir", str(place)])
        assert done.returncode == 1, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: the checkpoint of step 6 could not be written: No space")
        assert "nothing is lost: free space in" in line
        assert checkpoint_steps(run_dir) == []
        (own,) = place.iterdir()
        assert str(own) in line
        assert damage(checkpoint_dir(own, 6)) == ""
        # the disk is still full: nothing is trained again
        done = run(arguments)
        assert done.returncode == 2
        assert f"step 6 is in {own} and could not be moved back: No space" in done.stderr
        # as if the spill disk were not mounted
        own.rename(tmp_path / "unmounted")
        done = run(arguments)
        assert done.returncode == 2
        assert f"was written to {own}, which is not there; mount that disk" in done.stderr
        (tmp_path / "unmounted").rename(own)
        ballast.unlink()
        done = run(arguments)
        assert done.returncode == 0, done.stderr
        assert f"moved the checkpoint of step 6 from {own} to" in done.stdout
        assert "nothing left to do" in done.stdout
        assert same_weights(straight, run_dir, 6)
        assert not list(place.iterdir())


def test_a_spilled_checkpoint_belongs_to_one_run(tmp_path: Path) -> None:
    run_dir, place, said = tmp_path / "run", tmp_path / "spill", []
    own = spill.prepare(run_dir, place)
    assert spill.prepare(run_dir, place) == own
    assert spill.prepare(tmp_path / "other" / "run", place) != own
    saver = Saver(run_dir, contents_of(Ranks()), 2, Ranks())
    for step in (1, 2):
        saver.begin(Progress(step=step), own)
        assert saver.wait() is None
        spill.record_spilled(run_dir, own, step)
    assert checkpoint_steps(own) == [2], "only the newest is kept"
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    renamed = run_dir.rename(tmp_path / "renamed")
    spill.bring_back(run_dir, said.append)
    spill.bring_back(renamed, said.append)
    assert checkpoint_steps(renamed) == [2]
    assert damage(checkpoint_dir(renamed, 2)) == ""
    assert len(said) == 1
    assert not own.exists()
    spill.bring_back(renamed, said.append)
    assert len(said) == 1


def test_a_damaged_spilled_checkpoint_is_reported_and_not_used(tmp_path: Path) -> None:
    run_dir, said = tmp_path / "run", []
    own = spill.prepare(run_dir, tmp_path / "spill")
    saver = Saver(run_dir, contents_of(Ranks()), 2, Ranks())
    saver.begin(Progress(step=1), own)
    assert saver.wait() is None
    (checkpoint_dir(own, 1) / "state.json").write_text("{}")
    spill.bring_back(run_dir, said.append)
    assert len(said) == 1
    assert "is damaged (state.json has 2 bytes" in said[0]
    assert checkpoint_steps(run_dir) == []


def test_a_spill_folder_that_cannot_help_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--spill-dir .*file: File exists"):
        spill.prepare(tmp_path / "run", tmp_path / "file")
    with pytest.raises(UserError, match="is inside the run folder"):
        spill.prepare(tmp_path / "run", tmp_path / "run" / "spill")


# --- Logs ---


def test_logs_go_on_when_there_is_space_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        console = Console()
        console.log_to(disk / "run.log")
        journal = Journal(disk, 0, console.say)
        journal.log("train", 1, {"loss": 1.0})
        ballast = fill(disk, 0)
        for step in range(2, 400):
            journal.log("train", step, {"loss": 1.0})
            journal.picture(step, "a/b", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
            console.note(f"note {step} {'x' * 50}")
        ballast.unlink()
        journal.log("train", 400, {"loss": 2.0})
        console.note("after")
        journal.close()
        console.close()
        printed = capfd.readouterr()
        assert printed.err == ""
        assert printed.out.count("warning: the log cannot be written: [Errno 28]") == 1
        assert printed.out.count("warning: run.log cannot be written: [Errno 28]") == 1
        lines = [json.loads(line) for line in (disk / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 401))
        assert (disk / "run.log").read_text().splitlines()[-1].endswith("after")
        board = EventAccumulator(str(disk / "tensorboard")).Reload()
        assert [event.step for event in board.Scalars("train/loss")][-1] == 400


def test_a_log_on_a_full_disk_may_begin_later(tmp_path: Path) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        ballast = fill(disk, 0)
        journal = Journal(disk, 1, said.append)
        journal.log("train", 2, {"loss": 1.0})
        ballast.unlink()
        journal.log("train", 3, {"loss": 1.0})
        journal.close()
        assert len(said) == 1
        board = EventAccumulator(str(disk / "tensorboard")).Reload()
        assert [event.step for event in board.Scalars("train/loss")] == [3]


def test_a_record_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        file = AppendFile(disk / "folder" / "log")
        file.write(b"one\n")
        fill(disk, 4096)
        with pytest.raises(OSError, match=r"No space left on device: .*/folder/log") as caught:
            file.write(b"x" * 20_000)
        assert caught.value.errno == errno.ENOSPC
        file.write(b"two\n")
        file.close()
        assert (disk / "folder" / "log").read_bytes() == b"one\ntwo\n"
        assert file.size == 8


# --- All commands ---


@pytest.mark.parametrize("number", KINDS)
def test_a_command_reports_the_disk_in_one_line(
    capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def write() -> int:
        raise OSError(number, os.strerror(number), "/runs/x")

    assert cli.exit_status(write) == 1
    assert capsys.readouterr().err.startswith(f"error: {KINDS[number]}: /runs/x; ")
    with pytest.raises(FileNotFoundError):  # a fault of the program
        cli.exit_status(lambda: open("/nowhere/x").close())


def test_an_atomic_write_names_its_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        write_atomically(disk / "a", b"old")
        fill(disk, 4096)
        with pytest.raises(OSError, match=r"No space left on device: .*/disk/a'"):
            write_atomically(disk / "a", b"x" * 20_000)
        assert (disk / "a").read_bytes() == b"old"
        assert sorted(path.name for path in disk.iterdir()) == ["a", "ballast"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(4):
        Image.fromarray(photograph(number, 96, 96)).save(folder / f"{number}.png")
    write_cubic(folder / "model.safetensors")
    return folder


def test_upscaling_stops_when_the_disk_is_full(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = sorted(photos.glob("*.png"))
    with small_disk(tmp_path / "disk") as disk:
        size = 4 * max(path.stat().st_size for path in sources)
        ballast = fill(disk, 2 * size)
        arguments = (*sources, "-o", disk / "out", "--model", photos / "model.safetensors")
        arguments = (*arguments, "--backend", "torch", "--device", "cpu")
        status, _, said = run_command(capsys, upscale, *arguments)
        assert status == 1
        assert said.startswith("error: No space left on device: ")
        assert str(disk / "out") in said
        assert said.count("\n") == 1
        done = sorted((disk / "out").iterdir())
        assert 0 < len(done) < len(sources)
        assert all(path.suffix == ".png" for path in done)
        before = {path: path.read_bytes() for path in done}
        ballast.unlink()
        status, printed, said = run_command(capsys, upscale, *arguments, "--skip-existing")
        assert (status, said) == (0, "")
        # A result that was being written when the disk was found to be full may follow.
        skipped = int(printed.partition("skipped: ")[2].split()[0])
        assert len(done) <= skipped < len(sources)
        assert len(list((disk / "out").iterdir())) == len(sources)
        assert before == {path: path.read_bytes() for path in done}


def test_an_evaluation_names_the_file_that_does_not_fit(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill(disk, 8192)
        status, _, said = run_command(
            capsys,
            evaluate,
            *("--model", photos / "model.safetensors", "--hr", photos, "--device", "cpu"),
            *("--out", disk / "pictures", "--json", disk / "numbers.json"),
        )
        assert status in (1, 2)
        assert f"{disk}/" in said
        assert "No space left on device" in said
        assert said.count("\n") == 1
