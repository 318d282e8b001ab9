"""DeepSpeed's engine, mended where 0.19.8 lets a gradient that is not finite through or scales FP16's loss wrongly."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.engine.schedules import DEEPSPEED_WARMUPS

Schedule = Callable[[torch.optim.Optimizer], Any]


def deepspeed_engine(module: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule | None,
                     ds_config: Mapping[str, Any], ranks: Ranks) -> Any:
    """DeepSpeed's engine for a resolved ds_config, with what `pipeline.engine.engine` needs of every engine.

    `schedule` builds the learning rate schedule; None: what the ds_config says is left to DeepSpeed.
    """
    deepspeed = _import_deepspeed(ranks)
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    config = {"zero_allow_untested_optimizer": True,  # all of ours work element by element, as ZeRO needs it
              **copy.deepcopy(dict(ds_config))}
    config.pop("optimizer")
    if schedule is not None and config["scheduler"]["type"] not in DEEPSPEED_WARMUPS:
        config.pop("scheduler")  # DeepSpeed knows none of torch's; of its own it keeps a note in its files
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, lr_scheduler=schedule,
                                          dist_init_required=False)
    except UserError:
        raise
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise UserError(f"DeepSpeed refuses the ds_config: {' '.join(str(error).split())}") from error
    engine._copy_recovery_script = lambda *_: None  # a script beside every checkpoint, written past our error handling
    engine.found_nonfinite = engine.nonfinite_steps = engine.loss_scaling = None
    engine.own_gradient_norm = float("nan")
    engine.check_gradient = lambda: None  # DeepSpeed does, but in the one mode below
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        engine.optimizer.overflow_checker.has_overflow_serial = _overflows
        engine.loss_scaling = LossScaling(engine.optimizer)
    if not engine.zero_optimization() and isinstance(engine.optimizer, torch.optim.Optimizer):
        _guard(engine, ranks)
    return engine


def _import_deepspeed(ranks: Ranks) -> Any:
    """DeepSpeed, quiet, on the process group that there is."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for handler in deepspeed.utils.logger.handlers:
        handler.setLevel(logging.ERROR)
    # Its shared-memory collectives between CPU ranks are C++ built on first use, under a lock that a killed process
    # leaves behind for ever. Gloo does the same work without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


def _guard(engine: Any, ranks: Ranks) -> None:
    """For FP32 at ZeRO stage 0, where DeepSpeed would write a NaN into weights and moments for good."""
    if not engine.optimizer.defaults.get("fused"):
        raise UserError(f"optimizer {type(engine.optimizer).__name__} at FP32 and ZeRO stage 0 has no guard against "
                        "NaN; choose one of Adam, AdamW, SGD, or zero_optimization.stage 1, or --runtime accelerate")
    engine.found_nonfinite = torch.zeros((), device=ranks.device)
    engine.nonfinite_steps = torch.zeros((), device=ranks.device)
    engine.optimizer.found_inf = engine.found_nonfinite  # fused optimizers leave everything alone where it is set
    engine.check_gradient = partial(_check_gradient, engine)


def _check_gradient(engine: Any) -> None:
    norms = torch._foreach_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.own_gradient_norm = torch.stack(norms).norm()
    engine.found_nonfinite.copy_(~torch.isfinite(engine.own_gradient_norm))
    engine.nonfinite_steps += engine.found_nonfinite


class LossScaling:
    """Loss scaling at FP16 and ZeRO stage 0, where DeepSpeed 0.19.8 divides gradients by a scale no loss ever had.

    Its `engine.backward` scales for ZeRO's optimizers alone (deepspeed pull request 8393), and its optimizer lets the
    scale grow before it divides by it. Here the loss is scaled, and the scale grows after the update.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._update_scale = optimizer, optimizer._update_scale
        optimizer._update_scale = lambda skip: self._update_scale(True) if skip else None

    @property
    def scale(self) -> float:
        """The factor of the loss."""
        scaling = self._optimizer.loss_scale_config
        return float(scaling.cur_scale) if scaling.use_grad_scaling else 1.0

    def finish(self) -> float:
        """After an update: let the scale grow if it is time. Returns the update's gradient norm, before clipping."""
        norm = float(self._optimizer._global_grad_norm) / self.scale
        if not self._optimizer.overflow:
            self._update_scale(False)
        return norm


def _overflows(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a gradient is not finite: one wait for the device, where DeepSpeed's own waits once a parameter."""
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None], float("inf"))
    return not bool(torch.isfinite(torch.stack(norms)).all())


# What DeepSpeed's `comms_logger` has counted: how often, how much and how long ranks have spoken to each other.


def read_comms() -> dict[str, float]:
    """Of this rank since it was read last, for each operation: calls, megabytes, milliseconds, bus bandwidth in Gbit/s.

    `{"all_reduce_calls": 50, "all_reduce_mb": 68.4, "all_reduce_ms": 31.0, "all_reduce_gbps": 35.3}`. DeepSpeed itself
    only adds to its lists, call by call.
    """
    import deepspeed.comm.comm as comm

    values: dict[str, float] = {}
    for operation, sizes in comm.comms_logger.get_raw_data().items():
        name = re.sub(r"\W+", "_", operation).strip("_")
        calls = sum(count for count, *_ in sizes.values())
        milliseconds = sum(sum(times) for _, times, *_ in sizes.values())
        gigabits = sum(rate * time for _, times, _, rates in sizes.values()
                       for rate, time in zip(rates, times, strict=True))
        values |= {f"{name}_calls": calls, f"{name}_ms": round(milliseconds, 3),
                   f"{name}_mb": round(sum(size * count for size, (count, *_) in sizes.items()) / 1e6, 3),
                   f"{name}_gbps": round(gigabits / max(milliseconds, 1e-9), 3)}
    comm.comms_logger.reset_data()
    return values
