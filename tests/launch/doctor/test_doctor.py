"""The doctor: collecting facts, judging them, and reporting them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from fabricate import seal
from launch.cluster import remote
from launch.cluster.remote import CommandResult, run_on, ssh
from launch.doctor import checks, diagnose, probe, reach
from launch.doctor.checks import GIB, Comparison, clock, clock_skew, datasets, explain, gpus
from launch.doctor.diagnosis import ROWS, Diagnosis
from launch.doctor.findings import FAIL, PASS, WARN, WIDTH, Finding, format_table, worst
from launch.doctor.measure import hosts_of, task_of
from launch.doctor.network import Route, find_route, usable
from launch.doctor.prediction import (
    Network,
    all_reduce_seconds,
    count_parameters,
    efficiency,
    prediction,
    step_seconds_of,
)
from pipeline.cli import UserError
from pipeline.distributed.launcher import own_addresses

PYTHON = "/work/main/.venv/bin/python"

# --- Checks ---


def gpu(index: int, **changes: Any) -> dict[str, Any]:
    return {
        "index": index,
        "name": "NVIDIA H100 80GB HBM3",
        "driver_version": "550.54.15",
        "memory.total": 81559,
        "memory.used": 4,
        "pstate": "P0",
        "temperature.gpu": 31,
        "power.limit": 700.0,
        "power.default_limit": 700.0,
        "ecc.errors.uncorrected.volatile.total": 0,
        "mig.mode.current": "Disabled",
        "slowed_by": [],
        **changes,
    }


FACTS: dict[str, Any] = {
    "python": {"version": "3.11.7", "executable": PYTHON},
    "checkout": {
        "exists": True,
        "commit": "a" * 40,
        "files": {"train.py": "1", "launch/cluster/job.py": "2"},
    },
    "packages": {"torch": "2.13.0", "numpy": "2.3.1", "nvidia-dali-cuda120": "2.4.0"},
    "cores": 16,
    "memory": {"total": 64 * GIB, "free": 60 * GIB},
    "output": {"at": "/runs", "free": 100 * GIB, "complaint": ""},
    "limits": {"open_files": 65536, "most_open_files": 1 << 20, "shm": 16 * GIB},
    "nvidia": {"gpus": [gpu(0), gpu(1)], "complaint": ""},
    "datasets": [
        {
            "directory": "/data",
            "files": 300,
            "checked": 300,
            "missing": 0,
            "first_missing": "",
            "lists": {
                name: {"count": 150, "sha256": name, "complaint": ""} for name in probe.LISTS
            },
            "sample": {"a.npy": "1", "b.npy": "2"},
        }
    ],
}


TORCH = {
    "torch": "2.13.0",
    "cuda": "13.0",
    "driver": "580.65.06",
    "complaint": "",
    "uncompiled": "",
    "gpus": [{"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}] * 2,
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """`FACTS` with other values at keys such as `nvidia/gpus/1/pstate`; `None` removes a key."""
    facts = copy.deepcopy(FACTS)
    for key, value in changes.items():
        *path, last = key.split("/")
        place = facts
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return facts


def compared(
    own: dict[str, Any], first: dict[str, Any] | None = None, host: str = "node2"
) -> Comparison:
    return Comparison(host, (0, 1), changed(own), "node1", changed(first or {}), 4, PYTHON)


def found(check: str, pair: Comparison) -> list[Finding]:
    table = {**checks.CHECKS, "GPUs": gpus, "dataset": datasets}
    findings = list(table[check](pair))
    assert {(finding.host, finding.check) for finding in findings} <= {(pair.host, check)}
    for finding in findings:
        assert bool(finding.advice) == (finding.verdict != PASS)
        assert "\n" not in finding.line
    return findings


@pytest.mark.parametrize(
    ("check", "summary"),
    [
        ("checkout", "aaaaaaaaa"),
        ("python", "3.11.7"),
        ("packages", "torch 2.13.0"),
        ("cores", "16 for 2 ranks"),
        ("memory", "60 GiB free"),
        ("disk", "100 GiB free"),
        ("limits", "65536 open files"),
        ("GPUs", "2 x H100 80GB HBM3 80 GiB P0"),
        ("dataset", "300 files"),
    ],
)
def test_a_host_like_the_first_passes(check: str, summary: str) -> None:
    assert found(check, compared({})) == [Finding("node2", check, PASS, summary)]


@pytest.mark.parametrize(
    ("check", "own", "verdict", "summary", "advice"),
    [
        (
            "checkout",
            {"checkout/exists": False},
            FAIL,
            "missing",
            "there is no checkout at the path that node1 uses; run launch/sync.sh",
        ),
        (
            "checkout",
            {"checkout/files/train.py": "3"},
            FAIL,
            "1 different file",
            "differs from node1 in train.py; run launch/sync.sh",
        ),
        (
            "checkout",
            {"checkout/files": {}, "checkout/commit": "b" * 40},
            FAIL,
            "2 different files",
            "differs from node1 in launch/cluster/job.py, train.py (commit bbbbbbbbb, not "
            "aaaaaaaaa); run launch/sync.sh",
        ),
        (
            "checkout",
            {"checkout/files": {f"{n}.py": "1" for n in range(3)}},
            FAIL,
            "5 different files",
            "differs from node1 in 0.py, 1.py, 2.py and 2 more; run launch/sync.sh",
        ),
        ("checkout", {"checkout/commit": ""}, PASS, "no commit known, same files", ""),
        (
            "python",
            {"python/executable": "/usr/bin/python3"},
            FAIL,
            "missing",
            f"there is no {PYTHON}; run launch/sync.sh",
        ),
        (
            "python",
            {"python/version": "3.12.1"},
            FAIL,
            "3.12.1",
            "Python 3.12.1, but node1 has 3.11.7; make the environment again with 3.11",
        ),
        ("python", {"python/version": "3.11.9"}, WARN, "3.11.9", "likely harmless"),
        (
            "packages",
            {"packages/torch": "2.12.0"},
            FAIL,
            "1 different package",
            "torch 2.12.0 (2.13.0 on node1); run launch/sync.sh, or `pip install -r "
            "requirements.txt` there",
        ),
        (
            "packages",
            {"packages/numpy": "", "packages/torch": "2.12.0"},
            FAIL,
            "2 different packages",
            "no numpy; torch 2.12.0 (2.13.0 on node1); ",
        ),
        (
            "packages",
            {"packages/nvidia-dali-cuda120": None, "packages/nvidia-dali-cuda130": "2.4.0"},
            FAIL,
            "2 different packages",
            "no nvidia-dali-cuda120; nvidia-dali-cuda130 2.4.0 (none on node1); ",
        ),
        (
            "cores",
            {"cores": 1},
            WARN,
            "1 for 2 ranks",
            "1 core for 2 ranks, which will wait for each other; set fewer slots",
        ),
        (
            "memory",
            {"memory/free": 3 * GIB},
            WARN,
            "3 GiB free",
            "3.0 GiB of memory is free for 2 ranks that need about 2 each",
        ),
        (
            "disk",
            {"output/complaint": "Permission denied"},
            WARN,
            "not writable",
            "cannot write to /runs: Permission denied; give another --output-dir",
        ),
        (
            "disk",
            {"output/free": GIB // 4},
            WARN,
            "0 GiB free",
            "0.2 GiB is free at /runs; free disk space",
        ),
        (
            "disk",
            {"output/free": GIB},
            PASS,
            "1 GiB free",
            "",
        ),  # only the first host keeps checkpoints
        (
            "limits",
            {"limits/open_files": 256},
            WARN,
            "256 open files",
            "ulimit -n is 256, and 4 ranks may need 1024 connections and files; set `ulimit -n "
            "1024` in ~/.bashrc there",
        ),
        (
            "limits",
            {"limits/open_files": 256, "limits/most_open_files": 512},
            WARN,
            "256 open files",
            "set `* - nofile 1024` in /etc/security/limits.conf there",
        ),
        (
            "limits",
            {"limits/shm": 64 << 20},
            WARN,
            "/dev/shm 67 MB",
            "/dev/shm 67 MB is too small for NCCL, which connects the GPUs of a host through it",
        ),
        (
            "GPUs",
            {"nvidia/complaint": "nvidia-smi did not answer within 15 s"},
            FAIL,
            "driver not responding",
            "nvidia-smi did not answer within 15 s; reboot, or reinstall the NVIDIA driver",
        ),
        (
            "GPUs",
            {"nvidia/gpus": []},
            FAIL,
            "0 GPUs",
            "node1 has GPUs and node2 has none; omit one of them",
        ),
        (
            "GPUs",
            {"nvidia/gpus": [gpu(0)]},
            FAIL,
            "1 GPU",
            "it has 1 GPU, but the hostfile also uses slots 1 (counted from 0); write slots=1",
        ),
        (
            "GPUs",
            {"nvidia/gpus": [gpu(0), gpu(1, name="NVIDIA A100-SXM4-40GB")]},
            WARN,
            "mixed GPUs",
            "GPUs differ (NVIDIA A100-SXM4-40GB, NVIDIA H100 80GB HBM3): every step takes as long "
            "as on the slowest",
        ),
        (
            "GPUs",
            {"nvidia/gpus": [gpu(n, driver_version="535.1") for n in range(2)]},
            WARN,
            "driver 535.1",
            "NVIDIA driver 535.1, but node1 has 550.54.15; install the same on all hosts",
        ),
        (
            "GPUs",
            {"nvidia/gpus/1/memory.used": 70000},
            WARN,
            "GPU 1: see below",
            "has 68.4 of 80 GiB in use by other processes",
        ),
        (
            "GPUs",
            {"nvidia/gpus/1/power.limit": 500.0},
            WARN,
            "GPU 1: see below",
            "is limited to 500 W instead of its default 700 W",
        ),
        (
            "GPUs",
            {
                "nvidia/gpus/1/slowed_by": ["heat (hardware)", "power brake"],
                "nvidia/gpus/1/temperature.gpu": 91,
            },
            WARN,
            "GPU 1: see below",
            "is slowed by heat (hardware), power brake at 91 C; check cooling",
        ),
        (
            "GPUs",
            {"nvidia/gpus/1/ecc.errors.uncorrected.volatile.total": 2},
            WARN,
            "GPU 1: see below",
            "has had 2 uncorrected memory errors",
        ),
        (
            "GPUs",
            {"nvidia/gpus/1/mig.mode.current": "Enabled"},
            WARN,
            "GPU 1: see below",
            "is split into MIG devices",
        ),
        (
            "GPUs",
            {"torch": {"error": "torch did not answer within 40 s"}},
            WARN,
            "torch not responding",
            "could not find out whether torch can use the GPUs: torch did not answer within 40 s",
        ),
        (
            "GPUs",
            {
                "torch": TORCH
                | {
                    "complaint": (
                        "this machine has 2 GPUs (H100, NVIDIA driver 550.1), which is too old"
                    )
                }
            },
            FAIL,
            "not usable",
            "this machine has 2 GPUs (H100, NVIDIA driver 550.1), which is too old",
        ),
        (
            "GPUs",
            {"torch": TORCH | {"gpus": []}},
            FAIL,
            "not usable",
            "nvidia-smi lists GPUs, but torch 2.13.0 sees none",
        ),
        (
            "GPUs",
            {"torch": TORCH | {"uncompiled": "there is no C compiler (Debian: apt install gcc)"}},
            WARN,
            "not compiled",
            "torch.compile will not work, so training will be slower: there is no C compiler "
            "(Debian: apt",
        ),
        ("GPUs", {"torch": TORCH}, PASS, "2 x H100 80GB HBM3 80 GiB P0", ""),
        # the packages of another Python do not matter
        (
            "GPUs",
            {"torch": TORCH | {"gpus": []}, "python/executable": "/usr/bin/python3"},
            PASS,
            "2 x H100 80GB HBM3 80 GiB P0",
            "",
        ),
        # the run does not use the third GPU
        (
            "GPUs",
            {"nvidia/gpus": [gpu(0), gpu(1), gpu(2, **{"memory.used": 70000})]},
            PASS,
            "2 x H100 80GB HBM3 80 GiB P0",
            "",
        ),
        (
            "dataset",
            {"datasets/0/lists/training_file_list.txt/complaint": "No such file or directory"},
            FAIL,
            "no list",
            "/data/training_file_list.txt: No such file or directory; run launch/sync.sh "
            "--dataset-dir /data",
        ),
        (
            "dataset",
            {"datasets/0/lists/training_file_list.txt/sha256": "x"},
            FAIL,
            "list differs",
            "/data/training_file_list.txt (150 files) differs from that of node1 (150 files); run "
            "launch/sync.sh",
        ),
        (
            "dataset",
            {"datasets/0/missing": 2, "datasets/0/first_missing": "c.npy"},
            FAIL,
            "2 missing",
            "2 of the 300 files looked for in /data are missing (c.npy); run launch/sync.sh "
            "--dataset-dir /data",
        ),
        (
            "dataset",
            {"datasets/0/sample/b.npy": "3"},
            FAIL,
            "files differ",
            "1 of 2 sampled files of /data differ from those of node1 (b.npy); run launch/sync.sh "
            "--dataset-dir /data",
        ),
        ("dataset", {"datasets/0/checked": 256}, WARN, "256 of 300 seen", "its disk is slow"),
    ],
)
def test_a_difference_is_reported_with_a_remedy(
    check: str, own: dict[str, Any], verdict: str, summary: str, advice: str
) -> None:
    finding = worst(found(check, compared(own)))
    assert finding is not None
    assert (finding.verdict, finding.summary) == (verdict, summary)
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("check", "facts", "verdict", "advice"),
    [
        (
            "packages",
            {"packages/torch": ""},
            FAIL,
            "torch is not installed; run ./launch_local_train.sh --help once",
        ),
        (
            "disk",
            {"output/complaint": "Read-only file system"},
            FAIL,
            "cannot write to /runs: Read-only file system",
        ),
        (
            "disk",
            {"output/free": GIB // 4},
            FAIL,
            "268 MB is free at /runs, where checkpoints go; free disk space",
        ),
        ("disk", {"output/free": 5 * GIB}, WARN, "5.0 GiB is free at /runs; free disk space"),
        ("GPUs", {"nvidia/gpus": []}, PASS, ""),
        (
            "dataset",
            {"datasets/0/lists/training_file_list.txt/complaint": "No such file or directory"},
            FAIL,
            "write it with `python tools/select_training_files.py --data-dir /data`",
        ),
        (
            "dataset",
            {"datasets/0/missing": 2},
            FAIL,
            "write the lists again, or restore the files",
        ),
    ],
)
def test_the_first_host_gets_advice_of_its_own(
    check: str, facts: dict[str, Any], verdict: str, advice: str
) -> None:
    finding = worst(found(check, compared(facts, facts, host="node1")))
    assert finding is not None
    assert finding.verdict == verdict
    assert advice in finding.advice


def test_packages_of_another_interpreter_are_ignored() -> None:
    assert (
        found("packages", compared({"python/executable": "/usr/bin/python3", "packages": {}})) == []
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    ahead=st.floats(-1000, 1000), there=st.floats(0, 5), back=st.floats(0, 5), work=st.floats(0, 5)
)
def test_a_clock_is_judged_only_beyond_doubt(
    ahead: float, there: float, back: float, work: float
) -> None:
    facts = {"began": 1000 + there + ahead, "ended": 1000 + there + work + ahead}
    skew, doubt = clock_skew(1000, 1000 + there + work + back, facts)
    assert abs(skew - ahead) <= doubt + 1e-6
    finding = clock("node2", "node1", (skew, doubt), (0.0, 0.0))
    assert finding.verdict == PASS or abs(ahead) > 2 - 1e-6
    assert finding.verdict == WARN or abs(ahead) < 2 + 2 * doubt + 1e-6


def test_a_clock_that_is_off_is_reported() -> None:
    finding = clock("node2", "node1", (-3600.0, 0.2), (0.1, 0.2))
    assert (finding.verdict, finding.summary) == (WARN, "-3600.1 s")
    assert finding.advice.startswith(
        "its clock is 3600 s behind that of node1; turn on time synchronisation"
    )
    assert clock("node2", "node1", (0.1, 0.3), (0.0, 0.2)) == Finding(
        "node2", "clock", PASS, "within 0.5 s"
    )
    assert clock("node1", "node1", (0.1, 0.3), (0.1, 0.3)) == Finding(
        "node1", "clock", PASS, "reference"
    )


# --- nvidia-smi ---

SMI = """\
0, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 1, P0, 31, 700.00, 700.00, 0, 0x0000000000000001, 0x0000000000000001, Disabled
1, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 70123, P0, 91, 500.00, 700.00, 3, 0x00000000000000C4, 0x00000000000000C4, Enabled
2, NVIDIA GeForce RTX 4090, 550.54.15, 24564, 389, P8, 38, 450.00, 450.00, [N/A], 0x0000000000000028, [N/A], [N/A]
3, NVIDIA H100 80GB HBM3, 550.54.15, 81559, [Unknown Error], [Unknown Error], [GPU requires reset], [N/A], N/A, [Not Supported], [Insufficient Permissions], ERR!, Disabled

