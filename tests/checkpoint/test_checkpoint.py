"""Checkpoints are complete or do not exist, and damage is detected."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from conftest import command, run
from pipeline.checkpoint.pruning import prune
from pipeline.checkpoint_index import damage, write_index
from pipeline.run_folder import checkpoint_dir, checkpoint_steps


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 3, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    done = run(command(dataset, run_dir, "steps=6", "keep=9"))
    assert done.returncode == 0, done.stderr
    assert checkpoint_steps(run_dir) == [3, 4, 6]
    return run_dir


def mutate(folder: Path, draw: random.Random) -> str:
    """Damage one file of a checkpoint in one of the ways that disks and people do."""
    path = draw.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    content = bytearray(path.read_bytes())
    how = draw.choice(["flip", "truncate", "empty", "delete", "append", "zero"])
    where = draw.randrange(len(content))
    if how == "flip":
        content[where] ^= 1 << draw.randrange(8)
    elif how == "truncate":
        del content[where:]
    elif how == "empty":
        content.clear()
    elif how == "append":
        content += b"x"
    elif how == "zero":
        old = bytes(content[where : where + 64])
        content[where : where + 64] = bytes(len(old))
        if bytes(content[where : where + 64]) == old:
            content[where] ^= 1
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(bytes(content))
    return f"{how} {path.relative_to(folder)}"


def test_every_mutation_is_detected(trained: Path, tmp_path: Path) -> None:
    whole = checkpoint_dir(trained, 6)
    assert damage(whole) == ""
    draw = random.Random(0)
    unseen = []
    for number in range(300):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        how = mutate(copy, draw)
        if not damage(copy):
            unseen.append(how)
        shutil.rmtree(copy)
    assert unseen == []


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    trained: Path, dataset: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    file = next(checkpoint_dir(run_dir, 6).rglob("*model_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    done = run(command(dataset, run_dir, "steps=6", "keep=9"))
    assert done.returncode == 0, done.stderr
    assert (
        "checkpoint of step 6 is damaged (generator/mp_rank_00_model_states.pt has changed"
        in done.stdout
    )
    assert "continuing from step 4 of 6" in done.stdout
    assert damage(checkpoint_dir(run_dir, 6)) == ""  # saved again, intact
    for name in ("generator.safetensors", "generator_ema.safetensors"):
        assert (checkpoint_dir(run_dir, 6) / name).read_bytes() == (
            checkpoint_dir(trained, 6) / name
        ).read_bytes()


def test_when_all_are_damaged_nothing_is_trained_over_them(
    trained: Path, dataset: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    for step in (3, 4, 6):
        (checkpoint_dir(run_dir, step) / "state.json").write_text("{}")
    for _ in range(2):  # refusing changes nothing, so the second start is refused as well
        done = run(command(dataset, run_dir, "steps=8"))
        assert done.returncode == 2
        assert "every checkpoint in" in done.stderr
        assert "--reset" in done.stderr
        assert "Traceback" not in done.stderr + done.stdout


def test_pruning_keeps_the_newest_and_the_best(trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    prune(run_dir, 2, {3})
    assert checkpoint_steps(run_dir) == [3, 4, 6]
    prune(run_dir, 2, {6})
    assert checkpoint_steps(run_dir) == [4, 6]
    assert not checkpoint_dir(run_dir, 3).exists()


def test_a_checkpoint_with_code_in_it_is_not_run(
    trained: Path, dataset: Path, tmp_path: Path
) -> None:
    import hashlib
    import pickle

    run_dir, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(trained, run_dir)

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, (f"open({str(canary)!r}, 'w').close()",))

    folder = checkpoint_dir(run_dir, 6)
    file = next(folder.rglob("*model_states.pt"))
    file.write_bytes(pickle.dumps({"module": Payload()}))
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"][file.relative_to(folder).as_posix()] = {
        "size": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    write_index(folder, manifest)
    assert damage(folder) == ""
    done = run(command(dataset, run_dir, "steps=8"))
    assert done.returncode != 0
    assert not canary.exists()
