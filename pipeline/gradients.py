"""The gradient of an update, parameter by parameter: whole, in FP32, as it was before clipping and loss scaling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def gradients_of_update(engines: Mapping[str, Any]) -> Iterator[dict[str, dict[str, Tensor]]]:
    """In here each of `engines` makes one update, or none; its gradients are then in the table that is given.

    Engine's name -> parameter's name -> gradient. All ranks call it together, for with ZeRO each has a part of them;
    the table is the same on all. The update is what it would have been without.
    """
    taken: dict[str, dict[str, Tensor]] = {}
    with ExitStack() as stack:
        for name, engine in engines.items():
            stack.enter_context(_watched(name, engine, taken))
        yield taken


@contextmanager
def _watched(name: str, engine: Any, taken: dict[str, dict[str, Tensor]]) -> Iterator[None]:
    """`descend` checks the gradient between the last backward of an update and the update: then it is read."""
    check = engine.check_gradient

    def read_and_check() -> None:
        scale = _loss_scale(engine)
        taken[name] = {parameter: gradient / scale for parameter, gradient in _gradients(engine)}
        check()

    engine.check_gradient = read_and_check
    try:
        yield
    finally:
        engine.check_gradient = check


def _loss_scale(engine: Any) -> float:
    if engine.loss_scaling is not None:  # FP16 without ZeRO
        return engine.loss_scaling.scale
    scaler = getattr(getattr(engine, "_accelerator", None), "scaler", None)  # at FP16
    if scaler is not None:
        return float(scaler.get_scale())
    return float(getattr(engine.optimizer, "loss_scale", 1.0))  # ZeRO


def _gradients(engine: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in engine.module.named_parameters():
        gradient = _full(parameter)
        if gradient is not None:
            yield name, gradient.detach().float()


def _full(parameter: nn.Parameter) -> Tensor | None:
    """The gradient, collected from all ranks where DeepSpeed has spread it over them; None where there is none."""
    if not parameter.requires_grad:
        return None
    if parameter.grad is not None and getattr(parameter, "_hp_grad", None) is None:
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)
