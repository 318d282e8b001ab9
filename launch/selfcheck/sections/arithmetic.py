"""Compare the device with the CPU: networks, gradients, losses, metrics, rounding, TF32 switch."""

from __future__ import annotations

import copy
import inspect
import math
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.selfcheck.report import Report

if TYPE_CHECKING:
    from torch import Tensor, nn

NETWORKS: dict[str, dict[str, int]] = {
    "vapsr": {"num_features": 16, "num_attention_features": 16, "num_blocks": 2},
    "srresnet": {"num_features": 16, "num_blocks": 2},
    "msrresnet": {"num_features": 16, "num_blocks": 2},
    "rrdbnet": {"num_features": 16, "num_grow_ch": 8, "num_blocks": 1},
    "compact": {"num_features": 16, "num_conv": 4},
}
LOSSES = (
    "l1",
    "mse",
    "charbonnier",
    "ms_ssim",
    "fft",
    "focal_frequency",
    "sobel",
    "oklab_chroma",
    "luma",
    "ldl",
    "tv",
)
TRUNK_LOSSES = {
    "vgg_feature": "vgg19",
    "vgg_patch": "vgg19",
    "contextual": "vgg19",
    "dists": "vgg16",
}
EXACT, HALF_PSNR, GRADIENT_COSINE, TRUNK_COSINE = 1e-4, 45.0, 0.98, 0.9
SIDE = 48


def run(report: Report) -> None:
    """Check every network, then losses, metrics, rounding, TF32 and losses on trunks."""
    import torch

    torch.manual_seed(0)
    for name, params in NETWORKS.items():
        with report.guarded(f"network.{name}"), exact():
            _network(report, name, params)
    with exact():
        _losses(report)
    with report.guarded("metrics"):
        _metrics(report)
    with report.guarded("rounding"):
        _rounding(report)
    with report.guarded("mixing"):
        _mixing(report)
    if report.is_on_gpu:
        with report.guarded("tf32"):
            _tf32(report)
    else:
        report.skip("tf32", "no GPU")
    with report.guarded("trunk"):
        _trunks(report)


def exact() -> AbstractContextManager[Any]:
    """Return a context in which float32 convolutions do not use TF32."""
    import torch

    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _network(report: Report, name: str, params: dict[str, int]) -> None:
    """Compare a network's output and gradient in FP32, FP16 and BF16 with float64 on the CPU."""
    import torch

    from pipeline.models import build_generator

    network = build_generator(name, 4, **params)
    with torch.no_grad():
        for parameter in network.parameters():  # some are initialised to zero, which hides errors
            parameter.add_(0.02 * torch.randn_like(parameter))
    images = torch.rand(2, 3, SIDE, SIDE)
    reference, wanted = _output_and_gradient(copy.deepcopy(network).double(), images.double())
    found, gradient = _output_and_gradient(
        copy.deepcopy(network).to(report.device), images.to(report.device)
    )
    span = float(reference.max() - reference.min())
    report.at_most(
        f"network.{name}",
        float((found - reference).abs().max()) / span,
        EXACT,
        note="FP32, relative to the range",
    )
    report.at_most(
        f"gradient.{name}",
        float((gradient - wanted).norm() / wanted.norm()),
        1e-3,
        note="FP32, relative",
    )
    if report.is_on_gpu:
        half, _ = _output_and_gradient(
            copy.deepcopy(network).to(report.device).half(), images.to(report.device).half()
        )
        report.at_least(f"half.{name}", psnr(half, reference, span), HALF_PSNR, "dB", note="FP16")
    layout = torch.channels_last
    coarse = copy.deepcopy(network).to(report.device, torch.bfloat16)
    _, gradient = _output_and_gradient(
        coarse, images.to(report.device, torch.bfloat16).to(memory_format=layout)
    )
    cosine = float(torch.dot(gradient, wanted) / (gradient.norm() * wanted.norm()))
    report.at_least(
        f"bf16_gradient.{name}", cosine, GRADIENT_COSINE, note="BF16, channels last; cosine"
    )


