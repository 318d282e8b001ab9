"""N steps in one run, and k steps, a stop and N - k steps in a new process, give bit-equal
results."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comparison import (
    BF16,
    SCHEDULE_FREE,
    UNET,
    assert_resumed_is_straight,
    checkpoint_differences,
    logged,
)
from conftest import command, environment, run
from lives import train
from pipeline.engine.engine import why_not_compiled
from pipeline.models import native
from pipeline.run_folder import checkpoint_dir, checkpoint_steps

FEW_KERNELS = "generator={name: compact, num_features: 8, num_conv: 1}"  # quick to compile
CHAIN = "data.degradation={name: compressed_video, surroundings: 16}"
MIXED = ("data.mixing={probability: 0.7, kinds: [mixup, cutmix, resizemix]}", "losses.ldl=1")
GAN = (
    "adversarial={weight: 0.01, discriminator: {name: vgg, num_features: 4}, labels: {noise: 0.1, "
    "flip: 0.1}, "
    "instance_noise: {sigma: 0.1, steps: 20}}",
)


@pytest.mark.parametrize(
    ("procs", "extra"),
    [
        (1, ()),
        (1, BF16),
        (2, ()),
        (2, ("native_kernels=on", "generator.global_residual=none")),
        (2, BF16),
        (1, ("ds.gradient_accumulation_steps=2", "ds.optimizer.type=Adam", *MIXED)),
        (2, ("ds.zero_optimization.stage=1", CHAIN)),
        (2, ("ds.zero_optimization.stage=2", *BF16)),
        (1, SCHEDULE_FREE),
        (1, (*GAN, "losses.ldl=1")),
        (2, ("ds.zero_optimization.stage=2", "ds.gradient_accumulation_steps=2", *BF16, *GAN)),
        (2, ("generator={name: srresnet, num_features: 8, num_blocks: 2}", *UNET)),
    ],
    ids=[
        "fp32-1",
        "bf16-1",
        "fp32-2",
        "native-2",
        "bf16-2",
        "accumulation-mixing-ldl",
        "zero1-chain-2",
        "zero2-bf16-2",
        "schedule-free",
        "gan-ldl-1",
        "gan-zero2-bf16-2",
        "batch-norm-unet-2",
    ],
)
def test_resume_is_exact(dataset: Path, tmp_path: Path, procs: int, extra: tuple[str, ...]) -> None:
    """10 files in batches of 4: step 3 is in the middle of an epoch, and two epochs end in steps 3
    to 8."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    if "native_kernels=on" in extra and native.why_not_native():
        pytest.skip(native.why_not_native())
    train(dataset, straight, "steps=8", "keep=9", *extra, procs=procs)
    train(dataset, broken, "steps=3", "keep=9", *extra, procs=procs)
    assert checkpoint_steps(broken) == [3]
    assert "continuing from step 3 of 8" in train(
        dataset, broken, "steps=8", "keep=9", *extra, procs=procs
    )
    assert_resumed_is_straight(straight, broken)
    if procs > 1:
        own = [
            torch.load(checkpoint_dir(straight, 8) / f"random-rank-0000{rank}.pt")["torch"]
            for rank in range(2)
        ]
        assert not torch.equal(*own), "each rank must draw its own labels and noise"


