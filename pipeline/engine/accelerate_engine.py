"""Engine on Hugging Face Accelerate: plain PyTorch with DistributedDataParallel, no DeepSpeed.

Weights and optimizer states are FP32 in every precision; BF16 and FP16 run under autocast, FP16
with torch's loss scaling.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.engine.optimizers.foreach import averaged, skips_nonfinite
from pipeline.engine.schedules import Schedule

STATES_FILE = "mp_rank_00_model_states.pt"  # DeepSpeed's file name; its key "module" is used too
INITIAL_SCALE_POWER, SCALE_WINDOW = 16, 1000  # DeepSpeed's defaults for FP16
DEFAULT_CLIPPING = 1.0  # DeepSpeed's default for the gradient norm


class AccelerateEngine:
    """A module, its optimizer and its schedule, prepared by Accelerate for these ranks.

    Implements `pipeline.engine.engine.Engine`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        build_schedule: Callable[[torch.optim.Optimizer], Schedule] | None,
        ds_config: Mapping[str, Any],
        ranks: Ranks,
    ) -> None:
        self.module = module
        self.lr_scheduler = build_schedule(optimizer) if build_schedule else None
        self.before_update: list[Callable[[], None]] = []
        self.gradient_norm: Tensor | float = float("nan")
        self.was_skipped = torch.zeros((), device=ranks.device)
        self._nonfinite_steps = torch.zeros((), device=ranks.device)
        self._ranks, self._inner = ranks, optimizer
        self._accumulation = ds_config["gradient_accumulation_steps"]
        self._max_norm = ds_config.get("gradient_clipping", DEFAULT_CLIPPING) or float("inf")
        self._micro_steps = 0
        # One accelerator per engine, because each network has its own loss scale. All of them share
        # the process's device and precision (Accelerate keeps those in a singleton).
        self._accelerator = _accelerator(ds_config, ranks)
        self._replica, self.optimizer = self._accelerator.prepare(module, optimizer)
        # Such optimizers change nothing where `found_inf` is set. A scaler sets it itself.
        self._guards_itself = self._accelerator.scaler is not None or skips_nonfinite(optimizer)
        if self._accelerator.scaler is None and self._guards_itself:
            optimizer.found_inf = self.was_skipped

    def __call__(self, *inputs: Any) -> Any:
        """Run the module.

        Ranks exchange gradients only in the backward pass of an accumulation boundary.
        """
        is_exchanging = self.is_gradient_accumulation_boundary() or not torch.is_grad_enabled()
        with nullcontext() if is_exchanging else self._accelerator.no_sync(self._replica):
            return self._replica(*inputs)

    @property
    def weights(self) -> list[Tensor]:
        return averaged(self._inner, list(self.module.parameters()))

    @property
    def skipped_steps(self) -> int:
        return int(self._nonfinite_steps)

    @property
    def loss_scale(self) -> float:
        scaler = self._accelerator.scaler  # None except in FP16
        return 1.0 if scaler is None else float(scaler.get_scale())

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch completes an update."""
        return (self._micro_steps + 1) % self._accumulation == 0

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self._inner.param_groups]

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss` / accumulation; average it over ranks at a boundary."""
        # Accelerate keeps this number per process, not per engine.
        self._accelerator.gradient_accumulation_steps = self._accumulation
        with warnings.catch_warnings():
            # channels_last activations cause it.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
            self._accelerator.backward(loss)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad

    def check_gradient(self) -> None:
        """Clip the gradient of an update; record its norm and whether it is finite."""
        self.gradient_norm = self._accelerator.clip_grad_norm_(
            self.module.parameters(), self._max_norm
        )
        self.was_skipped.copy_(~torch.isfinite(self.gradient_norm))
        self._nonfinite_steps += self.was_skipped

    def step(self) -> None:
        """Finish a micro-batch; at a boundary, make the update if its gradient is finite."""
        is_update = self.is_gradient_accumulation_boundary()
        self._micro_steps += 1
        if not is_update:
            return
        if self._guards_itself or not bool(self.was_skipped):
            self.optimizer.step()
        self.optimizer.zero_grad()
        overflowed = self._accelerator.scaler is not None and self.optimizer.step_was_skipped
        if self.lr_scheduler is not None and not overflowed:  # as DeepSpeed does in FP16
            self.lr_scheduler.step()

    def save(self, directory: str, name: str, files: Any) -> None:
        """Write weights, optimizer state, schedule and loss scale.

        The first rank writes, because all ranks hold the same.
        """
        folder = os.path.join(directory, name)
        if self._ranks.is_first:
            scaler = self._accelerator.scaler
            files.makedirs(folder, exist_ok=True)
            files.save(
                {
                    "module": self.module.state_dict(),
                    "optimizer": self._inner.state_dict(),
                    "lr_scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler else None,
                    "loss_scale": scaler.state_dict() if scaler else None,
                },
                os.path.join(folder, STATES_FILE),
            )
        files.commit(name)
        dist.barrier(group=self._ranks.control)

    def load(self, directory: str, name: str, files: Any) -> bool:
        """Restore what `save` wrote; return False if there is nothing."""
        try:
            states = files.load(os.path.join(directory, name, STATES_FILE), map_location="cpu")
        except FileNotFoundError:
            return False
        self.module.load_state_dict(states["module"])
        self._inner.load_state_dict(states["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(states["lr_scheduler"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(states["loss_scale"])
        return True

    def destroy(self) -> None:
        """Free memory, and the process's precision, because the next stage may use another."""
        from accelerate.state import AcceleratorState

        self._accelerator.free_memory()
        AcceleratorState._reset_state()


def _accelerator(ds_config: Mapping[str, Any], ranks: Ranks) -> Any:
    """Build an `Accelerator` with the precision of a resolved ds_config on this rank's device.

    Raises `UserError` if Accelerate refuses, or is configured for other processes or devices.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, GradScalerKwargs

    fp16 = ds_config.get("fp16", {})
    precision = (
        "fp16"
        if fp16.get("enabled")
        else "bf16"
        if ds_config.get("bf16", {}).get("enabled")
        else "no"
    )
    scaling = GradScalerKwargs(
        init_scale=2.0 ** fp16.get("initial_scale_power", INITIAL_SCALE_POWER),
        growth_interval=fp16.get("loss_scale_window", SCALE_WINDOW),
    )
    # Buffers are not broadcast: batch norm's statistics are averaged over ranks after an update,
    # not overwritten by the first rank's before it. Some networks have weights that are used only
    # after training and get no gradient, hence find_unused_parameters.
    replicas = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
    threads = torch.get_num_threads()
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=ranks.device.type == "cpu",
            dynamo_backend="no",
            kwargs_handlers=[replicas, scaling],
        )
    except (ValueError, NotImplementedError, ImportError) as error:
        raise UserError(
            f"Accelerate rejects its configuration: {' '.join(str(error).split())}"
        ) from error
    torch.set_num_threads(threads)  # Accelerate lets every rank on a CPU use all cores
    if (
        accelerator.device.type != ranks.device.type
        or accelerator.num_processes != ranks.world_size
    ):
        raise UserError(
            f"accelerate is set up for {accelerator.num_processes} processes on "
            f"{accelerator.device}, but there are {ranks.world_size} on {ranks.device}; unset "
            "its variables (ACCELERATE_…)"
        )
    return accelerator
