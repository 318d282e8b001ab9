"""Compare the networks of the recipes: size, work, receptive fields, speed, memory, conversion.

`python -m pipeline.models.info --table` prints the table. Speed and memory are measured in one
process per network and phase, which runs this module as a script.
"""

from __future__ import annotations

import copy
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from tqdm import tqdm

from pipeline.cli import RunError, UserError, bar_options, nearest, one_line
from pipeline.config.recipe import Recipe, load_recipe
from pipeline.files import write_atomically
from pipeline.images import unit_range
from pipeline.installation import ROOT, recipe_names
from pipeline.models import build_generator
from pipeline.models.spandrel import large_weights
from pipeline.models.weights import SavedNetwork, write_network
from pipeline.timing import processor

FIELD_ENERGY = 0.95
FIELD_SIDE, FIELD_MIDDLE, FIELD_IMAGES = 96, 16, 4
"""LR pixels per side of the images with which effective fields are measured, those of the square in
the middle in which the output pixels lie, and the number of images."""
LARGEST_FIELD = FIELD_SIDE - FIELD_MIDDLE + 1
INFERENCE_SIDE = 480
"""HR pixels per side of the image whose upscaling is timed: a multiple of all scales."""
CROP, BATCH = 96, 2
"""The same of the crops of a training step, and their number: DAT needs two."""
PAGE = ROOT / "docs" / "networks.md"
BEGIN, END = "<!-- begin: networks of the recipes -->", "<!-- end: networks of the recipes -->"
HEADER = (
    "recipes",
    "network",
    "parameters",
    "GMACs",
    "field",
    "effective",
    "training",
    "inference",
    "MiB",
    "ONNX",
    "OpenVINO",
)
GPU = "GPU"
"""Title of the column with a self-check's numbers."""


# The effective receptive field.


