"""Base of all steps of a degradation chain: their recipe sections and random numbers.

A step is one file with three parts, and one row in `STEPS`:

- a `StepSpec` with its probability and ranges, which is its section of a recipe;
- `draw(spec, draws, canvas)`, which returns the parameters drawn for one sample, as JSON can
  represent them;
- `apply(image, drawn, workspace)`, which applies the step with these parameters. It is a pure
  function: the parameters contain everything that it needs, including the seeds of noise.

A step that DALI can also run has `NODES`, which a graph uses on a GPU: see `StepNodes`.

Images are (height, width, 3) RGB in levels 0..255, C-contiguous, as uint8 or as float32 that is
neither clipped nor rounded; `levels` and `host.rounded` convert between them. A step may overwrite
a float32 image but not a uint8 one. Its result may lie in memory of `workspace`, which is valid
until the workspace is used for the same purpose again. Steps run in a pool of threads, so they keep
no state and should release the GIL during long work. Libraries that they use are imported in
functions, because launchers read the specs.

Steps keep positions, unless they exist to move pixels: pixel (i, j) of the result shows what was at
((i + 0.5) / height, (j + 0.5) / width) of the image before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from pipeline.cli import nearest
from pipeline.data.degradations.base import Parameters, between
from pipeline.spec import Number, Probability, Spec

Image = NDArray[Any]

NUMBERS = 64  # uniform random numbers per step and sample


class StepSpec(Spec):
    """Base of all steps' sections of a recipe."""

    probability: Probability = Field(1.0, description="probability of the step")


@dataclass
class Canvas:
    """Sizes (height, width) in pixels that a step may need when it draws its parameters."""

    size: tuple[int, int]  # of the image that the step gets
    hr: tuple[int, int]  # of the region of HR that is degraded
    scale: int

    @property
    def lr(self) -> tuple[int, int]:
        """Size of the region in LR."""
        return self.hr[0] // self.scale, self.hr[1] // self.scale


class Draws:
    """The uniform random numbers of one step for one sample; at most `NUMBERS` can be drawn."""

    def __init__(self, numbers: Iterator[float]) -> None:
        self._numbers = numbers

    def uniform(self) -> float:
        """Return a number in [0, 1), a multiple of 2^-32."""
        return next(self._numbers)

    def between(self, bounds: tuple[float, float]) -> float:
        """Return a number in [low, high), uniformly distributed."""
        return between(bounds, self.uniform())

    def integer(self, bounds: tuple[float, float]) -> int:
        """Return an integer in low..high, both included, uniformly distributed."""
        low, high = round(bounds[0]), round(bounds[1])
        return low + int(self.uniform() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def choose(self, shares: Mapping[str, float]) -> str:
        """Return one of the names, with a probability proportional to its share."""
        target = self.uniform() * sum(shares.values())
        for name, share in shares.items():
            target -= share
            if target < 0:
                return name
        return next(name for name in reversed(shares) if shares[name])

    def words(self) -> list[int]:
        """Return the seed of a random field: two words of 64 bits."""
        halves = [int(self.uniform() * 2**32) for _ in range(4)]
        return [halves[0] << 32 | halves[1], halves[2] << 32 | halves[3]]


Size = tuple[int, int]  # height, width


class StepNodes(NamedTuple):
    """A step as nodes of a DALI graph, for GPUs; they equal `apply` up to rounding."""

    columns: tuple[str, ...]  # names of a sample's arrays that the nodes need
    arrays: Callable[[Parameters, Size], tuple[Any, ...]]
    """Return the arrays of `columns`, given the parameters and the size of the input image."""
    idle: Parameters
    """Parameters that give small arrays, for samples without the step."""
    add: Callable[[Any, Mapping[str, Any], Callable[[Any], Any]], Any]
    """Return the node of the image after the step, given the node of an image (HWC, FP32, neither
    clipped nor rounded), the nodes of `columns` on the CPU, and a function that moves a node to the
    device."""
    covers: Callable[[Any], bool] = lambda spec: True
    """Whether the nodes can do everything that may be drawn for a spec."""
    fits: Callable[[Parameters], bool] = lambda drawn: True
    """Whether the nodes can do what was drawn."""


class Step(NamedTuple):
    """A row of `STEPS`."""

    Spec: type[StepSpec]
    draw: Callable[[Any, Draws, Canvas], Parameters]
    """Return the parameters; if the step changes the size of the image, `size` is the new one."""
    apply: Callable[[Image, Parameters, Any], Image]
    check: Callable[[Any], None] = lambda spec: None
    """Raise `UserError` if this machine cannot do what the spec asks for."""
    nodes: StepNodes | None = None
    versions: Callable[[], dict[str, str]] = dict
    """Return the versions of the libraries that determine the pixels, except OpenCV and NumPy."""


def shares_of(*names: str) -> Any:
    """Return the type of a table of relative probabilities, `{name: share}`, of these names.

    In a recipe, a single name has the whole probability, and the names of a list have equal shares.
    Shares are at least 0 and need not sum to 1; omitted names have a share of 0.
    """
    from pydantic import BeforeValidator

    def table(value: Any) -> Any:
        # YAML reads a name such as 420 as a number.
        if isinstance(value, str | int) and not isinstance(value, bool):
            return {str(value): 1.0}
        if isinstance(value, list | tuple):
            return {str(name): 1.0 for name in value}
        if isinstance(value, Mapping):
            return {str(name): share for name, share in value.items()}
        return value

    def check(shares: dict[str, float]) -> dict[str, float]:
        for name in shares:
            if name not in names:
                raise ValueError(f"no kind named {name!r}{nearest(name, names)}")
        if not sum(shares.values()) > 0:
            raise ValueError(f"at least one of {', '.join(names)} needs a share above 0")
        return shares

    return Annotated[
        dict[str, Annotated[Number, Field(ge=0)]],
        BeforeValidator(table),
        AfterValidator(check),
        Names(names),
    ]


class Names(NamedTuple):
    """Annotation of a table of shares: the names that it may contain."""

    names: tuple[str, ...]


def kinds_of(spec: type[StepSpec]) -> tuple[str, ...]:
    """Return the kinds (or codecs) of a step; empty if the step has no kinds."""
    field = spec.model_fields.get("codec") or spec.model_fields.get("kind")
    marks = [mark for mark in field.metadata if isinstance(mark, Names)] if field else []
    return marks[0].names if marks else ()


def levels(image: Image) -> NDArray[np.float32]:
    """Return `image` as float32 levels, which may be overwritten."""
    return image if image.dtype == np.float32 else image.astype(np.float32)


# Weights of R, G and B in luma.
LUMA = {
    "bt601": (0.299, 0.587, 0.114),
    "bt709": (0.2126, 0.7152, 0.0722),
    "bt2020": (0.2627, 0.678, 0.0593),
}


def to_ycc(standard: str = "bt601") -> NDArray[np.float64]:
    """Return the matrix from R'G'B' to Y'CbCr in full range, without the offset of Cb and Cr.

    For levels 0..255, Y' is within 0..255 and Cb and Cr within -127.5..127.5.
    """
    luma = np.array(LUMA[standard])
    blue, red = ((np.eye(3)[channel] - luma) / (2 * (1 - luma[channel])) for channel in (2, 0))
    return np.stack([luma, blue, red])
