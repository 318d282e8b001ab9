"""LR of HR as DALI operators: what all degradations share, and the noise that may follow each of
them.

A degradation has a host side, which says how much of the photograph around a crop it must see and
turns a sample's uniform numbers into parameters and arrays, and a device side, which is a few DALI
nodes. Where DALI is slow on a CPU it may have the same chain a second time, in the operators of
`host`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.degradations import noise
from pipeline.spec import Levels, Probability, Spec

Nodes = Mapping[str, Any]
Parameters = dict[str, Any]
"""What was drawn for a sample: names, numbers, lists and such tables. JSON can hold it."""
OnDevice = Callable[[Any], Any]

WORDS = (
    40  # random words of a sample's degradation: 2 x 32 uniform numbers and 8 keys of noise fields
)
KEYS = 8


class DegradationSpec(Spec):
    """How a recipe asks for a degradation: a subclass has its parameters, and `name: Literal[...]`
    with a default."""

    reads_lr: ClassVar[bool] = False  # whether LR lies on disk beside HR and is not made of it
    name: str


class Degradation:
    """LR of a crop: what all ways of making it have in common. Without a `draw` of its own nothing
    in it is random."""

    Spec: ClassVar[type[DegradationSpec]]  # its part of a recipe
    columns: tuple[str, ...] = ()  # arrays of a sample that the nodes use
    has_host_chain: ClassVar[bool] = (
        False  # whether there is `lr_on_host`, faster on a CPU than the nodes
    )

    def __init__(self, spec: Any, scale: int) -> None:
        self.spec, self.scale = spec, scale

    @property
    def surroundings(self) -> int:
        """HR pixels more than the crop's that are read in each direction, where the photograph has
        them."""
        raise NotImplementedError

    def place(self, chances: Iterator[float]) -> tuple[int, int]:
        """How many of the `surroundings` lie above and left of the crop, multiples of the scale."""
        return self.surroundings // 2, self.surroundings // 2

    def draw(self, chances: Iterator[float], height: int, width: int) -> Parameters:
        """The parameters of a sample whose region is `height` x `width` HR pixels."""
        return {}

    def arrays(self, parameters: Parameters, keys: Sequence[int]) -> dict[str, NDArray[Any]]:
        """What the nodes need of a sample, by the names in `columns`."""
        return {}

    def lr(
        self,
        nodes: Nodes,
        region: Any,
        size: tuple[int, int],
        on_device: OnDevice,
        *,
        as_float: bool,
    ) -> Any:
        """DALI node of LR (HWC, levels 0..255, bytes or FP32) of the part of `region` that begins
        at `nodes["start"]`.

        `size`: (height, width) of that part in HR pixels, multiples of the scale.
        """
        raise NotImplementedError

    def lr_on_host(
        self,
        parameters: Parameters,
        keys: Sequence[int],
        region: NDArray[np.uint8],
        start: tuple[int, int],
        size: tuple[int, int],
        room: Any,
    ) -> NDArray[np.uint8]:
        """LR of the part of `region`, (height, width, 3), that begins at `start` and has `size`,
        all in HR pixels and multiples of the scale: what `lr` makes of the arrays of the same
        `parameters` and `keys`, up to rounding. Good until `room`, a `host.Room`, is used again."""
        raise NotImplementedError


class NoiseSpec(Spec):
    """White Gaussian noise on LR, added before it is rounded to bytes."""

    probability: Probability = Field(0.0, description="of a sample to be changed")
    sigma: Levels = Field((0.0, 10.0), description="of the standard deviation, in levels, evenly")


class LrNoise:
    """White Gaussian noise on LR of any degradation, before it is rounded."""

    columns = ("is_noisy", *(f"noise_{name}" for name in noise.NoiseKeys._fields), "noise_sigma")

    def __init__(self, spec: NoiseSpec) -> None:
        self.spec = spec

    def draw(self, chances: Iterator[float]) -> float:
        """Sigma in levels; 0 for a sample that gets none."""
        chance, sigma = next(chances), between(self.spec.sigma, next(chances))
        return sigma if chance < self.spec.probability else 0.0

    def arrays(
        self, sigma: float, shape: tuple[int, int], keys: Sequence[int]
    ) -> dict[str, NDArray[Any]]:
        """What `add` needs of a sample whose LR is of `shape`, the degradation's own arrays not
        counted."""
        fields = noise.noise_keys(
            keys, *(shape if sigma else (1, 1)), 3
        )  # hardly any where they are not used
        return {
            "is_noisy": np.array(sigma > 0),
            "noise_sigma": np.array(sigma, np.float32),
            **{
                f"noise_{name}": field
                for name, field in zip(noise.NoiseKeys._fields, fields, strict=True)
            },
        }

    def add(self, nodes: Nodes, lr: Any, on_device: OnDevice) -> Any:
        """Node of bytes: FP32 `lr` with noise."""
        from nvidia.dali import fn, types

        is_noisy = nodes["is_noisy"]
        if is_noisy:
            normal = noise.standard_normal(
                *(on_device(nodes[f"noise_{name}"]) for name in noise.NoiseKeys._fields)
            )
            levels = noise.add_gaussian(lr, normal, nodes["noise_sigma"])
        else:
            levels = lr
        return fn.cast(levels, dtype=types.UINT8)

    def add_on_host(
        self, sigma: float, keys: Sequence[int], lr: NDArray[np.uint8], room: Any
    ) -> NDArray[np.uint8]:
        """`lr` (height, width, 3) with what `add` adds, in memory of the `room`, a `host.Room`."""
        from pipeline.data.degradations import host

        if not sigma:
            return lr
        fields = noise.noise_keys((keys[0], keys[1]), *lr.shape[:2], 3)
        return host.rounded(host.with_gaussian(lr.astype(np.float32), fields, sigma, room), room)


def filtered(image: Any, kernel: Any) -> Any:
    """Node of FP32: `image` (HWC) under a kernel of its own, the outermost pixels being
    mirrored."""
    from nvidia.dali import fn, types

    filter2d = (
        getattr(fn, "filter", None) or fn.experimental.filter
    )  # it left `experimental` in DALI 2.4
    return filter2d(image, kernel, border="reflect_101", dtype=types.FLOAT)


def through_jpeg(image: Any, quality: Any) -> Any:
    """Node of bytes: levels clipped, rounded and through JPEG."""
    from nvidia.dali import fn, types

    return fn.jpeg_compression_distortion(fn.cast(image, dtype=types.UINT8), quality=quality)


def between(bounds: tuple[float, float], fraction: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * fraction
