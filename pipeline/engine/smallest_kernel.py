"""A Triton kernel of one element, compiled to find out whether kernels can be. Importing this wants
Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _double(pointer, SIZE: tl.constexpr):  # noqa: N803 - Triton's language
    places = tl.arange(0, SIZE)
    tl.store(pointer + places, tl.load(pointer + places) * 2)


def doubled(device: torch.device) -> float:
    """2.0, computed on `device`; raises whatever Triton, its C compiler, the linker or the disk of
    its cache do."""
    triton.runtime.driver.active.get_current_target()  # compiles and loads Triton's own piece of C
    number = torch.ones(1, device=device)
    _double[(1,)](number, SIZE=1)
    return float(number.item())
