"""The one door to the two runtimes, DeepSpeed and Accelerate. The project sees an `Engine` and not
whose it is."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.config.ds_config import (
    LEFT_TO_DEEPSPEED,
    batch_sizes,
    check_accelerate,
    check_optimizer,
    precision_of,
)
from pipeline.distributed.ranks import Ranks
from pipeline.engine.accelerate_engine import AccelerateEngine
from pipeline.engine.deepspeed_engine import DeepSpeedEngine
from pipeline.engine.schedules import AUTO, Schedule, build_schedule
from pipeline.engine.triton_check import why_no_triton

FUSED = (
    "Adam",
    "AdamW",
    "SGD",
)  # have one kernel for all parameters, and leave them alone where `found_inf` is set


def resolve_ds_config(
    config: Mapping[str, Any],
    *,
    world_size: int,
    total_steps: int,
    device: torch.device,
    runtime: str = "deepspeed",
) -> tuple[dict[str, Any], str, str]:
    """ds_config.json as the runtime will get it on these ranks, the precision, and why it is
    another than asked for.

    The precision is as `precision_of` names it. Fills in the micro-batch and the accumulation,
    `"total_num_steps": "auto"` by `total_steps`, which are updates of this network, and FP32 for
    FP16 where there is no GPU. The optimizer section stays for `build_engine`.
    """
    resolved = copy.deepcopy(dict(config))
    micro, accumulation = batch_sizes(config, world_size)
    resolved |= {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    resolved.setdefault("steps_per_print", 1 << 60)
    schedule = resolved.get("scheduler", {}).get("params", {})
    is_fitted = schedule.get("total_num_steps") == "auto"
    schedule.update({key: total_steps for key in AUTO if schedule.get(key) == "auto"})
    if is_fitted:
        schedule["warmup_num_steps"] = max(
            1, min(schedule.get("warmup_num_steps", 1000), total_steps // 2)
        )
    why = ""
    if device.type == "cpu" and resolved.pop("fp16", {}).get("enabled"):
        why = " (there is no GPU, and FP16 is for GPUs)"
    return resolved, precision_of(config, on_cpu=device.type == "cpu", runtime=runtime), why


class Engine(Protocol):
    """A network that is trained on these ranks: its weights, its optimizer, its learning rate.

    Calling it runs the network. Then come `backward` for each micro-batch, `check_gradient` at the
    end of an accumulation, and `step` after every `backward`: see `backward_and_step`.
    """

    before_update: list[
        Callable[[], None]
    ]  # called between the last backward of an update and the update
    weights: list[Tensor]
    """In the order of `module.parameters()`: what the optimizer updates, FP32 where the network
    itself has 16 bits, or the parameters themselves where no rank has all of it."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def optimizer(self) -> Any:
        """torch's, or the runtime's around it; both have `param_groups` and `state_dict`."""

    @property
    def lr_scheduler(self) -> Any: ...
    @property
    def gradient_norm(self) -> Tensor | float:
        """L2 norm of the last update's gradient, over all ranks and before clipping; NaN before the
        first."""

    @property
    def was_skipped(self) -> Tensor | bool:
        """Whether the last update was left out because its gradient was not finite."""

    @property
    def skipped_steps(self) -> int:
        """How many were; at FP32 those of this process. Waits for the device."""

    @property
    def loss_scale(self) -> float:
        """The factor of gradients between backward and update; 1 but for FP16."""

    def __call__(self, *inputs: Any) -> Any: ...
    def get_lr(self) -> list[float]: ...
    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch under way completes an update."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` / accumulation; at a boundary it becomes the mean over
        ranks."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's whole gradient before the update, times `loss_scale`. All ranks call it
        together."""

    def check_gradient(self) -> None:
        """Look whether the update's gradient is finite, unless `step` does."""

    def step(self) -> None:
        """After a micro-batch; at a boundary the update, unless its gradient is not finite."""

    def save(self, directory: str, name: str, files: Any) -> None:
        """Write all of it to `directory`/`name` through `files`. On return every rank is done."""

    def load(self, directory: str, name: str, files: Any) -> bool:
        """Put back what `save` wrote, on this or another number of ranks; False where there is
        nothing."""

    def destroy(self) -> None: ...


def build_engine(
    module: nn.Module, ds_config: Mapping[str, Any], ranks: Ranks, runtime: str = "deepspeed"
) -> Engine:
    """An engine of `runtime` (deepspeed or accelerate) around `module` for a resolved ds_config.

    The optimizer is torch's own, built from the optimizer section: the same on every device, and
    nothing to compile.
    """
    module.to(ranks.device)
    optimizer = build_optimizer(
        ds_config["optimizer"], [p for p in module.parameters() if p.requires_grad]
    )
    schedule = _schedule(ds_config.get("scheduler"), runtime)
    with quiet():
        if runtime == "accelerate":
            check_accelerate(ds_config)
            return AccelerateEngine(module, optimizer, schedule, ds_config, ranks)
        return DeepSpeedEngine(module, optimizer, schedule, ds_config, ranks)


