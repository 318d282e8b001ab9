"""Shared by several networks: checks of arguments, initialisation, norms for mixed precision."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.spec import is_number

COLOURS = 3
LARGEST_SIZE = 1 << 16
"""Upper limit for numbers of features, blocks and the like."""
NOT_ALLOCATED = (RuntimeError, MemoryError, OverflowError)
"""Exceptions that torch raises for a network that does not fit into memory."""


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that computes in float32 or wider, whatever the dtypes of its weights and buffers.

    torch's own fails in trainers that cast the parameters to FP16 or BF16 but keep the buffers in
    FP32 (DeepSpeed since 0.19). FP32 statistics are also more accurate: in BF16, an update below
    0.4 % is lost.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Normalise NCHW features; shape and dtype stay the same."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        is_tracking = self.training and self.track_running_stats
        mean = var = None
        if is_tracking or not self.training:
            # Copies, because the next forward pass may change the buffers before this one's
            # backward pass.
            mean, var = (
                self.running_mean.to(dtype, copy=True),
                self.running_var.to(dtype, copy=True),
            )
        features = F.batch_norm(
            features,
            mean,
            var,
            self.weight.to(dtype),
            self.bias.to(dtype),
            self.training,
            self.momentum,
            self.eps,
        )
        if is_tracking:
            self.num_batches_tracked.add_(1)
            # An overflow in FP16 may invalidate this update, but must not destroy the statistics.
            self.running_mean.copy_(torch.where(torch.isfinite(mean), mean, self.running_mean))
            self.running_var.copy_(torch.where(torch.isfinite(var), var, self.running_var))
        return features


class LayerNorm(nn.LayerNorm):
    """Layer norm that trains in float32 on CPUs if the features are BF16, and rounds the result.

    On CPUs, torch 2.13 sums the gradients of weight and bias in BF16: over 18,000 pixels, nearly
    all of the sum is lost.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Normalise over the trailing dimensions; shape and dtype stay the same."""
        return layer_norm(features, self.normalized_shape, self.weight, self.bias, self.eps)


def layer_norm(
    features: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise over the trailing dimensions `shape`, as `LayerNorm` does."""
    if (
        features.device.type != "cpu"
        or features.dtype != torch.bfloat16
        or not torch.is_grad_enabled()
    ):
        return F.layer_norm(features, shape, weight, bias, eps)
    with torch.autocast("cpu", enabled=False):
        weight, bias = (None if value is None else value.float() for value in (weight, bias))
        return F.layer_norm(features.float(), shape, weight, bias, eps).bfloat16()


