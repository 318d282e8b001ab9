"""Runs saved by an earlier version continue as that version would have, and every command reads
them.

`tests/fixtures/runs-before-the-house/` holds three run folders that version 86232c9 wrote, stopped
at step 3 of 8: a GAN under DeepSpeed, a run under Accelerate, and two ranks with ZeRO stage 1. Next
to each are that version's results without the stop: the weights of step 8, and in `straight.json`
the losses, learning rates and PSNR of the steps in between.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evaluate
import export_trained_model
import upscale
from comparison import logged
from conftest import command, run
from fabricate import run_command
from lives import train
from pipeline.run_folder import checkpoint_dir, checkpoint_steps

RUNS = Path(__file__).resolve().parents[1] / "fixtures" / "runs-before-the-house"
STRAIGHT = json.loads((RUNS / "straight.json").read_text())
RECIPE = (
    "name=old",
    "keep=2",
    "steps=8",
    "generator={name: compact, num_features: 4, num_conv: 2}",
)
GAN = (
    "adversarial={weight: 0.01, discriminator: {name: unet, num_features: 2}, labels: {noise: "
    "0.1}}",
)


def picture(number: int, height: int, width: int) -> np.ndarray:
    """Curved stripes and a chessboard, uint8 HWC, computed in integers: the same on every
    machine."""
    y, x = np.mgrid[:height, :width]
    curves = (x - width // 2) ** 2 // (number + 5) + (x // 9 + y // 7) % 2 * 60
    planes = [(x * (number + 3) + y * (channel + 2) + curves) % 256 for channel in range(3)]
    return np.ascontiguousarray(np.stack(planes, axis=-1).astype(np.uint8))


@pytest.fixture(scope="module")
def old_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 6 training and 2 validation images on which the runs were trained."""
    root = tmp_path_factory.mktemp("old-dataset")
    names = [f"photos/{number}.npy" for number in range(8)]
    (root / "photos").mkdir()
    for number, name in enumerate(names):
        np.save(root / name, picture(number, 48 + 2 * number, 80 - 4 * number))
    (root / "training_file_list.txt").write_text("".join(f"{name}\n" for name in names[:6]))
    (root / "validation_file_list.txt").write_text("".join(f"{name}\n" for name in names[6:]))
    return root


@pytest.mark.parametrize(
    ("name", "procs", "extra"),
    [
        ("gan", 1, GAN),
        ("zero", 2, ("ds.zero_optimization.stage=1",)),
        ("accelerate", 1, ("--runtime", "accelerate")),
    ],
    ids=["gan", "zero", "accelerate"],
)
def test_an_old_run_goes_on_as_it_would_have(
    old_dataset: Path, tmp_path: Path, name: str, procs: int, extra: tuple[str, ...]
) -> None:
    """Weights, moments, schedule and random states must all be restored, or the numbers would
    differ."""
    run_dir = tmp_path / name
    shutil.copytree(RUNS / name, run_dir)
    if name == "accelerate":
        done = run(command(old_dataset, run_dir, *RECIPE, *extra))
        assert done.returncode == 0, done.stdout + done.stderr
        printed = done.stdout
    else:
        printed = train(old_dataset, run_dir, *RECIPE, *extra, procs=procs)
    assert "continuing from step 3 of 8" in printed
    expected, got = (
        STRAIGHT[name],
        {step: values for step, *values in logged(run_dir, "train", "loss", "lr")},
    )
    assert sorted(got) == list(range(1, 9))
    for line in expected["train"]:
        loss, rate = got[line["step"]]
        assert rate == line["lr"], f"rate of step {line['step']}"
        assert loss == pytest.approx(line["loss"], rel=1e-5), f"loss of step {line['step']}"
    if name == "gan":
        judged = dict(logged(run_dir, "train", "discriminator"))
        assert [judged[line["step"]] for line in expected["train"]] == pytest.approx(
            [line["discriminator"] for line in expected["train"]], rel=1e-5
        )
    psnrs = dict(logged(run_dir, "validation", "psnr_y"))
    assert psnrs[8] == pytest.approx(expected["validation"][-1]["psnr_y"], abs=1e-3)
    wanted = load_file(RUNS / f"{name}-step-8.safetensors")
    found = load_file(checkpoint_dir(run_dir, 8) / "generator.safetensors")
    assert wanted.keys() == found.keys()
    for tensor, values in wanted.items():  # the steps in between moved them by 1e-3 and more
        torch.testing.assert_close(found[tensor], values, rtol=1e-5, atol=1e-6)


def test_an_old_run_is_evaluated_exported_and_used(
    old_dataset: Path, tmp_path: Path, capsys
) -> None:
    run_dir, images = tmp_path / "gan", tmp_path / "images"
    shutil.copytree(RUNS / "gan", run_dir)
    assert checkpoint_steps(run_dir) == [3]
    images.mkdir()
    Image.fromarray(picture(6, 60, 56)).save(images / "6.png")
    code, _, err = run_command(
        capsys,
        evaluate,
        "--model",
        run_dir,
        "--hr",
        images,
        "--out",
        tmp_path / "results",
        "--json",
        tmp_path / "numbers.json",
        "--device",
        "cpu",
    )
    assert code == 0, err
    averaged_file = checkpoint_dir(run_dir, 3) / "generator_ema.safetensors"
    assert (
        hashlib.sha256(averaged_file.read_bytes()).hexdigest()
        in (tmp_path / "numbers.json").read_text()
    )
    code, _, err = run_command(
        capsys, export_trained_model, run_dir, "--output-dir", tmp_path / "exported"
    )
    assert code == 0, err
    exported = load_file(next((tmp_path / "exported").glob("*.safetensors")))
    averaged = load_file(averaged_file)
    assert all(torch.equal(exported[name], tensor) for name, tensor in averaged.items())
    code, _, err = run_command(
        capsys,
        upscale,
        images / "6.png",
        "--out",
        tmp_path / "upscaled",
        "--model",
        run_dir,
        "--backend",
        "torch",
        "--device",
        "cpu",
    )
    assert code == 0, err
    assert Image.open(next((tmp_path / "upscaled").iterdir())).size == (112, 120)
