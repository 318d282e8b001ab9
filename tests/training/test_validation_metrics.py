"""What validation measures, the reference beside it, and `best` as a weighted rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import command, photograph, run
from fabricate import tiny_network
from pipeline.cli import UserError
from pipeline.config.recipe import (
    BestSpec,
    load_recipe,
    parse_overrides,
    recipe_differences,
    recipe_of,
)
from pipeline.data.dataset import Dataset, Folder
from pipeline.distributed.ranks import Ranks
from pipeline.images import border_of
from pipeline.metrics import Trunk, load_measures, means, measure, text_of
from pipeline.metrics.niqe import write_parameters
from pipeline.run_folder import checkpoint_dir
from pipeline.training.validation import (
    ValidationSet,
    enlarged_input,
    is_better,
    validation_measures,
    weighted_score,
)
from tools.plot_run import PANELS, draw, read_log


def recipe(*overrides: str) -> Any:
    return load_recipe("demo", parse_overrides(overrides)[0])


def measured(*overrides: str) -> dict[str, Trunk | None]:
    return recipe(*overrides).measured()


def test_a_recipe_lists_what_is_measured() -> None:
    assert measured() == {"psnr_y": None}
    everything = measured(
        "validation_metrics=[niqe, ssim, lpips, dists, ssim_y]",
        "metric_weights={lpips: a.pth, niqe: b.npz}",
    )
    assert everything == {
        "psnr_y": None,
        "ssim_y": None,
        "lpips": Trunk("alex", "a.pth"),
        "dists": Trunk("vgg"),
        "niqe": Trunk("natural", "b.npz"),
    }
    assert measured("best.metric=ssim_rgb") == {"psnr_y": None, "ssim_rgb": None}
    assert measured("best.weights={psnr: 1, ssim: 20}").keys() == {"psnr_y", "ssim_y"}
    assert measured("validation_metrics=[lpips]", "validation_lpips=vgg")["lpips"] == Trunk("vgg")


def test_earlier_keys_of_lpips_still_work(tmp_path: Path) -> None:
    assert measured("validation_lpips=alex", "lpips_weights=a.pth") == {
        "psnr_y": None,
        "lpips": Trunk("alex", "a.pth"),
    }
    (tmp_path / "old.yaml").write_text(
        "base: demo\nvalidation_lpips: squeeze\nlpips_weights: a.pth\n"
        "metric_weights: {niqe: b.npz}\n"
    )
    old = load_recipe(str(tmp_path / "old.yaml"))
    assert old.measured()["lpips"] == Trunk("squeeze", "a.pth")
    assert old.metric_weights == {"niqe": "b.npz", "lpips": "a.pth"}
    values = old.model_dump(mode="json")
    del values["metric_weights"], values["validation_metrics"]
    run = recipe_of({**values, "lpips_weights": None}, "an old run")  # as its checkpoints record it
    assert run.metric_weights == {}
    assert recipe_differences(run, old) == []  # files and further metrics may change
    del values["best"]["weights"]
    other = recipe_of({**values, "best": {"weights": {"psnr": 1, "lpips": -20}}}, "new")
    assert recipe_differences(run, other) == [
        "best.weights.lpips: unset in the run, -20.0 asked for",
        "best.weights.psnr: unset in the run, 1.0 asked for",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("validation_metrics=[psnr, nique]", "validation_metrics: no metric 'nique'; did you mean"),
        ("validation_metrics=ssim", "validation_metrics: a list is needed, such as [one, two]"),
        ("metric_weights.psnr=a", "metric_weights: PSNR-Y has no weights; omit psnr"),
        ("metric_weights.lpisp=a", "metric_weights: no metric 'lpisp'; did you mean 'lpips'?"),
        ("best.weights={psnr: 1, ssmi: 2}", "best.weights: no metric 'ssmi'"),
        ("best.weights={lpips: 20}", "lpips: 20: lower LPIPS is better, so its weight must be bel"),
        ("best.weights={psnr: -1}", "psnr: -1: higher PSNR-Y is better, so its weight must be abo"),
        ("best.weights={psnr: 0}", "psnr: 0: higher PSNR-Y is better"),
        ("best={metric: ssim, weights: {psnr: 1}}", "metric ssim_y and weights exclude each other"),
        ("best.weights={lpips: -1}", "best.weights.lpips needs validation_lpips: alex, squeeze or"),
        ("best.metric=dists", "best.metric dists needs validation_metrics: [psnr, dists]"),
    ],
)
def test_mistakes_are_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_parameters_name_their_key() -> None:
    with pytest.raises(UserError, match=r"metric_weights\.niqe: NIQE needs a file of parameters"):
        validation_measures(recipe("validation_metrics=[niqe]"))


@pytest.mark.parametrize(
    ("new", "best", "floor", "expected"),
    [
        ((28.0, 0.10), (29.0, 0.16), None, True),  # 1 dB less, but 0.06 LPIPS: 28 - 2 > 29 - 3.2
        ((28.0, 0.12), (29.0, 0.16), None, False),
        ((28.0, 0.10), (28.0, 0.10), None, False),
        ((28.0, 0.10), (29.0, 0.16), 28.5, False),  # below the floor, and the other is above it
        ((28.0, 0.90), (27.0, 0.10), 28.5, True),  # both below: the one nearer to the floor wins
    ],
)
def test_weights_choose_the_best_step(
    new: tuple, best: tuple, floor: float | None, expected: bool
) -> None:
    spec = BestSpec(weights={"psnr": 1, "lpips": -20}, psnr_floor=floor)
    found, before = (dict(zip(("psnr_y", "lpips"), scores, strict=True)) for scores in (new, best))
    assert is_better(found, before, spec) is expected
    assert is_better(found, None, spec) is True
    # A checkpoint of a version that did not measure LPIPS.
    assert is_better(found, {"psnr_y": 27.9}, spec) is True


def test_a_score_is_the_weighted_gain() -> None:
    spec = BestSpec(weights={"psnr": 1, "lpips": -20})
    scores, reference = {"psnr_y": 28.5, "lpips": 0.1}, {"psnr_y": 27.0, "lpips": 0.3}
    assert weighted_score(scores, spec, reference) == pytest.approx(1.5 + 20 * 0.2)
    assert text_of(scores, reference, " over bicubic") == (
        "PSNR-Y 28.500 dB (+1.500 over bicubic), LPIPS 0.1000 (-0.2000)"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of crops that are large enough for NIQE."""
    root = tmp_path / "data"
    (root / "photos").mkdir(parents=True)
    names = [f"photos/{i}.npy" for i in range(6)]
    for i, name in enumerate(names):
        np.save(root / name, photograph(i, 200 + 2 * i, 212 - 2 * i))
    (root / "training_file_list.txt").write_text("".join(f"{name}\n" for name in names[:4]))
    (root / "validation_file_list.txt").write_text("".join(f"{name}\n" for name in names[4:]))
    generator = np.random.default_rng(0)
    factor = generator.normal(size=(36, 36))
    covariance = factor @ factor.T / 36 + 0.1 * np.eye(36)
    write_parameters(tmp_path / "niqe.npz", generator.uniform(0.1, 3, 36), covariance)
    return root


