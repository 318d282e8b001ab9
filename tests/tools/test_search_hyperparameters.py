"""The search: a small study that is killed, stopped and continued; its parts; its errors."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from PIL import Image

import lives
import warm
from conftest import ROOT, SMALL, environment
from pipeline.cli import UserError
from pipeline.cli import run as run_command
from pipeline.config.recipe import parse_overrides, recipe_of
from pipeline.distributed import gpus
from pipeline.training.options import TrainOptions, make_plans, overrides_last
from tools.search import trial as trial_module
from tools.search.report import importances, short_names, trial_table
from tools.search.run import Budget, Machine, Objective, Search, write_best
from tools.search.space import override, read_space, space_of
from tools.search.study import StudyFolder, next_trial, open_study, pruner_of, read_study
from tools.search.trial import LogTail, TrialRun
from tools.search_hyperparameters import FLAGS, Options, main

SPACE = """
ds.optimizer.params.lr: {low: 1e-5, high: 1e-2, log: true}
ema_decay: [0.5, 0.9]
losses: [{l1: 1.0}, {charbonnier: 1.0}]
"""
STEPS, TRIALS, PRUNE_AFTER = 60, 4, 32
SLOWLY = 0.05  # seconds between polls


def log_lines(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log_lines(run_dir) if line["event"] == "train"}


def psnrs(run_dir: Path) -> dict[int, float]:
    return {
        line["step"]: line["psnr_y"] for line in log_lines(run_dir) if line["event"] == "validation"
    }


def is_free(lock: Path) -> bool:
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(SLOWLY)


def in_process(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which saves seconds."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as stop,
    ):
        run_command(Options, main, overrides_last(list(words), FLAGS))
    return subprocess.CompletedProcess(words, stop.value.code, stdout.getvalue(), stderr.getvalue())


class Lived(NamedTuple):
    """A finished study, and what was observed on the way."""

    path: Path
    words: tuple[str, ...]  # of its command
    outputs: tuple[str, ...]  # of its second and third run
    saved_by_orphan: int  # step at which trial 0 ended after its searcher was killed
    status_of_ctrl_c: int
    trials: list[FrozenTrial]

    def run_dir(self, number: int) -> Path:
        return self.path / f"trial-{number:04d}"

    def overrides(self, number: int) -> list[str]:
        space = space_of(yaml.safe_load(SPACE.replace("1e-5", "0.00001").replace("1e-2", "0.01")))
        values = space.suggest(FixedTrial(self.trials[number].params))
        return [override(key, value) for key, value in values.items()]


@pytest.fixture(scope="module")
def lived(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Lived:
    """A study that is killed in trial 0, stopped by CTRL+C in trial 1, and then left to finish."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "space.yaml").write_text(SPACE)
    study = folder / "study"
    words = (
        str(folder / "space.yaml"),
        "--recipe",
        "demo",
        "--dataset-dir",
        str(dataset),
        "--output-dir",
        str(study),
        "--steps",
        str(STEPS),
        "--trials",
        str(TRIALS),
        "--pruner",
        "hyperband",
        "--prune-after",
        str(PRUNE_AFTER),
        "--keep",
        "1",
        "--seed",
        "1",
        *SMALL,
    )
    command = [warm.python(), str(ROOT / "tools/search_hyperparameters.py"), *words]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    searcher = start()
    wait_until(lambda: len(losses(study / "trial-0000")) >= 8)
    searcher.kill()
    searcher.wait()
    wait_until(lambda: is_free(study / "trial-0000" / ".lock"))
    saved = max(losses(study / "trial-0000"))
    searcher = start()
    wait_until(lambda: len(losses(study / "trial-0001")) >= 8)
    searcher.send_signal(signal.SIGINT)
    second, _ = searcher.communicate(timeout=60)
    status = searcher.returncode
    searcher = start()
    third, _ = searcher.communicate(timeout=240)
    assert searcher.returncode == 0, third
    held = read_study(StudyFolder(study))
    assert held is not None
    return Lived(study, words, (second, third), saved, status, held.trials)


