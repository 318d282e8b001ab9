"""Schedule-free AdamW: a constant rate, and an average of the weights in place of its decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.optimizers.foreach import (
    ForeachOptimizer,
    State,
    adam_sizes,
    move_squares,
    numbers,
    pick,
)


class ScheduleFreeAdamW(ForeachOptimizer):
    """Schedule-free AdamW (Defazio et al., 2024, arXiv:2405.15682).

    It keeps three sets of weights: z takes AdamW's steps without momentum, x is the average of z,
    and the network computes gradients at y, which is x moved by 1 - `betas[0]` towards z. x is what
    is validated and exported, through `averaged`, so the network always holds y: nothing is
    swapped around a validation or a checkpoint, and rounding cannot differ with how often one
    happens. In the average, update t weighs t^`r` (largest rate so far)^`weight_lr_power`, so that
    a warm-up counts little. Weight decay is computed at y.
    """

    SHARED: Mapping[str, float] = {"step": 0.0, "largest_lr": 0.0, "weight_sum": 0.0}

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        betas = numbers("betas", betas, 2)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            r=r,
            weight_lr_power=weight_lr_power,
        )

    def averaged(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [
            self.state[weight].get("x", weight) if weight in self.state else weight
            for weight in weights
        ]

    def _new_state(self, group: dict[str, Any], weight: Tensor) -> State:
        return {
            "exp_avg_sq": torch.zeros_like(weight),
            "z": weight.detach().clone(),
            "x": weight.detach().clone(),
        }

    def _update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        states: list[State],
        shared: State,
    ) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        step = shared["step"]
        squares, z, x = (pick(states, name) for name in ("exp_avg_sq", "z", "x"))
        move_squares(squares, gradients, beta2)
        moves = torch._foreach_div(gradients, adam_sizes(squares, beta2, step, group["eps"]))
        if group["weight_decay"]:
            torch._foreach_add_(moves, weights, alpha=group["weight_decay"])
        torch._foreach_add_(z, moves, alpha=-lr)
        largest, total = shared["largest_lr"], shared["weight_sum"]
        largest.clamp_(min=lr)
        weight = step ** group["r"] * largest ** group["weight_lr_power"]
        total += weight
        # 0 / 0 before the first update with a rate above 0, in which nothing moves.
        share = torch.nan_to_num(weight / total)
        torch._foreach_add_(x, torch._foreach_mul(torch._foreach_sub(z, x), share))
        torch._foreach_copy_(weights, z)
        torch._foreach_lerp_(weights, x, beta1)
