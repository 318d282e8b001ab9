"""An engine's files in a checkpoint: capture, load, reshard. Never executes code from a file."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.snapshot import Frozen, Snapshot
from pipeline.engine.engine import Engine, quiet

# Resharding of ZeRO's optimizer states from one number of ranks to another.
#
# At ZeRO stages 1 and 2 the parameters of a group are concatenated into one flat tensor, padded
# with zeros and cut into equal parts, one per rank. A rank's file, its shard, holds its part of the
# FP32 weights and of the optimizer's moments. Order and padding depend on the number of ranks;
# resharding only moves numbers and never computes with them. The keys are those of DeepSpeed
# 0.19.8's files (`DeepSpeedZeroOptimizer.state_dict`, `BF16_Optimizer.state_dict`).


WEIGHTS = "single_partition_of_fp32_groups"
OPTIMIZER = "base_optimizer_state"
END_PADDINGS = "group_paddings"
PADDINGS = "param_alignment_paddings"
LAYOUT_KEYS = (END_PADDINGS, PADDINGS, "partition_count", "param_slice_mappings")

Shapes = Sequence[Mapping[str, torch.Size]]
"""For each group: parameter name -> shape, in the order of the flat tensor."""


@dataclass(frozen=True)
class GroupLayout:
    """Where a group's parameters are in its flat tensor, for one number of ranks."""

    places: Mapping[str, tuple[int, int]]  # parameter name -> (first element, number of elements)
    part: int  # elements per rank, including padding


def layouts(shard: Mapping[str, Any], shapes: Shapes) -> list[GroupLayout]:
    """Return each group's layout in the set of shards to which `shard` belongs."""
    found = []
    for group, (weights, named) in enumerate(zip(shard[WEIGHTS], shapes, strict=True)):
        gaps = shard[PADDINGS][group] if PADDINGS in shard else [0] * len(named)
        places, start = {}, 0
        for (name, shape), gap in zip(named.items(), gaps, strict=True):
            places[name] = (start, shape.numel())
            start += shape.numel() + gap
        # Of DeepSpeed's two optimizers, only the one that records its stage stores the weights
        # without the padding at the end.
        padding = shard[END_PADDINGS][group] if "zero_stage" in shard else 0
        found.append(GroupLayout(places, weights.numel() + padding))
    return found


def reshard(
    shards: Iterable[Mapping[str, Any]],
    old_shapes: Shapes,
    current: Mapping[str, Any],
    new_shapes: Shapes,
    rank: int,
) -> dict[str, Any]:
    """Return the shard that `rank` would have, had the current ranks written the checkpoint.

    `shards`: the checkpoint's, in rank order, read one at a time. `current`: the present state of
    this rank's optimizer, for its layout. Raises `RuntimeError` if the two hold different
    parameters.
    """
    new, result = layouts(current, new_shapes), {}
    for old_rank, shard in enumerate(shards):
        old = layouts(shard, old_shapes)
        # Compared as sets, since the order within a group depends on the number of ranks.
        if [group.places.keys() for group in old] != [group.places.keys() for group in new]:
            raise RuntimeError(
                "the parameters in the checkpoint's ZeRO shards differ from this network's"
            )
        if not result:
            result = _empty_shard(shard, old, current, new)
        for group, (before, after) in enumerate(zip(old, new, strict=True)):
            pairs = list(_flat_pairs(shard, result, group, before.part))
            # The optimizer's moments are cut in the same places as the weights, so the same offsets
            # serve both.
            for source, target, count in _overlaps(before, old_rank, after, rank):
                for old_part, new_part in pairs:
                    new_part[target : target + count].copy_(old_part[source : source + count])
    return result


