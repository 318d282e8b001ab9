"""Checkpoints are written while training continues: of the right step, one after the other, and
failures are reported."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from comparison import checkpoint_differences, logged
from conftest import SMALL
from fabricate import contents_of
from lives import in_ranks, start_in_ranks, train
from pipeline.checkpoint import saving
from pipeline.checkpoint.progress import Progress, read_progress
from pipeline.checkpoint.saving import SaveError, Saver
from pipeline.checkpoint_index import damage
from pipeline.distributed.ranks import Ranks, start_distributed, stop_distributed
from pipeline.run_folder import checkpoint_dir, checkpoint_steps


class Gate:
    """Makes a function of `saving` wait until the gate is opened, and records that it was
    reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        function: Callable[..., Any] = getattr(saving, name)

        def gated(*arguments: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(60)
            return function(*arguments)

        monkeypatch.setattr(saving, name, gated)


def test_the_bits_are_those_of_the_step_that_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, contents = Gate(monkeypatch, "_write_own_files"), contents_of(Ranks())
    saver, progress = (
        Saver(tmp_path, contents, 2, Ranks()),
        Progress(step=7, best_scores={"psnr_y": 20.0}, best_step=7),
    )
    engine, ema = contents.engines["generator"], contents.ema
    weights = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    averaged = {name: tensor.clone() for name, tensor in ema.network.state_dict().items()}
    drawn = torch.get_rng_state()
    saver.begin(progress)
    assert gate.reached.wait(60)
    with torch.no_grad():  # training continues
        for network in (engine.module, ema.network):
            for tensor in network.state_dict().values():
                tensor.add_(1)
        engine.moment.add_(1)
    torch.rand(3)
    progress.step, progress.best_scores["psnr_y"], ema.num_updates = 8, 30.0, 99
    assert saver.poll() is None
    assert checkpoint_steps(tmp_path) == [], "it is committed only when everything is written"
    gate.opened.set()
    assert saver.wait() is None
    folder = checkpoint_dir(tmp_path, 7)
    assert damage(folder) == ""
    for file, expected in (
        ("generator.safetensors", weights),
        ("generator_ema.safetensors", averaged),
    ):
        found = load_file(folder / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    states = torch.load(folder / "generator" / "mp_rank_00_model_states.pt")["module"]
    assert all(torch.equal(states[name], tensor) for name, tensor in weights.items())
    assert (torch.load(folder / "generator" / "shard-0.pt")["moment"] == 0).all()
    assert torch.equal(torch.load(folder / "random-rank-00000.pt")["torch"], drawn)
    assert read_progress(tmp_path, 7) == Progress(step=7, best_scores={"psnr_y": 20.0}, best_step=7)
    assert json.loads((folder / "state.json").read_text())["ema_updates"] == 0


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, contents = Gate(monkeypatch, "_commit"), contents_of(Ranks())
    saver = Saver(tmp_path, contents, 2, Ranks())
    saver.begin(Progress(step=1))
    assert gate.reached.wait(60)
    threading.Timer(0.2, gate.opened.set).start()
    assert saver.wait() is None
    assert checkpoint_steps(tmp_path) == [1]
    for step in (2, 3):
        saver.begin(Progress(step=step))
        assert saver.wait() is None
    assert checkpoint_steps(tmp_path) == [2, 3]
    before = (checkpoint_dir(tmp_path, 3) / "MANIFEST.json").stat().st_ino
    saver.begin(Progress(step=3))  # the disk already holds all of it
    assert saver.wait() is None
    assert (checkpoint_dir(tmp_path, 3) / "MANIFEST.json").stat().st_ino == before
    saver.begin(Progress(step=3, validated_step=3))  # validated in the meantime
    assert saver.wait() is None
    assert read_progress(tmp_path, 3).validated_step == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]


@pytest.mark.parametrize("place", ["_make_folders", "_write_own_files", "_commit"])
def test_a_failure_is_told_once_and_the_next_save_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    saver = Saver(tmp_path, contents_of(Ranks()), 2, Ranks())
    saver.begin(Progress(step=1))
    assert saver.wait() is None

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, place, full)
        saver.begin(Progress(step=2))
        assert str(saver.wait()).startswith(
            "the checkpoint of step 2 could not be written: No space left on device: "
            f"{tmp_path / 'checkpoints'}"
        )
    assert saver.wait() is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    saver.begin(Progress(step=3))
    assert saver.wait() is None
    assert checkpoint_steps(tmp_path) == [1, 3]


