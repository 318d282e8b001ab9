"""What processes store outside the run folder is private, and does not stay."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

import warm
from lives import start
from pipeline.cli import UserError
from pipeline.files import private_dir, remove_private_temp, use_private_temp


def test_a_private_folder_is_made_and_closed_to_others(tmp_path: Path) -> None:
    made = private_dir(tmp_path / "parent" / "own")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o755)  # by an earlier version, or with a loose umask
    assert private_dir(made) == made
    assert made.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_somebody_else_has_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(UserError, match=f"{name} is not a folder of your own"):
            private_dir(tmp_path / name)
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to somebody else")
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 4321, 4321)
    with pytest.raises(UserError, match="theirs belongs to user 4321, not to you"):
        private_dir(tmp_path / "theirs")
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 != 0o700


# --- Temporary files ---


def leave_files(place: str, is_killed: bool) -> None:
    """Make temporary files as libraries do, and end, or wait to be killed."""
    os.environ["TMPDIR"], tempfile.tempdir = place, None
    folder = use_private_temp()
    assert use_private_temp() == folder
    tempfile.NamedTemporaryFile(prefix="__autograph_", delete=False).close()
    tempfile.mkdtemp()
    assert len(list(folder.iterdir())) == 3
    if is_killed:
        time.sleep(600)
    remove_private_temp()  # as `atexit` does in an interpreter


def folders(place: Path) -> list[Path]:
    return sorted(place.glob(f"vastscale-{os.geteuid()}/process-*"))


def test_temporary_files_are_removed_at_the_end_or_at_the_next_start(tmp_path: Path) -> None:
    def living(count: int) -> list[Path]:
        while len(list(tmp_path.glob("vastscale-*/*/__autograph_*"))) < count:
            assert killed.is_alive()
            assert count < 2 or living_on.is_alive()
        return folders(tmp_path)

    ended = warm.Fork(leave_files, str(tmp_path), False)
    ended.join(60)
    assert ended.exitcode == 0
    assert folders(tmp_path) == []
    killed = warm.Fork(leave_files, str(tmp_path), True)
    (old,) = living(1)
    assert old.parent.stat().st_mode & 0o777 == old.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in tmp_path.iterdir()] == [f"vastscale-{os.geteuid()}"]
    living_on = warm.Fork(leave_files, str(tmp_path), True)
    assert old in living(2)
    assert len(living(2)) == 2
    killed.kill()
    (new,) = {*folders(tmp_path)} - {old}
    (strange := old.parent / "notes").mkdir()
    (link := old.parent / "process-123-link").symlink_to(strange)
    (strange / "kept").touch()
    third = warm.Fork(leave_files, str(tmp_path), False)
    third.join(60)
    assert third.exitcode == 0
    assert not old.exists(), "its process is dead"
    assert len(list(new.iterdir())) == 3, "its process lives"
    assert (strange / "kept").exists()
    assert link.is_symlink()
    living_on.kill()


def test_a_killed_start_of_a_run_leaves_nothing_for_long(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while DALI's graph is built, when its generated modules are in the folder."""
    (place := tmp_path / "tmp").mkdir()
    monkeypatch.setenv("VASTSCALE_TMPDIR", str(place))
    (rank,) = start(dataset, tmp_path / "run", "steps=2")
    while not list(place.rglob("__autograph_*.py")):
        assert rank.is_alive()
    rank.kill()
    (old,) = folders(place)
    (rank,) = start(dataset, tmp_path / "run", "steps=2")
    rank.join(120)
    assert rank.exitcode == 0
    assert not old.exists()
    assert not list(place.rglob("__autograph_*.py"))
    assert [path.name for path in place.iterdir()] == [f"vastscale-{os.geteuid()}"]
