"""Base of all degradations (LR from HR as DALI operators), and noise that may follow each of them.

A degradation has a host side and a device side. The host side says how much of the photograph
around a crop it needs, and turns a sample's uniform random numbers into parameters and arrays. The
device side is a few DALI nodes. Where DALI is slow on a CPU, a degradation may have the same chain
a second time, in the operators of `host`.
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
"""The random choices for a sample: names, numbers and lists or tables of these, as JSON allows."""
OnDevice = Callable[[Any], Any]

# Random words per sample for its degradation: 2 x 32 uniform numbers and 8 noise keys.
WORDS = 40
KEYS = 8


class DegradationSpec(Spec):
    """Base of the specs in recipes.

    A subclass adds its parameters and `name: Literal[...]` with a default.
    """

    reads_lr: ClassVar[bool] = False  # whether LR is read from disk and not made from HR
    name: str

    @property
    def by_folder(self) -> tuple[DegradationSpec, ...]:
        """The degradation of each dataset folder, or a single one for all folders."""
        return (self,)

    def of_folder(self, number: int) -> DegradationSpec:
        """Return the degradation of a dataset folder, given its position among the folders."""
        return self.by_folder[number % len(self.by_folder)]

    @property
    def paired_folders(self) -> tuple[bool, ...]:
        """Whether LR is read from disk, for each of `by_folder`."""
        return tuple(spec.reads_lr for spec in self.by_folder)


class Degradation:
    """Base of all degradations. Without a `draw` of its own, a degradation has no randomness."""

    Spec: ClassVar[type[DegradationSpec]]  # its section of a recipe
    columns: tuple[str, ...] = ()  # names of a sample's arrays that the nodes need
    # Whether it has an `lr_on_host` that is faster on a CPU than the nodes.
    has_host_chain: ClassVar[bool] = False
    # Whether LR is a weighted mean of pixels, so that `lr` can get uint16 pixels and return uint16.
    # This avoids converting every HR pixel to levels, which takes longer than making LR.
    is_linear: ClassVar[bool] = False
    # Whether the region is flipped and transposed before LR is made from it, instead of LR
    # afterwards. The draws are then for the transposed region.
    turns_first: ClassVar[bool] = False
    has_nodes: bool = True  # whether it has the nodes of `lr`
    # Whether these nodes run only the first steps, so that `lr` returns the whole region, as FP32
    # levels that are neither clipped nor rounded, and `rest_on_host` runs the rest.
    is_split: bool = False

    def __init__(self, spec: Any, scale: int) -> None:
        self.spec, self.scale = spec, scale

    def check(self) -> None:
        """Raise `UserError` if this machine cannot do what the spec asks for."""

    def versions(self) -> dict[str, str]:
        """Return the versions of libraries that determine the pixels, for the run's identity."""
        return {}

    @property
    def surroundings(self) -> int:
        """Number of HR pixels read beyond the crop's sides, if the photograph has them."""
        raise NotImplementedError

    def place(self, randoms: Iterator[float]) -> tuple[int, int]:
        """Return how many of the `surroundings` are above and left of the crop.

        Both are multiples of the scale.
        """
        return self.surroundings // 2, self.surroundings // 2

    def draw(self, randoms: Iterator[float], height: int, width: int) -> Parameters:
        """Return the parameters for a sample whose region has `height` x `width` HR pixels.

        `randoms` yields uniform random numbers in [0, 1).
        """
        return {}

    def arrays(self, parameters: Parameters, keys: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Return the arrays of `columns` for a sample."""
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
        """Return a DALI node of LR (HWC, levels 0..255, bytes or FP32) of a part of `region`.

        If the degradation `is_linear`, `region` may be uint16; LR then has the same unit, as uint16
        or FP32.
        The part starts at `nodes["start"]` and has `size` (height, width); both are in HR pixels
        and multiples of the scale. `as_float` requests FP32, which is not rounded, and possibly not
        clipped.
        """
        raise NotImplementedError

    def lr_on_host(
        self,
        parameters: Parameters,
        keys: Sequence[int],
        region: NDArray[Any],
        start: tuple[int, int],
        size: tuple[int, int],
        workspace: Any,
    ) -> NDArray[Any]:
        """Return LR of the part of `region`, (height, width, 3), with `size` at `start`.

        The region is uint8 and so is LR. In a run of 16 bits the region is float32 levels, which
        may be overwritten, and LR may be float32 levels too, neither clipped nor rounded. `start`
        and `size` are in HR pixels and multiples of the scale. The result equals, up to rounding,
        what `lr` makes from the arrays of the same `parameters` and `keys`. It is valid until
        `workspace`, a `host.Workspace`, is used again.
        """
        raise NotImplementedError

    def rest_on_host(
        self,
        parameters: Parameters,
        image: NDArray[np.float32],
        start: tuple[int, int],
        size: tuple[int, int],
        workspace: Any,
    ) -> NDArray[Any]:
        """Return LR from the result of the nodes of `lr`, which may be overwritten, if `is_split`.

        See `lr_on_host` for the arguments and the result, which may be neither clipped nor rounded.
        """
        raise NotImplementedError

    def part(self, lr: NDArray[Any], start: tuple[int, int], size: tuple[int, int]) -> NDArray[Any]:
        """Return a part of a region's LR, given the part's start and size in HR pixels."""
        (top, left), (height, width) = (
            [side // self.scale for side in place] for place in (start, size)
        )
        return np.ascontiguousarray(lr[top : top + height, left : left + width])


class PlacedAnywhere(Degradation):
    """Base of degradations whose crop may lie anywhere in a region with `surroundings` of the spec.

    Blocks of codecs may then start anywhere in the crop.
    """

    @property
    def surroundings(self) -> int:
        surroundings: int = self.spec.surroundings
        return surroundings // self.scale * self.scale

    def place(self, randoms: Iterator[float]) -> tuple[int, int]:
        places = self.surroundings // self.scale + 1
        return int(next(randoms) * places) * self.scale, int(next(randoms) * places) * self.scale


class NoiseSpec(Spec):
    """White Gaussian noise on LR, added before rounding to bytes."""

    probability: Probability = Field(0.0, description="probability that a sample is changed")
    sigma: Levels = Field(
        (0.0, 10.0), description="range of the standard deviation in levels (0..255), uniform"
    )


class LrNoise:
    """White Gaussian noise on the LR of any degradation, added before rounding."""

    columns = ("is_noisy", *(f"noise_{name}" for name in noise.NoiseKeys._fields), "noise_sigma")

    def __init__(self, spec: NoiseSpec) -> None:
        self.spec = spec

    def draw(self, randoms: Iterator[float]) -> float:
        """Return sigma in levels; 0 for a sample without noise."""
        chance, sigma = next(randoms), between(self.spec.sigma, next(randoms))
        return sigma if chance < self.spec.probability else 0.0

    def arrays(
        self, sigma: float, shape: tuple[int, int], keys: Sequence[int]
    ) -> dict[str, NDArray[Any]]:
        """Return the arrays that `add` needs for a sample whose LR has `shape` (height, width)."""
        # Samples without noise get the smallest possible keys.
        fields = noise.noise_keys(keys, *(shape if sigma else (1, 1)), 3)
        return {
            "is_noisy": np.array(sigma > 0),
            "noise_sigma": np.array(sigma, np.float32),
            **{
                f"noise_{name}": field
                for name, field in zip(noise.NoiseKeys._fields, fields, strict=True)
            },
        }

    def add(self, nodes: Nodes, lr: Any, on_device: OnDevice, *, is_deep: bool = False) -> Any:
        """Return a node of FP32 `lr` with noise, rounded to bytes, or with `is_deep` to uint16."""
        is_noisy = nodes["is_noisy"]
        if is_noisy:
            normal = noise.standard_normal(
                *(on_device(nodes[f"noise_{name}"]) for name in noise.NoiseKeys._fields)
            )
            levels = noise.add_gaussian(lr, normal, nodes["noise_sigma"])
        else:
            levels = lr
        return to_pixels(levels, is_deep)

    def add_on_host(
        self, sigma: float, keys: Sequence[int], lr: NDArray[Any], workspace: Any
    ) -> NDArray[np.float32] | NDArray[np.uint8]:
        """Return `lr`, (height, width, 3) bytes or levels, with the noise that `add` adds.

        The result is not rounded yet and lies in memory of `workspace`, a `host.Workspace`.
        """
        from pipeline.data.degradations import host

        if not sigma:
            return lr
        fields = noise.noise_keys((keys[0], keys[1]), *lr.shape[:2], 3)
        return host.with_gaussian(lr.astype(np.float32), fields, sigma, workspace)


def filtered(image: Any, kernel: Any) -> Any:
    """Return an FP32 node: `image` (HWC) filtered with a kernel per sample and mirrored borders."""
    from nvidia.dali import fn, types

    # `filter` left `experimental` in DALI 2.4.
    filter2d = getattr(fn, "filter", None) or fn.experimental.filter
    return filter2d(image, kernel, border="reflect_101", dtype=types.FLOAT)


def to_levels(pixels: Any, is_deep: bool) -> Any:
    """Return a node of the FP32 levels of bytes, or with `is_deep` of uint16 pixels."""
    from nvidia.dali import fn, types

    levels = fn.cast(pixels, dtype=types.FLOAT)
    return levels * (1 / 257) if is_deep else levels


def to_pixels(levels: Any, is_deep: bool) -> Any:
    """Return a node of bytes, or with `is_deep` of uint16 pixels, from levels: rounded, clipped."""
    from nvidia.dali import fn, types

    if is_deep:
        return fn.cast(levels * 257.0, dtype=types.UINT16)
    return fn.cast(levels, dtype=types.UINT8)


def resized(image: Any, size: Any, interpolation: Any) -> Any:
    """Return a node of `image` (HWC) resized without antialiasing, linear or cubic per sample.

    size: node of FP32 (height, width); interpolation: node of an `interpolation`.
    """
    from nvidia.dali import fn, types

    how = fn.cast(interpolation, dtype=types.DALIDataType.INTERP_TYPE)
    return fn.resize(image, size=size, interp_type=how, antialias=False)


def interpolation(kind: str) -> NDArray[np.int32]:
    """Return DALI's number for "cubic" (Keys, a = -0.5) or, for any other kind, linear."""
    from nvidia.dali import types

    return np.array(int(types.INTERP_CUBIC if kind == "cubic" else types.INTERP_LINEAR), np.int32)


def through_jpeg(image: Any, quality: Any) -> Any:
    """Return a node of bytes: levels clipped, rounded and compressed with JPEG."""
    from nvidia.dali import fn, types

    return fn.jpeg_compression_distortion(fn.cast(image, dtype=types.UINT8), quality=quality)


def between(bounds: tuple[float, float], fraction: float) -> float:
    """Interpolate linearly between two bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * fraction
