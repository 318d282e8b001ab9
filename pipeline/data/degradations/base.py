"""LR of HR as DALI operators: what all degradations share, and the simple ones.

A degradation has a host side, which says how much of the photograph around a crop it must see and turns a sample's
uniform numbers into parameters and arrays, and a device side, which is a few DALI nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.specs import GaussianSpec, NoiseSpec, PairedSpec
from pipeline.data.degradations import kernels, noise

Nodes = Mapping[str, Any]
Parameters = dict[str, Any]
"""What was drawn for a sample: names, numbers, lists and such tables. JSON can hold it."""
OnDevice = Callable[[Any], Any]

WORDS = 40  # random words of a sample's degradation: 2 x 32 uniform numbers and 8 keys of noise fields
KEYS = 8


class Degradation:
    """LR of a crop: what all ways of making it have in common. This one needs no draws: the antialiased cubic."""

    columns: tuple[str, ...] = ()  # arrays of a sample that the nodes use

    def __init__(self, spec: Any, scale: int) -> None:
        self.spec, self.scale = spec, scale

    @property
    def surroundings(self) -> int:
        """HR pixels more than the crop's that are read in each direction, where the photograph has them."""
        # An LR pixel sees 2 x scale HR pixels to either side of its centre.
        return 4 * self.scale

    def place(self, chances: Iterator[float]) -> tuple[int, int]:
        """How many of the `surroundings` lie above and left of the crop, multiples of the scale."""
        return self.surroundings // 2, self.surroundings // 2

    def draw(self, chances: Iterator[float], height: int, width: int) -> Parameters:
        """The parameters of a sample whose region is `height` x `width` HR pixels."""
        return {}

    def arrays(self, parameters: Parameters, keys: Sequence[int]) -> dict[str, NDArray[Any]]:
        """What the nodes need of a sample, by the names in `columns`."""
        return {}

    def lr(self, nodes: Nodes, region: Any, size: tuple[int, int], on_device: OnDevice, *, as_float: bool) -> Any:
        """DALI node of LR (HWC, levels 0..255, bytes or FP32) of the part of `region` that begins at `nodes["start"]`.

        `size`: (height, width) of that part in HR pixels, multiples of the scale.
        """
        from nvidia.dali import fn, types

        start = fn.cast(nodes["start"], dtype=types.FLOAT)
        end = fn.cast(nodes["start"] + np.array(size, np.int32), dtype=types.FLOAT)
        return fn.resize(region, roi_start=start, roi_end=end, resize_y=size[0] // self.scale,
                         resize_x=size[1] // self.scale, interp_type=types.INTERP_CUBIC, antialias=True,
                         dtype=types.FLOAT if as_float else types.UINT8)


class Gaussian(Degradation):
    """Blur and decimate."""

    columns = ("gaussian_x", "gaussian_y")
    spec: GaussianSpec

    @property
    def surroundings(self) -> int:
        reach = kernels.offset_gaussian(self.spec.sigma[1], self.scale).shape[0] // 2
        return 2 * self.scale * math.ceil(reach / self.scale)

    def draw(self, chances: Iterator[float], height: int, width: int) -> Parameters:
        return {"sigma": between(self.spec.sigma, next(chances))}

    def arrays(self, parameters: Parameters, keys: Sequence[int]) -> dict[str, NDArray[Any]]:
        line = kernels.offset_gaussian(parameters["sigma"], self.scale).sum(axis=0)
        return {"gaussian_x": line[None], "gaussian_y": line[:, None]}

    def lr(self, nodes: Nodes, region: Any, size: tuple[int, int], on_device: OnDevice, *, as_float: bool) -> Any:
        from nvidia.dali import fn, types

        start = fn.cast(nodes["start"], dtype=types.FLOAT)
        end = fn.cast(nodes["start"] + np.array(size, np.int32), dtype=types.FLOAT)
        # Two lines instead of a square: a third of the time, and no Fourier transform (OpenCV's, for kernels of more
        # than 49 taps on bytes and 129 on floats), whose rounding errors depend on where in the region a pixel lies.
        levels = fn.cast(region, dtype=types.FLOAT)
        blurred = filtered(filtered(levels, on_device(nodes["gaussian_x"])), on_device(nodes["gaussian_y"]))
        lr = fn.resize(blurred, roi_start=start, roi_end=end, resize_y=size[0] // self.scale,
                       resize_x=size[1] // self.scale, interp_type=types.INTERP_NN, antialias=False)
        return lr if as_float else fn.cast(lr, dtype=types.UINT8)


class Paired(Degradation):
    """LR is read, not made."""

    spec: PairedSpec

    @property
    def surroundings(self) -> int:
        return 0

    def lr(self, nodes: Nodes, region: Any, size: tuple[int, int], on_device: OnDevice, *, as_float: bool) -> Any:
        from nvidia.dali import fn, types

        return fn.cast(nodes["lr"], dtype=types.FLOAT) if as_float else nodes["lr"]


class LrNoise:
    """White Gaussian noise on LR of any degradation, before it is rounded."""

    columns = ("is_noisy", *(f"noise_{name}" for name in noise.NoiseKeys._fields), "noise_sigma")

    def __init__(self, spec: NoiseSpec) -> None:
        self.spec = spec

    def draw(self, chances: Iterator[float]) -> float:
        """Sigma in levels; 0 for a sample that gets none."""
        chance, sigma = next(chances), between(self.spec.sigma, next(chances))
        return sigma if chance < self.spec.probability else 0.0

    def arrays(self, sigma: float, shape: tuple[int, int], keys: Sequence[int]) -> dict[str, NDArray[Any]]:
        """What `add` needs of a sample whose LR is of `shape`, the degradation's own arrays not counted."""
        fields = noise.noise_keys(keys, *(shape if sigma else (1, 1)), 3)  # hardly any where they are not used
        return {"is_noisy": np.array(sigma > 0), "noise_sigma": np.array(sigma, np.float32),
                **{f"noise_{name}": field for name, field in zip(noise.NoiseKeys._fields, fields, strict=True)}}

    def add(self, nodes: Nodes, lr: Any, on_device: OnDevice) -> Any:
        """Node of bytes: FP32 `lr` with noise."""
        from nvidia.dali import fn, types

        is_noisy = nodes["is_noisy"]
        if is_noisy:
            normal = noise.standard_normal(*(on_device(nodes[f"noise_{name}"]) for name in noise.NoiseKeys._fields))
            levels = noise.add_gaussian(lr, normal, nodes["noise_sigma"])
        else:
            levels = lr
        return fn.cast(levels, dtype=types.UINT8)


def filtered(image: Any, kernel: Any) -> Any:
    """Node of FP32: `image` (HWC) under a kernel of its own, the outermost pixels being mirrored."""
    from nvidia.dali import fn, types

    filter2d = getattr(fn, "filter", None) or fn.experimental.filter  # it left `experimental` in DALI 2.4
    return filter2d(image, kernel, border="reflect_101", dtype=types.FLOAT)


def through_jpeg(image: Any, quality: Any) -> Any:
    """Node of bytes: levels clipped, rounded and through JPEG."""
    from nvidia.dali import fn, types

    return fn.jpeg_compression_distortion(fn.cast(image, dtype=types.UINT8), quality=quality)


def between(bounds: tuple[float, float], fraction: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * fraction
