"""A few faults of benchmarks/faults.py, whose campaigns inject hundreds, and its own parts."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.fault_families import FAMILIES
from benchmarks.fault_lives import STEPS, Outcome, Run, World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("family", "seed"),
    [
        ("rank", 1),  # killed before a file operation
        ("disk-error", 2),
        ("stall", 1),
        ("clock", 0),
        ("files", 0),
        ("guard", 0),
    ],
)
def test_a_fault_costs_little_and_changes_nothing(world: World, family: str, seed: int) -> None:
    outcome = FAMILIES[family](world, random.Random(seed), f"{family}-{seed}")
    assert outcome.holds, outcome
    assert outcome.reported
    assert outcome.lost_steps <= STEPS


def test_an_abandoned_validation_is_made_up_for(world: World) -> None:
    """The run stops at the step of the validation; it used to train one more and skip it."""
    run = Run(world, "abandoned")
    life = run.start(calls={"train.py": [["in_validation", 4, "send", signal.SIGTERM]]})
    assert life.join() == 128 + signal.SIGTERM
    assert run.steps()[-1] == 16
    outcome = run.conclude(Outcome("SIGTERM", "in the validation of step 16"))
    assert outcome.holds, outcome
    assert (outcome.resumed_at, outcome.lost_steps) == (16, 0)


def test_a_campaign_continues_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    injected = []

    def fake(world: World, draw: random.Random, name: str) -> Outcome:
        injected.append((name, draw.random()))
        (world.folder / name).mkdir()
        return Outcome(
            "nothing", "never", 0, "error: /a/b/c, step 7", True, lost_steps=len(injected)
        )

    monkeypatch.setattr(faults, "FAMILIES", {"fake": fake})
    results = tmp_path / "results.jsonl"
    options = faults.Options(count=3, results=results)
    assert faults.main(options) == 0
    lines = results.read_text().splitlines()
    results.write_text(f"{lines[0]}\n{lines[1]}\n{lines[2][:40]}")  # killed while it wrote
    assert faults.main(options) == 0
    assert [name for name, _ in injected] == ["fake-0", "fake-1", "fake-2", "fake-2"]
    assert injected[2] == injected[3]  # the same fault
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["number"] for record in records] == [0, 1, 2]
    capsys.readouterr()
    assert faults.main(faults.Options(results=results, table=True)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[2] == "| `fake` | 3 | 3 | 2, 4 | 0.0 | 0 (3) | `error: …/c, step N` |"
    assert printed[-1] == "3 faults; the promise held for 3."


def test_a_broken_promise_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(world: World, draw: random.Random, name: str) -> Outcome:
        return Outcome("nothing", continued=True, differences=["weights"])

    monkeypatch.setattr(faults, "FAMILIES", {"fake": fake})
    assert faults.main(faults.Options(count=1, results=tmp_path / "results.jsonl")) == 1