def test_a_killed_searchers_trial_saves_and_is_gone_on_with(lived: Lived) -> None:
    assert 8 <= lived.saved_by_orphan < STEPS, "it ends itself, long before its last step"
    assert "trial 0 continues: " in lived.outputs[0]
    assert "trial 0 continues" not in lived.outputs[1]
    assert len(lived.trials) == TRIALS
    assert lived.trials[0].state == TrialState.COMPLETE
    assert list(losses(lived.run_dir(0))) == list(range(1, STEPS + 1))


def test_ctrl_c_saves_and_the_same_command_goes_on(lived: Lived) -> None:
    assert lived.status_of_ctrl_c == 130
    assert (
        lived.outputs[0].splitlines()[-1] == "stopped and saved; run the same command to continue"
    )
    assert "trial 1: saved at step " in lived.outputs[0]
    assert "trial 1 continues: " in lived.outputs[1]
    assert lived.trials[1].state in (TrialState.COMPLETE, TrialState.PRUNED)


def test_an_interrupted_trial_is_bit_for_bit_the_run_started_by_hand(
    lived: Lived, dataset: Path, tmp_path: Path
) -> None:
    lives.train(dataset, tmp_path / "hand", f"steps={STEPS}", *lived.overrides(0))
    assert losses(lived.run_dir(0)) == losses(tmp_path / "hand")
    assert psnrs(lived.run_dir(0)) == psnrs(tmp_path / "hand")
    assert lived.trials[0].value == max(psnrs(tmp_path / "hand").values())


def test_what_was_drawn_is_what_was_trained_with(lived: Lived) -> None:
    rates, first = set(), set()
    for trial in lived.trials:
        recipe = recipe_of(
            yaml.safe_load((lived.run_dir(trial.number) / "recipe.yaml").read_text()), "run"
        )
        ds_config = json.loads((lived.run_dir(trial.number) / "ds_config.json").read_text())
        assert ds_config["optimizer"]["params"]["lr"] == trial.params["ds.optimizer.params.lr"]
        assert recipe.ema_decay == trial.params["ema_decay"]
        assert recipe.losses == json.loads(trial.params["losses"])
        rates.add(ds_config["optimizer"]["params"]["lr"])
        first.add(losses(lived.run_dir(trial.number))[4])
    assert len(rates) == len(first) == TRIALS, "no two are the same"


