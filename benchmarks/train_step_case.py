"""Measure one case of `train_step.py`: time the steps of a run that is set up as by `train.py`.

The argument is the case as JSON; the last line of the output is the result as JSON.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.distributed.ranks import start_distributed
from pipeline.engine.engine import step_was_skipped
from pipeline.engine.layout import LAYOUTS
from pipeline.images import unit_range
from pipeline.libraries import keep_freed_memory
from pipeline.models.depthwise import use_kernel
from pipeline.training.meter import TrainMeter
from pipeline.training.options import TrainOptions, make_plans
from pipeline.training.setup import set_up

WARM_UP = 2  # steps after the first
WINDOWS = 5


class Stopwatch:
    """Measures the parts of a step in seconds; nested parts are not counted in the outer ones."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._within = device, [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wait(self._device)
        began = time.perf_counter()
        self._within.append(0.0)
        yield
        wait(self._device)
        whole = time.perf_counter() - began
        self.seconds[name] += whole - self._within.pop()
        self._within[-1] += whole

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with self.part(name):
                return function(*arguments, **keywords)

        return call


class WatchedEngine:
    """An engine whose calls are timed; everything else is delegated."""

    def __init__(self, engine: Any, watch: Stopwatch) -> None:
        self._engine = engine
        self._call = watch.timed("forward", engine)
        self.backward = watch.timed("backward", engine.backward)
        self.check_gradient = watch.timed("gradient check", engine.check_gradient)
        self.step = watch.timed("optimizer", engine.step)

    def __call__(self, *inputs: Any) -> Any:
        return self._call(*inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class Work(TorchDispatchMode):
    """Counts the minimum work of a step: multiply-adds, bytes of tensors, and calls.

    Multiply-adds are those of convolutions and matrix products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.bytes = self.calls = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        out = function(*arguments, **(keywords or {}))
        name = function._schema.name.removeprefix("aten::")
        results = [
            item
            for item in (out if isinstance(out, (tuple, list)) else (out,))
            if isinstance(item, Tensor)
        ]
        given = [item for item in arguments if isinstance(item, Tensor)]
        if function.is_view or not results:
            return out
        self.calls += 1
        self.bytes += sum(tensor.nbytes for tensor in (*given, *results))
        if name == "convolution":
            self.macs += out.numel() * arguments[1][0].numel()
        elif name == "convolution_backward":
            gradient, _, weight = arguments[:3]
            self.macs += gradient.numel() * weight[0].numel() * sum(arguments[-1][:2])
        elif name in ("mm", "addmm"):
            left = arguments[-2]
            self.macs += out.numel() * left.shape[-1]
        return out


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Measure a case; see the end of the function for the figures."""
    plan = make_plans(
        TrainOptions(
            overrides=tuple(case["overrides"]),
            recipe=case["recipe"],
            dataset_dir=(Path(case["dataset"]),),
            output_dir=Path(case["output"]),
        )
    )[-1]
    ranks = start_distributed()
    if ranks.device.type == "cpu":
        keep_freed_memory()
    run = set_up(plan, ranks, lambda _: None)
    device, trainer = ranks.device, run.trainer
    if case["way"] == "reduce-overhead":
        trainer.generator.module.compile(mode="reduce-overhead", dynamic=False)
    loader, meter = (
        run.open_loader(),
        TrainMeter(ranks, plan.total_steps, plan.ds_config["train_batch_size"]),
    )
    number = 0

    def step(watch: Stopwatch | None = None) -> None:
        nonlocal number
        part = watch.part if watch else lambda _: nullcontext()
        for _ in range(run.accumulation):
            with part("waiting for data"):
                batch = next(loader)
            outcome = trainer.step(batch, number)
            with part("metrics"):
                meter.add(outcome)
        number += 1
        with part("metrics"):
            learners = trainer.learners(number - 1)
            norms = {name: engine.gradient_norm for name, engine in learners.items()}
            meter.end_step(number, step_was_skipped(learners.values()), norms, loader)

    step()
    wait(device)
    first_step = time.time() - psutil.Process().create_time()
    for _ in range(WARM_UP):
        step()
    memory = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    batch = next(loader)
    loops = {"ours": step} | _bare_loops(run, batch, case)
    for loop in list(loops.values())[1:]:
        for _ in range(WARM_UP):
            loop()
    seconds = _in_turns(loops, case["seconds"], device)
    parts, steps = _parts(run, step, device), len(seconds["ours"])
    work = _work(run, batch)
    loader.close()
    images = plan.ds_config["train_batch_size"]
    bare = {
        name: statistics.median(
            one / other for one, other in zip(seconds["ours"], times, strict=True)
        )
        for name, times in seconds.items()
        if name != "ours"
    }
    return {
        "step": statistics.median(seconds["ours"]),
        "least": min(seconds["ours"]),
        "greatest": max(seconds["ours"]),
        "images": images,
        "memory": memory,
        "first_step": first_step,
        "parts": parts,
        "windows": steps,
        "ours_in_parts_of_bare": bare,
        "introduction": run.introduction,
        "layout": run.progress.layout,
        "kernel": run.progress.kernel,
        "world_size": ranks.world_size,
        "device": device.type,
        "macs": work.macs,
        "bytes": work.bytes,
        "calls": work.calls,
        **_machine(device, next(trainer.generator.module.parameters()).dtype),
    }


def _bare_loops(run: Any, batch: Any, case: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """Return plain PyTorch loops of the same network on one batch, one for each layout.

    They do forward, L1, backward and AdamW. If the run has another depthwise kernel, "plain" is the
    loop with PyTorch's own, in the run's layout.
    """
    if case["way"] != "eager" or case["is_adversarial"]:
        return {}
    wanted = [(name, name, run.progress.kernel) for name in LAYOUTS]
    if run.progress.kernel != "torch":
        wanted.append(("plain", run.progress.layout, "torch"))
    return {
        name: _bare_loop(run, batch, LAYOUTS[layout], kernel) for name, layout, kernel in wanted
    }


def _bare_loop(
    run: Any, batch: Any, layout: torch.memory_format, kernel: str
) -> Callable[[], None]:
    network = copy.deepcopy(run.trainer.generator.module)
    use_kernel(network, kernel)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    lr, hr = batch.lr.contiguous(memory_format=layout), unit_range(batch.hr, torch.float32)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (network(lr).float() - hr).abs().mean().backward()
        optimizer.step()

    return step


def _in_turns(
    loops: dict[str, Callable[[], None]], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds per step of each loop in each of `WINDOWS` windows.

    The order is reversed every time.
    """
    began = time.perf_counter()
    loops["ours"]()
    wait(device)
    steps = max(1, round(seconds / WINDOWS / (time.perf_counter() - began)))
    found: dict[str, list[float]] = {name: [] for name in loops}
    for window in range(WINDOWS):
        for name in list(loops)[:: 1 if window % 2 == 0 else -1]:
            began = time.perf_counter()
            for _ in range(steps):
                loops[name]()
            wait(device)
            found[name].append((time.perf_counter() - began) / steps)
    return found


def _parts(run: Any, step: Callable[[Stopwatch], None], device: torch.device) -> dict[str, float]:
    """Return the seconds of each part of a step.

    On a GPU, each part is waited for, so their sum exceeds the step's time.
    """
    trainer, watch, steps = run.trainer, Stopwatch(device), 3
    own = {
        name: getattr(trainer, name)
        for name in ("generator", "discriminator", "criterion", "ema")
        if hasattr(trainer, name)
    }
    for name in ("generator", "discriminator"):
        if name in own:
            setattr(trainer, name, WatchedEngine(own[name], watch))
            inner = getattr(own[name], "_inner", None)  # DeepSpeed's engine
            if inner is not None and run.ranks.world_size > 1:
                inner.allreduce_gradients = watch.timed("communication", inner.allreduce_gradients)
    trainer.criterion = watch.timed("losses", own["criterion"])
    trainer.criterion.uses_averaged = own["criterion"].uses_averaged
    update = own["ema"].update
    own["ema"].update = watch.timed("EMA", update)
    began = time.perf_counter()
    for _ in range(steps):
        step(watch)
    wait(device)
    whole = (time.perf_counter() - began) / steps
    for name, value in own.items():
        setattr(trainer, name, value)
    own["ema"].update = update
    parts = {name: value / steps for name, value in watch.seconds.items()}
    return {**parts, "copy and the rest": whole - sum(parts.values())}


def _work(run: Any, batch: Any) -> Work:
    """Count the work of a step, uncompiled and with PyTorch's kernels: no others can be counted."""
    trainer, kernel = run.trainer, run.progress.kernel
    compiled = {engine: engine.module._compiled_call_impl for engine in trainer.engines.values()}
    for engine in compiled:
        engine.module._compiled_call_impl = None
    use_kernel(trainer.generator.module, "torch")
    with Work() as work:
        trainer.step(batch, 0)
    use_kernel(trainer.generator.module, kernel)
    for engine, call in compiled.items():
        engine.module._compiled_call_impl = call
    return work


def _machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure multiply-adds per second of a large product, and bytes per second of a large copy."""
    side = 1536 if device.type == "cpu" else 8192
    matrix = torch.randn(side, side, device=device).to(dtype)
    memory = torch.zeros((1 << 26) if device.type == "cpu" else (1 << 28), device=device)
    other = torch.empty_like(memory)
    product, copying = (
        min(_seconds(call, device) for _ in range(5))
        for call in (partial(torch.mm, matrix, matrix), partial(other.copy_, memory))
    )
    return {"macs_per_second": side**3 / product, "bytes_per_second": 2 * memory.nbytes / copying}


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    found = measure(json.loads(sys.argv[1]))
    print(json.dumps(found), flush=True)
    os._exit(0)  # skip interpreter shutdown, which threads of the loader's libraries may abort
