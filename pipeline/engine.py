"""The one door to the distributed runtime, with `ranks` and `engine_files`. Nothing else imports DeepSpeed.

What the rest of the project uses of a DeepSpeed engine is: calling it, `module`, `backward`, `step`,
`is_gradient_accumulation_boundary`, `save_checkpoint` and `load_checkpoint`; `descend` is one micro-batch of it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.cli import UserError, nearest
from pipeline.ranks import Ranks
from pipeline.recipe import batch_sizes
from pipeline.schedules import AUTO, SCHEDULES, Schedule, build_schedule, check_schedule

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD, "RAdam": torch.optim.RAdam,
    "NAdam": torch.optim.NAdam,
}
FUSED = ("Adam", "AdamW", "SGD")  # have one kernel for all parameters, and leave them alone where `found_inf` is set


def resolve_ds_config(config: Mapping[str, Any], *, world_size: int, total_steps: int,
                      device: torch.device) -> tuple[dict[str, Any], str, str]:
    """ds_config.json as DeepSpeed will get it on these ranks, the precision, and why it is another one than asked for.

    Fills in the micro-batch and the accumulation, `"total_num_steps": "auto"` by `total_steps`, which are updates of
    this network, and FP32 for FP16 where there is no GPU. The optimizer section stays for `build_engine`.
    """
    resolved = copy.deepcopy(dict(config))
    micro, accumulation = batch_sizes(config, world_size)
    resolved |= {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    resolved.setdefault("steps_per_print", 1 << 60)
    schedule = resolved.get("scheduler", {}).get("params", {})
    is_fitted = schedule.get("total_num_steps") == "auto"
    schedule.update({key: total_steps for key in AUTO if schedule.get(key) == "auto"})
    if is_fitted:
        schedule["warmup_num_steps"] = max(1, min(schedule.get("warmup_num_steps", 1000), total_steps // 2))
    why = ""
    if device.type == "cpu" and resolved.pop("fp16", {}).get("enabled"):
        why = " (there is no GPU, and FP16 is for GPUs; for BF16 say ds.fp16.enabled=false ds.bf16.enabled=true)"
    if resolved.get("bf16", {}).get("enabled"):
        return resolved, "BF16", why
    return resolved, "FP16" if resolved.get("fp16", {}).get("enabled") else "FP32", why


def build_engine(module: nn.Module, ds_config: Mapping[str, Any], ranks: Ranks) -> Any:
    """A DeepSpeed engine around `module` for a resolved ds_config.

    The optimizer is torch's own, built from the optimizer section: the same on every device, and nothing to compile.
    """
    import deepspeed
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    config = {"zero_allow_untested_optimizer": True,  # all of OPTIMIZERS work element by element, as ZeRO needs it
              **copy.deepcopy(dict(ds_config))}
    section = config.pop("optimizer")
    optimizer = build_optimizer(section, [p for p in module.parameters() if p.requires_grad])
    schedule = None
    if "scheduler" in config:
        check_schedule(config["scheduler"])
        if config["scheduler"]["type"] in SCHEDULES:
            schedule = partial(build_schedule, config.pop("scheduler"))
    with quiet():
        try:
            engine, *_ = deepspeed.initialize(model=module.to(ranks.device), optimizer=optimizer, config=config,
                                              lr_scheduler=schedule, dist_init_required=False)
        except UserError:
            raise
        except Exception as error:  # DeepSpeed has no class of its own for what it refuses
            raise UserError(f"DeepSpeed refuses the ds_config: {' '.join(str(error).split())}") from error
    engine._copy_recovery_script = lambda *_: None  # a script beside every checkpoint, written past our error handling
    engine.found_nonfinite = engine.nonfinite_steps = engine.loss_scaling = None
    engine.own_gradient_norm = float("nan")
    engine.statistics = [buffer for module in engine.module.modules() if isinstance(module, nn.BatchNorm2d)
                         for buffer in (module.running_mean, module.running_var) if buffer is not None]
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        engine.optimizer.overflow_checker.has_overflow_serial = _overflows
        engine.loss_scaling = LossScaling(engine.optimizer)
    if not engine.zero_optimization() and isinstance(engine.optimizer, torch.optim.Optimizer):
        # The one mode in which DeepSpeed would write a NaN into weights and moments for good.
        if section["type"] not in FUSED:
            raise UserError(f"optimizer {section['type']} at FP32 and ZeRO stage 0 has no guard against NaN; choose "
                            f"one of {', '.join(FUSED)}, or zero_optimization.stage 1")
        engine.found_nonfinite = torch.zeros((), device=ranks.device)
        engine.nonfinite_steps = torch.zeros((), device=ranks.device)
        engine.optimizer.found_inf = engine.found_nonfinite
    return engine


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


def build_optimizer(section: Mapping[str, Any], parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    name = section["type"]
    if name not in OPTIMIZERS:
        raise UserError(f"ds_config: no optimizer {name!r}{nearest(name, OPTIMIZERS)}")
    params = dict(section.get("params", {}))
    for key in ("torch_adam", "fused", "foreach"):  # how, not what: chosen here
        params.pop(key, None)
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    if name in FUSED:
        params["fused"] = True
    try:
        return OPTIMIZERS[name](parameters, **params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"ds_config: optimizer {name}: {error}") from error


def descend(engine: Any, loss: Tensor) -> None:
    """Backward and, at an accumulation boundary, one update. Gradients that are not finite change nothing.

    Gradients are already summed over ranks when they are judged, so every rank judges the same. At FP32 nothing here
    waits for the device; at FP16 DeepSpeed's loss scaling does, once an update.
    """
    scaling, at_boundary = engine.loss_scaling, engine.is_gradient_accumulation_boundary()
    engine.backward(loss if scaling is None else loss * scaling.scale)
    if engine.found_nonfinite is not None and at_boundary:
        norms = torch._foreach_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        engine.own_gradient_norm = torch.stack(norms).norm()
        engine.found_nonfinite.copy_(~torch.isfinite(engine.own_gradient_norm))
        engine.nonfinite_steps += engine.found_nonfinite
    engine.step()
    if scaling is not None and at_boundary:
        engine.own_gradient_norm = scaling.finish()
    if at_boundary:
        _average(engine.statistics)


def _average(statistics: list[Tensor]) -> None:
    """The mean over ranks of batch norm's running statistics, in place: each rank has seen its own samples only."""
    if not statistics or dist.get_world_size() == 1:
        return
    flat = torch.cat([buffer.flatten() for buffer in statistics]) / dist.get_world_size()
    dist.all_reduce(flat)
    torch._foreach_copy_(statistics, [part.view_as(buffer) for part, buffer in zip(
        flat.split([buffer.numel() for buffer in statistics]), statistics, strict=True)])