class SpectralConv2d(nn.Module):
    """A convolution whose weight is divided by its largest singular value.

    Miyato et al., ICLR 2018. As in `torch.nn.utils.spectral_norm`, and with its tensor names, one
    power iteration per training pass updates the singular vectors `weight_u` and `weight_v`. In
    addition, it supports weights in half precision with vectors in float32 and computes in float32,
    and 15 initial iterations make the first passes accurate.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        stride: int,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(in_features, out_features, kernel_size, stride, (kernel_size - 1) // 2)
        self.stride, self.padding = conv.stride, conv.padding
        self.is_iterating = True
        self.weight_orig = conv.weight
        self.bias = conv.bias if has_bias else None
        matrix = self.weight_orig.detach().flatten(1)
        self.register_buffer(
            "weight_u", F.normalize(torch.randn(matrix.shape[0]), dim=0, eps=1e-12)
        )
        self.register_buffer(
            "weight_v", F.normalize(torch.randn(matrix.shape[1]), dim=0, eps=1e-12)
        )
        for _ in range(15):
            self._iterate(matrix)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve NCHW features with a padding of (kernel size - 1) // 2.

        A 3x3 kernel with stride 1 keeps H and W; a 4x4 kernel with stride 2 halves them.
        """
        weight = self.weight_orig.to(torch.promote_types(self.weight_orig.dtype, torch.float32))
        matrix = weight.flatten(1)
        if self.training and self.is_iterating:
            u, v = self._iterate(matrix.detach())
        else:  # copies, because later passes change the buffers before the backward pass
            u, v = (vector.to(weight.dtype, copy=True) for vector in (self.weight_u, self.weight_v))
        weight = weight / torch.dot(u, torch.mv(matrix, v))
        return F.conv2d(features, weight.to(features.dtype), self.bias, self.stride, self.padding)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Do one power iteration and return the new left and right singular vectors.

        The buffers are updated in their own dtype.
        """
        v = F.normalize(torch.mv(matrix.t(), self.weight_u.to(matrix.dtype)), dim=0, eps=1e-12)
        u = F.normalize(torch.mv(matrix, v), dim=0, eps=1e-12)
        self.weight_u.copy_(u)
        self.weight_v.copy_(v)
        return u, v


def checkpoint_activations(network: nn.Module) -> int:
    """Enable activation checkpointing for each block of `network`; return the number of blocks.

    A block then keeps only its input for the backward pass and computes the rest again. The
    gradients are bit-identical; a forward and backward pass takes about a third longer. The blocks
    are the composite parts, not single layers, of the longest `nn.Sequential` in the network.
    Returns 0 if there are none, or if they contain batch norms, whose statistics would count each
    batch twice.
    """
    bodies = [
        [part for part in body if next(part.children(), None) is not None]
        for body in network.children()
        if isinstance(body, nn.Sequential)
    ]
    blocks = max(bodies, key=len, default=[])
    if any(
        isinstance(part, nn.modules.batchnorm._BatchNorm)
        for block in blocks
        for part in block.modules()
    ):
        return 0
    for block in blocks:
        # No block draws random numbers, so their state need not be fetched from the device and
        # restored.
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    return len(blocks)


@torch.no_grad()
def initialise(modules: Iterable[nn.Module], factor: float) -> None:
    """Initialise convolutions: Kaiming normal (fan in, gain sqrt(2)) times `factor`, biases 0."""
    for module in modules:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            module.weight.mul_(factor)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_scale(scale: int, scales: Sequence[int]) -> None:
    """Raise `ValueError` unless `scale` is one of `scales`."""
    if not isinstance(scale, int) or isinstance(scale, bool) or scale not in scales:
        raise ValueError(f"scale {scale!r} is not one of {listed(scales)}")


def listed(scales: Sequence[int]) -> str:
    """Format scales for messages, e.g. "2, 3 and 4"."""
    first = ", ".join(map(str, scales[:-1]))
    return f"{first} and {scales[-1]}" if first else str(scales[-1])


def check_sizes(**sizes: int) -> None:
    """Raise `ValueError` for the first of `sizes` that is not an integer in 1..`LARGEST_SIZE`."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} {size!r} is not a whole number above 0")
        if size > LARGEST_SIZE:
            raise ValueError(f"{name} {size} is above {LARGEST_SIZE}, too large for any memory")


def check_positive(**numbers: float) -> None:
    """Raise `ValueError` for the first of `numbers` that is not a finite number above 0."""
    for name, number in numbers.items():
        if not is_number(number) or number <= 0:
            raise ValueError(f"{name} {number!r} is not a number above 0")


def check_choice(choices: Sequence[str], **values: str) -> None:
    """Raise `ValueError` for the first of `values` that is not one of `choices`."""
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(map(repr, choices))}")


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Count the different numbers that follow `prefix` and a dot in tensor names.

    For example, "body.3.weight" has the number 3 after "body".
    """
    parts = (
        name.removeprefix(f"{prefix}.").split(".")[0]
        for name in names
        if name.startswith(f"{prefix}.")
    )
    return len({part for part in parts if part.isdecimal()})


def has_convolutions(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> bool:
    """Return whether every name is that of a convolution's weight (4 dimensions, none 0)."""
    return all(len(shapes.get(name, ())) == 4 and 0 not in shapes[name] for name in names)
