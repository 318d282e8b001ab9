"""NAdam: Adam with Nesterov's momentum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.optimizers.foreach import (
    ForeachOptimizer,
    State,
    adam_sizes,
    decayed,
    move_squares,
    numbers,
    pick,
)


class NAdam(ForeachOptimizer):
    """NAdam (Dozat, 2016), the same update as `torch.optim.NAdam`, with a few kernels.

    The momentum of update t is `betas[0]` (1 - 0.96^(t `momentum_decay`) / 2).
    """

    ZEROS = ("exp_avg", "exp_avg_sq")
    SHARED: Mapping[str, float] = {"step": 0.0, "mu_product": 1.0}

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
    ) -> None:
        betas = numbers("betas", betas, 2)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
        )

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
        averages, squares = pick(states, "exp_avg"), pick(states, "exp_avg_sq")
        gradients = decayed(group, weights, gradients)
        torch._foreach_lerp_(averages, gradients, 1 - beta1)
        move_squares(squares, gradients, beta2)
        this, following = (
            beta1 * (1 - 0.5 * 0.96 ** (count * group["momentum_decay"]))
            for count in (step, step + 1)
        )
        product = shared["mu_product"].mul_(this)
        moves = torch._foreach_mul(gradients, (1 - this) / (1 - product))
        ahead = torch._foreach_mul(averages, following / (1 - product * following))
        torch._foreach_add_(moves, ahead)
        torch._foreach_div_(moves, adam_sizes(squares, beta2, step, group["eps"]))
        torch._foreach_add_(weights, moves, alpha=-lr)
