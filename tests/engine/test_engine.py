"""The engine: DeepSpeed's configuration, and that non-finite gradients change no weights or
moments."""

from __future__ import annotations

import pytest
import torch

from conftest import ROOT
from lives import in_a_fresh_process
from pipeline.cli import UserError
from pipeline.config.ds_config import load_ds_config
from pipeline.engine.engine import build_optimizer, resolve_ds_config
from pipeline.models.ema import ExponentialMovingAverage

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 2}},
        {"bf16": {"enabled": True}},
        {"fp16": {"enabled": True, "initial_scale_power": 8}},
    ],
    ids=["zero0", "zero1", "zero2", "bf16", "fp16"],
)
def test_a_nan_changes_neither_weights_nor_moments(changes: dict) -> None:
    found = in_a_fresh_process(f"""
        module = torch.nn.Conv2d(3, 4, 3)
        engine = engine_for(module, **{changes!r})
        dtype = next(module.parameters()).dtype
        images = torch.randn(4, 3, 8, 8).to(dtype)
        for _ in range(2):
            backward_and_step(engine, engine(images).float().square().mean())
        before = [p.clone() for p in module.parameters()]
        for _ in range(3):
            backward_and_step(engine, engine(images * float("nan")).float().square().mean())
        same = all(torch.equal(p, q) for p, q in zip(module.parameters(), before))
        skipped = engine.skipped_steps
        backward_and_step(engine, engine(images).float().square().mean())
        moved = not all(torch.equal(p, q) for p, q in zip(module.parameters(), before))
        finite = all(bool(torch.isfinite(p).all()) for p in module.parameters())
        print(json.dumps(dict(same=same, moved=moved, finite=finite, skipped=skipped)))
    """)
    assert found == {"same": True, "moved": True, "finite": True, "skipped": 3}


def test_accumulation_equals_one_large_batch() -> None:
    found = in_a_fresh_process("""
        images = torch.randn(4, 3, 8, 8)
        weights = []
        for accumulation in (1, 2, 4):
            torch.manual_seed(1)
            module = torch.nn.Conv2d(3, 4, 3)
            engine = engine_for(module, gradient_accumulation_steps=accumulation)
            for _ in range(3):
                for part in images.chunk(accumulation):
                    backward_and_step(engine, engine(part).square().mean())
            weights.append(module.weight.detach().clone())
        print(json.dumps(dict(two=(weights[0] - weights[1]).abs().max().item(),
                              four=(weights[0] - weights[2]).abs().max().item())))
    """)
    assert found["two"] < 1e-6
    assert found["four"] < 1e-6


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_fp16_takes_steps_of_the_size_of_autograds(stage: int, accumulation: int) -> None:
    found = in_a_fresh_process(f"""
        images = torch.randn(4, 3, 8, 8)
        ours, reference = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3)
        reference.load_state_dict(ours.state_dict())
        begun = ours.weight.detach().clone()
        fp16 = {{"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1}}
        engine = engine_for(ours, zero_optimization={{"stage": {stage}}}, gradient_clipping=0.05,
                            gradient_accumulation_steps={accumulation},
                            optimizer={{"type": "SGD", "params": {{"lr": 1.0}}}}, fp16=fp16)
        optimizer = torch.optim.SGD(reference.parameters(), lr=1.0)
        scales, norms, wanted = [], [], []
        for _ in range(4):
            for part in images.chunk({accumulation}):
                backward_and_step(engine, engine(part.half()).float().square().mean())
            scales.append(float(engine.optimizer.loss_scale))
            norms.append(float(engine.gradient_norm))
            reference(images).square().mean().backward()
            wanted.append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)))
            optimizer.step()
            optimizer.zero_grad()
        moved, reference_moved = ours.weight.float() - begun, reference.weight - begun
        error = (moved - reference_moved).norm() / reference_moved.norm()
        print(json.dumps(dict(error=error.item(), scales=scales,
                              norms=[norm / want for norm, want in zip(norms, wanted)])))
    """)
    assert found["scales"][-1] > found["scales"][0] >= 256, (
        "the test needs a scale that grows meanwhile"
    )
    assert found["error"] < 0.01
    assert found["norms"] == pytest.approx([1] * 4, rel=0.01)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_fp16_halves_the_scale_where_a_gradient_overflows(stage: int) -> None:
    found = in_a_fresh_process(f"""
        engine = engine_for(torch.nn.Conv2d(3, 4, 3), zero_optimization={{"stage": {stage}}},
                            fp16={{"enabled": True, "initial_scale_power": 24, "hysteresis": 1}})
        images, scales = torch.randn(4, 3, 8, 8).half(), []
        for _ in range(12):
            backward_and_step(engine, engine(images).float().square().mean() * 1000)
            scales.append(float(engine.optimizer.loss_scale))
        print(json.dumps(dict(scales=scales, skipped=engine.skipped_steps)))
    """)
    assert found["skipped"] > 3, "2^24 is too large a scale for FP16"
    assert found["scales"][-1] == 2.0 ** (24 - found["skipped"])