def test_a_host_without_memory_for_the_copy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, contents_of(Ranks()), 2, Ranks())

    def none(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.checkpoint.snapshot._huge_pages", none)
        with pytest.raises(
            SaveError, match=r"of step 1 could not be written: .*Cannot allocate memory"
        ):
            saver.begin(Progress(step=1))
    saver.begin(Progress(step=2))
    assert saver.wait() is None
    assert checkpoint_steps(tmp_path) == [2]


def test_a_fault_of_the_program_is_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, contents_of(Ranks()), 2, Ranks())

    def wrong(*_: Any) -> None:
        raise KeyError("wrong")

    monkeypatch.setattr(saving, "_commit", wrong)
    saver.begin(Progress(step=1))
    with pytest.raises(KeyError, match="wrong"):
        saver.wait()


# --- Several ranks ---


def _save_beside_collectives(run_dir: str, failing: int | None, blind: int | None) -> list[Any]:
    """Save twice while the training threads run collectives all the time; return the results of
    saves and collectives."""
    ranks = start_distributed()
    contents = contents_of(ranks, sees_run_dir=ranks.rank != blind)
    saver, told, talks = Saver(Path(run_dir), contents, 5, ranks), [], []
    write = saving._write_own_files

    def slow(*arguments: Any) -> None:
        time.sleep(0.2 * ranks.rank)
        if ranks.rank == failing:
            raise OSError(28, "No space left on device")
        write(*arguments)

    for step in (1, 2):
        saving._write_own_files = slow if step == 1 else write
        saver.begin(Progress(step=step))
        for number in range(300):  # of the same kind and size as the writing threads' collectives
            talks.append(ranks.gather(f"{ranks.rank}-{number}"))
        failure = saver.wait()
        told.append(str(failure) if failure else "")
    expected = [
        [f"{rank}-{number}" for rank in range(ranks.world_size)] for number in range(300)
    ] * 2
    stop_distributed()
    return [told, talks == expected]


@pytest.mark.parametrize(
    ("failing", "blind"),
    [(None, None), (1, None), (0, None), (None, 1), (1, 1)],
    ids=["all", "rank-1-full", "rank-0-full", "rank-1-apart", "rank-1-apart-and-full"],
)
def test_ranks_write_together_beside_their_training(
    tmp_path: Path, failing: int | None, blind: int | None
) -> None:
    results = in_ranks(
        _save_beside_collectives, tmp_path / "ranks", 2, str(tmp_path / "run"), failing, blind
    )
    why = (
        ""
        if failing is None
        else "the checkpoint of step 1 could not be written: No space left on device: "
    )
    for told, is_right in results:
        assert told[0].startswith(why), told
        assert (told[0] == "") == (why == "")
        assert (told[1], is_right) == ("", True)
    steps = [2] if failing is not None else [1, 2]
    assert checkpoint_steps(tmp_path / "run") == steps
    for step in steps:
        folder = checkpoint_dir(tmp_path / "run", step)
        assert damage(folder) == ""
        assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
            "MANIFEST.json",
            "generator.safetensors",
            "generator_ema.safetensors",
            "mp_rank_00_model_states.pt",
            "random-rank-00000.pt",
            "random-rank-00001.pt",
            "shard-0.pt",
            "shard-1.pt",
            "state.json",
        ]
        assert (torch.load(folder / "generator" / "shard-1.pt")["moment"] == 1).all()


# --- Whole runs ---


def _last_logged(run_dir: Path) -> int:
    log = run_dir / "log.jsonl"
    return max((step for step, *_ in logged(run_dir)), default=0) if log.is_file() else 0


