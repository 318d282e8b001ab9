"""Initial weights of a run: from a file, another run, or the previous stage."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.checkpoint.engine_state import module_file, read_module
from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.files import short_path
from pipeline.models import GENERATORS, build_outline, spandrel
from pipeline.models.weights import SavedNetwork, read_network
from pipeline.run_folder import Step, checkpoint_dir, choose_step, newest_stage, run_network_file
from pipeline.training.options import TrainPlan
from pipeline.training.saved_run import as_recorded

# A start file may come from a network with another residual, value range or colour space: switches
# that leave the shapes of the weights as they are, and without which the weights make other images.
# A new run adopts these from the file, before anything else is done with its plan, so that its
# recipe, its identity and all its files say what is trained. Sizes and the scale are not adopted.


def with_start_params(plans: Sequence[TrainPlan], ranks: Ranks) -> list[TrainPlan]:
    """Return the plans with the generator's switches of the files that they start from.

    What the command line sets stays. A run that exists has its switches from its checkpoints, and
    a stage that starts from the previous one adopts what that has adopted. All ranks call it
    together. Raises `UserError`.
    """
    # Only the first rank's host may have the file.
    found = ranks.on_all_ranks(lambda: _start_params(plans) if ranks.is_first else [])
    return [
        plan.with_start_params(*params)
        for plan, params in zip(plans, ranks.agree(found), strict=True)
    ]


def _start_params(plans: Sequence[TrainPlan]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the arguments of `TrainPlan.with_start_params` for each plan."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for number, plan in enumerate(plans):
        params = plan.recipe.generator.params
        recorded = None if plan.reset else as_recorded(plan)
        if recorded is not None:
            found.append((recorded.recipe.generator.params, dict(recorded.adopted)))
            continue
        switches: dict[str, Any] = {}
        if plan.recipe.start == "previous" and number:
            before = plans[number - 1].recipe
            previous, adopted = found[-1]
            if (before.generator.name, before.scale) == (
                plan.recipe.generator.name,
                plan.recipe.scale,
            ):
                switches = {
                    key: previous[key]
                    for key, asked in adopted.items()
                    if params.get(key) == asked and key not in plan.fixed_params
                }
        elif plan.recipe.start is not None:
            switches = _switches_of_file(plan)
        adopted = {key: params.get(key) for key in switches}
        found.append((params | switches, adopted))
    return found


def _switches_of_file(plan: TrainPlan) -> dict[str, Any]:
    """Return the switches in which the network of the start file differs from the recipe's.

    Empty for a network of another kind, scale or size, which `load_start_weights` refuses or takes
    in part.
    """
    spec, saved = plan.recipe.generator, read_network(_start_file(plan))
    if (saved.name, saved.scale) != (spec.name, plan.recipe.scale):
        return {}
    switches = {
        key: there
        for key, (there, _) in _differences(saved, spec.params).items()
        if key not in plan.fixed_params
        # Files without our description do not say what space they work in.
        and (key != "colour_space" or key in saved.params)
    }
    if not switches:
        return {}
    # The numbers of a recipe may be any; those of a file were checked against its tensors.
    own = build_outline(spec.name, saved.scale, spec.params, sys.maxsize)
    return switches if _shapes(own) == _shapes(saved.build()) else {}


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}


def _start_file(plan: TrainPlan) -> Path:
    """Return the weights file that the recipe's `start` names. Raises `UserError`."""
    start = str(plan.recipe.start)
    folder = plan.previous if start == "previous" else Path(start).expanduser()
    if folder is None:
        raise UserError(
            "start: previous, but this run has no previous stage; name a file or a run folder with "
            "--start"
        )
    step: Step = "newest" if folder == plan.previous else "best"
    return run_network_file(folder, step, ema=True) if folder.is_dir() else folder


