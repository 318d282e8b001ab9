"""A DeepSpeed engine's part of a checkpoint, on disk. Nothing that a file brings is ever run."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.engine.engine import quiet
from pipeline.engine.schedules import Schedule
from pipeline.zero_shards import Shapes, recut

SHARD = re.compile(r"((?:bf16_)?zero_pp_rank_)(\d+)(_mp_rank_00_optim_states\.pt)")
"""The name of a rank's optimizer states at ZeRO stages 1 and 2."""


def save_engine(engine: Any, directory: os.PathLike[str] | str, name: str) -> str:
    """Write the engine's part of a checkpoint to `directory`/`name`. On return every rank is done.

    Returns why this rank could not write; empty if it did. (Raising in between would leave the other ranks waiting.)
    """
    engine.checkpoint_engine = files = _CheckpointFiles()
    with quiet():
        engine.save_checkpoint(str(directory), tag=name, save_latest=False)
    return files.failure


def load_engine(engine: Any, directory: os.PathLike[str] | str, name: str) -> None:
    """Put back what `save_engine` wrote, on this or another number of ranks."""
    engine.checkpoint_engine = _CheckpointFiles(engine)
    with quiet():
        path, _ = engine.load_checkpoint(str(directory), tag=name)
    if path is None:
        raise RuntimeError(f"{directory}/{name} could not be loaded")
    schedule = engine.lr_scheduler
    if schedule is not None and not isinstance(schedule, Schedule):  # its length may be another one now
        for group, rate in zip(engine.optimizer.param_groups, schedule.get_lr(), strict=True):
            group["lr"] = rate


def read_module(directory: os.PathLike[str] | str, name: str) -> dict[str, Tensor]:
    """The weights of a network, by name, that `save_engine` wrote as `name`, on the CPU. `OSError` if it did not."""
    weights = _read(os.path.join(directory, name, "mp_rank_00_model_states.pt"), "cpu")
    return dict(weights["module"])


class _CheckpointFiles:
    """DeepSpeed's `CheckpointEngine` that keeps a failure for later and never runs code that a file brings.

    To load into `engine` it shows a checkpoint as if this number of ranks had written it.
    """

    name = "vastscale"

    def __init__(self, engine: Any = None) -> None:
        self.failure = ""
        self._engine = engine
        self._num_shards = 0  # of the checkpoint; known when the weights have been read, which come first
        self._shapes: Shapes = []

    def create(self, info: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._try(lambda: os.makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        self._try(lambda: torch.save(state_dict, path))

    def load(self, path: str, map_location: Any = None) -> Any:
        folder, name = os.path.split(path)
        shard = SHARD.fullmatch(name)
        if shard and self._num_shards != dist.get_world_size():
            return {"optimizer_state_dict": self._recut(folder, shard)}
        state = _read(path, map_location)
        if "dp_world_size" in state:
            self._num_shards, self._shapes = state["dp_world_size"], state.get("param_shapes") or []
            state["dp_world_size"] = dist.get_world_size()  # DeepSpeed refuses any other
        return state

    def _recut(self, folder: str, wanted: re.Match[str]) -> dict[str, Any]:
        """The optimizer states that the file `wanted`, which may not exist, would hold."""
        def shards() -> Iterator[dict[str, Any]]:
            for rank in range(self._num_shards):
                yield _read(os.path.join(folder, f"{wanted[1]}{rank}{wanted[3]}"), "cpu")["optimizer_state_dict"]

        return recut(shards(), self._shapes, self._engine.optimizer.state_dict(),
                     self._engine._get_zero_param_shapes(), int(wanted[2]))

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


def _read(path: str, map_location: Any) -> Any:
    with torch.serialization.safe_globals(_deepspeeds_types()):
        return torch.load(path, map_location=map_location, weights_only=True)


def _deepspeeds_types() -> list[type]:
    """Those that its files may hold; none where it is not installed: then Accelerate wrote them."""
    if importlib.util.find_spec("deepspeed") is None:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
