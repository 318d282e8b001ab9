"""Rules that judge a run by what its updates showed.

The health rule decides whether a run has diverged, also from its validations. It looks at blocks of
10 updates and compares the median of each with those of earlier blocks, so a single bad batch is no
alarm. The turn rule decides whether the discriminator skips its turns.

All ranks apply a rule to the same numbers and reach the same verdict: the health rule at any time
after the updates, so that no step waits for it, the turn rule at fixed intervals. What the rules
remember is part of a checkpoint, so a continued run judges as one that was never stopped. Imports
no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.cli import UserError
from pipeline.config.specs import AdaptiveSpec, HealingSpec

BLOCK = 10  # updates
NUM_BLOCKS = 10  # that a block is compared with
FEWEST_BLOCKS = 5
"""With fewer, the usual value is not known yet, and twice the first one takes its place."""
BAD_LOSS_LIMIT = 10
"""Consecutive updates with a non-finite loss on some rank after which a run has diverged."""
SKIPPED_LIMIT = 50
"""Consecutive skipped updates, likewise: more than FP16 ever needs to find its loss scale."""
NORM_RISE = 100.0  # factor over earlier blocks: gradients vary far more than losses
DRIFT_LIMIT = 32.0  # levels of 0..255 by which a colour of the whole image is off
DRIFT_USUAL = 10.0  # a run whose colours were further off than this has only begun to learn
SATURATED_SHARE = 0.002  # of the discriminator's loss when it cannot tell real from fake
EXPLODED_FACTOR = 50.0  # of that loss
NUM_VALIDATIONS = 5  # that a validation is compared with
CONFIRMING_RISE = 1.5  # of the loss, for a drop of PSNR to be a divergence
BOTH = ("generator", "discriminator")  # engines to slow down
GAN_DROP_FACTOR = 2.0  # a GAN gives up some PSNR for sharpness


@dataclass(frozen=True)
class StepFacts:
    """What one update showed; the same on all ranks."""

    step: int  # number of updates done after it
    # The generator's terms, weighted; means over micro-batches and ranks. Empty if it did not
    # learn. Not finite if one on any rank was not.
    losses: dict[str, float]
    statistics: dict[str, float]  # likewise
    was_skipped: bool  # because a gradient was not finite
    norms: dict[str, float]  # of the gradients of the engines that learned, by engine


@dataclass(frozen=True)
class Violation:
    """What was wrong, and the updates in which it showed."""

    reason: str
    first: int  # steps: number of updates done before the first one that is suspected
    last: int  # and after the last
    engines: tuple[str, ...]  # whose learning rate should be lower


class HealthRule:
    """Judges the updates of a run, in order, and its validations.

    `indifferent`: the discriminator's loss when it cannot tell real from fake, None without one.
    `state`: what an earlier rule of the run remembered, see `state`.
    """

    def __init__(
        self, spec: HealingSpec, indifferent: float | None, state: Mapping[str, Any]
    ) -> None:
        self._spec, self._indifferent = spec, indifferent
        self._block: list[dict[str, float]] = [dict(values) for values in state.get("block", ())]
        self._medians: dict[str, list[float]] = {
            key: list(values) for key, values in state.get("medians", {}).items()
        }
        self._initial: dict[str, float] = dict(state.get("initial", {}))
        self._runs: dict[str, int] = dict(state.get("runs", {}))
        # PSNR-Y of the last validations, and the loss of the last block before each.
        self._validations: list[list[float]] = [list(pair) for pair in state.get("validations", ())]
        self._loss: float | None = state.get("loss")  # of the last block

    @property
    def state(self) -> dict[str, Any]:
        """Return what the rule remembers, as plain values that JSON keeps exactly."""
        return {
            "block": [dict(values) for values in self._block],
            "medians": {key: list(values) for key, values in self._medians.items()},
            "initial": dict(self._initial),
            "runs": dict(self._runs),
            "validations": [list(pair) for pair in self._validations],
            "loss": self._loss,
        }

    def judge(self, facts: Sequence[StepFacts]) -> Violation | None:
        """Take note of the next updates; return the first violation, None if there is none."""
        for fact in facts:
            found = self._judge_step(fact)
            # Blocks end at multiples of their length, so that a continued run has the same ones.
            if found is None and self._spec.is_on and fact.step % BLOCK == 0:
                found = self._judge_block(fact.step)
            if found is not None:
                return found
        return None

    def judge_validation(
        self, scores: Mapping[str, float], step: int, before: int | None
    ) -> Violation | None:
        """Take note of a validation at `step`; return a violation if PSNR fell far.

        The loss must have risen as well: a network that fits a small dataset ever better may do
        worse on other images, which going back would not change. `before`: step of the validation
        before it.
        """
        psnr, earlier = scores["psnr_y"], self._validations
        if self._spec.is_on and not math.isfinite(psnr):
            return Violation(
                f"PSNR-Y was {psnr:.2f} dB at step {step}",
                before or 0,
                step,
                BOTH,
            )
        if self._loss is None:  # no block has ended yet
            return None
        self._validations = [*earlier, [psnr, self._loss]][-NUM_VALIDATIONS:]
        if not self._spec.is_on or not earlier:
            return None
        usual, loss = (statistics.median(column) for column in zip(*earlier, strict=True))
        drop = self._spec.psnr_drop * (1 if self._indifferent is None else GAN_DROP_FACTOR)
        drop *= 1 if len(earlier) > 1 else 2  # a single validation may have been a lucky one
        if psnr >= usual - drop or self._loss <= CONFIRMING_RISE * loss:
            return None
        return Violation(
            f"PSNR-Y fell to {psnr:.2f} dB at step {step}, {usual - psnr:.2f} dB below that of "
            f"the validations before, and the loss rose to {self._loss:.4g} from {loss:.4g}",
            before or 0,
            step,
            BOTH,
        )

    def _judge_step(self, fact: StepFacts) -> Violation | None:
        """Count non-finite losses and skipped updates; add the others to the block."""
        values = {**fact.losses, **fact.statistics}
        is_finite = all(math.isfinite(value) for value in values.values())
        for key, is_bad, limit, text in (
            ("bad_loss", not is_finite, BAD_LOSS_LIMIT, "the loss was not finite in"),
            (
                "skipped",
                fact.was_skipped,
                SKIPPED_LIMIT,
                "a gradient was not finite, so that it was skipped, in",
            ),
        ):
            if self._in_a_row(key, is_bad) >= limit:
                return Violation(
                    f"{text} each of {limit} updates up to step {fact.step}",
                    max(0, fact.step - limit - BLOCK),
                    fact.step,
                    BOTH,
                )
        if is_finite and not fact.was_skipped:
            # Without the adversarial term, which may be below 0 and falls as the generator learns.
            pixel = sum(value for name, value in fact.losses.items() if name != "adversarial")
            seen = {"loss": pixel} if fact.losses else {}
            if math.isfinite(fact.norms.get("generator", math.nan)):
                seen["norm"] = fact.norms["generator"]
            if "discriminator" in fact.statistics:
                seen["discriminator"] = fact.statistics["discriminator"]
            drifts = [
                value for name, value in fact.statistics.items() if name.startswith("colour_drift")
            ]
            # Of three channels, the one furthest off, with its sign: drifts that cancel out over
            # a block are no drift.
            if drifts:
                seen["drift"] = max(drifts, key=abs)
            self._block.append(seen)
        return None

    def _judge_block(self, step: int) -> Violation | None:
        block, self._block = self._block, []
        medians = {
            key: statistics.median(values[key] for values in block if key in values)
            for key in sorted({key for values in block for key in values})
        }
        self._loss = medians.get("loss", self._loss)
        for key, rise, text in (
            ("loss", self._spec.loss_rise, "the loss"),
            ("norm", NORM_RISE, "the generator's gradient norm"),
        ):
            if key not in medians:
                continue
            value, earlier = medians[key], self._medians.get(key, [])
            first = self._initial.get(key, math.inf)
            usual = statistics.median(earlier) if len(earlier) >= FEWEST_BLOCKS else 2 * first
            # Also above its first value: the loss of a network that has learnt a small dataset by
            # heart may rise by any factor without harm.
            is_bad = value > rise * usual and value > first
            if found := self._explosion(key, is_bad, 2, step, text, value, usual):
                return found
        if "drift" in medians:
            value = medians["drift"]
            earlier = [abs(drift) for drift in self._medians.get("drift", [])]
            usual = statistics.median(earlier) if len(earlier) >= FEWEST_BLOCKS else math.inf
            is_bad = usual < DRIFT_USUAL and abs(value) > DRIFT_LIMIT
            text = "the mean colour error"
            if found := self._explosion("drift", is_bad, 3, step, text, value, usual):
                return found
        if "discriminator" in medians and self._indifferent:
            value, usual = medians["discriminator"], self._indifferent
            is_bad, text = value > EXPLODED_FACTOR * usual, "the discriminator's loss"
            if found := self._explosion("discriminator", is_bad, 3, step, text, value, usual):
                return replace(found, engines=("discriminator",))
            # A discriminator that is always right teaches the generator nothing.
            blocks = -(-self._spec.saturation // BLOCK)
            if self._in_a_row("saturated", value < SATURATED_SHARE * usual) >= blocks:
                return Violation(
                    f"the discriminator's loss was below {SATURATED_SHARE:.1%} of that of guessing "
                    f"for {blocks * BLOCK} updates up to step {step}: it no longer teaches the "
                    "generator",
                    max(0, step - (blocks + 1) * BLOCK),
                    step,
                    ("discriminator",),
                )
        # Bad blocks are not remembered, or an exploded loss would soon be the usual one.
        for key, value in medians.items():
            if not self._runs.get(key):
                self._initial.setdefault(key, value)
                self._medians[key] = [*self._medians.get(key, []), value][-NUM_BLOCKS:]
        return None

    def _in_a_row(self, key: str, is_bad: bool) -> int:
        """Count one more; return how many in a row were bad."""
        self._runs[key] = (self._runs.get(key, 0) + 1) * is_bad
        return self._runs[key]

    def _explosion(
        self, key: str, is_bad: bool, most: int, step: int, text: str, value: float, usual: float
    ) -> Violation | None:
        """Count bad blocks in a row; return a violation if they are `most`."""
        if self._in_a_row(key, is_bad) < most:
            return None
        return Violation(
            f"{text} was {value:.4g} in the updates up to step {step}, after {usual:.4g} before",
            # The cause comes before its effect, so one block more.
            max(0, step - (most + 1) * BLOCK),
            step,
            BOTH,
        )


@dataclass(frozen=True)
class TurnChange:
    """The discriminator begins to skip its turns, or takes them again."""

    step: int  # number of updates done before it
    skips: bool
    loss: float  # of the discriminator, averaged over the updates that decided
    share: float  # of the loss of guessing


class TurnRule:
    """Decides whether the discriminator skips its turns, because it is winning.

    Wu et al. 2016 (3D-GAN) skip the update of a discriminator that was right about more than 80 %
    of a batch. Here its loss counts, which means the same for every adversarial loss as a share of
    the loss of guessing, averaged over `every` updates, with two limits so that it does not change
    its mind at each decision. The loss is also measured in turns that are skipped.

    `indifferent`: the discriminator's loss when it cannot tell real from fake.
    `state`: what an earlier rule of the run remembered, see `state`.
    """

    def __init__(self, spec: AdaptiveSpec, indifferent: float, state: Mapping[str, Any]) -> None:
        if indifferent <= 0:
            raise UserError(
                "adversarial.adaptive compares the discriminator's loss with that of guessing, "
                f"which is {indifferent:g} for this adversarial.loss; choose a loss for which it "
                "is above 0, or omit adaptive"
            )
        self._spec, self._indifferent = spec, indifferent
        self._losses: list[float] = list(state.get("losses", ()))
        self.skips: bool = state.get("skips", False)

    @property
    def state(self) -> dict[str, Any]:
        """Return what the rule remembers, as plain values that JSON keeps exactly."""
        return {"losses": list(self._losses), "skips": self.skips}

    def is_due(self, step: int) -> bool:
        """Whether the rule decides after `step` updates, and must know what they showed."""
        return step % self._spec.every == 0

    def judge(self, facts: Sequence[StepFacts]) -> TurnChange | None:
        """Take note of the next updates, up to the next decision at most; return a change."""
        for fact in facts:
            loss = fact.statistics.get("discriminator", math.nan)
            if math.isfinite(loss):
                self._losses.append(loss)
        if not facts or not self.is_due(facts[-1].step) or not self._losses:
            return None
        loss, self._losses = statistics.fmean(self._losses), []
        share, before = loss / self._indifferent, self.skips
        self.skips = share < (self._spec.resume_above if before else self._spec.skip_below)
        if self.skips == before:
            return None
        return TurnChange(facts[-1].step, self.skips, loss, share)
