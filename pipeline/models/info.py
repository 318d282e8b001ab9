"""Print a network's layers, parameters, multiply-adds, receptive field and weight size.

python -m pipeline.models.info vapsr_x4
python -m pipeline.models.info --table
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cli import UserError, run
from pipeline.config.recipe import Recipe, load_recipe, parse_overrides
from pipeline.models import build_generator, comparison
from pipeline.models.discriminators import (
    AttentionUNetDiscriminator,
    PatchDiscriminator,
    build_discriminator,
)
from pipeline.models.spandrel import SpandrelNetwork, large_weights
from pipeline.models.weights import SUFFIXES, read_network
from pipeline.run_folder import run_network_file

LARGEST_PROBE = 1024
"""Longest LR image, in pixels, with which the receptive field is measured.

A receptive field is therefore either smaller than this or global.
"""
STRIP = 8
"""The other side of these images, in pixels."""
GLOBAL, NOT_MEASURED = "global", "not measured"
SEEN = {
    GLOBAL: "global: the whole image",
    NOT_MEASURED: "not measured: the architecture does not consist of convolutions only",
}


@dataclass(frozen=True)
class Options:
    """Print the layers of a network, its parameters, multiply-adds, receptive field and size.

    The network is given by a recipe, a weights file (.safetensors, .pth…) or a run folder (its best
    averaged weights). Needs no dataset and no GPU. Multiply-adds (MACs) count the convolutions and
    matrix products for one HR image of size --hr, as in papers; a FLOP count is twice as high.

    --table compares the networks of all recipes: also their speed and memory on this CPU, their
    effective receptive field, and whether they convert to ONNX and OpenVINO.

    For example:

        python -m pipeline.models.info vapsr_x4 generator.num_blocks=11

        python -m pipeline.models.info runs/demo --json
    """

    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE|FILE|RUN")] = ""
    """Name of a recipe in recipes/, path of a YAML recipe, weights file, or run folder."""
    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE ...")
    ] = ()
    """Overrides of the recipe as key=value, e.g. generator.num_blocks=11."""
    part: Literal["generator", "discriminator"] = "generator"
    """Which network of the recipe; a discriminator is measured with one crop."""
    hr: tuple[int, int] = (1280, 720)
    """Width and height of the HR image to measure for, rounded down to multiples of the scale."""
    effective: bool = False
    """Also measure the effective receptive field (Luo et al. 2016): the side of the square that has
    95 % of the gradient's energy. A recipe's network gets random weights of full size for it."""
    json: bool = False
    """Print one JSON object with all numbers instead of the table."""
    table: bool = False
    """Compare the networks of all recipes. Takes a minute or two per network."""
    recipes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """With --table: only the networks of these recipes."""
    write: bool = False
    """With --table: also write the rows into docs/networks.md."""
    skip_conversion: bool = False
    """With --table: leave out the conversions, which take minutes for networks with attention."""
    seconds: float = 5
    """With --table: CPU seconds that each timing takes at least."""
    selfcheck: Path | None = None
    """With --table: a result of launch.selfcheck, for a column with the GPU's training speed."""


@dataclass(frozen=True)
class Layer:
    """A module that has its own parameters, or has no submodules."""

    name: str
    type: str
    output: tuple[int, ...] | None
    """Its shape without the batch dimension; `None` if the layer did not run."""
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Report:
    """All results for a network. Image sizes are (height, width), weight sizes are in bytes."""

    title: str
    scale: int
    layers: list[Layer]
    parameters: int
    input_size: tuple[int, int]
    multiply_adds: int
    receptive_field: tuple[int, int] | str
    """(height, width) in input pixels, "global", or "not measured".

    "global" means at least `LARGEST_PROBE` pixels, or a single output for the whole image.
    """
    float32_bytes: int
    float16_bytes: int
    effective_field: int | str | None = None
    """Side of the square in input pixels; None: not measured."""


