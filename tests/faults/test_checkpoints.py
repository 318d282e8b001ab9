"""What is in `checkpoints/` and is not the run's stays, damage is reported, and no save fails for
either."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fabricate import contents_of, seal
from pipeline.checkpoint import pruning
from pipeline.checkpoint.checkpoint import newest_whole
from pipeline.checkpoint.progress import Progress
from pipeline.checkpoint.saving import Saver
from pipeline.checkpoint_index import damage
from pipeline.distributed.ranks import Ranks
from pipeline.run_folder import checkpoint_dir, checkpoint_folders, checkpoint_steps, find_run


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
