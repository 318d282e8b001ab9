"""The number of operations in an update, and of waits for the device, as a GPU would see them,
counted on a CPU."""

from __future__ import annotations

import pytest

from lives import in_a_fresh_process

COUNTING = """
    from torch.utils._python_dispatch import TorchDispatchMode

    FREE = ("empty", "detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "alias",
            "is_same_size", "sym_")

    class Counting(TorchDispatchMode):
        # Operations that a device would run, and those whose result the host looks at.
        def __init__(self):
            super().__init__()
            self.operations, self.looks = 0, 0
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function._schema.name.split("::")[1]
            is_look = name == "_local_scalar_dense"
            self.looks += is_look
            self.operations += not (function.is_view or name.startswith(FREE) or is_look)
            return function(*args, **(kwargs or {}))
"""

ONE_UPDATE = """
    from deepspeed.accelerator import get_accelerator
    from pipeline.data.loader import Batch
    from pipeline.losses import Criterion
    from pipeline.models import build_generator
    from pipeline.models.ema import ExponentialMovingAverage
    from pipeline.training.trainers import ReconstructionTrainer

    waits = []
    type(get_accelerator()).synchronize = lambda self, *_: waits.append(1)
    for name in ("cpu", "numpy", "tolist"):
        setattr(torch.Tensor, name, lambda self, *_, kind=name: waits.append(kind))
    network = build_generator({name!r}, 4, **{params!r})
    ema = ExponentialMovingAverage(network, 0.999)
    engine = engine_for(network, train_batch_size=1, zero_optimization={{"stage": {stage}}},
                        **{changes!r})
    trainer = ReconstructionTrainer(engine, Criterion({{"l1": 1.0}}, ranks.device), ema)
    lr = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    hr = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(hr=hr, lr=lr, index=0, skipped=[])
    trainer.step(batch, 0)
    waits.clear()
    with Counting() as counting:
        trainer.step(batch, 1)
    print(json.dumps(dict(operations=counting.operations, looks=counting.looks, waits=waits)))
"""

FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
BF16 = {"bf16": {"enabled": True}}
CPU_ONLY = 250
"""Casts around the layer norms and dilated convolutions that a CPU, unlike a GPU, computes in FP32
for BF16."""


@pytest.mark.parametrize(
    ("name", "changes", "most", "looks"),
    [
        ("vapsr", FP16, 600, 1),
        ("vapsr", BF16, 600 + CPU_ONLY, 1),
        ("vapsr", {}, 600, 0),
        ("rrdbnet", FP16, 2400, 1),
    ],
    ids=["vapsr-fp16", "vapsr-bf16", "vapsr-fp32", "rrdbnet-fp16"],
)
def test_an_update_is_few_operations_and_waits_once(
    name: str, changes: dict, most: int, looks: int
) -> None:
    """With the published sizes. After a wait, the GPU is idle until the host launches more work."""
    code = COUNTING + ONE_UPDATE.format(name=name, params={}, stage=0, changes=changes)
    found = in_a_fresh_process(code)
    assert found["waits"] == []
    assert found["looks"] == looks
    assert 100 < found["operations"] <= most


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_no_step_waits_for_the_whole_device(stage: int, accumulation: int) -> None:
    """DeepSpeed does so twice per micro-batch, to measure its own speed."""
    found = in_a_fresh_process(f"""
        from deepspeed.accelerator import get_accelerator

        waits = []
        type(get_accelerator()).synchronize = lambda self, *_: waits.append(1)
        engine = engine_for(torch.nn.Conv2d(3, 4, 3), gradient_accumulation_steps={accumulation},
                            zero_optimization={{"stage": {stage}}})
        waits.clear()
        for _ in range(3 * {accumulation}):
            backward_and_step(engine, engine(torch.randn(4, 3, 8, 8)).square().mean())
        print(json.dumps(dict(waits=len(waits))))
    """)
    assert found["waits"] == 0