Unable to determine the device handle for GPU0000:C1:00.0: Unknown Error
"""  # noqa: E501 - as nvidia-smi writes them


def test_nvidia_smis_lines_are_read() -> None:
    h100, slowed, rtx, ill = probe.parse_gpus(SMI, probe.GPU_FIELDS)
    assert {name: h100[name] for name in gpu(0)} == gpu(0, **{"memory.used": 1})
    # 0x4 is the power cap, which is not a problem
    assert slowed["slowed_by"] == ["heat (hardware)", "power brake"]
    assert (slowed["memory.used"], slowed["power.limit"], slowed["mig.mode.current"]) == (
        70123,
        500.0,
        "Enabled",
    )
    assert slowed["ecc.errors.uncorrected.volatile.total"] == 3
    assert (rtx["ecc.errors.uncorrected.volatile.total"], rtx["mig.mode.current"]) == (None, None)
    assert rtx["slowed_by"] == ["hardware slowdown", "heat (software)"]
    assert (ill["index"], ill["slowed_by"]) == (3, [])
    assert {name for name, value in ill.items() if value is None} == {
        "memory.used",
        "pstate",
        "temperature.gpu",
        "power.limit",
        "power.default_limit",
        probe.GPU_FIELDS[9],
        probe.GPU_FIELDS[10],
        probe.GPU_FIELDS[11],
    }
    pair = compared({"nvidia/gpus": [h100, slowed, rtx, ill]}, {"nvidia/gpus": [gpu(0)]})
    # slowed: memory in use, power limit, heat, memory errors and MIG, of GPU 1 alone
    assert [finding.verdict for finding in gpus(pair)] == [WARN] * 5 + [PASS]


def test_lines_without_a_gpu_are_skipped() -> None:
    assert probe.parse_gpus("", probe.GPU_FIELDS) == []
    assert probe.parse_gpus("No devices were found\n", probe.GPU_FIELDS) == []
    assert probe.parse_gpus("[N/A], x\n1, y\nz, y\n", ("index", "name")) == [
        {"index": 1, "name": "y", "slowed_by": []}
    ]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path on PATH of an nvidia-smi that the test can replace."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    return tmp_path / "nvidia-smi"


def test_torch_is_asked_where_there_are_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkout's own module runs in its own process, which may fail or hang."""
    found = {"gpus": [gpu(0)]}
    assert probe._torch(tmp_path, {"gpus": []}) is None
    assert probe._torch(tmp_path, {"error": "nvidia-smi is broken"}) is None
    assert "No module named" in probe._torch(tmp_path, found)["error"]
    (tmp_path / "pipeline/engine").mkdir(parents=True)
    module = tmp_path / "pipeline/engine/triton_check.py"
    module.write_text(
        "import json\nprint('a note')\nprint(json.dumps({'torch': '2.13.0', 'gpus': []}))\n"
    )
    assert probe._torch(tmp_path, found) == {"torch": "2.13.0", "gpus": []}
    module.write_text("raise MemoryError('no memory')\n")
    assert probe._torch(tmp_path, found) == {"error": "MemoryError: no memory"}
    module.write_text("import time\ntime.sleep(20)\n")
    monkeypatch.setattr(probe, "TORCH_SECONDS", 0.3)
    assert probe._torch(tmp_path, found) == {"error": "torch did not answer within 0.3 s"}


