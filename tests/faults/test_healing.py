"""Runs that diverge go back to a healthy checkpoint and carry on, the same way every time."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import warm
from benchmarks.divergence import GAN, Fault, returns_of, train_here
from comparison import checkpoint_differences
from conftest import SMALL, photograph, run
from lives import in_ranks
from pipeline.run_folder import CHECKPOINTS_DIR, checkpoint_steps

HEALING = (
    *SMALL,
    "steps=150",
    "keep=3",
    "save_every=20",
    "save_minutes=600",
    "validate_every=25",
    "log_every=10",
    "healing={window: 20, rate_steps: 30}",
    "ds.scheduler.params.total_num_steps=150",
)
"""Overrides of the demo recipe for a run of two seconds that can heal."""


def _train(
    dataset: str, run_dir: str, overrides: list[str], fault: dict | None, options: dict
) -> dict[str, Any]:
    return train_here(
        Path(dataset), Path(run_dir), tuple(overrides), fault and Fault(**fault), **options
    )


def train(
    dataset: Path,
    run_dir: Path,
    *overrides: str,
    fault: Fault | None = None,
    procs: int = 1,
    **options: Any,
) -> tuple[int, str]:
    """Train in ranks of their own; return the exit status and what the first one printed."""
    found = in_ranks(
        _train,
        run_dir.parent / f"{run_dir.name}-ranks",
        procs,
        str(dataset),
        str(run_dir),
        [*HEALING, *overrides],
        vars(fault) if fault else None,
        options,
    )
    assert len({rank["status"] for rank in found}) == 1
    return found[0]["status"], found[0]["output"]


@pytest.fixture(scope="module")
def clean(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("clean") / "run"
    assert train(dataset, run_dir, "keep=9")[0] == 0
    return run_dir


def psnr(run_dir: Path) -> float:
    entries = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [entry["psnr_y"] for entry in entries if entry["event"] == "validation"][-1]


def test_a_healed_run_is_the_same_when_it_is_stopped_and_continued(
    dataset: Path, clean: Path, tmp_path: Path
) -> None:
    """A learning rate 1000 times too high for 17 updates."""
    fault = Fault("rate", 83, 17, 1000)
    once, twice = tmp_path / "once", tmp_path / "twice"
    status, output = train(dataset, once, fault=fault)
    assert status == 0
    assert "training has diverged: the loss was" in output
    (entry,) = returns_of(once)
    assert entry["back_to"] == 60, "the checkpoint of step 80 was not 20 updates old"
    assert entry["first"] == 70
    assert entry["count"] == 30
    assert entry["rates"] == {"generator": 0.5}
    assert psnr(once) > 0.99 * psnr(clean)
    assert not [*(once / CHECKPOINTS_DIR).glob("left-*")]
    # The log says it once, at the step that it went back to, and has nothing of the part before.
    entries = [json.loads(line) for line in (once / "log.jsonl").read_text().splitlines()]
    (event,) = [entry for entry in entries if entry["event"] == "healing"]
    assert event["step"] == 60
    # 30 updates of 4 samples were passed over from update 70 on.
    assert (event["first_sample"], event["last_sample"]) == (280, 399)
    assert [e["step"] for e in entries if e["event"] == "train"] == list(range(10, 151, 10))
    epochs = {e["step"]: e["epoch"] for e in entries if e["event"] == "train"}
    assert epochs[80] - epochs[60] == pytest.approx((20 + 30) * 4 / 10)
    rates = {e["step"]: e["lr"] for e in entries if e["event"] == "train"}
    straight = {
        e["step"]: e["lr"]
        for e in map(json.loads, (clean / "log.jsonl").read_text().splitlines())
        if e["event"] == "train"
    }
    assert rates[70] == pytest.approx(straight[70] / 2)
    assert rates[100] == pytest.approx(straight[100])
    # Stopped twice before the fault, and once after the part that was healed.
    for steps in (50, 75, 125, 150):
        assert (
            train(dataset, twice, f"steps={steps}", fault=fault if steps == 125 else None)[0] == 0
        )
        assert len(returns_of(twice)) == (steps > 75)
    assert checkpoint_differences(once, twice, 150) == []


def test_a_run_that_diverges_again_and_again_ends_with_a_report(
    dataset: Path, tmp_path: Path
) -> None:
    """On two ranks, which decide alike; the fault comes back each time."""
    fault = Fault("rate", 75, 25, 1000, repeats=True)
    run_dir = tmp_path / "run"
    status, output = train(dataset, run_dir, "healing={window: 20, times: 2}", fault=fault, procs=2)
    assert status == 1
    entries = returns_of(run_dir)
    assert [entry["back_to"] for entry in entries] == [60, 60, 60]
    assert checkpoint_steps(run_dir)[-1] == 60
    (report,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "training has diverged 3 times from step 60: the loss was" in report
    assert f"the run is back at step 60; start another one from it with --start {run_dir}" in report
    # Every command that a message names works.
    for command in re.findall(r"python tools/show_batch.py ([^`\n;]+)", output):
        sheet = [
            warm.python(),
            "tools/show_batch.py",
            *command.split(),
            str(tmp_path / "sheet.png"),
        ]
        assert run(sheet).returncode == 0
    assert (tmp_path / "sheet.png").is_file()
    assert train(dataset, run_dir, "steps=70", procs=2)[0] == 0, "it continues from step 60"


def test_a_bad_sample_is_left_out_alone(tmp_path: Path) -> None:
    """One of 61 files is noise, which no network can predict from a reduced image."""
    root = tmp_path / "dataset"
    (root / "photos").mkdir(parents=True)
    names = [f"photos/{i:02d}.npy" for i in range(64)]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for i, name in enumerate(names):
        np.save(root / name, noise if i == 7 else photograph(i % 13, 64, 64))
    (root / "training_file_list.txt").write_text("".join(f"{name}\n" for name in names[:61]))
    (root / "validation_file_list.txt").write_text("".join(f"{name}\n" for name in names[61:]))
    run_dir = tmp_path / "run"
    status, output = train(root, run_dir, fault=Fault("weights", 95, 1, 1000))
    assert status == 0
    (entry,) = returns_of(run_dir)
    assert entry["count"] == 0
    assert 1 <= len(entry["excluded"]) <= 2
    assert f"leaving out {len(entry['excluded'])} sample" in output
    recreated = run(
        [
            *(warm.python(), "tools/show_batch.py", "--run", str(run_dir), "--json"),
            *(word for sample in entry["excluded"] for word in ("--sample", str(sample))),
            *("--dataset-dir", str(root), str(tmp_path / "sheet.png")),
        ]
    )
    assert recreated.returncode == 0, recreated.stderr
    assert recreated.stdout.count("photos/07.npy") >= len(entry["excluded"])


@pytest.mark.parametrize("extra", [(), (GAN,)], ids=["pixel", "gan"])
def test_a_clean_run_is_the_same_without_the_rule(
    dataset: Path, clean: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    runs = [tmp_path / name for name in ("on", "off")]
    for run_dir, switch in zip(runs, ("on", "off"), strict=True):
        assert train(dataset, run_dir, "steps=70", *extra, f"healing={switch}")[0] == 0
        assert returns_of(run_dir) == []
    differences = checkpoint_differences(*runs, 70)
    assert differences == ["state.json"], "which says what the rule remembers"


def test_from_step_continues_from_a_kept_checkpoint(
    dataset: Path, clean: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(clean, run_dir)
    before = checkpoint_steps(run_dir)
    assert {60, 100, 150} < set(before)
    for options, problem in (
        ({"from_step": 71}, "no checkpoint of that step; kept are "),
        ({"from_step": 60, "reset": True}, "give only one"),
        ({"from_step": 0}, "must be at least 1"),
    ):
        status, output = train(dataset, run_dir, "keep=9", **options)
        assert status == 2
        assert problem in output
    assert train(dataset, run_dir, "keep=9", "seed=3", from_step=60)[0] == 2, "another run"
    assert checkpoint_steps(run_dir) == before, "nothing has moved"
    status, output = train(dataset, run_dir, "keep=9", from_step=60)
    assert status == 0
    assert "going back from step 150 to step 60" in output
    assert "continuing from step 60 of 150" in output
    left = sorted(path.name for path in (run_dir / CHECKPOINTS_DIR).glob("left-step-*"))
    assert left == [f"left-step-{step:08d}" for step in before if step > 60]
    # The same samples at the same rates: only the number of returns differs.
    assert checkpoint_differences(clean, run_dir, 150) == ["state.json"]
    assert "nothing left to do" in train(dataset, run_dir, "keep=9")[1]
