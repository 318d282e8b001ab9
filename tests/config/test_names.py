"""Names that a recipe may use: known without torch, equal to the tables, and misspellings are
reported in one line."""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from conftest import assert_one_line, command, run, run_python
from pipeline import losses, models
from pipeline.cli import UserError
from pipeline.config import names
from pipeline.config.ds_config import OPTIMIZERS, SCHEDULES
from pipeline.config.recipe import load_recipe, load_stages
from pipeline.losses import adversarial
from pipeline.models import discriminators

TABLES = {
    "NETWORKS": models.GENERATORS,
    "DISCRIMINATORS": discriminators.DISCRIMINATORS,
    "LOSSES": losses.LOSSES,
    "ADVERSARIAL_LOSSES": adversarial.ADVERSARIAL_LOSSES,
}


def test_what_is_read_from_the_sources_is_what_the_tables_hold() -> None:
    """In a process that never imports torch."""
    code = f"""
        import dataclasses, json, sys
        from pipeline.config import names
        found = {{
            table: {{
                name: dataclasses.asdict(row)
                for name, row in getattr(names, table).rows().items()
            }}
            for table in {list(TABLES)!r}
        }}
        assert "torch" not in sys.modules
        print(json.dumps(found))
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for table, real in TABLES.items():
        live = getattr(names, table).rows()
        assert list(found[table]) == list(live) == list(real)
        for name, row in live.items():
            assert {
                **vars(row),
                "parameters": list(row.parameters),
                "required": list(row.required),
            } == (found[table][name]), name
    assert found["NETWORKS"]["spandrel"]["takes_any"]
    assert found["NETWORKS"]["spandrel"]["required"] == ["arch"]
    assert found["ADVERSARIAL_LOSSES"]["hinge"]["flags"] == {
        "takes_labels": False,
        "sees_real": False,
        "compares_samples": False,
    }


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizers_parameters_are_its_class(name: str) -> None:
    row = OPTIMIZERS[name]
    source = import_module(f"pipeline.engine.optimizers.{row.file}") if row.file else torch.optim
    assert set(row.params) == set(inspect.signature(getattr(source, name)).parameters) - {"params"}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedules_parameters_are_torchs_or_deepspeeds(name: str) -> None:
    from deepspeed.runtime import lr_schedules

    ours = set(SCHEDULES[name])
    if hasattr(torch.optim.lr_scheduler, name):
        theirs = set(inspect.signature(getattr(torch.optim.lr_scheduler, name)).parameters)
        assert ours - {"warmup_num_steps", "warmup_min_ratio"} == theirs - {
            "optimizer",
            "last_epoch",
            "scale_fn",
            "scale_mode",
        }
    else:
        theirs = set(inspect.signature(getattr(lr_schedules, name)).parameters)
        assert ours | {"last_batch_iteration"} == theirs - {"optimizer"}


WRONG = {
    ("ds.optimizer.type=AdmaW",): "no optimizer 'AdmaW'; did you mean 'AdamW'?",
    (
        "ds.optimizer.params.weigth_decay=0",
    ): "AdamW has no parameter 'weigth_decay'; did you mean 'weight_decay'?",
    (
        "ds.optimizer.type=Muon",
        "ds.zero_optimization.stage=2",
    ): "optimizer Muon needs whole weights, but zero_optimization.stage 2 cuts them into parts",
    (
        "ds.optimizer.type=ScheduleFreeAdamW",
    ): "the schedule is WarmupCosineLR; set ds.scheduler.type=WarmupLR",
    (
        "ds.optimizer.params.nesterov=true",
        "ds.optimizer.type=Adan",
    ): "optimizer Adan has no parameter 'nesterov'",
    (
        "ds.scheduler.type=WarmupCosine",
    ): "no schedule 'WarmupCosine'; did you mean 'WarmupCosineLR'?",
    (
        "ds.scheduler.params.cos_min_ration=0",
    ): "has no parameter 'cos_min_ration'; did you mean 'cos_min_ratio'?",
    ("generator.num_blokcs=1",): "has no parameter 'num_blokcs'; did you mean 'num_blocks'?",
    (
        "losses={charbonnier: {weight: 1, epsilom: 1}}",
    ): "no parameter 'epsilom'; did you mean 'epsilon'?",
    (
        "adversarial={weight: 1, loss: hing}",
    ): "no adversarial loss named 'hing'; did you mean 'hinge'?",
    (
        "adversarial={weight: 1, discriminator: {name: vgg, norn: none}}",
    ): "no parameter 'norn'; did you mean 'norm'?",
    ("data.degradation=gausian",): "no degradation named 'gausian'; did you mean 'gaussian'?",
    ("best.metric=lpisp",): "best.metric",
}


def test_every_wrong_name_is_found_before_a_process_starts_and_without_torch(dataset: Path) -> None:
    """As both launchers do, for a recipe without stages and for each of several stages."""
    code = f"""
        import json, sys
        from pathlib import Path
        from pipeline.cli import UserError
        from pipeline.training.options import TrainOptions, make_plans
        found = []
        for overrides in {list(WRONG)!r}:
            try:
                make_plans(TrainOptions(
                    overrides=overrides, recipe="vapsr_x2", dataset_dir=(Path({str(dataset)!r}),)
                ))
                found.append("nothing")
            except UserError as error:
                found.append(str(error))
        assert "torch" not in sys.modules
        print(json.dumps(found))
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    for found, message in zip(json.loads(done.stdout), WRONG.values(), strict=True):
        assert message in found
        assert "\n" not in found