def test_a_worse_trial_is_pruned_and_its_process_ended(lived: Lived) -> None:
    pruned = [trial for trial in lived.trials if trial.state == TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        run_dir = lived.run_dir(trial.number)
        assert PRUNE_AFTER <= max(losses(run_dir)) < STEPS
        assert is_free(run_dir / ".lock")
        step = min(step for step in psnrs(run_dir) if step >= PRUNE_AFTER)
        before = [psnrs(lived.run_dir(number))[step] for number in range(trial.number)]
        assert psnrs(run_dir)[step] < max(before)


def test_only_the_best_keep_their_checkpoints_and_all_their_logs(lived: Lived) -> None:
    best = max(
        (trial for trial in lived.trials if trial.state == TrialState.COMPLETE),
        key=lambda trial: trial.value,
    )
    for trial in lived.trials:
        run_dir = lived.run_dir(trial.number)
        assert bool(list(run_dir.glob("checkpoints/step-*"))) == (trial.number == best.number)
        assert losses(run_dir)
        assert (run_dir / "output.txt").stat().st_size > 0


def test_the_best_recipe_trains_as_its_trial_did(
    lived: Lived, dataset: Path, tmp_path: Path
) -> None:
    best = max(
        (trial for trial in lived.trials if trial.state == TrialState.COMPLETE),
        key=lambda trial: trial.value,
    )
    text = (lived.path / "best.yaml").read_text()
    advice = (
        text.splitlines()[2]
        .removeprefix("# Add ")
        .removesuffix(" to train for as long as the trial.")
    )
    assert yaml.safe_load(text)["steps"] == 1400, "as the demo's recipe says"
    done = subprocess.run(
        [
            warm.python(),
            str(ROOT / "launch/local.py"),
            "--recipe",
            str(lived.path / "best.yaml"),
            "--dataset-dir",
            str(dataset),
            "--output-dir",
            str(tmp_path / "best"),
            *shlex.split(advice),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "best") == losses(lived.run_dir(best.number))


def test_show_ranks_the_trials_and_draws_them(lived: Lived) -> None:
    journal = (lived.path / "journal.jsonl").read_bytes()
    (lived.path / "search.png").unlink()
    done = in_process(*lived.words, "--show")
    assert done.returncode == 0, done.stderr
    assert (lived.path / "journal.jsonl").read_bytes() == journal
    rows = [line.split() for line in done.stdout.splitlines()[2 : 2 + TRIALS]]
    complete = [float(row[2]) for row in rows if row[1] == "complete"]
    assert complete == sorted(complete, reverse=True)
    assert {int(row[0]) for row in rows} == set(range(TRIALS))
    with Image.open(lived.path / "search.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--steps", "70"), "--steps: 60 in the study, 70 asked for"),
        (("data.crop=16",), "data.crop: 32 in the study, 16 asked for"),
        (("ds.train_batch_size=2",), "ds.train_batch_size: 4 in the study, 2 asked for"),
        (
            ("--metric", "lpips", "validation_lpips=squeeze"),
            "--metric: psnr in the study, lpips asked for",
        ),
    ],
)
def test_another_search_in_the_same_folder_is_refused(
    lived: Lived, change: tuple[str, ...], message: str
) -> None:
    done = in_process(*lived.words, *change)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_space_is_refused_and_reset_keeps_the_old_study(
    lived: Lived, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(SPACE.replace("0.9]", "0.99]"))
    done = in_process(str(other), *lived.words[1:])
    assert done.returncode == 2
    assert "ema_decay: [0.5, 0.9] in the study, [0.5, 0.99] asked for" in done.stderr
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "journal.jsonl").write_text("old")
    with StudyFolder(tmp_path / "study").entered(reset=True) as kept:
        assert kept is not None
        assert (kept / "journal.jsonl").read_text() == "old"
        assert not any((tmp_path / "study").iterdir())
        (tmp_path / "link").symlink_to("study")
        for name in ("study", "link"):
            with (
                pytest.raises(UserError, match="in use by another search"),
                StudyFolder(tmp_path / name).entered(reset=True),
            ):
                pass