def test_one_step_is_what_torch_alone_does() -> None:
    found = in_a_fresh_process("""
        images = torch.randn(4, 3, 8, 8)
        ours, reference = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3)
        reference.load_state_dict(ours.state_dict())
        engine = engine_for(ours)
        optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01)
        for _ in range(5):
            backward_and_step(engine, engine(images).square().mean())
            reference(images).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print(json.dumps(dict(error=(ours.weight - reference.weight).abs().max().item())))
    """)
    assert found["error"] < 1e-6


def test_fp16_becomes_fp32_without_a_gpu_and_stays_with_one() -> None:
    config = load_ds_config(ROOT / "ds_config.json")
    on_cpu, precision, why = resolve_ds_config(config, world_size=1, total_steps=100, device=CPU)
    assert "fp16" not in on_cpu
    assert precision == "FP32"
    assert "there is no GPU" in why
    on_gpu, precision, why = resolve_ds_config(
        config, world_size=1, total_steps=100, device=torch.device("cuda", 0)
    )
    assert on_gpu["fp16"]["enabled"]
    assert (precision, why) == ("FP16", "")


def test_the_schedule_is_as_long_as_the_run() -> None:
    config = load_ds_config(ROOT / "ds_config.json")
    resolved, *_ = resolve_ds_config(config, world_size=2, total_steps=5000, device=CPU)
    assert resolved["scheduler"]["params"]["total_num_steps"] == 5000
    assert (
        resolved["train_micro_batch_size_per_gpu"],
        resolved["gradient_accumulation_steps"],
    ) == (32, 1)
    short, *_ = resolve_ds_config(config, world_size=1, total_steps=100, device=CPU)
    assert short["scheduler"]["params"]["warmup_num_steps"] == 50
    assert config["scheduler"]["params"]["total_num_steps"] == "auto"  # the argument is unchanged


def test_a_bad_optimizer_is_refused() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    with pytest.raises(UserError, match="did you mean 'AdamW'"):
        build_optimizer({"type": "AdmW"}, parameters)
    with pytest.raises(UserError, match="learning_rate"):
        build_optimizer({"type": "AdamW", "params": {"learning_rate": 1}}, parameters)


def test_the_average_is_the_formula() -> None:
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    ema = ExponentialMovingAverage(network, 0.9)
    expected = network.weight.detach().clone().double()
    for k in range(1, 200):
        with torch.no_grad():
            network.weight.add_(torch.randn_like(network.weight))
        ema.update(network)
        keep = min(0.9, (1 + k) / (10 + k))
        expected = keep * expected + (1 - keep) * network.weight.detach().double()
    torch.testing.assert_close(ema.network.weight.double(), expected, rtol=1e-5, atol=1e-5)
    assert not ema.network.weight.requires_grad
    plain = ExponentialMovingAverage(network, 0)
    with torch.no_grad():
        network.weight.add_(1)
    plain.update(network)
    assert torch.equal(plain.network.weight, network.weight)


def test_a_factor_lowers_the_rate_of_updates_and_nothing_else() -> None:
    """The weights are those of half the rate, and neither the schedule nor the optimizer's state
    has seen it: ExponentialLR derives each rate from the one before."""
    found = in_a_fresh_process("""
        import itertools

        def trained(changes, lr, factors, runtime):
            torch.manual_seed(1)
            module = torch.nn.Conv2d(3, 4, 3, padding=1)
            config = {"train_batch_size": 2, "gradient_clipping": 0.0,
                      "optimizer": {"type": "Adam", "params": {"lr": lr}},
                      "scheduler": {"type": "ExponentialLR", "params": {"gamma": 0.5}}, **changes}
            resolved, *_ = resolve_ds_config(config, world_size=1, total_steps=9,
                                             device=ranks.device)
            engine = build_engine(module, resolved, ranks, runtime)
            generator = torch.Generator().manual_seed(2)
            for factor in factors:
                engine.rate.set(factor)
                images = torch.randn(2, 3, 6, 6, generator=generator)
                images = images.to(next(module.parameters()).dtype)
                backward_and_step(engine, engine(images).float().square().mean())
            weights = torch.cat([weight.detach().float().flatten() for weight in engine.weights])
            return weights, engine.get_lr(), engine.optimizer.param_groups[0]["lr"]

        found = {}
        kinds = {"fp32": {}, "bf16": {"bf16": {"enabled": True}},
                 "zero1": {"zero_optimization": {"stage": 1}}}
        for name, changes in kinds.items():
            lowered = trained(changes, 0.01, [0.5] * 3, "deepspeed")
            half = trained(changes, 0.005, [1.0] * 3, "deepspeed")
            mixed = trained(changes, 0.01, [1.0, 0.5, 1.0], "deepspeed")
            whole = trained(changes, 0.01, [1.0] * 3, "deepspeed")
            found[name] = [(lowered[0] - half[0]).abs().max().item(), lowered[1:] == whole[1:],
                           mixed[1:] == whole[1:], not torch.equal(mixed[0], whole[0])]
        lowered, half = (trained({}, lr, [factor] * 3, "accelerate")
                         for lr, factor in ((0.01, 0.5), (0.005, 1.0)))
        whole = trained({}, 0.01, [1.0] * 3, "accelerate")
        found["accelerate"] = [(lowered[0] - half[0]).abs().max().item(), lowered[1:] == whole[1:],
                               True, True]
        print(json.dumps(found))
    """)
    for name, (distance, *facts) in found.items():
        assert distance < 1e-7, name
        assert all(facts), name