def gradient_norm(engine: Any) -> Tensor | float:
    """L2 norm of the last update's gradient over all parameters and ranks, before clipping; NaN before the first."""
    if engine.found_nonfinite is not None or engine.loss_scaling is not None:
        return engine.own_gradient_norm
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else norm


def step_was_skipped(engines: Iterable[Any]) -> Tensor | bool:
    """Whether the update that one of `engines` just made was left out because a gradient was not finite."""
    flags = [engine.found_nonfinite if engine.found_nonfinite is not None else not engine.was_step_applied()
             for engine in engines]
    if all(isinstance(flag, bool) for flag in flags):
        return any(flags)
    return torch.stack([torch.as_tensor(flag).bool() for flag in flags]).any()


def observe(engine: Any, psnr: float) -> None:
    """Tell a validation's PSNR to the schedule that lowers the rate where it no longer rises."""
    if isinstance(engine.lr_scheduler, Schedule):
        engine.lr_scheduler.observe(psnr)


def skipped_steps(engine: Any) -> int:
    """Updates left out because a gradient was not finite; at FP32 those of this process. Waits for the device."""
    return engine.skipped_steps + (int(engine.nonfinite_steps) if engine.nonfinite_steps is not None else 0)


def compile_module(module: nn.Module, *, channels_last: bool) -> None:
    """torch.compile with Inductor, in place: names in the state dict stay as they are.

    Inductor gives up channels_last in backward graphs (pytorch #188236); told to keep it, it is 1.5 times faster on a
    CPU.
    """
    import torch._inductor.config

    torch._inductor.config.force_layout_optimization = channels_last
    module.compile(backend="inductor", dynamic=False)


def why_not_compiled(device: torch.device) -> str:
    """Empty if Inductor can work here, else what it lacks."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Triton is missing"
    import sysconfig

    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler (Debian: apt install g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers are missing (Debian: apt install python3-dev)"
    return ""


@contextmanager
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
