"""Time training steps with `benchmarks/train_step.py`, the most common cases first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from launch.selfcheck.report import ROOT, Report, SkippedError, run_script

BENCHMARK = "benchmarks/train_step.py"
LEAST_SECONDS = 12.0  # per case: a process, its imports, two layouts


@dataclass(frozen=True)
class Case:
    """One row of the benchmark's table."""

    network: str
    batch: int
    precision: str = "fp16"
    way: str = "eager"
    layout: str = "auto"

    @property
    def name(self) -> str:
        return ".".join(
            (
                self.network,
                self.precision,
                self.way,
                *([self.layout] if self.layout != "auto" else ()),
                f"b{self.batch}",
            )
        )


ON_GPUS = (
    Case("vapsr_x4", 64),
    Case("vapsr_x4", 64, way="compiled"),
    Case("vapsr_x4", 64, way="reduce-overhead"),
    Case("rrdbnet_x4", 48, way="compiled"),
    Case("vapsr_x4", 64, "bf16", "compiled"),
    Case("srresnet_x4", 64, way="compiled"),
    Case("vapsr_x4", 64, layout="channels_last"),
    Case("vapsr_x4", 64, layout="contiguous"),
    Case("vapsr_x4", 256, way="compiled"),
    Case("vapsr_x4", 16),
    Case("esrgan_x4", 16),
    Case("vapsr_s_x4", 64, way="compiled"),
    Case("msrresnet_x4", 64, way="compiled"),
    Case("compact_x4", 64, way="compiled"),
    Case("vapsr_x2", 64, way="compiled"),
    Case("vapsr_x4", 64, "fp32"),
    Case("srgan_x4", 16),
)
ON_CPUS = (Case("compact16_x4", 1, "fp32", layout="contiguous"),)
HEADLINE = "vapsr_x4"
"""Network of the documented number: that of its fastest case with a batch of 64 in FP16."""


def run(report: Report) -> None:
    """Measure case by case until time runs out."""
    if not (ROOT / BENCHMARK).is_file():
        raise SkippedError(f"{BENCHMARK} is missing")
    best = 0.0
    for case in () if report.is_on_gpu else ON_GPUS:
        report.skip(case.name, "no GPU")
    for case in ON_GPUS if report.is_on_gpu else ON_CPUS:
        if report.left < LEAST_SECONDS and not report.is_small:
            report.skip(case.name, "out of time for this section")
            continue
        with report.guarded(case.name):
            row = _measured(report, case)
            rate = row["images"] / row["step"]
            note = (
                f"{1000 * row['step']:.1f} ms, {row['memory'] / 2**30:.2f} GiB, first step after "
                f"{row['first_step']:.0f} s, {row.get('calls', 0)} calls"
            )
            report.number(
                case.name, rate, "images/s", note=note, command=" ".join(_words(case, 3.0))
            )
            if case.network == HEADLINE and case.batch == 64 and case.precision == "fp16":
                best = max(best, rate)
    if best:
        report.number(HEADLINE, best, "images/s", note="the fastest with a batch of 64 in FP16")
    else:
        report.skip(HEADLINE, "no GPU" if not report.is_on_gpu else "none of its cases ran")


def _words(case: Case, seconds: float) -> list[str]:
    return [
        "python",
        BENCHMARK,
        "--networks",
        case.network,
        "--ways",
        case.way,
        "--precisions",
        case.precision,
        "--layouts",
        case.layout,
        "--batches",
        str(case.batch),
        "--seconds",
        f"{seconds:g}",
    ]


def _measured(report: Report, case: Case) -> dict[str, Any]:
    file = report.scratch / f"{case.name}.json"
    seconds = 0.1 if report.is_small else 3.0
    run_script([*_words(case, seconds)[1:], "--json", str(file)], seconds=max(60.0, report.left))
    return json.loads(file.read_text(encoding="utf-8"))[0]
