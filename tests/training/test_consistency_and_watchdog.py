"""Differing ranks are reported before training begins; a rank that hangs is ended with its stack
traces."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import warm
from conftest import ROOT, SMALL, environment
from lives import in_ranks
from pipeline.checkpoint_index import damage
from pipeline.cli import UserError
from pipeline.run_folder import checkpoint_dir, checkpoint_steps
from pipeline.training.options import TrainOptions, TrainPlan, make_plans
from pipeline.training.run import differences, facts, refuse_other_hosts

STAGES = """
base: demo
stages:
  psnr: {steps: 3}
  gan: {steps: 4, adversarial: {weight: 0.01, discriminator: {name: vgg, num_features: 4}}}
"""


def plans(dataset: Path, *overrides: str, recipe: str = "demo") -> list[TrainPlan]:
    return make_plans(
        TrainOptions(
            overrides=(*SMALL, *overrides),
            recipe=recipe,
            dataset_dir=(dataset,),
            runtime="deepspeed",
        )
    )


@pytest.fixture
def changed(dataset: Path, tmp_path: Path) -> Path:
    """The same files, but a manifest records another hash for one of them."""
    copy = tmp_path / "changed"
    shutil.copytree(dataset, copy)
    (copy / "manifest.jsonl").write_text(
        json.dumps({"path": "photos/03.npy", "sha256": "0" * 64}) + "\n"
    )
    return copy


# --- Facts ---


def test_differences_name_what_differs() -> None:
    ours, theirs = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}
    assert differences(ours, theirs) == [
        "b (4 instead of 2)",
        "c (none instead of 3)",
        "d (5 instead of none)",
    ]
    assert differences(ours, dict(reversed(ours.items()))) == []
    assert differences({}, {}) == []


def test_facts_hold_the_packages_and_the_files(dataset: Path) -> None:
    found = facts(plans(dataset))
    assert found["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert platform.python_version().startswith(f"{found['python']}.")
    for name in ("torch", "deepspeed", "accelerate", "numpy", "opencv-python-headless"):
        assert found[f"package {name}"] == version(name)
    sources = {
        path.relative_to(ROOT).as_posix(): path
        for kind in ("*.py", "*.cpp")
        for path in (ROOT / "pipeline").rglob(kind)
    }
    assert {
        name.removeprefix("file ") for name in found if name.startswith("file ")
    } == sources.keys()
    for name, path in sources.items():
        assert found[f"file {name}"] == hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def test_facts_hold_the_dataset_the_recipe_and_the_ds_config(dataset: Path) -> None:
    (plan,) = plans(dataset, "steps=7", "losses={l1: 0.5, mse: 2.0}")
    found = facts([plan])
    for key, value in plan.dataset.identity().items():
        assert found[f"dataset {key}"] == str(value)
    assert (found["dataset training_files"], found["dataset validation_files"]) == ("10", "3")
    assert (found["recipe steps"], found["recipe data.crop"]) == ("7", "32")
    assert (found["recipe losses.l1"], found["recipe losses.mse"]) == ("0.5", "2.0")
    assert found["ds_config train_batch_size"] == "4"
    assert found["ds_config optimizer.params.betas"] == "[0.9, 0.99]"
    assert all(isinstance(value, str) for value in found.values())
    assert json.loads(json.dumps(found)) == found


def test_facts_of_stages_bear_their_names(dataset: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "two.yaml"
    recipe.write_text(STAGES)
    found = facts(plans(dataset, recipe=str(recipe)))
    assert (found["stage psnr: recipe steps"], found["stage gan: recipe steps"]) == ("3", "4")
    assert found["stage gan: discriminator_ds_config train_batch_size"] == "4"
    assert not any(name.startswith("stage psnr: discriminator") for name in found)
    later = facts(plans(dataset, "stages.gan.steps=5", recipe=str(recipe)))
    assert differences(found, later) == ["stage gan: recipe steps (5 instead of 4)"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), []),
        (("seed=5",), ["recipe seed (5 instead of 0)"]),
        (
            ("ds.optimizer.params.lr=1e-4",),
            ["ds_config optimizer.params.lr (0.0001 instead of 0.002)"],
        ),
        (("ds.zero_optimization.stage=1",), ["ds_config zero_optimization.stage (1 instead of 0)"]),
        (
            ("losses={mse: 1}",),
            ["recipe losses.l1 (none instead of 1.0)", "recipe losses.mse (1.0 instead of none)"],
        ),
    ],
    ids=["same", "seed", "rate", "zero", "losses"],
)
def test_another_command_line_is_told_by_what_it_changes(
    dataset: Path, overrides: tuple[str, ...], expected: list[str]
) -> None:
    assert differences(facts(plans(dataset)), facts(plans(dataset, *overrides))) == expected


def test_another_file_of_the_same_name_is_told(dataset: Path, changed: Path) -> None:
    (told,) = differences(facts(plans(dataset)), facts(plans(changed)))
    assert told.startswith("dataset contents_sha256 (")
    lists = changed / "training_file_list.txt"
    lists.write_text("\n".join(lists.read_text().split()[:-1]) + "\n")
    names = [
        told.partition(" (")[0]
        for told in differences(facts(plans(dataset)), facts(plans(changed)))
    ]
    assert names == ["dataset contents_sha256", "dataset lists_sha256", "dataset training_files"]


# --- Ranks ---


class Told:
    """A stand-in for `Ranks` on the first rank: `gather` returns the given `values`."""

    def __init__(self, *values: Any) -> None:
        self.world_size, self._values = len(values) + 1, values

    def gather(self, value: Any) -> list[Any]:
        return [value, *self._values]


def test_the_first_rank_that_differs_is_named_with_its_host(dataset: Path) -> None:
    ours, here = plans(dataset), socket.gethostname()
    same = facts(ours)
    refuse_other_hosts(ours, Told((here, same), ("node2", dict(same))))  # type: ignore[arg-type]
    other = {
        **same,
        "package torch": "1.0",
        "python": "2.7",
        "recipe seed": "9",
        "recipe steps": "1",
        "zzz": "0",
    }
    with pytest.raises(UserError) as caught:
        refuse_other_hosts(ours, Told((here, same), ("node2", other), ("node3", {})))  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"rank 2 on node2 differs from rank 0 on {here}: package torch (1.0 instead of "
        f"{version('torch')}); python (2.7 "
        f"instead of {same['python']}); recipe seed (9 instead of 0) and 2 more; bring the "
        "hosts in line with launch/sync.sh"
    )


def test_a_rank_alone_has_nobody_to_differ_from(dataset: Path) -> None:
    refuse_other_hosts(plans(dataset), SimpleNamespace(world_size=1))  # type: ignore[arg-type]


def _refusals(datasets: list[str], overrides: list[list[str]]) -> list[str]:
    """Return the errors of this rank if its neighbour has another dataset, another command line, or
    the same."""
    from pipeline.distributed.ranks import start_distributed, stop_distributed

    ranks, said = start_distributed(), []
    for places, words in (
        (datasets, [[], []]),
        (datasets[:1] * 2, overrides),
        (datasets[:1] * 2, [[], []]),
    ):
        try:
            refuse_other_hosts(plans(Path(places[ranks.rank]), *words[ranks.rank]), ranks)
            said.append("")
        except UserError as error:
            said.append(str(error))
    stop_distributed()
    return said


def test_both_ranks_are_told_the_same(dataset: Path, changed: Path, tmp_path: Path) -> None:
    told = in_ranks(
        _refusals, tmp_path / "ranks", 2, [str(dataset), str(changed)], [["seed=1"], ["seed=2"]]
    )
    assert told[0] == told[1]
    who = f"rank 1 on {socket.gethostname()} differs from rank 0 on {socket.gethostname()}: "
    files, seeds, same = told[0]
    assert files.startswith(f"{who}dataset contents_sha256 (")
    assert (
        seeds == f"{who}recipe seed (2 instead of 1); bring the hosts in line with launch/sync.sh"
    )
    assert same == ""


def _train(datasets: list[str], run_dir: str) -> None:
    """Train on this rank's own dataset."""
    from pipeline.training.run import main

    own = Path(datasets[int(os.environ["RANK"])])
    main(
        TrainOptions(
            overrides=(*SMALL, "steps=2"),
            recipe="demo",
            dataset_dir=(own,),
            output_dir=Path(run_dir),
        )
    )