def effective_field(network: nn.Module, scale: int) -> int | None:
    """Return the side, in LR pixels, of the square that has 95 % of the gradient's energy.

    Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks",
    NeurIPS 2016, https://arxiv.org/abs/1701.04128: the gradient of an output pixel with respect to
    the input, averaged over inputs. Here its square is summed over the colours, the `scale**2`
    output pixels of an LR pixel, and random images; the square is centred on that LR pixel. None:
    the side is above `LARGEST_FIELD`. `network` is left as it is.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    if "PLKSR" in type(network).__name__:  # in evaluation, it overwrites what autograd needs
        network.train()
    generator = torch.Generator().manual_seed(0)
    reach, total = LARGEST_FIELD // 2, 0.0
    energy = torch.zeros(LARGEST_FIELD, LARGEST_FIELD, dtype=torch.float64)
    for _ in range(FIELD_IMAGES):
        images = torch.rand((1, 3, FIELD_SIDE, FIELD_SIDE), generator=generator)
        # Attention windows see other pixels at other positions.
        row, column = (reach + torch.randint(FIELD_MIDDLE, (2,), generator=generator)).tolist()
        images.requires_grad_()
        pixels = network(images)[
            ..., row * scale : (row + 1) * scale, column * scale : (column + 1) * scale
        ]
        # With random signs, the energy of the sum's gradient is on average that of all pixels'.
        signs = torch.randint(2, pixels.shape, generator=generator) * 2 - 1
        (gradient,) = torch.autograd.grad((pixels * signs).sum(), images)
        squares = gradient[0].double().square().sum(0)
        energy += squares[row - reach : row + reach + 1, column - reach : column + reach + 1]
        total += float(squares.sum())
    for radius in range(reach + 1):
        inner = slice(reach - radius, reach + radius + 1)
        if energy[inner, inner].sum() >= FIELD_ENERGY * total:
            return 2 * radius + 1
    return None


# Speed and memory, in a process of their own.


def _measure(name: str, phase: str, seconds: float) -> dict[str, float]:
    """Return images per CPU second of one thread, and the bytes that the process grew by."""
    torch.set_num_threads(1)
    recipe = load_recipe(name)
    torch.manual_seed(0)
    network = _network(recipe)
    step = (_inference if phase == "inference" else _training)(network, recipe.scale)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    before = psutil.Process().memory_info().rss
    images = step()
    steps, began = 0, time.process_time()
    while steps == 0 or time.process_time() - began < seconds:
        step()
        steps += 1
    rate = steps * images / (time.process_time() - began)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[1]) * 1024
    return {"rate": rate, "bytes": max(0, peak - before)}


def _inference(network: nn.Module, scale: int) -> Callable[[], int]:
    side = INFERENCE_SIDE // scale
    images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    network.eval()

    def step() -> int:
        with torch.inference_mode():
            network(images)
        return 1

    return step


def _training(network: nn.Module, scale: int) -> Callable[[], int]:
    lr = torch.randint(0, 256, (BATCH, 3, CROP // scale, CROP // scale), dtype=torch.uint8)
    hr = unit_range(torch.randint(0, 256, (BATCH, 3, CROP, CROP), dtype=torch.uint8), torch.float32)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    network.train()

    def step() -> int:
        optimizer.zero_grad(set_to_none=True)
        (network(lr) - hr).abs().mean().backward()
        optimizer.step()
        return BATCH

    return step


def _network(recipe: Recipe) -> nn.Module:
    return build_generator(recipe.generator.name, recipe.scale, **recipe.generator.params)


def _in_its_own_process(name: str, phase: str, seconds: float) -> dict[str, float]:
    done = _run("-m", "pipeline.models.comparison", name, phase, str(seconds))
    if done.returncode:
        raise RunError(f"{name}, {phase}: {_last_line(done)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return ((done.stderr.strip() or done.stdout.strip()).splitlines() or ["no output"])[-1]


# Conversion.


def _conversions(recipe: Recipe) -> tuple[str, str]:
    """Convert the network to ONNX and OpenVINO; return how each succeeded: yes, static or no.

    "static": only for images of one size. The converter compares every file with PyTorch.
    """
    torch.manual_seed(0)
    network, generator = _network(recipe).eval(), recipe.generator
    with torch.no_grad():
        size = network(torch.rand(1, 3, 32, 32)).abs().max()
        if size > 2:
            # Fresh weights: the comparison would take the rounding of such values for an error.
            last = [part for part in network.modules() if isinstance(part, nn.Conv2d)][-1]
            for tensor in last.parameters():
                tensor.div_(size)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.safetensors", Path(folder) / "a.onnx"
        write_network(
            source,
            SavedNetwork(generator.name, recipe.scale, generator.params, network.state_dict()),
        )
        command = ["convert_to_onnx.py", "--input", str(source), "--output", str(target)]
        for answer, shape in (("yes", []), ("static", ["--shape", "1x3x64x64"])):
            done = _run(*command, *shape, "--openvino")
            if target.exists():
                return answer, answer if done.returncode == 0 else "no"
    return "no", "no"


# The table.


@dataclass(frozen=True)
class Row:
    """One network of the table, with the recipes that train it."""

    recipes: tuple[str, ...]
    cells: Mapping[str, str] = field(default_factory=dict)
    """Column of `HEADER`, or `GPU` -> text; without the first column."""

    def markdown(self, columns: Sequence[str]) -> str:
        cells = [", ".join(f"`{name}`" for name in self.recipes)]
        return f"| {' | '.join([*cells, *(self.cells.get(one, '') for one in columns[1:])])} |"


def networks_of(names: Sequence[str]) -> dict[tuple[str, ...], Recipe]:
    """Return the recipes by network: those that train the same one, at one scale, together.

    `names`: recipes; none: all but the demos. Raises `UserError` for an unknown recipe.
    """
    known = [name for name in recipe_names() if not name.startswith("demo")]
    groups: dict[str, list[str]] = {}
    recipes = {name: load_recipe(name) for name in dict.fromkeys((*known, *names))}
    for name, recipe in recipes.items():
        network = [recipe.generator.name, recipe.scale, recipe.generator.params]
        groups.setdefault(json.dumps(network, sort_keys=True), []).append(name)
    return {
        tuple(group): recipes[group[0]]
        for group in groups.values()
        if not names or set(group) & set(names)
    }


def compare_recipes(
    names: Sequence[str],
    describe: Callable[[Recipe, nn.Module], dict[str, str]],
    *,
    seconds: float,
    convert: bool,
    selfcheck: Path | None,
) -> Iterator[Row]:
    """Measure the networks of the recipes one by one, with a progress bar; yield their rows.

    `describe` returns the cells that need no measurement. Raises `UserError` and `RunError`.
    """
    groups = networks_of(names)
    on_gpu = {} if selfcheck is None else _gpu_rates(selfcheck)
    with tqdm(total=5 * len(groups), desc="networks", unit="step", **bar_options()) as bar:

        def did(result: Any) -> Any:
            bar.update()
            return result

        for group, recipe in groups.items():
            bar.set_postfix_str(group[0])
            network = _network(recipe)
            cells = did(describe(recipe, network))
            with large_weights(network):
                side = did(effective_field(network, recipe.scale))
            training, inference = (
                did(_in_its_own_process(group[0], phase, seconds))
                for phase in ("training", "inference")
            )
            onnx, openvino = did(_conversions(recipe) if convert else ("-", "-"))
            rates = [on_gpu[name] for name in group if name in on_gpu]
            cells |= {
                "effective": f"over {LARGEST_FIELD}" if side is None else str(side),
                "training": _rate(training["rate"]),
                "inference": _rate(inference["rate"]),
                "MiB": f"{training['bytes'] / 2**20:,.0f} / {inference['bytes'] / 2**20:,.0f}",
                "ONNX": onnx,
                "OpenVINO": openvino,
                **({GPU: f"{max(rates):,.0f}"} if rates else {}),
            }
            yield Row(group, cells)


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def _gpu_rates(file: Path) -> dict[str, float]:
    """Return recipe -> images per second of its fastest training step in a self-check's file."""
    try:
        checks = json.loads(file.read_text(encoding="utf-8"))["checks"]
        rates: dict[str, float] = {}
        for check in checks:
            section, _, rest = check["id"].partition(".")
            if section == "speed" and "." in rest and isinstance(check["value"], (int, float)):
                name = rest.partition(".")[0]
                rates[name] = max(rates.get(name, 0.0), check["value"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"--selfcheck {file}: not a result of launch.selfcheck ({one_line(error)})"
        ) from error
    return rates


def markdown(rows: Sequence[Row]) -> str:
    """Format the rows, ordered by their first recipes, as a table."""
    columns = [*HEADER, *([GPU] if any(GPU in row.cells for row in rows) else [])]
    return "\n".join(
        [
            f"| {' | '.join(columns)} |",
            f"|{'---|' * len(columns)}",
            *(row.markdown(columns) for row in sorted(rows, key=lambda row: row.recipes)),
        ]
    )


def this_machine() -> str:
    """Return the names of the processor and of torch's version, for the page."""
    return f"{processor()}, torch {torch.__version__.partition('+')[0]}"


class Page:
    """The page with the table, between two comments.

    Raises `UserError` if it has no place for the table, or if rows that stay when those of `names`
    are replaced (none: all) were measured on another machine.
    """

    def __init__(self, names: Sequence[str], path: Path = PAGE) -> None:
        self._path, text = path, path.read_text(encoding="utf-8")
        self._before, begin, rest = text.partition(BEGIN)
        table, end, self._after = rest.partition(END)
        if not (begin and end):
            raise UserError(f"{path} has no place for the table: put in {BEGIN} and {END}")
        # Recipes may have been added or removed since.
        today, new = networks_of(()), networks_of(names)
        named = [
            (next((group for group in today if {*group} & {*row.recipes}), ()), row)
            for row in read_table(table)
        ]
        self._kept = [Row(group, row.cells) for group, row in named if group and group not in new]
        self._machine = f"Measured on {this_machine()}."
        if self._kept and self._machine not in table:
            raise UserError(
                f"{path} has rows of another machine; measure those of all recipes: omit --recipes"
            )

    def write(self, rows: Sequence[Row]) -> None:
        """Put in new rows."""
        table = markdown([*self._kept, *rows])
        text = f"{self._before}{BEGIN}\n{self._machine}\n\n{table}\n\n{END}{self._after}"
        write_atomically(self._path, text.encode())


def read_table(text: str) -> list[Row]:
    """Return the rows of a table that `markdown` has formatted."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [
        Row(
            tuple(re.findall(r"`([^`]+)`", first)),
            dict(zip(lines[0][1:], cells, strict=True)),
        )
        for first, *cells in lines[1:]
    ]


def check_recipes(names: Sequence[str]) -> None:
    """Raise `UserError` for a name that is not a recipe's."""
    for name in names:
        if name not in recipe_names():
            raise UserError(f"--recipes {name}: no such recipe{nearest(name, recipe_names())}")


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
