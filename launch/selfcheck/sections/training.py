"""Run the demo as a user does: start, stop with CTRL+C, continue, evaluate on held-out pictures."""

from __future__ import annotations

import json
import signal
import statistics

from launch.selfcheck.report import Report, run_script
from launch.selfcheck.runs import TrainingRun
from tools.make_demo_dataset import make_demo_dataset

STEPS, SMALL_STEPS = 150, 12
LEAST_GAIN = 1.0


def _median(training: TrainingRun, key: str) -> float:
    """Median of `key` over the run's log lines that have it; the first after a start has no
    times."""
    return statistics.median(
        line[key] for line in training.log("train") if line.get(key) is not None
    )


def run(report: Report) -> None:
    """Train, stop, continue and evaluate."""
    demo = make_demo_dataset(report.scratch / "demo")
    steps = SMALL_STEPS if report.is_small else STEPS
    overrides = [
        f"steps={steps}",
        f"save_every={steps // 3}",
        f"validate_every={steps}",
        "log_every=5",
        "previews=[]",
    ]
    if report.is_small:
        overrides += [
            "compile=off",
            "data.crop=64",
            "generator.num_blocks=2",
            "ds.train_batch_size=4",
        ]
    training = TrainingRun(report.scratch / "run", demo.dataset_dir, overrides)
    patience = max(90.0, report.left)
    process = training.start()
    training.wait_for_step(process, steps // 3, patience)
    status = training.kill(process, signal.SIGINT)
    report.fact(
        "stop",
        status in (130, 0),
        f"status {status}",
        limit="130",
        note="CTRL+C saves and ends; 0 if training was already done",
    )
    training.finish(patience)
    report.number(
        "step",
        1000 * _median(training, "step_seconds"),
        "ms",
        note="median",
        command="./launch_local_train.sh --recipe demo",
    )
    report.number("images", _median(training, "images_per_second"), "images/s", note="median")
    report.number(
        "data_wait", 100 * _median(training, "data_wait"), "%", note="of the time; steps are tiny"
    )
    file = report.scratch / "evaluation.json"
    run_script(
        [
            "evaluate.py",
            "--model",
            str(training.folder),
            "--hr",
            str(demo.held_out_dir),
            "--scale",
            "2",
            "--json",
            str(file),
            "--out",
            str(report.scratch / "pictures"),
        ],
        seconds=patience,
    )
    mean = json.loads(file.read_text(encoding="utf-8"))["mean"]
    gain = mean["model"]["psnr_y"] - mean["bicubic"]["psnr_y"]
    note = f"PSNR-Y over bicubic on held-out photographs, after {steps} steps"
    if report.is_small:
        report.number("gain", gain, "dB", note=note)
    else:
        report.at_least("gain", gain, LEAST_GAIN, "dB", note=note)
