"""The table of metrics: a new metric is one file and one row, and appears everywhere."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from conftest import ROOT, SMALL, environment, run_python
from evaluate import Options
from fabricate import picture, tiny_saved, write_images
from pipeline.cli import UserError
from pipeline.config.recipe import load_recipe
from pipeline.evaluation.command import run_evaluation
from pipeline.metrics import METRICS, Metric, metric_of, text_of
from pipeline.models.weights import write_network
from pipeline.run_folder import checkpoint_dir

FILE = """
def mean_error(sr, hr):
    return (sr.float() - hr.float()).abs().mean().item()
"""
ROW = Metric(
    "dummy", "Dummy", "dummy_metric:mean_error", decimals=2, unit="levels", lower_is_better=True
)


@pytest.fixture
def dummy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a new metric's file, whose row is in the table."""
    (tmp_path / "dummy_metric.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METRICS, "dummy", ROW)
    return tmp_path


def test_a_new_metric_is_in_everything_that_evaluate_writes(
    dummy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hr = write_images(dummy / "hr", {f"{seed}.png": picture(60, 70, seed) for seed in range(2)})
    write_network(dummy / "net.pth", tiny_saved(scale=2))
    run_evaluation(
        Options(hr=hr, model=(dummy / "net.pth",), out=dummy / "out", html=dummy / "page")
    )
    report = json.loads((dummy / "out" / "evaluation.json").read_text())
    model, bicubic = (report["mean"][method]["dummy"] for method in ("model", "bicubic"))
    assert model > 0
    assert (
        f"  Dummy, lower is better        bicubic {bicubic:.2f} levels   model {model:.2f} levels\n"
        in (capsys.readouterr().out)
    )
    entry = next(
        entry for entry in report["benchmarks"][0]["differences"] if entry["metric"] == "dummy"
    )
    assert entry["mean"] == pytest.approx(model - bicubic)
    assert entry["verdict"].startswith("better" if model < bicubic else "worse")
    rows = list(csv.DictReader((dummy / "out" / "evaluation.csv").read_text().splitlines()))
    assert [float(row["dummy"]) for row in rows if row["method"] == "net"] == [
        image["model"]["dummy"] for image in report["images"]
    ]
    table = (dummy / "out" / "evaluation.md").read_text()
    assert "| PSNR-Y / SSIM-Y / Dummy " in table
    assert f"{model:.2f} |" in table
    page = (dummy / "page" / "index.html").read_text()
    assert "Dummy" in page
    assert f"{model:.2f}" in page


def test_a_new_metric_chooses_the_best_step_and_is_logged(dummy: Path, dataset: Path) -> None:
    code = (
        "import runpy, sys\n"
        "from pipeline.metrics import METRICS, Metric\n"
        f"METRICS['dummy'] = {ROW!r}\n"
        f"sys.argv = [{str(ROOT / 'train.py')!r}, *sys.argv[1:]]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    run_dir = dummy / "run"
    done = run_python(
        code,
        "--recipe",
        "demo",
        "--dataset-dir",
        str(dataset),
        "--output-dir",
        str(run_dir),
        *SMALL,
        "steps=4",
        "validate_every=2",
        "best.metric=dummy",
        env={**environment(), "PYTHONPATH": f"{dummy}:{ROOT}", "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["event"] == "validation"]
    assert [line["step"] for line in lines] == [2, 4]
    best = min(line["dummy"] for line in lines)
    assert lines[-1]["best_dummy"] == best
    assert f", Dummy {best:.2f} levels" in done.stdout
    state = json.loads((checkpoint_dir(run_dir, 4) / "state.json").read_text())
    assert (state["best_dummy"], state["best_step"]) == (
        best,
        next(line["step"] for line in lines if line["dummy"] == best),
    )
    assert state["best_psnr"] == next(line["psnr_y"] for line in lines if line["dummy"] == best)


def test_a_recipe_names_metrics_of_the_table(dummy: Path) -> None:
    assert (
        load_recipe("demo", {"best.metric": "dummy", "best.psnr_floor": 20.0}).best.metric
        == "dummy"
    )
    assert load_recipe("demo", {"best.metric": "psnr_y"}) == load_recipe(
        "demo", {"best.metric": "psnr"}
    )
    with pytest.raises(
        UserError, match=r"best.metric: no metric 'ssmi_y'; did you mean 'ssim_y'\?"
    ):
        load_recipe("demo", {"best.metric": "ssmi_y"})
    with pytest.raises(
        UserError, match=r"best.metric lpips needs validation_lpips: alex, squeeze or vgg"
    ):
        load_recipe("demo", {"best.metric": "lpips"})


def test_names_are_checked_without_torch() -> None:
    code = (
        "import sys\n"
        "from pipeline.config.recipe import load_recipe\n"
        "assert load_recipe('demo', {'best.metric': 'ssim_y'}).best.metric == 'ssim_y'\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert run_python(code).returncode == 0


def test_scores_in_words() -> None:
    assert text_of({"psnr_y": 28.1234, "lpips": 0.12345}) == "PSNR-Y 28.123 dB, LPIPS 0.1235"
    assert metric_of("psnr") is metric_of("psnr_y") is METRICS["psnr_y"]


def test_the_tools_draw_and_search_by_every_metric(
    dummy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    from tools import plot_run
    from tools.search import report

    try:
        panel = next(
            panel for panel in importlib.reload(plot_run).PANELS if panel.curves[0].key == "dummy"
        )
        assert (panel.title, panel.best, panel.unit) == ("validation Dummy, levels", min, " levels")
    finally:
        monkeypatch.undo()
        importlib.reload(plot_run)
    monkeypatch.setitem(METRICS, "dummy", ROW)
    assert (report.score_text(1.234, "dummy"), report.sign_of("dummy")) == ("1.23 levels", 1)
    assert (report.score_text(30.1234, "psnr"), report.sign_of("psnr")) == ("30.123 dB", -1)
