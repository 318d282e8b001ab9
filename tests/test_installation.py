"""The package: its wheel, the command `vastscale` in a fresh environment, and what --help costs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, SMALL, run_python
from pipeline import installation
from pipeline.installation import COMMANDS, DATA_COMMANDS, as_typed

EVERY = [
    *COMMANDS,
    "train --hostfile hosts",
    *(f"data {name}" for name in DATA_COMMANDS),
]
HEAVY = ("torch", "cv2", "scipy", "deepspeed", "nvidia.dali", "matplotlib", "skimage", "sklearn")


def pip(*arguments: str, python: str = sys.executable) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"),
            *arguments,
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a user who has installed the package, and nothing else."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def vastscale(wheel: Path, home: Path) -> Iterator[Path]:
    """The command, in an environment of its own that sees the packages which are installed here."""
    environment = home / "environment"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120
    )
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "present.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(environment / "bin" / "python")
    pip("install", "--no-deps", "--no-index", str(wheel), python=python)
    installed = {path for path in packages.rglob("*") if "__pycache__" not in path.parts}
    yield environment / "bin" / "vastscale"
    now = {path for path in packages.rglob("*") if "__pycache__" not in path.parts}
    assert now == installed, "a command wrote into site-packages"


def run(
    vastscale: Path, folder: Path, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`, from an environment that knows nothing of this checkout."""
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR")
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in dropped and not key.startswith("VASTSCALE")
    }
    home = vastscale.parents[2]
    return subprocess.run(
        [str(vastscale), *arguments],
        cwd=folder,
        env={**kept, "HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def tool_scripts() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tools").glob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }


def test_every_script_has_a_command() -> None:
    scripts = [command.script for command in (*COMMANDS.values(), *DATA_COMMANDS.values())]
    assert all((ROOT / script).is_file() for script in scripts)
    assert len(set(scripts)) == len(scripts)
    assert tool_scripts() <= set(scripts)


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        (
            "make it with `python tools/images_to_data.py PHOTOS`",
            "make it with `vastscale data images PHOTOS`",
        ),
        ("see python\nevaluate.py --hr X", "see vastscale evaluate --hr X"),
        ("with ./launch_local_train.sh --reset", "with vastscale train --reset"),
        ("(python -m launch.doctor)", "(vastscale doctor)"),
        ("copy it to all hosts with launch/sync.sh", "copy it to all hosts with rsync"),
        ("as images_to_data.py does", "as vastscale data images does"),
        ("/home/me/evaluate.py and my_evaluate.py", "/home/me/evaluate.py and my_evaluate.py"),
    ],
)
def test_messages_name_the_command(monkeypatch: pytest.MonkeyPatch, text: str, typed: str) -> None:
    assert as_typed(text) == text
    monkeypatch.setattr(installation, "INSTALLED", True)
    assert as_typed(text) == typed


def test_a_file_of_the_user_comes_before_the_packaged_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").touch()
    (tmp_path / "ds_config.json").touch()
    assert installation.find_file("ds_config.json") == ROOT / "ds_config.json"
    assert "mine" not in installation.recipe_names()
    monkeypatch.setattr(installation, "INSTALLED", True)
    assert installation.find_file("ds_config.json") == Path("ds_config.json")
    assert installation.find_file("recipes/demo.yaml") == ROOT / "recipes" / "demo.yaml"
    assert {"mine", "demo"} <= set(installation.recipe_names())


@pytest.mark.parametrize("command", EVERY)
def test_help_imports_no_large_library_and_names_no_script(command: str) -> None:
    code = (
        "import sys\n"
        "from pipeline import installation\n"
        "from vastscale.__main__ import main\n"
        "installation.INSTALLED = True\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        f"loaded = set({HEAVY!r}) & sys.modules.keys()\n"
        "assert not loaded, loaded\n"
    )
    done = run_python(code, *command.split(), "--help")
    assert done.returncode == 0, done.stderr
    shown = "train" if command.startswith("train") else command
    assert done.stdout.startswith(f"usage: vastscale {shown} ")
    for word in (".sh", "python ", ".py", "tools/"):
        assert word not in done.stdout


def test_the_wheel_names_its_licence_and_needs_what_requirements_txt_pins(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    assert "License-Expression: Apache-2.0" in lines
    assert any(name.endswith("licenses/LICENSE") for name in names)
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = [line.partition("#")[0].strip() for line in text.splitlines()]
    needed = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
    assert sorted(pin.partition("==")[0].lower().replace("_", "-") for pin in pins if pin) == (
        sorted(need.partition("==")[0].lower().replace("_", "-") for need in needed)
    )
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vastscale"}
    inside = {name.removeprefix("vastscale/checkout/") for name in names}
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "pipeline", "tools", "recipes"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert set(tracked) <= inside


def test_the_installed_command_introduces_itself(vastscale: Path, tmp_path: Path) -> None:
    done = run(vastscale, tmp_path)
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    done = run(vastscale, tmp_path, "data")
    assert all(f"\n  {name} " in done.stdout for name in DATA_COMMANDS)
    assert run(vastscale, tmp_path, "--version").stdout == "vastscale 0.1.0\n"
    done = run(vastscale, tmp_path, "trian")
    assert done.returncode == 2
    assert done.stderr == (
        "error: unknown command trian; did you mean 'train'? (vastscale --help lists all)\n"
    )
    done = run(vastscale, tmp_path, "tensorboard")
    assert done.returncode == 2
    assert "there is no folder runs; train first (vastscale train)" in done.stderr
    done = run(vastscale, tmp_path, "train", "--recipe", "vapsr_x4", "--dataset-dir", "none")
    assert done.returncode == 2
    assert "`vastscale data images PHOTOS ~/dataset/NAME`" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_demo_upscale_and_export_outside_a_checkout(vastscale: Path, tmp_path: Path) -> None:
    """The demo's first steps on its own photographs, then its network is used and handed on."""
    import cv2

    done = run(vastscale, tmp_path, "train", *SMALL, "steps=3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished at step 3" in done.stdout
    assert "site-packages" not in done.stdout + done.stderr
    run_dir = tmp_path / "runs" / "demo"
    assert (run_dir / "evaluation.json").is_file()
    demo = vastscale.parents[2] / ".cache" / "vastscale" / "demo"
    assert (demo / "dataset" / "training_file_list.txt").is_file()

    picture = np.zeros((24, 32, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "small.png"), picture)
    done = run(vastscale, tmp_path, "upscale", "small.png", "-o", "large.png")
    assert done.returncode == 0, done.stdout + done.stderr
    assert cv2.imread(str(tmp_path / "large.png")).shape == (48, 64, 3)

    done = run(vastscale, tmp_path, "export")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vastscale evaluate --model" in done.stdout
    assert "from vastscale import read_network" in done.stdout
    file = run_dir / "export" / "demo_x2.safetensors"
    code = f"from vastscale import read_network; print(read_network({str(file)!r}).scale)"
    read = subprocess.run(
        [str(vastscale.with_name("python")), "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert read.stdout == "2\n", read.stderr


def test_several_ranks_outside_a_checkout(vastscale: Path, dataset: Path, tmp_path: Path) -> None:
    """Processes that DeepSpeed's launcher starts find the code, and the user's own recipe."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("base: demo\nsteps: 2\n")
    done = run(
        vastscale,
        tmp_path,
        *("train", "--recipe", "mine", "--procs", "2", "--dataset-dir", str(dataset)),
        *SMALL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x CPU" in done.stdout
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "step-00000002").is_dir()
