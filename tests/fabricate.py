"""Shared by several test files: a tiny network, a run folder as training writes it, images, shared
data."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import cli
from pipeline.checkpoint.checkpoint import Contents
from pipeline.checkpoint_index import describe, write_index
from pipeline.distributed.ranks import Ranks
from pipeline.losses.trunks import vgg_features
from pipeline.models import build_generator
from pipeline.models.compact import SRVGGNetCompact
from pipeline.models.ema import ExponentialMovingAverage
from pipeline.models.vapsr import VapSR
from pipeline.models.weights import SavedNetwork, write_network
from pipeline.run_folder import (
    GENERATOR_EMA_FILE,
    GENERATOR_FILE,
    STATE_FILE,
    checkpoint_dir,
)

CHECKOUT = Path(__file__).resolve().parents[1]
TINY = {"num_features": 8, "num_attention_features": 12, "num_blocks": 2}


def shared(relative: str) -> Path:
    """Return a file or folder of the shared data next to the checkout; skip the test if it is
    missing."""
    path = CHECKOUT.parent / "shared" / relative
    if not path.exists():
        pytest.skip(f"shared/{relative} is not next to the checkout")
    return path


def run_command(capsys, command, *arguments) -> tuple[int, str, str]:
    """Run a command (the top-level module of its name) in this process; return exit status, stdout
    and stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.run(command.Options, command.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def tiny_network(seed: int = 0, **params) -> VapSR:
    """A VapSR of a few thousand parameters, all of them random: zeros could hide a mistake.

    Its output has the magnitude of an image's pixels.
    """
    torch.manual_seed(seed)
    network = VapSR(**{"scale": 2, **TINY, **params})
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if network.residual_kernel is None and name.startswith(("conv_", "upsampler")):
                parameter.mul_(0.1)
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def tiny_saved(seed: int = 0, **params) -> SavedNetwork:
    network = tiny_network(seed, **params)
    params = {**TINY, **params}
    return SavedNetwork("vapsr", params.pop("scale", 2), params, network.state_dict())


def identity_network(scale: int = 1) -> SRVGGNetCompact:
    """Return a network whose output is its input, enlarged by repeating pixels."""
    network = SRVGGNetCompact(scale=scale, num_features=4, num_conv=1)
    with torch.no_grad():
        network.body[-1].weight.zero_()
        network.body[-1].bias.zero_()
    return network.eval()


def random_vgg(blocks: Sequence[tuple[int, int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights of a VGG's features ("features.0.weight", …) that keep the signal's
    magnitude, exact in FP16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in vgg_features(blocks).state_dict().items()}
    return {
        f"features.{key}": torch.randn(shape, generator=generator)
        .mul((2 / shape[1:].numel()) ** 0.5 if len(shape) == 4 else 0.1)
        .half()
        for key, shape in shapes.items()
    }


def ramp() -> np.ndarray:
    """Return all 1,024 levels of 10 bits, scaled to 16, in each channel: uint16 (64, 64, 3)."""
    levels = np.arange(1024).reshape(32, 32).repeat(2, 0).repeat(2, 1)
    deep = (levels * 65535 + 511) // 1023
    return np.stack([deep, deep[::-1], deep.T], axis=2).astype(np.uint16)


def write_cubic(path: Path) -> Path:
    """Write weights of a network that does exactly cubic upscaling by 2; return the path."""
    params = {**TINY, "global_residual": "bicubic"}
    torch.manual_seed(0)
    network = VapSR(scale=2, **params)
    with torch.no_grad():
        network.upsampler[-2].weight.zero_()
        network.upsampler[-2].bias.zero_()
    write_network(path, SavedNetwork("vapsr", 2, params, network.state_dict()))
    return path


def make_run(
    root: Path,
    name: str = "demo",
    steps: tuple[int, ...] = (100, 200),
    best: int | None = None,
    **params,
) -> Path:
    """Make a run folder in `root` with complete checkpoints; step N has raw weights of seed N and
    averaged weights of seed N + 1."""
    run_dir = root / name
    for step in steps:
        folder = checkpoint_dir(run_dir, step)
        folder.mkdir(parents=True)
        for seed, file in ((step, GENERATOR_FILE), (step + 1, GENERATOR_EMA_FILE)):
            saved = tiny_saved(seed, **params)
            saved.metadata.update(step=str(step), recipe=name)
            write_network(folder / file, saved)
        (folder / STATE_FILE).write_text(
            json.dumps({"step": step, "best_step": best, "best_psnr": 30.0})
        )
        seal(folder, step)
    (run_dir / "recipe.yaml").write_text(f"name: {name}\n")
    return run_dir


def seal(folder: Path, step: int, world_size: int = 1) -> None:
    """Write the index of the checkpoint in `folder`, as its files are now."""
    index = {"step": step, "world_size": world_size, "identity": {}, "files": describe(folder)}
    write_index(folder, index)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random picture with some noise, uint8 RGB HWC."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(
        generator.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    )
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + generator.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)


def write_images(folder: Path, images: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / name)
    return folder


PLAIN = {"num_features": 4, "num_blocks": 1}
"""Parameters of the network of `PlainEngine`."""


class PlainEngine:
    """A network whose ranks each save a file, as with ZeRO; the first also saves the weights."""

    def __init__(self, ranks: Ranks) -> None:
        torch.manual_seed(0)
        self.module, self._ranks = build_generator("srresnet", 2, **PLAIN), ranks
        self.moment = torch.full((1000,), float(ranks.rank))

    def save(self, directory: str, name: str, files: Any) -> None:
        folder = os.path.join(directory, name)
        if self._ranks.is_first:
            files.save(
                {"module": self.module.state_dict()},
                os.path.join(folder, "mp_rank_00_model_states.pt"),
            )
        files.save({"moment": self.moment}, os.path.join(folder, f"shard-{self._ranks.rank}.pt"))
        self._ranks.gather(None)


def contents_of(ranks: Ranks, *, sees_run_dir: bool = True) -> Contents:
    engine = PlainEngine(ranks)
    return Contents(
        {"generator": engine},
        ExponentialMovingAverage(engine.module, 0.9),
        SavedNetwork("srresnet", 2, PLAIN, {}, {"recipe": "test"}),
        {"recipe": "test"},
        sees_run_dir,
    )
