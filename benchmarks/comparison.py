"""Compare two runs byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.run_folder import checkpoint_dir


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Return where two nested structures of tensors and plain values differ, bit for bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = (
            first.dtype == second.dtype
            and first.shape == second.shape
            and first.contiguous().numpy(force=True).tobytes()
            == second.contiguous().numpy(force=True).tobytes()
            if first.dtype != torch.bfloat16
            else torch.equal(first.view(torch.int16), second.view(torch.int16))
        )
        return [] if same else [where]
    if type(first) is not type(second):
        return [f"{where}: {type(first)} and {type(second)}"]
    if isinstance(first, dict):
        found = [f"{where}.{key}: only in one" for key in first.keys() ^ second.keys()]
        return found + [
            d
            for key in first.keys() & second.keys()
            for d in differences(first[key], second[key], f"{where}.{key}")
        ]
    if isinstance(first, (list, tuple)):
        found = (
            [] if len(first) == len(second) else [f"{where}: {len(first)} and {len(second)} items"]
        )
        return found + [
            d
            for i, pair in enumerate(zip(first, second, strict=False))
            for d in differences(*pair, f"{where}[{i}]")
        ]
    if hasattr(first, "__dict__"):
        return differences(vars(first), vars(second), where)
    return [] if first == second else [f"{where}: {first!r} and {second!r}"]


def checkpoint_differences(one: Path, other: Path, step: int) -> list[str]:
    """Compare two checkpoints of `step`: weights, optimizer, schedule, EMA, random states,
    counters."""
    first, second = checkpoint_dir(one, step), checkpoint_dir(other, step)
    names = {p.relative_to(first) for p in first.rglob("*") if p.is_file()}
    assert names == {p.relative_to(second) for p in second.rglob("*") if p.is_file()}
    assert any(name.name == "mp_rank_00_model_states.pt" for name in names)
    found = []
    for name in sorted(names):
        if name.name == "MANIFEST.json":
            continue
        if name.suffix == ".pt":
            contents = [torch.load(folder / name, weights_only=False) for folder in (first, second)]
            found += differences(*contents, where=str(name))
        elif (first / name).read_bytes() != (second / name).read_bytes():
            found.append(str(name))
    return found


def logged(run_dir: Path, event: str = "train", *keys: str) -> list[tuple[Any, ...]]:
    """Return (step, values of `keys`) of a run's log lines, in order."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [
        (line["step"], *(line[key] for key in keys)) for line in lines if line["event"] == event
    ]


BF16 = ("ds.bf16.enabled=true", "ds.fp16.enabled=false")
SCHEDULE_FREE = (
    "ds.optimizer={type: ScheduleFreeAdamW, params: {lr: 0.01}}",
    "ds.scheduler={type: WarmupLR, params: {warmup_num_steps: 2}}",
    "ema_decay=0",
)
UNET = ("adversarial={weight: 0.01, discriminator: {name: unet, num_features: 4}}",)


def assert_resumed_is_straight(straight: Path, broken: Path) -> None:
    """Both runs have reached step 8, the second with a stop at step 3."""
    # Ending at step 3 took a validation that the uninterrupted run did not have, and which may be
    # the best one.
    assert [d for d in checkpoint_differences(straight, broken, 8) if d != "state.json"] == []
    assert logged(straight, "train", "loss", "lr") == logged(broken, "train", "loss", "lr")
    assert [step for step, *_ in logged(broken)] == list(range(1, 9))