def _schedule(
    section: Mapping[str, Any] | None, runtime: str
) -> Callable[[torch.optim.Optimizer], Schedule] | None:
    """What builds the schedule for an optimizer; None where there is none, or where it is left to
    DeepSpeed."""
    if section is None:
        return None
    if section["type"] in LEFT_TO_DEEPSPEED:
        return None
    return partial(build_schedule, section, writes_as_deepspeed=runtime == "deepspeed")


def build_optimizer(
    section: Mapping[str, Any], parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    check_optimizer(section)
    name = section["type"]
    params = dict(section.get("params", {}))
    for key in ("torch_adam", "fused", "foreach"):  # how, not what: chosen here
        params.pop(key, None)
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    if name in FUSED:
        params["fused"] = True
    try:
        return getattr(torch.optim, name)(parameters, **params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"ds_config: optimizer {name}: {error}") from error


def backward_and_step(engine: Engine, loss: Tensor) -> None:
    """Backward and, at an accumulation boundary, one update. Gradients that are not finite change
    nothing.

    Gradients are already summed over ranks when they are judged, so every rank judges the same. At
    FP32 nothing here waits for the device; with weights of 16 bits the gradient's norm is waited
    for, once an update.
    """
    at_boundary = engine.is_gradient_accumulation_boundary()
    engine.backward(loss)
    if at_boundary:
        for look in engine.before_update:
            look()
        engine.check_gradient()
    engine.step()
    if at_boundary:
        _average_statistics(engine.module)


def _average_statistics(module: nn.Module) -> None:
    """The mean over ranks of batch norm's running statistics, in place: each rank has seen its own
    samples only."""
    if dist.get_world_size() == 1:
        return
    statistics = [
        buffer
        for part in module.modules()
        if isinstance(part, nn.BatchNorm2d)
        for buffer in (part.running_mean, part.running_var)
        if buffer is not None
    ]
    if not statistics:
        return
    flat = torch.cat([buffer.flatten() for buffer in statistics]) / dist.get_world_size()
    dist.all_reduce(flat)
    torch._foreach_copy_(
        statistics,
        [
            part.view_as(buffer)
            for part, buffer in zip(
                flat.split([buffer.numel() for buffer in statistics]), statistics, strict=True
            )
        ],
    )


def step_was_skipped(engines: Iterable[Engine]) -> Tensor | bool:
    """Whether the update that one of `engines` just made was left out because a gradient was not
    finite."""
    flags = [engine.was_skipped for engine in engines]
    if all(isinstance(flag, bool) for flag in flags):
        return any(flags)
    return torch.stack([torch.as_tensor(flag).bool() for flag in flags]).any()


def observe(engine: Engine, psnr: float) -> None:
    """Tell a validation's PSNR to the schedule that lowers the rate where it no longer rises."""
    if isinstance(engine.lr_scheduler, Schedule):
        engine.lr_scheduler.observe(psnr)


def compile_module(module: nn.Module, *, channels_last: bool, mode: str | None = None) -> None:
    """torch.compile with Inductor, in place: names in the state dict stay as they are.

    Inductor gives up channels_last in backward graphs (pytorch #188236); told to keep it, it is 1.5
    times faster on a CPU. Told to keep contiguous, it would still choose channels_last for wide
    convolutions, but for the second switch. `mode`: "reduce-overhead" replays CUDA graphs: what the
    module returned is then overwritten by its next call.
    """
    import torch._inductor.config

    torch._inductor.config.force_layout_optimization = channels_last
    torch._inductor.config.layout_optimization = channels_last
    module.compile(backend="inductor", dynamic=False, mode=mode)


def be_deterministic(is_on: bool) -> None:
    """Ask torch, cuDNN, cuBLAS and Inductor for the same bits in every run on the same device, or
    not.

    cuBLAS reads its variable when it is first used. Operators that cannot give the same bits warn.
    """
    if not is_on and not torch.are_deterministic_algorithms_enabled():
        return
    from torch._inductor import config as inductor

    if is_on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(is_on, warn_only=True)
    torch.backends.cudnn.deterministic = is_on
    inductor.deterministic = is_on


def why_not_compiled(device: torch.device) -> str:
    """Empty if Inductor can work here, else what it lacks. On a GPU a small kernel is compiled,
    within a second or two."""
    if device.type == "cuda":
        return why_no_triton(device)
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


# The gradient of an update, parameter by parameter: whole, in FP32, as it was before clipping and
# loss scaling.


@contextmanager
def gradients_of_update(engines: Mapping[str, Engine]) -> Iterator[dict[str, dict[str, Tensor]]]:
    """In here each of `engines` makes one update, or none; its gradients are then in the table that
    is given.

    Engine's name -> parameter's name -> gradient. All ranks call it together, for with ZeRO each
    has a part of them; the table is the same on all. The update is what it would have been without.
    """
    found: dict[str, dict[str, Tensor]] = {}

    def look(name: str, engine: Engine) -> None:
        scale = engine.loss_scale
        found[name] = {
            parameter: gradient.detach().float() / scale
            for parameter, gradient in engine.gradients()
        }

    looks = [(engine, partial(look, name, engine)) for name, engine in engines.items()]
    for engine, own in looks:
        engine.before_update.append(own)
    try:
        yield found
    finally:
        for engine, own in looks:
            engine.before_update.remove(own)
