"""Engine on DeepSpeed, which works around five faults of DeepSpeed 0.19.8.

- In FP32 with ZeRO stage 0, updates with non-finite gradients are not skipped.
- In FP16 with ZeRO stage 0, the loss is scaled wrongly.
- It synchronises with the GPU twice per micro-batch to measure its own speed.
- In FP16 and BF16 with ZeRO stage 0, it updates the network parameter by parameter: 1,800 small
  kernels for VapSR, between which the GPU is idle.
- There, it also starts with an update for gradients of zero, which decays the weights and counts.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.engine.optimizers.foreach import averaged, paused, skips_nonfinite
from pipeline.engine.schedules import DEEPSPEED_WARMUPS, Schedule

BuildSchedule = Callable[[torch.optim.Optimizer], Schedule]
SMALL_NETWORK = 4_000_000
"""Largest number of parameters for which 16-bit gradients are summed over ranks in FP32: the extra
traffic hardly matters, and a sum over N ranks does not overflow log2(N) bits sooner."""


class DeepSpeedEngine:
    """DeepSpeed's engine for a resolved ds_config; implements `pipeline.engine.engine.Engine`.

    `build_schedule` makes the learning rate schedule; None leaves it to DeepSpeed.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        build_schedule: BuildSchedule | None,
        ds_config: Mapping[str, Any],
        ranks: Ranks,
    ) -> None:
        self._inner = inner = _initialise(module, optimizer, build_schedule, ds_config, ranks)
        self.before_update: list[Callable[[], None]] = []
        # Norm of the last update's gradient, where DeepSpeed does not provide it.
        self._norm: Tensor | float = float("nan")
        # 1 if the last update was skipped, where this class guards against NaN.
        self._found_nonfinite: Tensor | None = None
        self._nonfinite_steps: Tensor | None = None
        self._scaling = None
        self._updated: list[Tensor] = list(module.parameters())
        self._own = optimizer
        # Parameters whose missing gradients must be filled with zeros here.
        self._lacking: list[nn.Parameter] = []
        from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

        if isinstance(inner.optimizer, FP16_UnfusedOptimizer):
            inner.optimizer.step = ForeachUpdate(inner.optimizer)
            self._scaling = LossScaling(inner.optimizer)
            pairs = [
                pair
                for groups in zip(
                    inner.optimizer.fp16_groups, inner.optimizer.fp32_groups, strict=True
                )
                for pair in zip(*groups, strict=True)
            ]
            # The moving average uses the FP32 masters: in 16 bits, rounding would swallow most of
            # its small changes.
            masters = {id(half): master for half, master in pairs}
            self._updated = [masters.get(id(parameter), parameter) for parameter in self._updated]
        if not inner.zero_optimization():
            # With one rank, skip the exchange: DeepSpeed would copy every gradient to this rank
            # and back.
            if ranks.world_size == 1:
                inner.enable_backward_allreduce = False
                self._lacking = [
                    parameter for parameter in module.parameters() if parameter.requires_grad
                ]
            inner.allreduce_and_copy = partial(_reduce, inner)
        # In FP32 with ZeRO stage 0, DeepSpeed would write NaN into weights and moments.
        if not inner.zero_optimization() and isinstance(inner.optimizer, torch.optim.Optimizer):
            if not skips_nonfinite(optimizer):
                raise UserError(
                    f"optimizer {type(optimizer).__name__} in FP32 with ZeRO stage 0 has no "
                    "guard against NaN; choose another one, such as AdamW, or "
                    "zero_optimization.stage 1, or --runtime accelerate"
                )
            self._found_nonfinite = torch.zeros((), device=ranks.device)
            self._nonfinite_steps = torch.zeros((), device=ranks.device)
            inner.clip_fp32_gradients = self._clip
            # The optimizer changes nothing where it is set.
            inner.optimizer.found_inf = self._found_nonfinite

    def __call__(self, *inputs: Any) -> Any:
        return self._inner(*inputs)

    @property
    def module(self) -> nn.Module:
        return self._inner.module

    @property
    def optimizer(self) -> Any:
        return self._inner.optimizer

    @property
    def weights(self) -> list[Tensor]:
        return averaged(self._own, self._updated)

    @property
    def lr_scheduler(self) -> Any:
        return self._inner.lr_scheduler

    @property
    def gradient_norm(self) -> Tensor | float:
        if self._found_nonfinite is not None or self._scaling is not None:
            return self._norm
        norm = self._inner.get_global_grad_norm()
        return float("nan") if norm is None else norm

    @property
    def was_skipped(self) -> Tensor | bool:
        return (
            not self._inner.was_step_applied()
            if self._found_nonfinite is None
            else self._found_nonfinite
        )

    @property
    def skipped_steps(self) -> int:
        return self._inner.skipped_steps + (
            0 if self._nonfinite_steps is None else int(self._nonfinite_steps)
        )

    @property
    def loss_scale(self) -> float:
        if self._scaling is not None:
            return self._scaling.scale
        # ZeRO's optimizers have this attribute.
        return float(getattr(self._inner.optimizer, "loss_scale", 1.0))

    def get_lr(self) -> list[float]:
        return self._inner.get_lr()

    def is_gradient_accumulation_boundary(self) -> bool:
        return self._inner.is_gradient_accumulation_boundary()

    def backward(self, loss: Tensor) -> None:
        self._inner.backward(loss if self._scaling is None else loss * self._scaling.scale)
        if self.is_gradient_accumulation_boundary():
            # Zeros, which DeepSpeed's exchange between ranks would have filled in.
            for parameter in self._lacking:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.gradients`; collects from all ranks what ZeRO has partitioned."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                is_plain = (
                    parameter.grad is not None and getattr(parameter, "_hp_grad", None) is None
                )
                gradient = parameter.grad if is_plain else safe_get_full_grad(parameter)
                if gradient is not None:
                    yield name, gradient

    def check_gradient(self) -> None:
        """Check the gradient in FP32 with ZeRO stage 0; otherwise DeepSpeed does so in `step`."""
        if self._found_nonfinite is None or self._nonfinite_steps is None:
            return
        # The gradients have been summed over ranks, so all ranks find the same norm. It stays on
        # the device: FP32 steps never wait for it.
        norms = torch._foreach_norm(
            [p.grad for p in self.module.parameters() if p.grad is not None]
        )
        self._norm = torch.stack(norms).square().sum().sqrt()
        self._found_nonfinite.copy_(~torch.isfinite(self._norm))
        self._nonfinite_steps += self._found_nonfinite

    def _clip(self) -> None:
        """Clip the gradient of an FP32 update by the norm that `check_gradient` found.

        This takes a few kernels for all parameters, and every rank has found the same norm.
        DeepSpeed's own function would compute it again, parameter by parameter and over ranks.
        """
        # The small term is torch's, see `torch.nn.utils.clip_grad_norm_`.
        clip = torch.clamp(
            self._inner.gradient_clipping() / (torch.as_tensor(self._norm) + 1e-6), max=1.0
        )
        torch._foreach_mul_([p.grad for p in self.module.parameters() if p.grad is not None], clip)

    def step(self) -> None:
        # Asked before, because `step` moves on to the next micro-batch.
        is_update = self.is_gradient_accumulation_boundary()
        self._inner.step()
        if self._scaling is not None and is_update:
            self._norm = self._scaling.finish()

    def save(self, directory: str, name: str, files: Any) -> None:
        # DeepSpeed writes its files in place, and points to the newest checkpoint before all ranks
        # have written theirs. So it writes into memory here, without the pointer, and `Saver`
        # writes the files.
        self._inner.checkpoint_engine = files
        self._inner.save_checkpoint(directory, tag=name, save_latest=False)

    def load(self, directory: str, name: str, files: Any) -> bool:
        self._inner.checkpoint_engine = files
        path, _ = self._inner.load_checkpoint(directory, tag=name)
        schedule = self.lr_scheduler
        if path is not None and schedule is not None and not isinstance(schedule, Schedule):
            # DeepSpeed's own schedule: set the rate again, because its length may have changed.
            for group, rate in zip(self.optimizer.param_groups, schedule.get_lr(), strict=True):
                group["lr"] = rate
        return path is not None

    def zero_shapes(self) -> Any:
        """Return the parameters' shapes by name, per group, in the order of ZeRO's flat tensors."""
        return self._inner._get_zero_param_shapes()

    def destroy(self) -> None:
        self._inner.destroy()


def _initialise(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    build_schedule: BuildSchedule | None,
    ds_config: Mapping[str, Any],
    ranks: Ranks,
) -> Any:
    """Build DeepSpeed's own engine; raise `UserError` if it rejects the ds_config."""
    deepspeed = _import_deepspeed(ranks)
    from deepspeed.runtime.config import DeepSpeedConfigError

    config = {
        # ZeRO needs optimizers that work element by element; the ds_config's check refuses others.
        "zero_allow_untested_optimizer": True,
        # The throughput timer synchronises with the GPU twice per micro-batch.
        "timers": {"throughput": {"enabled": False}},
        **copy.deepcopy(dict(ds_config)),
    }
    is_plain = not config.get("zero_optimization", {}).get("stage", 0)
    if is_plain and sum(parameter.numel() for parameter in module.parameters()) <= SMALL_NETWORK:
        config.setdefault("communication_data_type", "fp32")
    config.pop("optimizer")
    if build_schedule is not None and config["scheduler"]["type"] not in DEEPSPEED_WARMUPS:
        # DeepSpeed does not know torch's schedules. For its own, it records the name in its files.
        config.pop("scheduler")
    try:
        with paused(optimizer):
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=config,
                lr_scheduler=build_schedule,
                dist_init_required=False,
            )
    # `UserError` is a ValueError, but already says what to do.
    except UserError:
        raise
    except (
        DeepSpeedConfigError,
        AssertionError,
        ValueError,
        TypeError,
        KeyError,
        NotImplementedError,
    ) as error:
        raise UserError(
            f"DeepSpeed rejects the ds_config: {' '.join(str(error).split())}"
        ) from error
    # DeepSpeed would write a script next to every checkpoint, bypassing our error handling.
    engine._copy_recovery_script = lambda *_: None
    # DeepSpeed would glob for the files of all model-parallel ranks and find none in a folder whose
    # name contains `[`, `*` or `?`. There is always one such rank.
    engine._get_all_ckpt_names = lambda directory, tag: [
        engine._get_ckpt_name(directory, tag, mp_placeholder="00")
    ]
    return engine


def _import_deepspeed(ranks: Ranks) -> Any:
    """Import DeepSpeed, silence it, and attach it to the existing process group."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for handler in deepspeed.utils.logger.handlers:
        handler.setLevel(logging.ERROR)
    # None of DeepSpeed's C++ ops are used. Probing which could be built would start compilers and
    # query GPUs. Its shared-memory collectives between CPU ranks would be built on first use, under
    # a lock file that a killed process leaves behind, on which every later start would hang.
    deepspeed.ops.__compatible_ops__ = {}
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


class LossScaling:
    """Loss scaling in FP16 with ZeRO stage 0, where DeepSpeed 0.19.8 unscales by the wrong factor.

    DeepSpeed's `engine.backward` scales the loss for ZeRO's optimizers only (deepspeed pull request
    8393), and its optimizer raises the scale before it divides the gradients by it. This class
    scales the loss, and raises the scale after the update.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._update_scale = optimizer, optimizer._update_scale
        optimizer._update_scale = lambda skip: self._update_scale(True) if skip else None

    @property
    def scale(self) -> float:
        """The factor by which the loss is multiplied."""
        scaling = self._optimizer.loss_scale_config
        return float(scaling.cur_scale) if scaling.use_grad_scaling else 1.0

    def finish(self) -> float:
        """Finish an update: raise the scale if it is time; return the norm before clipping."""
        # Read the norm first: its gradients were scaled by this update's factor, which may be
        # raised below.
        norm = float(self._optimizer._global_grad_norm) / self.scale
        if not self._optimizer.overflow:
            self._update_scale(False)
        return norm


class ForeachUpdate:
    """`FP16_UnfusedOptimizer.step` in a handful of kernels, waiting for the device once.

    Skips what DeepSpeed's own step skips and otherwise makes the same update, except that the norm
    is summed in another order. The wait is for the norm, which clipping needs; a non-finite norm
    counts as an overflow.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._halves = [parameter for group in optimizer.fp16_groups for parameter in group]
        self._masters = [parameter for group in optimizer.fp32_groups for parameter in group]
        self._gradients = [torch.zeros_like(master) for master in self._masters]

    @torch.no_grad()
    def __call__(self) -> bool:
        """Update weights and moments unless a gradient is not finite; return whether one was."""
        optimizer, gradients = self._optimizer, self._gradients
        halves = [
            half.grad if half.grad is not None else torch.zeros_like(half) for half in self._halves
        ]
        # Into memory that is kept: the optimizer needs FP32 gradients in every update.
        torch._foreach_copy_(gradients, halves)
        # The norm includes the loss scale. Reading it is the only wait for the device.
        norm = float(torch.stack(torch._foreach_norm(gradients)).norm())
        optimizer.overflow = not math.isfinite(norm)
        if optimizer.overflow:
            return optimizer._skip_invalid_grad_norm()
        optimizer._global_grad_norm = norm
        # DeepSpeed raises the scale here, before it divides by it. `LossScaling` has replaced this
        # function and raises the scale after the update.
        optimizer._update_scale(False)
        torch._foreach_mul_(
            gradients, 1.0 / optimizer.unscale_and_clip_grads(norm, apply_scale=False)
        )
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient
        optimizer.optimizer.step()
        for master in self._masters:
            master.grad = None
        torch._foreach_copy_(self._halves, self._masters)
        return False


def _reduce(
    inner: Any, gradients: Sequence[Tensor], group: Any, world_size: float | None = None
) -> None:
    """Average gradients over ranks, in place, like DeepSpeed's `allreduce_and_copy`.

    DeepSpeed's function copies the gradients one by one; this one copies them together.
    """
    flat = inner.allreduce_bucket(gradients, group, world_size)
    torch._foreach_copy_(list(gradients), list(inner.unflatten(flat, gradients)))


# Statistics of DeepSpeed's `comms_logger`: number, size and duration of collectives.


def read_comms() -> dict[str, float]:
    """Return and reset this rank's statistics since the last call, for each collective.

    Calls, megabytes, milliseconds, and bus bandwidth in Gbit/s: `{"all_reduce_calls": 50,
    "all_reduce_mb": 68.4, "all_reduce_ms": 31.0, "all_reduce_gbps": 35.3}`. Without the reset,
    DeepSpeed's lists would grow with every call.
    """
    import deepspeed.comm.comm as comm

    values: dict[str, float] = {}
    for operation, sizes in comm.comms_logger.get_raw_data().items():
        name = re.sub(r"\W+", "_", operation).strip("_")
        calls = sum(count for count, *_ in sizes.values())
        milliseconds = sum(sum(times) for _, times, *_ in sizes.values())
        gigabits = sum(
            rate * time
            for _, times, _, rates in sizes.values()
            for rate, time in zip(rates, times, strict=True)
        )
        values |= {
            f"{name}_calls": calls,
            f"{name}_ms": round(milliseconds, 3),
            f"{name}_mb": round(sum(size * count for size, (count, *_) in sizes.items()) / 1e6, 3),
            f"{name}_gbps": round(gigabits / max(milliseconds, 1e-9), 3),
        }
    comm.comms_logger.reset_data()
    return values
