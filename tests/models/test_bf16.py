"""BF16 gradients of every network on a CPU, compared with those of the same weights in FP32."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_spandrel import OTHERS, TINY, tiny

from pipeline.models import build_generator
from pipeline.models.depthwise import DepthwiseConv2d, is_wrong_in_bf16, same_size

NETWORKS = {
    "vapsr": {"num_features": 16, "num_attention_features": 32, "num_blocks": 2},
    "srresnet": {"num_features": 16, "num_blocks": 2},
    "msrresnet": {"num_features": 16, "num_blocks": 2},
    "rrdbnet": {"num_features": 16, "num_blocks": 1, "num_grow_ch": 8},
    "compact": {"num_features": 16, "num_conv": 3},
}
BOUND = 0.3
"""Of the norm of the difference to that of the gradient. BF16 keeps 8 bits; memory that was never
written is 1 or more away."""


def gradients(
    network: torch.nn.Module, images: torch.Tensor, target: torch.Tensor
) -> dict[str, torch.Tensor]:
    network.zero_grad()
    F.mse_loss(network(images).float(), target).backward()
    return {
        name: parameter.grad.float().clone()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(
    "layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_fp32(name: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    network = build_generator(name, 2, **NETWORKS[name]).train()
    half = copy.deepcopy(network).bfloat16()
    network.load_state_dict(half.state_dict())  # the same weights, rounded
    images = torch.rand(2, 3, 48, 48).bfloat16().contiguous(memory_format=layout)
    target = torch.rand(2, 3, 96, 96)
    wanted = gradients(network, images.float(), target)
    for found in (gradients(half, images, target), gradients(half, images, target)):
        assert found.keys() == wanted.keys()
        far = {
            tensor: float((found[tensor] - gradient).norm() / (gradient.norm() + 1e-12))
            for tensor, gradient in wanted.items()
        }
        whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
        relevant = {tensor for tensor, gradient in wanted.items() if gradient.norm() > 1e-4 * whole}
        assert {
            tensor: error
            for tensor, error in far.items()
            if tensor in relevant and not error < BOUND
        } == {}


@pytest.mark.parametrize("way", ["weights", "autocast"])
@pytest.mark.parametrize(
    ("channels", "size", "dilation", "side"), [(64, 5, 3, 48), (16, 3, 2, 40), (64, 5, 2, 33)]
)
def test_a_dilated_depthwise_convolution_has_its_own_gradient(
    way: str, channels: int, size: int, dilation: int, side: int
) -> None:
    torch.manual_seed(0)
    layer = same_size(channels, size, dilation)
    images = (
        torch.randn(8, channels, side, side)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last)
    )
    gradient = (
        torch.randn(8, channels, side, side)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last)
    )
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    layer(images.float()).backward(gradient.float())
    wanted, layer.weight.grad = layer.weight.grad, None
    if way == "weights":
        layer = layer.bfloat16()
        out = layer(images)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(images)
    assert out.dtype == torch.bfloat16
    out.backward(gradient)
    assert (layer.weight.grad.float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("arch", [*TINY, *OTHERS])
def test_no_convolution_of_spandrel_is_left_unguarded(arch: str) -> None:
    network = tiny(arch)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and is_wrong_in_bf16(module):
            assert isinstance(module, DepthwiseConv2d)
        assert type(module) is not torch.nn.LayerNorm


@pytest.mark.parametrize(
    ("groups", "dilation", "is_wrong"), [(16, 3, True), (4, 2, True), (16, 1, False), (1, 3, False)]
)
def test_what_is_guarded(groups: int, dilation: int, is_wrong: bool) -> None:
    """Only grouped and dilated convolutions; torch computes the others correctly."""
    torch.manual_seed(0)
    layer = DepthwiseConv2d(16, 16, 3, padding=dilation, dilation=dilation, groups=groups)
    assert is_wrong_in_bf16(layer) == is_wrong
    images, gradient = (
        torch.randn(4, 16, 48, 48).bfloat16().contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    half = copy.deepcopy(layer).bfloat16()
    layer.load_state_dict(half.state_dict())
    layer(images.float()).backward(gradient.float())
    half(images).backward(gradient)
    assert (half.weight.grad.float() - layer.weight.grad).norm() < 0.02 * layer.weight.grad.norm()