def _overlaps(
    old: GroupLayout, old_rank: int, new: GroupLayout, new_rank: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (offset in the old part, offset in the new part, elements) of each shared range."""
    for name, (source, count) in old.places.items():
        target = new.places[name][0]
        # Part r of the flat tensor holds the elements from r * part on. What a parameter has in
        # common with an old and a new part is the intersection of three intervals, here counted
        # from its first element.
        first = max(0, old_rank * old.part - source, new_rank * new.part - target)
        last = min(count, (old_rank + 1) * old.part - source, (new_rank + 1) * new.part - target)
        if first < last:
            yield (
                source + first - old_rank * old.part,
                target + first - new_rank * new.part,
                last - first,
            )


def _empty_shard(
    shard: Mapping[str, Any],
    old: Sequence[GroupLayout],
    current: Mapping[str, Any],
    new: Sequence[GroupLayout],
) -> dict[str, Any]:
    """Return `shard` with zeros of the new size for everything that is partitioned.

    The rest, such as the step counter, is the same in all shards.
    """
    result = {**shard, **{key: current[key] for key in LAYOUT_KEYS if key in current}}
    result[WEIGHTS] = [
        weights.new_zeros(group.part) for weights, group in zip(shard[WEIGHTS], new, strict=True)
    ]
    states = {}
    for group, (before, after) in enumerate(zip(old, new, strict=True)):
        number = _parameter_index(shard, group)
        state = shard[OPTIMIZER]["state"].get(number)
        if state is not None:  # None if the run has skipped all of its updates
            states[number] = {
                key: value.new_zeros(after.part) if _is_flat(value, before.part) else value
                for key, value in state.items()
            }
    result[OPTIMIZER] = {**shard[OPTIMIZER], "state": states}
    return result


def _flat_pairs(
    shard: Mapping[str, Any], result: Mapping[str, Any], group: int, part: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (old tensor, new tensor) for the group's FP32 weights and each of its moments."""
    yield shard[WEIGHTS][group], result[WEIGHTS][group]
    number = _parameter_index(shard, group)
    for key, value in shard[OPTIMIZER]["state"].get(number, {}).items():
        if _is_flat(value, part):
            yield value, result[OPTIMIZER]["state"][number][key]


def _parameter_index(shard: Mapping[str, Any], group: int) -> int:
    """Return the optimizer's index of the group's only parameter, this rank's part."""
    return shard[OPTIMIZER]["param_groups"][group]["params"][0]


def _is_flat(value: Any, part: int) -> bool:
    return torch.is_tensor(value) and value.shape == (part,)


SHARD = re.compile(r"((?:bf16_)?zero_pp_rank_)(\d+)(_mp_rank_00_optim_states\.pt)")
"""File name of a rank's optimizer states at ZeRO stages 1 and 2."""


def capture_engine(engine: Engine, name: str, snapshot: Snapshot) -> dict[str, Frozen]:
    """Add what this rank saves of the engine to `snapshot`; all ranks call it together.

    Returns file path in the checkpoint (`name`/FILE) -> content, which `Frozen.thaw` gives back for
    torch.save.
    """
    files = _CapturedFiles(snapshot)
    with quiet():
        engine.save(_CapturedFiles.FOLDER, name, files)
    return files.states


def load_engine(engine: Engine, directory: os.PathLike[str] | str, name: str) -> None:
    """Load what was saved from `capture_engine`, on any number of ranks."""
    with quiet():
        if not engine.load(str(directory), name, _LoadedFiles(engine)):
            raise RuntimeError(f"{directory}/{name} could not be loaded")


def read_module(directory: os.PathLike[str] | str, name: str) -> dict[str, Tensor]:
    """Return the weights by name, on the CPU, of the network captured as `name`.

    Raises `OSError` if there is none.
    """
    return dict(_read(os.path.join(directory, module_file(name)), "cpu")["module"])


def module_file(name: str) -> str:
    """Return the path in a checkpoint of the weights of the network captured as `name`."""
    return f"{name}/mp_rank_00_model_states.pt"


class _CheckpointFiles:
    """The parts of DeepSpeed's `CheckpointEngine` that saving and loading have in common."""

    name = "vastscale"

    def create(self, info: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def save(self, state_dict: Any, path: str) -> None:
        raise NotImplementedError

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError

    def commit(self, info: Any) -> bool:
        # `saving.Saver` commits the files of all engines and ranks at once.
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


class _CapturedFiles(_CheckpointFiles):
    """Keeps in memory what an engine writes: the training thread must not wait for the disk."""

    FOLDER = "checkpoint"  # the folder that DeepSpeed believes it writes into

    def __init__(self, snapshot: Snapshot) -> None:
        self.states: dict[str, Frozen] = {}
        self._snapshot = snapshot

    def save(self, state_dict: Any, path: str) -> None:
        self.states[os.path.relpath(path, self.FOLDER)] = self._snapshot.add(state_dict)


class _LoadedFiles(_CheckpointFiles):
    """Presents a checkpoint to `engine` as if the present number of ranks had written it.

    Never executes code from a file.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        # The checkpoint's; known after the weights have been read, which come first.
        self._num_shards = 0
        self._shapes: Shapes = []

    def load(self, path: str, map_location: Any = None) -> Any:
        folder, name = os.path.split(path)
        shard = SHARD.fullmatch(name)
        if shard and self._num_shards != dist.get_world_size():
            # With another number of ranks the file of this rank may not exist, or holds other
            # elements.
            return {"optimizer_state_dict": self._reshard(folder, shard)}
        state = _read(path, map_location)
        if "dp_world_size" in state:
            self._num_shards, self._shapes = state["dp_world_size"], state.get("param_shapes") or []
            # DeepSpeed refuses any other number of ranks. What depends on it is resharded above.
            state["dp_world_size"] = dist.get_world_size()
        return state

    def _reshard(self, folder: str, wanted: re.Match[str]) -> dict[str, Any]:
        """Build the optimizer states for the file `wanted`, which need not exist."""

        def shards() -> Iterator[dict[str, Any]]:
            for rank in range(self._num_shards):
                yield _read(os.path.join(folder, f"{wanted[1]}{rank}{wanted[3]}"), "cpu")[
                    "optimizer_state_dict"
                ]

        return reshard(
            shards(),
            self._shapes,
            self._engine.optimizer.state_dict(),
            self._engine.zero_shapes(),
            int(wanted[2]),
        )


def _read(path: str, map_location: Any) -> Any:
    # DeepSpeed's own loader unpickles whatever a file contains, so a checkpoint from elsewhere
    # could run code here. With `weights_only`, nothing is built but tensors, plain values and
    # these types.
    with torch.serialization.safe_globals(_deepspeed_types()):
        return torch.load(path, map_location=map_location, weights_only=True)


def _deepspeed_types() -> list[type]:
    """Return the types that DeepSpeed's files may contain.

    None if it is not installed, because then Accelerate wrote the files.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
