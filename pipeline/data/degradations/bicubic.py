"""LR by the antialiased cubic."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from pipeline.data.degradations.base import Degradation, DegradationSpec, Nodes, OnDevice


class BicubicSpec(DegradationSpec):
    """LR by the antialiased cubic, as the benchmark sets are made."""

    name: Literal["bicubic"] = "bicubic"


class Bicubic(Degradation):
    """The antialiased cubic. Nothing in it is random."""

    Spec = BicubicSpec

    @property
    def surroundings(self) -> int:
        # An LR pixel sees 2 x scale HR pixels to either side of its centre.
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
            dtype=types.FLOAT if as_float else types.UINT8,
        )