# --- Spaces ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "a search space is a table"),
        ("data.crop: {low: 64, hihg: 96}", "data.crop: unknown key 'hihg'; did you mean 'high'?"),
        ("data.crop: {low: 64}", "data.crop: a range needs high"),
        ("data.crop: {low: 64, high: 32}", "low 64 must be below high 32"),
        ("data.crop: {low: 64, high: 100, step: 32}", "use high: 96"),
        ("data.crop: {low: 64, high: 96, step: 0.5}", "step 0.5 is not an integer"),
        ("ema_decay: {low: 0, high: 0.9, log: true}", "low 0 must be above 0"),
        (
            "ema_decay: {low: 0.1, high: 0.9, log: true, step: 0.1}",
            "log and step cannot be combined",
        ),
        ("ema_decay: {low: yes, high: 0.9}", "low must be a finite number, not True"),
        ("ema_decay: {low: 0.1, high: .inf}", "high must be a finite number, not inf"),
        ("ema_decay: []", "needs at least one"),
        ("ema_decay: [0.9, 0.9]", "0.9 is given twice"),
        ("ema_decay: 0.9", "nothing to search"),
        ("ema_decay: [0.9, 0.99]\nema_decay: [0.5, 0.6]", "key 'ema_decay' is given 2 times"),
        ("'ema decay': [0.9, 0.99]", "'ema decay' is not the key of an override"),
        ("steps: [100, 200]", "set --steps N on the command line"),
        ("stages.gan.steps: [100, 200]", "they are compared by it"),
        ("data.degradation.name: [gaussian, cubic]", "they are compared by it"),
        (
            "seed: [1, 2]\nema_decay: {choices: [0.5, 0.9], when: {sead: 1}}",
            "no earlier key 'sead'; did you mean",
        ),
        (
            "seed: [1, 2]\nema_decay: {choices: [0.5, 0.9], when: {seed: 3}}",
            "3 is not among the choices of seed",
        ),
    ],
)
def test_a_space_that_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "space.yaml").write_text(text)
    done = in_process(str(tmp_path / "space.yaml"), "--output-dir", str(tmp_path / "study"))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "generator.num_blokcs: [1, 2]",
            "with generator.num_blokcs=1: recipe demo: generator: network 'vapsr' has no "
            "parameter 'num_blokcs'",
        ),
        ("ema_decay: {low: 0.5, high: 1.5}", "with ema_decay=1.5: recipe demo: ema_decay"),
    ],
)
def test_what_training_would_refuse_is_refused_before_the_first_trial(
    dataset: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "space.yaml").write_text(text)
    done = in_process(
        str(tmp_path / "space.yaml"),
        "--recipe",
        "demo",
        "--dataset-dir",
        str(dataset),
        "--output-dir",
        str(tmp_path / "study"),
        *SMALL,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted((ROOT / "recipes/searches").glob("*.yaml"))]
)
def test_every_shipped_space_gives_overrides_that_are_read_back_exactly(name: str) -> None:
    space = read_space(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        values = space.suggest(study.ask())
        recipe, ds_config = parse_overrides([override(key, value) for key, value in values.items()])
        assert values == recipe | {f"ds.{key}": value for key, value in ds_config.items()}


def test_a_condition_decides_whether_an_override_is_given() -> None:
    space = space_of(
        {
            "generator.name": ["vapsr", "rrdbnet"],
            "generator.num_blocks": {"choices": [3, 5], "when": {"generator.name": "rrdbnet"}},
        }
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.suggest(study.ask()) for _ in range(20)]
    assert {values["generator.name"] for values in drawn} == {"vapsr", "rrdbnet"}
    assert all(
        ("generator.num_blocks" in values) == (values["generator.name"] == "rrdbnet")
        for values in drawn
    )
    checked = dict(space.checked())
    assert checked["generator.num_blocks=5"] == {
        "generator.name": "rrdbnet",
        "generator.num_blocks": 5,
    }


# --- Parts ---


def test_half_lines_wait_and_a_log_written_anew_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    run = TrialRun(0, tmp_path, path, "psnr_y")
    assert run.new_scores() == []
    lines = [
        json.dumps({"event": "validation", "step": step, "psnr_y": step / 10}) + "\n"
        for step in (10, 20, 30)
    ]
    path.write_text(lines[0] + lines[1][:20])
    assert run.new_scores() == [(10, 1.0)]
    with open(path, "a") as file:
        file.write(
            lines[1][20:] + "no JSON\n" + '{"event": "validation", "step": 25, "psnr_y": null}\n'
        )
    assert run.new_scores() == [(20, 2.0)]
    (tmp_path / "new").write_text(lines[0] + lines[2])
    (tmp_path / "new").replace(path)
    run.new_scores()
    assert run.scores == {10: 1.0, 30: 3.0}, "step 20 was lost work"
    assert LogTail(path).read()[-1]["step"] == 30


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('up', flush=True); time.sleep(60)")
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_run_that_does_not_stop_is_killed_with_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_module, "GRACE_SECONDS", 0.5)
    run = TrialRun(0, tmp_path, tmp_path / "log.jsonl", "psnr_y")
    run.start([sys.executable, "-c", STUBBORN], os.environ)
    wait_until(lambda: (tmp_path / "output.txt").read_text().count("\n") == 2)
    rank = next(
        int(line) for line in (tmp_path / "output.txt").read_text().splitlines() if line != "up"
    )
    run.stop()
    wait_until(lambda: run.status() is not None, 10)
    assert run.status() == 128 + signal.SIGKILL
    wait_until(lambda: not is_running(rank), 10)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Failing(Objective):
    """Trials that end at once."""

    def command(self, values: dict[str, Any], run_dir: Path, procs: int) -> list[str]:
        return [
            sys.executable,
            "-c",
            "import sys; print('error: training has diverged'); sys.exit(1)",
        ]


