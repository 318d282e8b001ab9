"""A dataset tool that is killed, or started twice, loses nothing: the same command finishes what an
undisturbed one makes, byte for byte. `benchmarks/faults_tools.py` tries it many times more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.faults_tools import TOOLS, run
from tools.dataset.cleaning import Cleaner
from tools.dataset.judging import FileCheck, FileStatus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tools")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_killed_tool_finishes_as_an_undisturbed_one(folder: Path, tool: str) -> None:
    records = list(run(1, 3, folder, [tool], ["kill"]))
    assert len(records) == 3
    for record in records:
        assert record["lost"] == [], record


def test_two_tools_at_once_make_one_dataset(folder: Path) -> None:
    for record in run(1, 1, folder, ["images", "clean"], ["two"]):
        assert record["lost"] == [], record


def test_a_file_recorded_before_a_kill_is_recorded_once(tmp_path: Path) -> None:
    """A kill between the record of a removal and the removal: the next run removes the file."""
    (tmp_path / "bad.npy").write_bytes(b"")
    check = FileCheck("bad.npy", FileStatus.BAD, "empty", gate="file")
    report = tmp_path / "quarantine" / "report.jsonl"
    with Cleaner(tmp_path, [], set(), [check], delete=False) as cleaner:
        cleaner.take(check)
    (tmp_path / "quarantine" / "bad.npy").rename(tmp_path / "bad.npy")  # as if it was not moved yet
    with Cleaner(tmp_path, [], set(), [check], delete=False) as cleaner:
        cleaner.take(check)
    assert cleaner.taken == 1
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(line["path"], line["moved_to"]) for line in lines] == [
        ("bad.npy", "quarantine/bad.npy")
    ]
    assert not (tmp_path / "bad.npy").exists()
