"""Check that each stage fits into device memory before the first begins; explain out-of-memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from pipeline.cli import RunError
from pipeline.config.ds_config import batch_sizes
from pipeline.data.loader import Batch
from pipeline.distributed.ranks import Ranks
from pipeline.engine.engine import resolve_ds_config
from pipeline.run_folder import checkpoint_steps
from pipeline.training.options import TrainPlan
from pipeline.training.setup import build_networks

REHEARSED = ("cuda",)
"""Device types on which later stages are rehearsed: on a CPU it would take minutes, and memory is
rarely short."""


class MemoryShortageError(RunError):
    """A rank's device ran out of memory.

    Each rank reports it by itself, because the others wait for it in a collective.
    """


@contextmanager
def explain_out_of_memory(plan: TrainPlan, ranks: Ranks) -> Iterator[None]:
    """Turn an out-of-memory error in this block into one line with remedies.

    Raises `MemoryShortageError`.
    """
    try:
        yield
    except RuntimeError as error:  # the base class: CPU allocations raise no OutOfMemoryError
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(
            error
        ):
            raise
        raise MemoryShortageError(_memory_advice(plan, ranks)) from error


def _memory_advice(plan: TrainPlan, ranks: Ranks) -> str:
    recipe, batch = plan.recipe, plan.ds_config["train_batch_size"]
    micro, accumulation = batch_sizes(plan.ds_config, ranks.world_size)
    share = batch // ranks.world_size
    where = "this machine's memory"
    if ranks.device.type == "cuda":
        gigabytes = torch.cuda.get_device_properties(ranks.device).total_memory / 2**30
        where = f"{torch.cuda.get_device_name(ranks.device)} ({gigabytes:.0f} GiB)"
    stage = f"stage {recipe.stage}: " if recipe.stage else ""
    more = next((n for n in range(accumulation + 1, share + 1) if share % n == 0), None)
    ways = (
        [f"ds.gradient_accumulation_steps={more} (the same global batch, in smaller parts)"]
        if more
        else []
    )
    ways += (
        ["activation_checkpointing=on (slower)"] if recipe.activation_checkpointing == "off" else []
    )
    return (
        f"{stage}rank {ranks.rank}: a micro-batch of {micro} crops of "
        f"{recipe.data.crop}x{recipe.data.crop} does not fit into {where}; set "
        f"{', or '.join([*ways, 'a smaller data.crop or ds.train_batch_size'])}"
    )


def rehearse(plans: Sequence[TrainPlan], ranks: Ranks, say: Callable[[str], None]) -> None:
    """Make one update of each stage but the first on random pixels, then discard it.

    The first stage shows within one step whether it fits; a later one would show it after days.
    Random numbers drawn here have no effect, because each stage seeds its generators when it is
    set up. All ranks call it together.
    """
    for plan in plans[1:]:
        if ranks.device.type in REHEARSED and not ranks.agree(bool(checkpoint_steps(plan.run_dir))):
            with explain_out_of_memory(plan, ranks):
                _rehearse(plan, ranks)
            say(
                f"stage {plan.recipe.stage} fits into memory (tested with one update{_peak(ranks)})"
            )


def _rehearse(plan: TrainPlan, ranks: Ranks) -> None:
    recipe, spec = plan.recipe, plan.recipe.adversarial
    # Random weights: the stage's initial weights do not exist until the previous stage has run.
    recipe = recipe.model_copy(
        update={
            "start": None,
            "channels_last": "on" if recipe.channels_last == "auto" else recipe.channels_last,
            "adversarial": spec.model_copy(update={"start": None}) if spec else None,
        }
    )
    plan = replace(plan, recipe=recipe)
    ds_config, *_ = resolve_ds_config(
        plan.ds_config,
        world_size=ranks.world_size,
        total_steps=plan.total_steps,
        device=ranks.device,
        runtime=plan.runtime,
    )
    trainer, *_ = build_networks(plan, ds_config, None, ranks, lambda text: None)
    micro, accumulation = (
        ds_config["train_micro_batch_size_per_gpu"],
        ds_config["gradient_accumulation_steps"],
    )
    side = recipe.data.crop
    for index in range(accumulation):
        hr, lr = (
            torch.randint(
                0, 256, (micro, 3, pixels, pixels), dtype=torch.uint8, device=ranks.device
            )
            for pixels in (side, side // recipe.scale)
        )
        trainer.step(Batch(lr, hr, index), 0)
    for engine in trainer.engines.values():
        engine.destroy()
    del trainer
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
        torch.cuda.empty_cache()


def _peak(ranks: Ranks) -> str:
    if ranks.device.type != "cuda":
        return ""
    return f", peak {torch.cuda.max_memory_allocated(ranks.device) / 2**30:.1f} GiB"
