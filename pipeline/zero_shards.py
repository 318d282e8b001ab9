"""ZeRO's optimizer states, written by one number of ranks, cut anew for another.

At ZeRO stages 1 and 2 the parameters of a group lie behind each other in one flat tensor, with zeros at its end, which
is cut into as many equal parts as there are ranks. A rank's file, its shard, holds its part of the FP32 weights and of
the optimizer's moments. Order and zeros depend on the number of ranks; here numbers are moved, never calculated with.
The names are those of DeepSpeed 0.19.8's files (`DeepSpeedZeroOptimizer.state_dict`, `BF16_Optimizer.state_dict`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WEIGHTS = "single_partition_of_fp32_groups"
OPTIMIZER = "base_optimizer_state"
END_PADDINGS = "group_paddings"
PADDINGS = "param_alignment_paddings"
LAYOUT_KEYS = (END_PADDINGS, PADDINGS, "partition_count", "param_slice_mappings")

Shapes = Sequence[Mapping[str, torch.Size]]
"""Of each group: the shapes of its parameters by name, in the order of the flat tensor."""


@dataclass(frozen=True)
class GroupLayout:
    """How the parameters of a group lie in its flat tensor, for one number of ranks."""

    places: Mapping[str, tuple[int, int]]  # of each parameter: its first element and their number
    part: int  # elements a rank, zeros included


def layouts(shard: Mapping[str, Any], shapes: Shapes) -> list[GroupLayout]:
    """The layout of each group in the ranks' states of which `shard` is one."""
    found = []
    for group, (weights, named) in enumerate(zip(shard[WEIGHTS], shapes, strict=True)):
        gaps = shard[PADDINGS][group] if PADDINGS in shard else [0] * len(named)
        places, start = {}, 0
        for (name, shape), gap in zip(named.items(), gaps, strict=True):
            places[name] = (start, shape.numel())
            start += shape.numel() + gap
        # Of the two optimizers only the one that names its stage leaves the zeros at the end out of the weights.
        left_out = shard[END_PADDINGS][group] if "zero_stage" in shard else 0
        found.append(GroupLayout(places, weights.numel() + left_out))
    return found


def recut(shards: Iterable[Mapping[str, Any]], old_shapes: Shapes, current: Mapping[str, Any], new_shapes: Shapes,
          rank: int) -> dict[str, Any]:
    """The shard of `rank` as it would be, had today's ranks written the checkpoint that consists of `shards`.

    `shards` in rank order, read one at a time; `current`: the state that this rank's optimizer has now, for its layout.
    Raises `RuntimeError` if the two are not of the same parameters.
    """
    new, result = layouts(current, new_shapes), {}
    for old_rank, shard in enumerate(shards):
        old = layouts(shard, old_shapes)
        if [group.places.keys() for group in old] != [group.places.keys() for group in new]:
            raise RuntimeError("the checkpoint's ZeRO shards hold other parameters than this network has")
        if not result:
            result = _blank(shard, old, current, new)
        for group, (before, after) in enumerate(zip(old, new, strict=True)):
            pairs = list(_flat_pairs(shard, result, group, before.part))
            for source, target, count in _moves(before, old_rank, after, rank):
                for given, taken in pairs:
                    taken[target:target + count].copy_(given[source:source + count])
    return result


def _moves(old: GroupLayout, old_rank: int, new: GroupLayout, new_rank: int) -> Iterator[tuple[int, int, int]]:
    """(where in the old rank's part, where in the new rank's, elements) of all that the two parts share."""
    for name, (source, count) in old.places.items():
        target = new.places[name][0]
        first = max(0, old_rank * old.part - source, new_rank * new.part - target)
        last = min(count, (old_rank + 1) * old.part - source, (new_rank + 1) * new.part - target)
        if first < last:
            yield source + first - old_rank * old.part, target + first - new_rank * new.part, last - first


def _blank(shard: Mapping[str, Any], old: Sequence[GroupLayout], current: Mapping[str, Any],
           new: Sequence[GroupLayout]) -> dict[str, Any]:
    """`shard` with zeros of the new size for what lies in parts; the rest, such as the step, is the same everywhere."""
    result = {**shard, **{key: current[key] for key in LAYOUT_KEYS if key in current}}
    result[WEIGHTS] = [weights.new_zeros(group.part) for weights, group in zip(shard[WEIGHTS], new, strict=True)]
    states = {}
    for group, (before, after) in enumerate(zip(old, new, strict=True)):
        number = _number(shard, group)
        state = shard[OPTIMIZER]["state"].get(number)
        if state is not None:  # a run that has skipped all of its updates has none
            states[number] = {key: value.new_zeros(after.part) if _is_flat(value, before.part) else value
                              for key, value in state.items()}
    result[OPTIMIZER] = {**shard[OPTIMIZER], "state": states}
    return result


def _flat_pairs(shard: Mapping[str, Any], result: Mapping[str, Any], group: int,
                part: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(tensor of the old part, tensor of the new one): the group's FP32 weights and each of its moments."""
    yield shard[WEIGHTS][group], result[WEIGHTS][group]
    number = _number(shard, group)
    for key, value in shard[OPTIMIZER]["state"].get(number, {}).items():
        if _is_flat(value, part):
            yield value, result[OPTIMIZER]["state"][number][key]


def _number(shard: Mapping[str, Any], group: int) -> int:
    """By which the optimizer knows the group's only parameter: its part."""
    return shard[OPTIMIZER]["param_groups"][group]["params"][0]


def _is_flat(value: Any, part: int) -> bool:
    return torch.is_tensor(value) and value.shape == (part,)
