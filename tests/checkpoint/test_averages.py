"""Snapshots of power-function averages: what is kept through pruning, kills and returns, and
averages of other lengths made from them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import warm
from comparison import assert_resumed_is_straight
from conftest import SMALL
from fabricate import contents_of
from lives import train
from pipeline.checkpoint import averages, saving
from pipeline.checkpoint.averages import (
    SnapshotRule,
    chosen_width,
    reconstruct,
    store_averages,
    stored_averages,
    usable_widths,
)
from pipeline.checkpoint.progress import Progress
from pipeline.checkpoint.saving import Saver
from pipeline.checkpoint_index import damage
from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.models.ema import ExponentialMovingAverage
from pipeline.models.posthoc_ema import WIDTHS, exponent
from pipeline.run_folder import (
    AVERAGES_DIR,
    checkpoint_dir,
    checkpoint_steps,
    find_run,
    power_average_file,
)


def snapshots(run_dir: Path) -> list[int]:
    return checkpoint_steps(run_dir, AVERAGES_DIR)


def snapshot(run_dir: Path, step: int) -> Path:
    return checkpoint_dir(run_dir, step, AVERAGES_DIR)


def saver_of(run_dir: Path, most: int = 6, total: int = 16) -> Saver:
    contents = contents_of(Ranks())
    network = contents.engines["generator"].module
    object.__setattr__(contents, "ema", ExponentialMovingAverage(network, 0.9, WIDTHS))
    object.__setattr__(contents, "snapshots", SnapshotRule(most, total))
    return Saver(run_dir, contents, 2, Ranks())


def save(saver: Saver, *steps: int) -> list[str]:
    for step in steps:
        saver.begin(Progress(step=step))
        assert saver.wait() is None
    return saver.notes()


def test_snapshots_outlive_their_checkpoints_and_are_bounded(tmp_path: Path) -> None:
    tmp_path, rule = tmp_path / "runs" / "demo", SnapshotRule(6, 16)
    saver = saver_of(tmp_path)
    assert save(saver, *range(1, 17)) == []
    due = [step for step in range(1, 17) if rule.includes(step)]
    assert due == [2, 4, 6, 8, 12, 16]
    assert checkpoint_steps(tmp_path) == [15, 16]
    assert snapshots(tmp_path) == due
    for step in due:
        assert damage(snapshot(tmp_path, step)) == ""
        assert {path.name for path in snapshot(tmp_path, step).iterdir()} == {
            "MANIFEST.json",
            "state.json",
            *map(power_average_file, WIDTHS),
        }
    # hard links: no disk is used while the checkpoint is there
    file = power_average_file(WIDTHS[0])
    assert os.path.samefile(checkpoint_dir(tmp_path, 16) / file, snapshot(tmp_path, 16) / file)
    assert find_run(tmp_path.parent) == tmp_path  # the snapshots are no run
    save(saver, 32)  # trained on: the oldest snapshot gives way
    assert snapshots(tmp_path) == [*due[1:], 32]


def test_a_disk_without_hard_links_gets_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(averages.os, "link", refuse)
    save(saver_of(tmp_path), 2)
    file = power_average_file(WIDTHS[1])
    first, second = checkpoint_dir(tmp_path, 2) / file, snapshot(tmp_path, 2) / file
    assert first.read_bytes() == second.read_bytes()
    assert not os.path.samefile(first, second)
    assert damage(snapshot(tmp_path, 2)) == ""


def test_a_kill_before_the_snapshot_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the commit, or while the snapshot was made: the next save makes it."""
    saver = saver_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "store_averages", lambda *_: [])  # the kill
        save(saver, 2)
    assert snapshots(tmp_path) == []
    # another, in the middle: the folder has its temporary name and no index yet
    unfinished = snapshot(tmp_path, 2).with_name(".tmp-step-00000002")
    unfinished.mkdir(parents=True)
    (unfinished / "MANIFEST.json").touch()
    os.link(
        checkpoint_dir(tmp_path, 2) / power_average_file(WIDTHS[0]),
        unfinished / power_average_file(WIDTHS[0]),
    )
    assert save(saver, 3) == []
    assert snapshots(tmp_path) == [2]
    assert damage(snapshot(tmp_path, 2)) == ""
    assert not unfinished.exists()


