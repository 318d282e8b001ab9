"""Adafactor: second moments of a matrix from its row and column means, no first moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.optimizers.foreach import (
    ForeachOptimizer,
    State,
    as_matrix,
    by_shape,
    numbers,
    pick,
)


class Adafactor(ForeachOptimizer):
    """Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235), as `torch.optim.Adafactor` defines it.

    Two differences from torch's: a convolution counts as the matrix (out, in x height x width),
    while torch would factor each kernel's height and width, which saves nothing; and no update
    reads norms back to the host.

    The update of a weight is at most min(`lr`, 1 / sqrt(step)) of its root mean square, or of
    `eps[1]` if that is larger. `beta2_decay`: the second moments keep 1 - step^`beta2_decay`. `d`
    limits the root mean square of an update before the rate.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        if not -1 <= beta2_decay < 0:
            raise ValueError(f"beta2_decay must be from -1 to below 0, not {beta2_decay!r}")
        if not d > 0:
            raise ValueError(f"d must be above 0, not {d!r}")
        least, least_rms = numbers("eps", [0.0 if one is None else one for one in eps], 2)
        super().__init__(params, lr=lr, d=d, weight_decay=weight_decay)
        least = least or torch.finfo(torch.float32).eps
        for group in self.param_groups:
            group |= {"beta2_decay": beta2_decay, "eps": (least, least_rms)}

    def _new_state(self, group: dict[str, Any], weight: Tensor) -> State:
        if weight.dim() < 2:
            return {"variance": torch.zeros_like(weight)}
        rows, columns = as_matrix(weight).shape
        return {"row_var": weight.new_zeros(rows, 1), "col_var": weight.new_zeros(1, columns)}

    def _update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        states: list[State],
        shared: State,
    ) -> None:
        lr, d, (least, least_rms) = group["lr"], group["d"], group["eps"]
        step = shared["step"]
        share = step ** group["beta2_decay"]
        rate = (step**-0.5).clamp(max=lr)
        for batch in by_shape(weights):
            own, held = [weights[i] for i in batch], [states[i] for i in batch]
            # (batch, rows, columns), or (batch, length) for biases and the like.
            is_matrix = own[0].dim() >= 2
            shape = (len(own), len(own[0]), -1) if is_matrix else (len(own), -1)
            pulls = torch.stack([gradients[i] for i in batch]).view(shape)
            values = torch.stack(own).view(shape)
            if is_matrix:
                squares = pulls.square()
                rows = _moved(pick(held, "row_var"), squares.mean(2, keepdim=True), share)
                columns = _moved(pick(held, "col_var"), squares.mean(1, keepdim=True), share)
                variance = rows * columns / rows.mean(1, keepdim=True).clamp(min=least)
            else:
                variance = _moved(
                    [one.view(-1) for one in pick(held, "variance")], pulls.square(), share
                )
            move = pulls * variance.clamp(min=least * least).rsqrt()
            size = rate * _rms(values).clamp(min=least_rms)
            move = move * (-size / (_rms(move) / d).clamp(min=1.0))
            torch._foreach_mul_(own, 1 - lr * group["weight_decay"])
            torch._foreach_add_(
                own, [one.view_as(weight) for one, weight in zip(move, own, strict=True)]
            )


def _moved(averages: list[Tensor], values: Tensor, share: Tensor) -> Tensor:
    """Move the running `averages` towards `values` (a batch) by `share`; return them as a batch."""
    moved = torch.stack(averages).lerp_(values, share)
    torch._foreach_copy_(averages, list(moved))
    return moved


def _rms(batch: Tensor) -> Tensor:
    """Return the root mean square of each element of a batch, with the batch's dimensions."""
    return batch.square().mean(tuple(range(1, batch.dim())), keepdim=True).sqrt()
