"""The one door to the distributed runtime. Nothing else imports DeepSpeed.

What the rest of the project uses of a DeepSpeed engine is: calling it, `module`, `backward`, `step`,
`is_gradient_accumulation_boundary`, `save_checkpoint` and `load_checkpoint`; `descend` is one micro-batch of it.
"""

from __future__ import annotations

import copy
import ctypes
import logging
import os
import signal
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.cli import UserError, nearest
from pipeline.recipe import batch_sizes

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD, "RAdam": torch.optim.RAdam,
    "NAdam": torch.optim.NAdam,
}
FUSED = ("Adam", "AdamW", "SGD")  # have one kernel for all parameters, and leave them alone where `found_inf` is set


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup  # over Gloo: flags between hosts, never a synchronisation with the GPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` (any picklable object) of every rank, in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, value: Any) -> Any:
        """The first rank's `value`, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        dist.barrier(group=self.control)


def start_distributed(timeout_minutes: float = 10) -> Ranks:
    """Join the process group that RANK, WORLD_SIZE and LOCAL_RANK describe; alone where they are not set.

    NCCL between GPUs, Gloo between CPUs. When the launcher dies, this process is told to stop (SIGTERM).
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if world_size > 1:
        _stop_with_parent()
    elif "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = "0"  # any free one
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(local_rank)
    deepspeed = _import_deepspeed(has_gpu)
    timeout = timedelta(minutes=timeout_minutes)
    deepspeed.init_distributed(dist_backend="nccl" if has_gpu else "gloo", timeout=timeout, verbose=False)
    control = dist.new_group(backend="gloo", timeout=timeout)
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    return Ranks(rank, world_size, local_rank, device, control)


