"""What a network is made of and what it costs: layers, parameters, multiply-adds, receptive field,
size of the weights.

python -m pipeline.models.info vapsr_x4
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cli import UserError, run
from pipeline.config.recipe import Recipe, load_recipe, parse_overrides
from pipeline.models import build_generator
from pipeline.models.discriminators import build_discriminator
from pipeline.models.spandrel import SpandrelNetwork
from pipeline.models.weights import SUFFIXES, read_network
from pipeline.run_folder import run_network_file

LARGEST_PROBE = 1024
"""The receptive field is looked for in LR images up to so many pixels long, and so is smaller than
that or global."""
STRIP = 8
"""The other side of these images."""
GLOBAL, NOT_MEASURED = "global", "not measured"
SEEN = {
    GLOBAL: "global: the whole image",
    NOT_MEASURED: "not measured: the architecture is not convolutions alone",
}


@dataclass(frozen=True)
class Options:
    """Print the layers of a network, its parameters, multiply-adds, receptive field and size.

    The network is that of a recipe, of a weights file (.safetensors, .pth…) or of a run folder (its
    best averaged weights). No dataset and no GPU are needed. Multiply-adds (MACs) are those of
    convolutions and matrix products for one HR image of --hr, as papers count them; a FLOP count is
    twice that.

    Examples: python -m pipeline.models.info vapsr_x4 generator.num_blocks=11

    python -m pipeline.models.info runs/demo --json
    """

    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE|FILE|RUN")]
    """A name in recipes/, the path of a YAML file, a weights file, or a run folder."""
    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE ...")
    ] = ()
    """key=value over the recipe, such as generator.num_blocks=11."""
    part: Literal["generator", "discriminator"] = "generator"
    """Which network of a recipe; a discriminator is measured at one crop."""
    hr: tuple[int, int] = (1280, 720)
    """Width and height of the HR image that shapes and multiply-adds are given for; cut to
    multiples of the scale."""
    json: bool = False
    """Print one JSON object with all numbers instead of the table."""


@dataclass(frozen=True)
class Layer:
    """A module that has parameters of its own, or no parts."""

    name: str
    type: str
    output: tuple[int, ...] | None
    """Its shape without the batch; `None` where the layer was never run."""
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Report:
    """All there is to say about a network. Sizes of images are (height, width), of weights in
    bytes."""

    title: str
    scale: int
    layers: list[Layer]
    parameters: int
    input_size: tuple[int, int]
    multiply_adds: int
    receptive_field: tuple[int, int] | str
    """In input pixels; "global": `LARGEST_PROBE` pixels a side or more, or one verdict on all; or
    "not measured"."""
    float32_bytes: int
    float16_bytes: int


def main(options: Options) -> int:
    """Print what there is to say about the network."""
    title, network, scale, size = _build(options)
    report = describe(network, title, scale, size)
    print(json.dumps(as_json(report), indent=1) if options.json else format_report(report))
    return 0


def describe(network: nn.Module, title: str, scale: int, input_size: tuple[int, int]) -> Report:
    """Measure a float32 network that makes `scale` times larger images of NCHW RGB; it stays as it
    is."""
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
    if (
        isinstance(network, SpandrelNetwork) and not network.is_convolutional
    ):  # how far a window sees differs by place
        return NOT_MEASURED
    return receptive_field(network, scale) or GLOBAL


def receptive_field(network: nn.Module, scale: int) -> tuple[int, int] | None:
    """(height, width) in input pixels of what the outputs in the place of one input pixel depend
    on; `None`: global.

    Measured: a NaN at the border of an image reaches just the outputs that depend on it, whatever
    the weights are. Where places differ (internal strides) it is the farthest view to either side.
    The network must be in eval mode.
    """
    sides = [_receptive_side(network, scale, is_vertical) for is_vertical in (True, False)]
    return None if None in sides else (sides[0], sides[1])


def _receptive_side(network: nn.Module, scale: int, is_vertical: bool) -> int | None:
    width = 64
    while width <= LARGEST_PROBE:
        images = torch.zeros(2, 3, STRIP, width)
        images[0, ..., 0] = images[1, ..., -1] = torch.nan  # reaches to the right, and to the left
        with torch.no_grad(), _Influence():
            outputs = network(images.transpose(2, 3) if is_vertical else images)
        reached = outputs.isnan().any(1).any(2 if is_vertical else 1)
        right = int(reached[0].nonzero().max()) // scale
        left = width - 1 - int(reached[1].nonzero().min()) // scale
        if (
            max(left, right) < width // 2
        ):  # farther could be cut off by the border, even between a dilation's taps
            return left + 1 + right
        width *= 4
    return None


class _Influence(TorchDispatchMode):
    """Convolutions pass on where NaNs reach, and nothing else: exact, and as cheap with 512
    channels as with one."""

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
    """NaN where a convolution with these arguments (those of `aten::convolution`) has a NaN in its
    window, 0 else."""
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
    """Layers in the order in which they run, all multiply-adds, the output's shape: of one image.
    Computes nothing."""
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
    return layers, counter.get_total_flops() // 2, tuple(output.shape)


def format_report(report: Report) -> str:
    """A row for every layer, then the sums."""
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
            f"weights          {report.float32_bytes / 1e6:.2f} MB in float32, "
            f"{report.float16_bytes / 1e6:.2f} MB in "
            "float16",
            "MACs are of convolutions and matrix products; 1 MAC is 2 FLOPs. Outputs leave out the "
            "batch.",
        ]
    )


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain JSON values; the receptive field is [height, width], "global" or "not
    measured"."""
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
    """What the command line means: title, network, scale, (height, width) of its input."""
    path = Path(options.target).expanduser()
    if path.is_dir() or path.suffix.lower() in SUFFIXES:
        if options.overrides or options.part != "generator":
            raise UserError(
                f"{options.target!r} is a generator's weights: overrides and --part go with "
                "recipes only"
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
            f"ds.{next(iter(ds_overrides))}: DeepSpeed's file does not change the network; leave "
            "it out"
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
        raise UserError(f"recipe {recipe.name} has no discriminator; leave --part out")
    spec, crop = recipe.adversarial.discriminator, recipe.data.crop
    return (
        f"{title}{spec.name} at crop {crop}",
        build_discriminator(spec.name, crop, **spec.params),
        1,
        (crop, crop),
    )


def _recipe(options: Options, overrides: dict[str, Any]) -> Recipe:
    """The recipe; of a scale that its network lacks that is said, not that the crop does not fit
    it."""
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
