"""The comparison of training choices: its grid, its statistics, and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import quality
from benchmarks.quality import COMMON, EXPERIMENTS, PATCHES, STUDENT, difference, verdict
from pipeline.cli import UserError
from pipeline.config.ds_config import load_ds_config
from pipeline.config.recipe import load_stages, parse_overrides
from pipeline.installation import find_file


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_is_a_valid_run(name: str) -> None:
    experiment = EXPERIMENTS[name]
    assert len({arm.name for arm in experiment.arms}) == len(experiment.arms)
    for arm in experiment.arms:
        given = {**COMMON, **experiment.overrides, **arm.overrides, "steps": 9}
        texts = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        for_recipe, for_ds_config = parse_overrides(texts)
        (recipe,) = load_stages(experiment.recipe, for_recipe)
        load_ds_config(find_file(recipe.ds_config), for_ds_config)
        assert not arm.patch or arm.patch in PATCHES


def test_intervals_are_those_of_students_t() -> None:
    for freedom, quantile in enumerate(STUDENT, 1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-3)
    random = np.random.default_rng(0)
    one, other = random.normal(30, 1, (2, 5))
    found = difference(dict(enumerate(one)), {**dict(enumerate(other)), 9: 0.0})
    assert found is not None
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert found[0] - found[1] == pytest.approx(expected.low, abs=1e-3)
    assert found[0] + found[1] == pytest.approx(expected.high, abs=1e-3)
    assert difference({0: 1.0}, {0: 2.0}) is None
    assert verdict(0.2, 0.1, lower_is_better=False) == "better"
    assert verdict(0.2, 0.1, lower_is_better=True) == "worse"
    assert verdict(-0.1, 0.2, lower_is_better=True) == "no difference"


def test_the_report_is_made_of_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"cosine after a warm-up": [30.0, 30.2, 30.1], "constant": [30.5, 30.7, 30.6]}
    for arm, scores in values.items():
        folder = tmp_path / "results" / "schedule" / quality._plain(arm)
        folder.mkdir(parents=True)
        for seed, score in enumerate(scores):
            curve = [{"step": step, "psnr_y": score + step / 100} for step in (-8, 0)]
            result: dict[str, Any] = {
                "steps": 80,
                "seconds_per_step": 0.5,
                "last": {"psnr_y": score},
                "curve": curve,
            }
            (folder / f"{seed}.json").write_text(json.dumps(result))
    options = quality.Options(names=("schedule",), out=tmp_path, report=True)
    assert quality.main(options) == 0
    printed = capsys.readouterr().out
    assert "| cosine after a warm-up | 3 | 80 | 30.100 |  |" in printed
    assert "| constant | 3 | 80 | 30.600 | +0.500 ± 0.000: better |" in printed
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (quality.Options(names=("scedule",)), "no experiment 'scedule'; did you mean 'schedule'"),
        (quality.Options(names=("schedule:constnt",)), "did you mean 'constant'"),
        (quality.Options(), "--data: t91=PATH is missing"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: quality.Options, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        quality.main(options)
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())