def _run(
    dataset: str, run_dir: str, overrides: list[str], slow_step: int, until: int, what: str
) -> int:
    """Train, committing the checkpoint of `slow_step` only when training has reached step
    `until`."""
    from pipeline.training.options import TrainOptions
    from pipeline.training.run import main

    commit = saving._commit

    def slow(aside: Path, final: Path, progress: Progress, *arguments: Any) -> None:
        if progress.step == slow_step:
            deadline = time.monotonic() + 60
            while _last_logged(Path(run_dir)) < until and time.monotonic() < deadline:
                time.sleep(0.005)
            if what == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)
            elif what == "hang":
                time.sleep(60)
        commit(aside, final, progress, *arguments)

    saving._commit = slow
    return main(
        TrainOptions(
            overrides=(*SMALL, *overrides),
            recipe="demo",
            dataset_dir=(Path(dataset),),
            output_dir=Path(run_dir),
        )
    )


RARE = ("validate_every=100", "save_every=3", "keep=9", "log_every=1")


@pytest.mark.parametrize(
    ("procs", "extra"),
    [
        (1, ()),
        (2, ("ds.zero_optimization.stage=2", "ds.bf16.enabled=true", "ds.fp16.enabled=false")),
        (1, ("adversarial={weight: 0.01, discriminator: {name: vgg, num_features: 4}}",)),
    ],
    ids=["fp32-1", "zero2-bf16-2", "gan-1"],
)
def test_training_goes_on_and_the_checkpoint_is_of_its_step(
    dataset: Path, tmp_path: Path, procs: int, extra: tuple[str, ...]
) -> None:
    """The checkpoint of step 3 is committed after step 5 and is bit-equal to that of a run which
    waits for it."""
    overrides = [*RARE, *extra]
    statuses = in_ranks(
        _run,
        tmp_path / "ranks",
        procs,
        str(dataset),
        str(tmp_path / "slow"),
        [*overrides, "steps=6"],
        3,
        5,
        "",
    )
    assert statuses == [0] * procs
    assert checkpoint_steps(tmp_path / "slow") == [3, 6]
    train(dataset, tmp_path / "straight", "steps=3", *RARE, *extra, procs=procs)
    found = checkpoint_differences(tmp_path / "straight", tmp_path / "slow", 3)
    # the shorter run ends with a validation
    assert [name for name in found if name != "state.json"] == []
    train(dataset, tmp_path / "whole", "steps=6", *RARE, *extra, procs=procs)
    assert checkpoint_differences(tmp_path / "whole", tmp_path / "slow", 6) == []


def test_a_signal_during_a_write_waits_for_it_and_for_the_last_one(
    dataset: Path, tmp_path: Path
) -> None:
    (status,) = in_ranks(
        _run,
        tmp_path / "ranks",
        1,
        str(dataset),
        str(tmp_path / "run"),
        [*RARE, "steps=100000"],
        3,
        4,
        "stop",
    )
    assert status == 128 + signal.SIGTERM
    steps = checkpoint_steps(tmp_path / "run")
    assert steps[0] == 3
    assert steps[-1] == _last_logged(tmp_path / "run")
    assert [damage(checkpoint_dir(tmp_path / "run", step)) for step in steps] == [""] * len(steps)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_kill_during_a_write_costs_the_checkpoint_in_the_making_alone(
    dataset: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    (process,) = start_in_ranks(
        _run,
        tmp_path / "ranks",
        1,
        str(dataset),
        str(run_dir),
        [*RARE, "steps=100000"],
        6,
        7,
        "hang",
    )
    deadline = time.monotonic() + 60
    while _last_logged(run_dir) < 8:  # two steps after the one whose checkpoint is being written
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert checkpoint_steps(run_dir) == [3]
    assert [path.name for path in (run_dir / "checkpoints").glob(".*")] == [".tmp-step-00000006"]
    assert "continuing from step 3 of 6" in train(dataset, run_dir, *RARE, "steps=6")
    train(dataset, tmp_path / "straight", *RARE, "steps=6")
    assert checkpoint_differences(tmp_path / "straight", run_dir, 6) == []
    assert not list((run_dir / "checkpoints").glob(".*"))