def stop_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _import_deepspeed(has_gpu: bool) -> Any:
    if not has_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for handler in deepspeed.utils.logger.handlers:
        handler.setLevel(logging.ERROR)
    # Its shared-memory collectives between CPU ranks are C++ built on first use, under a lock that a killed process
    # leaves behind for ever (RELIABILITY 2.6). Gloo does the same work without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _stop_with_parent() -> None:
    """Ask Linux for SIGTERM when the launcher that started us is gone, so that no rank trains on as an orphan."""
    pr_set_pdeathsig = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def resolve_ds_config(config: Mapping[str, Any], *, world_size: int, total_steps: int,
                      device: torch.device) -> tuple[dict[str, Any], str]:
    """ds_config.json as DeepSpeed will get it on these ranks, and a line about the precision.

    Fills in the micro-batch and the accumulation, `"total_num_steps": "auto"`, and FP32 for FP16 where there is no
    GPU. The optimizer section stays for `build_engine`.
    """
    resolved = copy.deepcopy(dict(config))
    micro, accumulation = batch_sizes(config, world_size)
    resolved |= {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    resolved.setdefault("steps_per_print", 1 << 60)
    schedule = resolved.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = total_steps
        schedule["warmup_num_steps"] = max(1, min(schedule.get("warmup_num_steps", 1000), total_steps // 2))
    if "fp16" in resolved and device.type == "cpu":
        enabled = resolved.pop("fp16").get("enabled")
        if enabled:
            return resolved, "FP32: there is no GPU, and FP16 is for GPUs (for BF16 on a CPU enable bf16 in ds_config)"
    if resolved.get("bf16", {}).get("enabled"):
        # Batch norm statistics must have the type of the weights, or the forward pass fails.
        resolved.setdefault("data_types", {}).setdefault("buffer_dtype", "bf16")
        return resolved, "BF16"
    return resolved, "FP16" if resolved.get("fp16", {}).get("enabled") else "FP32"


def build_engine(module: nn.Module, ds_config: Mapping[str, Any], ranks: Ranks) -> Any:
    """A DeepSpeed engine around `module` for a resolved ds_config.

    The optimizer is torch's own, built from the optimizer section: the same on every device, and nothing to compile.
    """
    import deepspeed

    config = copy.deepcopy(dict(ds_config))
    section = config.pop("optimizer")
    optimizer = build_optimizer(section, [p for p in module.parameters() if p.requires_grad])
    with _quiet():
        try:
            engine, *_ = deepspeed.initialize(model=module.to(ranks.device), optimizer=optimizer, config=config,
                                              dist_init_required=False)
        except (TypeError, AssertionError, ValueError) as error:
            raise UserError(f"DeepSpeed refuses the ds_config: {' '.join(str(error).split())}") from error
    engine.found_nonfinite = engine.nonfinite_steps = None
    if not engine.zero_optimization() and isinstance(engine.optimizer, torch.optim.Optimizer):
        # The one mode in which DeepSpeed would write a NaN into weights and moments for good (RELIABILITY 2.8).
        if section["type"] not in FUSED:
            raise UserError(f"optimizer {section['type']} at FP32 and ZeRO stage 0 has no guard against NaN; choose "
                            f"one of {', '.join(FUSED)}, or zero_optimization.stage 1")
        engine.found_nonfinite = torch.zeros((), device=ranks.device)
        engine.nonfinite_steps = torch.zeros((), device=ranks.device)
        engine.optimizer.found_inf = engine.found_nonfinite
    return engine


def build_optimizer(section: Mapping[str, Any], parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    name = section["type"]
    if name not in OPTIMIZERS:
        raise UserError(f"ds_config: no optimizer {name!r}{nearest(name, OPTIMIZERS)}")
    params = dict(section.get("params", {}))
    params.pop("torch_adam", None)
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    if name in FUSED:
        params.setdefault("fused", True)
    try:
        return OPTIMIZERS[name](parameters, **params)
    except (TypeError, ValueError) as error:
        raise UserError(f"ds_config: optimizer {name}: {error}") from error


def descend(engine: Any, loss: Tensor) -> None:
    """Backward and, at an accumulation boundary, one update. Gradients that are not finite change nothing.

    Gradients are already summed over ranks when they are judged, so every rank judges the same. Nothing here waits
    for the device.
    """
    engine.backward(loss)
    if engine.found_nonfinite is not None and engine.is_gradient_accumulation_boundary():
        norms = torch._foreach_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        engine.found_nonfinite.copy_(~torch.isfinite(torch.stack(norms).sum()))
        engine.nonfinite_steps += engine.found_nonfinite
    engine.step()


def skipped_steps(engine: Any) -> int:
    """Updates left out since the engine was built because gradients overflowed. Waits for the device."""
    return engine.skipped_steps + (int(engine.nonfinite_steps) if engine.nonfinite_steps is not None else 0)


def compile_module(module: nn.Module) -> None:
    """torch.compile with Inductor, in place: names in the state dict stay as they are."""
    module.compile(backend="inductor", dynamic=False)


def why_not_compiled(device: torch.device) -> str:
    """Empty if Inductor can work here, else what it lacks."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Triton is missing"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler (Debian: apt install g++)"
    return ""


def save_engine(engine: Any, directory: os.PathLike[str] | str, name: str) -> str:
    """Write the engine's part of a checkpoint to `directory`/`name`. On return every rank is done.

    Returns why this rank could not write; empty if it did. (Raising in between would leave the other ranks waiting.)
    """
    engine.checkpoint_engine = files = _CheckpointFiles()
    with _quiet():
        engine.save_checkpoint(str(directory), tag=name, save_latest=False)
    return files.failure


def load_engine(engine: Any, directory: os.PathLike[str] | str, name: str) -> None:
    """Put back what `save_engine` wrote."""
    engine.checkpoint_engine = _CheckpointFiles()
    with _quiet():
        path, _ = engine.load_checkpoint(str(directory), tag=name)
    if path is None:
        raise RuntimeError(f"DeepSpeed could not load {directory}/{name}")


class _CheckpointFiles:
    """DeepSpeed's `CheckpointEngine` that keeps a failure for later and never runs code that a file brings."""

    name = "vastscale"

    def __init__(self) -> None:
        self.failure = ""

    def create(self, info: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._try(lambda: os.makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        self._try(lambda: torch.save(state_dict, path))

    def load(self, path: str, map_location: Any = None) -> Any:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def set_commit_info(self, info: Any) -> None: ...

    def get_commit_info(self) -> None: ...

    def cleanup(self) -> None: ...

    def preserves_storage_sharing(self) -> bool:
        return True

    def _try(self, action: Any) -> None:
        try:
            action()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self.failure = self.failure or str(error) or type(error).__name__


@contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
