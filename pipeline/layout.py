"""Which memory layout of the activations a network trains faster in, measured where it will run.

The layout of the input decides: convolutions hand it on. Weights stay contiguous, as DeepSpeed wants to send them.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
MARGIN = 1.05  # channels_last must be this much faster: a coin toss shall not decide


def faster_layout(network: nn.Module, batch: int, patch: int, device: torch.device) -> str:
    """ "channels_last" or "contiguous": whichever takes less time forward and backward on (batch, 3, patch, patch).

    FP16 on a GPU, FP32 on a CPU, where at most 2 images are tried to keep it to a second or two.
    """
    images = torch.rand(batch if device.type == "cuda" else min(batch, 2), 3, patch, patch, device=device)
    seconds = {}
    for name, layout in LAYOUTS.items():
        trial = copy.deepcopy(network).to(device)
        if device.type == "cuda":
            trial, images = trial.half(), images.half()
        inputs = images.contiguous(memory_format=layout)
        seconds[name] = min(_step_seconds(trial, inputs) for _ in range(4))
    return "channels_last" if seconds["channels_last"] * MARGIN < seconds["contiguous"] else "contiguous"


def _step_seconds(network: nn.Module, inputs: torch.Tensor) -> float:
    _wait(inputs.device)
    began = time.perf_counter()
    network(inputs).sum().backward()
    _wait(inputs.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