@pytest.mark.parametrize("clipping", [0.0, 0.1])
@pytest.mark.parametrize(("changes", "power"), [("fp16", 30), ("fp16", 8), ("bf16", 0)])
def test_the_update_is_deepspeeds_own(changes: str, power: int, clipping: float) -> None:
    """Over 50 updates, some with overflows: the same ones are skipped, at the same loss scales, and
    the weights are the same.

    Starting at 2^30, the scale comes down by many overflows. Without clipping, the weights are
    bit-equal. With clipping, the gradient is scaled by the norm, which is summed in another order.
    """
    found = in_a_fresh_process(f"""
        from pipeline.engine import deepspeed_engine

        torch.set_num_threads(1)
        lives = []
        own = deepspeed_engine.ForeachUpdate
        for is_ours in (True, False):
            deepspeed_engine.ForeachUpdate = own if is_ours else lambda optimizer: optimizer.step
            torch.manual_seed(3)
            network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.PReLU(),
                                          torch.nn.Conv2d(8, 3, 3, padding=1))
            scaling = {{"initial_scale_power": {power}, "loss_scale_window": 7, "hysteresis": 1}}
            section = {{"enabled": True}} | (scaling if {changes!r} == "fp16" else {{}})
            engine = engine_for(network, gradient_clipping={clipping}, **{{{changes!r}: section}})
            dtype, scales, skips, norms = next(network.parameters()).dtype, [], [], []
            for number in range(50):
                generator = torch.Generator().manual_seed(number)
                images = torch.randn(4, 3, 8, 8, generator=generator).to(dtype)
                factor = float("inf") if number == 20 else 3e4 if number == 30 else 1.0
                backward_and_step(engine, (engine(images).float() - 1).square().mean() * factor)
                scales.append(engine.loss_scale)
                skips.append(bool(engine.was_skipped))
                norms.append(float(engine.gradient_norm))
            masters = torch.cat(
                [p.flatten() for group in engine.optimizer.fp32_groups for p in group]
            )
            halves = torch.cat([p.detach().float().flatten() for p in network.parameters()])
            lives.append((scales, skips, norms, masters.detach(), halves))
        ours, theirs = lives
        distance = ((ours[3] - theirs[3]).norm() / theirs[3].norm()).item()
        print(json.dumps(dict(scales=ours[0] == theirs[0], skips=ours[1] == theirs[1],
                              skipped=sum(ours[1]), distance=distance,
                              halves=(ours[4] - ours[3]).abs().max().item(),
                              norms=[(a, b) for a, b in zip(ours[2], theirs[2]) if a < 1e30])))
    """)
    assert found["scales"]
    assert found["skips"]
    assert found["skipped"] >= {30: 8, 8: 1, 0: 1}[power]
    assert found["distance"] == 0 if clipping == 0 else found["distance"] < 5e-3
    assert found["halves"] < 0.01, "the network's weights must be the rounded masters"
    for ours, theirs in found["norms"]:
        assert ours == pytest.approx(theirs, rel=1e-6 if clipping == 0 else 1e-2)


def test_building_an_engine_makes_no_update() -> None:
    """In 16 bits with ZeRO 0, DeepSpeed steps with gradients of zero at first: it would decay the
    weights, and the bias corrections would take the first real update for the second."""
    found = in_a_fresh_process("""
        network = torch.nn.Conv2d(3, 4, 3)
        begun = network.weight.detach().bfloat16()
        optimizer = {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.5}}
        engine = engine_for(network, bf16={"enabled": True}, optimizer=optimizer)
        same = torch.equal(engine.weights[0], begun.float())
        backward_and_step(engine, engine(torch.randn(4, 3, 8, 8).bfloat16()).float().mean())
        steps = [float(state["step"]) for state in engine.optimizer.optimizer.state.values()]
        moved = (engine.weights[0] - 0.95 * begun.float()).abs().mean().item()
        print(json.dumps(dict(same=same, steps=steps, moved=moved)))
    """)
    assert found["same"]
    assert found["steps"] == [1.0, 1.0]
    assert found["moved"] == pytest.approx(0.1, rel=0.01), "Adam's first update is the rate"


@pytest.mark.parametrize("stage", [0, 1])
def test_the_average_is_of_the_weights_that_the_optimizer_updates(stage: int) -> None:
    """At a rate so small that 16-bit weights do not change, the FP32 weights move, and the average
    moves with them."""
    found = in_a_fresh_process(f"""
        from pipeline.models.ema import ExponentialMovingAverage

        network = torch.nn.Conv2d(3, 4, 3)
        ema = ExponentialMovingAverage(network, 0.0)
        engine = engine_for(network, zero_optimization={{"stage": {stage}}},
                            bf16={{"enabled": True}},
                            optimizer={{"type": "SGD", "params": {{"lr": 1e-6}}}})
        before = network.weight.detach().clone()
        for _ in range(3):
            output = engine(torch.randn(4, 3, 8, 8).bfloat16())
            backward_and_step(engine, output.float().square().mean())
            ema.update(engine.module, engine.weights)
        weights = [weight.detach() for weight in engine.weights]
        print(json.dumps(dict(halves=torch.equal(before, network.weight),
                              dtype=str(weights[0].dtype),
                              same=torch.equal(ema.network.weight, weights[0].float()),
                              moved=(ema.network.weight - before.float()).abs().max().item())))
    """)
    assert found["halves"]
    assert found["same"]
    assert found["dtype"] == ("torch.float32" if stage == 0 else "torch.bfloat16")
    assert (found["moved"] > 1e-8) == (stage == 0)


def test_a_parameter_without_a_gradient_decays_as_under_several_ranks() -> None:
    """A single rank exchanges nothing, but missing gradients must become zeros, as the exchange
    makes them."""
    found = in_a_fresh_process("""
        class Half(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.idle = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            def forward(self, images):
                return self.used(images)
        network = Half()
        optimizer = {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.5}}
        engine = engine_for(network, optimizer=optimizer)
        before = network.idle.weight.detach().clone()
        backward_and_step(engine, engine(torch.randn(4, 3)).square().mean())
        print(json.dumps(dict(ratio=(network.idle.weight / before).mean().item())))
    """)
    assert found["ratio"] == pytest.approx(1 - 0.1 * 0.5, rel=1e-5)
