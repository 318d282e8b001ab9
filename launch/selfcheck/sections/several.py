"""Several GPUs, or two ranks on a CPU: all-reduce, evaluation byte for byte, scaling."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

from launch.cluster import remote
from launch.doctor.allreduce import LATENCY_BYTES, SIZES
from launch.selfcheck.report import Report, SkippedError, run_script
from pipeline.distributed.gpus import count_gpus
from pipeline.distributed.launcher import free_port
from tools.make_demo_dataset import make_demo_dataset

REDUCE_SECONDS = 90
SMALL_OVERRIDES = (
    "compile=off",
    "data.crop=32",
    "generator.num_blocks=1",
    "generator.num_features=8",
    "generator.num_attention_features=8",
)
_ROW = re.compile(
    r"^(?P<kind>strong|weak)\s+(?P<ranks>\d+)\s+(?P<batch>\d+)\s+(?P<rate>[\d.]+)\s+(?P<gain>[\d.]+)"
    r"\s+(?P<efficiency>[\d.]+)%",
    re.MULTILINE,
)


def run(report: Report) -> None:
    """Check all GPUs together; skipped if there is only one."""
    gpus = count_gpus()
    if gpus == 1:
        raise SkippedError("there is only one GPU")
    ranks = min(gpus, 8) or 2
    with report.guarded("all_reduce"):
        _all_reduce(report, ranks)
    with report.guarded("evaluate"):
        _evaluate(report, ranks)
    with report.guarded("scaling"):
        _scaling(report, ranks)


def _all_reduce(report: Report, ranks: int) -> None:
    """Run the doctor's all-reduce between ranks on this machine."""
    task = {
        "ranks": list(range(ranks)),
        "devices": list(range(ranks)) if report.is_on_gpu else None,
        "world_size": ranks,
        "address": "127.0.0.1",
        "port": free_port(),
        "seconds": REDUCE_SECONDS,
        "join_seconds": REDUCE_SECONDS // 2,
        "environment": {
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        },
    }
    process = subprocess.Popen(
        remote.command(sys.executable),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(remote.parcel("launch.doctor.allreduce", task))
        process.stdin.flush()  # stdin stays open: when it closes, the ranks end
        answer = remote.answer(process.stdout.read())
    finally:
        process.kill()
        process.wait()
    results: dict[str, Any] = answer["ranks"] if answer else {}
    errors = [result["error"] for result in results.values() if "error" in result]
    right = len(results) == ranks and all(one.get("is_right") for one in results.values())
    report.fact(
        "all_reduce",
        right,
        f"{ranks} ranks",
        limit="correct sums",
        note=errors[0] if errors else "",
    )
    seconds = {int(size): value for size, value in results.get("0", {}).get("seconds", {}).items()}
    if LATENCY_BYTES in seconds:
        report.number(
            "latency", 1e6 * seconds[LATENCY_BYTES], "us", note="an all-reduce of 4 bytes"
        )
    for size in SIZES:
        if size in seconds:
            report.number(
                f"bandwidth_{size // 10**6}mb",
                2 * (ranks - 1) / ranks * size / seconds[size] / 1e9,
                "GB/s",
                note="bus bandwidth, as nccl-tests counts it",
            )


def _evaluate(report: Report, ranks: int) -> None:
    """Check that `evaluate.py --procs N` writes the same bytes as one process."""
    import torch

    from pipeline.models import build_generator
    from pipeline.models.weights import SavedNetwork, write_network

    demo = make_demo_dataset(report.scratch / "demo")
    torch.manual_seed(0)
    params = {"num_features": 8, "num_attention_features": 8, "num_blocks": 1}
    weights = report.scratch / "network.safetensors"
    write_network(
        weights,
        SavedNetwork("vapsr", 2, params, build_generator("vapsr", 2, **params).state_dict()),
    )
    written = []
    for procs in (1, ranks):
        out = report.scratch / f"evaluated-{procs}"
        run_script(
            [
                "evaluate.py",
                "--model",
                str(weights),
                "--hr",
                str(demo.held_out_dir),
                "--scale",
                "2",
                "--procs",
                str(procs),
                "--out",
                str(out),
            ],
            seconds=max(90.0, report.left),
            variables={"OMP_NUM_THREADS": "1"},
        )
        written.append(
            {
                path.name: path.read_bytes()
                for path in out.rglob("*")
                if path.suffix in (".csv", ".png")
            }
        )
    report.fact(
        "evaluate",
        len(written[0]) > 1 and written[0] == written[1],
        f"{ranks} processes",
        limit="identical bytes",
        note="--procs N compared with one process: table and pictures",
    )


def _scaling(report: Report, ranks: int) -> None:
    """Run `benchmarks/scaling.py` and add every row of its table."""
    numbers = [2] if report.is_small else sorted({1, 2, ranks} if ranks % 2 == 0 else {1, 2})
    overrides = SMALL_OVERRIDES if report.is_small else ("data.crop=256",)
    batch = 4 if report.is_small else 64
    batch = batch - batch % max(numbers) or max(numbers)
    words = [
        "benchmarks/scaling.py",
        "--ranks",
        ",".join(map(str, numbers)),
        "--rounds",
        "1",
        "--steps",
        "10" if report.is_small else "40",
        "--batch",
        str(batch),
        "--recipe",
        "demo" if report.is_small else "vapsr_x4",
        *overrides,
    ]
    printed = run_script(
        words,
        seconds=max(180.0, report.left),
        variables={name: value for name, value in os.environ.items() if name == "OMP_NUM_THREADS"},
    )
    for kind in ("strong", "weak") if report.is_small else ():
        report.skip(f"{kind}.1", "not part of the small check")
    for row in _ROW.finditer(printed):
        report.number(
            f"{row['kind']}.{row['ranks']}",
            float(row["rate"]),
            "images/s",
            command=f"python {' '.join(words)}",
            note=json.dumps(
                {
                    "speed-up": float(row["gain"]),
                    "efficiency": f"{row['efficiency']} %",
                    "global batch": int(row["batch"]),
                }
            )[1:-1].replace('"', ""),
        )
