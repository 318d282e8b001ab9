"""Base of the project's optimizers: all weights together, without waiting for the device.

The scalars that change from update to update, such as bias corrections, are tensors on the device,
computed from a counter of updates there. So an update that is skipped because its gradient is not
finite does not count, although the host never learns of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
"""An optimizer's state of one weight, by name."""


class ForeachOptimizer(torch.optim.Optimizer):
    """An optimizer whose update is a few kernels for all weights; a subclass defines `_update`.

    Weights without a gradient are passed over.
    """

    ZEROS: tuple[str, ...] = ()
    """Names of a weight's states that are zeros of its shape before the first update."""

    SHARED: Mapping[str, float] = {"step": 0.0}
    """Numbers that all weights of a group share, with their first values. They are 0-dim tensors in
    the state of the group's first weight. `step` counts updates."""

    found_inf: Tensor | None = None
    """0-dim tensor on the device; where it is not 0, `step` changes neither weights nor states."""

    is_paused = False  # if True, `step` does nothing

    def __init__(self, parameters: Iterable[nn.Parameter], **defaults: Any) -> None:
        _check_values(defaults)
        # torch's word for a step counter on the device of the weights: it is loaded to there.
        super().__init__(parameters, {**defaults, "capturable": True})

    def averaged(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return what validation and export use in place of `weights`, in their order."""
        return list(weights)

    def _new_state(self, group: dict[str, Any], weight: Tensor) -> State:
        """Return the state of `weight` before the first update."""
        return {name: torch.zeros_like(weight) for name in self.ZEROS}

    def _update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        states: list[State],
        shared: State,
    ) -> None:
        """Update weights, states and `shared` in place, but for its `step`: 1 in the first one."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = [{**group, "capturable": True} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.is_paused:
            return loss
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            shared = self._shared(group)
            states = []
            for weight in weights:
                state = self.state[weight]
                if state.keys() <= shared.keys():
                    state.update(self._new_state(group, weight))
                states.append({name: state[name] for name in state.keys() - shared.keys()})
            rows = [weights, list(shared.values())]
            for name in sorted({name for state in states for name in state}):
                rows.append([state[name] for state in states if name in state])
            before = [] if self.found_inf is None else [_flat(row) for row in rows]
            shared["step"] += 1
            self._update(group, weights, [weight.grad for weight in weights], states, shared)
            if self.found_inf is not None:
                _restore(rows, before, self.found_inf)
        return loss

    def _shared(self, group: dict[str, Any]) -> State:
        """Return the numbers that all weights of a group share; see `SHARED`."""
        first = group["params"][0]
        state = self.state[first]
        for name, value in self.SHARED.items():
            if name not in state:
                state[name] = torch.full((), value, device=first.device)
        return {name: state[name] for name in self.SHARED}


def skips_nonfinite(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` changes nothing where its `found_inf` is set."""
    return isinstance(optimizer, ForeachOptimizer) or bool(optimizer.defaults.get("fused"))


@contextmanager
def paused(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let no update of `optimizer` in this block change weights or states, if it can skip any."""
    if isinstance(optimizer, ForeachOptimizer):
        optimizer.is_paused = True
        try:
            yield
        finally:
            optimizer.is_paused = False
    elif skips_nonfinite(optimizer):
        optimizer.found_inf = torch.ones((), device=optimizer.param_groups[0]["params"][0].device)
        try:
            yield
        finally:
            del optimizer.found_inf
    else:
        yield


def averaged(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return what validation and export use in place of the `weights` that `optimizer` updates."""
    if isinstance(optimizer, ForeachOptimizer):
        return optimizer.averaged(weights)
    return list(weights)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _restore(rows: Sequence[list[Tensor]], before: Sequence[Tensor], found_inf: Tensor) -> None:
    """Write `before` into the tensors of `rows` where `found_inf` is set."""
    # Through flat copies, row by row: torch has no `where` for lists of tensors.
    for row, old in zip(rows, before, strict=True):
        kept = torch.where(found_inf.bool(), old, _flat(row))
        parts = kept.split([tensor.numel() for tensor in row])
        torch._foreach_copy_(row, [part.view_as(own) for part, own in zip(parts, row, strict=True)])


def pick(states: Sequence[State], name: str) -> list[Tensor]:
    return [state[name] for state in states]


def correction(beta: float, step: Tensor) -> Tensor:
    """Return 1 - beta^step, also for a beta near 1, where float32 would lose the difference."""
    return -torch.expm1(step * (math.log(beta) if beta else -math.inf))


def decayed(group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Apply a group's weight decay, to the weights or to the gradients, which are returned."""
    decay = group["weight_decay"]
    if decay and group["decoupled_weight_decay"]:
        torch._foreach_mul_(weights, 1 - group["lr"] * decay)
    elif decay:
        return list(torch._foreach_add(gradients, weights, alpha=decay))
    return gradients


def move_squares(squares: list[Tensor], gradients: Sequence[Tensor], beta: float) -> None:
    """Move Adam's second moments, of which `beta` stays, towards the squares of `gradients`."""
    torch._foreach_mul_(squares, beta)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta)


def adam_sizes(squares: list[Tensor], beta: float, step: Tensor, eps: float) -> list[Tensor]:
    """Return the roots of the corrected second moments plus `eps`, by which Adam divides."""
    sizes = torch._foreach_sqrt(squares)
    torch._foreach_div_(sizes, correction(beta, step).sqrt())
    torch._foreach_add_(sizes, eps)
    return list(sizes)


def adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: Sequence[State],
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update `weights` by AdamW (Loshchilov and Hutter, 2019): states exp_avg and exp_avg_sq."""
    averages, squares = pick(states, "exp_avg"), pick(states, "exp_avg_sq")
    torch._foreach_lerp_(averages, gradients, 1 - betas[0])
    move_squares(squares, gradients, betas[1])
    moves = torch._foreach_div(averages, adam_sizes(squares, betas[1], step, eps))
    torch._foreach_mul_(moves, -lr / correction(betas[0], step))
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_add_(weights, moves)


# Weights as matrices. A convolution's (out, in, height, width) is (out, in x height x width).


def as_matrix(weight: Tensor) -> Tensor:
    """Return a view of a weight of two or more dimensions with its first one as the rows."""
    return weight.reshape(len(weight), -1)


def by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of tensors of the same shape together, to be computed as one batch."""
    found: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        found.setdefault(tensor.shape, []).append(index)
    return list(found.values())


def numbers(name: str, value: Any, count: int) -> tuple[float, ...]:
    """Return `value` as a tuple of `count` numbers; raise `ValueError` if it is anything else."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        raise ValueError(f"{name} must be {count} numbers, not {value!r}")
    return tuple(value)


SHARES = ("betas", "momentum")  # from 0 up to, but not including, 1
NOT_NUMBERS = ("nesterov", "adjust_lr_fn", "decoupled_weight_decay")


def _check_values(values: dict[str, Any]) -> None:
    """Raise `ValueError` for a value that no optimizer takes."""
    for name, value in values.items():
        parts = value if isinstance(value, (list, tuple)) else (value,)
        for number in parts if name not in NOT_NUMBERS else ():
            if not isinstance(number, (int, float)) or number < 0:
                raise ValueError(f"{name} must be 0 or above, not {value!r}")
            if name in SHARES and number >= 1:
                raise ValueError(f"{name} must be from 0 to below 1, not {value!r}")
