from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from pipeline.cli import UserError
from pipeline.config.recipe import load_recipe
from pipeline.installation import recipe_names
from pipeline.models import build_generator, comparison
from pipeline.models.comparison import (
    BEGIN,
    END,
    GPU,
    HEADER,
    LARGEST_FIELD,
    PAGE,
    Page,
    Row,
    effective_field,
    markdown,
    networks_of,
    read_table,
)


def convolution(taps, colours=(3, 3), **options):
    """A convolution with the same square of taps between all colours."""
    taps = torch.tensor(taps, dtype=torch.float32)
    conv = nn.Conv2d(*colours, len(taps), padding="same", bias=False, **options)
    with torch.no_grad():
        conv.weight.copy_(taps.expand_as(conv.weight))
    return conv


ONES = [[1.0] * 3] * 3


@pytest.mark.parametrize(
    ("network", "scale", "side"),
    [
        (nn.Identity(), 1, 1),
        (convolution(ONES), 1, 3),
        (convolution(ONES, dilation=8), 1, 17),
        # Off the centre, the square has to reach out to both sides.
        (convolution([[0.0, 0, 0], [0, 0, 0], [0, 0, 1]], dilation=5), 1, 11),
        # The gradient's squares are products of 1, 4, 9, 4, 1: (17 / 19)^2 of them within 3x3.
        (nn.Sequential(convolution(ONES), convolution(ONES)), 1, 5),
        # A ninth of the energy in the outer taps, and less than a twentieth.
        (convolution([[0.0, 0, 0], [0.35, 1, 0], [0, 0, 0]]), 1, 3),
        (convolution([[0.0, 0, 0], [0.2, 1, 0], [0, 0, 0]]), 1, 1),
        (nn.Sequential(convolution(ONES, (3, 12)), nn.PixelShuffle(2)), 2, 3),
        (convolution(ONES, dilation=LARGEST_FIELD // 2), 1, LARGEST_FIELD),
        (convolution(ONES, dilation=LARGEST_FIELD // 2 + 1), 1, None),
    ],
)
def test_the_effective_field_is_the_square_with_95_percent_of_the_energy(network, scale, side):
    assert effective_field(network, scale) == side


def test_measuring_the_effective_field_leaves_the_network_as_it_is():
    network = build_generator("vapsr", 2, num_features=8, num_attention_features=8, num_blocks=1)
    network.train()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    effective_field(network, 2)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_recipes_of_one_network_share_a_row():
    groups = networks_of(())
    named = [name for group in groups for name in group]
    assert len(named) == len(set(named))
    assert set(named) == {name for name in recipe_names() if not name.startswith("demo")}
    assert ("esrgan_x4", "realesrgan_x4") in groups
    assert networks_of(["realesrgan_x4", "vapsr_x2"]).keys() == {
        ("esrgan_x4", "realesrgan_x4"),
        ("vapsr_x2",),
    }
    assert ("demo",) in networks_of(["demo"])


def row(*recipes: str, **cells: str) -> Row:
    return Row(recipes, {**{name: f"{name} of {recipes[0]}" for name in HEADER[1:]}, **cells})


def test_rows_are_replaced_and_the_others_kept(tmp_path):
    page = tmp_path / "networks.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    old = [row("vapsr_x2"), row("esrgan_x4", "gone_x4", **{GPU: "7"}), row("other_x4")]
    Page((), page).write(old)
    assert read_table(page.read_text())[0].cells[GPU] == "7"
    new = row("vapsr_x2", parameters="other")
    Page(["vapsr_x2"], page).write([new])
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\nMeasured on ")
    assert text.endswith(f"\n\n{END}\nafter\n")
    found = read_table(text)
    assert [one.recipes for one in found] == [("esrgan_x4", "realesrgan_x4"), ("vapsr_x2",)]
    assert [one.cells["parameters"] for one in found] == ["parameters of esrgan_x4", "other"]
    assert [one.cells[GPU] for one in found] == ["7", ""]
    # Rows of two machines do not mix; all rows at once replace them.
    page.write_text(text.replace("Measured on ", "Measured on another "))
    with pytest.raises(UserError, match="has rows of another machine; measure those of all"):
        Page(["vapsr_x2"], page)
    Page((), page).write([new])
    assert [one.recipes for one in read_table(page.read_text())] == [("vapsr_x2",)]
    page.write_text("nothing")
    with pytest.raises(UserError, match="has no place for the table: put in <!-- begin"):
        Page((), page)


def test_without_gpu_numbers_there_is_no_column_for_them():
    assert markdown([row("a")]).splitlines()[0] == f"| {' | '.join(HEADER)} |"
    assert markdown([row("a", **{GPU: "1"})]).splitlines()[0].endswith(f" | {GPU} |")


def test_a_self_check_gives_the_gpus_numbers(tmp_path):
    file = tmp_path / "selfcheck.json"
    checks = [
        {"id": "speed.vapsr_x4", "value": 99.0},
        {"id": "speed.vapsr_x4.fp16.eager.b64", "value": 10.0},
        {"id": "speed.vapsr_x4.fp16.compiled.b64", "value": 30.5},
        {"id": "speed.srgan_x4.fp16.eager.b16", "value": None},
        {"id": "loader.npy.a", "value": 3.0},
    ]
    file.write_text(json.dumps({"checks": checks}))
    assert comparison._gpu_rates(file) == {"vapsr_x4": 30.5}
    file.write_text("[]")
    with pytest.raises(UserError, match="not a result of launch"):
        comparison._gpu_rates(file)


def test_the_training_process_grows_by_gradients_and_moments_at_least():
    found = comparison._in_its_own_process("compact_x4", "training", 0.001)
    recipe = load_recipe("compact_x4")
    count = sum(parameter.numel() for parameter in comparison._network(recipe).parameters())
    assert found["rate"] > 0
    assert found["bytes"] > 3 * 4 * count


def test_the_page_has_todays_networks():
    """Rows of recipes whose network has changed must be measured again."""
    for one in read_table(PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]):
        for name in one.recipes:
            recipe = load_recipe(name)
            spec = recipe.generator
            if spec.name != "spandrel":
                with torch.device("meta"):
                    network = build_generator(spec.name, recipe.scale, **spec.params)
                count = sum(parameter.numel() for parameter in network.parameters())
                assert one.cells["parameters"] == f"{count:,}", name
                assert one.cells["network"] == f"{spec.name} x{recipe.scale}"
