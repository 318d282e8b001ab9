"""All of training's computations on a device that is not the CPU, to find tensors left on the CPU.

The device is torch's "meta", which computes only shapes and raises when code reads a value, for
which it would have to wait for a GPU. `OneDevice` raises when an operation mixes devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config.specs import AdversarialSpec
from pipeline.data.loader import Batch
from pipeline.data.mixing import Mix, mix
from pipeline.data.spec import MIXES
from pipeline.distributed.ranks import Ranks
from pipeline.losses import LOSSES, Criterion
from pipeline.losses.adversarial import ADVERSARIAL_LOSSES
from pipeline.losses.dists import DistsDistance
from pipeline.losses.perceptual import LpipsDistance, VggFeature
from pipeline.models import GENERATORS, build_generator
from pipeline.models.discriminators import DISCRIMINATORS, build_discriminator
from pipeline.models.ema import ExponentialMovingAverage
from pipeline.training.meter import TrainMeter
from pipeline.training.trainers import AdversarialTrainer, ReconstructionTrainer, StepResult

META = torch.device("meta")
SIZES: dict[str, dict[str, Any]] = {
    "vapsr": {"num_blocks": 2, "global_residual": "bicubic"},
    "srresnet": {"num_blocks": 2},
    "msrresnet": {"num_blocks": 2},
    "rrdbnet": {"num_blocks": 1},
    "compact": {"num_conv": 2},
    "spandrel": {"arch": "PLKSR", "dim": 16, "n_blocks": 2},
}


def pixels(side: int) -> Tensor:
    return torch.empty(2, 3, side, side, dtype=torch.uint8, device=META)


def all_on_meta(module: nn.Module) -> bool:
    return all(tensor.device == META for tensor in (*module.parameters(), *module.buffers()))


class PlainEngine:
    """An engine without a runtime: plain autograd and a manual update."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.weights, self.before_update = module, list(module.parameters()), []

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images)

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def check_gradient(self) -> None: ...

    @torch.no_grad()
    def step(self) -> None:
        for weight in self.weights:
            assert weight.grad is None or weight.grad.device == META
            if weight.grad is not None:
                weight.sub_(weight.grad)
                weight.grad = None


class OneDevice(TorchDispatchMode):
    """Refuses operations with tensors on several devices, as CUDA does; CPU scalars are allowed."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = {
            tensor.device
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor) and (tensor.dim() or tensor.device == META)
        }
        if len(found) > 1 and function._schema.name not in ("aten::copy_", "aten::_to_copy"):
            raise RuntimeError(f"{function} mixes the devices {sorted(map(str, found))}")
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adapt torch to "meta": it has no autocast there, unlike on any real device, and there are no
    other ranks."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: contextlib.nullcontext())
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    with OneDevice():
        yield


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_every_network(name: str, dtype: torch.dtype) -> None:
    network = build_generator(name, 2, **SIZES[name]).to(META, dtype).train()
    assert all_on_meta(network)
    sr = network(pixels(16))
    assert (sr.shape, sr.device, sr.dtype) == ((2, 3, 32, 32), META, dtype)
    sr.sum().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.device == META and gradient.dtype == dtype for gradient in gradients)


@pytest.mark.parametrize("name", sorted(DISCRIMINATORS))
def test_every_discriminator(name: str) -> None:
    network = build_discriminator(name, 48, num_features=4).to(META).train()
    logits = network(torch.empty(2, 3, 48, 48, device=META))
    assert all_on_meta(network)
    scales = [logits] if isinstance(logits, Tensor) else logits
    sum(part.sum() for part in scales).backward()
    assert all(parameter.grad.device == META for parameter in network.parameters())


@pytest.fixture
def trunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give losses trunks without values."""
    from pipeline.losses import perceptual, trunks

    for module in (perceptual, trunks):
        monkeypatch.setattr(
            module, "load_trunk", lambda name, file, layers: layers.to_empty(device="cpu")
        )


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss(name: str, trunks: None) -> None:
    criterion = Criterion({name: 1.0}, META)
    sr = torch.empty(2, 3, 64, 64, device=META, requires_grad=True)
    loss = criterion(sr, pixels(64), pixels(64))[name]
    assert (loss.device, loss.dtype, loss.shape) == (META, torch.float32, ())
    loss.backward()
    assert sr.grad.device == META


@pytest.mark.parametrize("kind", MIXES)
def test_mixing(kind: str) -> None:
    lr, hr = pixels(16), pixels(32)
    mixes = [Mix(kind, 0.3, 2, 3, 8, True), Mix(kind, 0.3, 2, 3, 8, False)]
    for mixed, side in zip(mix(lr, hr, mixes), (lr, hr), strict=True):
        assert (mixed.device, mixed.dtype, mixed.shape) == (META, torch.uint8, side.shape)