def main(options: Options) -> int:
    """Print the report of the network, or the table of networks."""
    if options.table:
        return _print_table(options)
    for name in ("recipes", "write", "selfcheck"):
        if getattr(options, name):
            raise UserError(f"--{name} belongs to --table; add --table, or omit it")
    if not options.target:
        raise UserError("name a RECIPE|FILE|RUN, or compare the networks of all recipes: --table")
    title, network, scale, size = _build(options)
    report = describe(network, title, scale, size)
    if options.effective:
        if options.part != "generator":
            raise UserError("--effective measures generators; omit --part")
        report = replace(report, effective_field=_effective(options, network, scale))
    print(json.dumps(as_json(report), indent=1) if options.json else format_report(report))
    return 0


def _effective(options: Options, network: nn.Module, scale: int) -> int | str:
    with nullcontext() if _is_file(options.target) else large_weights(network):
        side = comparison.effective_field(network, scale)
    return f"above {comparison.LARGEST_FIELD}" if side is None else side


def _print_table(options: Options) -> int:
    if options.target or options.json or options.part != "generator":
        raise UserError("--table compares generators of recipes; give names with --recipes")
    if options.seconds <= 0:
        raise UserError(f"--seconds {options.seconds:g} must be above 0")
    if options.write and options.hr != Options.hr:
        raise UserError("--write: the page has multiply-adds for 1280x720; omit --hr")
    comparison.check_recipes(options.recipes)
    page = comparison.Page(options.recipes) if options.write else None
    rows: list[comparison.Row] = []
    for row in comparison.compare_recipes(
        options.recipes,
        lambda recipe, network: _cells(recipe, network, options.hr),
        seconds=options.seconds,
        convert=not options.skip_conversion,
        selfcheck=options.selfcheck,
    ):
        rows.append(row)
        if page:  # after each network: what was measured before an interruption is kept
            page.write(rows)
    print(comparison.markdown(rows))
    return 0


def _cells(recipe: Recipe, network: nn.Module, hr: tuple[int, int]) -> dict[str, str]:
    """Return the cells of the table that need no measurement of time."""
    report = describe(network, "", recipe.scale, _lr_size(hr, recipe.scale))
    name, field = recipe.generator.params.get("arch", recipe.generator.name), report.receptive_field
    return {
        "network": f"{name} x{recipe.scale}",
        "parameters": f"{report.parameters:,}",
        "GMACs": f"{report.multiply_adds / 1e9:,.1f}",
        "field": {GLOBAL: "all", NOT_MEASURED: "varies"}.get(str(field), str(field[0])),
    }


def describe(network: nn.Module, title: str, scale: int, input_size: tuple[int, int]) -> Report:
    """Measure a float32 network that upscales NCHW RGB by `scale`, without changing it."""
    network = copy.deepcopy(network).eval()
    layers, multiply_adds, output = _run_on_meta(network, input_size)
    tensors = network.state_dict().values()
    return Report(
        title=title,
        scale=scale,
        layers=layers,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        input_size=input_size,
        multiply_adds=multiply_adds,
        receptive_field=_field(network, scale) if len(output) == 4 else GLOBAL,
        float32_bytes=sum(tensor.nbytes for tensor in tensors),
        float16_bytes=sum(
            tensor.nbytes // (2 if tensor.is_floating_point() else 1) for tensor in tensors
        ),
    )


def _field(network: nn.Module, scale: int) -> tuple[int, int] | str:
    # The reach of attention windows depends on the position.
    if isinstance(network, SpandrelNetwork) and not network.is_convolutional:
        return NOT_MEASURED
    # Of several scales, that of the finest. A patch's logits are several pixels apart.
    if isinstance(network, PatchDiscriminator):
        return network.receptive_field, network.receptive_field
    if isinstance(network, AttentionUNetDiscriminator):
        network = network.scales[0]
    return receptive_field(network, scale) or GLOBAL


