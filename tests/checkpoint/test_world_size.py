"""A checkpoint continues on another number of ranks, and with ranks whose hosts do not see the run
folder."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import lives
from comparison import differences, logged
from lives import in_ranks, output_of, train
from pipeline.checkpoint.engine_state import OPTIMIZER, WEIGHTS, reshard
from pipeline.checkpoint_index import damage
from pipeline.run_folder import checkpoint_dir

BF16 = ("ds.bf16.enabled=true", "ds.fp16.enabled=false")
GAN = ("adversarial={weight: 0.01, discriminator: {name: unet, num_features: 4}}",)


def zero(stage: int) -> str:
    return f"ds.zero_optimization.stage={stage}"


# --- Shards, in memory ---

SHAPES = [
    {"a": (3, 5), "b": (7,), "c": (2, 2, 2), "d": (1,)},
    {"e": (11,), "f": (4, 3)},
    {"g": (1,)},
]


def layout(
    ranks: int, *, round_robin: bool, alignment: int
) -> tuple[list[OrderedDict], list[list[int]]]:
    """For each group: shapes in the order of DeepSpeed's flat tensor, and the gap after each
    parameter."""
    shapes, gaps = [], []
    for group in SHAPES:
        names = (
            sorted(group, key=lambda name: list(group).index(name) % ranks)
            if round_robin
            else list(group)
        )
        shapes.append(OrderedDict((name, torch.Size(group[name])) for name in names))
        start, gaps_here = 0, []
        for shape in shapes[-1].values():
            gap = -(start + shape.numel()) % alignment
            gaps_here.append(gap)
            start += shape.numel() + gap
        gaps.append([*gaps_here[:-1], 0])
    return shapes, gaps


def shards_of(
    values: dict[str, dict[str, torch.Tensor]], ranks: int, how: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the states that `ranks` ranks would write. `values`: for "weights" and each moment,
    every parameter's numbers."""
    shapes, gaps = layout(ranks, **how)
    shards: list[dict[str, Any]] = [
        {
            "zero_stage": 2,
            "loss_scaler": "kept",
            "partition_count": [ranks] * 3,
            "param_slice_mappings": rank,
            "group_paddings": [],
            "param_alignment_paddings": gaps,
            WEIGHTS: [],
            OPTIMIZER: {
                "state": {},
                "param_groups": [{"params": [group], "lr": 0.1} for group in range(3)],
            },
        }
        for rank in range(ranks)
    ]
    for group, named in enumerate(shapes):
        size = sum(shape.numel() for shape in named.values()) + sum(gaps[group])
        part = -(-size // (2 * ranks)) * 2
        for kind, tensors in values.items():
            pieces = [
                torch.nn.functional.pad(tensors[name].flatten(), (0, gap))
                for name, gap in zip(named, gaps[group], strict=True)
            ]
            flat = torch.nn.functional.pad(torch.cat(pieces), (0, part * ranks - size))
            for rank, shard in enumerate(shards):
                own = flat[rank * part : (rank + 1) * part]
                if kind == "weights":
                    shard["group_paddings"].append(min(part, max(0, (rank + 1) * part - size)))
                    shard[WEIGHTS].append(own[: part - shard["group_paddings"][-1]])
                else:
                    state = shard[OPTIMIZER]["state"].setdefault(group, {"step": torch.tensor(5.0)})
                    state[kind] = own
    return shards


def padded(shard: dict[str, Any]) -> dict[str, Any]:
    """Append the zeros at the ends of the weights, which DeepSpeed omits when saving."""
    weights = [
        torch.nn.functional.pad(own, (0, padding))
        for own, padding in zip(shard[WEIGHTS], shard["group_paddings"], strict=True)
    ]
    return {**shard, WEIGHTS: weights}


@pytest.mark.parametrize(
    "how",
    [
        {"round_robin": False, "alignment": 1},
        {"round_robin": True, "alignment": 1},
        {"round_robin": True, "alignment": 4},
    ],
    ids=["plain", "round-robin", "aligned"],
)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 3), (3, 4), (2, 2), (7, 16)])
def test_shards_are_cut_anew_bit_for_bit(before: int, after: int, how: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    values = {
        kind: {
            name: torch.randn(shape, generator=draw, dtype=dtype)
            for group in SHAPES
            for name, shape in group.items()
        }
        for kind, dtype in (
            ("weights", torch.float32),
            ("exp_avg", torch.float32),
            ("exp_avg_sq", torch.bfloat16),
        )
    }
    old, new = shards_of(values, before, how), shards_of(values, after, how)
    for rank, expected in enumerate(new):
        # The present state has other content; only its layout is used.
        current = shards_of(
            {
                kind: {name: tensor + 1 for name, tensor in tensors.items()}
                for kind, tensors in values.items()
            },
            after,
            how,
        )[rank]
        found = reshard(iter(old), layout(before, **how)[0], current, layout(after, **how)[0], rank)
        assert differences(found, padded(expected)) == []


def test_shards_of_another_network_are_refused() -> None:
    values = {
        "weights": {name: torch.zeros(shape) for group in SHAPES for name, shape in group.items()}
    }
    how = {"round_robin": False, "alignment": 1}
    shards, (shapes, _) = shards_of(values, 2, how), layout(2, **how)
    others = [
        OrderedDict((f"other.{name}", shape) for name, shape in group.items()) for group in shapes
    ]
    with pytest.raises(RuntimeError, match="differ from this network's"):
        reshard(shards, others, shards[0], shapes, 0)


# --- All kinds of ranks ---


def _engine_files(extra: dict[str, Any], come_from: Path | None, go_to: Path) -> None:
    """Make an engine take three steps, or load what another has saved; then save."""
    from deepspeed.accelerator import get_accelerator

    from pipeline.checkpoint.engine_state import capture_engine, load_engine
    from pipeline.checkpoint.snapshot import HostMemory, Snapshot
    from pipeline.distributed.ranks import start_distributed, stop_distributed
    from pipeline.engine.engine import backward_and_step, build_engine

    ranks = start_distributed()
    # refused on most CPUs, though it works on all
    type(get_accelerator()).is_fp16_supported = lambda self: True
    torch.manual_seed(0 if come_from is None else 1)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.PReLU(), torch.nn.Conv2d(5, 3, 3)
    )
    engine = build_engine(
        module,
        {
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 1 << 60,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            **extra,
        },
        ranks,
    )
    for number in range(3 if come_from is None else 0):
        images = torch.randn(
            1, 3, 8, 8, generator=torch.Generator().manual_seed(10 * number + ranks.rank)
        )
        backward_and_step(
            engine, engine(images.to(next(module.parameters()).dtype)).float().square().mean()
        )
    if come_from is not None:
        load_engine(engine, come_from, "net")
    if ranks.is_first:
        (go_to / "net").mkdir(parents=True)
    ranks.gather(None)
    snapshot = Snapshot(HostMemory())
    files = capture_engine(engine, "net", snapshot)
    snapshot.copy()
    for path, state in files.items():
        torch.save(state.thaw(), go_to / path)
    stop_distributed()


