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
from safetensors.torch import load_file

import warm
from comparison import checkpoint_differences, logged
from conftest import SMALL
from pipeline.cli import UserError
from pipeline.config.recipe import load_recipe, recipe_differences
from pipeline.models import build_generator
from pipeline.models.common import checkpoint_activations
from pipeline.run_folder import checkpoint_dir, checkpoint_steps
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

    whole = ReconstructionTrainer.step

    def full_from_2(self: Any, batch: Any, number: int) -> Any:
        if number >= 2 and len(batch.hr) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, batch, number)

    memory.REHEARSED = () if change in ("no rehearsal", "room for two crops") else ("cpu",)
    if change == "room for two crops":
        ReconstructionTrainer.step = full_from_2  # type: ignore[method-assign]
    if change in ("no room in the second stage", "no room anywhere"):
        AdversarialTrainer.step = full  # type: ignore[method-assign]
    if change in ("no room in the first stage", "no room anywhere"):
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

    def train(change: str, *overrides: str, recipe: str = "two") -> tuple[int | None, Path, str]:
        run_dir, output = tmp_path / change, tmp_path / f"{change}.output"
        process = warm.Fork(
            _train,
            str(tmp_path / f"{recipe}.yaml"),
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
            "error: stage gan: rank 0: a micro-batch of 1 crops of 32x32 does not fit into this "
            "machine's memory; set activation_checkpointing=on (slower), or a smaller data.crop or "
            "ds.train_batch_size\n",
        ),
        ("first", "error: stage psnr: rank 0: a micro-batch of 1 crops of 32x32 does not fit into"),
    ],
)
def test_what_does_not_fit_says_what_would(trained, which: str, line: str) -> None:
    status, run_dir, output = trained(f"no room in the {which} stage")
    assert status == 1, output
    assert line in output
    assert "Traceback" not in output
    assert checkpoint_steps(run_dir / "psnr") == checkpoint_steps(run_dir / "gan") == []
    for micro in (2, 1):
        assert f"using micro-batches of {micro} and {4 // micro} of them per update" in output


def test_a_run_that_does_not_fit_goes_on_in_smaller_parts(trained, tmp_path: Path) -> None:
    """Memory runs out after two updates: the samples and, but for rounding, the weights are those
    of a run for which there was room. The run remembers what fits."""
    (tmp_path / "one.yaml").write_text("base: demo\nname: one\nsteps: 5\n")
    status, split, output = trained("room for two crops", recipe="one")
    assert status == 0, output
    assert output.count("using micro-batches of 2 and 2 of them per update") == 1
    status, whole, _ = trained("no rehearsal", recipe="one")
    assert status == 0
    ours, theirs = (
        load_file(checkpoint_dir(run_dir, 5) / "generator.safetensors")
        for run_dir in (split, whole)
    )
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-3, atol=1e-6), name
    for (step, loss), (_, wanted) in zip(
        logged(split, "train", "loss"), logged(whole, "train", "loss"), strict=True
    ):
        assert loss == pytest.approx(wanted, rel=1e-4), step
    status, _, output = trained("room for two crops", "steps=6", recipe="one")
    assert status == 0, output
    assert "global batch 4 = 2 x 2 accumulation" in output
    assert "using micro-batches" not in output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            "generator={name: srresnet, num_features: 8, num_blocks: 1}",
            "the generator has batch norm",
        ),
        (
            "adversarial={weight: 0.01, loss: relativistic_average, discriminator: {name: unet, "
            "num_features: 4}}",
            "adversarial.loss relativistic_average compares each sample with the mean of its",
        ),
    ],
)
def test_what_depends_on_the_micro_batch_is_not_split(
    trained, tmp_path: Path, change: str, reason: str
) -> None:
    (tmp_path / "one.yaml").write_text("base: demo\nname: one\nsteps: 5\n")
    status, run_dir, output = trained("no room anywhere", change, recipe="one")
    assert status == 1, output
    assert reason in output
    assert "over 2 samples instead of 4" in output
    assert not (run_dir / "memory.json").exists()
