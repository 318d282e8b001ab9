"""Activation checkpointing saves memory, and out-of-memory is reported with remedies before the
first stage."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import warm
from comparison import checkpoint_differences
from conftest import SMALL
from pipeline.cli import UserError
from pipeline.config.recipe import load_recipe, recipe_differences
from pipeline.models import build_generator
from pipeline.models.common import checkpoint_activations
from pipeline.run_folder import checkpoint_steps
from pipeline.training.options import TrainOptions

NETWORKS = {
    "rrdbnet": {"num_features": 8, "num_blocks": 3, "num_grow_ch": 4},
    "vapsr": {"num_features": 8, "num_attention_features": 8, "num_blocks": 3},
    "msrresnet": {"num_features": 8, "num_blocks": 3},
}
STAGES = """
base: demo
name: two
stages:
  psnr: {steps: 2}
  gan:
    steps: 2
    losses: {l1: 0.1}
    adversarial: {weight: 0.01, discriminator: {name: unet, num_features: 4}}
"""


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same_with_less_kept(name: str) -> None:
    """Counts the bytes that the forward pass keeps for the backward pass."""
    torch.manual_seed(0)
    plain = build_generator(name, 2, **NETWORKS[name]).train()
    saving = copy.deepcopy(plain)
    assert checkpoint_activations(saving) == 3
    assert saving.state_dict().keys() == plain.state_dict().keys()
    lr, kept = torch.rand(2, 3, 12, 12), []
    for network in (plain, saving):
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(lr).square().mean()
        kept.append(sum(sizes.values()))
        loss.backward()
    for (parameter, a), (_, b) in zip(
        plain.named_parameters(), saving.named_parameters(), strict=True
    ):
        assert torch.equal(a.grad, b.grad), parameter
    assert kept[1] < (0.9 if name == "msrresnet" else 0.7) * kept[0]
    with torch.inference_mode():
        assert torch.equal(plain.eval()(lr), saving.eval()(lr))


def test_batch_norms_must_not_count_twice() -> None:
    assert checkpoint_activations(build_generator("srresnet", 2, num_features=8, num_blocks=3)) == 0
    assert checkpoint_activations(build_generator("compact", 2, num_conv=3)) == 0, (
        "single layers keep what they need"
    )


def test_a_run_may_begin_to_save_memory_half_way() -> None:
    plain, saving = (
        load_recipe("demo", {"activation_checkpointing": value}) for value in ("off", "on")
    )
    assert recipe_differences(plain, saving) == []


def _train(
    stages: str, dataset: str, run_dir: str, output: str, overrides: list[str], change: str
) -> None:
    """Train two stages, rehearsing on a CPU as well, after making a `change` to the code."""
    from pipeline.cli import RunError
    from pipeline.training import memory
    from pipeline.training.run import main
    from pipeline.training.trainers import AdversarialTrainer, ReconstructionTrainer

    torch.set_num_threads(1)
    with open(output, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())

    def full(self: Any, batch: Any, number: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    memory.REHEARSED = ("cpu",) if change != "no rehearsal" else ()
    if change == "no room in the second stage":
        AdversarialTrainer.step = full  # type: ignore[method-assign]
    if change == "no room in the first stage":
        ReconstructionTrainer.step = full  # type: ignore[method-assign]
    try:
        sys.exit(
            main(
                TrainOptions(
                    overrides=(*SMALL, *overrides),
                    recipe=stages,
                    dataset_dir=(Path(dataset),),
                    output_dir=Path(run_dir),
                )
            )
        )
    except (UserError, RunError) as error:
        print(f"error: {error}")
        sys.exit(2)


@pytest.fixture
def trained(dataset: Path, tmp_path: Path):
    """Run the two stages; return exit status, run folder and output."""
    (tmp_path / "two.yaml").write_text(STAGES)

    def train(change: str, *overrides: str) -> tuple[int | None, Path, str]:
        run_dir, output = tmp_path / change, tmp_path / f"{change}.output"
        process = warm.Fork(
            _train,
            str(tmp_path / "two.yaml"),
            str(dataset),
            str(run_dir),
            str(output),
            list(overrides),
            change,
        )
        process.join(100)
        process.kill()
        return process.exitcode, run_dir, output.read_text()

    return train


def test_a_rehearsal_leaves_no_trace(trained) -> None:
    """The weights are bit-equal to those without a rehearsal, which is shown to make a whole
    update."""
    status, rehearsed, output = trained("a rehearsal")
    assert status == 0, output
    assert "stage gan fits into memory (tested with one update" in output
    status, plain, output = trained("no rehearsal")
    assert status == 0, output
    assert "fits into memory" not in output
    for stage in ("psnr", "gan"):
        assert checkpoint_differences(plain / stage, rehearsed / stage, 2) == []


@pytest.mark.parametrize(
    ("which", "line"),
    [
        (
            "second",
            "error: stage gan: rank 0: a micro-batch of 4 crops of 32x32 does not fit into this "
            "machine's memory; "
            "set ds.gradient_accumulation_steps=2 (the same global batch, in smaller parts), or "
            "activation_checkpointing=on (slower), or a smaller data.crop or ds.train_batch_size\n",
        ),
        ("first", "error: stage psnr: rank 0: a micro-batch of 4 crops of 32x32 does not fit into"),
    ],
)
def test_what_does_not_fit_says_what_would(trained, which: str, line: str) -> None:
    status, run_dir, output = trained(f"no room in the {which} stage")
    assert status == 1, output
    assert line in output
    assert "Traceback" not in output
    assert checkpoint_steps(run_dir / "psnr") == checkpoint_steps(run_dir / "gan") == []