def test_training_does_not_begin_on_unlike_ranks(
    dataset: Path, changed: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"the ranks ended with \[2, 2\]"):
        in_ranks(_train, tmp_path / "ranks", 2, [str(dataset), str(changed)], str(tmp_path / "run"))
    first, second = ((tmp_path / "ranks" / f"{rank}.output").read_text() for rank in (0, 1))
    assert first.startswith("error: rank 1 on ")
    assert first.count("\n") == 1
    assert "dataset contents_sha256" in first
    assert second == ""
    assert checkpoint_steps(tmp_path / "run") == []
    assert not (tmp_path / "run").exists()


# --- Watchdog ---


def watched(code: str, **more: Any) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run `code` in a process until it ends; return the process and the seconds it took."""
    began = time.monotonic()
    prelude = (
        "import ctypes, sys, threading, time\nfrom pipeline.distributed.stopping import Watchdog\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        env=environment(),
        cwd=ROOT,
        text=True,
        timeout=60,
        check=False,
        **{"capture_output": True, **more},
    )
    return done, time.monotonic() - began


@pytest.mark.parametrize(
    "hang",
    [
        "time.sleep(30)",
        "ctypes.PyDLL(None).sleep(30)",
        "lock.acquire(), lock.acquire()",
        "exec('while True: pass')",
    ],
    ids=["python", "c-with-the-lock", "deadlock", "loop"],
)
def test_a_process_that_hangs_is_ended_with_its_tracebacks(hang: str) -> None:
    """Even if C code hangs while holding Python's lock."""
    done, seconds = watched(f"""
        lock = threading.Lock()
        def hang():
            {hang}
        def waits():
            time.sleep(30)
        threading.Thread(target=waits, daemon=True).start()
        watchdog = Watchdog(0.4)
        watchdog.feed()
        print("fed", flush=True)
        hang()
        print("never")
    """)
    assert done.returncode == 1
    assert done.stdout == "fed\n"
    assert done.stderr.startswith("Timeout (0:00:00.4")
    assert "in hang" in done.stderr
    assert "in waits" in done.stderr, "other threads must be shown, too"
    assert done.stderr.count("most recent call first") == 2
    assert 0.4 <= seconds < 20


