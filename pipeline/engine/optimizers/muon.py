"""Muon: orthogonalised momentum for the matrices of a network, AdamW for its other weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.optimizers.foreach import (
    ForeachOptimizer,
    State,
    adamw,
    as_matrix,
    by_shape,
    numbers,
    pick,
)

LEAST_CHANNELS = 16
"""Input and output channels that a weight needs to count as a matrix. Fewer have the layers that
read or write pixels, depthwise convolutions, and tables of position biases."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from the source
SMALLEST_NORM = 1e-7
RATES = ("match_rms_adamw", "original")


class Muon(ForeachOptimizer):
    """Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) with AdamW.

    Muon updates weights of two or more dimensions with at least `LEAST_CHANNELS` output channels
    and input channels (per group of the convolution), as matrices (out, in x height x width): the
    update is their momentum with all singular values moved to about 1. AdamW updates the rest with
    `betas`, `eps` and the rate `adamw_lr` (default: `lr`), which follows the same schedule.
    Matrices of one shape are orthogonalised together, in float32.

    `adjust_lr_fn`: "match_rms_adamw" multiplies Muon's rate by 0.2 sqrt(max(rows, columns)), which
    makes its updates as large as AdamW's, so a rate found for AdamW fits (Liu et al., 2025,
    arXiv:2502.16982); "original" multiplies it by sqrt(max(1, rows / columns)).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if adjust_lr_fn not in RATES:
            raise ValueError(f"adjust_lr_fn must be {' or '.join(RATES)}, not {adjust_lr_fn!r}")
        if not isinstance(ns_steps, int) or not 1 <= ns_steps <= 20:
            raise ValueError(f"ns_steps must be a whole number from 1 to 20, not {ns_steps!r}")
        if adamw_lr is not None and not (isinstance(adamw_lr, (int, float)) and adamw_lr >= 0):
            raise ValueError(f"adamw_lr must be 0 or above, not {adamw_lr!r}")
        betas = numbers("betas", betas, 2)
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            # A factor, because schedules set a group's only rate.
            adamw_factor=1.0 if adamw_lr is None or not lr else adamw_lr / lr,
            betas=betas,
            eps=eps,
        )

    def _new_state(self, group: dict[str, Any], weight: Tensor) -> State:
        names = ("momentum_buffer",) if _is_matrix(weight) else ("exp_avg", "exp_avg_sq")
        return {name: torch.zeros_like(weight) for name in names}

    def _update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        states: list[State],
        shared: State,
    ) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        ours = [i for i, weight in enumerate(weights) if _is_matrix(weight)]
        others = [i for i, weight in enumerate(weights) if not _is_matrix(weight)]
        if others:
            adamw(
                [weights[i] for i in others],
                [gradients[i] for i in others],
                [states[i] for i in others],
                shared["step"],
                lr=lr * group["adamw_factor"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=decay,
            )
        if not ours:
            return
        matrices = [as_matrix(weights[i]) for i in ours]
        pulls = [as_matrix(gradients[i]) for i in ours]
        buffers = [
            as_matrix(buffer) for buffer in pick([states[i] for i in ours], "momentum_buffer")
        ]
        torch._foreach_lerp_(buffers, pulls, 1 - group["momentum"])
        moves = (
            torch._foreach_lerp(pulls, buffers, group["momentum"]) if group["nesterov"] else buffers
        )
        torch._foreach_mul_(matrices, 1 - lr * decay)
        for batch in by_shape(matrices):
            rows, columns = matrices[batch[0]].shape
            move = orthogonalised(torch.stack([moves[i] for i in batch]), group["ns_steps"])
            size = (
                0.2 * math.sqrt(max(rows, columns))
                if group["adjust_lr_fn"] == "match_rms_adamw"
                else math.sqrt(max(1.0, rows / columns))
            )
            torch._foreach_add_([matrices[i] for i in batch], list(move), alpha=-lr * size)


def _is_matrix(weight: Tensor) -> bool:
    return weight.dim() >= 2 and min(weight.shape[:2]) >= LEAST_CHANNELS


def orthogonalised(matrices: Tensor, steps: int) -> Tensor:
    """Return matrices (batch, rows, columns) with their singular values moved to about 1.

    By Newton and Schulz's iteration with coefficients that are steep at 0: after 5 steps, singular
    values above 1e-3 of the norm are between 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if is_tall else matrices
    # Frobenius' norm, which is at least the largest singular value.
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        squares = wide @ wide.mT
        wide = torch.baddbmm(
            wide, torch.baddbmm(squares, squares, squares, beta=b, alpha=c), wide, beta=a
        )
    return wide.mT if is_tall else wide
