"""Which memory layout of the activations a network trains faster in, measured where it will run.

The layout of the input decides: convolutions hand it on. Weights stay contiguous, as DeepSpeed wants to send them.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
ROUNDS = 5
MARGIN = 1.1  # contiguous must be this much faster: other processes on the machine shall not decide


def faster_layout(network: nn.Module, batch: int, patch: int, device: torch.device) -> str:
    """ "channels_last" or "contiguous": whichever takes less time forward and backward on (batch, 3, patch, patch).

    Measured without torch.compile (which keeps the layout it is given), in FP16 on a GPU, in FP32 on a CPU and there
    with 2 images at most, so that it takes a second or two.
    """
    images = torch.rand(batch if device.type == "cuda" else min(batch, 2), 3, patch, patch, device=device)
    trial = copy.deepcopy(network).to(device)
    if device.type == "cuda":
        trial, images = trial.half(), images.half()
    best = dict.fromkeys(LAYOUTS, float("inf"))
    try:
        for _ in range(ROUNDS):  # in turn, so that a slow moment of the machine meets both
            for name, layout in LAYOUTS.items():
                best[name] = min(best[name], _step_seconds(trial, images.contiguous(memory_format=layout)))
    except torch.OutOfMemoryError:  # uncompiled it takes more than the run itself will
        torch.cuda.empty_cache()
        return "channels_last"
    return "contiguous" if best["contiguous"] * MARGIN < best["channels_last"] else "channels_last"


def _step_seconds(network: nn.Module, inputs: torch.Tensor) -> float:
    _wait(inputs.device)
    began = time.perf_counter()
    network(inputs).sum().backward()
    _wait(inputs.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
