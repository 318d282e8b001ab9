"""Depthwise convolutions: choice of the CPU kernel, which dominates VapSR's time, and a BF16 guard.

PyTorch's kernel is the reference, and the only one outside training. An FP32 training run on CPUs
may choose our own C++ kernel (`native.py`); see `faster_kernel`. Their results differ in rounding.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models import native

KERNELS = ("torch", "native")
MARGIN = 1.1  # minimum speed-up for choosing the native kernel
BUDGET = 1.0  # seconds for measuring
ROUNDS, MAX_ROUNDS = 3, 20
# Speed-up that counts as clear; below it, more rounds are measured, as the machine may be busy.
CLEAR = 1.5
LARGEST_BATCH = 8
"""Largest number of images to measure on; more only take proportionally longer."""


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution, like `nn.Conv2d` except for two differences.

    `kernel` selects what computes it in FP32 on a CPU: "torch" or "native" (see `use_kernel`).

    In BF16 on a CPU, a dilated convolution trains in FP32 and rounds the result: the weight
    gradient that torch 2.13 computes there for large channels_last images is uninitialised memory.
    """

    kernel = "torch"

    def forward(self, features: Tensor) -> Tensor:
        """Convolve NCHW as `nn.Conv2d` does."""
        if features.device.type != "cpu":
            return super().forward(features)
        # Compilers and tracers must see torch's operator: they cannot look into the C++ kernel.
        if self.kernel == "native" and _is_eager_fp32(features, self.weight):
            return _Depthwise.apply(features, self.weight, self.bias, self.dilation[0])
        if (
            # Only the weight gradient is wrong, so validation and inference stay in BF16.
            torch.is_grad_enabled()
            and _dtype(self.weight) == torch.bfloat16
            and is_wrong_in_bf16(self)
        ):
            # Autocast would convert everything back to BF16.
            with torch.autocast("cpu", enabled=False):
                bias = None if self.bias is None else self.bias.float()
                return self._conv_forward(features.float(), self.weight.float(), bias).bfloat16()
        return super().forward(features)


def same_size(channels: int, kernel_size: int, dilation: int = 1) -> DepthwiseConv2d:
    """Build a depthwise convolution with stride 1 that keeps the size; the kernel's side is odd."""
    return DepthwiseConv2d(
        channels,
        channels,
        kernel_size,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        groups=channels,
    )


def is_wrong_in_bf16(convolution: nn.Conv2d) -> bool:
    """Return whether `DepthwiseConv2d` must guard the convolution: it is grouped and dilated."""
    return convolution.groups > 1 and max(convolution.dilation) > 1


def use_kernel(network: nn.Module, kernel: str) -> None:
    """Compute the network's depthwise convolutions with `kernel` where it can.

    `kernel` is one of `KERNELS`.
    """
    for module in network.modules():
        if isinstance(module, DepthwiseConv2d):
            module.kernel = kernel if _fits(module) else "torch"


def may_use_native(network: nn.Module) -> bool:
    """Return whether the network has convolutions that the native kernel can compute."""
    return any(
        isinstance(module, DepthwiseConv2d) and _fits(module) for module in network.modules()
    )


def faster_kernel(network: nn.Module, batch: int, patch: int) -> tuple[str, str]:
    """Measure which kernel is faster for the network's depthwise convolutions on this CPU.

    Measures forward and backward passes of (batch, C, patch, patch) in FP32, alternating between
    the kernels, for at most about a second. It uses one thread: several would wait for each other
    if other processes need the cores, and the times would be meaningless. Returns one of `KERNELS`
    and a line for the log. The native kernel must work (`native.why_not_native`), and the network
    must have such convolutions (`may_use_native`).
    """
    counts = Counter(
        (module.in_channels, module.kernel_size[0], module.dilation[0])
        for module in network.modules()
        if isinstance(module, DepthwiseConv2d) and _fits(module)
    )
    deadline = time.perf_counter() + BUDGET
    seconds = dict.fromkeys(KERNELS, 0.0)
    threads = torch.get_num_threads()
    # With two threads beside six busy processes the same measurement gave ratios from 0.6 to 28;
    # with one thread, 3.9 and 4.0.
    torch.set_num_threads(1)
    try:
        for number, ((channels, size, dilation), count) in enumerate(counts.items()):
            # Share what is left of the time evenly: what one shape does not use goes to the next
            # ones.
            until = time.perf_counter() + (deadline - time.perf_counter()) / (len(counts) - number)
            for kernel, best in _measured(
                channels, size, dilation, min(batch, LARGEST_BATCH), patch, until
            ).items():
                seconds[kernel] += count * best
    finally:
        torch.set_num_threads(threads)
    ratio = seconds["torch"] / seconds["native"]
    if ratio < MARGIN:
        return (
            "torch",
            f"depthwise convolutions: PyTorch's kernel; our own was {ratio:.2f} times as fast",
        )
    return (
        "native",
        f"depthwise convolutions: our own C++ kernel, {ratio:.1f} times as fast here as PyTorch's",
    )


def _measured(
    channels: int, size: int, dilation: int, batch: int, patch: int, until: float
) -> dict[str, float]:
    """Return the seconds per step of each kernel, the minimum over alternating rounds.

    At least one round is measured; more if the kernels are close.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((batch, channels, patch, patch), generator=generator)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = torch.ones_like(images, requires_grad=False)
    layer = same_size(channels, size, dilation)
    best = dict.fromkeys(KERNELS, float("inf"))
    for number in range(MAX_ROUNDS + 1):
        # In turns, so that both kernels meet the same load, and by the minimum, because other work
        # on the machine can only make a round slower.
        for kernel in KERNELS:
            layer.kernel, images.grad = kernel, None
            began = time.perf_counter()
            # Any gradient will do. `out.backward(gradient)` would import sympy to compare two
            # shapes, 0.3 s at the start of every run.
            (layer(images) * weights).sum().backward()
            # The first round loads the code and allocates memory.
            if number:
                best[kernel] = min(best[kernel], time.perf_counter() - began)
        is_clear = max(best.values()) > CLEAR * min(best.values())
        if number and ((number >= ROUNDS and is_clear) or time.perf_counter() > until):
            break
    return best


def _fits(module: DepthwiseConv2d) -> bool:
    """Return whether the native kernel can compute the convolution."""
    size, dilation = module.kernel_size[0], module.dilation[0]
    return (
        module.groups == module.in_channels == module.out_channels
        and module.kernel_size == (size, size)
        and size in native.KERNEL_SIZES
        and module.dilation == (dilation, dilation)
        and module.stride == (1, 1)
        and module.padding == (dilation * (size // 2),) * 2
        and module.padding_mode == "zeros"
    )


def _dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype that torch computes in on the CPU."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


def _is_eager_fp32(features: Tensor, weight: Tensor) -> bool:
    return (
        features.dtype == weight.dtype == _dtype(weight) == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


class _Depthwise(torch.autograd.Function):
    """The native kernel and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, dilation: int
    ) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.dilation, ctx.has_bias = dilation, bias is not None
        return native.forward(features, weight, bias, dilation)

    @staticmethod
    # The kernel's backward pass is not differentiable: a second derivative must raise and not be
    # wrong.
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        needs_images, needs_weight, needs_bias, _ = ctx.needs_input_grad
        to_images, to_weight, to_bias = native.backward(
            features,
            gradient,
            weight,
            ctx.dilation,
            needs_images=needs_images,
            # The kernel sums the bias's gradient together with the weight's.
            needs_weight=needs_weight or needs_bias,
        )
        return to_images, to_weight, to_bias if ctx.has_bias else None, None
