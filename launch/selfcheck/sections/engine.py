"""Compare both runtimes' updates with plain autograd, and the project's optimizers with themselves
on the CPU; count the kernels and waits of an update."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.selfcheck.report import Report
from pipeline.config.ds_config import OPTIMIZERS

if TYPE_CHECKING:
    from torch import Tensor, nn

UPDATES = 20
BATCH, SIDE = 8, 16
TOLERANCES = {"fp32": 0.01, "bf16": 0.05, "fp16": 0.05}
"""How far the losses may be from autograd's, relative to how far they fell. FP16 and BF16 round
weights and gradients."""
OPTIMIZER_UPDATES, OPTIMIZER_TOLERANCE = 12, 0.1
MOST_OPERATIONS = 600
"""Kernels and copies of one update of VapSR x4 in FP16: forward, loss, backward, step and EMA."""
CASES = [
    ("deepspeed", precision, stage) for precision in ("fp32", "bf16", "fp16") for stage in (0, 1, 2)
]
CASES += [("accelerate", precision, 0) for precision in ("fp32", "bf16", "fp16")]


def run(report: Report) -> None:
    """Check every runtime, precision and ZeRO stage, then count the cost of an update."""
    import torch

    from pipeline.distributed.ranks import start_distributed

    if report.device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    ranks = start_distributed()
    for runtime, precision, stage in CASES:
        name = f"{runtime}.{precision}" + (f".zero{stage}" if runtime == "deepspeed" else "")
        if precision == "fp16" and not report.is_on_gpu:
            report.skip(name, "FP16 is for GPUs")
            continue
        with report.guarded(name):
            report.at_most(
                name,
                _distance(ranks, runtime, precision, stage),
                TOLERANCES[precision],
                note=f"{UPDATES} updates against autograd's, relative",
            )
    if report.is_on_gpu:
        with report.guarded("overflow"):
            _overflow(report, ranks)
    else:
        report.skip("overflow", "FP16 is for GPUs")
    for precision in ("fp16", "bf16", "fp32") if report.is_on_gpu else ("bf16", "fp32"):
        with report.guarded(f"update.{precision}"):
            _costs(report, ranks, precision)
    for name in [name for name, row in OPTIMIZERS.items() if row.file]:
        with report.guarded(f"optimizer.{name}"):
            _optimizer(report, name)
    if report.is_on_gpu:
        with report.guarded("fp16"):
            report.at_most(
                "fp16",
                _distance(ranks, "deepspeed", "fp16", 0),
                TOLERANCES["fp16"],
                note="FP16 as in ds_config.json, compared with autograd",
            )
    else:
        report.skip("fp16", "no GPU")


def _engine(
    ranks: Any,
    network: nn.Module,
    runtime: str,
    precision: str,
    stage: int = 0,
    batch: int = BATCH,
    **fp16: Any,
) -> Any:
    from pipeline.engine.engine import build_engine, resolve_ds_config

    config = {
        "train_batch_size": batch,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}},
    }
    if precision != "fp32":
        config[precision] = {
            "enabled": True,
            **({"initial_scale_power": 8, **fp16} if precision == "fp16" else {}),
        }
    resolved, *_ = resolve_ds_config(
        config, world_size=1, total_steps=100, device=ranks.device, runtime=runtime
    )
    return build_engine(network, resolved, ranks, runtime)


def _network(*, full: bool = False) -> nn.Module:
    import torch

    from pipeline.models import build_generator

    torch.manual_seed(0)
    size = {} if full else {"num_features": 16, "num_attention_features": 16, "num_blocks": 2}
    network = build_generator("vapsr", 4, **size)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def _batches(
    device: Any, count: int, batch: int = BATCH, side: int = SIDE
) -> Iterator[tuple[Tensor, Tensor]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        hr = torch.rand(batch, 3, 4 * side, 4 * side, generator=generator)
        lr = torch.nn.functional.interpolate(hr, size=(side, side), mode="bicubic", antialias=True)
        yield lr.to(device), hr.to(device)


def _update(engine: Any, lr: Tensor, hr: Tensor) -> Tensor:
    """Make one update as the trainers do; return the loss."""
    from pipeline.engine.engine import backward_and_step

    dtype = next(engine.module.parameters()).dtype
    loss = (engine(lr.to(dtype)).float() - hr).abs().mean()
    backward_and_step(engine, loss)
    return loss.detach()


def _distance(ranks: Any, runtime: str, precision: str, stage: int) -> float:
    """Return the largest difference between an engine's losses and FP32 autograd's.

    It is relative to how far the losses fell. Losses are compared instead of weights because Adam
    divides a gradient by its size, so rounding decides the sign of the smallest ones: single
    weights drift apart although the networks do the same.
    """
    import torch

    network = _network()
    reference = copy.deepcopy(network).to(ranks.device)
    engine = _engine(ranks, network, runtime, precision, stage)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    ours, wanted = [], []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for lr, hr in _batches(ranks.device, UPDATES):
            ours.append(float(_update(engine, lr, hr)))
            loss = (reference(lr) - hr).abs().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            wanted.append(float(loss.detach()))
    fell = max(wanted) - min(wanted)
    engine.destroy()
    return (
        max(abs(one - other) for one, other in zip(ours, wanted, strict=True)) / fell
        if fell
        else math.nan
    )


def _overflow(report: Report, ranks: Any) -> None:
    """Start with a loss scale that is too large: updates must be skipped, without changing weights,
    until the scale is small enough."""
    import torch

    engine = _engine(ranks, _network(), "deepspeed", "fp16", initial_scale_power=24, hysteresis=1)
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    stayed = moved = skipped = 0
    for lr, hr in _batches(ranks.device, 30):
        _update(engine, lr, hr)
        same = all(map(torch.equal, engine.module.parameters(), before))
        if bool(torch.as_tensor(engine.was_skipped)):
            skipped, stayed = skipped + 1, stayed + same
        else:
            moved += not same
        before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    engine.destroy()
    report.fact(
        "overflow",
        0 < skipped == stayed and moved == 30 - skipped,
        f"{skipped} of 30 skipped",
        limit="weights unchanged",
        note="from a loss scale of 2^24",
    )


def _optimizer(report: Report, name: str) -> None:
    """Make updates with the same gradients on the device and on the CPU; count waits of one."""
    import torch

    from pipeline.engine.engine import build_optimizer

    weights: dict[str, Tensor] = {}
    for device in ("cpu", str(report.device)):
        network = _network(full=not report.is_small).to(device)
        own = list(network.parameters())
        optimizer = build_optimizer({"type": name, "params": {"lr": 1e-3}}, own)
        optimizer.found_inf = torch.zeros((), device=device)
        generator = torch.Generator().manual_seed(2)

        def draw(own: Any = own, generator: Any = generator) -> None:
            for weight in own:
                gradient = torch.randn(weight.shape, generator=generator)
                weight.grad = gradient.to(weight.device)

        for _ in range(OPTIMIZER_UPDATES):
            draw()
            optimizer.step()
        weights[device] = torch.cat([weight.detach().cpu().flatten() for weight in own])
        draw()
        with counted(report.is_on_gpu) as costs:
            optimizer.step()
    difference = float((weights[str(report.device)] - weights["cpu"]).abs().max()) / 1e-3
    note = f"weights after {OPTIMIZER_UPDATES} updates against the CPU's, in units of the rate"
    if name == "SOAP":  # its eigenvectors are arbitrary where a gradient has no component
        report.number(f"optimizer.{name}", difference, "", note=note)
    else:
        report.at_most(f"optimizer.{name}", difference, OPTIMIZER_TOLERANCE, note=note)
    report.at_most(
        f"optimizer.{name}.waits", costs.waits, 0, note="times that the host waits for the device"
    )


# --- Cost of an update ---


@dataclass
class Costs:
    """Counts of one update."""

    operations: int = 0
    """Kernels and copies on a GPU, calls into ATen on a CPU."""
    waits: int = 0
    """Times that the host waits for the device, or reads a number back from it."""
    synchronizations: int = 0
    """Waits for all streams of the device."""


def _costs(report: Report, ranks: Any, precision: str) -> None:
    """Count the cost of an update of VapSR x4 under DeepSpeed with ZeRO 0, including the EMA.

    The small check uses a smaller network.
    """
    from pipeline.models.ema import ExponentialMovingAverage

    network = _network(full=not report.is_small)
    average = ExponentialMovingAverage(network, 0.99)
    average.network.to(ranks.device)
    engine = _engine(ranks, network, "deepspeed", precision, batch=4)

    def update(lr: Tensor, hr: Tensor) -> None:
        _update(engine, lr, hr)
        average.update(engine.module)

    *warm_up, last = _batches(ranks.device, 4, batch=4)
    for lr, hr in warm_up:
        update(lr, hr)
    with counted(report.is_on_gpu) as costs:
        update(*last)
    engine.destroy()
    name = f"update.{precision}"
    if report.is_small:
        report.number(f"{name}.operations", costs.operations, "", note="of a small network")
    elif precision == "fp32":
        report.number(
            f"{name}.operations",
            costs.operations,
            "",
            note="kernels and copies of an update of VapSR x4",
        )
    else:
        report.at_most(
            f"{name}.operations",
            costs.operations,
            MOST_OPERATIONS,
            note="kernels and copies of an update of VapSR x4",
        )
    report.at_most(
        f"{name}.waits",
        costs.waits,
        0 if precision == "fp32" else 1,
        note="times that the host waits for the device",
    )
    report.at_most(
        f"{name}.synchronize", costs.synchronizations, 0, note="waits for the whole device"
    )


@contextmanager
def counted(is_on_gpu: bool) -> Iterator[Costs]:
    """Count what is done in the block; the counts are complete once it is left."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from torch.utils._python_dispatch import TorchDispatchMode

    costs, calls = Costs(), {"all": 0, "read": 0}
    read = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            calls["all"] += 1
            calls["read"] += function in read
            return function(*args, **(kwargs or {}))

    with _counting_synchronize(costs):
        if not is_on_gpu:
            with Counting():
                yield costs
            costs.operations, costs.waits = calls["all"], calls["read"]
            return
        try:
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                torch.cuda.synchronize()
                costs.synchronizations = 0
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                    yield costs
                    torch.cuda.set_sync_debug_mode("default")
                made = costs.synchronizations  # before the profiler adds its own waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
        costs.synchronizations = made
        costs.waits = sum("synchronizing CUDA operation" in str(one.message) for one in caught)
        names = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")
        costs.operations = sum(
            event.count for event in profiler.key_averages() if event.key.startswith(names)
        )


@contextmanager
def _counting_synchronize(costs: Costs) -> Iterator[None]:
    """Count waits for the whole device: torch's, and DeepSpeed's, which do nothing on a CPU."""
    import torch

    places: list[tuple[Any, str, Any]] = [(torch.cuda, "synchronize", torch.cuda.synchronize)]
    loaded = sys.modules.get("deepspeed.accelerator")  # if an engine was built before
    if loaded is not None:
        accelerator = type(loaded.get_accelerator())
        places.append((accelerator, "synchronize", accelerator.synchronize))

    def counting(action: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            costs.synchronizations += 1
            return action(*args, **kwargs)

        return count

    for owner, name, action in places:
        setattr(owner, name, counting(action))
    try:
        yield
    finally:
        for owner, name, action in places:
            with suppress(AttributeError):
                setattr(owner, name, action)