@pytest.mark.parametrize(
    ("chain", "extra"),
    [
        ((3, 2, 3), {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}),
        (
            (1, 2, 1),
            {
                "zero_optimization": {"stage": 1},
                "fp16": {"enabled": True, "initial_scale_power": 8},
            },
        ),
        (
            (2, 1, 2),
            {
                "zero_optimization": {
                    "stage": 2,
                    "round_robin_gradients": True,
                    "parameter_alignment": True,
                }
            },
        ),
        (
            (2, 3, 2),
            {
                "zero_optimization": {"stage": 1},
                "optimizer": {"type": "Adan", "params": {"lr": 0.01}},
            },
        ),
    ],
    ids=["zero1-bf16", "zero1-fp16", "zero2-round-robin", "zero1-adan"],
)
def test_there_and_back_changes_no_bit(
    tmp_path: Path, chain: tuple[int, ...], extra: dict[str, Any]
) -> None:
    """FP32 weights, moments, loss scale and step, including the zeros at the ends."""
    before = None
    for number, procs in enumerate(chain):
        in_ranks(
            _engine_files, tmp_path / f"life{number}", procs, extra, before, tmp_path / str(number)
        )
        before = tmp_path / str(number)
    first, last = tmp_path / "0" / "net", tmp_path / f"{len(chain) - 1}" / "net"
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in last.iterdir())
    assert sum("optim_states" in name for name in names) == chain[0]
    for name in names:
        pair = [torch.load(folder / name, weights_only=False) for folder in (first, last)]
        states = [content.get("optimizer_state_dict", content.get("module")) for content in pair]
        assert differences(*states, where=name) == []


@pytest.mark.parametrize(
    ("before", "after", "extra"),
    [
        (2, 1, (zero(2),)),
        (1, 2, (zero(1), *BF16)),
        (4, 3, (zero(1), "ds.train_batch_size=12")),
        (2, 1, (zero(2), *GAN)),
    ],
    ids=["2-to-1-zero2", "1-to-2-zero1-bf16", "4-to-3-zero1", "gan-2-to-1-zero2"],
)
def test_another_number_of_ranks_continues(
    dataset: Path, tmp_path: Path, before: int, after: int, extra: tuple[str, ...]
) -> None:
    """The next step is what the new number of ranks would have made, up to rounding."""
    train(dataset, tmp_path / "same", "steps=4", *extra, procs=before)
    shutil.copytree(
        tmp_path / "same", tmp_path / "other", ignore=shutil.ignore_patterns("step-00000004")
    )
    printed = train(dataset, tmp_path / "other", "steps=4", *extra, procs=after)
    assert f"note: step 3 was saved by {before} ranks and continues on {after}:" in printed
    assert "continuing from step 3 of 4" in printed
    measured = ("loss", "lr", *(("discriminator",) if GAN[0] in extra else ()))
    (*_, same), (*_, other) = (
        logged(tmp_path / run, "train", *measured) for run in ("same", "other")
    )
    assert other == pytest.approx(same, rel=1e-6)
    manifest = json.loads((checkpoint_dir(tmp_path / "other", 4) / "MANIFEST.json").read_text())
    assert manifest["world_size"] == after
    assert (
        sum("generator/" in name and "optim_states" in name for name in manifest["files"]) == after
    )


def test_a_batch_that_the_ranks_cannot_share_is_refused_with_the_arithmetic(
    dataset: Path, tmp_path: Path
) -> None:
    train(dataset, tmp_path / "run", "steps=3", zero(2), procs=2)
    ranks = lives.start(dataset, tmp_path / "run", "steps=5", zero(2), procs=3)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [2] * 3
    printed = output_of(tmp_path / "run").read_text()
    assert (
        "train_batch_size 4 is not micro-batch x accumulation x 3 ranks (1 x 1 x 3 = 3); set "
        "ds.train_batch_size=3 or 6, or use another number of ranks"
    ) in printed
    assert damage(checkpoint_dir(tmp_path / "run", 3)) == ""


# --- Hosts that do not see the run folder ---
