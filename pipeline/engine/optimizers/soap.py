"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.optimizers.foreach import (
    ForeachOptimizer,
    State,
    by_shape,
    correction,
    numbers,
    pick,
)


class SOAP(ForeachOptimizer):
    """SOAP (Vyas et al., 2024, arXiv:2409.11321), for tensors of any number of dimensions.

    A convolution counts as a tensor (out, in, height x width). Along each dimension of 2 to
    `max_precond_dim` elements, the optimizer averages the gradient's second moments between its
    slices, and Adam works in the eigenvectors of these averages; other dimensions, and biases, stay
    as they are. Every `precondition_frequency` updates, the eigenvectors take one step of
    orthogonal iteration. As in the authors' code, the first update only computes eigenvectors and
    moves no weight, and `shampoo_beta`, what the second moments between slices keep, is `betas[1]`
    unless given. Tensors of one shape are computed together, in float32.

    The first update of a run waits for the device once, for the eigenvectors.
    """

    ZEROS = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 1024,
    ) -> None:
        for name, value, least in (
            ("precondition_frequency", precondition_frequency, 1),
            ("max_precond_dim", max_precond_dim, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, {least} or above, not {value!r}")
        betas = numbers("betas", betas, 2)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            shampoo_beta=betas[1] if shampoo_beta is None else shampoo_beta,
            eps=eps,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            max_precond_dim=max_precond_dim,
            # Updates so far, also those skipped on the device: the host must know when to
            # recompute eigenvectors.
            num_updates=0,
        )

    def _new_state(self, group: dict[str, Any], weight: Tensor) -> State:
        state = super()._new_state(group, weight)
        for mode, size in _rotated(weight, group["max_precond_dim"]):
            state[f"moments_{mode}"] = weight.new_zeros(size, size)
            state[f"basis_{mode}"] = torch.eye(size, device=weight.device, dtype=weight.dtype)
        return state

    def _update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        states: list[State],
        shared: State,
    ) -> None:
        number = group["num_updates"]
        group["num_updates"] += 1
        if number == 0:
            shared["step"] -= 1  # no weight moves
        for batch in by_shape(weights):
            self._update_batch(
                group,
                [weights[i] for i in batch],
                torch.stack([gradients[i] for i in batch]),
                [states[i] for i in batch],
                shared["step"],
                number,
            )

    def _update_batch(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: Tensor,
        states: list[State],
        step: Tensor,
        number: int,
    ) -> None:
        """Update weights of one shape. `gradients`: their stack; `number`: updates before."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        shape = gradients.shape
        modes = [mode for mode, _ in _rotated(weights[0], group["max_precond_dim"])]
        gradients = gradients.reshape(len(weights), *_tensor_shape(weights[0]))
        bases = [torch.stack(pick(states, f"basis_{mode}")) for mode in modes]
        averages, squares = (
            torch.stack(pick(states, name)).view_as(gradients) for name in ("exp_avg", "exp_avg_sq")
        )
        if number > 0:
            averages = averages.lerp(gradients, 1 - beta1)
            rotated = _in_basis(gradients, modes, bases)
            squares = squares * beta2 + rotated.square() * (1 - beta2)
            moves = _in_basis(averages, modes, bases) / (
                (squares / correction(beta2, step)).sqrt() + group["eps"]
            )
            moves = _in_basis(moves, modes, [basis.mT for basis in bases])
            moves = (moves * (-lr / correction(beta1, step))).view(shape)
            torch._foreach_add_(weights, list(moves))
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        # The eigenvectors change after the update, so that no gradient is rotated by itself.
        moments = []
        for mode in modes:
            slices = gradients.movedim(mode, 1).flatten(2)
            held = pick(states, f"moments_{mode}")
            moments.append(torch.stack(held).lerp_(slices @ slices.mT, 1 - group["shampoo_beta"]))
            torch._foreach_copy_(held, list(moments[-1]))
        if number == 0:
            bases = [_eigenvectors(matrices) for matrices in moments]
        elif number % group["precondition_frequency"] == 0:
            for i, mode in enumerate(modes):
                bases[i], order = _iterated(moments[i], bases[i])
                order = order.view(
                    len(order), *(-1 if mode == k else 1 for k in range(1, squares.dim()))
                )
                squares = squares.gather(mode, order.expand_as(squares))
        for mode, basis in zip(modes, bases, strict=True):
            torch._foreach_copy_(pick(states, f"basis_{mode}"), list(basis))
        torch._foreach_copy_(pick(states, "exp_avg"), list(averages.view(shape)))
        torch._foreach_copy_(pick(states, "exp_avg_sq"), list(squares.view(shape)))


def _tensor_shape(weight: Tensor) -> tuple[int, ...]:
    """Return the shape of a weight with a kernel's height and width as one dimension."""
    return (*weight.shape[:2], -1) if weight.dim() > 2 else tuple(weight.shape)


def _rotated(weight: Tensor, largest: int) -> list[tuple[int, int]]:
    """Return (mode, size) of each dimension with eigenvectors; mode 1 is the first dimension."""
    if weight.dim() < 2:
        return []
    sizes = weight.view(_tensor_shape(weight)).shape
    return [(mode, size) for mode, size in enumerate(sizes, 1) if 1 < size <= largest]


def _in_basis(tensors: Tensor, modes: Sequence[int], bases: Sequence[Tensor]) -> Tensor:
    """Return the coordinates of a batch of tensors in the columns of `bases`, for each mode."""
    for mode, basis in zip(modes, bases, strict=True):
        slices = tensors.movedim(mode, 1)
        tensors = (basis.mT @ slices.flatten(2)).view(slices.shape).movedim(1, mode)
    return tensors


def _eigenvectors(matrices: Tensor) -> Tensor:
    """Return the eigenvectors of symmetric matrices as columns, the largest eigenvalue first."""
    # LAPACK raises an error for NaN, although the update will be skipped.
    finite = torch.nan_to_num(matrices, posinf=0.0, neginf=0.0)
    return torch.linalg.eigh(finite).eigenvectors.flip(2)


def _iterated(matrices: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvectors after a step of orthogonal iteration, and how their order has changed.

    They are sorted by the estimate of their eigenvalues first, since orthogonalisation keeps the
    first one's direction best.
    """
    images = matrices @ basis
    order = (basis * images).sum(1).argsort(dim=1, descending=True)
    sorted_images = images.gather(2, order.unsqueeze(1).expand_as(images))
    return torch.linalg.qr(sorted_images).Q, order