def test_gpus_of_a_run_on_the_cpu_are_not_asked(smi: Path) -> None:
    task = {
        "root": "/nowhere",
        "synced": "x",
        "packages": [],
        "output_dir": "/tmp",
        "dataset_dirs": [],
    }
    assert probe.answer(task)["nvidia"]["complaint"] == "nvidia-smi: status 9"
    facts = probe.answer({**task, "is_on_cpu": True})
    assert (facts["nvidia"], facts["torch"]) == ({"gpus": [], "complaint": ""}, None)


def test_fields_unknown_to_the_driver_are_omitted(smi: Path) -> None:
    smi.write_text("""#!/bin/sh
case "$1" in
    *clocks_event_reasons.active*)
        echo 'Field "clocks_event_reasons.active" is not a valid field to query.'
        exit 2 ;;
    *)
        echo "$@" >"$0.asked"
        echo "0, Tesla V100, 470.1, 16160, 0, P0, 30, 300.00, 300.00, 0, 0x0000000000000040, [N/A]"
        ;;
esac
""")
    facts = probe.probe_gpus()
    assert facts["complaint"] == ""
    assert [(one["name"], one["slowed_by"]) for one in facts["gpus"]] == [
        ("Tesla V100", ["heat (hardware)"])
    ]
    asked = Path(f"{smi}.asked").read_text().split()
    assert asked[1] == "--format=csv,noheader,nounits"
    expected = [name for name in probe.GPU_FIELDS if "event" not in name]
    assert asked[0].removeprefix("--query-gpu=").split(",") == expected


