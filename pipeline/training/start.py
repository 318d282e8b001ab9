"""Initial weights of a run: from a file, another run, or the previous stage."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.checkpoint.engine_state import module_file, read_module
from pipeline.cli import UserError
from pipeline.files import short_path
from pipeline.models import GENERATORS
from pipeline.models.weights import read_network
from pipeline.run_folder import Step, checkpoint_dir, choose_step, newest_stage, run_network_file
from pipeline.training.options import TrainPlan


def load_start_weights(generator: nn.Module, plan: TrainPlan) -> str:
    """Load the weights that the recipe's `start` names into `generator`; return a line about it.

    From a network of another scale, only tensors of the same shape are loaded: all but the
    upsampler's. At the same scale, all shapes must agree. Raises `UserError`.
    """
    recipe = plan.recipe
    start = plan.previous if recipe.start == "previous" else Path(str(recipe.start)).expanduser()
    if start is None:
        raise UserError(
            "start: previous, but this run has no previous stage; name a file or a run folder with "
            "--start"
        )
    step: Step = "newest" if start == plan.previous else "best"
    file = run_network_file(start, step, ema=True) if start.is_dir() else start
    saved, own = read_network(file), generator.state_dict()
    saved.build()  # raises UserError if the file does not even fit the network it names
    tensors = {
        name: tensor
        for name, tensor in saved.state_dict.items()
        if name in own and own[name].shape == tensor.shape
    }
    name = recipe.generator.name
    is_whole = len(tensors) == len(own) == len(saved.state_dict)  # not if an upsampler is left over
    if saved.name != name or (saved.scale == recipe.scale and not is_whole) or not tensors:
        missing = next((key for key in (*own, *saved.state_dict) if key not in tensors), "")
        raise UserError(
            f"start: {file} holds {saved.name} x{saved.scale} {saved.params}, which does not fit "
            f"{name} x{recipe.scale} {recipe.generator.params}"
            + (f" (tensor {missing!r})" if missing else "")
        )
    generator.load_state_dict({**own, **tensors})
    is_filled = len(tensors) == len(own)
    of = "" if is_filled else f", {len(tensors)} of {len(own)} tensors; the others start at random"
    other = _other_params(name, saved.params, recipe.generator.params)
    note = f"; note: trained with {', '.join(other)}" if other else ""
    return f"starting from the weights of {short_path(file)}{of}{note}"


def load_start_discriminator(network: nn.Module, start: str, plan: TrainPlan) -> str:
    """Load a run's newest discriminator into `network`, as far as tensor shapes agree.

    Returns a line about it. Raises `UserError` if nothing fits.
    """
    folder = plan.previous if start == "previous" else newest_stage(Path(start).expanduser())
    if folder is None:
        raise UserError(
            "adversarial.start: previous, but this run has no previous stage; name a run folder"
        )
    step = choose_step(folder, "newest", also=(module_file("discriminator"),))
    checkpoint_folder = checkpoint_dir(folder, step)
    try:
        found = read_module(checkpoint_folder, "discriminator")
    except OSError as error:
        raise UserError(
            f"adversarial.start: {short_path(checkpoint_folder)} contains no discriminator; name "
            "the run folder of a GAN, or omit adversarial.start"
        ) from error
    own = network.state_dict()
    tensors = {
        name: tensor
        for name, tensor in found.items()
        if name in own and own[name].shape == tensor.shape
    }
    if not any(name in tensors for name, _ in network.named_parameters()):
        raise UserError(
            f"adversarial.start: the discriminator in {short_path(checkpoint_folder)} is a "
            "different network; omit adversarial.start, or choose that network with "
            "adversarial.discriminator"
        )
    network.load_state_dict({**own, **tensors})
    return (
        f"the discriminator starts from {len(tensors)} of {len(own)} tensors of "
        f"{short_path(checkpoint_folder)}"
    )


def _other_params(name: str, there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Describe parameters that differ without changing tensor shapes, though they change outputs.

    Example: `["colour_space rgb, here ycbcr", …]`.
    """
    signature = inspect.signature(GENERATORS[name]).parameters.values()
    usual = {
        "colour_space": "rgb",
        **{parameter.name: parameter.default for parameter in signature},
    }
    pairs = {
        key: [params.get(key, usual.get(key, "unset")) for params in (there, here)]
        for key in {**there, **here}
    }
    return [
        f"{key} {first}, here {second}"
        for key, (first, second) in pairs.items()
        if first != second and None not in (first, second)
    ]
