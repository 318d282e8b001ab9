"""Every signal that a terminal or a scheduler sends: the run saves and stops, whoever gets it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import warm
from conftest import ROOT, SMALL, command, environment
from lives import output_of, start
from pipeline.distributed.stopping import StopSignals
from pipeline.installation import COMMANDS, DATA_COMMANDS, DISTRIBUTED
from pipeline.run_folder import checkpoint_steps
from pipeline.signals import NOTHING_TO_SAVE, is_stopped, stop_signals

LONG = ("steps=200000", "save_every=100000", "validate_every=100000")
WARNINGS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR")


def wait_until(holds: Callable[[], object], otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.02)


def wait_for_step(run_dir: Path, step: int, output: Path) -> None:
    log = run_dir / "log.jsonl"
    wait_until(
        lambda: log.is_file() and f'"step": {step},' in log.read_text(),
        lambda: f"no step {step}: {output.read_text()}",
    )


@pytest.mark.parametrize("name", WARNINGS)
def test_the_training_loop_hears_every_signal(name: str) -> None:
    number = signal.Signals[name]
    with StopSignals() as signals:
        signals.is_patient = True
        assert signals.received == 0
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # a repetition changes nothing
        assert signals.received == number
    assert is_stopped(128 + number)
    assert not is_stopped(128 + signal.SIGKILL)
    assert not is_stopped(1)


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        with StopSignals() as signals:
            signals.is_patient = True
            signal.raise_signal(signal.SIGHUP)
            assert signals.received == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in stop_signals()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGXCPU])
def test_a_schedulers_warning_saves(dataset: Path, tmp_path: Path, number: int) -> None:
    run_dir = tmp_path / "run"
    (rank,) = start(dataset, run_dir, *LONG)
    wait_for_step(run_dir, 3, output_of(run_dir))
    os.kill(rank.pid, number)
    rank.join(60)
    printed = output_of(run_dir).read_text()
    assert rank.exitcode == 128 + number, printed
    assert "stopped and saved at step" in printed
    assert checkpoint_steps(run_dir)[-1] >= 3


def test_a_warning_to_the_launcher_saves_on_all_ranks(dataset: Path, tmp_path: Path) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output"
    with open(output, "wb") as file:
        launcher = subprocess.Popen(
            command(dataset, run_dir, *LONG, procs=2), env=environment(), stdout=file, stderr=file
        )
    wait_for_step(run_dir, 3, output)
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(60) == 128 + signal.SIGUSR1, output.read_text()
    assert "stopped and saved at step" in output.read_text()
    assert "Traceback" not in output.read_text()
    assert checkpoint_steps(run_dir)[-1] >= 3


def test_a_warning_to_torchrun_saves(dataset: Path, tmp_path: Path) -> None:
    """The signal kills torchrun itself; the rank is told so by the kernel, and saves."""
    run_dir, output = tmp_path / "run", tmp_path / "output"
    line = ("--recipe", "demo", "--dataset-dir", str(dataset), "--output-dir", str(run_dir))
    with open(output, "wb") as file:
        launcher = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *(str(ROOT / "train.py"), *line, *SMALL, *LONG),
            ],
            env=environment(),
            stdout=file,
            stderr=file,
        )
    wait_for_step(run_dir, 3, output)
    launcher.send_signal(signal.SIGUSR1)
    launcher.wait(60)
    wait_until(
        lambda: "stopped and saved at step" in output.read_text(), lambda: output.read_text()
    )
    assert checkpoint_steps(run_dir)[-1] >= 3


# --- CTRL+C during imports ---

INTERRUPTED = """
import runpy, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == wanted:
            signal.raise_signal(signal.SIGINT)

wanted, *sys.argv = sys.argv[1:]
sys.meta_path.insert(0, Finder)
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCRIPTS = sorted(
    {one.script for one in (*COMMANDS.values(), *DATA_COMMANDS.values())}
    | {DISTRIBUTED, "train.py"}
)


def interrupted_at(module: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script with CTRL+C at the moment when it imports `module`."""
    return subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, str(ROOT / script), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_the_first_imports_is_one_line(script: str) -> None:
    done = interrupted_at("tyro", script)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == ("stopped\n" if script != "train.py" else f"{NOTHING_TO_SAVE}\n")


def test_ctrl_c_during_a_later_import_is_one_line(tmp_path: Path) -> None:
    """An exception could be swallowed in the middle of a library."""
    done = interrupted_at("torch", "evaluate.py", "--hr", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_ctrl_c_in_a_shell_script_is_one_line(tmp_path: Path) -> None:
    """Also before Python runs: here the environment's interpreter is a script that takes long."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/bash\ntouch "{tmp_path}/began"\nsleep 0.2\n')
    python.chmod(0o755)
    script = subprocess.Popen(
        [str(ROOT / "launch_local_train.sh")],
        env={**os.environ, "VIRTUAL_ENV": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until((tmp_path / "began").exists, lambda: "the script did not begin")
    os.killpg(script.pid, signal.SIGINT)
    assert script.communicate(timeout=60) == ("", "stopped\n")
    assert script.returncode == 130


# --- A launcher that dies or has not begun ---

RANK = """
import os, signal, sys, time
rank = os.environ["RANK"]

def save(*_):
    time.sleep(0.3)
    open(f"saved-{rank}", "w").close()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
open(f"ready-{rank}", "w").close()
time.sleep(100)
"""


def _launch(folder: str, script: str, count: int) -> None:
    """Launch ranks as launch/local.py does, but with a script that stands in for train.py."""
    from launch import local

    os.chdir(folder)
    with open("output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    local.SCRIPT = script
    sys.exit(local._launch(count, on_gpu=False, arguments=[]))


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    (tmp_path / "train.py").write_text(RANK)
    return tmp_path / "train.py"


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in found.split()]


def test_ranks_save_when_deepspeeds_launcher_is_killed(script: Path) -> None:
    """At once, and not after a minute; no process is left."""
    folder = script.parent
    launcher = warm.Fork(_launch, str(folder), str(script), 2)
    wait_until(
        lambda: all((folder / f"ready-{rank}").exists() for rank in (0, 1)),
        lambda: (folder / "output").read_text(),
    )
    (runner,) = children(launcher.pid)
    os.kill(runner, signal.SIGKILL)
    launcher.join(60)
    assert launcher.exitcode == 128 + signal.SIGKILL
    assert (folder / "saved-0").exists()
    assert (folder / "saved-1").exists()
    printed = (folder / "output").read_text()
    assert printed == "error: DeepSpeed's launcher was killed by SIGKILL\n"


def test_a_launcher_without_ranks_says_that_there_is_nothing_to_save(script: Path) -> None:
    folder = script.parent
    script.write_text("import time; time.sleep(100)")  # as a rank that is importing torch
    launcher = warm.Fork(_launch, str(folder), str(script), 1)
    wait_until(lambda: children(launcher.pid), lambda: (folder / "output").read_text())
    os.kill(launcher.pid, signal.SIGINT)
    launcher.join(60)
    assert launcher.exitcode == 128 + signal.SIGINT
    assert (folder / "output").read_text() == f"{NOTHING_TO_SAVE}\n"
