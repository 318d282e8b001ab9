"""Console output of a run, on a terminal and in its run.log."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from lives import output_of, train
from pipeline.monitor import console
from pipeline.monitor.console import Console, bar, fitted

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return shown


def test_run_log_keeps_what_every_life_has_printed(dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path / "run", "steps=3")
    train(dataset, tmp_path / "run", "steps=5")
    kept = (tmp_path / "run" / "run.log").read_text().splitlines()
    assert all(re.match(TIME, line) for line in kept)
    assert [re.sub(f"^{TIME}", "", line) for line in kept] == output_of(
        tmp_path / "run"
    ).read_text().splitlines()
    assert sum("finished at step" in line for line in kept) == 2


def test_lines_wait_for_the_file_and_progress_is_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = terminal(monkeypatch)
    voice = Console()
    voice.say("before there is a file")
    voice.log_to(tmp_path / "run.log")
    voice.progress("step 1/4  " + "x" * 80, 0.25)
    voice.show_status("validating")
    voice.say("warning: the disk is full")
    voice.say("PSNR-Y 30 dB", is_good=True)
    voice.note("only kept")
    voice.close()
    texts = [
        re.sub(f"^{TIME}", "", line) for line in (tmp_path / "run.log").read_text().splitlines()
    ]
    assert texts == [
        "before there is a file",
        "step 1/4  " + "x" * 80,
        "warning: the disk is full",
        "PSNR-Y 30 dB",
        "only kept",
    ]
    shown = screen.getvalue()
    assert "\r\x1b[2K 25% step 1/4\r" in shown
    assert all(len(re.sub(r"\x1b\[\w+", "", line)) < 60 for line in re.split("[\r\n]", shown)), (
        "no line may wrap"
    )
    assert "\x1b[33mwarning: the disk is full\x1b[0m\n" in shown
    assert "\x1b[32mPSNR-Y 30 dB\x1b[0m\n" in shown
    assert "only kept" not in shown


LINE = "step 123456/1000000  epoch 12.3  loss 0.01234  ETA 11:23:00  123.4 images/s  lr 1.00e-04"


@pytest.mark.parametrize(
    ("room", "line"),
    [
        (200, f"{bar(0.5)} {LINE}"),
        (100, f"{bar(0.5)} {LINE.partition('  123.4')[0]}"),
        (79, f" 50% {LINE.partition('  123.4')[0]}"),
        (60, f" 50% {LINE.partition('  ETA')[0]}"),
        (10, " 50% step 123456/1000000"),
    ],
)
def test_the_remaining_time_is_shown_in_80_columns(room: int, line: str) -> None:
    assert fitted(LINE, 0.5, room) == line
    assert len(line) <= max(room, 24)


@pytest.mark.parametrize("name", ["NO_COLOR", "TERM", "a file"])
def test_colours_are_for_terminals_that_want_them(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    terminal(monkeypatch)
    if name == "a file":
        monkeypatch.setattr(sys, "stdout", io.StringIO())
    else:
        monkeypatch.setenv(name, {"NO_COLOR": "1", "TERM": "dumb"}[name])
    Console().say("warning: the disk is full")
    assert sys.stdout.getvalue() == "warning: the disk is full\n"


def test_run_log_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "MOST_BYTES", 1000)
    voice = Console()
    voice.log_to(tmp_path / "run.log")
    for number in range(100):
        voice.note(f"line {number} {'x' * 50}")
    voice.close()
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["run.log", "run.log.1"]
    assert max(sizes) < 1100
    assert "line 99 " in (tmp_path / "run.log").read_text()


def test_a_run_log_that_cannot_be_written_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.log").mkdir()
    voice = Console()
    voice.log_to(tmp_path / "run.log")
    voice.say("one")
    voice.say("two")
    assert capsys.readouterr().out.count("warning: run.log cannot be written") == 1


def test_the_other_ranks_are_mute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voice = Console(is_mute=True)
    voice.log_to(tmp_path / "run.log")
    voice.say("one")
    voice.progress("two", 0.5)
    voice.close()
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())
