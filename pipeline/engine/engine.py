"""The `Engine` interface, the only access to the two runtimes, DeepSpeed and Accelerate."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.config.ds_config import (
    LEFT_TO_DEEPSPEED,
    OPTIMIZERS,
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

# Optimizers with one fused kernel for all parameters, which changes nothing where `found_inf` is
# set.
FUSED = ("Adam", "AdamW", "SGD")


def resolve_ds_config(
    config: Mapping[str, Any],
    *,
    world_size: int,
    total_steps: int,
    device: torch.device,
    runtime: str = "deepspeed",
) -> tuple[dict[str, Any], str, str]:
    """Resolve ds_config.json for a runtime and number of ranks.

    Returns the resolved configuration, the precision as `precision_of` names it, and, if that is
    not the one asked for, a text that says why. Fills in the micro-batch, the accumulation, and
    `"total_num_steps": "auto"` with `total_steps`, counted in updates of this network; replaces
    FP16 with FP32 if there is no GPU. The optimizer section is left to `build_engine`.
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
        why = " (there is no GPU, and FP16 needs one)"
    return resolved, precision_of(config, on_cpu=device.type == "cpu", runtime=runtime), why


class Engine(Protocol):
    """A network in training on these ranks, with its weights, optimizer and learning rate.

    Calling it runs the network. Each micro-batch then takes one `backward` and one `step`, with
    `check_gradient` between them at the end of an accumulation; `backward_and_step` does this.
    """

    before_update: list[Callable[[], None]]
    """Called between the last backward pass of an update and the update."""
    rate: RateFactor
    """Lowers the learning rate below what the schedule sets."""

    @property
    def weights(self) -> list[Tensor]:
        """The weights that are averaged, validated and exported, in `module.parameters()`' order.

        These are the weights that the optimizer updates: FP32 masters if the network has 16-bit
        weights, or the parameters themselves if no rank holds a whole master. A schedule-free
        optimizer gives its average instead.
        """

    @property
    def module(self) -> nn.Module: ...
    @property
    def optimizer(self) -> Any:
        """torch's optimizer or the runtime's wrapper; both have `param_groups` and `state_dict`."""

    @property
    def lr_scheduler(self) -> Any: ...
    @property
    def gradient_norm(self) -> Tensor | float:
        """L2 norm of the last update's gradient over all ranks, before clipping; NaN at first."""

    @property
    def was_skipped(self) -> Tensor | bool:
        """Whether the last update was skipped because its gradient was not finite."""

    @property
    def skipped_steps(self) -> int:
        """Number of skipped updates; in FP32 only those of this process. Waits for the device."""

    @property
    def loss_scale(self) -> float:
        """Factor of the gradients between backward and update; always 1 except in FP16."""

    def __call__(self, *inputs: Any) -> Any: ...
    def get_lr(self) -> list[float]: ...
    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch completes an update."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss` / accumulation; average it over ranks at a boundary."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and whole gradient before the update, times `loss_scale`.

        All ranks call it together.
        """

    def check_gradient(self) -> None:
        """Check whether the update's gradient is finite, unless `step` does that itself."""

    def step(self) -> None:
        """Finish a micro-batch; at a boundary, make the update if its gradient is finite."""

    def save(self, directory: str, name: str, files: Any) -> None:
        """Write the full state to `directory`/`name` through `files`; returns once all ranks have.

        All ranks call it together.
        """

    def load(self, directory: str, name: str, files: Any) -> bool:
        """Restore what `save` wrote, on any number of ranks; return False if there is nothing."""

    def destroy(self) -> None: ...


def build_engine(
    module: nn.Module, ds_config: Mapping[str, Any], ranks: Ranks, runtime: str = "deepspeed"
) -> Engine:
    """Build an engine of `runtime` (deepspeed or accelerate) around `module`.

    `ds_config` must be resolved. The optimizer is built from the optimizer section: the same on
    every device, with nothing to compile. Raises `UserError`.
    """
    module.to(ranks.device)
    optimizer = build_optimizer(
        ds_config["optimizer"], [p for p in module.parameters() if p.requires_grad]
    )
    schedule = _schedule(ds_config.get("scheduler"), runtime)
    with quiet():
        if runtime == "accelerate":
            check_accelerate(ds_config)
            engine: Any = AccelerateEngine(module, optimizer, schedule, ds_config, ranks)
        else:
            engine = DeepSpeedEngine(module, optimizer, schedule, ds_config, ranks)
    engine.rate = RateFactor(optimizer)
    return engine


