"""One run at a time writes to a folder, whichever path leads there, and a dead run does not
block."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import warm
from conftest import command, run
from mounts import mounted, small_disk
from pipeline import run_folder
from pipeline.cli import UserError
from pipeline.run_folder import (
    LOCK_FILE,
    announce_end,
    find_run,
    kept_runs,
    move_aside,
    newest_stage,
    refuse_if_in_use,
    run_lock,
)


def is_free(run_dir: Path) -> bool:
    try:
        with run_lock(run_dir, print, wait_seconds=0):
            return True
    except UserError:
        return False


def test_every_path_to_a_folder_meets_the_same_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "WAIT_SECONDS", 0)
    run_dir = tmp_path / "real" / "run"
    (tmp_path / "parent").symlink_to(tmp_path / "real")
    (tmp_path / "link").symlink_to(run_dir)  # dangling until the run makes its folder
    monkeypatch.chdir(tmp_path)
    paths = [
        run_dir,
        Path("real/run"),
        tmp_path / "real" / ".." / "real" / "run",
        tmp_path / "parent" / "run",
        tmp_path / "link",
    ]
    for first in paths:
        with run_lock(first, print):
            for path in paths:
                with pytest.raises(
                    UserError, match=f"{path} is in use by process {os.getpid()} on .*--output-dir"
                ):
                    refuse_if_in_use(path, print)
                assert not is_free(path)
        assert all(is_free(path) for path in paths), first
    assert not list(run_dir.iterdir()), "a run that has ended leaves no lock file"


def test_a_bind_mount_meets_the_same_lock(tmp_path: Path) -> None:
    (run_dir := tmp_path / "run").mkdir()
    (other := tmp_path / "mounted").mkdir()
    with mounted("--bind", run_dir, other), run_lock(run_dir, print):
        assert not is_free(other)


def hold(run_dir: str) -> None:
    with run_lock(Path(run_dir), print):
        Path(run_dir, "held").touch()
        time.sleep(600)


def test_a_killed_run_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "WAIT_SECONDS", 0)
    holder = warm.Fork(hold, str(tmp_path / "run"))
    while not (tmp_path / "run" / "held").exists():
        assert holder.is_alive()
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on"):
        refuse_if_in_use(tmp_path / "run", print)
    holder.kill()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    refuse_if_in_use(tmp_path / "run", print)
    assert is_free(tmp_path / "run")


def test_a_run_that_is_saving_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "SAVING_SECONDS", 0.3)
    said: list[str] = []
    with run_lock(tmp_path, print):
        announce_end(tmp_path)
        with (
            pytest.raises(UserError, match="in use"),
            run_lock(tmp_path, said.append, wait_seconds=0),
        ):
            pass
    assert len(said) == 1
    assert "waiting up to 0 s" in said[0]


def test_probing_a_folder_changes_nothing(tmp_path: Path) -> None:
    refuse_if_in_use(tmp_path / "nowhere", print)
    refuse_if_in_use(tmp_path, print)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_locks_is_a_warning_and_one_that_cannot_be_written_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", without)
        with run_lock(tmp_path / "run", said.append):
            pass
    assert len(said) == 1
    assert "has no file locks (Function not implemented)" in said[0]
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="the run folder cannot be written: File exists"),
        run_lock(tmp_path / "file", print),
    ):
        pass
    (tmp_path / "read-only").mkdir()
    with (
        mounted("-t", "tmpfs", "-o", "ro", "none", tmp_path / "read-only"),
        pytest.raises(UserError, match="cannot be written: Read-only file system"),
        run_lock(tmp_path / "read-only" / "run", print),
    ):
        pass


# --- --reset moves the old run aside while it has the lock ---


def make_run(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").touch()
    (run_dir / "recipe.yaml").touch()


def assert_kept(kept: Path | None) -> None:
    assert kept is not None
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoints", "recipe.yaml"]
    assert (kept / "checkpoints" / "step-00000003" / "MANIFEST.json").exists()


def test_the_lock_stays_when_the_run_is_moved(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir)
    (tmp_path / "link").symlink_to(run_dir)
    with run_lock(tmp_path / "link", print):
        kept = move_aside(tmp_path / "link")
        assert_kept(kept)
        assert kept_runs(run_dir) == {kept}
        assert not is_free(run_dir)
        assert is_free(kept)
        assert move_aside(tmp_path / "link") is None, "nothing is left to move"
    assert (tmp_path / "link").is_symlink()
    assert list(run_dir.iterdir()) == []
    assert is_free(tmp_path / "link")


def test_a_mount_point_is_emptied_instead_of_moved(tmp_path: Path) -> None:
    with small_disk(tmp_path / "run") as run_dir:
        for number in range(2):
            make_run(run_dir)
            with run_lock(run_dir, print):
                before = kept_runs(run_dir)
                kept = move_aside(run_dir)
                assert_kept(kept)
                assert kept is not None
                assert kept.parent == run_dir
                assert kept_runs(run_dir) - before == {kept}
                assert not is_free(run_dir)
            assert len(kept_runs(run_dir)) == number + 1
        # what was moved aside is no stage of the new run, and no run of its own
        assert newest_stage(run_dir) == run_dir
        with pytest.raises(UserError, match="no run with a checkpoint"):
            find_run(tmp_path)
        assert move_aside(run_dir) is None


def test_a_run_that_waited_for_a_moved_folder_takes_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder is moved aside between opening and locking its file."""
    run_dir = tmp_path / "run"
    make_run(run_dir)
    (run_dir / LOCK_FILE).touch()
    flock, moved = run_folder.fcntl.flock, []

    def slow(file: int, how: int) -> None:
        if not moved:
            moved.append(run_dir.rename(tmp_path / "moved"))
        flock(file, how)

    monkeypatch.setattr("fcntl.flock", slow)
    with run_lock(run_dir, print):
        assert (run_dir / LOCK_FILE).exists()
        assert not is_free(run_dir)
        assert is_free(tmp_path / "moved")


def test_two_runs_do_not_share_a_log_folder(dataset: Path, tmp_path: Path) -> None:
    with run_lock(tmp_path / "logs", print):
        done = run(
            [
                *command(dataset, tmp_path / "run", "steps=1"),
                "--log-dir",
                str(tmp_path / "logs"),
            ]
        )
    assert done.returncode == 2, done.stderr
    assert f"logs is in use by process {os.getpid()} on " in done.stderr.splitlines()[-1]