def test_a_launcher_says_it_in_one_line(dataset: Path, tmp_path: Path) -> None:
    done = run(command(dataset, tmp_path / "run", "ds.optimizer.type=AdmaW", procs=2))
    assert_one_line(done, "no optimizer 'AdmaW'; did you mean 'AdamW'?")
    assert not (tmp_path / "run").exists()


def test_a_row_that_is_added_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blank(torch.nn.Module):
        def __init__(self, *, scale: int, depth: int = 1) -> None:
            super().__init__()

    monkeypatch.setitem(models.GENERATORS, "blank", Blank)
    assert load_recipe(
        "vapsr_x2", {"generator": {"name": "blank", "depth": 2}}
    ).generator.params == {"depth": 2}
    with pytest.raises(
        UserError, match="network 'blank' has no parameter 'dept'; did you mean 'depth'"
    ):
        load_recipe("vapsr_x2", {"generator": {"name": "blank", "dept": 2}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"generator": "vapsrr"}, "no network named 'vapsrr'; did you mean 'vapsr'?"),
        (
            {"generator.num_blokcs": 3},
            "network 'vapsr' has no parameter 'num_blokcs'; did you mean 'num_blocks'?",
        ),
        ({"generator.scale": 2}, "network 'vapsr' has no parameter 'scale'"),
        ({"generator": {"name": "spandrel"}}, "network 'spandrel' needs the parameter 'arch'"),
        ({"losses": {"charbonier": 1}}, "no loss named 'charbonier'; did you mean 'charbonnier'?"),
        (
            {"losses": {"charbonnier": {"weight": 1, "epsilom": 1}}},
            "has no parameter 'epsilom'; did you mean 'epsilon'?",
        ),
        (
            {"losses": {"l1": {"weigth": 1}}},
            "loss 'l1' has no parameter 'weigth'; did you mean 'weight'?",
        ),
    ],
)
def test_a_wrong_name_is_one_line(overrides: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("vapsr_x2", overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_stage_is_named() -> None:
    with pytest.raises(
        UserError, match=r"stage gan: .*no discriminator named 'vggg'; did you mean 'vgg'"
    ):
        load_stages("srgan_x4", {"stages.gan.adversarial.discriminator": {"name": "vggg"}})