def _output_and_gradient(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output, and the gradient of its mean square for all weights, as float64 on the
    CPU."""
    import torch

    output = network(images)
    wide = output if output.dtype == torch.float64 else output.float()
    wide.square().mean().backward()
    gradient = torch.cat(
        [
            parameter.grad.flatten().double().cpu()
            for parameter in network.parameters()
            if parameter.grad is not None
        ]
    )
    return output.detach().double().cpu(), gradient


def psnr(found: Tensor, reference: Tensor, span: float) -> float:
    """Return the PSNR in dB for values with a range of `span`."""
    error = float((found.double() - reference.double()).square().mean())
    return (
        math.inf
        if error == 0
        else 10 * math.log10(span**2 / error)
        if math.isfinite(error)
        else -math.inf
    )


def _losses(report: Report) -> None:
    import torch

    from pipeline.losses import LOSSES as TABLE
    from pipeline.losses import Criterion

    hr = torch.rand(2, 3, 192, 192)
    sr, averaged = ((hr + 0.1 * torch.randn_like(hr)).clamp(0, 1) for _ in range(2))
    for name in LOSSES:
        with report.guarded(f"loss.{name}"):
            own = sr.clone().to(report.device).requires_grad_()
            criterion = Criterion({name: 1.0}, report.device)
            value = criterion(own, hr.to(report.device), averaged.to(report.device))[name]
            value.backward()
            loss = TABLE[name]() if inspect.isclass(TABLE[name]) else TABLE[name]
            exactly = sr.double().requires_grad_()
            more = (averaged.double(),) if criterion.uses_averaged else ()
            wanted = loss(exactly, hr.double(), *more)
            wanted.backward()
            error = (own.grad.double().cpu() - exactly.grad).norm() / exactly.grad.norm()
            error = max(float(error), abs(float(value) - float(wanted)) / abs(float(wanted)))
            report.at_most(
                f"loss.{name}", error, 1e-3, note="value and gradient against float64, relative"
            )


def _trunks(report: Report) -> None:
    """Compare losses on trunks with random weights, in the device's precision, with float64.

    On a GPU that is FP16, and one of them is also compiled.
    """
    import torch

    from pipeline.losses.trunks import VGG16_BLOCKS, VGG19_BLOCKS, vgg_features

    hr = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 16), size=(64, 64), mode="bicubic")
    hr = hr.clamp(0, 1)
    sr = (hr + 0.1 * torch.randn_like(hr)).clamp(0, 1)
    with tempfile.TemporaryDirectory() as folder:
        for name, blocks in (("vgg16", VGG16_BLOCKS), ("vgg19", VGG19_BLOCKS)):
            layers = vgg_features(blocks)
            for layer in layers:
                if isinstance(layer, torch.nn.Conv2d):  # keeps the magnitude of the signal
                    torch.nn.init.kaiming_normal_(layer.weight)
            torch.save(layers.state_dict(), Path(folder, name))
        for name, trunk in TRUNK_LOSSES.items():
            with report.guarded(f"trunk.{name}"):
                _trunk_loss(report, name, str(Path(folder, trunk)), sr, hr)


def _trunk_loss(report: Report, name: str, file: str, sr: Tensor, hr: Tensor) -> None:
    import torch

    from pipeline.engine.engine import compile_module
    from pipeline.losses import LOSSES as TABLE
    from pipeline.losses import Criterion

    exactly = sr.double().requires_grad_()
    wanted = TABLE[name](weights=file).double()(exactly, hr.double())
    wanted.backward()
    criterion = Criterion({name: {"weight": 1.0, "weights": file}}, report.device)

    def compare(kind: str) -> None:
        own = sr.clone().to(report.device).requires_grad_()
        value = criterion(own, hr.to(report.device))[name]
        value.backward()
        error = abs(float(value) - float(wanted)) / abs(float(wanted))
        report.at_most(f"{kind}.{name}", error, 0.01, note="against float64, relative")
        gradients = own.grad.flatten().double().cpu(), exactly.grad.flatten()
        cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
        report.at_least(f"{kind}_gradient.{name}", float(cosine), TRUNK_COSINE, note="cosine")

    compare("trunk")
    if name == "dists" and report.is_on_gpu and report.has_time_for(30):
        for module in criterion.trunks:
            compile_module(module, channels_last=True)
        compare("trunk_compiled")


def _metrics(report: Report) -> None:
    """Compare PSNR and SSIM of the same images on the device and on the CPU."""
    import torch

    from pipeline.metrics import measure

    hr = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
    sr = (hr.int() + torch.randint(-9, 10, hr.shape)).clamp(0, 255).to(torch.uint8)
    ours, wanted = measure(sr.to(report.device), hr.to(report.device), 4), measure(sr, hr, 4)
    error = max(abs(ours[name] - value) / abs(value) for name, value in wanted.items())
    report.at_most("metrics", error, 1e-9, note="PSNR and SSIM, relative")


def _rounding(report: Report) -> None:
    """Check that `to_bytes` gives the CPU's bytes, including halves and values out of range."""
    import torch

    from pipeline.images import to_bytes, unit_range

    values = torch.cat([torch.linspace(-0.1, 1.1, 100_001), (torch.arange(511) / 2) / 255])
    same = torch.equal(to_bytes(values.to(report.device)).cpu(), to_bytes(values))
    levels = torch.arange(256, dtype=torch.uint8)
    same = same and torch.equal(
        to_bytes(unit_range(levels.to(report.device), torch.float32)).cpu(), levels
    )
    report.fact("rounding", same, note="floats to bytes, identical to the CPU's")


def _mixing(report: Report) -> None:
    """Check that mixed samples have the CPU's pixels, up to rounding, without a wait for them."""
    import torch

    from pipeline.data import mixing
    from pipeline.data.spec import MixingSpec

    mixes = mixing.draw(MixingSpec(probability=0.9), 0, 0, 32, SIDE)
    error = 0
    for dtype, white in ((torch.uint8, 256), (torch.uint16, 65536)):
        lr, hr = (
            torch.randint(0, white, (32, 3, side, side), dtype=torch.int32).to(dtype)
            for side in (SIDE, 2 * SIDE)
        )
        sides = [side.to(report.device) for side in (lr, hr)]
        if report.is_on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            found = mixing.mix(*sides, mixes)
        finally:
            if report.is_on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        for one, other in zip(found, mixing.mix(lr, hr, mixes), strict=True):
            error = max(error, int((one.cpu().int() - other.int()).abs().max()))
    report.at_most("mixing", error, 1, note="levels of 8 and of 16 bits, from the CPU's")


def _tf32(report: Report) -> None:
    """Check that allow_tf32=False works, which metrics and validation rely on."""
    import torch

    images, weights = torch.rand(1, 64, 64, 64), torch.rand(64, 64, 3, 3) - 0.5
    wanted = torch.nn.functional.conv2d(images.double(), weights.double())

    def error() -> float:
        found = torch.nn.functional.conv2d(images.to(report.device), weights.to(report.device))
        return float((found.double().cpu() - wanted).abs().max() / wanted.abs().max())

    with exact():
        report.at_most("tf32", error(), 1e-5, note="a convolution with allow_tf32=False, relative")
    report.number("tf32_default", error(), "", note="the same with torch's default")