class RateFactor:
    """A factor of an optimizer's learning rate, on top of its schedule.

    It is applied around the optimizer's own step and undone after it, so that neither the schedule,
    some of which derive a rate from the one before, nor a checkpoint ever sees it. At 1, as nearly
    always, nothing is done.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.value = 1.0
        self._optimizer, self._rates = optimizer, [0.0]
        self._is_hooked = False

    def set(self, value: float) -> None:
        """Set the factor of all following updates, above 0."""
        self.value = value
        if value != 1 and not self._is_hooked:
            self._is_hooked = True
            self._optimizer.register_step_pre_hook(self._lower)
            self._optimizer.register_step_post_hook(self._restore)

    def _lower(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.value

    def _restore(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate


def _schedule(
    section: Mapping[str, Any] | None, runtime: str
) -> Callable[[torch.optim.Optimizer], Schedule] | None:
    """Return what builds the schedule; None if there is none or if DeepSpeed builds it."""
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
    for key in ("torch_adam", "fused", "foreach"):  # implementation choices, made here instead
        params.pop(key, None)
    if isinstance(params.get("betas"), list):
        params["betas"] = tuple(params["betas"])
    if name in FUSED:
        params["fused"] = True
    file = OPTIMIZERS[name].file
    source = import_module(f"pipeline.engine.optimizers.{file}") if file else torch.optim
    try:
        return getattr(source, name)(parameters, **params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"ds_config: optimizer {name}: {error}") from error


def backward_and_step(engine: Engine, loss: Tensor) -> None:
    """Run backward and, at an accumulation boundary, one update if its gradient is finite.

    Gradients are already summed over ranks when they are checked, so all ranks decide the same. In
    FP32 nothing here waits for the device; with 16-bit weights each update waits once, for the
    gradient's norm.
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
    """Average batch norm's running statistics over ranks: each rank saw only its own samples."""
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
    """Whether one of `engines` skipped its last update because its gradient was not finite."""
    flags = [engine.was_skipped for engine in engines]
    if all(isinstance(flag, bool) for flag in flags):
        return any(flags)
    return torch.stack([torch.as_tensor(flag).bool() for flag in flags]).any()


def observe(engine: Engine, psnr: float) -> None:
    """Pass a validation's PSNR to a schedule that lowers the rate on a plateau."""
    if isinstance(engine.lr_scheduler, Schedule):
        engine.lr_scheduler.observe(psnr)


def compile_module(module: nn.Module, *, channels_last: bool, mode: str | None = None) -> None:
    """Compile `module` with Inductor, in place; names in the state dict do not change.

    Forcing channels_last makes it 1.5 times faster on a CPU, because Inductor otherwise drops that
    format in backward graphs (pytorch #188236). For contiguous inputs, layout optimization is
    switched off, because Inductor would choose channels_last for wide convolutions. `mode`
    "reduce-overhead" replays CUDA graphs: the next call then overwrites what the module returned.
    """
    import torch._inductor.config

    torch._inductor.config.force_layout_optimization = channels_last
    torch._inductor.config.layout_optimization = channels_last
    module.compile(backend="inductor", dynamic=False, mode=mode)


def set_deterministic(is_on: bool) -> None:
    """Make torch, cuDNN, cuBLAS and Inductor deterministic on the same device, or undo that.

    Operators without a deterministic implementation warn. cuBLAS reads its variable on first use.
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
    """Return "" if Inductor works here, else what is missing.

    On a GPU this compiles a small kernel, within a second or two.
    """
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


# Capture the gradients of an update: whole, in FP32, before clipping and without loss scaling.


@contextmanager
def gradients_of_update(engines: Mapping[str, Engine]) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Yield a table that holds each engine's gradients once it has made its update in this block.

    The table maps engine name -> parameter name -> gradient. Each of `engines` makes at most one
    update in the block, and the update itself is unaffected. All ranks call it together, because
    with ZeRO each holds a part of the gradients; the table is the same on all.
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
