"""What a run adopts from the file that it starts from, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import SMALL, command, run
from fabricate import seal, shared
from pipeline.checkpoint_index import read_index, write_index
from pipeline.cli import UserError
from pipeline.config.recipe import load_recipe
from pipeline.distributed.ranks import Ranks
from pipeline.models import build_generator
from pipeline.models.weights import SavedNetwork, read_network, write_network
from pipeline.run_folder import checkpoint_dir, run_network_file
from pipeline.training.options import TrainOptions, TrainPlan, make_plans
from pipeline.training.saved_run import as_recorded, refuse_other_run
from pipeline.training.start import load_start_weights, with_start_params

TINY = {"num_features": 8, "num_attention_features": 8, "num_blocks": 1}


@pytest.fixture
def plans_of(dataset: Path, tmp_path: Path):
    """Return the plans of the small demo, or of another recipe, with overrides."""

    def make(*overrides: str, start: Path | None = None, recipe: str = "demo") -> list[TrainPlan]:
        options = TrainOptions(
            overrides=(*SMALL, *overrides),
            recipe=recipe,
            dataset_dir=(dataset,),
            output_dir=tmp_path / "run",
            start=start,
        )
        return make_plans(options)

    return make


def saved_file(path: Path, name: str = "vapsr", scale: int = 2, **params: Any) -> Path:
    torch.manual_seed(1)
    params = {**(TINY if name == "vapsr" else {}), **params}
    state = build_generator(name, scale, **params).state_dict()
    write_network(path, SavedNetwork(name, scale, params, state))
    return path


def started(plan: TrainPlan) -> str:
    """Load the start weights into the network of the plan; return the line about it."""
    generator = plan.recipe.generator
    network = build_generator(generator.name, plan.recipe.scale, **generator.params)
    line = load_start_weights(network, plan)
    images = torch.rand(1, 3, 9, 8)
    with torch.inference_mode():
        theirs = read_network(Path(str(plan.recipe.start))).build()(images)
        assert torch.equal(network.eval()(images), theirs)
    return line


def test_switches_are_those_of_the_file(plans_of, tmp_path: Path) -> None:
    """A network that adds the bicubic upscale has one tensor more, which is no weight."""
    file = saved_file(tmp_path / "a.pth", global_residual="none", value_range="signed")
    (asked,) = plans_of(start=file)
    assert asked.recipe.generator.params["global_residual"] == "bicubic"
    (plan,) = with_start_params([asked], Ranks())
    assert plan.recipe.generator.params == {
        **asked.recipe.generator.params,
        "global_residual": "none",
        "value_range": "signed",
    }
    assert plan.identity["adopted"] == {"global_residual": "bicubic", "value_range": None}
    assert started(plan).endswith(
        "a.pth; with the file's global_residual none (the recipe: bicubic), value_range signed "
        "(the recipe: unset)"
    )
    # Nothing to adopt: nothing changes.
    (same,) = plans_of("generator.global_residual=none", "generator.value_range=signed", start=file)
    assert with_start_params([same], Ranks()) == [same]


def test_a_file_with_the_residual_gives_it_to_a_recipe_without(plans_of, tmp_path: Path) -> None:
    file = saved_file(tmp_path / "a.pth", global_residual="bicubic")
    recipe = tmp_path / "plain.yaml"
    recipe.write_text("base: demo\ngenerator: {global_residual: none}\n")
    (plan,) = with_start_params(plans_of(start=file, recipe=str(recipe)), Ranks())
    assert "with the file's global_residual bicubic (the recipe: none)" in started(plan)


def test_what_the_command_line_says_is_not_adopted(plans_of, tmp_path: Path) -> None:
    file = saved_file(tmp_path / "a.pth", global_residual="none", colour_space="ycbcr")
    for override in ("generator.global_residual=bicubic", "generator={%s}"):
        table = "name: vapsr, num_features: 8, num_attention_features: 8, num_blocks: 1"
        override = override.replace("%s", f"{table}, global_residual: bicubic")
        (plan,) = with_start_params(plans_of(override, start=file), Ranks())
        assert plan.recipe.generator.params["global_residual"] == "bicubic"
        assert plan.adopted.keys() == {"colour_space"}
        with pytest.raises(
            UserError,
            match=r"a.pth holds vapsr x2, global_residual none, but the recipe asks for "
            r"global_residual bicubic; it fits with generator.global_residual=none$",
        ):
            started(plan)


def test_a_continued_run_has_what_it_adopted_when_the_file_is_gone(
    plans_of, tmp_path: Path
) -> None:
    file = saved_file(tmp_path / "a.pth", global_residual="none")
    (plan,) = with_start_params(plans_of(start=file), Ranks())
    folder = checkpoint_dir(plan.run_dir, 3)
    folder.mkdir(parents=True)
    seal(folder, 3)
    index = read_index(folder)
    # As JSON, as a checkpoint holds it.
    index["identity"] = json.loads(json.dumps({**plan.identity, "precision": "FP32"}))
    write_index(folder, index)
    file.unlink()

    def continued(*overrides: str, **options: Any) -> TrainPlan:
        (found,) = with_start_params(plans_of(*overrides, **options), Ranks())
        assert as_recorded(found) == found
        refuse_other_run(found, {**found.identity, "precision": "FP32"}, read_index(folder))
        return found

    assert continued(start=file).recipe == plan.recipe
    assert continued("generator.global_residual=none", start=file).recipe == plan.recipe
    # Also with the recipe that the run wrote, and the next checkpoint says the same again.
    written = tmp_path / "recipe.yaml"
    written.write_text("base: demo\nname: demo\ngenerator: {global_residual: none}\n")
    again = continued(start=file, recipe=str(written))
    assert (again.recipe.generator, again.adopted) == (plan.recipe.generator, plan.adopted)
    for override, words in (
        ("generator.global_residual=bicubic", "global_residual: none in the run, bicubic asked"),
        ("generator.value_range=signed", "value_range: unset in the run, signed asked"),
    ):
        with pytest.raises(UserError, match=words):
            continued(override, start=file)
    with pytest.raises(UserError, match=r"holds another run \(step 3\): start: .* in the run, Non"):
        continued()


def test_a_stage_adopts_what_the_previous_one_has(plans_of, tmp_path: Path) -> None:
    file = saved_file(tmp_path / "a.pth", global_residual="none")
    recipe = tmp_path / "two.yaml"
    recipe.write_text(
        "base: demo\nname: two\nstages: {first: {}, second: {losses: {mse: 1}}, "
        "other: {generator: {num_blocks: 2}}}\n"
    )
    overrides = ("stages.other.generator.global_residual=bicubic",)
    plans = with_start_params(plans_of(*overrides, start=file, recipe=str(recipe)), Ranks())
    residuals = [plan.recipe.generator.params["global_residual"] for plan in plans]
    assert residuals == ["none", "none", "bicubic"]
    assert [dict(plan.adopted) for plan in plans] == [{"global_residual": "bicubic"}] * 2 + [{}]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (
            {"num_features": 16, "global_residual": "none"},
            "global_residual none, num_features 16, but the recipe asks for global_residual "
            "bicubic, num_features 8; it fits with generator.global_residual=none "
            "generator.num_features=16",
        ),
        (
            {"name": "compact", "num_conv": 2},
            "holds compact x2, but the recipe demo trains vapsr x2; choose a recipe of compact, or "
            "add 'generator={name: compact, num_conv: 2}'",
        ),
        ({"name": "compact", "scale": 3}, "or add scale=3 'generator={name: compact}'"),
        (
            {"name": "spandrel", "arch": "SPAN", "feature_channels": 8},
            "or add 'generator={name: spandrel, arch: SPAN, feature_channels: 8}'",
        ),
    ],
)
def test_a_refusal_names_what_makes_the_file_fit(
    plans_of, tmp_path: Path, params: dict[str, Any], words: str
) -> None:
    file = saved_file(tmp_path / "a.pth", **params)
    (plan,) = with_start_params(plans_of(start=file), Ranks())
    assert plan.adopted == {}
    with pytest.raises(UserError) as caught:
        started(plan)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    overrides = message.partition(" add ")[2] or message.partition(" fits with ")[2]
    said = overrides.replace("'generator=", "\0generator=").replace("'", "").split("\0")
    words_of = [word for part in said for word in ([part] if "{" in part else part.split())]
    crop = ["data.crop=33"] if params.get("scale") == 3 else []
    small = [word for word in SMALL if not ("{" in overrides and word.startswith("generator."))]
    recipe_plan = make_plans(
        TrainOptions(
            overrides=(*small, *words_of, *crop),
            recipe="demo",
            dataset_dir=tuple(folder.root for folder in plan.dataset.folders),
            output_dir=tmp_path / "run",
            start=file,
        )
    )
    assert "starting from the weights of" in started(with_start_params(recipe_plan, Ranks())[0])


def test_spandrels_switches_are_adopted_too(plans_of, tmp_path: Path) -> None:
    """SPAN's norm leaves the weights' shapes as they are."""
    file = saved_file(tmp_path / "a.pth", "spandrel", arch="SPAN", feature_channels=8, norm=True)
    span = tmp_path / "span.yaml"
    span.write_text(
        "base: vapsr_x2\nname: span\nlosses: {l1: 1}\n"
        "generator: {name: spandrel, arch: SPAN, feature_channels: 8}\n"
    )
    plain = [word for word in SMALL if not word.startswith("generator.")]
    options = TrainOptions(
        overrides=tuple(plain),
        recipe=str(span),
        dataset_dir=tuple(folder.root for folder in plans_of()[0].dataset.folders),
        output_dir=tmp_path / "run",
        start=file,
    )
    (plan,) = with_start_params(make_plans(options), Ranks())
    assert plan.adopted == {"norm": None}
    assert "with the file's norm True (the recipe: unset)" in started(plan)


def test_the_released_vapsr_starts_its_recipe(plans_of) -> None:
    file = shared("weights/VapSR_X4.pth")
    sizes = load_recipe("vapsr_x4").generator.params
    overrides = [f"generator.{key}={sizes[key]}" for key in TINY]
    (plan,) = plans_of(*overrides, "data.crop=64", recipe="vapsr_x4", start=file)
    plan = with_start_params([replace(plan, fixed_params=frozenset())], Ranks())[0]
    assert "with the file's global_residual none (the recipe: bicubic)" in started(plan)


def test_only_initial_parameters_make_no_difference(plans_of, tmp_path: Path) -> None:
    small = {"num_features": 8, "num_blocks": 1}
    file = saved_file(tmp_path / "a.pth", "rrdbnet", 2, **small, weight_init_scale=0.5)
    table = "name: rrdbnet, num_features: 8, num_blocks: 1"
    recipe = tmp_path / "rrdb.yaml"
    recipe.write_text(f"base: demo\nname: rrdb\ngenerator: {{{table}}}\n")
    plain = [f"generator.{key}={value}" for key, value in small.items()]
    options = [word for word in SMALL if not word.startswith("generator.")]
    (plan,) = make_plans(
        TrainOptions(
            overrides=(*options, *plain),
            recipe=str(recipe),
            dataset_dir=tuple(folder.root for folder in plans_of()[0].dataset.folders),
            output_dir=tmp_path / "run",
            start=file,
        )
    )
    assert with_start_params([plan], Ranks()) == [plan]
    assert started(plan).endswith("a.pth")


def test_a_run_that_adopted_is_continued_and_measured_as_one(dataset: Path, tmp_path: Path) -> None:
    """Through train.py: the run folder, its weights and the next start agree."""
    file = saved_file(tmp_path / "a.safetensors", global_residual="none")
    first = [*command(dataset, tmp_path / "run", "steps=1"), "--start", str(file)]
    done = run(first)
    assert done.returncode == 0, done.stderr
    assert "; with the file's global_residual none (the recipe: bicubic)" in done.stdout
    assert (
        load_recipe(str(tmp_path / "run" / "recipe.yaml")).generator.params["global_residual"]
        == "none"
    )
    network = read_network(run_network_file(tmp_path / "run", "newest", ema=True))
    assert network.params["global_residual"] == "none"
    assert "residual_kernel" not in network.build().state_dict()
    file.unlink()
    assert "nothing left to do" in run(first).stdout
    done = run([*command(dataset, tmp_path / "run", "steps=2"), "--start", str(file)])
    assert done.returncode == 0, done.stderr
    assert "starting from" not in done.stdout
    index = read_index(checkpoint_dir(tmp_path / "run", 2))
    assert index["identity"]["adopted"] == {"global_residual": "bicubic"}
