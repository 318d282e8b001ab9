"""The names that a recipe may use: known without torch, the same as the tables, and each misspelling is one line."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from conftest import ROOT, environment
from pipeline import losses, models
from pipeline.cli import UserError
from pipeline.config import names
from pipeline.config.recipe import load_recipe, load_stages
from pipeline.losses import adversarial
from pipeline.models import discriminators

TABLES = {"NETWORKS": models.GENERATORS, "DISCRIMINATORS": discriminators.DISCRIMINATORS, "LOSSES": losses.LOSSES,
          "ADVERSARIAL_LOSSES": adversarial.ADVERSARIAL_LOSSES}


def test_what_is_read_from_the_sources_is_what_the_tables_hold() -> None:
    """In a process that never imports torch."""
    code = f"""
        import dataclasses, json, sys
        from pipeline.config import names
        found = {{table: {{name: dataclasses.asdict(row) for name, row in getattr(names, table).rows().items()}}
                 for table in {list(TABLES)!r}}}
        assert "torch" not in sys.modules
        print(json.dumps(found))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment(), cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for table, real in TABLES.items():
        live = getattr(names, table).rows()
        assert list(found[table]) == list(live) == list(real)
        for name, row in live.items():
            assert {**vars(row), "parameters": list(row.parameters), "required": list(row.required)} == (
                found[table][name]), name
    assert found["NETWORKS"]["spandrel"]["takes_any"]
    assert found["NETWORKS"]["spandrel"]["required"] == ["arch"]
    assert found["ADVERSARIAL_LOSSES"]["hinge"]["flags"] == {"takes_labels": False, "sees_real": False}


def test_a_row_that_is_added_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blank(torch.nn.Module):
        def __init__(self, *, scale: int, depth: int = 1) -> None:
            super().__init__()

    monkeypatch.setitem(models.GENERATORS, "blank", Blank)
    assert load_recipe("vapsr_x2", {"generator": {"name": "blank", "depth": 2}}).generator.params == {"depth": 2}
    with pytest.raises(UserError, match="network 'blank' has no parameter 'dept'; did you mean 'depth'"):
        load_recipe("vapsr_x2", {"generator": {"name": "blank", "dept": 2}})


@pytest.mark.parametrize(("overrides", "message"), [
    ({"generator": "vapsrr"}, "no network named 'vapsrr'; did you mean 'vapsr'?"),
    ({"generator.num_blokcs": 3}, "network 'vapsr' has no parameter 'num_blokcs'; did you mean 'num_blocks'?"),
    ({"generator.scale": 2}, "network 'vapsr' has no parameter 'scale'"),
    ({"generator": {"name": "spandrel"}}, "network 'spandrel' needs the parameter 'arch'"),
    ({"losses": {"charbonier": 1}}, "no loss named 'charbonier'; did you mean 'charbonnier'?"),
    ({"losses": {"charbonnier": {"weight": 1, "epsilom": 1}}}, "has no parameter 'epsilom'; did you mean 'epsilon'?"),
    ({"losses": {"l1": {"weigth": 1}}}, "loss 'l1' has no parameter 'weigth'; did you mean 'weight'?"),
])
def test_a_wrong_name_is_one_line(overrides: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("vapsr_x2", overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_stage_is_named() -> None:
    with pytest.raises(UserError, match=r"stage gan: .*no discriminator named 'vggg'; did you mean 'vgg'"):
        load_stages("srgan_x4", {"stages.gan.adversarial.discriminator": {"name": "vggg"}})