def receptive_field(network: nn.Module, scale: int) -> tuple[int, int] | None:
    """Measure the receptive field as (height, width) in input pixels; `None` if it is global.

    It covers all outputs at the position of one input pixel. A NaN at the border of an image
    reaches exactly the outputs that depend on it, whatever the weights. If positions differ
    (internal strides), the farthest reach to either side counts. The network must be in eval mode.
    """
    sides = [_receptive_side(network, scale, is_vertical) for is_vertical in (True, False)]
    return None if None in sides else (sides[0], sides[1])


def _receptive_side(network: nn.Module, scale: int, is_vertical: bool) -> int | None:
    width = 64
    while width <= LARGEST_PROBE:
        images = torch.zeros(2, 3, STRIP, width)
        images[0, ..., 0] = images[1, ..., -1] = torch.nan  # spread to the right, and to the left
        with torch.no_grad(), _Influence():
            outputs = network(images.transpose(2, 3) if is_vertical else images)
        reached = outputs.isnan().any(1).any(2 if is_vertical else 1)
        right = int(reached[0].nonzero().max()) // scale
        left = width - 1 - int(reached[1].nonzero().min()) // scale
        # A longer reach might be truncated by the border, even between the taps of a dilated
        # kernel.
        if max(left, right) < width // 2:
            return left + 1 + right
        width *= 4
    return None


class _Influence(TorchDispatchMode):
    """Makes convolutions propagate only NaNs, at the same cost for 512 channels as for 1."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            return _spread(*args)
        return func(*args, **(kwargs or {}))


def _spread(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    is_transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """Return NaN where the convolution's window contains a NaN, otherwise 0.

    The arguments are those of `aten::convolution`.
    """
    channels = weight.shape[1] if is_transposed else weight.shape[0] // groups
    reached = features.isnan().unflatten(1, (groups, -1)).any(2).to(features.dtype)
    window = torch.ones(groups, 1, *weight.shape[2:], dtype=features.dtype)
    hits = torch.ops.aten.convolution(
        reached, window, None, stride, padding, dilation, is_transposed, output_padding, groups
    )
    return (
        torch.zeros_like(hits).masked_fill(hits > 0.5, torch.nan).repeat_interleave(channels, dim=1)
    )


def _run_on_meta(
    network: nn.Module, input_size: tuple[int, int]
) -> tuple[list[Layer], int, tuple[int, ...]]:
    """Return layers in execution order, total multiply-adds and output shape, for one image.

    Of a discriminator with several scales, the shape is that of the finest logits.

    Runs on the meta device, without computing anything.
    """
    network = copy.deepcopy(network).to("meta")
    shapes: dict[str, tuple[int, ...]] = {}

    def remember(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        first = (
            output
            if isinstance(output, Tensor)
            else next(item for item in output if isinstance(item, Tensor))
        )
        shapes.setdefault(name, tuple(first.shape[1:]))

    parts = {
        name: module
        for name, module in network.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        or not any(True for _ in module.children())
    }
    for name, module in parts.items():
        module.register_forward_hook(functools.partial(remember, name))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        output = network(torch.empty(1, 3, *input_size, device="meta"))
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    root = type(network).__name__
    layers = [
        Layer(
            name,
            type(parts[name]).__name__,
            shapes.get(name),
            sum(parameter.numel() for parameter in parts[name].parameters(recurse=False)),
            counts.get(f"{root}.{name}" if name else root, 0),
        )
        for name in [*shapes, *(name for name in parts if name not in shapes)]
    ]
    finest = output if isinstance(output, Tensor) else output[0]
    return layers, counter.get_total_flops() // 2, tuple(finest.shape)


def format_report(report: Report) -> str:
    """Format a table with one row per layer, followed by the totals."""
    head = ("layer", "type", "output", "parameters", "MMACs")
    rows = [
        (
            layer.name or "(itself)",
            layer.type,
            _times(layer.output),
            f"{layer.parameters:,}",
            f"{layer.multiply_adds / 1e6:,.1f}",
        )
        for layer in report.layers
    ]
    height, width = report.input_size
    field = report.receptive_field
    seen = field if isinstance(field, str) else f"{field[1]} x {field[0]} input pixels"
    return "\n".join(
        [
            report.title,
            "",
            *_table([head, *rows], right=(3, 4)),
            "",
            f"parameters       {report.parameters:,}",
            f"multiply-adds    {report.multiply_adds / 1e9:.2f} GMACs "
            f"({2 * report.multiply_adds / 1e9:.2f} GFLOPs) for "
            f"{width}x{height} -> {width * report.scale}x{height * report.scale}",
            f"receptive field  {SEEN.get(seen, seen)}",
            *(
                [f"effective field  {report.effective_field} input pixels per side"]
                if report.effective_field
                else []
            ),
            f"weights          {report.float32_bytes / 1e6:.2f} MB in float32, "
            f"{report.float16_bytes / 1e6:.2f} MB in "
            "float16",
            "MACs count convolutions and matrix products; 1 MAC is 2 FLOPs. Output shapes omit "
            "the batch.",
        ]
    )


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON values.

    The receptive field is [height, width], "global" or "not measured".
    """
    return {**asdict(report), "gmacs": report.multiply_adds / 1e9}