def validation_set(folder: Path, ranks: Any, *overrides: str) -> ValidationSet:
    names = ["photos/4.npy", "photos/5.npy"]
    return ValidationSet(
        Dataset((Folder(folder, [], names, None),)).validation, recipe(*overrides), ranks
    )


@pytest.mark.parametrize("scale", [2, 1])
def test_the_reference_is_the_enlarged_input(folder: Path, scale: int) -> None:
    overrides = [f"scale={scale}", "validation_metrics=[ssim, niqe]"]
    overrides.append(f"metric_weights.niqe={folder.parent / 'niqe.npz'}")
    if scale == 1:
        overrides.append("data.degradation=gaussian")
    whole = validation_set(folder, Ranks(), *overrides)
    names = list(recipe(*overrides).measured())
    measures = load_measures(
        [one.metric for one in validation_measures(recipe(*overrides))],
        recipe(*overrides).measured(),
    )
    expected = means(
        [
            measure(enlarged_input(pair), pair.hr, border_of(scale), measures)
            for pair in (whole.pair(0), whole.pair(1))
        ]
    )
    seen: list[tuple[int, int]] = []
    found = whole.measure_reference(lambda done, share: not seen.append((done, share)))
    assert found == expected
    assert list(found) == names == ["psnr_y", "ssim_y", "niqe"]
    assert seen == [(0, 2), (1, 2)]
    assert whole.reference == {2: "bicubic", 1: "input"}[scale]
    assert whole.measure_reference(lambda done, share: done < 1) is None
    if scale == 2:  # a network that adds nothing to bicubic is bicubic
        network = tiny_network(global_residual="bicubic")
        torch.nn.init.zeros_(list(network.parameters())[-2])
        torch.nn.init.zeros_(list(network.parameters())[-1])
        assert whole.measure(network)["psnr_y"] == pytest.approx(found["psnr_y"], abs=0.02)
    assert whole.is_reference({"images": 2, "scores": found})
    assert not whole.is_reference({})
    assert not whole.is_reference({"images": 3, "scores": found})
    assert not whole.is_reference({"images": 2, "scores": {"psnr_y": 30.0}})