def load_start_weights(generator: nn.Module, plan: TrainPlan) -> str:
    """Load the weights that the recipe's `start` names into `generator`; return a line about it.

    From a network of another scale, only tensors of the same shape are loaded: all but the
    upsampler's. At the same scale, all shapes must agree. Raises `UserError`, which names the
    overrides with which the file fits.
    """
    recipe, file = plan.recipe, _start_file(plan)
    saved, own = read_network(file), generator.state_dict()
    saved.build()  # raises UserError if the file does not even fit the network it names
    tensors = {
        name: tensor
        for name, tensor in saved.state_dict.items()
        if name in own and own[name].shape == tensor.shape
    }
    is_whole = len(tensors) == len(own) == len(saved.state_dict)  # not if an upsampler is left over
    if (
        saved.name != recipe.generator.name
        or (saved.scale == recipe.scale and not is_whole)
        or not any(name in tensors for name, _ in generator.named_parameters())
    ):
        raise UserError(_misfit(file, saved, plan, own, tensors))
    generator.load_state_dict({**own, **tensors})
    adopted = ", ".join(
        f"{key} {recipe.generator.params.get(key, 'unset')} (the recipe: "
        f"{'unset' if asked is None else asked})"
        for key, asked in plan.adopted.items()
    )
    is_filled = len(tensors) == len(own)
    of = (
        ""
        if is_filled
        else f" for x{saved.scale}, {len(tensors)} of {len(own)} tensors; the others start at "
        "random"
    )
    other = [
        f"{key} {there}, here {here}"
        for key, (there, here) in _differences(saved, recipe.generator.params).items()
    ]
    return (
        f"starting from the weights of {short_path(file)}{of}"
        + (f"; with the file's {adopted}" if adopted else "")
        + (f"; note: trained with {', '.join(other)}" if other else "")
    )


def _misfit(
    file: Path,
    saved: SavedNetwork,
    plan: TrainPlan,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> str:
    """Return the message that the file does not fit the recipe, and what makes it fit."""
    name, params = plan.recipe.generator.name, plan.recipe.generator.params
    where = f"start: {short_path(file)} holds {saved.name} x{saved.scale}, "
    usual = _usual(saved)
    table = {key: value for key, value in saved.params.items() if value != usual.get(key)}
    whole = shlex.quote(f"generator={_yaml({'name': saved.name, **table})}")
    scale = "" if saved.scale == plan.recipe.scale else f"scale={saved.scale} "
    if saved.name != name:
        return (
            f"{where}but the recipe {plan.recipe.name} trains {name} x{plan.recipe.scale}; choose "
            f"a recipe of {saved.name}, or add {scale}{whole}"
        )
    differences = _differences(saved, params, with_unset=True)
    said = ", ".join(f"{key} {there}" for key, (there, _) in differences.items())
    asked = ", ".join(f"{key} {here}" for key, (_, here) in differences.items())
    if not differences:
        missing = next((key for key in (*own, *saved.state_dict) if key not in tensors), "")
        said, asked = f"which has another tensor {missing!r}", f"{name} x{plan.recipe.scale}"
    overrides = (
        whole
        if name == "spandrel"
        else " ".join(f"generator.{key}={_yaml(there)}" for key, (there, _) in differences.items())
    )
    return f"{where}{said}, but the recipe asks for {asked}; it fits with {scale}{overrides}"


def _yaml(value: Any) -> str:
    """Format a parameter or a table of them for an override, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _usual(saved: SavedNetwork) -> dict[str, Any]:
    """Return the values of a network's parameters that are not given."""
    signature = inspect.signature(GENERATORS[saved.name]).parameters.values()
    usual = {parameter.name: parameter.default for parameter in signature}
    if saved.name == "spandrel":
        arch = str(saved.params["arch"])
        usual = spandrel.usual_arguments(spandrel.class_of(arch, saved.scale), arch, saved.scale)
    return {"colour_space": "rgb", **{key: spandrel.plain(value) for key, value in usual.items()}}


def _differences(
    saved: SavedNetwork, here: Mapping[str, Any], *, with_unset: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Return the parameters whose values in a file differ from those in a recipe, and both values.

    Leaves out those that determine nothing but the initial weights and, unless `with_unset`, those
    of our own networks that one of the two leaves to the network (None).
    """
    usual, there = _usual(saved), saved.params
    pairs = {
        key: (there.get(key, usual.get(key)), here.get(key, usual.get(key)))
        for key in dict.fromkeys((*there, *here))
        if key not in getattr(GENERATORS[saved.name], "ONLY_INITIAL", ())
    }
    return {
        key: (first, second)
        for key, (first, second) in pairs.items()
        if first != second
        and (with_unset or saved.name == "spandrel" or None not in (first, second))
    }


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
