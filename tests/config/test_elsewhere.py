"""Words of other training programs lead to ours, and ours exist."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tyro

from pipeline import cli
from pipeline.cli import UserError
from pipeline.config.ds_config import DS_KEYS, load_ds_config
from pipeline.config.elsewhere import WORDS, ours
from pipeline.config.recipe import Recipe, load_recipe, parse_overrides
from pipeline.installation import find_file
from pipeline.training.options import TrainOptions, overrides_last


@pytest.mark.filterwarnings("ignore:get_parser")
def test_every_target_exists() -> None:
    parser = tyro.extras.get_parser(TrainOptions, config=(tyro.conf.FlagCreatePairsOff,))
    values = load_recipe("vapsr_x2").model_dump() | {"adversarial": {"discriminator": {}}}
    for word, target in WORDS.items():
        if target.startswith("--"):
            assert target in parser._option_string_actions, word
            continue
        first, *rest = target.split(".")
        if first == "ds":
            assert rest[0] in DS_KEYS, word
            continue
        assert first in Recipe.model_fields, word
        table = values
        for key in (first, *rest):
            table = table[key]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1e-4", "lr: unknown key; here it is ds.optimizer.params.lr=VALUE"),
        ("batch_size=8", "here it is ds.train_batch_size=VALUE"),
        ("train_batch_size=8", "here it is ds.train_batch_size=VALUE"),
        ("epochs=10", "here it is --max-epochs"),
        ("num_workers=4", "here it is data.threads=VALUE"),
        ("data.num_workers=4", "here it is data.threads=VALUE"),
        ("gt_size=128", "here it is data.crop=VALUE"),
        ("network_g=vapsr", "here it is generator.name=VALUE"),
        ("total_iter=1000", "here it is steps=VALUE"),
        ("upscale=4", "here it is scale=VALUE"),
        ("previews.weights=1", "previews.weights: unknown key; "),
    ],
)
def test_a_recipe_s_unknown_key(override: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        load_recipe("vapsr_x2", parse_overrides([override])[0])
    assert message in str(refusal.value)
    assert ("here it is" in str(refusal.value)) == ("here it is" in message)


def test_deepspeed_s_unknown_key() -> None:
    with pytest.raises(UserError, match=r"'batch_size'; here it is ds\.train_batch_size"):
        load_ds_config(find_file("ds_config.json"), {"batch_size": 8})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch-size", "; here it is ds.train_batch_size=VALUE (--help"),
        ("--lr", "; here it is ds.optimizer.params.lr=VALUE (--help"),
        ("--num_workers=4", "; here it is data.threads=VALUE (--help"),
        ("--epochs", "; here it is --max-epochs (--help"),
        ("--watchdog", "; did you mean '--watchdog-minutes'? (--help"),
        ("--zzz", "unknown option --zzz (--help lists all)"),
    ],
)
def test_an_unknown_option(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    refuse: Callable[[TrainOptions], int] = lambda options: 0  # noqa: E731
    with pytest.raises(SystemExit) as stop:
        cli.run(TrainOptions, refuse, overrides_last([option, "8"]))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_other_words_are_left_to_the_nearest_name() -> None:
    assert ours("--recpie") == ours("crop") == ""
