"""What is in `checkpoints/` and is not the run's stays, damage is reported, and no save fails for
either."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fault_lives import Outcome, Run, World
from benchmarks.fault_mutations import mutate
from conftest import ROOT
from fabricate import contents_of, make_run, seal
from pipeline.checkpoint import pruning
from pipeline.checkpoint.checkpoint import newest_whole
from pipeline.checkpoint.progress import Progress
from pipeline.checkpoint.saving import Saver
from pipeline.checkpoint_index import DamagedError, damage, read_index, write_index
from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.run_folder import (
    checkpoint_dir,
    checkpoint_folders,
    checkpoint_steps,
    find_run,
    has_ended,
    run_network_file,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1, 2 and 3."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    save(run_dir, 1, 2, 3, keep=3)
    return run_dir


@pytest.fixture
def run_dir(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "runs" / "run"))


def save(run_dir: Path, *steps: int, keep: int = 2) -> list[str]:
    """Save `steps` one after the other; return what was reported."""
    saver = Saver(run_dir, contents_of(Ranks()), keep, Ranks())
    for step in steps:
        saver.begin(Progress(step=step))
        assert saver.wait() is None
        assert damage(checkpoint_dir(run_dir, step)) == ""
    return saver.notes()


def newest(run_dir: Path) -> tuple[int | None, list[str]]:
    """Return the step that a run would continue from, and what it reports."""
    said: list[str] = []
    return newest_whole(run_dir, Ranks(), said.append), said


def names(run_dir: Path) -> list[str]:
    return sorted(os.listdir(run_dir / "checkpoints"))


def content(path: Path) -> dict[str, bytes | str]:
    """Everything in a folder, a file or behind a link, to see that it stays the same."""
    if path.is_symlink():
        return {"": os.readlink(path)}
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def _a_file(checkpoints: Path, name: str) -> None:
    (checkpoints / name).write_bytes(b"mine")


def _a_folder(checkpoints: Path, name: str) -> None:
    (checkpoints / name / "notes").mkdir(parents=True)
    (checkpoints / name / "notes" / "mine.txt").write_text("mine")


def _a_copy(checkpoints: Path, name: str) -> None:
    shutil.copytree(checkpoints / "step-00000001", checkpoints / name)


def _a_link(checkpoints: Path, name: str) -> None:
    (checkpoints / name).symlink_to("step-00000001")  # which is pruned by the first save


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (_a_file, "step-00000009.tar"),
        (_a_file, "step-00000009"),
        (_a_file, ".tmp-step-00000009"),
        (_a_file, ".old-step-00000003"),
        (_a_link, "step-good"),
        (_a_link, "step-00000009"),
        (_a_link, ".tmp-step-00000009"),
        (_a_link, ".old-step-00000009"),
        (_a_folder, "step-9-mine"),
        (_a_folder, "step-9"),
        (_a_folder, "step-000000009"),  # a run writes eight digits
        (_a_folder, "step-٠٠٠٠٠٠٠٩"),
        (_a_folder, ".tmp-step-x"),
        (_a_folder, ".old-step-x"),
        (_a_folder, ".tmp-step-00000009.bak"),
        (_a_folder, "damaged-step-00000001"),
        (_a_copy, "step-00000001-before-the-change"),
        (_a_copy, ".tmp-step-mine"),
        (_a_copy, "step-1"),
    ],
)
def test_what_somebody_else_has_put_there_stays(
    run_dir: Path, make: Callable[[Path, str], None], name: str
) -> None:
    checkpoints = run_dir / "checkpoints"
    make(checkpoints, name)
    before = content(checkpoints / name)
    assert before
    assert checkpoint_steps(run_dir) == [1, 2, 3]
    assert newest(run_dir)[0] == 3
    assert find_run(run_dir.parent) == run_dir
    notes = save(run_dir, 4, 5, 9)
    assert checkpoint_steps(run_dir) == [5, 9]
    # Only what has the name of a checkpoint that is saved has to move, which is reported.
    moved = next((path for path in checkpoints.glob("damaged-*") if path.name != name), None)
    there = checkpoints / name if moved is None else moved
    assert content(there) == before
    assert (moved is None) == (name not in ("step-00000009", ".tmp-step-00000009"))
    assert [
        note for note in notes if moved and f"{name} in" in note and moved.name in note
    ] == notes
    assert names(run_dir) == sorted({"step-00000005", "step-00000009", there.name})


def test_a_step_that_lost_its_index_is_renamed_and_reported(run_dir: Path) -> None:
    lost = checkpoint_dir(run_dir, 3)
    (lost / "MANIFEST.json").unlink()
    before = content(lost)
    step, said = newest(run_dir)
    assert step == 2
    assert said == [
        f"note: step-00000003 in {lost.parent} is not an intact checkpoint (MANIFEST.json is "
        "missing); it is now damaged-step-00000003"
    ]
    assert content(lost.with_name("damaged-step-00000003")) == before
    # While a run is going on, too; an earlier one of the same name is kept.
    lost = checkpoint_dir(run_dir, 2)
    (lost / "MANIFEST.json").unlink()
    lost.rename(checkpoint_dir(run_dir, 3))
    (note,) = save(run_dir, 4)
    assert "it is now damaged-step-00000003-1" in note
    assert names(run_dir) == [
        "damaged-step-00000003",
        "damaged-step-00000003-1",
        "step-00000001",
        "step-00000004",
    ]


def test_a_damaged_index_does_not_count_as_a_kept_checkpoint(run_dir: Path) -> None:
    (checkpoint_dir(run_dir, 3) / "MANIFEST.json").write_text("{}")
    (note,) = save(run_dir, 4)
    assert "MANIFEST.json is not a checkpoint's index); it is now damaged-step-00000003" in note
    assert names(run_dir) == ["damaged-step-00000003", "step-00000002", "step-00000004"]


def test_the_best_step_is_kept(run_dir: Path) -> None:
    saver = Saver(run_dir, contents_of(Ranks()), 1, Ranks())
    saver.begin(Progress(step=4, best_step=2))
    assert saver.wait() is None
    assert checkpoint_steps(run_dir) == [2, 4]
    assert saver.notes() == []


def test_a_persons_files_in_an_old_checkpoint_are_kept(run_dir: Path, tmp_path: Path) -> None:
    folder, elsewhere = checkpoint_dir(run_dir, 1), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("far away")
    (folder / "generator" / "notes.txt").write_text("mine")
    (folder / "more").symlink_to(elsewhere)
    (folder / ".DS_Store").touch()
    (note,) = save(run_dir, 4)
    assert "except for generator/notes.txt, which is not of the run; it is now in kept-step" in note
    assert names(run_dir) == ["kept-step-00000001", "step-00000003", "step-00000004"]
    kept = run_dir / "checkpoints" / "kept-step-00000001"
    assert content(kept) == {"generator/notes.txt": b"mine"}
    assert (kept / "more").is_symlink()
    assert content(elsewhere) == {"file": b"far away"}
    assert newest(run_dir) == (4, [])


@pytest.mark.parametrize(
    "left", [".tmp-step-00000004", ".tmp-step-00000009", ".removed-step-00000001"]
)
def test_what_a_kill_has_left_is_removed(run_dir: Path, left: str) -> None:
    """An unfinished save, of the same step or another, and a removal that had begun."""
    folder = run_dir / "checkpoints" / left
    if left.startswith(".removed"):
        checkpoint_dir(run_dir, 1).rename(folder)
        (folder / "state.json").unlink()
    else:
        assert pruning.begin_folder(folder) == []
        (folder / "generator").mkdir()
        (folder / "generator" / "shard-0.pt").write_bytes(b"half")
    assert save(run_dir, 4) == []
    assert names(run_dir) == ["step-00000003", "step-00000004"]


def test_an_interrupted_replacement_keeps_the_one_that_is_whole(run_dir: Path) -> None:
    def replaced(step: int) -> Path:
        return run_dir / "checkpoints" / f".old-step-{step:08d}"

    # Killed between the two renames: the old one comes back. Killed after: the new one stays.
    checkpoint_dir(run_dir, 3).rename(replaced(3))
    shutil.copytree(checkpoint_dir(run_dir, 2), replaced(2))
    assert newest(run_dir) == (3, [])
    assert names(run_dir) == [f"step-0000000{step}" for step in (1, 2, 3)]
    # The new one is damaged, or is something else that has its name.
    shutil.copytree(checkpoint_dir(run_dir, 3), replaced(3))
    (checkpoint_dir(run_dir, 3) / "state.json").write_text("{}")
    step, said = newest(run_dir)
    assert step == 3
    assert len(said) == 1
    assert "state.json has 2 bytes" in said[0]
    assert "it is now damaged-step-00000003" in said[0]
    checkpoint_dir(run_dir, 3).rename(replaced(3))
    checkpoint_dir(run_dir, 3).symlink_to("step-00000001")
    assert newest(run_dir)[0] == 3
    assert (run_dir / "checkpoints" / "damaged-step-00000003-1").is_symlink()


def test_a_checkpoint_damaged_since_it_was_saved_is_saved_again(run_dir: Path) -> None:
    for number, step in enumerate((2, 3)):
        file = checkpoint_dir(run_dir, step) / ("state.json" if number else "MANIFEST.json")
        file.write_bytes(file.read_bytes()[:-9] + bytes(9))
        (note,) = save(run_dir, step, keep=3)
        assert f"it is now damaged-step-0000000{step}" in note


def test_what_cannot_be_removed_fails_no_save(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with files of another user."""
    unlink = Path.unlink

    def refuse(path: Path, *arguments: object, **options: object) -> None:
        if path.name == "state.json":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    notes = save(run_dir, 4, 5)
    assert checkpoint_steps(run_dir) == [4, 5]
    assert [note.split("'")[0] for note in notes] == [
        "a leftover could not be removed: [Errno 13] Permission denied: "
    ] * len(notes)
    assert len(notes) == len(set(notes)) == 3  # the removal of 1, 2 and 3; each is reported once
    monkeypatch.undo()
    assert save(run_dir, 6) == []
    assert names(run_dir) == ["step-00000005", "step-00000006"]


