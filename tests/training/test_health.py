"""The health rule and the turn rule, on made-up updates."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence

import pytest

from pipeline.cli import UserError
from pipeline.config.recipe import Recipe
from pipeline.config.specs import AdaptiveSpec, HealingSpec
from pipeline.training.health import (
    BAD_LOSS_LIMIT,
    BLOCK,
    SKIPPED_LIMIT,
    HealthRule,
    StepFacts,
    TurnChange,
    TurnRule,
    Violation,
)

GUESSING = math.log(2)


def facts(
    steps: int,
    *,
    loss: Callable[[int], float] = lambda step: 0.02,
    norm: Callable[[int], float] = lambda step: 1.0,
    skipped: Callable[[int], bool] = lambda step: False,
    discriminator: Callable[[int], float] | None = None,
    drift: Callable[[int], float] | None = None,
) -> list[StepFacts]:
    """Updates with some noise; every function takes the number of updates done."""
    noise = random.Random(0)
    found = []
    for step in range(1, steps + 1):
        statistics = {"discriminator": discriminator(step)} if discriminator else {}
        statistics |= {"colour_drift_red": drift(step)} if drift else {}
        losses = {"l1": loss(step) * noise.uniform(0.5, 2), "adversarial": -3.0}
        found.append(StepFacts(step, losses, statistics, skipped(step), {"generator": norm(step)}))
    return found


def verdict(
    updates: Sequence[StepFacts], indifferent: float | None = None, **spec: float
) -> Violation | None:
    return HealthRule(HealingSpec(**spec), indifferent, {}).judge(updates)


def rises(at: int, low: float, high: float) -> Callable[[int], float]:
    return lambda step: high if step > at else low


def test_a_run_that_learns_is_healthy() -> None:
    """The loss falls, the norm varies by a factor of 20, single batches and updates are bad."""
    updates = facts(
        2000,
        loss=lambda step: 10 if step % 97 == 0 else 0.2 / (1 + step / 50),
        norm=lambda step: 20 if step % 13 == 0 else 1,
        skipped=lambda step: step % 41 == 0,
        discriminator=lambda step: GUESSING * (0.1 if step % 5 else 4),
        drift=lambda step: 60 if step < 100 else 8 * (-1) ** step,
    )
    assert verdict(updates, GUESSING) is None


def test_an_exploding_loss_is_found_in_two_blocks() -> None:
    found = verdict(facts(400, loss=rises(212, 0.02, 0.2)))
    assert found is not None
    assert (found.first, found.last) == (230 - 3 * BLOCK, 230)
    assert found.reason.startswith("the loss was 0.")
    assert "up to step 230" in found.reason
    assert verdict(facts(400, loss=rises(212, 0.02, 0.2)), loss_rise=30) is None


def test_an_explosion_before_much_is_known_is_found() -> None:
    found = verdict(facts(400, loss=rises(30, 0.02, 0.5)))
    assert found is not None
    assert (found.first, found.last) == (20, 50)


def test_a_loss_below_its_first_value_has_not_exploded() -> None:
    """A dataset learnt by heart: the loss falls to almost nothing and may rise again."""

    def loss(step: int) -> float:
        return 0.02 if step < 60 else 1e-6 if step < 700 else 1e-3

    assert verdict(facts(1000, loss=loss)) is None


def test_a_norm_a_hundred_times_larger_is_found() -> None:
    found = verdict(facts(400, norm=rises(300, 1, 150)))
    assert found is not None
    assert "the generator's gradient norm was 150" in found.reason
    assert verdict(facts(400, norm=rises(300, 1, 60))) is None


def test_streaks_of_bad_losses_and_of_skipped_updates() -> None:
    bad = facts(100, loss=lambda step: math.nan if step > 70 else 0.02)
    found = verdict(bad)
    assert found is not None
    assert found.last == 70 + BAD_LOSS_LIMIT
    found = verdict(facts(200, skipped=lambda step: step > 120))
    assert found is not None
    assert found.last == 120 + SKIPPED_LIMIT
    assert found.first == 120 - BLOCK
    # These end a run even if it does not heal.
    assert verdict(bad, times=0) is not None
    assert verdict(facts(400, loss=rises(212, 0.02, 0.2)), times=0) is None


@pytest.mark.parametrize(
    ("level", "reason"), [(1e-5, "no longer teaches"), (60.0, "the discriminator's loss was")]
)
def test_a_discriminator_that_wins_or_explodes_is_slowed_down(level: float, reason: str) -> None:
    updates = facts(900, discriminator=rises(300, 0.3, level))
    found = verdict(updates, GUESSING)
    assert found is not None
    assert reason in found.reason
    assert found.engines == ("discriminator",)
    assert verdict(updates, None) is None, "a run without one has no such statistic"


def test_a_colour_cast_is_found() -> None:
    found = verdict(facts(400, drift=rises(200, 1, -40)), GUESSING)
    assert found is not None
    assert "mean colour error was -40" in found.reason
    assert verdict(facts(400, drift=rises(200, 40, 60)), GUESSING) is None, "it has only begun"


def test_validations_are_compared_with_those_before() -> None:
    def last_verdict(
        scores: Sequence[float], loss: float, indifferent: float | None = None
    ) -> Violation | None:
        """Validate every 100 updates; `loss` is that of the last 100."""
        rule, found = HealthRule(HealingSpec(), indifferent, {}), None
        end = 100 * (len(scores) - 1)
        updates = facts(end + 100, loss=rises(end, 0.02, loss))
        for i, psnr in enumerate(scores):
            assert found is None
            assert rule.judge(updates[100 * i : 100 * (i + 1)]) is None
            found = rule.judge_validation({"psnr_y": psnr}, 100 * (i + 1), 100 * i)
        return found

    scores = [28.0, 25.5, 27.0, 29.0, 26.1, 23.9]
    found = last_verdict(scores, 0.06)
    assert found is not None
    assert (found.first, found.last) == (500, 600)
    assert "fell to 23.90 dB at step 600, 3.10 dB below" in found.reason
    assert last_verdict(scores, 0.02) is None, "the network fits its data as before"
    assert last_verdict([*scores[:-1], 24.1], 0.06) is None
    assert last_verdict([28, 23], 0.06) is None, "the only one before may have been a lucky one"
    assert last_verdict([28, 21], 0.06) is not None
    assert last_verdict([28, 28, 23], 0.06, GUESSING) is None, "a GAN may lose more"
    assert last_verdict([28, 28, 21], 0.06, GUESSING) is not None
    assert last_verdict([28, math.nan], 0.02) is not None


@pytest.mark.parametrize("seed", range(20))
def test_stops_do_not_change_the_verdict(seed: int) -> None:
    """The updates may arrive in any portions, with what the rule remembers through JSON between."""
    draw = random.Random(seed)
    start = draw.randrange(60, 350)
    kinds = {
        "loss": rises(start, 0.02, 0.4),
        "norm": rises(start, 1, 400),
        "discriminator": rises(start, 0.3, 1e-6),
    }
    kind = draw.choice(sorted(kinds))
    updates = facts(1200, **{kind: kinds[kind]})
    whole = verdict(updates, GUESSING)
    assert whole is not None
    state: dict = {}
    found, rest = None, updates
    while found is None and rest:
        rule = HealthRule(HealingSpec(), GUESSING, json.loads(json.dumps(state)))
        size = draw.randrange(1, 90)
        found, rest, state = rule.judge(rest[:size]), rest[size:], rule.state
        state = rule.state
    assert found == whole


def test_the_recipe_accepts_a_switch() -> None:
    base = {"name": "x", "scale": 2, "generator": "vapsr", "steps": 1}
    assert not Recipe(**base, healing="off").healing.is_on
    assert not Recipe(**base, healing=False).healing.is_on
    assert Recipe(**base, healing=True).healing == Recipe(**base).healing
    assert Recipe(**base, healing={"window": 50}).healing.window == 50


def turns(losses: Sequence[float | None]) -> list[StepFacts]:
    """Updates with these losses of the discriminator; None where it had no turn."""
    return [
        StepFacts(step, {}, {} if loss is None else {"discriminator": loss}, False, {})
        for step, loss in enumerate(losses, 1)
    ]


def changes(rule: TurnRule, updates: Sequence[StepFacts], every: int) -> list[TurnChange]:
    """Judge as the training loop does: at each decision, and now and then between two."""
    found = []
    for start in range(0, len(updates), every):
        block = updates[start : start + every]
        middle = len(block) // 3
        found += [rule.judge(block[:middle]), rule.judge(block[middle:])]
    return [change for change in found if change is not None]


def test_a_discriminator_that_wins_skips_its_turns_until_it_does_not() -> None:
    """20 % of the loss of guessing, then between the limits, then above both, then between."""
    shares = [0.9, 0.2, 0.3, 0.39, 0.5, 0.3, 0.26, 0.1]
    spread = [factor for _ in range(10) for factor in (0.5, 1.5)]  # single losses do not count
    losses = [share * factor * GUESSING for share in shares for factor in spread]
    found = changes(TurnRule(AdaptiveSpec(), GUESSING, {}), turns(losses), 20)
    assert [(change.step, change.skips) for change in found] == [
        (40, True),
        (100, False),
        (160, True),
    ]
    assert [change.share for change in found] == pytest.approx([0.2, 0.5, 0.1])
    assert [change.loss for change in found] == pytest.approx(
        [share * GUESSING for share in (0.2, 0.5, 0.1)]
    )


def test_updates_without_a_turn_and_losses_that_are_not_finite_decide_nothing() -> None:
    rule = TurnRule(AdaptiveSpec(every=4), 1.0, {})
    assert changes(rule, turns([None] * 8), 4) == []
    assert changes(rule, turns([0.1, math.nan, None, math.inf]), 4) == [
        TurnChange(4, True, 0.1, 0.1)
    ]


def test_the_turn_rule_goes_on_from_a_checkpoint_at_any_step() -> None:
    noise = random.Random(1)
    updates = turns([noise.uniform(0, 1) ** 2 for _ in range(120)])
    spec = AdaptiveSpec(every=5, skip_below=0.3, resume_above=0.35)
    straight = TurnRule(spec, 1.0, {})
    wanted = changes(straight, updates, 5)
    assert len(wanted) > 4
    for stop in range(1, 20):
        rule = TurnRule(spec, 1.0, {})
        found = changes(rule, updates[:stop], 5)
        rule = TurnRule(spec, 1.0, json.loads(json.dumps(rule.state)))
        to_boundary = -stop % 5
        found += [c for c in [rule.judge(updates[stop : stop + to_boundary])] if c]
        found += changes(rule, updates[stop + to_boundary :], 5)
        assert found == wanted, stop
        assert rule.state == straight.state


def test_a_loss_that_is_nothing_when_guessing_has_no_share() -> None:
    with pytest.raises(
        UserError, match=r"adversarial\.adaptive .* is 0 for this adversarial\.loss"
    ):
        TurnRule(AdaptiveSpec(), 0.0, {})
