"""What processes store outside the run folder is private."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.cli import UserError
from pipeline.files import private_dir


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