def test_names_that_cannot_be_changed_are_reported(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (checkpoint_dir(run_dir, 1) / "MANIFEST.json").unlink()
    monkeypatch.setattr(Path, "rename", refuse)
    notes = save(run_dir, 4, keep=1)
    assert len(notes) == 3  # the step without an index, and the removal of 2 and 3
    assert all("could not be removed: [Errno 13] Permission denied" in note for note in notes)
    assert checkpoint_steps(run_dir) == [2, 3, 4]


def test_a_folder_of_a_run_is_recognised_by_one_rule(run_dir: Path) -> None:
    (checkpoint_dir(run_dir, 2) / "MANIFEST.json").unlink()
    checkpoint_dir(run_dir, 123456789).mkdir()
    seal(checkpoint_dir(run_dir, 123456789), 123456789)
    assert [
        (folder.path.name, folder.step, folder.has_index) for folder in checkpoint_folders(run_dir)
    ] == [
        ("step-00000001", 1, True),
        ("step-00000002", 2, False),
        ("step-00000003", 3, True),
        ("step-123456789", 123456789, True),
    ]
    assert checkpoint_folders(run_dir.parent) == []


# --- Commands after training ---


def spoil(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_damage_means_the_same_to_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "runs", steps=(100, 200, 300), best=200)
    files = ("MANIFEST.json", "state.json", "generator.safetensors", "generator_ema.safetensors")
    for name in files:
        copy = Path(shutil.copytree(run_dir, tmp_path / name))
        spoil(checkpoint_dir(copy, 300) / name)
        assert newest_whole(copy, Ranks(), lambda _: None) == 200  # train.py
        copy = Path(shutil.copytree(run_dir, tmp_path / f"{name} again"))
        spoil(checkpoint_dir(copy, 300) / name)
        assert run_network_file(copy, "newest", ema=True).parent.name == "step-00000200"
        note = capsys.readouterr().err
        assert note.startswith(f"note: run '{copy.name}': the checkpoint of step 300 is damaged (")
        assert note.endswith("); trying the previous one\n")
        assert f"({name} has changed since it was written)" in note
        assert run_network_file(copy, "best", ema=False).parent.name == "step-00000200"
        assert capsys.readouterr().err == ""  # an older state knows the best step as well
        with pytest.raises(
            UserError,
            match=rf"step 300 is damaged \({name} .*\); choose from best, newest, 100, 200",
        ):
            run_network_file(copy, 300, ema=True)
        assert has_ended(copy, 300, 0) == (name not in ("MANIFEST.json", "state.json"))
        spoil(checkpoint_dir(copy, 200) / name)
        assert run_network_file(copy, "best", ema=True).parent.name == "step-00000100"
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"note: run '{copy.name}': ")
        spoil(checkpoint_dir(copy, 100) / name)
        for step in ("best", "newest"):
            with pytest.raises(
                UserError, match=r"every checkpoint in .* is damaged; choose another"
            ):
                run_network_file(copy, step, ema=True)
        capsys.readouterr()


