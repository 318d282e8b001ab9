"""Choose the memory format in which a network trains faster, measured on the device of the run.

The format of the input decides: convolutions pass it on. Weights stay contiguous, which DeepSpeed
needs to communicate them.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
MARGIN = 1.1  # contiguous must be faster by this factor, so that noise does not decide
BUDGET = 1.0  # seconds of measuring, after the first step in each format
PATIENCE = 3.0  # seconds of measuring if the rounds disagree
LEAST_ROUNDS, MOST_ROUNDS = 2, 25
LARGEST_PATCH = 64  # pixels of a side that are measured on a CPU, where a step takes long


def faster_layout(network: nn.Module, batch: int, patch: int, device: torch.device) -> str:
    """Return "channels_last" or "contiguous": whichever is faster, forward and backward.

    `network` is measured on inputs of shape (batch, 3, patch, patch), without torch.compile (which
    keeps the format it is given): in FP16 on a GPU, in FP32 on a CPU, and there with at most 2
    images, or 1 if they take long, of at most `LARGEST_PATCH` pixels a side. The first step in each
    format is not counted, because it allocates memory and chooses kernels. Measuring takes one
    second, or up to three if the rounds disagree: then the machine is busy, and the minimum over
    more rounds counts.
    """
    side = patch if device.type == "cuda" else min(patch, LARGEST_PATCH)
    images = torch.rand(
        batch if device.type == "cuda" else min(batch, 2), 3, side, side, device=device
    )
    trial = copy.deepcopy(network).to(device)
    if device.type == "cuda":
        trial, images = trial.half(), images.half()
    try:
        return _measured(trial, images)
    except torch.OutOfMemoryError:  # uncompiled, a step takes more memory than the run will need
        torch.cuda.empty_cache()
        return "channels_last"


def _measured(network: nn.Module, images: torch.Tensor) -> str:
    """Return the faster format by its minimum over rounds that alternate between the formats."""
    first = _round(network, images[:1])  # also shows how long a step takes
    if len(images) * sum(first.values()) * LEAST_ROUNDS > BUDGET and images.device.type == "cpu":
        images = images[:1]
    began = time.perf_counter()
    best = dict.fromkeys(LAYOUTS, float("inf"))
    winners: list[str] = []
    while len(winners) < MOST_ROUNDS:
        times = _round(network, images, is_reversed=len(winners) % 2 == 1)
        best = {name: min(best[name], times[name]) for name in LAYOUTS}
        winners.append(_winner(times))
        until_next = time.perf_counter() - began + sum(times.values())
        if until_next > PATIENCE or (until_next > BUDGET and len(set(winners)) == 1):
            break
    return _winner(best)


def _round(
    network: nn.Module, images: torch.Tensor, *, is_reversed: bool = False
) -> dict[str, float]:
    """Time one step in each format, one after the other, so that a slow moment affects both."""
    names = list(LAYOUTS)[::-1] if is_reversed else list(LAYOUTS)
    return {
        name: _step_seconds(network, images.contiguous(memory_format=LAYOUTS[name]))
        for name in names
    }


def _winner(seconds: dict[str, float]) -> str:
    return (
        "contiguous"
        if seconds["contiguous"] * MARGIN < seconds["channels_last"]
        else "channels_last"
    )


def _step_seconds(network: nn.Module, inputs: torch.Tensor) -> float:
    _wait(inputs.device)
    began = time.perf_counter()
    network(inputs).sum().backward()
    _wait(inputs.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
