"""Recipes with stages, through train.py: a network is trained for PSNR first, then against a
discriminator."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import warm
from comparison import checkpoint_differences
from conftest import ROOT, assert_one_line, command, environment, run
from pipeline.checkpoint.engine_state import read_module
from pipeline.engine.engine import why_not_compiled
from pipeline.run_folder import checkpoint_dir, checkpoint_steps, find_run, run_network_file

STAGES = """
base: demo
name: two
stages:
  psnr: {steps: 3}
  gan:
    steps: 4
    losses: {l1: 0.1}
    adversarial:
      weight: 0.01
      loss: relativistic_average
      discriminator: {name: vgg, num_features: 4}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "two.yaml"
    path.write_text(STAGES)
    return path


def train(
    recipe: Path, dataset: Path, run_dir: Path, *extra: str, procs: int = 1
) -> subprocess.CompletedProcess[str]:
    return run(
        [
            str(recipe) if word == "demo" else word
            for word in command(dataset, run_dir, *extra, procs=procs)
        ]
    )


def events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_one_command_trains_stage_after_stage(recipe: Path, dataset: Path, tmp_path: Path) -> None:
    home = tmp_path / "runs" / "two"
    done = train(recipe, dataset, home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert (checkpoint_steps(home / "psnr")[-1], checkpoint_steps(home / "gan")[-1]) == (3, 4)
    last = home / "psnr" / "checkpoints" / "step-00000003" / "generator_ema.safetensors"
    assert f"starting from the weights of {last}" in done.stdout
    assert "two, stage gan: vapsr x2" in done.stdout
    lines = events(home / "gan", "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for name in (
        "loss_l1",
        "loss_adversarial",
        "discriminator",
        "d_real",
        "d_fake",
        "gradient_norm",
        "discriminator_gradient_norm",
        "colour_drift_red",
        "colour_drift_green",
        "colour_drift_blue",
    ):
        assert all(isinstance(line[name], float) for line in lines), name
    assert lines[0]["loss"] == pytest.approx(
        lines[0]["loss_l1"] + lines[0]["loss_adversarial"], rel=1e-6
    )
    for line in events(home / "gan", "distribution"):
        low, median, high = line["quantiles"]
        assert low <= median <= high
    assert {line["name"] for line in events(home / "gan", "distribution")} == {
        "discriminator/real",
        "discriminator/fake",
    }
    # Other commands use the stage that was trained last.
    assert find_run(tmp_path / "runs") == home / "gan"
    assert (
        run_network_file(home, "newest", ema=True)
        == checkpoint_dir(home / "gan", 4) / "generator_ema.safetensors"
    )
    exported = subprocess.run(
        [warm.python(), str(ROOT / "export_trained_model.py"), str(home)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert exported.returncode == 0, exported.stderr
    again = train(recipe, dataset, home)
    assert again.returncode == 0, again.stderr
    assert "nothing left to do: stage psnr is finished at step 3 of 3" in again.stdout
    assert "nothing left to do: stage gan is finished at step 4 of 4" in again.stdout
    changed = train(recipe, dataset, home, "stages.psnr.losses={mse: 1}")
    assert_one_line(changed, "losses.l1.weight: 1.0 in the run, unset asked for")


def test_the_second_stage_begins_with_the_firsts_weights(
    recipe: Path, dataset: Path, tmp_path: Path
) -> None:
    home = tmp_path / "run"
    done = train(
        recipe,
        dataset,
        home,
        "stages.gan.steps=1",
        "ds.scheduler.params.warmup_num_steps=20",
        "ds.optimizer.params.lr=1e-12",
        "ema_decay=0",
    )
    assert done.returncode == 0, done.stderr
    first = load_file(checkpoint_dir(home / "psnr", 3) / "generator_ema.safetensors")
    second = load_file(checkpoint_dir(home / "gan", 1) / "generator.safetensors")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-9)


def test_reset_puts_all_stages_aside(recipe: Path, dataset: Path, tmp_path: Path) -> None:
    home = tmp_path / "run"
    assert train(recipe, dataset, home, "stages.psnr.steps=1", "stages.gan.steps=1").returncode == 0
    done = train(recipe, dataset, home, "stages.psnr.steps=2", "stages.gan.steps=1", "--reset")
    assert done.returncode == 0, done.stderr
    (kept,) = tmp_path.glob("run.bak-*")
    assert checkpoint_steps(kept / "gan") == [1]
    assert checkpoint_steps(home / "psnr") == [1, 2] or checkpoint_steps(home / "psnr") == [2]


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("nowhere.pth", "no weights file 'nowhere.pth'"),
        ("other", "but the recipe asks for num_blocks 1; it fits with generator.num_blocks=2"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    start: str, message: str, dataset: Path, tmp_path: Path
) -> None:
    if start == "other":
        assert (
            run(
                command(dataset, tmp_path / "other", "steps=1", "generator.num_blocks=2")
            ).returncode
            == 0
        )
        start = str(tmp_path / "other")
    assert_one_line(
        run([*command(dataset, tmp_path / "run", "steps=1"), "--start", start]), message
    )


def test_weights_of_another_scale_are_taken_as_far_as_they_fit(
    dataset: Path, tmp_path: Path
) -> None:
    assert run(command(dataset, tmp_path / "x2", "steps=2")).returncode == 0
    larger = command(
        dataset,
        tmp_path / "x3",
        "steps=1",
        "scale=3",
        "data.crop=33",
        "ds.optimizer.params.lr=1e-12",
    )
    done = run([*larger, "--start", str(tmp_path / "x2")])
    assert done.returncode == 0, done.stderr
    assert "tensors; the others start at random" in done.stdout
    two = load_file(checkpoint_dir(tmp_path / "x2", 2) / "generator_ema.safetensors")
    three = load_file(checkpoint_dir(tmp_path / "x3", 1) / "generator.safetensors")
    torch.testing.assert_close(
        three["body.0.proj_1.weight"], two["body.0.proj_1.weight"], rtol=0, atol=1e-9
    )


def test_what_a_later_stage_lacks_is_said_before_the_first(
    recipe: Path, dataset: Path, tmp_path: Path
) -> None:
    words = command(dataset, tmp_path / "run", "stages.gan.losses={vgg_feature: 1.0}")
    done = subprocess.run(
        [str(recipe) if word == "demo" else word for word in words],
        capture_output=True,
        text=True,
        env={**environment(), "TORCH_HOME": str(tmp_path)},
        timeout=120,
        check=False,
    )
    assert_one_line(done, "the weights of the trunk 'vgg19' are missing: download https://")
    assert checkpoint_steps(tmp_path / "run" / "psnr") == []
    larger = tmp_path / "batch.json"
    larger.write_text(
        json.dumps(
            json.loads((ROOT / "recipes" / "demo_ds_config.json").read_text())
            | {"train_batch_size": 5, "gradient_accumulation_steps": 2}
        )
    )
    text = (
        recipe.read_text()
        .replace("stages:\n", "stages:\n  first: {steps: 2}\n", 1)
        .replace("psnr: {steps: 3}", f"psnr: {{steps: 3, ds_config: {larger}}}")
    )
    recipe.write_text(text)
    words = [word for word in command(dataset, tmp_path / "run") if "train_batch_size" not in word]
    assert_one_line(
        run([str(recipe) if word == "demo" else word for word in words]),
        "train_batch_size 5 is not micro-batch x accumulation x 1 ranks",
    )
    assert_one_line(
        run([*command(dataset, tmp_path / "run"), "--vgg-weights", "vgg19.pth"]),
        "--vgg-weights vgg19.pth: recipe demo has no loss vgg_feature, vgg_patch or contextual",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.gan.start=nowhere.pth", "no weights file 'nowhere.pth'"),
        ("stages.gan.losses={ms_ssim: {weight: 1, scales: 5}}", "ms_ssim"),
        ("stages.gan.adversarial.ds_config=OWN", "no optimizer 'Adamm'; did you mean 'Adam'?"),
        ("stages.gan.ds_config=SCHEDULE", "step_size"),
    ],
)
def test_a_later_stages_faults_are_found_before_the_first_begins(
    change: str, message: str, recipe: Path, dataset: Path, tmp_path: Path
) -> None:
    config = json.loads((ROOT / "recipes" / "demo_ds_config.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps(config | {"optimizer": {"type": "Adamm"}}))
    (tmp_path / "schedule.json").write_text(
        json.dumps(
            config
            | {"train_batch_size": 4, "scheduler": {"type": "StepLR", "params": {"step_size": 0}}}
        )
    )
    change = change.replace("OWN", str(tmp_path / "own.json")).replace(
        "SCHEDULE", str(tmp_path / "schedule.json")
    )
    words = [
        word
        for word in command(dataset, tmp_path / "run", change)
        if not word.startswith("ds.scheduler")
    ]
    done = run([str(recipe) if word == "demo" else word for word in words])
    assert_one_line(done, message)
    assert checkpoint_steps(tmp_path / "run" / "psnr") == []


def test_compiled_networks_learn_as_plain_ones_do(
    recipe: Path, dataset: Path, tmp_path: Path
) -> None:
    lacking = why_not_compiled(torch.device("cpu"))
    if lacking:
        pytest.skip(lacking)
    losses = {}
    few_kernels = "generator={name: compact, num_features: 8, num_conv: 1}"  # quick to compile
    for switch in ("on", "off"):
        steps = "stages.psnr.steps=1", "stages.gan.steps=3"
        done = train(recipe, dataset, tmp_path / switch, *steps, few_kernels, f"compile={switch}")
        assert done.returncode == 0, done.stderr
        lines = events(tmp_path / switch / "gan", "train")
        losses[switch] = [
            [line[name] for name in ("loss_l1", "loss_adversarial", "discriminator")]
            for line in lines
        ]
    np.testing.assert_allclose(losses["on"], losses["off"], rtol=1e-3)


def test_a_stop_in_the_second_stage_costs_nothing(
    recipe: Path, dataset: Path, tmp_path: Path
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for home, last in ((straight, 4), (broken, 2), (broken, 4)):
        done = train(recipe, dataset, home, f"stages.gan.steps={last}", "keep=9")
        assert done.returncode == 0, done.stderr
    assert "continuing from step 2 of 4" in done.stdout
    assert [
        d for d in checkpoint_differences(straight / "gan", broken / "gan", 4) if d != "state.json"
    ] == []


def test_a_discriminator_goes_on_in_the_next_stage(
    recipe: Path, dataset: Path, tmp_path: Path
) -> None:
    recipe.write_text(
        recipe.read_text()
        + """
  large:
    steps: 1
    data: {crop: 48}
    adversarial:
      weight: 0.01
      start: previous
      discriminator: {name: vgg, num_features: 4, head: pool}
"""
    )
    crop = (
        "stages.psnr.data.crop=32",
        "stages.gan.data.crop=32",
        "stages.gan.adversarial.discriminator.head=pool",
    )
    words = [
        word
        for word in command(dataset, tmp_path / "run", *crop, "ds.optimizer.params.lr=1e-12")
        if word != "data.crop=32"
    ]
    done = run([str(recipe) if word == "demo" else word for word in words])
    assert done.returncode == 0, done.stderr
    assert "the discriminator starts from" in done.stdout
    before, after = (
        read_module(checkpoint_dir(tmp_path / "run" / stage, step), "discriminator")
        for stage, step in (("gan", 4), ("large", 1))
    )
    convolutions = [name for name, tensor in before.items() if tensor.dim() == 4]
    assert len(convolutions) > 5
    for name in convolutions:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
    alone = train(
        recipe,
        dataset,
        tmp_path / "alone",
        "stages.psnr.steps=1",
        "stages.gan.adversarial.start=previous",
    )
    assert_one_line(
        alone, "stage gan: adversarial.start: previous, but stage psnr has no discriminator"
    )


def test_a_longer_first_stage_does_not_go_unnoticed(
    recipe: Path, dataset: Path, tmp_path: Path
) -> None:
    home = tmp_path / "run"
    assert train(recipe, dataset, home, "stages.gan.steps=1").returncode == 0
    done = train(recipe, dataset, home, "stages.psnr.steps=5", "stages.gan.steps=2")
    assert done.returncode == 0, done.stderr
    assert (
        "note: stage gan started from step 3 of the previous stage, which is now at step 5"
        in done.stdout
    )


def test_a_start_trained_with_other_parameters_is_said(dataset: Path, tmp_path: Path) -> None:
    first = command(dataset, tmp_path / "first", "steps=1", "generator.colour_space=ycbcr")
    assert run(first).returncode == 0
    done = run(
        [
            *command(dataset, tmp_path / "second", "steps=1", "generator.colour_space=rgb"),
            "--start",
            str(tmp_path / "first"),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert "note: trained with colour_space ycbcr, here rgb" in done.stdout


def test_a_validation_image_too_small_for_lpips_is_named_before_training(
    dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(dataset, folder)
    np.save(folder / "photos" / "11.npy", np.zeros((33, 64, 3), np.uint8))
    done = run(
        command(
            folder,
            tmp_path / "run",
            "validation_lpips=alex",
            f"lpips_weights={random_alex(tmp_path)}",
            procs=2,
        )
    )
    assert_one_line(
        done, "11.npy: 32x64 is too small for validation_lpips: alex, which needs 31 pixels"
    )
    assert checkpoint_steps(tmp_path / "run") == []


def random_alex(folder: Path) -> Path:
    """Random weights of LPIPS's trunk: enough to see that the numbers arrive where they belong."""
    torch.manual_seed(0)
    layers = (
        (0, 64, 3, 11),
        (3, 192, 64, 5),
        (6, 384, 192, 3),
        (8, 256, 384, 3),
        (10, 256, 256, 3),
    )
    torch.save(
        {
            f"features.{place}.{kind}": torch.randn(shape) * 0.05
            for place, out, inputs, kernel in layers
            for kind, shape in (("weight", (out, inputs, kernel, kernel)), ("bias", (out,)))
        },
        folder / "alex.pth",
    )
    return folder / "alex.pth"


def test_lpips_chooses_the_best_step(recipe: Path, dataset: Path, tmp_path: Path) -> None:
    trunk = random_alex(tmp_path)
    done = run(
        command(
            dataset,
            tmp_path / "run",
            "steps=6",
            "validate_every=2",
            "validation_lpips=alex",
            f"lpips_weights={trunk}",
            "best={metric: lpips, psnr_floor: 10}",
        )
    )
    assert done.returncode == 0, done.stderr
    lines = events(tmp_path / "run", "validation")
    assert [line["step"] for line in lines] == [2, 4, 6]
    best = min(line["lpips"] for line in lines)
    assert lines[-1]["best_lpips"] == best
    assert f"LPIPS {best:.4f}" in done.stdout
    state = json.loads((checkpoint_dir(tmp_path / "run", 6) / "state.json").read_text())
    assert state["best_step"] == next(line["step"] for line in lines if line["lpips"] == best)