def test_a_process_that_makes_progress_goes_on() -> None:
    done, seconds = watched("""
        watchdog = Watchdog(3)  # an interpreter that has imported torch takes a second to end
        for _ in range(12):
            watchdog.feed()
            time.sleep(0.3)
        print("on")
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")
    assert seconds > 3.6


def test_a_process_that_stops_making_progress_is_ended() -> None:
    """The time counts from the last feed that took effect, at most a tenth of it ago."""
    done, _ = watched("""
        watchdog = Watchdog(1.0)
        for _ in range(12):
            watchdog.feed()
            time.sleep(0.1)
        began = time.monotonic()
        while True:
            print(time.monotonic() - began, flush=True)
            time.sleep(0.02)
    """)
    assert done.returncode == 1
    assert "Timeout (" in done.stderr
    assert 0.6 < float(done.stdout.split()[-1]) < 1.5


@pytest.mark.parametrize(
    "code",
    [
        "w = Watchdog(0); w.feed(); time.sleep(0.4); w.feed(); w.stop()",
        "w = Watchdog(0.2); time.sleep(0.4); w.stop()",
        "w = Watchdog(0.2); w.feed(); w.stop(); time.sleep(0.4)",
        "w = Watchdog(0.2); w.feed(); w.stop(); time.sleep(0.1); v = Watchdog(0); v.feed(); "
        "time.sleep(0.4)",
    ],
    ids=["zero-seconds", "never-fed", "stopped", "another-with-zero"],
)
def test_what_nobody_minds_goes_on(code: str) -> None:
    done, _ = watched(f"{code}; print('on')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


def test_a_watchdog_may_begin_again() -> None:
    """Each of two stages has its own."""
    done, _ = watched("""
        first = Watchdog(0.2)
        first.feed()
        first.stop()
        time.sleep(0.4)
        second = Watchdog(0.2)
        second.feed()
        time.sleep(30)
    """)
    assert done.returncode == 1
    assert "Timeout (" in done.stderr


def test_what_hides_stderr_does_not_hide_the_tracebacks() -> None:
    done, _ = watched("""
        import contextlib, io
        with contextlib.redirect_stderr(io.StringIO()):
            Watchdog(0.3).feed()
            time.sleep(30)
    """)
    assert done.returncode == 1
    assert "Timeout (" in done.stderr


def _hang_in_the_third_step(dataset: str, run_dir: str, output: str) -> None:
    from pipeline.training.run import main
    from pipeline.training.trainers import ReconstructionTrainer

    with open(output, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    step = ReconstructionTrainer.step
    ReconstructionTrainer.step = lambda self, batch, number: (  # type: ignore[method-assign]
        step(self, batch, number) if number < 2 else ctypes.PyDLL(None).sleep(60)
    )
    main(
        TrainOptions(
            overrides=(*SMALL, "steps=4", "save_every=1"),
            recipe="demo",
            dataset_dir=(Path(dataset),),
            output_dir=Path(run_dir),
            watchdog_minutes=0.02,
        )
    )


def test_training_that_hangs_is_ended_and_keeps_what_it_saved(
    dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    process = warm.Fork(_hang_in_the_third_step, str(dataset), str(tmp_path / "run"), str(output))
    process.join(50)
    assert process.exitcode == 1
    assert "Timeout (0:00:01.2" in output.read_text()
    assert "_hang_in_the_third_step" in output.read_text()
    # The checkpoint of step 2 was still being written when the step hung while holding the
    # interpreter's lock.
    steps = checkpoint_steps(tmp_path / "run")
    assert steps in ([1], [1, 2])
    assert [damage(checkpoint_dir(tmp_path / "run", step)) for step in steps] == [""] * len(steps)


def test_a_closed_stderr_stops_no_training(tmp_path: Path) -> None:
    """With `train.py 2>&-` progress is still noticed, and a hang still ends the process."""
    for number, (code, status) in enumerate(
        (
            ("Watchdog(5).feed(); file.write_text('on')", 0),
            ("Watchdog(0.3).feed(); time.sleep(30)", 1),
        )
    ):
        kept = tmp_path / str(number)
        line = (
            "import pathlib, time; from pipeline.distributed.stopping import Watchdog; "
            f"file = pathlib.Path({str(kept)!r})"
        )
        done = subprocess.run(
            ["sh", "-c", '"$0" -c "$1" 2>&-', sys.executable, f"{line}; {code}"],
            env=environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status
        assert kept.exists() == (status == 0)