def test_a_driver_that_fails_is_reported(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.probe_gpus() == {"gpus": [], "complaint": "nvidia-smi: status 9"}
    smi.write_text(
        "#!/bin/sh\necho\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit "
        "18\n"
    )
    assert (
        probe.probe_gpus()["complaint"]
        == "Failed to initialize NVML: Driver/library version mismatch"
    )
    smi.write_text("#!/bin/sh\nexec sleep 20\n")
    monkeypatch.setattr(probe, "NVIDIA_SECONDS", 0.2)
    assert probe.probe_gpus()["complaint"] == "nvidia-smi did not answer within 0.2 s"


# --- Prediction ---

NETWORK = Network(4, "NCCL", {4: 60e-6, 1_000_000: 1e-3, 64_000_000: 0.016})
"""At 64 MB: 2 * 3/4 * 64e6 / 0.016 = 6e9 bytes/s. Latency of one step: 60e-6 / 6 = 1e-5 s."""


def test_an_all_reduce_takes_what_the_formula_says() -> None:
    assert NETWORK.best_known == pytest.approx(6e9)
    assert NETWORK.bus_bandwidth(1_000_000) == pytest.approx(1.5e9)
    # as measured, plus the latency
    assert all_reduce_seconds(64e6, 4, NETWORK) == pytest.approx(0.016 + 60e-6)
    assert all_reduce_seconds(12e6, 2, NETWORK) == pytest.approx(2 * 1 / 2 * 12e6 / 6e9 + 2 * 1e-5)
    assert all_reduce_seconds(12e6, 16, NETWORK) == pytest.approx(
        2 * 15 / 16 * 12e6 / 6e9 + 30 * 1e-5
    )
    assert all_reduce_seconds(12e6, 1, NETWORK) == 0
    assert efficiency(0.9, 0.1) == pytest.approx(0.9)
    assert NETWORK.text() == (
        "all-reduce of 4 ranks over NCCL: 4 bytes 60 us; 1 MB 1.50 GB/s, 64 MB 6.00 GB/s (bus "
        "bandwidth)"
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ranks=st.integers(1, 512), num_bytes=st.integers(0, 10**10), more=st.integers(1, 10**9))
def test_more_ranks_and_more_bytes_take_longer(ranks: int, num_bytes: int, more: int) -> None:
    seconds = all_reduce_seconds(num_bytes, ranks, NETWORK)
    assert seconds <= all_reduce_seconds(num_bytes + more, ranks, NETWORK)
    assert seconds <= all_reduce_seconds(num_bytes, ranks + 1, NETWORK)
    assert 0 < efficiency(0.1, seconds) <= 1


def test_a_prediction_covers_both_precisions() -> None:
    lines = prediction(NETWORK, 8, 1_000_000, 0.01).splitlines()
    assert lines[0].startswith("prediction for 8 ranks and 1,000,000 parameters")
    half = 2 * 7 / 8 * 2e6 / 6e9 + 14e-5
    assert lines[1].split() == [
        "FP16/BF16",
        "gradients",
        f"{half * 1e3:.3g}",
        "ms",
        f"{0.01 / (0.01 + half):.1%}",
        "at",
        "10",
        "ms",
        "per",
        "step;",
        "a",
        "step",
        "must",
        "take",
        "at",
        "least",
        f"{half * 9e3:.3g}",
        "ms",
        "for",
        "90%",
    ]
    assert "FP32" in lines[2]
    assert " at " not in prediction(NETWORK, 8, 1_000_000, None).replace("at least", "")


# --- The table ---


def finding(host: str, check: str, verdict: str = PASS, summary: str = "well") -> Finding:
    return Finding(host, check, verdict, summary, "" if verdict == PASS else "repair it")


def test_two_hosts_have_a_column_each() -> None:
    findings = [
        finding("node1", "ssh"),
        finding("node2", "ssh", FAIL, "no route"),
        finding("node1", "disk", WARN, "low"),
        finding("node1", "disk", FAIL, "full"),
        finding("node1", "disk"),
    ]
    assert format_table(["node1", "node2"], ["ssh", "disk", "clock"], findings).splitlines() == [
        "       node1      node2",
        "ssh    PASS well  FAIL no route",
        "disk   FAIL full  -",
        "clock  -          -",
    ]


def test_hosts_with_the_same_verdicts_share_a_column() -> None:
    hosts = [f"node{number}" for number in range(1, 21)]
    findings = [finding(host, check, summary=f"on {host}") for host in hosts for check in ROWS]
    findings[0] = finding("node1", ROWS[0], WARN, "slow")
    findings += [
        finding("node7", "disk", FAIL, "a very long story of what is wrong with this disk")
    ] * 2
    lines = format_table(hosts, ROWS, findings).splitlines()
    assert re.split(r" {2,}", lines[0].strip()) == ["node1", "node2 and 17 like it", "node7"]
    assert len(lines) == len(ROWS) + 1
    assert max(map(len, lines)) <= WIDTH
    disk = next(line for line in lines if line.startswith("disk"))
    assert re.search(r"  FAIL a very long story [\w ]+…$", disk)


def test_hosts_that_all_differ_are_all_shown() -> None:
    """In blocks that are no wider than a terminal."""
    hosts = [f"node{number}" for number in range(1, 7)]
    names = [f"check{number}" for number in range(6)]
    findings = [
        finding(host, check, FAIL if host[4:] == str(int(check[5:]) + 1) else PASS, "x" * 15)
        for host in hosts
        for check in names
    ]
    table = format_table(hosts, names, findings)
    assert len(table.split("\n\n")) == 2
    assert [word for word in table.split() if word.startswith("node")] == hosts
    assert max(map(len, table.splitlines())) <= WIDTH


def test_long_names_stay_apart() -> None:
    hosts = [f"gpu-worker-{number:02}.rack.example.com" for number in range(4)]
    heads = format_table(hosts, ["ssh"], []).splitlines()[0].split()
    assert len(set(heads)) == len(hosts)


def test_a_diagnosis_for_people_and_for_machines() -> None:
    whole = Diagnosis(
        {"node1": (0, 1), "node2": (0,)},
        [
            finding("node1", "ssh"),
            finding("node2", "ssh", WARN, "slow"),
            finding("node2", "disk", FAIL, "full"),
        ],
        Route("10.0.0.1", 1234, {"node1": {"name": "eth0"}}),
        NETWORK,
        "the prediction",
        seconds=1.25,
    )
    assert not whole.ok
    assert whole.failures == ["node2: disk: repair it"]
    assert whole.table().splitlines()[len(ROWS) + 2 :] == [
        "FAIL  node2: disk: repair it",
        "WARN  node2: ssh: repair it",
        "",
        NETWORK.text(),
        "",
        "the prediction",
        "",
        "2 hosts, 3 ranks, 1.2 s: 1 failed, 1 warning",
    ]
    content = json.loads(json.dumps(whole.as_json()))
    assert (content["ok"], content["slots"], content["master_address"]) == (
        False,
        {"node1": [0, 1], "node2": [0]},
        "10.0.0.1",
    )
    assert content["findings"][2] == {
        "host": "node2",
        "check": "disk",
        "verdict": "FAIL",
        "summary": "full",
        "told": "full",
        "advice": "repair it",
    }
    assert content["all_reduce"]["bus_bandwidth"] == pytest.approx(6e9)
    assert content["interfaces"] == {"node1": "eth0"}


# --- ssh ---

SSH_SAYS = [
    (
        "ssh: Could not resolve hostname node2: Name or service not known",
        "name does not resolve",
        "add `ADDRESS node2` to /etc/hosts on every host, or a HostName to ~/.ssh/config",
    ),
    (
        "ssh: Could not resolve hostname node2: Temporary failure in name resolution",
        "name does not resolve",
        "node2",
    ),
    (
        "ssh: connect to host node2 port 22: Connection refused",
        "connection refused",
        "apt install openssh-server",
    ),
    ("ssh: connect to host node2 port 22: No route to host", "no route", "`ping node2`"),
    ("ssh: connect to host node2 port 22: Network is unreachable", "no route", "`ping node2`"),
    (
        "ssh: connect to host node2 port 22: Connection timed out",
        "no answer",
        "no firewall drops port 22",
    ),
    (
        "Connection timed out during banner exchange\nConnection to 10.0.0.2 port 22 timed out",
        "no answer",
        "`ping node2`",
    ),
    ("Timeout, server node2 not responding.", "no answer", "`ping node2`"),
    (
        "root@node2: Permission denied (publickey,password).",
        "permission denied",
        "`ssh-copy-id node2`",
    ),
    (
        "Received disconnect from 10.0.0.2 port 22:2: Too many authentication failures\n"
        "Disconnected from 10.0.0.2 port 22",
        "permission denied",
        "`ssh-copy-id node2`",
    ),
    (
        "Host key verification failed.",
        "unknown host key",
        "`ssh-keyscan -H node2 >> ~/.ssh/known_hosts`",
    ),
    (
        "No ED25519 host key is known for node2 and you have requested strict checking.\nHost key "
        "verification failed.",
        "unknown host key",
        "`ssh-keyscan -H node2 >> ~/.ssh/known_hosts`",
    ),
    (
        "@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@\n"
        "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\n"
        "Offending ED25519 key in /root/.ssh/known_hosts:3\nHost key verification failed.",
        "host key has changed",
        "`ssh-keygen -R node2`, then `ssh-keyscan -H node2 >> ~/.ssh/known_hosts`",
    ),
    (
        "@         WARNING: UNPROTECTED PRIVATE KEY FILE!          @\n"
        "Permissions 0644 for '/root/.ssh/id_rsa' are too open.\nroot@node2: Permission denied "
        "(publickey).",
        "private key readable by others",
        "`chmod 600`",
    ),
    ("Bad owner or permissions on /root/.ssh/config", "~/.ssh/config is invalid", "`ssh node2`"),
    (
        "/root/.ssh/config: line 3: Bad configuration option: hostnam\n"
        "/root/.ssh/config: terminating, 1 bad configuration options",
        "~/.ssh/config is invalid",
        "`ssh node2`",
    ),
    (
        "kex_exchange_identification: Connection closed by remote host",
        "connection closed by its sshd",
        "MaxStartups",
    ),
    (
        "kex_exchange_identification: read: Connection reset by peer\nConnection reset by 10.0.0.2 "
        "port 22",
        "connection closed by its sshd",
        "journalctl -u ssh",
    ),
    (
        "Unable to negotiate with 10.0.0.2 port 22: no matching host key type found. Their offer: "
        "ssh-rsa",
        "ssh failed",
        "ssh says: Unable to negotiate with 10.0.0.2 port 22: no matching host key type found. "
        "Their offer: ssh-rsa; try `ssh node2 true`",
    ),
    ("", "ssh failed", "ssh says: status 255; try `ssh node2 true`"),
]


@pytest.mark.parametrize(("stderr", "cause", "remedy"), SSH_SAYS)
def test_what_ssh_says_is_explained(stderr: str, cause: str, remedy: str) -> None:
    banner = "** This machine belongs to the laboratory. **\n"
    for said in (stderr, banner + stderr) if stderr else ("",):
        explained = explain(CommandResult("node2", 255, "", said + "\n"))
        assert explained[0] == cause
        assert remedy in explained[1]
        assert "{" not in explained[1]


def test_a_key_is_made_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    done = CommandResult("node2", 255, "", "root@node2: Permission denied (publickey).")
    assert explain(done)[1] == "`ssh-keygen -t ed25519 -N ''`, then `ssh-copy-id node2`"
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").touch()
    assert explain(done)[1] == "`ssh-copy-id node2`"


def test_a_slow_host_is_not_a_network_error() -> None:
    cause, remedy = explain(CommandResult("node2", 124, "", "no answer within 30 s"))
    assert cause == "too slow"
    assert remedy == (
        "no answer within 30 s; look for a disk that hangs (`ssh node2 df`) or a slow login "
        "script, or raise --timeout"
    )


SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
echo "Last login: today"
case "$2" in
    closed) echo "ssh: connect to host closed port 22: Connection refused" >&2; exit 255 ;;
    slow) exec sleep 20 ;;
    latin) printf 'caf\\351\\n' ;;