def _times(shape: Iterable[int] | None) -> str:
    return "never run" if shape is None else "x".join(map(str, shape))


def _table(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _build(options: Options) -> tuple[str, nn.Module, int, tuple[int, int]]:
    """Interpret the command line; return title, network, scale and (height, width) of the input."""
    path = Path(options.target).expanduser()
    if _is_file(options.target):
        if options.overrides or options.part != "generator":
            raise UserError(
                f"{options.target!r} contains a generator's weights: overrides and --part apply "
                "only to recipes"
            )
        saved = read_network(run_network_file(path, "best", ema=True) if path.is_dir() else path)
        title, network, scale = (
            f"{saved.name} x{saved.scale} of {options.target}",
            saved.build(),
            saved.scale,
        )
        return title, network, scale, _lr_size(options.hr, scale)
    overrides, ds_overrides = parse_overrides(options.overrides)
    if ds_overrides:
        raise UserError(
            f"ds.{next(iter(ds_overrides))}: the DeepSpeed config does not affect the network; "
            "omit it"
        )
    recipe = _recipe(options, overrides)
    title = f"{options.part} of recipe {recipe.name}: "
    if options.part == "generator":
        network = build_generator(recipe.generator.name, recipe.scale, **recipe.generator.params)
        return (
            f"{title}{recipe.generator.name} x{recipe.scale}",
            network,
            recipe.scale,
            _lr_size(options.hr, recipe.scale),
        )
    if recipe.adversarial is None:
        raise UserError(f"recipe {recipe.name} has no discriminator; omit --part")
    spec, crop = recipe.adversarial.discriminator, recipe.data.crop
    return (
        f"{title}{spec.name} at crop {crop}",
        build_discriminator(spec.name, crop, **spec.params),
        1,
        (crop, crop),
    )


def _is_file(target: str) -> bool:
    """Whether the target is a weights file or a run folder, and not a recipe."""
    path = Path(target).expanduser()
    return path.is_dir() or path.suffix.lower() in SUFFIXES


def _recipe(options: Options, overrides: dict[str, Any]) -> Recipe:
    """Load the recipe.

    If the network does not support the scale, the error says so, and not that the crop does not fit
    the scale.
    """
    try:
        return load_recipe(options.target, overrides)
    except UserError:
        if options.part == "generator" and "scale" in overrides:
            recipe = load_recipe(
                options.target, {key: value for key, value in overrides.items() if key != "scale"}
            )
            build_generator(recipe.generator.name, overrides["scale"], **recipe.generator.params)
        raise


def _lr_size(hr: tuple[int, int], scale: int) -> tuple[int, int]:
    width, height = hr
    if min(width, height) < 8 * scale or max(width, height) > 1 << 15:
        raise UserError(
            f"--hr {width} {height}: both sides must be {8 * scale} to {1 << 15} pixels"
        )
    return height // scale, width // scale


if __name__ == "__main__":
    run(Options, main, ends_with_reader=True)