def test_a_disk_that_cannot_be_read_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path)

    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=r"step-00000200' cannot be read \(Input/output error\)"):
        run_network_file(run_dir, "newest", ema=True)


# --- The index ---


def test_a_flipped_bit_of_an_index_is_found(run_dir: Path) -> None:
    file = checkpoint_dir(run_dir, 3) / "MANIFEST.json"
    content = file.read_bytes()
    assert json.loads(content).keys() == {"step", "world_size", "identity", "files", "sha256"}
    places = range(8 * len(content))
    # All of its hash, and a sample of the rest.
    for place in {*places[-800:], *random.Random(0).sample(places, 800)}:
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(DamagedError):
            read_index(file.parent)
    for length in (*range(1, len(content), 20), *range(len(content) - 100, len(content))):
        file.write_bytes(content[:length])
        with pytest.raises(DamagedError):
            read_index(file.parent)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "1e999",
        "[" * 100_000,
        "9" * 5_000,
        '{"a": ' * 5_000,
        "\udcff",
        '{"step": true, "world_size": 1, "identity": {}, "files": {}}',
        '{"step": 3, "world_size": "1", "identity": {}, "files": {}}',
        '{"step": 3, "world_size": 1, "identity": [], "files": {}}',
        '{"step": 3, "world_size": 1, "identity": {}, "files": {}}',
        '{"step": 3, "world_size": 1, "files": {}}',
    ],
)
def test_json_of_another_shape_is_damage(run_dir: Path, text: str) -> None:
    file = checkpoint_dir(run_dir, 3) / "MANIFEST.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert damage(file.parent).startswith("MANIFEST.json is not ")
    assert newest(run_dir)[0] == 2


