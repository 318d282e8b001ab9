"""Distillation: the losses against a teacher, and runs with one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from comparison import checkpoint_differences, logged
from lives import output_of, start, train
from pipeline.config.specs import TeacherSpec
from pipeline.models import build_generator
from pipeline.models.weights import SavedNetwork, write_network
from pipeline.run_folder import checkpoint_dir, checkpoint_steps
from pipeline.training.teacher import Teacher, affinity

NETWORKS: dict[str, dict[str, Any]] = {
    "vapsr": {"num_features": 10, "num_attention_features": 16, "num_blocks": 1},
    "srresnet": {"num_features": 10, "num_blocks": 1},
    "msrresnet": {"num_features": 10, "num_blocks": 1},
    "rrdbnet": {"num_features": 10, "num_grow_ch": 8, "num_blocks": 1},
    "compact": {"num_features": 10, "num_conv": 1},
    "spandrel": {"arch": "SPAN", "feature_channels": 10},
}


def network_of(name: str, scale: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_generator(name, scale, **NETWORKS[name])


def test_affinities_are_cosines_between_positions() -> None:
    features = torch.randn(2, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    found = affinity(features, 4).detach()
    flat = features.detach().numpy().reshape(2, 5, 16)
    for image in range(2):
        for i in range(16):
            for j in range(16):
                one, other = flat[image, :, i], flat[image, :, j]
                cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
                assert abs(float(found[image, i, j]) - cosine) < 1e-12
    assert torch.autograd.gradcheck(lambda one: affinity(one, 2), features)
    # Sides above 24 are averaged in blocks, the last of which may be smaller.
    assert affinity(torch.randn(1, 4, 50, 50), 50).shape == (1, 17 * 17, 17 * 17)
    assert affinity(torch.randn(1, 4, 48, 48), 12).shape == (1, 12 * 12, 12 * 12)
    assert affinity(torch.zeros(1, 4, 2, 2), 2).abs().max() == 0


@pytest.mark.parametrize("student", NETWORKS)
def test_the_teachers_terms_and_their_gradients(student: str) -> None:
    """For any two networks: the output of the teacher, and the affinities of its features."""
    network, master = network_of(student), network_of("vapsr", seed=1)
    spec = TeacherSpec(file="x", weight=0.5, feature_weight=2.0)
    teacher = Teacher(master, network, spec, lr_side=12)
    lr = torch.rand(2, 3, 12, 12)
    sr = network(lr)
    terms = teacher.losses(sr, lr)
    with torch.no_grad():
        expected = master(lr)
    torch.testing.assert_close(terms["teacher"], 0.5 * (sr - expected).abs().mean())
    assert terms["teacher_features"] > 0
    sum(terms.values()).backward()
    assert not any(parameter.requires_grad for parameter in master.parameters())
    learnt = [p.grad for p in network.parameters() if p.requires_grad and p.grad is not None]
    assert any(gradient.abs().max() > 0 for gradient in learnt)
    # A teacher of itself has nothing to teach.
    same = network_of(student).eval()
    twin = Teacher(network_of(student), same, spec, lr_side=12)
    assert max(float(term.detach()) for term in twin.losses(same(lr), lr).values()) < 1e-5


def test_features_are_those_before_a_network_upscales() -> None:
    for name in NETWORKS:
        for scale in (2, 4):
            network = network_of(name, scale)
            teacher = Teacher(
                network_of("compact", scale),
                network,
                TeacherSpec(file="x", weight=0, feature_weight=1),
                lr_side=8,
            )
            network(torch.rand(1, 3, 8, 8))
            features = teacher._features["student"]
            # RRDBNet x2 unshuffles its input by 2.
            side = 4 if (name, scale) == ("rrdbnet", 2) else 8
            assert features.shape[-2:] == (side, side), name
            # VapSR's and SRResNet's upsamplers begin with a convolution at LR's size.
            wider = {"vapsr": (56, 64), "srresnet": (10, 40), "msrresnet": (10, 40)}.get(name, ())
            assert features.shape[1] in (10, *wider), (name, scale)


def test_a_teacher_needs_a_weight() -> None:
    with pytest.raises(ValueError, match="both 0"):
        TeacherSpec(file="x", weight=0)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


def write_teacher(file: Path, scale: int = 2, seed: int = 3) -> Path:
    network = network_of("compact", scale, seed)
    saved = SavedNetwork("compact", scale, NETWORKS["compact"], network.state_dict())
    write_network(file, saved)
    return file


def test_a_run_with_a_teacher_continues_exactly(
    dataset: Path, tmp_path: Path, teacher_file: Path
) -> None:
    mine = tmp_path / "mine.safetensors"
    shutil.copy(teacher_file, mine)
    teaching = (f"teacher={{file: {mine}, weight: 0.5, feature_weight: 0.1}}", "steps=5", "keep=9")
    straight = tmp_path / "straight"
    train(dataset, straight, *teaching)
    shutil.copytree(straight, tmp_path / "killed")
    for step in checkpoint_steps(straight)[1:]:
        shutil.rmtree(checkpoint_dir(tmp_path / "killed", step))
    train(dataset, tmp_path / "killed", *teaching)
    assert checkpoint_differences(straight, tmp_path / "killed", 5) == []
    # Both terms are logged, and they count: without a teacher other weights are learnt.
    terms = logged(straight, "train", "loss_teacher", "loss_teacher_features", "loss_l1", "loss")
    for _, *values in terms:
        assert all(value > 0 for value in values)
        assert sum(values[:3]) == pytest.approx(values[3], rel=1e-5)
    # Another teacher in the same file is another run.
    write_teacher(mine, seed=4)
    assert "the weights in teacher.file have changed" in refused(
        dataset, straight, *teaching[:1], "steps=9"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nowhere.pth", "teacher.file: nowhere.pth does not exist; give a weights file or a run"),
        ("x4", "but this recipe trains x2; a teacher must have the same scale"),
        ("own", "is in this run's own folder"),
    ],
)
def test_a_wrong_teacher_is_refused_before_anything_is_moved(
    dataset: Path, tmp_path: Path, given: str, said: str
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "log.jsonl").write_text("{}\n")
    files = {
        "x4": write_teacher(tmp_path / "x4.safetensors", scale=4),
        "own": write_teacher(run_dir / "own.safetensors"),
    }
    assert said in refused(dataset, run_dir, f"teacher.file={files.get(given, given)}")
    assert sorted(path.name for path in run_dir.iterdir()) == ["log.jsonl", "own.safetensors"]


def refused(dataset: Path, run_dir: Path, *overrides: str) -> str:
    """Start a run, which must be refused; return what it said."""
    (process,) = start(dataset, run_dir, *overrides)
    process.join(120)
    printed = output_of(run_dir).read_text().splitlines()[-1]
    assert process.exitcode == 2, printed
    return printed
