"""RAdam: Adam whose step is rectified while the second moments rest on few gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.optimizers.foreach import (
    ForeachOptimizer,
    State,
    correction,
    decayed,
    move_squares,
    numbers,
    pick,
)


class RAdam(ForeachOptimizer):
    """RAdam (Liu et al., 2019, arXiv:1908.03265), the same update as `torch.optim.RAdam`.

    torch's waits for nothing either, but only with two more kernels for each weight, and it has no
    `found_inf`.
    """

    ZEROS = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
    ) -> None:
        betas = numbers("betas", betas, 2)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
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
        missing1, missing2 = correction(beta1, step), correction(beta2, step)
        # Length of the moving average that has the variance of the second moments, at most
        # `longest`; the rectification is defined above 4, and used above 5.
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * step * (1 - missing2) / missing2
        rectified = (length - 4) * (length - 2) * longest
        rectified = (rectified / ((longest - 4) * (longest - 2) * length)).clamp(min=0).sqrt()
        is_adaptive = length > 5
        adaptive = torch.where(is_adaptive, rectified * missing2.sqrt(), torch.zeros_like(step))
        sizes = torch._foreach_sqrt(squares)
        torch._foreach_add_(sizes, group["eps"])
        moves = torch._foreach_div(averages, sizes)
        torch._foreach_mul_(moves, adaptive)
        torch._foreach_add_(moves, torch._foreach_mul(averages, 1 - is_adaptive.float()))
        torch._foreach_mul_(moves, -lr / missing1)
        torch._foreach_add_(weights, moves)
