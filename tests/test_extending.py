"""The examples in docs/extending.md, added to a copy of the source tree with exactly its lines,
trained with, evaluated and run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, SMALL, environment, run_python
from fabricate import picture, write_images

PAGE = ROOT / "docs" / "extending.md"
COPIED = ("pipeline", "tools", "recipes", "train.py", "evaluate.py", "ds_config.json")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def apply_to(root: Path) -> None:
    """Write the page's files, and add its rows: what surrounds them must occur exactly once."""
    for block in blocks("python") + blocks("yaml"):
        head, _, body = block.partition("\n")
        (root / head.removeprefix("# ")).write_text(body)
    for block in blocks("diff"):
        head, _, body = block.partition("\n")
        path = root / head.removeprefix("+++ ")
        text = path.read_text()
        for hunk in body.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line.startswith(" "))
            after = "".join(line[1:] for line in lines)
            assert all(line[0] in " +" for line in lines)
            assert text.count(before) == 1, f"{path.name} has {text.count(before)} times:\n{before}"
            text = text.replace(before, after)
        path.write_text(text)


CODE = """
    import json, sys
    from pathlib import Path
    import numpy as np
    import torch
    import pipeline
    assert Path(pipeline.__file__).is_relative_to({copy!r}), pipeline.__file__
    from pipeline.cli import UserError
    from pipeline.config.recipe import load_recipe

    facts = {{}}
    def refused(overrides):
        try:
            load_recipe("extended", overrides)
        except UserError as error:
            return str(error)
    facts["hints"] = [
        refused({{"generator.num_feature": 8}}),
        refused({{"losses.gradient.distanze": 2}}),
        refused({{"data.degradation.drker": 3}}),
        refused({{"best.metric": "mea"}}),
        refused({{"mixup": 1.5}}),
    ]

    from pipeline.data.reader import low_resolution
    pixels = np.random.default_rng(0).integers(32, 256, (32, 48, 3)).astype(np.uint8)
    spec = load_recipe("extended").data.degradation
    lrs = [low_resolution(pixels, spec, 2, seed=0, number=number) for number in range(6)]
    picked = [pixels[y::2, x::2].astype(int) for y in (0, 1) for x in (0, 1)]
    facts["darker"] = [min(float(np.ptp(one - lr)) for one in picked) for lr in lrs]
    facts["by"] = [float(min((one - lr for one in picked), key=np.ptp).mean()) for lr in lrs]

    from pipeline.config.recipe import load_stages
    chain = {{"name": "chain", "steps": [{{"vignette": {{"strength": 0.5}}}}]}}
    spec = load_stages("demo", {{"data.degradation": chain}})[0].data.degradation
    flat = np.full((32, 48, 3), 200, np.uint8)
    lr = low_resolution(flat, spec, 2, seed=0, number=0)
    facts["vignette"] = [int(lr[0, 0, 0]), int(lr[8, 12, 0])]

    from pipeline.losses import Criterion
    sr, terms = torch.rand(1, 3, 9, 9), {{"gradient": {{"weight": 0.5, "distance": 2}}}}
    facts["loss"] = [
        Criterion(terms)(sr + add / 2, sr)["gradient"].item()
        for add in (torch.ones_like(sr), torch.eye(9).expand(1, 3, 9, 9))
    ]

    from pipeline.training import setup
    from pipeline.training.mixup import MixupTrainer
    from pipeline.training.options import TrainOptions
    from pipeline.training.run import main as train
    from pipeline.training.trainers import ReconstructionTrainer
    seen, step = [], ReconstructionTrainer.step
    def looked_at(self, batch, number):
        network = type(self.generator.module).__name__
        seen.append([type(self).__name__, str(batch.hr.dtype), network])
        return step(self, batch, number)
    ReconstructionTrainer.step = looked_at
    run_dir = Path({run!r})
    status = train(TrainOptions(
        overrides={overrides!r},
        recipe="extended",
        dataset_dir=(Path({dataset!r}),),
        output_dir=run_dir,
    ))
    facts |= {{"status": status, "seen": seen}}

    sys.path.insert(1, {tests!r})
    from test_weights import test_every_network_keeps_the_contract as keeps_the_contract
    keeps_the_contract("espcn")

    from evaluate import Options
    from pipeline.evaluation.command import run_evaluation
    run_evaluation(Options(hr=Path({hr!r}), model=(run_dir,), out=run_dir / "scores"))
    facts["mean"] = json.loads((run_dir / "scores" / "evaluation.json").read_text())["mean"]
    Path({facts!r}).write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> dict[str, Any]:
    """What one process found that trained with all examples, and where the copy is."""
    folder = tmp_path_factory.mktemp("extending")
    copy = folder / "vastscale"
    copy.mkdir()
    for name in COPIED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, copy / name)
    apply_to(copy)
    hr = write_images(folder / "hr", {f"{seed}.png": picture(40, 44, seed) for seed in range(2)})
    overrides = [
        one for one in SMALL if not one.startswith(("generator.", "data.crop", "native_kernels"))
    ]
    overrides += ["steps=4", "validate_every=2"]
    overrides += ["ds.optimizer.type=Adamax", "ds.zero_optimization.stage=1"]
    code = CODE.format(
        copy=str(copy),
        run=str(folder / "run"),
        overrides=tuple(overrides),
        dataset=str(dataset),
        tests=str(ROOT / "tests" / "models"),
        hr=str(hr),
        facts=str(folder / "facts.json"),
    )
    done = run_python(
        code,
        flags=("-W", "ignore"),
        cwd=copy,
        env={**environment(threads=1), "PYTHONPATH": f"{copy}:{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr
    log = (folder / "run" / "log.jsonl").read_text().splitlines()
    return {
        **json.loads((folder / "facts.json").read_text()),
        "printed": done.stdout,
        "log": [json.loads(line) for line in log],
        "state": json.loads((folder / "run/checkpoints/step-00000004/state.json").read_text()),
        "copy": copy,
    }


def test_names_and_parameters_are_known_to_recipes(extended: dict[str, Any]) -> None:
    network, loss, degradation, metric, trainer = extended["hints"]
    assert "network 'espcn' has no parameter 'num_feature'; did you mean 'num_features'?" in network
    assert "loss 'gradient' has no parameter 'distanze'; did you mean 'distance'?" in loss
    assert "data.degradation.drker: unknown key; did you mean 'darker'?" in degradation
    assert "best.metric: no metric 'mea'; did you mean 'mae'?" in metric
    assert "mixup" in trainer


def test_the_degradation_picks_pixels_and_darkens_them_as_drawn(extended: dict[str, Any]) -> None:
    assert max(extended["darker"]) <= 1  # one offset for a whole sample, but for rounding
    assert all(0 <= offset <= 20.5 for offset in extended["by"])
    assert max(extended["by"]) - min(extended["by"]) > 2  # another one for each sample


def test_the_step_darkens_the_corners(extended: dict[str, Any]) -> None:
    corner, centre = extended["vignette"]
    assert corner == pytest.approx(105, abs=7)  # half of the light, less what LR averages
    assert centre == 200


def test_the_loss_sees_edges_and_no_offset(extended: dict[str, Any]) -> None:
    offset, edges = extended["loss"]
    assert offset == pytest.approx(0, abs=1e-6)
    assert edges > 0.01


def test_a_run_trains_with_all_of_them(extended: dict[str, Any]) -> None:
    assert extended["status"] == 0
    assert extended["seen"] == [["MixupTrainer", "torch.float32", "Espcn"]] * 4
    steps = [line for line in extended["log"] if "loss_gradient" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(0 < line["loss_gradient"] < 1 for line in steps)
    validations = [line for line in extended["log"] if line["event"] == "validation"]
    assert [line["step"] for line in validations] == [2, 4]
    assert extended["state"]["best_mae"] == min(line["mae"] for line in validations)


def test_the_metric_is_in_an_evaluation(extended: dict[str, Any]) -> None:
    assert extended["mean"]["model"]["mae"] > extended["mean"]["bicubic"]["mae"] > 0


def test_the_tool_runs(extended: dict[str, Any], tmp_path: Path) -> None:
    write_images(tmp_path, {"a.png": picture(16, 16, 1)})
    write_images(tmp_path / "b", {"c.png": picture(16, 24, 2)})
    done, failed = (
        subprocess.run(
            [sys.executable, "tools/mean_brightness.py", "--data-dir", str(folder)],
            env=environment(),
            cwd=extended["copy"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        for folder in (tmp_path, tmp_path / "none")
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for _, name in lines] == ["a.png", "b/c.png"]
    assert float(lines[0][0]) == pytest.approx(picture(16, 16, 1).mean(), abs=0.01)
    assert failed.returncode == 2
    assert failed.stderr.endswith("none: there is no such folder\n")


def test_the_examples_pass_the_linter(extended: dict[str, Any]) -> None:
    """Imports in order, no line over 100 columns, formatted."""
    files = [block.partition("\n")[0].removeprefix("# ") for block in blocks("python")]
    files += [block.partition("\n")[0].removeprefix("+++ ") for block in blocks("diff")]
    for action in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "ruff",
                *action,
                "--config",
                str(ROOT / "pyproject.toml"),
                *files,
            ],
            cwd=extended["copy"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
