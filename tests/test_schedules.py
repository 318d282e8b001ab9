"""Learning rate schedules: torch's own, behind a warm-up, kept over a stop."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from pipeline.cli import UserError
from pipeline.schedules import SCHEDULES, build_schedule, check_schedule
from test_engine import in_a_fresh_process

PARAMS: dict[str, dict[str, Any]] = {
    "MultiStepLR": {"milestones": [3, 7, 11], "gamma": 0.5}, "StepLR": {"step_size": 4, "gamma": 0.3},
    "ExponentialLR": {"gamma": 0.9}, "PolynomialLR": {"total_iters": 12, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 15, "eta_min": 0.01}, "CosineAnnealingWarmRestarts": {"T_0": 4, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 3}, "ConstantLR": {}, "ReduceLROnPlateau": {},
}


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.1)


def schedule(name: str, **more: Any) -> Any:
    return build_schedule({"type": name, "params": {**PARAMS[name], **more}}, optimizer())


def rates(of: Any, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(of.get_last_lr()[0])
        of.inner.optimizer.step()
        of.step()
    return found


def test_every_schedule_is_tried_here() -> None:
    assert PARAMS.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("name", sorted(set(PARAMS) - {"ReduceLROnPlateau"}))
@pytest.mark.parametrize("warmup", [0, 5])
def test_rates_are_torchs_behind_the_warmup(name: str, warmup: int) -> None:
    plain = optimizer()
    params = {"CyclicLR": {"cycle_momentum": False}, "ConstantLR": {"factor": 1.0}}.get(name, {})
    reference = getattr(lr_scheduler, name)(plain, **PARAMS[name], **params)
    expected = []
    for step in range(20):
        factor = 0.2 + 0.8 * (step + 1) / warmup if step < warmup else 1.0
        expected.append(plain.param_groups[0]["lr"] * factor)
        plain.step()
        reference.step()
    assert rates(schedule(name, warmup_num_steps=warmup, warmup_min_ratio=0.2), 20) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", sorted(PARAMS))
def test_a_stop_changes_no_rate(name: str) -> None:
    straight = rates(schedule(name, warmup_num_steps=6), 16)
    first = schedule(name, warmup_num_steps=6)
    begun = rates(first, 4)
    buffer = io.BytesIO()
    torch.save({"schedule": first.state_dict(), "optimizer": first.inner.optimizer.state_dict()}, buffer)
    buffer.seek(0)
    kept = torch.load(buffer, weights_only=True)
    second = schedule(name, warmup_num_steps=6)
    second.inner.optimizer.load_state_dict(kept["optimizer"])
    second.load_state_dict(kept["schedule"])
    assert begun + rates(second, 12) == straight


def test_a_plateau_lowers_the_rate_after_its_patience() -> None:
    falling = schedule("ReduceLROnPlateau", patience=1, factor=0.5, threshold=0.0)
    found = []
    for psnr in (30, 31, 31, 31, 31, 32, 32):
        rates(falling, 3)  # steps alone change nothing
        falling.observe(psnr)
        found.append(falling.get_last_lr()[0])
    assert found == [0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]


@pytest.mark.parametrize(("section", "message"), [
    ({"type": "MultiStepLr", "params": {}}, "no schedule 'MultiStepLr'; did you mean 'MultiStepLR'?"),
    ({"type": "StepLR", "params": {"stepsize": 3}}, "StepLR has no parameter 'stepsize'; did you mean 'step_size'?"),
    ({"type": "StepLR", "params": {}}, "schedule StepLR: "),
])
def test_a_wrong_schedule_is_named(section: dict, message: str) -> None:
    def build() -> None:
        check_schedule(section)
        build_schedule(section, optimizer())

    with pytest.raises(UserError) as caught:
        build()
    assert message in str(caught.value)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_follows_it_and_keeps_it(stage: int) -> None:
    found = in_a_fresh_process(f"""
        import tempfile
        from pipeline.engine import load_engine, observe, save_engine
        images = torch.randn(4, 3, 8, 8)
        def build(kind, **params):
            return engine_for(torch.nn.Conv2d(3, 4, 3), zero_optimization={{"stage": {stage}}},
                              scheduler={{"type": kind, "params": params}})
        def steps(engine, count):
            rates = []
            for _ in range(count):
                rates.append(engine.get_lr()[0])
                descend(engine, engine(images).square().mean())
            return rates
        settings = dict(milestones=[4, 6], gamma=0.1, warmup_num_steps=2)
        straight = steps(build("MultiStepLR", **settings), 8)
        first, second = build("MultiStepLR", **settings), build("MultiStepLR", **settings)
        begun = steps(first, 5)
        with tempfile.TemporaryDirectory() as folder:
            save_engine(first, folder, "x")
            load_engine(second, folder, "x")
        plateau = build("ReduceLROnPlateau", patience=0, factor=0.5)
        for psnr in (30, 29):
            steps(plateau, 1)
            observe(plateau, psnr)
        auto = build("CosineAnnealingLR", T_max="auto")
        print(json.dumps([straight, begun + steps(second, 3), steps(plateau, 1), steps(auto, 11)[-1]]))
    """)
    straight, resumed, plateau, last = found
    assert straight == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    assert resumed == straight
    assert plateau == [0.005]
    assert last == pytest.approx(0, abs=1e-9)
