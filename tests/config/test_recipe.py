"""Recipes and ds_configs: what is accepted, and the messages for everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.cli import UserError
from pipeline.config.ds_config import batch_sizes, ds_differences, load_ds_config
from pipeline.config.recipe import (
    load_recipe,
    load_stages,
    parse_overrides,
    recipe_differences,
    recipe_of,
    write_recipe,
)
from pipeline.engine.engine import build_optimizer
from pipeline.engine.schedules import validate_schedule
from pipeline.installation import ROOT, recipe_names
from pipeline.losses import LOSSES
from pipeline.models import build_generator
from pipeline.models.discriminators import build_discriminator
from pipeline.training.options import TrainOptions, make_plan, steps_in_epochs


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_whole(name: str, tmp_path: Path) -> None:
    for recipe in load_stages(name):
        assert recipe.name == name
        generator = build_generator(recipe.generator.name, recipe.scale, **recipe.generator.params)
        assert sum(parameter.numel() for parameter in generator.parameters()) > 10_000
        files = [recipe.ds_config_path()]
        if recipe.adversarial:
            assert recipe.best.metric == "lpips", "PSNR falls while a GAN learns"
            discriminator = recipe.adversarial.discriminator
            build_discriminator(discriminator.name, recipe.data.crop, **discriminator.params)
            files += [ROOT / recipe.adversarial.ds_config] if recipe.adversarial.ds_config else []
        for ds_config in map(load_ds_config, files):
            assert ds_config["train_batch_size"] > 0
            build_optimizer(ds_config["optimizer"], [torch.nn.Parameter(torch.zeros(1))])
            if "scheduler" in ds_config:
                validate_schedule(ds_config["scheduler"])
        for loss, term in recipe.losses.items():
            assert loss in LOSSES
            assert isinstance(term, float) or "weight" in term
        write_recipe(recipe, tmp_path / "recipe.yaml")
        assert recipe_of(yaml.safe_load((tmp_path / "recipe.yaml").read_text()), "run") == recipe


def test_a_recipe_is_a_difference_from_its_base(tmp_path: Path) -> None:
    path = tmp_path / "wide.yaml"
    path.write_text("base: vapsr_x2\ngenerator: {num_features: 64}\nlosses: {mse: 2}\n")
    recipe, base = load_recipe(str(path)), load_recipe("vapsr_x2")
    assert recipe.name == "wide"
    assert recipe.generator.params == {**base.generator.params, "num_features": 64}
    assert recipe.losses == {"mse": 2.0}  # a table of losses replaces the base's
    assert recipe.data == base.data


def test_a_generator_of_another_name_takes_nothing_from_the_base(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("base: vapsr_x2\ngenerator: {name: srresnet, num_blocks: 3}\n")
    assert load_recipe(str(path)).generator.params == {"num_blocks": 3}


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"base: {tmp_path / 'b.yaml'}\n")
    (tmp_path / "b.yaml").write_text(f"base: {tmp_path / 'a.yaml'}\n")
    with pytest.raises(UserError, match="its own base: a -> b -> a"):
        load_recipe(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.corp=64", "data.corp: unknown key; did you mean 'crop'?"),
        ("lossess={l1: 1}", "lossess: unknown key; did you mean 'losses'?"),
        ("losses={}", "at least one loss is needed"),
        ("start=previous", "start: previous, but there is no previous stage"),
        ("stages.gan.steps=3", "recipe vapsr_x2 has no stages"),
        ("losses.l1=abc", "losses.l1: 'abc' is neither a weight nor a table with a weight"),
        ("adversarial=3", "adversarial: keys and values are needed, such as {key: value}, not 3"),
        ("best.metric=lpips", "best.metric lpips needs validation_lpips: alex, squeeze or vgg"),
        ("data.crop=65", "data.crop 65 is not a multiple of scale 2; use 64"),
        ("steps=0", "steps: input should be greater than 0, not 0"),
        ("steps=many", "steps: input should be a valid integer"),
        (
            "compile=maybe",
            "compile: input should be 'auto', 'on', 'off' or 'reduce-overhead', not 'maybe'",
        ),
        ("steps", "'steps' is not an override; write key=value"),
        ("scale.x=1", "scale has no keys of its own"),
        ("base=demo", "base can only be set in a recipe's file"),
        ("stage=checkpoints", "stage: 'checkpoints' is a folder of every run"),
        ("best={metric: psnr, psnr_floor: 25}", "best: psnr_floor needs another metric"),
        (
            "best={metric: lpips, psnr_floor: .nan}",
            "best.psnr_floor: input should be a finite number, not nan",
        ),
        (
            "adversarial={weight: .inf}",
            "adversarial.weight: input should be a finite number, not inf",
        ),
        ("adversarial={weight: true}", "adversarial.weight: true is not a number"),
        (
            "adversarial={weight: 1, labels: {smoothing: .4, noise: .45}}",
            "labels: smoothing 0.4 + 2 x noise 0.45 must be",
        ),
        (
            "adversarial={weight: 1, labels: {smoothing: .2, noise: .4}}",
            "labels: smoothing 0.2 + 2 x noise 0.4 must be",
        ),
    ],
)
def test_a_bad_value_is_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("vapsr_x2", parse_overrides([override])[0])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "fault"),
    [
        (
            "[{sharpen: {radius: 2}}]",
            "steps.0.sharpen.radius: unknown key; choose from amount, kind, probability, sigma,",
        ),
        (
            "[blur, {resize: {detour: {upp: 1}}}]",
            "steps.1.resize.detour.upp: unknown key; did you mean 'up'?",
        ),
        (
            "[{one_of: [{steps: [{shuffle: [{blur: {kindd: box}}]}]}]}]",
            "steps.0.one_of.0.steps.0.shuffle.0.blur.kindd: unknown key; did you mean 'kind'?",
        ),
        (
            "[{sometimes: {probability: 1, steps: [{blur: {sigma: wide}}]}}]",
            "steps.0.sometimes.steps.0.blur.sigma: 'wide' is neither a number nor a range "
            "[low, high]",
        ),
        ("[{blur: {sigma: [1, 2, 3]}}]", "steps.0.blur.sigma: [1, 2, 3] is neither a number"),
    ],
)
def test_a_bad_key_of_a_degradation_step_is_named_with_the_steps_own(
    steps: str, fault: str
) -> None:
    chain = f"data.degradation={{name: chain, steps: {steps}}}"
    with pytest.raises(UserError) as caught:
        load_recipe("vapsr_x2", parse_overrides([chain])[0])
    assert str(caught.value).startswith(f"recipe vapsr_x2: data.degradation.{fault}")
    assert ";" not in str(caught.value).replace("; did", "").replace("; choose", "")
    # In a list, one for each dataset folder, too.
    with pytest.raises(UserError) as caught:
        load_recipe("vapsr_x2", parse_overrides([chain.replace("={", "=[{") + "]"])[0])
    assert fault in str(caught.value)


def test_switches_may_be_yaml_booleans() -> None:
    recipe = load_recipe("demo", parse_overrides(["compile=off", "channels_last=true"])[0])
    assert (recipe.compile, recipe.channels_last) == ("off", "on")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "+1e-4", "0.0001"])
def test_numbers_are_numbers(text: str) -> None:
    assert parse_overrides([f"ds.optimizer.params.lr={text}"]) == (
        {},
        {"optimizer.params.lr": 0.0001},
    )


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no recipe 'vapsr_s_4x'; did you mean 'vapsr_s_x4'\\?"):
        load_recipe("vapsr_s_4x")


def test_labels_that_only_nearly_meet_are_taken() -> None:
    labels = {"smoothing": 0.2, "noise": 0.39}
    recipe = load_recipe("demo", {"adversarial": {"weight": 1, "labels": labels}})
    assert recipe.adversarial is not None
    assert recipe.adversarial.labels.model_dump() == {**labels, "flip": 0.0}


def test_differences_are_of_what_losses_say_not_of_how_they_are_written() -> None:
    old = load_recipe("demo", {"losses": {"l1": 1, "vgg_feature": 1}})
    tables = {"l1": {"weight": 1}, "vgg_feature": {"weight": 1, "weights": "vgg19.pth"}}
    new, other = (
        load_recipe("demo", {"losses": tables}),
        load_recipe("demo", {"losses": {**tables, "l1": 2}}),
    )
    assert recipe_differences(old, new) == recipe_differences(new, old) == []
    assert recipe_differences(old, other) == ["losses.l1.weight: 1.0 in the run, 2.0 asked for"]


def test_differences_leave_out_what_may_change() -> None:
    old = load_recipe("demo")
    assert (
        recipe_differences(
            old,
            load_recipe(
                "demo", {"steps": 9, "patience": 3, "data.threads": 5, "validation_images": 3}
            ),
        )
        == []
    )
    changed = load_recipe("demo", {"data.crop": 64, "generator.num_blocks": 6})
    assert recipe_differences(old, changed) == [
        "data.crop: 96 in the run, 64 asked for",
        "generator.num_blocks: 5 in the run, 6 asked for",
    ]
    config = load_ds_config(ROOT / "ds_config.json")
    split = load_ds_config(ROOT / "ds_config.json", {"gradient_accumulation_steps": 4})
    assert ds_differences(config, split) == []
    assert ds_differences(
        config, load_ds_config(ROOT / "ds_config.json", {"train_batch_size": 32})
    ) == ["ds.train_batch_size: 64 in the run, 32 asked for"]


def test_another_optimizer_or_schedule_keeps_no_foreign_parameters() -> None:
    """In whatever order they are given; the same type keeps all of its parameters."""
    overrides = {
        "optimizer.params.betas": [0.9, 0.8, 0.7],
        "optimizer.type": "Adan",
        "scheduler.type": "WarmupLR",
        "scheduler.params.warmup_num_steps": 7,
    }
    config = load_ds_config(ROOT / "ds_config.json", overrides)
    assert config["optimizer"] == {
        "type": "Adan",
        "params": {"lr": 0.001, "weight_decay": 0.0, "betas": [0.9, 0.8, 0.7]},
    }
    assert config["scheduler"] == {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}
    same = load_ds_config(ROOT / "ds_config.json", {"optimizer.type": "AdamW"})
    assert same == load_ds_config(ROOT / "ds_config.json")


@pytest.mark.parametrize(
    ("config", "world_size", "expected"),
    [
        ({"train_batch_size": 64}, 1, (64, 1)),
        ({"train_batch_size": 64}, 4, (16, 1)),
        ({"train_batch_size": 64, "gradient_accumulation_steps": 2}, 4, (8, 2)),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}, 4, (4, 4)),
        (
            {
                "train_batch_size": 64,
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 8,
            },
            2,
            (4, 8),
        ),
    ],
)
def test_batch_sizes_follow_from_the_global_batch(
    config: dict, world_size: int, expected: tuple[int, int]
) -> None:
    assert batch_sizes(config, world_size) == expected


@pytest.mark.parametrize(
    ("config", "world_size", "way_out"),
    [
        ({"train_batch_size": 64}, 3, "ds.train_batch_size=63 or 66"),
        (
            {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 16},
            1,
            "ds.train_batch_size=16",
        ),
        ({"train_batch_size": 4}, 8, "ds.train_batch_size=8"),
    ],
)
def test_batch_sizes_that_do_not_divide_name_ones_that_do(
    config: dict, world_size: int, way_out: str
) -> None:
    with pytest.raises(UserError, match="is not micro-batch x accumulation x") as caught:
        batch_sizes(config, world_size)
    assert way_out in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON: line 1"),
        (
            '{"optimizer": {"type": "AdamW"}}',
            "train_batch_size, the global batch, must be a whole number above 0",
        ),
        (
            '{"train_batchsize": 8}',
            "unknown key 'train_batchsize'; did you mean 'train_batch_size'?",
        ),
        ('{"train_batch_size": 8}', "optimizer is missing"),
        ('{"train_batch_size": true}', "must be a whole number above 0, not True"),
        (
            '{"train_batch_size": 8, "gradient_accumulation_steps": 0}',
            "gradient_accumulation_steps must be a whole number",
        ),
        (
            '{"train_batch_size": 8, "gradient_accumulation_steps": 1.5}',
            "gradient_accumulation_steps must be a whole",
        ),
        (
            '{"train_batch_size": 8, "optimizer": {"typ": "SGD"}}',
            "unknown key 'optimizer.typ'; did you mean 'type'?",
        ),
        (
            '{"train_batch_size": 8, "optimizer": {"type": "SGD", "lr": 1}}',
            "unknown key 'optimizer.lr'",
        ),
        (
            '{"train_batch_size": 8, "optimizer": {"type": null}}',
            "optimizer needs a type and a table of params",
        ),
        (
            '{"train_batch_size": 8, "optimizer": {"type": "SGD", "params": 3}}',
            "needs a type and a table of params",
        ),
        (
            '{"train_batch_size": 8, "scheduler": {"type": "WarmupLR", "parms": {}}}',
            "did you mean 'params'?",
        ),
        (
            '{"train_batch_size": 8, "fp16": {"enabld": true}}',
            "unknown key 'fp16.enabld'; did you mean 'enabled'?",
        ),
        ('{"train_batch_size": 8, "fp16": true}', "fp16 must be a table, not True"),
        (
            '{"train_batch_size": 8, "gradient_clipping": "abc"}',
            "gradient_clipping must be a number",
        ),
        (
            '{"train_batch_size": 8, "optimizer": {"type": "AdamW"}, "zero_optimization": '
            '{"stage": 3}}',
            "zero_optimization.stage 3 is not supported",
        ),
        (
            '{"train_batch_size": 8, "optimizer": {"type": "AdamW"}, "fp16": {"enabled": true}, '
            '"bf16": {"enabled": true}}',
            "fp16 and bf16 are both enabled",
        ),
    ],
)
def test_a_bad_ds_config_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_ds_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_epochs_limit_the_steps(dataset: Path) -> None:
    assert steps_in_epochs(3, 10, 8) == 4  # 30 samples: 3.75 batches
    assert steps_in_epochs(4, 10, 8) == 5
    plan = make_plan(TrainOptions(recipe="demo", dataset_dir=(dataset,), max_epochs=4))
    assert plan.total_steps == 5
    assert (
        make_plan(TrainOptions(recipe="demo", dataset_dir=(dataset,), max_epochs=10**6)).total_steps
        == 1400
    )
    with pytest.raises(UserError, match="--max-epochs 0 must be at least 1"):
        make_plan(TrainOptions(recipe="demo", dataset_dir=(dataset,), max_epochs=0))


def test_the_identity_of_a_run_is_plain_json(dataset: Path) -> None:
    plan = make_plan(TrainOptions(recipe="demo", dataset_dir=(dataset,)))
    assert json.loads(json.dumps(plan.identity)) == plan.identity
    assert plan.identity["dataset"]["training_files"] == 10


STAGES = """
base: vapsr_x2
start: first.pth
stages:
  psnr: {steps: 10}
  gan: {steps: 5, losses: {l1: 0.01}, adversarial: {weight: 0.005}}
  large: {steps: 3, data: {crop: 128}, start: other.pth}
