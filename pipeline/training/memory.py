"""Whether each stage fits into the memory of its device: known before the first one begins, and
said with a way out."""

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
from pipeline.training.options import Plan
from pipeline.training.setup import build_networks

REHEARSED = ("cuda",)
"""Devices on which later stages are rehearsed: a CPU has memory enough, and would take minutes."""


class MemoryShortageError(RunError):
    """A rank's device has no memory left. Each rank says so itself: the others wait for it in a
    collective."""


@contextmanager
def enough_memory(plan: Plan, ranks: Ranks) -> Iterator[None]:
    """Turn "out of memory" in here into one line that says what was too large, and what makes it
    smaller."""
    try:
        yield
    except RuntimeError as error:  # a GPU's is a kind of it; a CPU's is a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(
            error
        ):
            raise
        raise MemoryShortageError(_way_out(plan, ranks)) from error


def _way_out(plan: Plan, ranks: Ranks) -> str:
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
        f"{recipe.data.crop}x{recipe.data.crop} does "
        f"not fit into {where}; say "
        f"{', or '.join([*ways, 'a smaller data.crop or ds.train_batch_size'])}"
    )


def rehearse(plans: Sequence[Plan], ranks: Ranks, say: Callable[[str], None]) -> None:
    """Make one update of each stage but the first on random pixels, and forget it; all ranks call
    it together.

    The first stage shows by itself whether it fits. A later one would show it after days. What is
    drawn at random here leaves no trace: each stage seeds its generators when it is set up.
    """
    for plan in plans[1:]:
        if ranks.device.type in REHEARSED and not ranks.agree(bool(checkpoint_steps(plan.run_dir))):
            with enough_memory(plan, ranks):
                _rehearse(plan, ranks)
            say(
                f"stage {plan.recipe.stage} fits into memory, as an update on random pixels has "
                f"shown{_peak(ranks)}"
            )


def _rehearse(plan: Plan, ranks: Ranks) -> None:
    recipe, spec = plan.recipe, plan.recipe.adversarial
    # With random weights: the stage's own are those that the stages before it will leave.
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
    return f" ({torch.cuda.max_memory_allocated(ranks.device) / 2**30:.1f} GiB)"
