"""Fit training into device memory: smaller micro-batches where it is short, or an explanation.

Each stage but the first is tried before the first begins.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from pipeline.cli import RunError, UserError
from pipeline.config.ds_config import batch_sizes
from pipeline.data.loader import Batch
from pipeline.distributed.ranks import Ranks
from pipeline.engine.engine import resolve_ds_config
from pipeline.files import parse_json, write_atomically
from pipeline.losses.adversarial import ADVERSARIAL_LOSSES
from pipeline.models import build_generator
from pipeline.models.discriminators import build_discriminator
from pipeline.run_folder import checkpoint_steps
from pipeline.training.options import TrainPlan
from pipeline.training.setup import build_networks

MEMORY_FILE = "memory.json"  # in the run folder: the largest micro-batch that may fit
Failure = TypeVar("Failure", bound=BaseException)
REHEARSED = ("cuda",)
"""Device types on which later stages are rehearsed: on a CPU it would take minutes, and memory is
rarely short."""


class MemoryShortageError(RunError):
    """A rank's device ran out of memory.

    Each rank reports it by itself, because the others wait for it in a collective.
    """


def bare(error: Failure) -> Failure:
    """Return `error` without its tracebacks, which would keep the networks in memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


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


def fit_to_memory(plan: TrainPlan, ranks: Ranks) -> TrainPlan:
    """Return `plan`, with micro-batches no larger than an earlier start of the run found to fit.

    All ranks call it together.
    """
    micro, _ = batch_sizes(plan.ds_config, ranks.world_size)
    most = ranks.agree(_read_limit(plan) if ranks.is_first else None)
    if most is None or micro <= most:
        return plan
    share = plan.ds_config["train_batch_size"] // ranks.world_size
    return _with_micro_batch(plan, max(_micro_batches(plan, share, most), default=micro), ranks)


def split_further(
    plan: TrainPlan, error: MemoryShortageError, ranks: Ranks, say: Callable[[str], None]
) -> TrainPlan:
    """Return `plan` with smaller micro-batches and more accumulation, and record them in its run.

    The samples and the number of updates stay the same, and sums are rounded differently. Raises
    `MemoryShortageError` if a micro-batch cannot be smaller (it is one crop, or a pair of crops
    that are mixed), if part of the training depends on how the batch is split, or if there are
    several ranks: the others wait for this one in a collective, so all must be started again.
    """
    micro, accumulation = batch_sizes(plan.ds_config, ranks.world_size)
    share = micro * accumulation
    smaller = max(_micro_batches(plan, share, micro - 1), default=0)
    if not smaller:
        raise error
    if reason := _batch_dependence(plan):
        raise MemoryShortageError(
            f"{error}. Micro-batches are not made smaller by themselves here, because {reason}: "
            f"over {smaller} samples instead of {micro}"
        ) from error
    if ranks.world_size == 1:
        plan.run_dir.mkdir(parents=True, exist_ok=True)
    elif not plan.run_dir.is_dir():  # on another host
        raise error
    write_atomically(
        plan.run_dir / MEMORY_FILE, (json.dumps({"micro_batch": smaller}) + "\n").encode()
    )
    if ranks.world_size > 1:
        raise MemoryShortageError(
            f"{error}. The same command continues with micro-batches of {smaller}"
        ) from error
    say(
        f"{str(error).partition('; set ')[0]}; using micro-batches of {smaller} and "
        f"{share // smaller} of them per update instead: the same samples, and the same weights "
        "but for rounding"
    )
    return _with_micro_batch(plan, smaller, ranks)


def _micro_batches(plan: TrainPlan, share: int, most: int) -> list[int]:
    """Return the sizes up to `most` into which a rank's share of a batch can be divided."""
    unit = 2 if plan.recipe.data.mixing.has_partners else 1  # pairs stay together
    return [size for size in range(unit, most + 1, unit) if share % size == 0]


def _read_limit(plan: TrainPlan) -> int | None:
    """Return the largest micro-batch that may fit, as an earlier start recorded it."""
    path = plan.run_dir / MEMORY_FILE
    try:
        return max(1, int(parse_json(path.read_text())["micro_batch"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; delete it to try the micro-batch asked for") from error


def _with_micro_batch(plan: TrainPlan, micro: int, ranks: Ranks) -> TrainPlan:
    def smaller(config: dict[str, Any] | None) -> dict[str, Any] | None:
        if config is None:
            return None
        count = config["train_batch_size"] // (micro * ranks.world_size)
        return {
            **config,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": count,
        }

    ds_config = smaller(plan.ds_config)
    assert ds_config is not None
    return replace(
        plan,
        ds_config=ds_config,
        discriminator_ds_config=smaller(plan.discriminator_ds_config),
    )


def _batch_dependence(plan: TrainPlan) -> str:
    """Return what in the training depends on the other samples of a micro-batch; "" if nothing."""
    recipe, networks = plan.recipe, {}
    with torch.device("meta"):
        networks["generator"] = build_generator(
            recipe.generator.name, recipe.scale, **recipe.generator.params
        )
        if recipe.adversarial:
            spec = recipe.adversarial.discriminator
            networks["discriminator"] = build_discriminator(
                spec.name, recipe.data.crop, **spec.params
            )
    for name, network in networks.items():
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules()):
            return f"the {name} has batch norm, whose statistics would change"
    if recipe.adversarial and ADVERSARIAL_LOSSES[recipe.adversarial.loss].compares_samples:
        return (
            f"adversarial.loss {recipe.adversarial.loss} compares each sample with the mean of its "
            "micro-batch, which would change"
        )
    return ""


def rehearse(
    plans: Sequence[TrainPlan], ranks: Ranks, say: Callable[[str], None]
) -> list[TrainPlan]:
    """Make one update of each stage but the first on random pixels, then discard it.

    The first stage shows within one step whether it fits; a later one would show it after days.
    Random numbers drawn here have no effect, because each stage seeds its generators when it is
    set up. Returns the plans, with smaller micro-batches where they do not fit. All ranks call it
    together.
    """
    fitting = [plans[0]]
    for plan in plans[1:]:
        begun = ranks.agree(bool(checkpoint_steps(plan.run_dir)))
        if ranks.device.type in REHEARSED and not begun:
            plan = fit_to_memory(plan, ranks)
            while error := _shortage(plan, ranks):
                plan = split_further(plan, error, ranks, say)
            say(
                f"stage {plan.recipe.stage} fits into memory (tested with one update{_peak(ranks)})"
            )
        fitting.append(plan)
    return fitting


def _shortage(plan: TrainPlan, ranks: Ranks) -> MemoryShortageError | None:
    """Rehearse `plan`; return the error if it does not fit."""
    try:
        with explain_out_of_memory(plan, ranks):
            _rehearse(plan, ranks)
    except MemoryShortageError as error:
        return bare(error)
    return None


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
                0, 256, (micro, 3, pixels, pixels), dtype=torch.int32, device=ranks.device
            ).to(torch.uint16 if recipe.data.depth == 16 else torch.uint8)
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
