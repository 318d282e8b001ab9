"""Averages of other lengths, chosen by a run's validation and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import export_trained_model
from fabricate import make_run, run_command
from lives import train
from pipeline.cli import UserError
from pipeline.config.recipe import load_recipe
from pipeline.models import build_generator
from pipeline.models.ema import ExponentialMovingAverage
from pipeline.models.posthoc_ema import WIDTHS
from pipeline.models.weights import read_network
from pipeline.run_folder import checkpoint_dir
from pipeline.training.judging import Judge, Row, table

POSTHOC = ("posthoc_ema=on", "steps=12", "save_every=4", "validate_every=12")


@pytest.fixture(scope="module")
def run_dir(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    train(dataset, folder, *POSTHOC)
    return folder


def test_auto_takes_the_best_and_says_from_what(
    dataset: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--ema", "auto", "--dataset-dir", dataset, "--output-dir", tmp_path)
    status, printed, errors = run_command(capsys, export_trained_model, run_dir, *options)
    assert (status, errors) == (0, "")
    (file,) = tmp_path.glob("*.safetensors")
    found = read_network(file)
    measured = json.loads(found.metadata["ema_measured"])
    assert {"bicubic", "raw", "tracked", "0.05", "0.20"} <= measured.keys()
    averages = {name: one for name, one in measured.items() if name not in ("bicubic", "raw")}
    best = max(averages, key=lambda name: averages[name]["psnr_y"])
    assert json.loads(found.metadata["validation"]) == measured[best]
    assert f"chosen: {best}, by the highest PSNR-Y on 3 validation images" in printed
    (row,) = (line for line in printed.splitlines() if line.startswith("->"))
    assert row.split()[0] == f"->{best}"
    assert f"{measured[best]['psnr_y']:.3f}" in row
    # the tracked average's score is the one of the run's own validation
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    (logged,) = (line["psnr_y"] for line in lines if line["event"] == "validation")
    assert measured["tracked"]["psnr_y"] == pytest.approx(logged, abs=1e-3)
    # what is in the file scores what the table says
    judge = Judge(run_dir, (dataset,))
    from tqdm import tqdm

    with tqdm(disable=True) as bar:
        assert judge.scores(found.build(), bar) == measured[best]


def test_a_length_by_hand(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (run_dir, "--step", "newest", "--ema", 0.05, "--output-dir", tmp_path)
    assert run_command(capsys, export_trained_model, *arguments)[0] == 0
    found = read_network(tmp_path / "demo_x2_ema0.05.safetensors")
    stored = read_network(checkpoint_dir(run_dir, 12) / "generator_ema_0.05.safetensors")
    for name, tensor in stored.state_dict.items():
        torch.testing.assert_close(found.state_dict[name], tensor, rtol=0, atol=1e-6)
    kept = found.metadata
    assert kept["weights"] == "averaged (post-hoc EMA, sigma_rel 0.05)"
    assert (kept["ema_sigma_rel"], kept["ema_length"]) == ("0.05", "1")
    assert (kept["ema_snapshots"], kept["step"]) == ("12", "12")
    assert "validation" not in kept, "the run has not validated these weights"


def test_what_does_not_fit_is_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in {
        (run_dir, "--ema", "0.9"): "the longest average",
        (run_dir, "--ema", "0.05", "--raw"): "raw weights are no average",
        (run_dir, "--ema", "0.05", "--evaluation", "e.json"): "export first",
        (run_dir, "--ema", "auto", "--dataset-dir", tmp_path): str(tmp_path),
        (make_run(tmp_path), "--ema", "0.05"): "train with posthoc_ema=on",
    }.items():
        status, printed, errors = run_command(capsys, export_trained_model, *arguments)
        assert (status, printed) == (2, "")
        assert errors.splitlines()[-1].startswith("error: ")
        assert words in errors.splitlines()[-1]


def test_the_key_is_a_switch_or_a_number() -> None:
    for value, number in {"on": 48, True: 48, "off": 0, False: 0}.items():
        assert load_recipe("demo", {"posthoc_ema": value}).posthoc_ema.snapshots == number
    assert load_recipe("demo").posthoc_ema.snapshots == 0
    assert load_recipe("demo", {"posthoc_ema.snapshots": 24}).posthoc_ema.is_on
    for value in ({"snapshots": 5}, "yes", {"snapshot": 48}, {"snapshots": -1}):
        with pytest.raises(UserError, match="posthoc_ema"):
            load_recipe("demo", {"posthoc_ema": value})


def test_a_table_marks_the_chosen_row() -> None:
    rows = [Row("bicubic", {"psnr_y": 28.0, "lpips": 0.5}), Row("a", {"psnr_y": 9.5, "lpips": 0.1})]
    assert table(rows, rows[1]).splitlines() == [
        "             PSNR-Y     LPIPS",
        "  bicubic    28.000    0.5000",
        "->a           9.500    0.1000",
    ]


class Counting(TorchDispatchMode):
    """Counts operations, and those that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def test_an_update_costs_two_kernels_and_no_wait_however_many_layers() -> None:
    network = build_generator("vapsr", 2, num_features=8, num_attention_features=8, num_blocks=3)
    counts = {}
    for widths in ((), WIDTHS):
        ema = ExponentialMovingAverage(network, 0.999, widths)
        with Counting() as counting:
            ema.update(network)
        counts[widths] = sorted(name for name in counting.names if name != "detach")
    added = list(counts[WIDTHS])
    for name in counts[()]:
        added.remove(name)
    assert added == ["_foreach_lerp_", "_foreach_lerp_"]
    # of a long run, one update of many is sampled
    ema.num_updates = 1 << 20
    with Counting() as counting:
        for _ in range(256):
            ema.update(network)
    assert counting.names.count("_foreach_lerp_") == 256 + 2