@pytest.fixture
def target(dataset: Path) -> Objective:
    training = TrainOptions(recipe="demo", dataset_dir=(dataset,))
    fixed = (*SMALL, "steps=8", "validate_every=4")
    plans = make_plans(replace(training, overrides=fixed))
    return Objective(space_of({"ema_decay": [0.5, 0.9]}), training, fixed, "psnr", plans, plans)


def budget(**changes: Any) -> Budget:
    return replace(Budget(trials=9, steps=8, prune_after=2, seconds=60, keep=1, seed=0), **changes)


def test_trials_that_fail_from_the_start_end_the_search_with_the_reason(
    target: Objective, tmp_path: Path
) -> None:
    folder = StudyFolder(tmp_path / "study")
    failing = Failing(**vars(target))
    with folder.entered(reset=False):
        study = open_study(folder, "maximize", pruner_of("none", 8, 2))
        with pytest.raises(
            Exception, match="the first 3 trials failed, the last with: training has diverged"
        ):
            Search(folder, study, failing, budget(), Machine(1, 1, 0)).run()
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 3
    assert {trial.user_attrs["reason"] for trial in study.trials} == {"training has diverged"}


def test_a_single_failure_is_written_down_and_the_search_goes_on(
    target: Objective, tmp_path: Path
) -> None:
    folder = StudyFolder(tmp_path / "study")
    with folder.entered(reset=False):
        study = open_study(folder, "maximize", pruner_of("none", 8, 2))
        assert (
            Search(folder, study, Failing(**vars(target)), budget(trials=2), Machine(2, 1, 0)).run()
            == 0
        )
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 2
    assert "failed" in trial_table(study, target.space, "psnr")