esac
exec sh -c "$3"
"""


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an ssh on PATH that passes the command to a local shell, as sshd would, after some
    noise."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.mark.usefixtures("fake_ssh")
def test_a_command_arrives_word_by_word() -> None:
    words = ["printf", "%s|", "a b", "$(reboot)", "'; reboot; '", '"', "\\", "*", "~", "", "\n"]
    assert "--" in ssh("node1", words)
    done = run_on(["node1", "closed", "slow"], words, timeout=1.0, stdin="x" * 100_000)
    assert done["node1"] == CommandResult(
        "node1", 0, "Last login: today\n" + "|".join(words[2:]) + "|", ""
    )
    assert (done["closed"].status, done["slow"].status) == (255, 124)
    assert done["closed"].complaint == "ssh: connect to host closed port 22: Connection refused"
    assert done["slow"].complaint == "no answer within 1 s"


@pytest.mark.usefixtures("fake_ssh")
def test_noise_in_another_encoding_does_no_harm() -> None:
    assert run_on(["latin"], ["echo", "well"], timeout=5)["latin"].stdout.endswith("well\n")


# --- Programs sent to other hosts ---

PROBE = "launch.doctor.probe"


def through_a_shell(stdin: str, *pythons: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a parcel as sshd would, in a login shell that prints something of its own."""
    noise = "echo Welcome; echo 'vastscale-answer:{\"forged\": 1}'; printf 'no end of line'"
    return subprocess.run(
        ["sh", "-c", f"{noise}; {shlex.join(remote.command(*pythons))}"],
        input=stdin,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def probe_task(folder: Path, *dataset_dirs: Path) -> dict[str, Any]:
    return {
        "root": str(ROOT),
        "synced": remote.SYNCED,
        "dataset_dirs": list(map(str, dataset_dirs)),
        "output_dir": str(folder / "runs" / "new"),
        "packages": ["numpy", "no-such-package"],
    }


def test_a_program_arrives_and_answers(tmp_path: Path, dataset: Path) -> None:
    task = probe_task(tmp_path, dataset)
    (tmp_path / "hashlib.py").write_text(
        "raise SystemExit('the folder of the login shell is on the path')"
    )
    done = through_a_shell(
        remote.parcel(PROBE, task), "/no/python", sys.executable, folder=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    there, here = remote.answer(done.stdout), probe.answer(task)
    assert "forged" not in there
    for name in ("checkout", "cores", "hostname", "interfaces", "datasets", "packages"):
        assert there[name] == here[name]
    assert there["python"]["executable"] == sys.executable


def test_no_file_of_the_login_folder_is_imported(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(
        "raise SystemExit('the folder of the login shell is on the path')"
    )
    done = through_a_shell(
        remote.parcel(PROBE, probe_task(tmp_path)), sys.executable, folder=tmp_path
    )
    assert done.stderr == ""


def test_a_task_is_data(tmp_path: Path) -> None:
    task = {
        "is_first": False,
        "seconds": 0,
        "addresses": ["$(touch canary)", "'; touch canary; '\n\"\\", "é\u2028"],
        "ports": [],
        "source": "",
    }
    done = through_a_shell(
        remote.parcel("launch.doctor.reach", task), sys.executable, folder=tmp_path
    )
    assert remote.answer(done.stdout) == {
        "reached": {},
        "refused": dict.fromkeys(task["addresses"], ""),
    }
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    done = through_a_shell(
        remote.parcel("launch.doctor.reach", {}), sys.executable, folder=tmp_path
    )
    assert done.returncode == 1
    assert remote.last_line(done.stderr) == "KeyError: 'seconds'"
    # The caller must look at the status.
    assert remote.answer(done.stdout) == {"forged": 1}


def test_a_host_without_python_is_recognised(tmp_path: Path) -> None:
    done = through_a_shell("{}\n", "/no/python", "no-python3", folder=tmp_path)
    assert (done.returncode, done.stderr) == (127, "no /no/python here\n")


@pytest.mark.parametrize(
    ("printed", "answer"),
    [
        ("", None),
        ("well\n", None),
        ("x vastscale-answer:1\n", None),
        ("vastscale-answer:{\n", None),
        ("vastscale-answer:" + "[" * 100_000 + "\n", None),
        ("vastscale-answer:[1]\nlater\n", [1]),
        ("vastscale-answer:1\nvastscale-answer:2\n", 2),
        ("vastscale-answer:null\n", None),
        ("vastscale-answer:" + " " * (4 << 20) + "1\n", None),
    ],
)
def test_an_answer_is_found_in_what_was_printed(printed: str, answer: Any) -> None:
    assert remote.answer(printed) == answer


# --- Facts ---


def test_the_facts_of_this_machine(tmp_path: Path, dataset: Path) -> None:
    began = time.time()
    facts = probe.answer(probe_task(tmp_path, dataset))
    assert not [name for name, fact in facts.items() if isinstance(fact, dict) and "error" in fact]
    assert json.loads(json.dumps(facts)) == facts
    assert began <= facts["began"] <= facts["ended"] <= time.time()
    assert facts["python"] == {"version": sys.version.split()[0], "executable": sys.executable}
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert {name: facts["packages"][name] for name in ("numpy", "no-such-package")} == {
        "numpy": version("numpy"),
        "no-such-package": "",
    }
    assert 0 < facts["memory"]["free"] <= facts["memory"]["total"]
    assert facts["output"]["at"] == str(tmp_path)
    assert (facts["output"]["complaint"], facts["output"]["free"] > 0) == ("", True)
    assert {one["address"] for one in facts["interfaces"]} <= {
        address for _, address in own_addresses()
    }
    assert 0 < facts["limits"]["open_files"] <= facts["limits"]["most_open_files"]
    files = facts["checkout"]["files"]
    assert {"train.py", "launch/doctor/probe.py", "recipes/demo.yaml", "ds_config.json"} <= set(
        files
    )
    assert files["train.py"] == hashlib.sha256((ROOT / "train.py").read_bytes()).hexdigest()[:16]
    assert not list(tmp_path.iterdir())


def test_a_fact_that_fails_does_not_prevent_the_others(tmp_path: Path) -> None:
    facts = probe.answer({**probe_task(tmp_path), "root": None, "output_dir": "/proc/runs"})
    assert facts["checkout"]["error"].startswith("TypeError: ")
    assert facts["output"]["at"] == "/proc"
    assert facts["output"]["complaint"]
    assert facts["cores"] > 0


def test_the_commit_of_a_checkout_with_and_without_git(tmp_path: Path) -> None:
    def commit() -> str:
        return probe.answer({**probe_task(tmp_path), "root": str(tmp_path)})["checkout"]["commit"]

    assert commit() == ""
    (tmp_path / remote.SYNCED).write_text('{"commit": "0123456789"}')  # written by launch/sync.sh
    assert commit() == "0123456789"
    (tmp_path / remote.SYNCED).write_text("[]")
    assert commit() == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert commit() == head
    assert probe.answer({**probe_task(tmp_path), "root": str(tmp_path / "none")})["checkout"] == {
        "exists": False,
        "commit": "",
        "files": {},
    }


def test_a_dataset_is_checked(tmp_path: Path, dataset: Path) -> None:
    whole = probe.probe_dataset(str(dataset))
    assert (whole["files"], whole["checked"], whole["missing"], whole["first_missing"]) == (
        13,
        13,
        0,
        "",
    )
    assert [own["count"] for own in whole["lists"].values()] == [10, 3]
    assert set(whole["sample"]) == {f"photos/{number:02}.npy" for number in range(13)}
    assert all(whole["sample"].values())

    copied = tmp_path / "copy"
    for name in whole["sample"]:
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes((dataset / name).read_bytes())
    lines = (dataset / "training_file_list.txt").read_text().splitlines()
    (copied / "training_file_list.txt").write_bytes(
        ("\ufeff" + "\r\n".join(reversed(lines))).encode()
    )
    (copied / "validation_file_list.txt").write_bytes(
        (dataset / "validation_file_list.txt").read_bytes()
    )
    same = probe.probe_dataset(str(copied))
    assert same == {**whole, "directory": str(copied)}  # neither order nor line endings matter
    own = {**FACTS, "datasets": [same]}
    assert [
        one.verdict
        for one in datasets(Comparison("b", (0,), own, "a", {"datasets": [whole]}, 2, PYTHON))
    ] == [PASS]

    values = np.load(copied / "photos/03.npy")
    values[-1, -1, -1] ^= 1
    np.save(copied / "photos/03.npy", values)
    (copied / "photos/05.npy").unlink()
    (copied / "photos/07.npy").unlink()
    os.mkfifo(copied / "photos/07.npy")  # reading it must not block
    other = probe.probe_dataset(str(copied))
    assert {name for name in whole["sample"] if whole["sample"][name] != other["sample"][name]} == {
        "photos/03.npy",
        "photos/05.npy",
        "photos/07.npy",
    }
    assert (other["missing"], other["first_missing"]) == (2, "photos/05.npy")


def test_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    facts = probe.probe_dataset(str(tmp_path / "none"))
    assert {own["complaint"] for own in facts["lists"].values()} == {"No such file or directory"}
    assert (facts["files"], facts["missing"], facts["sample"]) == (0, 0, {})


def test_a_slow_disk_is_checked_only_in_part(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "LOOK_SECONDS", -1)
    facts = probe.probe_dataset(str(dataset))
    assert (facts["files"], facts["checked"], facts["sample"]) == (13, 0, {})


# --- The network ---


def interface(name: str, address: str, speed: int = 0) -> dict[str, Any]:
    return {"name": name, "address": address, "speed": speed, "mtu": 1500}


def test_the_fastest_real_interface_comes_first() -> None:
    lo, docker = interface("lo", "127.0.0.1"), interface("docker0", "172.17.0.1", 10_000)
    slow, fast = interface("eth0", "10.0.0.1", 1000), interface("ib0", "10.1.0.1", 100_000)
    assert usable([lo, docker, slow, fast]) == [fast, slow]
    assert usable([lo, docker]) == [docker]
    assert usable([lo]) == [lo]
    assert usable([]) == []
    assert hosts_of({"a": [lo, slow], "b": [lo, docker], "c": [docker]}) == {"10.0.0.1": "a"}


def test_each_host_gets_its_own_interface_and_ranks() -> None:
    route = Route("10.0.0.1", 4711, {"a": {"name": "eth0"}, "b": {"name": "ib0"}})
    tasks = task_of({"a": (1, 3), "b": (0,)}, route, on_gpus=True)
    assert [(task["ranks"], task["devices"], task["world_size"]) for task in tasks.values()] == [
        ([0, 1], [1, 3], 3),
        ([2], [0], 3),
    ]
    assert tasks["b"]["environment"]["NCCL_SOCKET_IFNAME"] == "=ib0"
    tasks = task_of({"a": (1, 3), "b": (0,)}, route, on_gpus=False)
    assert [(task["ranks"], task["devices"]) for task in tasks.values()] == [
        ([0], None),
        ([1], None),
    ]
    assert {(task["address"], task["port"]) for task in tasks.values()} == {("10.0.0.1", 4711)}


def test_an_interface_that_no_host_has_is_reported() -> None:
    hosts = ["node1", "node2"]
    interfaces = {host: [interface("eth0", "10.0.0.1")] for host in hosts}
    route = find_route(hosts, interfaces, PYTHON, interface="eth9")
    assert [one.summary for one in route.findings] == ["no interface", "no interface"]


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def test_hosts_find_the_first_by_its_token() -> None:
    """They are not fooled by another program on a port, or by a port without a listener."""
    closed, tried = free_ports(2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        common = {
            "token": "abc",
            "seconds": 3,
            "others": 1,
            "source": "",
            "addresses": ["127.0.0.1", "192.0.2.1"],
        }
        first: dict[str, Any] = {}
        thread = threading.Thread(
            target=lambda: first.update(
                reach.answer({**common, "is_first": True, "name": "a", "ports": [tried, taken]})
            )
        )
        thread.start()
        answer = reach.answer({**common, "is_first": False, "name": "b", "ports": [closed, tried]})
        thread.join()
    assert {address: own for address, (own, _) in answer["reached"].items()} == {
        "127.0.0.1": "127.0.0.1"
    }
    assert set(answer["refused"]) == {"192.0.2.1"}
    assert first == {"busy": [taken]}


def test_an_unreachable_first_host_is_reported() -> None:
    (port,) = free_ports(1)
    answer = reach.answer(
        {
            "token": "abc",
            "seconds": 0.3,
            "source": "",
            "addresses": ["127.0.0.1"],
            "is_first": False,
            "name": "b",
            "ports": [port],
        }
    )
    assert answer == {"reached": {}, "refused": {"127.0.0.1": "Connection refused"}}


# --- The whole diagnosis, on this machine under several names ---


@pytest.mark.usefixtures("fake_ssh")
def test_the_whole_diagnosis(tmp_path: Path, dataset: Path) -> None:
    said: list[str] = []
    whole = diagnose(
        {"here": (0,), "closed": (0,)},
        dataset_dirs=[dataset],
        output_dir=tmp_path / "runs",
        say=said.append,
        with_all_reduce=False,
    )
    verdicts = {(one.host, one.check): one.verdict for one in whole.findings}
    assert {check for host, check in verdicts if host == "here"} == set(ROWS) - {"all-reduce"}
    assert {
        check: verdict
        for (host, check), verdict in verdicts.items()
        if host == "here" and verdict == FAIL
    } == {}
    assert {host: verdicts[host, "ssh"] for host in whole.slots} == {"here": PASS, "closed": FAIL}
    assert len(whole.failures) == 1
    assert whole.failures[0].startswith("closed: ssh: connection refused; start sshd there")
    assert said == ["doctor: asking here, closed"]
    assert "2 hosts, 2 ranks" in whole.table()


# --- Step time and parameters of a run ---


def make_run(folder: Path, *log: str, batch: Any = 64, world_size: Any = 4) -> Path:
    manifest = folder / "checkpoints" / "step-00000010" / "MANIFEST.json"
    manifest.parent.mkdir(parents=True)
    seal(manifest.parent, 10, world_size)
    (folder / "ds_config.json").write_text(json.dumps({"train_batch_size": batch}))
    (folder / "log.jsonl").write_text("".join(f"{line}\n" for line in log))
    return folder


STEP = '{"event": "train", "step": 9, "images_per_second": 320.0}'


def test_the_step_time_is_read_from_a_runs_log(tmp_path: Path) -> None:
    """64 images at 320 per second: 0.2 s per step of 4 ranks; each of 8 ranks does half as much."""
    run = make_run(
        tmp_path / "run",
        STEP.replace("320", "5"),
        STEP,
        '{"event": "validation", "psnr": 30}',
        "[]",
        '{"event": "train", "images_per_second": 0.0}',
        '{"event": "train", "images_per_second": null}',
        '{"event": "train", "images_per_sec',
    )
    assert step_seconds_of(run, 4) == pytest.approx(0.2)
    assert step_seconds_of(run, 8) == pytest.approx(0.1)
    assert step_seconds_of(run, 1) == pytest.approx(0.8)
    make_run(tmp_path / "staged" / "gan", STEP)
    assert step_seconds_of(tmp_path / "staged", 4) == pytest.approx(0.2)


def test_a_run_without_a_log_has_no_step_time(tmp_path: Path) -> None:
    assert step_seconds_of(tmp_path / "none", 4) is None
    assert step_seconds_of(make_run(tmp_path / "a"), 4) is None
    assert step_seconds_of(make_run(tmp_path / "b", STEP, batch="many"), 4) is None
    unsaved = make_run(tmp_path / "c", STEP)
    (unsaved / "checkpoints" / "step-00000010" / "MANIFEST.json").unlink()
    assert step_seconds_of(unsaved, 4) is None


def test_parameters_are_those_of_generator_and_discriminator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RRDBNet x4 with 23 blocks has 16,697,987 parameters, Real-ESRGAN's U-Net 4,376,897; this
    network has one block less."""
    monkeypatch.chdir(tmp_path)  # it works in any folder
    # A block has three of these.
    dense = 9 * 32 * (64 + 96 + 128 + 160) + 4 * 32 + 9 * 192 * 64 + 64
    counted = count_parameters(
        "realesrgan_x4", ["generator.num_blocks=22", "ds.train_batch_size=4"]
    )
    assert counted == 16_697_987 - 3 * dense + 4_376_897


def test_an_invalid_recipe_has_no_parameters() -> None:
    with pytest.raises(UserError) as caught:
        count_parameters("vapsr_x9")
    assert str(caught.value).startswith("--recipe vapsr_x9: ")
    assert "did you mean 'vapsr_x" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_current_folder_is_not_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)
    assert count_parameters("compact_x4") > 0