@pytest.mark.parametrize(
    ("procs", "extra"),
    [(2, ()), (1, ("compile=on", "channels_last=auto", FEW_KERNELS))],
    ids=["launcher-2", "compiled"],
)
def test_resume_is_exact_by_the_command(
    dataset: Path, tmp_path: Path, procs: int, extra: tuple[str, ...]
) -> None:
    """The same through train.py's command line and the deepspeed launcher."""
    lacking = why_not_compiled(torch.device("cpu"))
    if "compile=on" in extra and lacking:
        pytest.skip(lacking)
    for run_dir, last in (("straight", 8), ("broken", 3), ("broken", 8)):
        done = run(
            command(dataset, tmp_path / run_dir, f"steps={last}", "keep=9", *extra, procs=procs)
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing from step 3 of 8" in done.stdout
    assert_resumed_is_straight(tmp_path / "straight", tmp_path / "broken")


def assert_nearly_equal(one: Path, other: Path, step: int) -> None:
    first, second = (
        load_file(checkpoint_dir(run_dir, step) / "generator.safetensors")
        for run_dir in (one, other)
    )
    for name, weights in first.items():
        torch.testing.assert_close(second[name], weights, rtol=1e-4, atol=1e-5)


def test_ranks_may_come_and_go(dataset: Path, tmp_path: Path) -> None:
    """Two ranks learn what one does, and a checkpoint continues on another number of ranks, up to
    rounding."""
    for name, lives in (("one", [(1, 6)]), ("two", [(2, 6)]), ("mixed", [(2, 3), (1, 5), (2, 6)])):
        for procs, last in lives:
            train(dataset, tmp_path / name, f"steps={last}", procs=procs)
    for other in ("two", "mixed"):
        assert_nearly_equal(tmp_path / "one", tmp_path / other, 6)
        for (step, a), (_, b) in zip(
            logged(tmp_path / "one", "train", "loss"),
            logged(tmp_path / other, "train", "loss"),
            strict=True,
        ):
            assert a == pytest.approx(b, rel=1e-4), f"loss of step {step}"


def interrupted(
    arguments: list[str], run_dir: Path, numbers: list[int], after_step: int
) -> tuple[int, str, float]:
    """Start a run, wait for the log line of `after_step`, and send the signals; return (exit
    status, output, seconds it took to end)."""
    # In a fresh interpreter: a forked launcher would have to unload DALI when the second signal
    # comes.
    process = subprocess.Popen(
        [sys.executable, *arguments[1:]],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 90
    log = run_dir / "log.jsonl"
    while not (log.is_file() and f'"step": {after_step},' in log.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.02)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    return process.returncode, output, time.monotonic() - began


@pytest.mark.parametrize(
    ("procs", "numbers", "status"),
    [
        (1, [signal.SIGINT], 130),
        (1, [signal.SIGTERM], 143),
        (2, [signal.SIGINT, signal.SIGINT], 130),
    ],
    ids=["int-1", "term-1", "double-int-2"],
)
def test_a_signal_saves_and_the_next_start_continues_exactly(
    dataset: Path, tmp_path: Path, procs: int, numbers: list[int], status: int
) -> None:
    rare = ("save_every=100000", "validate_every=100000")
    code, output, _ = interrupted(
        command(dataset, tmp_path / "run", "steps=200000", *rare, procs=procs),
        tmp_path / "run",
        numbers,
        5,
    )
    assert code == status, output
    assert "stopped and saved at step" in output
    assert "Traceback" not in output
    (stopped,) = checkpoint_steps(tmp_path / "run")
    end = stopped + 3
    printed = train(dataset, tmp_path / "run", f"steps={end}", *rare, procs=procs)
    assert f"continuing from step {stopped} of {end}" in printed
    train(dataset, tmp_path / "straight", f"steps={end}", *rare, procs=procs)
    assert checkpoint_differences(tmp_path / "straight", tmp_path / "run", end) == []


def test_patience_survives_a_resume(dataset: Path, tmp_path: Path) -> None:
    """With a learning rate near zero the PSNR does not change, so every validation but the first is
    stale."""
    still = ("ds.optimizer.params.lr=1e-12", "validate_every=2", "patience=3", "ema_decay=0")
    done = run(command(dataset, tmp_path / "run", *still, "steps=4"))
    assert done.returncode == 0
    psnrs = logged(tmp_path / "run", "validation", "stale_validations")
    assert psnrs == [(2, 0), (4, 1)]
    done = run(command(dataset, tmp_path / "run", *still, "steps=100"))
    assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "run", "validation", "stale_validations") == [
        (2, 0),
        (4, 1),
        (6, 2),
        (8, 3),
    ]
    assert "finished at step 8" in done.stdout
    again = run(command(dataset, tmp_path / "run", *still, "steps=100"))
    assert again.returncode == 0
    assert "nothing left to do: this run is finished at step 8 of 100" in again.stdout


def test_max_epochs_and_patience_are_options(dataset: Path, tmp_path: Path) -> None:
    done = run(
        command(dataset, tmp_path / "run", "--max-epochs", "2", "--log-dir", str(tmp_path / "logs"))
    )
    assert done.returncode == 0
    assert checkpoint_steps(tmp_path / "run")[-1] == 5  # 20 samples in batches of 4
    assert logged(tmp_path / "logs")[-1] == (5,)
    assert list((tmp_path / "logs" / "tensorboard").iterdir())


def test_a_signal_in_the_last_validation_leaves_it_to_the_next_start(
    dataset: Path, tmp_path: Path
) -> None:
    """Repeating an image makes the last validation long; the signal comes while it runs."""
    import shutil

    root = tmp_path / "dataset"
    shutil.copytree(dataset, root)
    image = root / "photos" / "12.npy"
    copies = [f"photos/copy{i:03d}.npy" for i in range(400)]
    for name in copies:
        (root / name).hardlink_to(image)
    (root / "validation_file_list.txt").write_text("".join(f"{name}\n" for name in copies))
    arguments = command(root, tmp_path / "run", "steps=5", "validate_every=100", "save_every=100")
    code, output, _ = interrupted(arguments, tmp_path / "run", [signal.SIGTERM], 5)
    assert code == 143, output
    assert "stopped and saved at step 5" in output
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert [step for step, *_ in logged(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert [step for step, *_ in logged(tmp_path / "run", "validation")] == [5]
    assert "finished at step 5" in done.stdout
    assert "nothing left to do" in run(arguments).stdout
