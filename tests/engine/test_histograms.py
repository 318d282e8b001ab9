"""Histograms of weights and gradients, and communication statistics, are complete on any number of
ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from comparison import checkpoint_differences, logged
from lives import train
from pipeline.cli import UserError
from pipeline.config.ds_config import load_ds_config
from pipeline.installation import ROOT
from pipeline.run_folder import checkpoint_dir

BF16 = ("ds.bf16.enabled=true", "ds.fp16.enabled=false")
GAN = ("adversarial={weight: 0.01, discriminator: {name: vgg, num_features: 4}}",)


def parameters(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return the generator's parameters at step 4, without its only buffer."""
    return {
        name: tensor
        for name, tensor in load_file(checkpoint_dir(run_dir, 4) / "generator.safetensors").items()
        if name != "residual_kernel"
    }


@pytest.mark.parametrize(
    ("procs", "extra"),
    [
        (1, ("ds.train_batch_size=8", "ds.gradient_accumulation_steps=2", *GAN)),
        (2, ("ds.zero_optimization.stage=1",)),
        (2, ("ds.zero_optimization.stage=2", *BF16)),
    ],
    ids=["gan-accumulation", "zero1-2", "zero2-bf16-2"],
)
def test_histograms_are_of_whole_gradients_and_change_nothing(
    dataset: Path, tmp_path: Path, procs: int, extra: tuple[str, ...]
) -> None:
    train(dataset, tmp_path / "run", "steps=4", "histograms=2", "samples=off", *extra, procs=procs)
    train(dataset, tmp_path / "plain", "steps=4", "samples=off", *extra, procs=procs)
    assert checkpoint_differences(tmp_path / "plain", tmp_path / "run", 4) == []
    board = EventAccumulator(
        str(tmp_path / "run" / "tensorboard"), size_guidance={"histograms": 0}
    ).Reload()
    tags = board.Tags()["histograms"]
    networks = {"generator": "gradient_norm"} | (
        {"discriminator": "discriminator_gradient_norm"} if GAN[0] in extra else {}
    )
    for network, norm in networks.items():
        squares = {2: 0.0, 4: 0.0}
        for tag in tags:
            if tag.startswith(f"gradients/{network}/"):
                for event in board.Histograms(tag):
                    squares[event.step] += event.histogram_value.sum_squares
        norms = dict(logged(tmp_path / "run", "train", norm))
        for step, total in squares.items():
            assert math.sqrt(total) == pytest.approx(norms[step], rel=1e-5), (
                f"{network}, step {step}"
            )
    weights = parameters(tmp_path / "run")
    assert {tag for tag in tags if tag.startswith("weights/generator/")} == {
        f"weights/generator/{n}" for n in weights
    }
    for name, tensor in weights.items():
        last = board.Histograms(f"weights/generator/{name}")[-1]
        assert (last.step, last.histogram_value.num) == (4, tensor.numel())
        assert last.histogram_value.sum == pytest.approx(tensor.double().sum().item(), abs=1e-3)


def test_what_ranks_say_is_counted(dataset: Path, tmp_path: Path) -> None:
    """Every update averages the FP32 gradients of all parameters over the ranks."""
    train(
        dataset,
        tmp_path / "run",
        "steps=4",
        "log_every=2",
        "samples=off",
        "ds.comms_logger.enabled=true",
        procs=2,
    )
    train(dataset, tmp_path / "plain", "steps=4", "log_every=2", "samples=off", procs=2)
    assert [
        d
        for d in checkpoint_differences(tmp_path / "plain", tmp_path / "run", 4)
        if "comms_logger" not in d
    ] == []
    megabytes = (
        2 * 4 * sum(tensor.numel() for tensor in parameters(tmp_path / "run").values()) / 1e6
    )
    lines = logged(tmp_path / "run", "comms", "all_reduce_mb", "all_reduce_calls", "all_reduce_ms")
    assert [step for step, *_ in lines] == [2, 4]
    for _, sent, calls, milliseconds in lines:
        assert sent == pytest.approx(megabytes, rel=0.01)
        assert calls >= 2
        assert milliseconds > 0
    assert logged(tmp_path / "plain", "comms") == []


def test_a_comms_logger_that_is_off_costs_nothing_and_verbose_is_refused() -> None:
    """DeepSpeed waits for the device in every collective as soon as the section exists."""
    path = ROOT / "ds_config.json"
    assert "comms_logger" not in load_ds_config(path, {"comms_logger.enabled": False})
    assert "comms_logger" in load_ds_config(path, {"comms_logger.enabled": True})
    with pytest.raises(UserError, match=r"comms_logger\.verbose would print a line per call"):
        load_ds_config(path, {"comms_logger.enabled": True, "comms_logger.verbose": True})