def test_a_full_disk_is_reported_and_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saver_of(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(averages.os, "link", refuse)
        (note,) = save(saver, 2)
    assert note == "the averages of step 2 could not be kept: No space left on device"
    assert checkpoint_steps(tmp_path) == [2]
    assert save(saver, 3) == []
    assert snapshots(tmp_path) == [2]


ON = ("posthoc_ema={snapshots: 12}", "save_every=1", "ds.scheduler.params.total_num_steps=100")


def test_resume_is_exact_and_any_length_is_the_direct_average(
    dataset: Path, tmp_path: Path
) -> None:
    """A real run, stopped and continued; its raw weights of all steps give every average."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(dataset, straight, "steps=8", "keep=9", *ON)
    train(dataset, broken, "steps=3", "keep=9", *ON)
    train(dataset, broken, "steps=8", "keep=9", *ON)
    assert_resumed_is_straight(straight, broken)
    assert snapshots(straight) == snapshots(broken) == list(range(1, 9))
    train(dataset, straight, "steps=24", "keep=99", *ON)
    raw = [
        load_file(checkpoint_dir(straight, step) / "generator.safetensors") for step in range(1, 25)
    ]
    stored = stored_averages(straight, 24)
    assert len(stored) == 2 * 12
    for width in (*WIDTHS, 0.04, 0.07, 0.16):
        shares = np.diff((np.arange(25) / 24) ** (exponent(width) + 1))
        (found,) = reconstruct(straight, 24, stored, [width])
        far, moved = 0.0, 0.0
        for name in (key for key, tensor in raw[0].items() if tensor.is_floating_point()):
            direct = sum(
                share * weights[name].double() for share, weights in zip(shares, raw, strict=True)
            )
            far = max(far, float((found.saved.state_dict[name] - direct).abs().max()))
            moved = max(moved, float((raw[-1][name] - direct).abs().max()))
        assert far < (1e-6 if width in WIDTHS else 1e-4), (width, far)
        assert moved > 20 * far, "the weights have moved far more"


def test_snapshots_of_a_part_that_was_left_are_removed(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(dataset, run_dir, "steps=8", "keep=9", *ON)
    before = {
        step: (snapshot(run_dir, step) / power_average_file(0.05)).read_bytes()
        for step in (4, 5, 8)
    }
    # a damaged newest checkpoint: the run continues from step 7
    (checkpoint_dir(run_dir, 8) / "state.json").write_text("{}")
    train(dataset, run_dir, "steps=9", "keep=9", *ON)
    assert snapshots(run_dir)[-2:] == [7, 8]
    assert (snapshot(run_dir, 8) / power_average_file(0.05)).read_bytes() == before[8]
    # none later than the step from which a run continues survives its start
    with pytest.raises(AssertionError, match=r"ended with \[2\]"):
        train(dataset, run_dir, "steps=9", "data.crop=64", *ON)  # another run: nothing changes
    assert snapshots(run_dir)[-1] == 8
    # back by hand, and killed before the first step
    process = warm.Fork(_start_from, str(dataset), str(run_dir), 4)
    process.join(60)
    assert process.exitcode == 0
    assert snapshots(run_dir) == [1, 2, 3, 4]
    assert (snapshot(run_dir, 4) / power_average_file(0.05)).read_bytes() == before[4]
    assert not list((run_dir / AVERAGES_DIR).glob(".*"))


def _start_from(dataset: str, run_dir: str, step: int) -> None:
    from pipeline.distributed.ranks import start_distributed
    from pipeline.training.options import TrainOptions, make_plan
    from pipeline.training.setup import set_up

    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    options = TrainOptions(
        overrides=(*SMALL, "steps=9", "keep=9", *ON),
        recipe="demo",
        dataset_dir=(Path(dataset),),
        output_dir=Path(run_dir),
        from_step=step,
    )
    run = set_up(make_plan(options), start_distributed(), lambda _: None)
    assert run.progress.step == step
    os._exit(0)


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, most=6, total=400)
    ema = saver._contents.ema
    for step in (50, 100, 128, 192, 256, 384, 400):
        ema.num_updates = step
        with torch.no_grad():
            for weights in ema.power.values():
                torch._foreach_add_(weights, 0.1)
        save(saver, step)
    stored = stored_averages(tmp_path, 400)
    assert max(one.updates for one in stored) == 400
    usable = usable_widths(stored)
    assert usable == [0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.13]
    assert chosen_width("0.07", stored) == 0.07
    assert chosen_width("28", stored) == 0.07  # a length in updates
    for text, words in {
        "0.01": "error of 2[0-9]%, above 10%; choose from 0.02 to 0.13",
        "4": "with an error of",
        "0.3": "the longest average",
        "300": "115 updates",
        "0": "give auto, tracked",
        "nan": "give auto, tracked",
        "long": "give auto, tracked",
    }.items():
        with pytest.raises(UserError, match=words):
            chosen_width(text, stored)
    # a damaged snapshot is left out, and so is one later than the step
    (snapshot(tmp_path, 100) / power_average_file(0.05)).write_bytes(b"")
    assert len(stored_averages(tmp_path, 400)) == len(stored) - 2
    earlier = {one.updates for one in stored_averages(tmp_path, 384)}
    assert earlier == {50, 128, 192, 256, 384}
    save(Saver(tmp_path / "plain", contents_of(Ranks()), 2, Ranks()), 1)
    with pytest.raises(UserError, match="posthoc_ema=on"):
        stored_averages(tmp_path / "plain", 1)


def test_nothing_is_stored_without_the_key(tmp_path: Path) -> None:
    assert store_averages(tmp_path, None) == []
    save(Saver(tmp_path, contents_of(Ranks()), 2, Ranks()), 1)
    assert not (tmp_path / AVERAGES_DIR).exists()
    index = json.loads((checkpoint_dir(tmp_path, 1) / "MANIFEST.json").read_text())
    assert not set(index["files"]) & set(map(power_average_file, WIDTHS))
