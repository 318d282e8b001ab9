"""A one-element Triton kernel, compiled to find out whether Triton works. Imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _double(pointer, SIZE: tl.constexpr):  # noqa: N803 - Triton's language
    places = tl.arange(0, SIZE)
    tl.store(pointer + places, tl.load(pointer + places) * 2)


def doubled(device: torch.device) -> float:
    """Return 2.0, computed on `device`.

    Raises whatever Triton, its C compiler, the linker or its cache's file system raises.
    """
    triton.runtime.driver.active.get_current_target()  # compiles and loads Triton's C helper
    number = torch.ones(1, device=device)
    _double[(1,)](number, SIZE=1)
    return float(number.item())
