"""Adversarial training: where gradients flow at every ZeRO stage, and what the recipe's keys do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from comparison import checkpoint_differences, logged
from conftest import ROOT
from lives import in_a_fresh_process, train
from pipeline.checkpoint.engine_state import read_module
from pipeline.checkpoint.progress import read_progress
from pipeline.cli import UserError
from pipeline.config.recipe import load_recipe
from pipeline.config.specs import AdaptiveSpec, AdversarialSpec, LabelsSpec
from pipeline.losses.adversarial import (
    ADVERSARIAL_LOSSES,
    AdversarialLoss,
    discriminator_loss,
    draw_labels,
)
from pipeline.run_folder import checkpoint_dir

KINDS = tuple(ADVERSARIAL_LOSSES)
TRAINER = """
    import copy
    from pipeline.config.specs import AdversarialSpec
    from pipeline.data.loader import Batch
    from pipeline.models.ema import ExponentialMovingAverage
    from pipeline.losses import Criterion
    from pipeline.losses.adversarial import (ADVERSARIAL_LOSSES, AdversarialLoss,
                                             discriminator_loss, draw_labels)
    # A loss that is added: this row, and two functions of logits.
    ADVERSARIAL_LOSSES["added"] = AdversarialLoss(
        lambda fake, real: (real.mean() - fake).abs().mean(),
        lambda real, fake, labels: (fake - real).tanh().mean(),
        takes_labels=False, sees_real=True, compares_samples=False)
    from pipeline.models.discriminators import build_discriminator
    from pipeline.training.trainers import AdversarialTrainer

    class Generator(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up = torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.PixelShuffle(2)
        def forward(self, x):
            return self.up(self.conv(x.float() / 255))

    def trainer_for(spec, stage=0, accumulation=1, weights={"l1": 1.0}, name="vgg", **params):
        torch.manual_seed(3)
        generator = Generator()
        params = {"num_features": 4} | ({"norm": "none"} if name == "vgg" else {}) | params
        discriminator = build_discriminator(name, 32, **params)
        twins = copy.deepcopy(generator), copy.deepcopy(discriminator)
        sgd = dict(optimizer={"type": "SGD", "params": {"lr": 1.0}}, gradient_clipping=0.0,
                   gradient_accumulation_steps=accumulation, zero_optimization={"stage": stage},
                   zero_allow_untested_optimizer=True)
        trainer = AdversarialTrainer(engine_for(generator, **sgd), engine_for(discriminator, **sgd),
                                     Criterion(weights),
                                     ExponentialMovingAverage(generator, 0.0), spec)
        return trainer, twins
    def states(module):
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    def moved(module, before):
        return {name: (before[name] - tensor) for name, tensor in module.state_dict().items()}
    def error(one, other):
        return max((one[name] - other[name]).abs().max().item() for name in other)
    lr = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    hr = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
"""


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_each_network_moves_by_its_own_gradient_and_by_nothing_else(stage: int) -> None:
    found = in_a_fresh_process(
        TRAINER
        + f"""
    found = {{}}
    for kind in {(*KINDS, "added")!r}:
        for accumulation in (1, 2):
            spec = AdversarialSpec(weight=0.7, loss=kind, discriminator_every=2)
            trainer, twins = trainer_for(spec, {stage}, accumulation, {{"l1": 0.5}})
            generator, discriminator = twins
            before = states(trainer.generator.module), states(trainer.discriminator.module)
            for part in zip(lr.chunk(accumulation), hr.chunk(accumulation)):
                trainer.step(Batch(*part, 0), 1)  # an update of the generator only
            pieces = list(zip(lr.chunk(accumulation), hr.chunk(accumulation)))
            for small, large in pieces:
                sr, real = generator(small), large / 255
                loss = 0.5 * (sr - real).abs().mean() + 0.7 * ADVERSARIAL_LOSSES[kind].generator(
                    discriminator(sr), discriminator(real).detach())
                grads = torch.autograd.grad(loss / accumulation, generator.parameters())
                for p, g in zip(generator.parameters(), grads):
                    p.grad = g if p.grad is None else p.grad + g
            wanted = {{name: p.grad for name, p in generator.named_parameters()}}
            scale = max(g.abs().max().item() for g in wanted.values())
            still = trainer.discriminator.module
            untouched = all(torch.equal(before[1][n], t) for n, t in still.state_dict().items())
            clean = all(p.grad is None or not p.grad.any() for p in still.parameters())
            off = error(moved(trainer.generator.module, before[0]), wanted)
            middle = states(trainer.generator.module)
            for part in zip(lr.chunk(accumulation), hr.chunk(accumulation)):
                trainer.step(Batch(*part, 0), 2)  # both
            generator.load_state_dict(middle)
            for small, large in pieces:
                fake, real = discriminator(generator(small).detach()), discriminator(large / 255)
                labels = draw_labels(spec.labels, real)
                loss = discriminator_loss(ADVERSARIAL_LOSSES[kind], real, fake, labels)
                (loss / accumulation).backward()
            wanted_d = {{name: p.grad for name, p in discriminator.named_parameters()}}
            off_d = error(moved(trainer.discriminator.module, before[1]), wanted_d)
            found[f"{{kind}} {{accumulation}}"] = [scale, off, untouched and clean, off_d]
    print(json.dumps(found))
    """
    )
    assert len(found) == 2 * (len(KINDS) + 1)
    for case, (scale, off, is_untouched, off_discriminator) in found.items():
        assert scale > 1e-4, case
        assert off < 1e-5, case
        assert is_untouched, case
        assert off_discriminator < 1e-5, case


def test_accumulation_equals_one_large_batch() -> None:
    found = in_a_fresh_process(
        TRAINER
        + """
    weights = []
    for accumulation in (1, 2, 4):
        trainer, _ = trainer_for(AdversarialSpec(weight=0.1), 0, accumulation, {"l1": 1.0})
        for step in range(3):
            for part in zip(lr.chunk(accumulation), hr.chunk(accumulation)):
                trainer.step(Batch(*part, 0), step)
        weights.append((states(trainer.generator.module), states(trainer.discriminator.module)))
    print(json.dumps([error(weights[0][i], weights[k][i]) for k in (1, 2) for i in (0, 1)]))
    """
    )
    assert max(found) < 1e-5


@pytest.mark.parametrize(
    ("every", "updates"), [("discriminator_every", [1, 3]), ("generator_every", [3, 1])]
)
def test_one_network_may_learn_oftener(every: str, updates: list[int]) -> None:
    found = in_a_fresh_process(
        TRAINER
        + f"""
    trainer, _ = trainer_for(AdversarialSpec(weight=0.1, {every}=3), 0, 1, {{"l1": 1.0}})
    changes = [0, 0]
    for step in range(3):
        modules = trainer.discriminator.module, trainer.generator.module
        before = [states(module) for module in modules]
        outcome = trainer.step(Batch(lr, hr, 0), step)
        for i in (0, 1):
            after = modules[i].state_dict()
            changes[i] += any(not torch.equal(before[i][n], t) for n, t in after.items())
    print(json.dumps(changes))
    """
    )
    assert found == updates


SCALES = """
    def mean(values):
        return sum(values) / len(values)
    def found_for(name, loss, stage, **params):
        spec = AdversarialSpec(weight=0.7, loss=loss, labels={"flip": 0.3}, adaptive="on")
        trainer, twins = trainer_for(spec, stage, 1, {"l1": 0.5}, name, **params)
        generator, discriminator = twins
        row, module = ADVERSARIAL_LOSSES[loss], trainer.discriminator.module
        before = states(trainer.generator.module), states(module)
        # The generator's part and the discriminator's, by autograd.
        sr = generator(lr)
        with frozen(discriminator):
            pairs = list(zip(discriminator(sr), discriminator(hr / 255)))
        (0.5 * (sr - hr / 255).abs().mean()
         + 0.7 * mean([row.generator(fake, real.detach()) for fake, real in pairs])).backward()
        discriminator.zero_grad()
        torch.manual_seed(5)
        real, fake = discriminator(hr / 255), discriminator(sr.detach())
        flipped = torch.rand(4, 1, 1, 1) < 0.3  # one label per sample, for all scales
        labels = draw_labels(LabelsSpec(), real[0])._replace(flipped=flipped)
        loss = mean([discriminator_loss(row, r, f, labels) for r, f in zip(real, fake)])
        loss.backward()
        # A turn that is skipped, twice, and one that is taken.
        trainer.skips_turns = True
        torch.manual_seed(5)
        skipped = trainer.step(Batch(lr, hr, 0), 0).statistics
        untouched = all(torch.equal(before[1][n], t) for n, t in module.state_dict().items())
        clean = all(p.grad is None or not p.grad.any() for p in module.parameters())
        off = error(moved(trainer.generator.module, before[0]),
                    {n: p.grad for n, p in generator.named_parameters()})
        learners = sorted(trainer.learners(0))
        trainer.generator.module.load_state_dict(before[0])
        trainer.skips_turns = False
        torch.manual_seed(5)
        taken = trainer.step(Batch(lr, hr, 0), 1).statistics
        off_d = error(moved(module, before[1]),
                      {n: p.grad for n, p in discriminator.named_parameters()})
        return dict(
            scales=len(real), untouched=untouched and clean, off=off, off_d=off_d,
            learners=[learners, sorted(trainer.learners(1))], flipped=int(flipped.sum()),
            loss=[loss.item(), skipped["discriminator"].item(), taken["discriminator"].item()],
            real=[mean([r.mean() for r in real]).item(), skipped["d_real"].item()],
            shares=[skipped["d_turns_skipped"].item(), taken["d_turns_skipped"].item()])
"""


@pytest.mark.parametrize("stage", [0, 2])
def test_each_scale_has_its_loss_and_a_turn_that_is_skipped_changes_nothing(stage: int) -> None:
    found = in_a_fresh_process(
        TRAINER.replace("import build_discriminator", "import build_discriminator, frozen").replace(
            "import AdversarialSpec", "import AdversarialSpec, LabelsSpec"
        )
        + SCALES
        + f"""
    print(json.dumps([
        found_for("patch", "relativistic_average", {stage}, num_layers=2),
        found_for("attention_unet", "vanilla", {stage}, num_features=2)]))
    """
    )
    for case in found:
        assert case["scales"] == 2
        assert case["untouched"]
        assert case["learners"] == [["generator"], ["discriminator", "generator"]]
        assert 0 < case["flipped"] < 4
        assert case["off"] < 1e-5
        assert case["off_d"] < 1e-5
        assert case["loss"] == pytest.approx([case["loss"][0]] * 3, rel=1e-4)
        assert case["real"][0] == pytest.approx(case["real"][1], rel=1e-4)
        assert case["shares"] == [1, 0]


def test_a_run_skips_turns_and_goes_on_bit_for_bit(dataset: Path, tmp_path: Path) -> None:
    """The generator begins far from HR and learns slowly: the discriminator wins, and skips turns.

    Two ranks, stopped between two decisions, while turns are skipped.
    """
    config = json.loads((ROOT / "recipes" / "demo_ds_config.json").read_text())
    for name, rate in (("slow", 0.0006), ("fast", 0.01)):
        config["optimizer"]["params"]["lr"] = rate
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    extra = (
        f"ds_config={tmp_path / 'slow.json'}",
        "generator.global_residual=none",
        "validate_every=100",
        "keep=9",
        "adversarial={weight: 0.1, discriminator: {name: patch, num_features: 8, num_layers: 2}, "
        "adaptive: {every: 2, skip_below: 0.9, resume_above: 0.9}, "
        f"ds_config: {tmp_path / 'fast.json'}}}",
    )
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    printed = train(dataset, straight, "steps=12", *extra, procs=2)
    assert "step 6: the discriminator skips its turns from here on: its loss was 0." in printed
    assert "step 10: the discriminator takes its turns again" in printed
    for steps in (7, 12):
        train(dataset, broken, f"steps={steps}", *extra, procs=2)
    skipped = [share for _, share in logged(straight, "train", "d_turns_skipped")]
    assert skipped == [0] * 6 + [1] * 4 + [0] * 2
    assert [line[:2] for line in logged(straight, "turns", "skips")] == [(6, True), (10, False)]
    keys = ("loss", "discriminator", "d_real", "d_fake", "d_turns_skipped", "lr")
    for event, names in (("train", keys), ("turns", ("skips", "loss", "share_of_guessing"))):
        assert logged(straight, event, *names) == logged(broken, event, *names)
    # The stop at step 7 took a validation that the other run did not have.
    assert [d for d in checkpoint_differences(straight, broken, 12) if d != "state.json"] == []
    turns = [read_progress(run, 12).turns for run in (straight, broken)]
    assert turns == [{"losses": [], "skips": False}] * 2
    assert read_progress(broken, 7).turns["skips"]
    assert len(read_progress(broken, 7).turns["losses"]) == 1
    before, within, after = (
        read_module(checkpoint_dir(straight, step), "discriminator") for step in (6, 9, 12)
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in within.items())
    assert not any(torch.equal(within[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_batch_norm_and_half_precision(precision: str) -> None:
    found = in_a_fresh_process(
        TRAINER
        + f"""
    torch.manual_seed(3)
    class Half(Generator):
        def forward(self, x):
            return self.up(self.conv(x.to(self.conv.weight.dtype) / 255))
    half = dict({precision}={{"enabled": True}},
                optimizer={{"type": "AdamW", "params": {{"lr": 1e-3}}}})
    if "{precision}" == "fp16":
        half["fp16"]["initial_scale_power"] = 8
    discriminator = build_discriminator("vgg", 32, num_features=4, norm="batch")
    generator = Half()
    trainer = AdversarialTrainer(engine_for(generator, **half), engine_for(discriminator, **half),
                                 Criterion({{"l1": 1.0}}), ExponentialMovingAverage(generator, 0.9),
                                 AdversarialSpec(weight=0.1))
    before = states(trainer.generator.module), states(trainer.discriminator.module)
    first = trainer.step(Batch(lr, hr, 0), 0)
    for step in range(1, 8):
        last = trainer.step(Batch(lr, hr, 0), step)
    after = states(trainer.generator.module), states(trainer.discriminator.module)
    print(json.dumps(dict(
        moved=[not torch.equal(before[i][n], after[i][n])
               for i in (0, 1) for n in before[i] if "tracked" not in n],
        finite=all(bool(torch.isfinite(t.float()).all()) for a in after for t in a.values()),
        falls=(first.losses["l1"] - last.losses["l1"]).item(),
        learns=(first.statistics["discriminator"] - last.statistics["discriminator"]).item())))
    """
    )
    assert all(found["moved"])
    assert found["finite"]
    assert found["falls"] > 0
    assert found["learns"] > 0


def logits(seed: int, shape: tuple[int, ...] = (6, 1)) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_losses_are_those_of_the_papers() -> None:
    real, fake = logits(1), logits(2)
    r, f = real.double().numpy(), fake.double().numpy()
    plain = draw_labels(LabelsSpec(), real)
    relative, opposite = sigmoid(r - f.mean()), sigmoid(f - r.mean())
    expected = {
        "vanilla": (
            -np.log(sigmoid(f)).mean(),
            (-np.log(sigmoid(r)).mean() - np.log(1 - sigmoid(f)).mean()) / 2,
        ),
        "least_squares": (((f - 1) ** 2).mean(), (((r - 1) ** 2).mean() + (f**2).mean()) / 2),
        "hinge": (-f.mean(), (np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean()) / 2),
        "relativistic_average": (
            (-np.log(opposite).mean() - np.log(1 - relative).mean()) / 2,
            (-np.log(relative).mean() - np.log(1 - opposite).mean()) / 2,
        ),
        "relativistic": (-np.log(sigmoid(f - r)).mean(), -np.log(sigmoid(r - f)).mean()),
    }
    for kind, (generators, discriminators) in expected.items():
        loss = ADVERSARIAL_LOSSES[kind]
        assert loss.generator(fake, real).item() == pytest.approx(generators, rel=1e-5), kind
        assert discriminator_loss(loss, real, fake, plain).item() == pytest.approx(
            discriminators, rel=1e-5
        ), kind
    assert expected.keys() == ADVERSARIAL_LOSSES.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pull_in_the_right_direction(kind: str) -> None:
    real, fake = logits(3).requires_grad_(), logits(4).requires_grad_()
    fake.grad = None
    ADVERSARIAL_LOSSES[kind].generator(fake, real.detach()).backward()
    assert fake.grad is not None
    assert (fake.grad.mean() < 0) or kind == "least_squares"  # descending makes fakes more real
    fake.grad = real.grad = None
    labels = draw_labels(LabelsSpec(), real)
    discriminator_loss(ADVERSARIAL_LOSSES[kind], 0.1 * real, 0.1 * fake, labels).backward()
    assert fake.grad.mean() > 0
    assert real.grad.mean() < 0


def test_labels_are_smoothed_moved_and_flipped_as_said() -> None:
    torch.manual_seed(0)
    many = torch.zeros(20000, 1, 2, 2)
    smooth = draw_labels(LabelsSpec(smoothing=0.1), many)
    assert (smooth.real == 0.9).all()
    assert (smooth.fake == 0).all()
    assert not smooth.flipped.any()
    noisy = draw_labels(LabelsSpec(smoothing=0.1, noise=0.2), many)
    assert noisy.real.shape == (20000, 1, 1, 1)
    assert 0.7 <= noisy.real.min() < 0.701
    assert 0.899 < noisy.real.max() <= 0.9
    assert noisy.real.mean() == pytest.approx(0.8, abs=0.002)
    assert noisy.fake.min() >= 0
    assert noisy.fake.mean() == pytest.approx(0.1, abs=0.002)
    flipped = draw_labels(LabelsSpec(flip=0.05), many).flipped
    assert flipped.float().mean() == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 20000))


def test_a_flipped_sample_counts_as_its_opposite() -> None:
    real, fake = logits(5), logits(6)
    plain = draw_labels(LabelsSpec(), real)
    all_flipped = plain._replace(flipped=torch.ones_like(plain.flipped))
    for loss in ADVERSARIAL_LOSSES.values():
        assert discriminator_loss(loss, real, fake, all_flipped) == discriminator_loss(
            loss, fake, real, plain
        )


def test_a_row_makes_a_loss_known_to_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above also train with it, under the name `added`."""
    with pytest.raises(
        UserError, match="no adversarial loss named 'wasserstein'; choose from hinge"
    ):
        load_recipe("vapsr_x2", {"adversarial": {"weight": 1, "loss": "wasserstein"}})
    row = AdversarialLoss(
        lambda fake, real: -fake.mean(),
        lambda real, fake, labels: fake.mean() - real.mean(),
        takes_labels=False,
        sees_real=False,
        compares_samples=False,
    )
    monkeypatch.setitem(ADVERSARIAL_LOSSES, "wasserstein", row)
    recipe = load_recipe("vapsr_x2", {"adversarial": {"weight": 1, "loss": "wasserstein"}})
    assert recipe.adversarial is not None
    assert recipe.adversarial.loss == "wasserstein"
    with pytest.raises(UserError, match="loss wasserstein has no targets to smooth or move"):
        load_recipe(
            "vapsr_x2",
            {"adversarial": {"weight": 1, "loss": "wasserstein", "labels": {"noise": 0.1}}},
        )


def test_instance_noise_is_gaussian_and_falls_to_nothing() -> None:
    found = in_a_fresh_process(
        TRAINER
        + """
    spec = AdversarialSpec(weight=0.1, instance_noise={"sigma": 0.2, "steps": 10})
    trainer, _ = trainer_for(spec)
    seen = []
    trainer.discriminator.module.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach()))
    gray = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    found = []
    for step in (0, 5, 10, 20):
        seen.clear()
        trainer.step(Batch(lr, gray, 0), step)
        noise = seen[1] - 128 / 255  # the generator's part sees SR, the discriminator's HR first
        z = noise / max(noise.std().item(), 1e-9)
        found.append([len(seen), noise.mean().item(), noise.std().item(), (z**4).mean().item()])
    print(json.dumps(found))
    """
    )
    assert [count for count, *_ in found] == [3, 3, 3, 3]
    for (_, mean, deviation, kurtosis), wanted in zip(found, (0.2, 0.1, 0, 0), strict=True):
        assert mean == pytest.approx(0, abs=0.01)
        assert deviation == pytest.approx(wanted, abs=0.005)
        assert not wanted or kurtosis == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize(
    ("adversarial", "message"),
    [
        ({}, "adversarial.weight: field required"),
        ({"weight": 0}, "adversarial.weight: input should be greater than 0"),
        (
            {"weight": 1, "loss": "hing"},
            "adversarial.loss: no adversarial loss named 'hing'; did you mean 'hinge'?",
        ),
        (
            {"weight": 1, "discriminator": "unett"},
            "no discriminator named 'unett'; did you mean 'unet'?",
        ),
        (
            {"weight": 1, "discriminator": {"name": "vgg", "num_feature": 4}},
            "'num_feature'; did you mean 'num_features'?",
        ),
        (
            {"weight": 1, "loss": "hinge", "labels": {"smoothing": 0.1}},
            "hinge has no targets to smooth",
        ),
        (
            {"weight": 1, "generator_every": 2, "discriminator_every": 2},
            "must be 1, so that every step updates a network",
        ),
        (
            {"weight": 1, "adaptive": "on", "generator_every": 2},
            "generator_every gives it more turns than the generator",
        ),
        (
            {"weight": 1, "adaptive": {"skip_below": 0.6}},
            "skip_below 0.6 is above resume_above 0.4",
        ),
        ({"weight": 1, "adaptive": 3}, "adversarial.adaptive"),
        (
            {"weight": 1, "instance_noize": {}},
            "adversarial.instance_noize: unknown key; did you mean 'instance_noise'?",
        ),
    ],
)
def test_a_wrong_adversarial_part_is_named(adversarial: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("vapsr_x2", {"adversarial": adversarial})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_defaults_train_both_in_every_step() -> None:
    spec = AdversarialSpec(weight=1)
    assert (spec.loss, spec.generator_every, spec.discriminator_every) == ("vanilla", 1, 1)
    assert spec.instance_noise.sigma == 0
    assert spec.adaptive is None


@pytest.mark.parametrize(
    ("value", "is_on"), [(True, True), ("on", True), ({}, True), ("off", False)]
)
def test_adaptive_is_a_switch_or_a_table(value: object, is_on: bool) -> None:
    recipe = load_recipe("vapsr_x2", {"adversarial": {"weight": 1, "adaptive": value}})
    assert recipe.adversarial is not None
    assert recipe.adversarial.adaptive == (AdaptiveSpec() if is_on else None)
