"""The loader's number of threads, and which degradation chain runs on which device."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import photograph
from pipeline.checkpoint.progress import Progress
from pipeline.cli import UserError
from pipeline.config.recipe import load_recipe, recipe_differences
from pipeline.data.dataset import Dataset, Folder
from pipeline.data.degradations.steps import STEPS
from pipeline.data.loader import Loader
from pipeline.data.source import CropSource, Position
from pipeline.data.spec import DataSpec, num_threads
from pipeline.distributed.ranks import Ranks
from pipeline.training import setup
from pipeline.training.healing import History
from pipeline.training.meter import Reading, TrainMeter, _new_seconds
from pipeline.training.reporting import Reporter
from pipeline.training.trainers import StepResult


def test_threads_are_a_number_or_auto() -> None:
    assert load_recipe("vapsr_x4").data.threads == "auto"
    assert load_recipe("vapsr_x4", {"data.threads": 5}).data.threads == 5
    for wrong in (0, 65, True, 2.5, "many"):
        with pytest.raises(
            UserError, match=r"data\.threads: .* is neither auto nor an integer from 1 to 64"
        ):
            load_recipe("vapsr_x4", {"data.threads": wrong})
    # The number of threads is not part of a run's identity: a run started with 2 can be resumed.
    assert (
        recipe_differences(load_recipe("vapsr_x4", {"data.threads": 2}), load_recipe("vapsr_x4"))
        == []
    )


def test_auto_is_the_cores_up_to_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (2, 2), (16, 16), (64, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: {*range(cores)})
        assert num_threads("auto") == expected
        assert num_threads(7) == 7
    assert num_threads("auto", 0) == 1
    assert num_threads("auto", 3) == 3
    assert num_threads(2, 40) == 2


HERE = socket.gethostname()


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([(HERE, {0, 1, 2, 3})], 4),
        (
            [(HERE, {*range(8)})] * 2 + [("elsewhere", {*range(8)})] * 2,
            4,
        ),  # shared by two of this host
        ([(HERE, {0, 1, 2}), (HERE, {3, 4, 5})], 3),  # each bound to its own cores
        ([(HERE, {0, 1, 2}), (HERE, {2, 3})], 2),  # two and a half each
        ([(HERE, {0})] * 3, 0),
    ],
)
def test_ranks_of_a_host_share_its_cores(
    held: Sequence[tuple[str, set[int]]], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: held[0][1])
    given = []
    ranks = SimpleNamespace(gather=lambda value: given.append(value) or list(held))
    assert setup._cores(ranks) == expected
    assert given == [held[0]]


@pytest.mark.parametrize(
    ("device", "began", "on_host"),
    [("cpu", "host", True), ("cpu", "dali", False), ("cuda", "host", False)],
)
def test_the_host_degrades_on_cpus_in_runs_that_began_so(
    device: str, began: str, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        setup.CropSource, "of_dataset", lambda _, spec, **more: asked.update(more, spec=spec)
    )
    monkeypatch.setattr(setup, "Loader", lambda *_, **more: asked.update(more))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    ranks = SimpleNamespace(
        rank=0, world_size=1, device=torch.device(device), gather=lambda value: [value]
    )
    run = SimpleNamespace(
        plan=SimpleNamespace(
            recipe=load_recipe("realesrgan_x4"), dataset=None, ds_config={"train_batch_size": 4}
        ),
        history=History(),
        ranks=ranks,
        micro_batch=4,
        accumulation=1,
        progress=Progress(cpu_degradation=began),
    )
    setup.Run.open_loader(run)
    assert asked["degrades_on_host"] == on_host
    assert asked["threads"] == asked["spec"].threads == 3


def test_the_ways_out_of_waiting_for_data_are_named_once() -> None:
    said: list[str] = []
    shown: list[str] = []
    reporter = object.__new__(Reporter)
    reporter.__dict__.update(
        _run=SimpleNamespace(
            trainer=SimpleNamespace(
                generator=SimpleNamespace(get_lr=lambda: [1e-4], rate=SimpleNamespace(value=1.0)),
                engines={},
            )
        ),
        _progress=Progress(step=50),
        journal=SimpleNamespace(log=lambda *_: None),
        _may_advise=True,
        _plan=SimpleNamespace(
            total_steps=99, ds_config={"train_batch_size": 4}, recipe=load_recipe("vapsr_x4")
        ),
        _console=SimpleNamespace(progress=lambda text, _: shown.append(text), say=said.append),
    )
    slow = {"compress(hevc)": 0.6, "blur(lens)": 0.4}
    for degradation in ((), (0.1, slow), (0.9, slow)):
        reporter._may_advise = True
        for wait in (0.02, 0.31, 0.5):
            reporter.log(Reading({"l1": 1.0}, {}, 10.0, wait, wait, 60.0, *degradation), 1.0)
    # Where the degradation takes a tenth of the time, it is not what training waits for.
    assert said == [
        *2
        * (
            "note: 31% of the time is spent waiting for data; raise data.threads (now auto), or "
            "convert encoded files to .npy, which need no decoding (tools/convert_dataset.py)",
        ),
        "note: 31% of the time is spent waiting for data; compress(hevc) takes 60% of the "
        "degradation's time: make this step rarer or faster, or raise data.threads (now auto)",
    ]
    named = [line for line in shown if "waiting for data" in line]
    assert [line.partition("e-04  ")[2] for line in named] == [
        "waiting for data: compress(hevc) takes 60%",
        "waiting for data: compress(hevc) takes 60%",
    ]


def test_the_step_that_training_waits_for_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(image: Any, drawn: dict[str, Any], workspace: Any) -> Any:
        time.sleep(0.02)
        return image

    monkeypatch.setitem(STEPS, "noise", STEPS["noise"]._replace(apply=slow))
    np.save(tmp_path / "0.npy", photograph(0, 40, 40))
    source = CropSource.of_dataset(
        Dataset((Folder(tmp_path, ["0.npy"], []),)),
        DataSpec(
            crop=32, degradation={"name": "chain", "steps": [{"blur": {"kind": "box"}}, "noise"]}
        ),
        scale=2,
        seed=0,
        position=Position(0, 1, 4),
        degrades_on_host=True,
    )
    loader = Loader(source, 0, torch.device("cpu"), threads=2, prefetch=1)
    meter = TrainMeter(Ranks(device=torch.device("cpu")), 100, 4)
    try:
        for step in (1, 2, 3, 4, 5):
            next(loader)
            meter.add(StepResult({"l1": torch.tensor(1.0)}, {}))
            meter.end_step(step, False, {}, loader)
        meter.drain()
        read = meter.read(5, loader)
    finally:
        loader.close()
    first, *others = read.degradation_steps
    assert first == "noise(gaussian)"
    assert {*others} == {"blur(box)", "resize(cubic_antialiased)"}
    assert sum(read.degradation_steps.values()) == pytest.approx(1)
    assert read.waiting_text().startswith("  waiting for data: noise(gaussian) takes ")
    line = json.loads(json.dumps(read.as_dict()))
    assert line["degradation_steps"]["noise(gaussian)"] > 0.5
    assert line["degrading"] > 0.3
    # A loader that starts a new pipeline counts from 0 again.
    assert _new_seconds({"a": 3.0, "b": 1.0}, {"a": 2.0, "b": 1.0, "c": 4.0}) == {"c": 4, "a": 2}
