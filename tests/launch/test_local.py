"""The shell scripts: making and using an environment, and the demo from start to export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import ROOT, environment

TOOLS = ("bash", "dirname", "basename", "cat", "cut", "sha256sum", "flock", "rm", "env")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that the scripts need, so that none of them makes an environment here."""
    copy = tmp_path / "check out"
    shutil.copytree(ROOT / "launch", copy / "launch")
    shutil.copytree(ROOT / "pipeline", copy / "pipeline")
    for name in (
        "launch_local_train.sh",
        "run_tensorboard.sh",
        "requirements.txt",
        "requirements-dev.txt",
        "train.py",
    ):
        shutil.copy(ROOT / name, copy / name)
    return copy


def only_tools(folder: Path, python_version: str) -> dict[str, str]:
    """Return variables with a PATH of the scripts' tools and one Python of that version."""
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))
    python = folder / "python3"
    minor = python_version.split(".")[1]
    python.write_text(
        f'#!/bin/bash\ncase "$*" in *version_info*) exit $(( {minor} < 10 )) ;; '
        f"*--version*) echo Python {python_version} ;; *) exit 3 ;; esac\n"
    )
    python.chmod(0o755)
    return {"PATH": str(folder), "HOME": str(folder)}


def test_an_old_python_is_named(checkout: Path, tmp_path: Path) -> None:
    variables = only_tools(tmp_path / "bin", "3.9.2")
    done = subprocess.run(
        ["bash", str(checkout / "launch_local_train.sh"), "--reset"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: Vastscale needs Python 3.10 or newer, but found Python 3.9.2"
    )
    assert done.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_a_python_that_was_named_is_not_replaced_by_another(checkout: Path, tmp_path: Path) -> None:
    variables = only_tools(tmp_path / "bin", "3.12.1") | {"VASTSCALE_PYTHON": "/nowhere/python3"}
    done = subprocess.run(
        ["bash", str(checkout / "launch_local_train.sh")],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: VASTSCALE_PYTHON=/nowhere/python3 is not Python 3.10 or newer\n"


@pytest.fixture
def lent(checkout: Path) -> Path:
    """The tests' own Python environment under another path: it is complete, and is not written
    to."""
    folder = checkout / "lent"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder


def test_an_active_environment_is_used(checkout: Path, lent: Path) -> None:
    """Nothing is missing in it, so nothing is created or installed."""
    variables = {**os.environ, "VIRTUAL_ENV": str(lent)}
    for _ in range(2):
        done = subprocess.run(
            [str(checkout / "launch_local_train.sh"), "--help"],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "usage: " in done.stdout
        assert "launch_local_train.sh" in done.stdout
        assert "installing" not in done.stdout
    assert not (checkout / ".venv").exists()
    assert (lent / ".vastscale-requirements").is_file()


def test_missing_requirements_are_found(tmp_path: Path) -> None:
    base = tmp_path / "base.txt"
    base.write_text("torch==2.13.0  # why\nnot-there-at-all==1.0\n")
    listed = tmp_path / "more.txt"
    listed.write_text(
        '-r base.txt\nnumpy==0.0.1\nold-thing==1; python_version < "3.10"\n'
        'new-thing==2; python_version >= "3.10"\nnvidia-dali-cuda120==2.4.0\n'
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "requirements_missing.py"), str(listed)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["not-there-at-all==1.0", "new-thing==2"]
    assert "numpy" in done.stderr
    assert "(tested: 0.0.1); left unchanged" in done.stderr


def test_tensorboard_says_what_is_missing(checkout: Path, lent: Path) -> None:
    variables = {**os.environ, "VIRTUAL_ENV": str(lent)}
    done = subprocess.run(
        [str(checkout / "run_tensorboard.sh")],
        cwd=checkout,
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "train first" in done.stderr.splitlines()[-1]


def test_a_stale_build_lock_is_cleared(tmp_path: Path) -> None:
    from launch.environment import _clear_stale_locks

    building, stale = tmp_path / "building", tmp_path / "stale"
    for folder in (building, stale):
        folder.mkdir()
        (folder / "lock").touch()
    with subprocess.Popen(["sleep", "30"], cwd=building) as process:
        _clear_stale_locks(tmp_path)
        process.kill()
    assert (building / "lock").exists()
    assert not (stale / "lock").exists()


def test_chosen_gpus_reach_the_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from launch import environment as launch_environment

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    assert launch_environment.prepare(2, on_gpu=True)["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES" not in launch_environment.prepare(2, on_gpu=True)


def test_ranks_on_a_cpu_are_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DeepSpeed's launcher fills CUDA_VISIBLE_DEVICES, so an empty one cannot keep ranks on the
    CPU."""
    from launch import environment as launch_environment

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = launch_environment.prepare(2, on_gpu=False)
    assert (found["VASTSCALE_CPU"], found["DS_ACCELERATOR"]) == ("1", "cpu")
    assert "CUDA_VISIBLE_DEVICES" not in found
    assert "PYTORCH_ALLOC_CONF" not in found


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"},
        {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
    ],
)
def test_memory_of_gpus_grows_in_place_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: dict[str, str]
) -> None:
    from launch import environment as launch_environment

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
        if name in own:
            monkeypatch.setenv(name, own[name])
    found = launch_environment.prepare(1, on_gpu=True)
    assert {name: value for name, value in found.items() if name.endswith("_ALLOC_CONF")} == (
        own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    )


@pytest.mark.parametrize(
    ("batch", "gpus", "most"),
    [
        ({"train_batch_size": 64}, 7, 4),
        ({"train_batch_size": 64}, 3, 2),
        ({"train_batch_size": 48}, 5, 4),
        ({"train_batch_size": 64, "gradient_accumulation_steps": 4}, 6, 4),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16}, 8, 4),
    ],
)
def test_a_batch_that_all_gpus_cannot_share_names_how_many_can(
    batch: dict[str, int], gpus: int, most: int
) -> None:
    from launch.local import _check_batch, largest_share
    from pipeline.cli import UserError

    assert largest_share(batch, gpus) == most
    plan = SimpleNamespace(ds_config=batch)
    with pytest.raises(
        UserError,
        match=rf"or use another number of ranks, such as --procs {most}, the largest number of "
        rf"this machine's {gpus} GPUs that can share it$",
    ):
        _check_batch(plan, gpus, is_chosen=False)
    with pytest.raises(UserError, match=r"or use another number of ranks$"):
        _check_batch(plan, gpus, is_chosen=True)
    _check_batch(plan, most, is_chosen=False)


@pytest.mark.parametrize(
    ("processes", "visible", "by_launcher", "seen"),
    [
        (1, "GPU-1111", False, "GPU-1111"),
        (1, "2,3", False, "2"),
        (2, "3,1", True, "3,1"),
        (2, None, True, None),
    ],
)
def test_one_gpu_needs_no_launcher(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    processes: int,
    visible: str | None,
    by_launcher: bool,
    seen: str | None,
) -> None:
    from launch import local

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    started = {}

    def start(command: list[str], *, env: dict[str, str], **_more: object) -> SimpleNamespace:
        started.update(command=command, visible=env.get("CUDA_VISIBLE_DEVICES"))
        # above Linux's largest process id
        return SimpleNamespace(pid=2**22 + 1, wait=lambda _timeout: 0)

    monkeypatch.setattr(local.subprocess, "Popen", start)
    monkeypatch.setattr(local.gpus, "list_gpus", list)  # as if this machine had no GPU
    assert local._launch(processes, on_gpu=True, arguments=["--reset"]) == 0
    assert ("deepspeed.launcher.runner" in started["command"]) == by_launcher
    assert ("--num_gpus" in started["command"]) == (by_launcher and visible is None)
    assert started["visible"] == seen
    assert started["command"][-2:] == [str(ROOT / "train.py"), "--reset"]


def test_the_demo_from_nothing_to_an_exported_network(tmp_path: Path) -> None:
    """With fewer and smaller steps. It must still beat bicubic on the held-out photographs."""
    run_dir = tmp_path / "run"
    variables = environment(threads=1) | {
        "HOME": str(tmp_path),
        "VASTSCALE_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "launch" / "local.py"),
            "--output-dir",
            str(run_dir),
            "--reset",
            "steps=250",
            "data.crop=64",
            "compile=off",
            "validate_every=250",
        ],
        env=variables,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("no file lists in ~/dataset: running the demo")
    result = json.loads((run_dir / "evaluation.json").read_text())
    assert {image["name"] for image in result["images"]} == {"coffee", "flower"}
    gain = result["mean"]["model"]["psnr_y"] - result["mean"]["bicubic"]["psnr_y"]
    assert gain > 1.0
    table = done.stdout[done.stdout.index("PSNR-Y bicubic") :]
    assert f"{gain:+.3f}" in table
    picture = Path(done.stdout.split("side by side: ")[1].splitlines()[0])
    assert picture.read_bytes().startswith(b"\x89PNG")

    exported = subprocess.run(
        [sys.executable, str(ROOT / "export_trained_model.py"), str(run_dir)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert exported.returncode == 0, exported.stderr
    files = sorted(path.name for path in (run_dir / "export").iterdir())
    assert files == ["demo_x2.pth", "demo_x2.safetensors"]
    again = subprocess.run(
        [
            sys.executable,
            str(ROOT / "evaluate.py"),
            "--model",
            str(run_dir / "export" / files[0]),
            "--hr",
            str(tmp_path / "cache" / "demo" / "held_out"),
            "--json",
            str(tmp_path / "again.json"),
            "--out",
            str(tmp_path / "pictures"),
        ],
        env=variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again.json").read_text())["mean"] == result["mean"]
