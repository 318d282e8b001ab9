"""Check that driver, torch, Triton and GPUs fit together, and how fast memory and matmul are."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from launch.doctor.probe import probe_gpus
from launch.selfcheck.report import ROOT, Report, seconds_of
from pipeline.distributed import gpus
from pipeline.distributed.gpus import FIRST_DRIVER, VISIBLE, list_gpus

if TYPE_CHECKING:
    import torch

_COUNT = "from pipeline.distributed.gpus import torch_gpus; print(torch_gpus())"


def run(report: Report) -> None:
    """Add the facts first, then the rates."""
    from pipeline.engine.engine import why_not_compiled
    from pipeline.engine.triton_check import report as ask_torch

    facts = ask_torch()
    listed = [] if gpus.is_cpu_wanted() else list_gpus()
    report.fact("torch", None, f"{facts['torch']}, CUDA {facts['cuda'] or 'none'}")
    report.fact(
        "gpus",
        not facts["complaint"]
        and (
            len(facts["gpus"]) == len(listed)
            or any(one.slices for one in listed)
            or VISIBLE in os.environ
        ),
        f"{len(facts['gpus'])} usable of {len(listed)}",
        note=facts["complaint"],
    )
    if report.is_on_gpu:
        _facts(report, facts, listed)
    else:
        report.skip("driver", "no GPU")
        report.skip("mig", "no GPU")
    reason = why_not_compiled(report.device)
    report.fact(
        "compile",
        not reason if report.is_on_gpu else None,
        "works" if not reason else "does not",
        note=reason,
    )
    _rates(report)


def _facts(report: Report, facts: dict, listed: list[gpus.Gpu]) -> None:
    first = FIRST_DRIVER.get(int(facts["cuda"].partition(".")[0] or 0), FIRST_DRIVER[13])
    major = int(facts["driver"].partition(".")[0] or 0)
    report.fact(
        "driver",
        major >= first if major else None,
        facts["driver"] or "unknown",
        limit=f">= {first}",
    )
    report.fact(
        "capability",
        True,
        ", ".join(sorted({gpu["capability"] for gpu in facts["gpus"]})),
        limit=">= 7.5",
    )
    for gpu in probe_gpus()["gpus"]:
        if gpu["slowed_by"]:
            report.fact(
                f"slowed.{gpu['index']}",
                False,
                ", ".join(gpu["slowed_by"]),
                note="check cooling and power supply",
            )
    with report.guarded("uuid"):
        report.fact(
            "uuid",
            _count_with(listed[0].uuid) == 1 if listed and not listed[0].slices else None,
            note="a GPU named by its UUID is one GPU",
        )
    slices = [one for gpu in listed for one in gpu.slices]
    if not slices:
        report.skip("mig", "no GPU is split into MIG devices")
        return
    with report.guarded("mig"):
        report.fact(
            "mig",
            all(_count_with(one) == 1 for one in slices),
            f"{len(slices)} devices",
            note="a process that is given one of them sees one GPU",
        )


def _count_with(name: str) -> int:
    """Return the number of GPUs that a process sees with CUDA_VISIBLE_DEVICES=`name`."""
    done = subprocess.run(
        [sys.executable, "-c", _COUNT],
        env={**os.environ, VISIBLE: name},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout)


def _rates(report: Report) -> None:
    """Measure memory bandwidth, copies to the device, matrix products and kernel launches."""
    import torch

    device, size = report.device, 1 << (23 if report.is_small else 30)
    report.number(
        "copy",
        2 * size / _copy_seconds(size, device) / 1e9,
        "GB/s",
        note="read and written, within the device",
    )
    if report.is_on_gpu:
        pinned = torch.zeros(size // 4, dtype=torch.uint8).pin_memory()
        there = torch.empty(size // 4, dtype=torch.uint8, device=device)
        seconds = seconds_of(lambda: there.copy_(pinned, non_blocking=True), device)
        report.number("to_device", size / 4 / seconds / 1e9, "GB/s", note="from pinned memory")
        seconds = seconds_of(lambda: torch.cuda.synchronize(device), device, least=0.05)
        report.number("wait", seconds * 1e6, "us", note="an empty synchronize")
    for name in ("float32", "bfloat16", "float16") if report.is_on_gpu else ("float32",):
        side = 512 if report.is_small else 8192
        matrix = torch.rand(side, side, device=device, dtype=getattr(torch, name))
        seconds = seconds_of(lambda matrix=matrix: matrix @ matrix, device)
        report.number(f"matmul_{name}", 2 * side**3 / seconds / 1e12, "TFLOP/s")
    report.number(
        "launch", 1e6 * _launch_seconds(device), "us", note="a kernel on four numbers, from Python"
    )


def _copy_seconds(size: int, device: torch.device) -> float:
    import torch

    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), device)


def _launch_seconds(device: torch.device) -> float:
    import torch

    numbers = torch.zeros(4, device=device)

    def hundred() -> None:
        for _ in range(100):
            numbers.add_(1)

    return seconds_of(hundred, device, least=0.1) / 100