def test_a_trial_belongs_to_one_searcher_and_is_taken_over_when_it_is_free(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    with folder.entered(reset=False):
        ours, theirs = (open_study(folder, "maximize", pruner_of("none", 8, 2)) for _ in range(2))
        first = next_trial(folder, ours, 2, 0, set())
        second = next_trial(folder, theirs, 2, 0, set())
        assert first
        assert second
        assert (first[0].number, second[0].number) == (0, 1)
        assert next_trial(folder, ours, 2, 0, {0}) is None, (
            "enough trials, and the other one is being run"
        )
        value = first[0].suggest_float("x", 0, 1)
        first[1].close()  # as if its process were gone
        again = next_trial(folder, theirs, 2, 0, {1})
        assert again
        assert again[0].number == 0
        assert again[0].suggest_float("x", 0, 1) == value


def test_an_interrupted_study_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    space = space_of({"x": {"low": 0.0, "high": 1.0}, "y": [1, 2, 3]})

    def draw(name: str, *, reopen: bool) -> list[dict[str, Any]]:
        folder, drawn = StudyFolder(tmp_path / name), []
        with folder.entered(reset=False):
            study = open_study(folder, "maximize", pruner_of("none", 8, 2))
            for _ in range(14):  # the first ten are random
                if reopen:
                    study = open_study(folder, "maximize", pruner_of("none", 8, 2))
                found = next_trial(folder, study, 20, 3, set())
                assert found
                drawn.append(space.suggest(found[0]))
                study.tell(found[0].number, drawn[-1]["x"])
                found[1].close()
        return drawn

    straight = draw("straight", reopen=False)
    assert straight == draw("reopened", reopen=True)
    assert len({values["x"] for values in straight}) == 14


def test_a_journal_cut_in_a_line_and_a_lock_left_behind_do_no_harm(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    with folder.entered(reset=False):
        open_study(folder, "maximize", pruner_of("none", 8, 2)).ask()
    with open(folder.journal, "a") as file:
        file.write('{"op_code": 4, "worker')
    Path(f"{folder.journal}.lock").touch()
    began = time.monotonic()
    with folder.entered(reset=False):
        study = open_study(folder, "maximize", pruner_of("none", 8, 2))
        study.ask()
        assert time.monotonic() - began < 10, "Optuna itself would wait for 30 s"
        held = read_study(folder)
    assert held is not None
    assert len(held.trials) == len(study.trials) == 2
    with open(folder.journal, "a") as file:
        file.write("rot\n" + json.dumps({}) + "\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_study(folder)


def test_trials_beside_each_other_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "list_gpus", list)  # regardless of this machine's GPUs
    machine = Machine(jobs=3, procs=2, num_gpus=6)
    assert [machine.variables(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == [
        "0,1",
        "2,3",
        "4,5",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-5")
    machine = Machine(jobs=2, procs=1, num_gpus=2)
    assert [machine.variables(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["7", "GPU-5"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert Machine(jobs=cores, procs=1, num_gpus=0).variables(0)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("demo", ("generator.num_blocks=2", "ds.optimizer.params.lr=0.5")),
        (
            "demo",
            ('generator={"name": "vapsr", "num_features": 16}',),
        ),  # the recipe's other parameters are not kept
        (
            "srgan_x4",
            (
                "stages.gan.adversarial.weight=0.1",
                "ds.train_batch_size=8",
                'losses={"charbonnier": 2.0}',
            ),
        ),
        ("realesrgan_x4", ("ema_decay=0.5", "data.degradation.first.gray_noise_prob=0.3")),
    ],
)
def test_the_best_recipe_says_all_that_its_trial_was(
    dataset: Path, tmp_path: Path, recipe: str, overrides: tuple[str, ...]
) -> None:
    training = TrainOptions(recipe=recipe, dataset_dir=(dataset,))
    plans = make_plans(replace(training, overrides=(*overrides, "steps=7")))
    best = write_best(tmp_path, plans, make_plans(training), "said")
    for read, plan in zip(
        make_plans(replace(training, recipe=str(best), overrides=("steps=7",))), plans, strict=True
    ):
        theirs, ours = read.recipe.model_dump(), plan.recipe.model_dump()
        for values in (theirs, ours):
            values.pop("name"), values.pop("ds_config")
        assert theirs == ours
        assert read.ds_config == plan.ds_config
        assert read.discriminator_ds_config == plan.discriminator_ds_config


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["ds.optimizer.params.lr", "a.lr", "ema_decay"]) == {
        "ds.optimizer.params.lr": "params.lr",
        "a.lr": "a.lr",
        "ema_decay": "ema_decay",
    }


def test_importance_goes_to_the_parameter_that_matters() -> None:
    space = space_of({"x": {"low": 0.0, "high": 1.0}, "y": {"low": 0.0, "high": 1.0}, "z": [1, 2]})
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))
    for number in range(30):
        trial = study.ask()
        values = space.suggest(trial)
        study.tell(trial, 3 * values["x"] + 0.3 * values["y"])
        if number < 6:
            assert importances(study, space) == {}
    found = importances(study, space)
    assert next(iter(found)) == "x"
    assert found["x"] > 0.8
    assert sum(found.values()) == pytest.approx(1)
