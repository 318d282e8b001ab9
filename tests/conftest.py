"""Shared by all tests: the checkout on the path, CPU settings, and small datasets and runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

import warm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the tests run on the CPU, on every machine
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# as under `./run_tests.sh &` and `nohup ./run_tests.sh`: what tests start would ignore them
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# more threads than cores: they wait
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

from benchmarks.small_runs import photograph  # noqa: E402 (found on the path set above)

SLOW = ROOT / "tests" / "slow.txt"
"""Tests that take more than a second, one `file::function` per line; `./run_tests.sh fast` skips
them."""


FIRST = ("launch/cluster/test_cluster.py", "checkpoint/test_kill.py", "training/test_overfit.py")
"""Files with few tests that take minutes, longest first. The files with the most tests follow."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in `SLOW`, and order the files so that all processes stay busy to the end."""
    listed = set(SLOW.read_text(encoding="utf-8").split())
    for item in items:
        name = (
            f"{item.path.relative_to(ROOT).as_posix()}::{getattr(item, 'originalname', item.name)}"
        )
        if name in listed:
            item.add_marker(pytest.mark.slow)
    tests = Counter(item.path for item in items)
    first = {ROOT / "tests" / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: (first.get(item.path, len(first)), -tests[item.path], item.path))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 10 training and 3 validation `.npy` files of different sizes, with lists."""
    root = tmp_path_factory.mktemp("dataset")
    names = []
    for i in range(13):
        name = f"photos/{i:02d}.npy"
        (root / name).parent.mkdir(exist_ok=True)
        np.save(root / name, photograph(i, 64 + 2 * i, 96 - 3 * i))
        names.append(name)
    (root / "training_file_list.txt").write_text("".join(f"{name}\n" for name in names[:10]))
    (root / "validation_file_list.txt").write_text("".join(f"{name}\n" for name in names[10:]))
    return root


@pytest.fixture(scope="session")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with random weights of VGG16's features."""
    return _random_trunk(tmp_path_factory.mktemp("trunks") / "vgg16.pth", "VGG16_BLOCKS")


@pytest.fixture(scope="session")
def vgg19(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with random weights of VGG19's features."""
    return _random_trunk(tmp_path_factory.mktemp("trunks") / "vgg19.pth", "VGG19_BLOCKS")


def _random_trunk(path: Path, blocks: str) -> str:
    import torch

    from fabricate import random_vgg
    from pipeline.losses import trunks

    torch.save(random_vgg(getattr(trunks, blocks)), path)
    return str(path)


SMALL = (
    "data.crop=32",
    "ds.train_batch_size=4",
    "generator.num_blocks=1",
    "generator.num_features=8",
    "generator.num_attention_features=8",
    "compile=off",
    "channels_last=on",
    "native_kernels=off",
    "log_every=1",
    "validate_every=4",
    "save_every=3",
    "previews.count=0",
    "ds.scheduler.params.total_num_steps=20",
    "ds.scheduler.params.warmup_num_steps=2",
)
"""Overrides of the demo recipe for runs of about a second."""


def environment(threads: int = 1) -> dict[str, str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return {**kept, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def command(dataset: Path, run_dir: Path, *extra: str, procs: int = 1) -> list[str]:
    """Return the command line of a small training run."""
    return [
        warm.python(),
        str(ROOT / "launch" / "local.py"),
        "--procs",
        str(procs),
        "--recipe",
        "demo",
        "--dataset-dir",
        str(dataset),
        "--output-dir",
        str(run_dir),
        *SMALL,
        *extra,
    ]


def run(arguments: list[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with its output as text."""
    return subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def run_python(
    code: str,
    *arguments: str,
    flags: Sequence[str] = (),
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new interpreter with these `flags`, with its output as text."""
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code), *arguments],
        env=environment() if env is None else env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
