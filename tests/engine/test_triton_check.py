"""Messages when kernels cannot be compiled: for each thing that some GPU image lacks, with the
remedy."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from conftest import ROOT, environment
from pipeline.engine import triton_check
from pipeline.engine.engine import why_not_compiled
from pipeline.engine.triton_check import why_no_triton

CUDA = torch.device("cuda", 0)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for Triton whose kernel raises `error` or returns `result`."""
    state = SimpleNamespace(error=None, result=2.0)
    module = ModuleType("pipeline.engine.smallest_kernel")

    def doubled(device: torch.device) -> float:
        if state.error:
            raise state.error
        return state.result

    module.doubled = doubled
    monkeypatch.setitem(sys.modules, "pipeline.engine.smallest_kernel", module)
    import torch.utils._triton as known

    monkeypatch.setattr(known, "has_triton_package", lambda: True)
    monkeypatch.setattr(known, "has_triton", lambda: True)
    monkeypatch.setattr(triton_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    return state


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            AssertionError("libcuda.so cannot found!\nPossible files"),
            "run ldconfig as root, or set TRITON_LIBCUDA_PATH",
        ),
        (
            FileNotFoundError(2, "No such file", "/sbin/ldconfig"),
            "Triton does not find libcuda.so.1",
        ),
        (
            ImportError("/c/cuda_utils.so: failed to map segment from shared object"),
            "on a disk mounted noexec; set TRITON",
        ),
        (
            PermissionError(13, "Permission denied", "/root/.triton"),
            "is not writable (/root/.triton); set TRITON_CACHE",
        ),
        (
            subprocess.CalledProcessError(1, ["gcc", "main.c", "-l:libcuda.so.1"]),
            "the C compiler failed on Triton's own",
        ),
        (
            RuntimeError("PTX was compiled\nwith an unsupported toolchain"),
            "RuntimeError: PTX was compiled",
        ),
        (ValueError(), "Triton cannot compile a kernel: ValueError: ValueError"),
    ],
)
def test_what_triton_raises_is_the_reason(
    triton: SimpleNamespace, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: True)
    triton.error = error
    reason = why_not_compiled(CUDA)
    assert said in reason
    assert "\n" not in reason


def test_a_missing_compiler_and_missing_headers_are_told_from_all_else(
    triton: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    triton.error = RuntimeError(
        "Failed to find C compiler. Please specify via CC environment variable."
    )
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton_check.shutil, "which", lambda name: None)
    assert why_no_triton(CUDA) == "there is no C compiler (Debian: apt install gcc)"
    monkeypatch.setattr(triton_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    triton.error = subprocess.CalledProcessError(1, ["gcc"])
    assert why_no_triton(CUDA) == "Python's headers are missing (Debian: apt install python3-dev)"


def test_a_kernel_that_is_right_is_wanted(triton: SimpleNamespace) -> None:
    assert why_no_triton(CUDA) == ""
    triton.result = 1.0
    assert why_no_triton(CUDA) == "Triton does not know this GPU"


def test_without_triton_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.utils._triton as known

    monkeypatch.setattr(known, "has_triton_package", lambda: False)
    assert why_no_triton(CUDA).startswith("Triton is missing (pip install triton")


def test_the_report_of_a_machine_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.engine.triton_check"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found.pop("torch"), found.pop("cuda")) == (torch.__version__, torch.version.cuda or "")
    assert isinstance(found.pop("driver"), str)
    assert found == {"gpus": [], "complaint": "", "uncompiled": ""}
