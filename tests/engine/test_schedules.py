"""Learning rate schedules: torch's, behind a warm-up, restored after a stop."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from lives import in_a_fresh_process
from pipeline.cli import UserError
from pipeline.config.ds_config import LEFT_TO_DEEPSPEED, SCHEDULES
from pipeline.engine.schedules import DEEPSPEED_WARMUPS, build_schedule, validate_schedule

PARAMS: dict[str, dict[str, Any]] = {
    "MultiStepLR": {"milestones": [3, 7, 11], "gamma": 0.5},
    "StepLR": {"step_size": 4, "gamma": 0.3},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 12, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 15, "eta_min": 0.01},
    "CosineAnnealingWarmRestarts": {"T_0": 4, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 3},
    "ConstantLR": {},
    "ReduceLROnPlateau": {},
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
    assert {*PARAMS, *DEEPSPEED_WARMUPS, *LEFT_TO_DEEPSPEED} == SCHEDULES.keys()


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
    assert rates(
        schedule(name, warmup_num_steps=warmup, warmup_min_ratio=0.2), 20
    ) == pytest.approx(expected, rel=1e-9)


def put_back(schedule: Any, saved: Any, optimizer_first: bool) -> None:
    buffer = io.BytesIO()
    torch.save(
        {"schedule": saved.state_dict(), "optimizer": saved.inner.optimizer.state_dict()}, buffer
    )
    buffer.seek(0)
    kept = torch.load(buffer, weights_only=True)
    if optimizer_first:
        schedule.inner.optimizer.load_state_dict(kept["optimizer"])
    schedule.load_state_dict(kept["schedule"])
    if not optimizer_first:
        schedule.inner.optimizer.load_state_dict(kept["optimizer"])


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("name", sorted(PARAMS))
def test_a_stop_changes_no_rate(name: str, optimizer_first: bool) -> None:
    straight = rates(schedule(name, warmup_num_steps=6), 16)
    first = schedule(name, warmup_num_steps=6)
    begun = rates(first, 4)
    second = schedule(name, warmup_num_steps=6)
    put_back(second, first, optimizer_first)
    assert begun + rates(second, 12) == straight


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("CosineAnnealingLR", "T_max"),
        ("PolynomialLR", "total_iters"),
        ("ConstantLR", "total_iters"),
    ],
)
@pytest.mark.parametrize("warmup", [0, 6])
def test_another_length_gives_the_rates_of_a_run_of_that_length(
    name: str, length: str, warmup: int, optimizer_first: bool
) -> None:
    more = {"factor": 0.5} if name == "ConstantLR" else {}
    first, second, straight = (
        schedule(name, warmup_num_steps=warmup, **{length: steps}, **more) for steps in (4, 10, 10)
    )
    rates(first, 4)
    put_back(second, first, optimizer_first)
    expected = rates(straight, 12)
    assert rates(second, 8) == expected[4:]
    if not warmup and name != "ConstantLR":
        assert expected[4:10] == sorted(expected[4:10], reverse=True)


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "ReduceLROnPlateau"])
def test_the_state_of_an_older_version_is_taken(name: str) -> None:
    """It held all plain attributes of torch's schedule, including parameters."""
    first, second = schedule(name), schedule(name)
    rates(first, 4)
    first.observe(30.0)
    state = first.state_dict()
    old = {
        key: value
        for key, value in first.inner.state_dict().items()
        if isinstance(value, (int, float, str, list))
    }
    second.load_state_dict({**state, "inner": {**old, "T_max": 4, "patience": 99}})
    assert second.state_dict() == state
    assert rates(second, 4) == rates(first, 4)