def test_an_image_too_small_for_a_metric_is_named(folder: Path) -> None:
    np.save(folder / "photos" / "5.npy", photograph(0, 190, 300))
    file = f"metric_weights.niqe={folder.parent / 'niqe.npz'}"
    for override, text in (
        ("validation_metrics=[niqe]", "remove niqe from validation_metrics"),
        ("best={weights: {psnr: 1, niqe: -1}}", "choose another best.weights"),
    ):
        words = ["validation_metrics=[niqe]", override, file]
        with pytest.raises(UserError, match=rf"5\.npy: 190x300 is too small for .*niqe.*{text}"):
            validation_set(folder, Ranks(), *words)


def test_a_run_measures_and_logs_them_and_keeps_the_reference(folder: Path, tmp_path: Path) -> None:
    home, niqe = tmp_path / "run", tmp_path / "niqe.npz"
    rule = "best={weights: {psnr: 1, ssim: 50}}"
    words = ("validation_metrics=[psnr, ssim, niqe]", f"metric_weights.niqe={niqe}", rule)
    done = run(command(folder, home, "steps=4", "validate_every=2", *words, procs=2))
    assert done.returncode == 0, done.stderr
    done = run(command(folder, home, "steps=6", "validate_every=2", *words))
    assert done.returncode == 0, done.stderr
    log = read_log(home / "log.jsonl")
    (reference,) = [line for line in log if line["event"] == "bicubic"]  # once, not per process
    lines = [line for line in log if line["event"] == "validation"]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        gains = {name: line[name] - reference[name] for name in ("psnr_y", "ssim_y", "niqe")}
        assert line["score"] == pytest.approx(gains["psnr_y"] + 50 * gains["ssim_y"])
    last = lines[-1]
    assert last["best_score"] == max(line["score"] for line in lines)
    assert (
        f"validation at step 6: PSNR-Y {last['psnr_y']:.3f} dB "
        f"({last['psnr_y'] - reference['psnr_y']:+.3f} over bicubic), SSIM-Y {last['ssim_y']:.4f} "
        f"({last['ssim_y'] - reference['ssim_y']:+.4f}), NIQE {last['niqe']:.3f} "
        f"({last['niqe'] - reference['niqe']:+.3f}), score {last['score']:+.4f} ("
    ) in done.stdout
    state = json.loads((checkpoint_dir(home, 6) / "state.json").read_text())
    best = max(lines, key=lambda line: line["score"])
    assert (state["best_step"], state["best_psnr"]) == (best["step"], best["psnr_y"])
    assert (state["best_ssim_y"], state["best_niqe"]) == (best["ssim_y"], best["niqe"])
    names = ("psnr_y", "ssim_y", "niqe")
    assert state["reference"] == {"images": 2, "scores": {name: reference[name] for name in names}}
    alone = validation_set(folder, Ranks(), *words)
    assert alone.measure_reference() == state["reference"]["scores"]  # as on one rank
    panels = [panel for panel in PANELS if panel.curves[0].key in names]
    picture = draw({"run": log}, panels, None, "svg").decode()
    without = [line for line in log if line["event"] != "bicubic"]
    assert picture.count("stroke-dasharray") == 3
    assert draw({"run": without}, panels, None, "svg").decode().count("stroke-dasharray") == 0