@pytest.mark.parametrize(
    "name", ["../out", "/etc/passwd", "a/../../b", "x\0y", "n" * 5_000, "\ud800"]
)
def test_a_name_outside_the_checkpoint_is_damage(run_dir: Path, name: str) -> None:
    folder = checkpoint_dir(run_dir, 3)
    index = read_index(folder)
    index["files"][name] = {"size": 1, "sha256": "0" * 64}
    write_index(folder, index)
    assert damage(folder) != ""


def test_an_index_of_another_step_is_damage(run_dir: Path) -> None:
    shutil.rmtree(checkpoint_dir(run_dir, 3))
    shutil.copytree(checkpoint_dir(run_dir, 2), checkpoint_dir(run_dir, 3))
    assert damage(checkpoint_dir(run_dir, 3)) == "MANIFEST.json is that of step 2"


def test_an_index_without_its_hash_is_that_of_an_earlier_version(tmp_path: Path) -> None:
    for folder in (ROOT / "tests/fixtures/runs-before-the-house").glob("*/checkpoints/step-*"):
        assert damage(folder) == ""
        assert "sha256" not in read_index(folder)
        copy = Path(shutil.copytree(folder, tmp_path / folder.parents[1].name / folder.name))
        write_index(copy, read_index(copy))
        text = (copy / "MANIFEST.json").read_text()
        assert read_index(copy).pop("sha256") in text
        # Whatever is left of the hash is no earlier version.
        for spoiled in (
            text.replace('"sha256": "', '"sha255": "'),
            text.replace('\n "sha', ' "sha'),
        ):
            (copy / "MANIFEST.json").write_text(spoiled)
            assert damage(copy) != ""
        # The identity of an earlier one has to be readable, or the run would seem another.
        for key in ("recipe", "ds_config", "dataset", "precision"):
            index = read_index(folder)
            del index["identity"][key]
            (copy / "MANIFEST.json").write_text(json.dumps(index))
            assert damage(copy) == "MANIFEST.json is not a checkpoint's index"


# --- Whole resumes ---


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 24 steps that was stopped at step 22, after a save at step 21."""
    run = Run(World(tmp_path_factory.mktemp("world")), "stopped")
    life = run.start(calls={"train.py": [["at_step", 21, "send", signal.SIGTERM]]})
    assert life.join() == 128 + signal.SIGTERM
    assert run.steps()[-2:] == [21, 22]
    return run


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(stopped: Run, seed: int) -> None:
    """Two mutations each."""
    run = Run(stopped.world, f"damaged-{seed}")
    shutil.copytree(stopped.run_dir, run.run_dir)
    folder, previous = (checkpoint_dir(run.run_dir, step) for step in (22, 21))
    whole, draw = content(folder), random.Random(seed)
    what = [mutate(folder, previous, draw) for _ in range(2)]
    assert content(folder) != whole
    outcome = run.conclude(Outcome("; ".join(what)))
    assert outcome.holds, outcome  # the last step has the bits of an undisturbed run
    printed = (run.folder / "output").read_text()
    assert "Traceback" not in printed
    assert outcome.resumed_at == 21
    assert re.search(r"step 22 is damaged \(|step-00000022 in .* is not an intact", printed)