def test_perceptual_metrics(trunks: None) -> None:
    distance = LpipsDistance("squeeze").to(META)
    assert all_on_meta(distance)
    assert distance(pixels(64), pixels(64)).shape == (2,)
    assert all_on_meta(VggFeature().to(META))
    distance = DistsDistance().to(META)
    assert all_on_meta(distance)
    assert distance(pixels(64), pixels(64)).shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_average_and_the_meter(dtype: torch.dtype) -> None:
    network = build_generator("srresnet", 2, num_blocks=2)
    ema = ExponentialMovingAverage(network, 0.9)
    ema.network.to(META)
    ema.update(network.to(META, dtype))
    assert all_on_meta(ema.network)
    meter = TrainMeter(Ranks(device=META), 10, 4)
    loss = torch.empty((), device=META)
    for _ in range(2):
        meter.add(StepResult({"l1": loss}, {"d_real": loss}))
        meter.end_step(
            1,
            torch.empty((), dtype=torch.bool, device=META),
            {"generator": loss},
            type("Loader", (), {"waited_seconds": 0.0, "step_seconds": {}})(),
        )


@pytest.mark.parametrize("name", sorted(ADVERSARIAL_LOSSES))
@pytest.mark.parametrize("discriminator", sorted(DISCRIMINATORS))
def test_both_trainers(name: str, discriminator: str) -> None:
    generator = build_generator("msrresnet", 2, num_blocks=1, num_features=8)
    ema = ExponentialMovingAverage(generator, 0.9)
    ema.network.to(META)
    engine = PlainEngine(generator.to(META))
    batch = Batch(pixels(24), pixels(48), 0)
    result = ReconstructionTrainer(engine, Criterion({"l1": 1.0}, META), ema).step(batch, 0)
    assert all(value.device == META for value in result.losses.values())
    labels = {"flip": 0.1} if name == "hinge" else {"noise": 0.1, "flip": 0.1}
    spec = AdversarialSpec(
        weight=0.1,
        loss=name,
        discriminator={"name": discriminator, "num_features": 4},
        labels=labels,
        instance_noise={"sigma": 0.1, "steps": 5},
        adaptive="on",
    )
    judge = PlainEngine(build_discriminator(discriminator, 48, num_features=4).to(META))
    trainer = AdversarialTrainer(engine, judge, Criterion({"l1": 1.0}, META), ema, spec)
    trainer.criterion._is_checked = True  # the check reads values of the first HR image
    for trainer.skips_turns in (False, True):
        result = trainer.step(batch, 0)
        assert "d_turns_skipped" in result.statistics
        assert all(
            value.device == META for value in (*result.losses.values(), *result.statistics.values())
        )


def test_something_left_on_the_cpu_would_show() -> None:
    network = build_generator("vapsr", 2, **SIZES["vapsr"]).to(META)
    network.residual_kernel = torch.zeros_like(network.residual_kernel, device="cpu")
    with pytest.raises(RuntimeError, match="mixes the devices"):
        network(pixels(16))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        float(torch.empty((), device=META))


def test_a_validation_and_its_metrics_run_without_tf32(
    monkeypatch: pytest.MonkeyPatch, dataset
) -> None:
    """Training must measure what `evaluate.py` measures, because `best` and early stopping depend
    on it."""
    from pipeline.config.recipe import load_recipe
    from pipeline.data.dataset import read_dataset
    from pipeline.training.validation import ValidationSet

    class Watching(nn.Module):
        def forward(self, lr: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return nn.functional.interpolate(lr.float() / 255, scale_factor=2)

    seen: list[bool] = []
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    validation = ValidationSet(read_dataset([dataset]).validation, load_recipe("demo"), Ranks())
    validation.measure(Watching())
    assert seen == [False] * len(validation)
    assert torch.backends.cudnn.allow_tf32
    blurs = []
    convolve = nn.functional.conv2d
    monkeypatch.setattr(
        nn.functional,
        "conv2d",
        lambda *args, **more: (
            blurs.append(torch.backends.cudnn.allow_tf32) or convolve(*args, **more)
        ),
    )
    Criterion({"ms_ssim": 1.0})(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))
    assert blurs
    assert not any(blurs)


def test_deterministic_is_asked_of_every_library_and_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import os

    from torch._inductor import config as inductor

    from pipeline.engine.engine import set_deterministic

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic
        assert inductor.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert not inductor.deterministic
