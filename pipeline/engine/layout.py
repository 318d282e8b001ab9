"""Which memory layout of the activations a network trains faster in, measured where it will run.

The layout of the input decides: convolutions hand it on. Weights stay contiguous, as DeepSpeed
wants to send them.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
MARGIN = 1.1  # contiguous must be this much faster: other processes on the machine shall not decide
BUDGET = 1.0  # seconds of measuring, after the first step in each layout
PATIENCE = 3.0  # seconds, where the rounds do not agree
LEAST_ROUNDS, MOST_ROUNDS = 2, 25


def faster_layout(network: nn.Module, batch: int, patch: int, device: torch.device) -> str:
    """ "channels_last" or "contiguous": whichever takes less time forward and backward on (batch,
    3, patch, patch).

    Measured without torch.compile (which keeps the layout it is given), in FP16 on a GPU, in FP32
    on a CPU and there with 2 images at most, or with 1 where they take long. After a first step in
    each layout, in which memory is allocated and kernels are chosen, it takes a second, and up to
    three where its rounds do not agree: then the machine is busy, and the least times of more
    rounds count.
    """
    images = torch.rand(
        batch if device.type == "cuda" else min(batch, 2), 3, patch, patch, device=device
    )
    trial = copy.deepcopy(network).to(device)
    if device.type == "cuda":
        trial, images = trial.half(), images.half()
    try:
        return _measured(trial, images)
    except torch.OutOfMemoryError:  # uncompiled it takes more than the run itself will
        torch.cuda.empty_cache()
        return "channels_last"


def _measured(network: nn.Module, images: torch.Tensor) -> str:
    """The faster layout by the least times of rounds in which each takes its turn."""
    first = _round(network, images[:1])  # also tells how long a step takes
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
    """Seconds of a step in each layout, one after the other, so that a slow moment of the machine
    meets both."""
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