def test_a_plateau_lowers_the_rate_after_its_patience() -> None:
    falling = schedule("ReduceLROnPlateau", patience=1, factor=0.5, threshold=0.0)
    found = []
    for psnr in (30, 31, 31, 31, 31, 32, 32):
        rates(falling, 3)  # steps by themselves change nothing
        falling.observe(psnr)
        found.append(falling.get_last_lr()[0])
    assert found == [0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"type": "MultiStepLr", "params": {}},
            "no schedule 'MultiStepLr'; did you mean 'MultiStepLR'?",
        ),
        (
            {"type": "StepLR", "params": {"stepsize": 3}},
            "StepLR has no parameter 'stepsize'; did you mean 'step_size'?",
        ),
        ({"type": "StepLR", "params": {}}, "schedule StepLR: "),
        (
            {"type": "StepLR", "params": {"step_size": 0}},
            "StepLR: step_size must be a whole number, 1 or above, not 0",
        ),
        (
            {"type": "StepLR", "params": {"step_size": "x"}},
            "step_size must be a whole number, 1 or above, not 'x'",
        ),
        (
            {"type": "StepLR", "params": {"step_size": 2.5}},
            "step_size must be a whole number, 1 or above, not 2.5",
        ),
        (
            {"type": "StepLR", "params": {"step_size": "auto"}},
            "step_size must be a whole number, 1 or above, not 'auto'",
        ),
        (
            {"type": "StepLR", "params": {"step_size": 4, "gamma": "x"}},
            "gamma must be a number, 0 or above, not 'x'",
        ),
        (
            {"type": "StepLR", "params": {"step_size": 4, "gamma": -1}},
            "gamma must be a number, 0 or above, not -1",
        ),
        (
            {"type": "StepLR", "params": {"step_size": 4, "last_epoch": 3}},
            "StepLR has no parameter 'last_epoch'",
        ),
        (
            {"type": "CosineAnnealingLR", "params": {"T_max": 0}},
            "T_max must be a whole number, 1 or above, not 0",
        ),
        (
            {"type": "CosineAnnealingLR", "params": {"T_max": "abc"}},
            "T_max must be a whole number, 1 or above, not 'abc'",
        ),
        (
            {"type": "CosineAnnealingLR", "params": {"T_max": float("inf")}},
            "T_max must be a whole number",
        ),
        (
            {"type": "PolynomialLR", "params": {"total_iters": True}},
            "total_iters must be a whole number, 1 or above",
        ),
        ({"type": "ExponentialLR", "params": {"gamma": 1e300}}, "schedule ExponentialLR: "),
        (
            {"type": "MultiStepLR", "params": {"milestones": "abc"}},
            "milestones must be a list of whole numbers, 1",
        ),
        ({"type": "MultiStepLR", "params": {"milestones": [1, "x"]}}, "1 or above, not [1, 'x']"),
        (
            {"type": "CyclicLR", "params": {"base_lr": "a", "max_lr": 1}},
            "base_lr must be a number, 0 or above, not 'a'",
        ),
        (
            {"type": "CyclicLR", "params": {"base_lr": 0, "max_lr": 1, "mode": "round"}},
            "CyclicLR: mode is invalid",
        ),
        (
            {"type": "CyclicLR", "params": {"base_lr": 0, "max_lr": 1, "cycle_momentum": "no"}},
            "must be true or false",
        ),
        (
            {"type": "ReduceLROnPlateau", "params": {"patience": "x"}},
            "patience must be a whole number, 0 or above",
        ),
        ({"type": "ReduceLROnPlateau", "params": {"mode": 3}}, "mode must be a string, not 3"),
        (
            {"type": "ReduceLROnPlateau", "params": {"warmup_num_steps": "x"}},
            "warmup_num_steps must be a whole number",
        ),
    ],
)
def test_a_wrong_schedule_is_named(section: dict, message: str) -> None:
    for find in (validate_schedule, lambda section: build_schedule(section, optimizer())):
        with pytest.raises(UserError) as caught:
            find(section)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(PARAMS))
def test_a_right_schedule_is_let_through(name: str) -> None:
    # as YAML reads 1e3
    validate_schedule({"type": name, "params": {**PARAMS[name], "warmup_num_steps": 1e3}})
    for key in {"T_max", "total_iters"} & PARAMS[name].keys():
        section = {"type": name, "params": {**PARAMS[name], key: "auto"}}
        validate_schedule(section)
        assert section["params"][key] == "auto"
        with pytest.raises(UserError, match="not 'auto'"):  # the length of the run is unknown
            build_schedule(section, optimizer())


def test_deepspeeds_own_are_left_to_it() -> None:
    validate_schedule(
        {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": "DeepSpeed will see"}}
    )


def test_a_length_that_is_not_known_yet_is_let_through() -> None:
    validate_schedule({"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"}})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_follows_it_keeps_it_and_stretches_it(stage: int) -> None:
    found = in_a_fresh_process(f"""
        import os, tempfile
        from pipeline.engine.engine import observe
        from pipeline.checkpoint.engine_state import capture_engine, load_engine
        from pipeline.checkpoint.snapshot import HostMemory, Snapshot
        def save(engine, folder):
            snapshot = Snapshot(HostMemory())
            files = capture_engine(engine, "x", snapshot)
            snapshot.copy()
            os.mkdir(f"{{folder}}/x")
            for path, state in files.items():
                torch.save(state.thaw(), f"{{folder}}/{{path}}")
        images = torch.randn(4, 3, 8, 8)
        def build(kind, **params):
            return engine_for(torch.nn.Conv2d(3, 4, 3), zero_optimization={{"stage": {stage}}},
                              scheduler={{"type": kind, "params": params}})
        def steps(engine, count):
            rates = []
            for _ in range(count):
                rates.append(engine.get_lr()[0])
                backward_and_step(engine, engine(images).square().mean())
            return rates
        settings = dict(milestones=[4, 6], gamma=0.1, warmup_num_steps=2)
        straight = steps(build("MultiStepLR", **settings), 8)
        first, second = build("MultiStepLR", **settings), build("MultiStepLR", **settings)
        begun = steps(first, 5)
        with tempfile.TemporaryDirectory() as folder:
            save(first, folder)
            load_engine(second, folder, "x")
        plateau = build("ReduceLROnPlateau", patience=0, factor=0.5)
        for psnr in (30, 29):
            steps(plateau, 1)
            observe(plateau, psnr)
        auto = build("CosineAnnealingLR", T_max="auto")
        short = build("CosineAnnealingLR", T_max=4)
        longer = build("CosineAnnealingLR", T_max="auto")
        steps(short, 4)
        with tempfile.TemporaryDirectory() as folder:
            save(short, folder)
            load_engine(longer, folder, "x")
        of_auto = steps(auto, 11)
        print(json.dumps([straight, begun + steps(second, 3), steps(plateau, 1), of_auto,
                          steps(longer, 7)]))
    """)
    straight, resumed, plateau, of_auto, stretched = found
    assert straight == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    assert resumed == straight
    assert plateau == [0.005]
    assert of_auto[-1] == pytest.approx(0, abs=1e-9)
    assert stretched == of_auto[4:]
