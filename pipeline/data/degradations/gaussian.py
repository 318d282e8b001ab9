"""LR by a Gaussian blur and decimation ("BD")."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.degradations import kernels
from pipeline.data.degradations.base import (
    Degradation,
    DegradationSpec,
    Nodes,
    OnDevice,
    Parameters,
    between,
    filtered,
)
from pipeline.spec import Sigma


class GaussianSpec(DegradationSpec):
    """LR by a Gaussian blur and decimation ("BD"), sampled at the centre of each LR pixel."""

    name: Literal["gaussian"] = "gaussian"
    sigma: Sigma = Field(
        (1.6, 1.6), description="range of the standard deviation in HR pixels, uniform"
    )


class Gaussian(Degradation):
    """Gaussian blur, then every `scale`-th pixel."""

    Spec = GaussianSpec
    is_linear = True
    columns = ("gaussian_x", "gaussian_y")
    spec: GaussianSpec

    @property
    def surroundings(self) -> int:
        reach = kernels.offset_gaussian(self.spec.sigma[1], self.scale).shape[0] // 2
        return 2 * self.scale * math.ceil(reach / self.scale)

    def draw(self, randoms: Iterator[float], height: int, width: int) -> Parameters:
        return {"sigma": between(self.spec.sigma, next(randoms))}

    def arrays(self, parameters: Parameters, keys: Sequence[int]) -> dict[str, NDArray[Any]]:
        line = kernels.offset_gaussian(parameters["sigma"], self.scale).sum(axis=0)
        return {"gaussian_x": line[None], "gaussian_y": line[:, None]}

    def lr(
        self,
        nodes: Nodes,
        region: Any,
        size: tuple[int, int],
        on_device: OnDevice,
        *,
        as_float: bool,
    ) -> Any:
        from nvidia.dali import fn, types

        start = fn.cast(nodes["start"], dtype=types.FLOAT)
        end = fn.cast(nodes["start"] + np.array(size, np.int32), dtype=types.FLOAT)
        # Two 1D kernels instead of a square one take a third of the time, and avoid OpenCV's
        # Fourier transform (for kernels of more than 49 taps on bytes and 129 on floats), whose
        # rounding errors depend on a pixel's position in the region.
        levels = fn.cast(region, dtype=types.FLOAT)
        blurred = filtered(
            filtered(levels, on_device(nodes["gaussian_x"])), on_device(nodes["gaussian_y"])
        )
        lr = fn.resize(
            blurred,
            roi_start=start,
            roi_end=end,
            resize_y=size[0] // self.scale,
            resize_x=size[1] // self.scale,
            interp_type=types.INTERP_NN,
            antialias=False,
        )
        return lr if as_float else fn.cast_like(lr, region)

    def lr_on_host(
        self,
        parameters: Parameters,
        keys: Sequence[int],
        region: NDArray[Any],
        start: tuple[int, int],
        size: tuple[int, int],
        workspace: Any,
    ) -> NDArray[Any]:
        from pipeline.data.degradations import host

        kernel = kernels.offset_gaussian(parameters["sigma"], self.scale)
        blurred = host.filtered(region, kernel, workspace)
        first = self.scale // 2
        (top, left), (height, width) = start, size
        part = blurred[top : top + height, left : left + width]
        lr = np.ascontiguousarray(part[first :: self.scale, first :: self.scale])
        return host.rounded_as(region, lr, workspace)
