"""LR by antialiased bicubic downscaling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.degradations.base import (
    Degradation,
    DegradationSpec,
    Nodes,
    OnDevice,
    Parameters,
)


class BicubicSpec(DegradationSpec):
    """LR by antialiased bicubic downscaling, as in the benchmark sets."""

    name: Literal["bicubic"] = "bicubic"


class Bicubic(Degradation):
    """Antialiased bicubic downscaling, without randomness."""

    Spec = BicubicSpec
    is_linear = True

    @property
    def surroundings(self) -> int:
        # The kernel of an LR pixel extends 2 x scale HR pixels to either side of its centre.
        return 4 * self.scale

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
        return fn.resize(
            region,
            roi_start=start,
            roi_end=end,
            resize_y=size[0] // self.scale,
            resize_x=size[1] // self.scale,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            **({"dtype": types.FLOAT} if as_float else {}),  # otherwise that of the region
        )

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

        low = region.shape[0] // self.scale, region.shape[1] // self.scale
        lr = host.resampled(region, low, "cubic_antialiased", workspace)
        return host.rounded_as(region, self.part(lr, start, size), workspace)
