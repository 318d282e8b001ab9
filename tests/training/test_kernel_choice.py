"""Which kernel a run uses and keeps, and that on a CPU it is compiled only on request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from comparison import logged
from conftest import ROOT
from lives import train
from pipeline.checkpoint.progress import Progress, read_progress
from pipeline.cli import UserError
from pipeline.distributed.ranks import Ranks
from pipeline.models import build_generator, native
from pipeline.training import setup
from pipeline.training.options import TrainOptions, TrainPlan, make_plans

needs_native = pytest.mark.skipif(
    bool(native.why_not_native()), reason=f"no native kernel: {native.why_not_native()}"
)


def plan_of(dataset: Path, *overrides: str) -> TrainPlan:
    return make_plans(
        TrainOptions(
            overrides=("data.crop=32", *overrides),
            recipe="demo",
            dataset_dir=(dataset,),
            output_dir=dataset / "nowhere",
        )
    )[0]


def network() -> torch.nn.Module:
    return build_generator("vapsr", 2, num_features=8, num_attention_features=8, num_blocks=1)


@needs_native
def test_a_run_goes_on_with_the_kernel_it_began_with(dataset: Path, tmp_path: Path) -> None:
    """Even if the key is missing from the command or set to off, which does not make it another
    run."""
    printed = train(dataset, tmp_path / "run", "steps=2", "native_kernels=on")
    assert "depthwise convolutions: our own C++ kernel" in printed
    assert read_progress(tmp_path / "run", 2).kernel == "native"
    printed = train(dataset, tmp_path / "run", "steps=3", "native_kernels=auto")
    assert "continuing from step 2" in printed
    assert "depthwise convolutions: our own C++ kernel" in printed
    assert read_progress(tmp_path / "run", 3).kernel == "native"
    train(dataset, tmp_path / "run", "steps=4", "native_kernels=off")
    assert read_progress(tmp_path / "run", 4).kernel == "torch"
    printed = train(dataset, tmp_path / "run", "steps=5", "native_kernels=auto")
    assert "depthwise" not in printed
    assert read_progress(tmp_path / "run", 5).kernel == "torch"


@needs_native
def test_both_kernels_learn_the_same_but_for_rounding(dataset: Path, tmp_path: Path) -> None:
    for way in ("on", "off"):
        train(
            dataset,
            tmp_path / way,
            "steps=4",
            "generator.global_residual=none",
            f"native_kernels={way}",
        )
    ours, theirs = (
        logged(tmp_path / way, "train", "loss", "gradient_norm") for way in ("on", "off")
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    # Both validate with the same kernel, so only the rounding of the weights differs.
    scores = [logged(tmp_path / way, "validation", "psnr_y") for way in ("on", "off")]
    assert scores[0][-1] == pytest.approx(scores[1][-1], abs=1e-3)


def test_a_checkpoint_that_names_no_kernel_is_of_pytorchs(dataset: Path) -> None:
    saved = (
        Path(ROOT) / "tests/fixtures/runs-before-the-house/gan/checkpoints/step-00000003/state.json"
    )
    began = Progress.from_state(json.loads(saved.read_text()))
    assert began.kernel == ""
    for asked in ("auto", "on"):
        plan = plan_of(dataset, f"native_kernels={asked}")
        assert setup._kernel(plan, network(), 2, began, Ranks()) == ("torch", "")


def test_without_a_compiler_pytorch_computes_and_the_run_says_why(
    dataset: Path, monkeypatch
) -> None:
    monkeypatch.setattr(
        native, "why_not_native", lambda: "there is no C++ compiler (Debian: apt install g++)"
    )
    kernel, remark = setup._kernel(plan_of(dataset), network(), 2, None, Ranks())
    assert kernel == "torch"
    assert remark == (
        "depthwise convolutions: PyTorch's kernel, slower than our C++ kernel: there is no C++ "
        "compiler (Debian: apt install g++)"
    )
    kernel, remark = setup._kernel(
        plan_of(dataset), network(), 2, Progress(kernel="native"), Ranks()
    )
    assert kernel == "torch"
    assert "rounds differently" in remark
    with pytest.raises(UserError, match="native_kernels: on, but there is no C"):
        setup._kernel(plan_of(dataset, "native_kernels=on"), network(), 2, None, Ranks())


def test_networks_without_such_convolutions_ask_for_no_compiler(dataset: Path, monkeypatch) -> None:
    monkeypatch.setattr(native, "why_not_native", None)  # calling it would fail
    other = build_generator("compact", 2, num_features=4, num_conv=1)
    assert setup._kernel(plan_of(dataset, "native_kernels=on"), other, 2, None, Ranks()) == (
        "torch",
        "",
    )
    assert setup._kernel(plan_of(dataset, "native_kernels=off"), network(), 2, None, Ranks()) == (
        "torch",
        "",
    )
    assert setup._kernel(plan_of(dataset, "compile=on"), network(), 2, None, Ranks()) == (
        "torch",
        "",
    )


def test_on_a_cpu_auto_does_not_compile_but_old_runs_go_on_as_they_began(
    dataset: Path, monkeypatch
) -> None:
    compiled = []
    monkeypatch.setattr(setup, "compile_module", lambda module, **_: compiled.append(module))
    monkeypatch.setattr(setup, "why_not_compiled", lambda _: "")
    recipe = plan_of(dataset).recipe
    for began in (None, Progress(kernel="torch"), Progress(kernel="native")):
        said = setup._compile(network(), recipe, Ranks(), began, channels_last=True)
        assert (said, compiled) == ("not compiled (compile: auto, on a CPU)", [])
    setup._compile(network(), recipe, Ranks(), Progress(layout="channels_last"), channels_last=True)
    assert len(compiled) == 1
    setup._compile(
        network(), plan_of(dataset, "compile=on").recipe, Ranks(), None, channels_last=True
    )
    assert len(compiled) == 2


def test_trunks_of_losses_are_compiled_with_the_networks_but_without_cuda_graphs(
    dataset: Path, vgg16: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = {}
    monkeypatch.setattr(setup, "_uses_cuda_graphs", lambda *_: True)
    monkeypatch.setattr(
        setup, "compile_module", lambda module, **how: compiled.update({module: how})
    )
    monkeypatch.setattr(setup, "why_not_compiled", lambda _: "")
    for compile, number in (("off", 0), ("on", 1)):
        losses = f"losses={{l1: 1, dists: {{weight: 1, weights: {vgg16}}}}}"
        plan = plan_of(dataset, f"compile={compile}", losses)
        trainer = setup._trainer(plan, None, None, Ranks(), "channels_last", None, None)
        assert len(compiled) == number
    (trunk,) = trainer.criterion.trunks
    assert compiled == {trunk: {"channels_last": True, "mode": None}}
    setup._compile(network(), plan.recipe, Ranks(), None, channels_last=True)
    assert [how["mode"] for how in compiled.values()] == [None, "reduce-overhead"]
