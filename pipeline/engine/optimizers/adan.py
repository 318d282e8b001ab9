"""Adan: Nesterov's momentum through the differences of successive gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.optimizers.foreach import (
    ForeachOptimizer,
    State,
    adam_sizes,
    correction,
    move_squares,
    numbers,
    pick,
)


class Adan(ForeachOptimizer):
    """Adan (Xie et al., 2022, arXiv:2208.06677), without its restarts.

    `betas`: what the averages of gradients, of their differences, and of squares keep; the paper
    writes 1 - beta. `weight_decay` divides the weights by 1 + `lr` `weight_decay` after the update,
    as in the paper.
    """

    ZEROS = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_gradient")

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        betas = numbers("betas", betas, 3)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        states: list[State],
        shared: State,
    ) -> None:
        lr, (beta1, beta2, beta3) = group["lr"], group["betas"]
        step = shared["step"]
        averages, changes, squares, previous = (pick(states, name) for name in self.ZEROS)
        differences = torch._foreach_sub(gradients, previous)
        # The first gradient has none before it.
        torch._foreach_mul_(differences, (step > 1).float())
        torch._foreach_copy_(previous, gradients)
        torch._foreach_lerp_(averages, gradients, 1 - beta1)
        torch._foreach_lerp_(changes, differences, 1 - beta2)
        ahead = torch._foreach_add(gradients, differences, alpha=beta2)
        move_squares(squares, ahead, beta3)
        moves = torch._foreach_div(averages, correction(beta1, step))
        torch._foreach_add_(moves, torch._foreach_mul(changes, beta2 / correction(beta2, step)))
        torch._foreach_div_(moves, adam_sizes(squares, beta3, step, group["eps"]))
        torch._foreach_add_(weights, moves, alpha=-lr)
        torch._foreach_div_(weights, 1 + lr * group["weight_decay"])
