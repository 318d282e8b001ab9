"""Check that a run killed with SIGKILL and continued is bit-identical to an uninterrupted one."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from launch.selfcheck.report import Report
from launch.selfcheck.runs import TrainingRun
from tools.make_demo_dataset import make_demo_dataset

STEPS, KILLED_AT = 12, 6
COMMON = (
    f"steps={STEPS}",
    f"save_every={KILLED_AT // 2}",
    "save_minutes=1000",
    "validate_every=1000",
    "log_every=1",
    "validation_images=1",
    "previews=[]",
    "channels_last=on",
    "native_kernels=off",
    "keep=10",
)
SMALL = (
    "generator.num_blocks=1",
    "generator.num_features=8",
    "generator.num_attention_features=8",
    "data.crop=32",
    "ds.train_batch_size=4",
)


def run(report: Report) -> None:
    """Check the default settings and, on a GPU, also `compile` and `deterministic`."""
    dataset = make_demo_dataset(report.scratch / "demo").dataset_dir
    ways = {"default": ("compile=off",)}
    if report.is_on_gpu:
        ways |= {
            "deterministic": ("compile=off", "deterministic=on"),
            "compiled": ("compile=auto",),
        }
    else:
        report.skip("deterministic", "on a CPU every run is bit-identical")
    took = 0.0
    for name, overrides in ways.items():
        if not report.has_time_for(took):
            report.skip(name, "out of time for this section")
            continue
        began = time.monotonic()
        with report.guarded(name):
            own = (*COMMON, *(SMALL if report.is_small else ()), *overrides)
            same = _is_exact(report, dataset, report.scratch / name, own)
            # By default a GPU gives no guarantee: cuDNN's gradients and atomic additions may differ
            # from run to run.
            must = not report.is_on_gpu or name == "deterministic"
            report.fact(
                name,
                same if must else None,
                "bit-identical" if same else "different",
                limit="bit-identical" if must else "",
                note=f"{STEPS} steps at once; {KILLED_AT}, kill -9 and the rest",
            )
        took = time.monotonic() - began


def _is_exact(report: Report, dataset: Path, folder: Path, overrides: tuple[str, ...]) -> bool:
    patience = max(60.0, report.left)
    straight = TrainingRun(folder / "straight", dataset, overrides)
    straight.finish(patience)
    killed = TrainingRun(folder / "killed", dataset, overrides)
    process = killed.start()
    try:
        killed.wait_for_step(process, KILLED_AT, patience)
    finally:
        killed.kill(process, signal.SIGKILL)
    killed.finish(patience)
    return killed.digest(STEPS) == straight.digest(STEPS)