"""


def test_stages_are_changes_to_one_recipe_and_follow_each_other(tmp_path: Path) -> None:
    path = tmp_path / "three.yaml"
    path.write_text(STAGES)
    psnr, gan, large = load_stages(str(path), {"seed": 7, "stages.gan.steps": 6, "losses.mse": 1.0})
    assert [stage.stage for stage in (psnr, gan, large)] == ["psnr", "gan", "large"]
    assert [stage.steps for stage in (psnr, gan, large)] == [10, 6, 3]
    assert [stage.start for stage in (psnr, gan, large)] == ["first.pth", "previous", "other.pth"]
    assert {stage.seed for stage in (psnr, gan, large)} == {7}
    assert psnr.losses == {"l1": 1.0, "mse": 1.0}
    assert gan.losses == {"l1": 0.01, "mse": 1.0}
    assert psnr.adversarial is None
    assert gan.adversarial is not None
    assert (psnr.data.crop, large.data.crop) == (96, 128)
    assert load_recipe(str(path)).stage == "large"
    for stage in (psnr, gan, large):  # as stored in a run folder
        write_recipe(stage, tmp_path / "recipe.yaml")
        assert recipe_of(yaml.safe_load((tmp_path / "recipe.yaml").read_text()), "run") == stage
        assert load_stages(str(tmp_path / "recipe.yaml")) == [stage]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [a]", "stages must be a table of tables"),
        ("stages: {a: 1}", "stages must be a table of tables"),
        ("stages: {a: {start: previous}}", "start: previous, but there is no previous stage"),
        ("stages: {a: {stepz: 1}}", "stage a: stepz: unknown key; did you mean 'steps'?"),
        ("stages: {1: {steps: 2}}", "the name of stage 1 is not text; put it in quotes"),
        (
            "stages: {'..': {steps: 2}}",
            "stage name '..' may contain only letters, digits, _ and -",
        ),
        (
            "stages: {a/b: {steps: 2}}",
            "stage name 'a/b' may contain only letters, digits, _ and -",
        ),
        (
            "stages: {checkpoints: {steps: 2}}",
            "'checkpoints' is a folder of every run; choose another stage name",
        ),
        ("stages: {file_lists: {steps: 2}}", "'file_lists' is a folder of every run"),
        ("stages: {tensorboard: {steps: 2}}", "'tensorboard' is a folder of every run"),
        (
            "stages: {a: {base: demo}}",
            "stage a: base belongs at the top of the recipe, not in a stage",
        ),
        (
            "stages: {a: {stages: {}}}",
            "stage a: stages belongs at the top of the recipe, not in a stage",
        ),
    ],
)
def test_wrong_stages_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(f"base: vapsr_x2\n{text}\n")
    for overrides in ({}, {"stages.1.steps": 4}):
        with pytest.raises(UserError) as caught:
            load_stages(str(path), overrides)
        assert overrides or message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_previews_may_be_called_samples_as_they_once_were(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(
        "base: demo\nsamples: {count: 2}\n"
        "stages: {psnr: {samples: {side: 64}}, gan: {previews: {count: 0}}}\n"
    )
    psnr, gan = load_stages(str(path), {"samples.keep": 7})
    assert (psnr.previews.count, psnr.previews.side, psnr.previews.keep) == (2, 64, 7)
    assert (gan.previews.count, gan.previews.keep) == (0, 7)
    assert load_recipe("demo", {"previews.count": 1}).previews.count == 1
    old = recipe_of(
        load_recipe("demo").model_dump(mode="json", exclude={"previews"})
        | {"samples": {"count": 3}},
        "x",
    )
    assert old.previews.count == 3
