"""A finished run is reported from its checkpoint, without torch; all else goes through the normal
start."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, SMALL, assert_one_line, command, environment, run
from lives import train
from pipeline.checkpoint.progress import Progress
from pipeline.run_folder import checkpoint_dir, checkpoint_steps
from pipeline.training.options import TrainOptions, make_plans
from pipeline.training.saved_run import report_if_finished

LINE = (
    "nothing left to do: this run is finished at step 3 of 3 (--reset starts a new run; to train "
    "longer, set steps=N or --patience N)"
)
HEAVY = ("torch", "deepspeed", "accelerate", "nvidia.dali", "cv2")


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(dataset, run_dir, "steps=3")
    return run_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def options(dataset: Path, run_dir: Path, *overrides: str, **changes: object) -> TrainOptions:
    return TrainOptions(
        overrides=(*SMALL, *overrides),
        recipe="demo",
        dataset_dir=(dataset,),
        output_dir=run_dir,
        **changes,
    )


def is_answered(dataset: Path, run_dir: Path, *overrides: str, **changes: object) -> bool:
    return report_if_finished(make_plans(options(dataset, run_dir, *overrides, **changes)))


@pytest.mark.parametrize("script", ["launch/local.py", "train.py"])
def test_it_is_said_without_importing_anything_heavy(
    dataset: Path, copy: Path, script: str
) -> None:
    """In a fresh interpreter: the warm one has imported everything."""
    arguments = [
        "--recipe",
        "demo",
        "--dataset-dir",
        str(dataset),
        "--output-dir",
        str(copy),
        *SMALL,
        "steps=3",
    ]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{LINE}\n"
    imported = {
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "pipeline.training.saved_run" in imported
    assert imported.isdisjoint(HEAVY)
    assert (copy / "run.log").read_text().splitlines()[-1].endswith(f"  {LINE}")


def test_the_usual_way_says_the_same(dataset: Path, copy: Path) -> None:
    # `lives` begins behind the early answer
    assert LINE in train(dataset, copy, "steps=3").splitlines()


def test_a_run_with_steps_left_is_not_answered(
    dataset: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert not is_answered(dataset, copy, "steps=4")
    assert not is_answered(dataset, copy, "steps=3", reset=True)
    assert not is_answered(dataset, copy, "steps=3", wandb="project")
    assert not is_answered(dataset, copy.with_name("new"), "steps=3")
    assert capsys.readouterr().out == ""
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert not copy.with_name("new").exists()


def test_several_ranks_and_supervised_ones_go_the_usual_way(
    dataset: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variables in (
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {"VASTSCALE_GUARDED": "1"},
        {"RANK": "0"},
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert not is_answered(dataset, copy, "steps=3")
    assert is_answered(dataset, copy, "steps=3")


def test_another_run_is_refused_as_ever(dataset: Path, copy: Path) -> None:
    assert not is_answered(dataset, copy, "steps=3", "generator.num_features=12")
    assert not is_answered(
        dataset, copy, "steps=3", "ds.bf16.enabled=true", "ds.fp16.enabled=false"
    )
    done = run(command(dataset, copy, "steps=3", "generator.num_features=12"))
    assert_one_line(done, "holds another run (step 3): generator.num_features", "--reset")


def test_damage_goes_the_usual_way(dataset: Path, copy: Path) -> None:
    folder = checkpoint_dir(copy, 3)
    (copy / "checkpoints" / ".old-step-00000003").mkdir()  # left by an interrupted replacement
    assert not is_answered(dataset, copy, "steps=3")
    (copy / "checkpoints" / ".old-step-00000003").rmdir()
    assert is_answered(dataset, copy, "steps=3")
    for name in ("state.json", "generator.safetensors", "MANIFEST.json"):
        content = (folder / name).read_bytes()
        for damaged in (content[:-3], content[:40] + bytes([content[40] ^ 1]) + content[41:]):
            (folder / name).write_bytes(damaged)
            assert not is_answered(dataset, copy, "steps=3")
        (folder / name).write_bytes(content)
    assert is_answered(dataset, copy, "steps=3")


def test_a_last_validation_that_is_missing_is_made(dataset: Path, copy: Path) -> None:
    folder = checkpoint_dir(copy, 3)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "validated_step": None}))
    assert not is_answered(dataset, copy, "steps=3")


def test_of_stages_all_must_be_finished(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "staged.yaml"
    recipe.write_text(
        "base: demo\nstages:\n  one: {steps: 3}\n  two: {steps: 2, start: previous}\n"
    )
    arguments = [*command(dataset, tmp_path / "run"), "--recipe", str(recipe)]
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert checkpoint_steps(tmp_path / "run" / "two") == [2]
    again = options(dataset, tmp_path / "run")
    again.recipe = str(recipe)
    assert report_if_finished(make_plans(again))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in said] == [
        "nothing left to do: stage one is finished at step 3 of 3",
        "nothing left to do: stage two is finished at step 2 of 2",
    ]
    for stage in ("one", "two"):
        assert said.pop(0) in (tmp_path / "run" / stage / "run.log").read_text()
    (checkpoint_dir(tmp_path / "run" / "two", 2) / "MANIFEST.json").unlink()
    assert not report_if_finished(make_plans(again))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("progress", "is_finished"),
    [
        (Progress(step=10, validated_step=10), True),
        (Progress(step=10, validated_step=8), False),
        (Progress(step=12, validated_step=12), True),
        (Progress(step=9, validated_step=9, stale_validations=2), False),
        (Progress(step=9, validated_step=9, stale_validations=3), True),
        (Progress(), False),
    ],
)
def test_the_end_is_the_last_validation_or_the_patience(
    progress: Progress, is_finished: bool
) -> None:
    assert progress.is_finished(10, 3) == is_finished
    assert not progress.is_out_of_patience(0)
