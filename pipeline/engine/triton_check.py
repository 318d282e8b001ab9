"""Find out whether Triton can compile a kernel on this machine, by compiling one.

On a GPU, Inductor generates Triton kernels. A successful `import triton` proves little: at its
first kernel Triton also compiles a C helper against Python's headers and the driver's library, and
loads it from its cache. Each of these is missing on some plain GPU image and would end a run in its
first step. `python -m pipeline.engine.triton_check` prints what torch and Triton report about this
machine's GPUs as one line of JSON, for the doctor.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch

_COMPILERS = ("cc", "gcc", "clang")


def why_no_triton(device: torch.device) -> str:
    """Return "" if a kernel compiles and computes correctly, else what is missing and a remedy."""
    from torch.utils._triton import has_triton, has_triton_package

    if not has_triton_package():
        return "Triton is missing (pip install triton, in the version that torch requires)"
    try:
        from pipeline.engine.smallest_kernel import doubled

        # A kernel first: `has_triton` hides why its answer is no.
        return "" if doubled(device) == 2.0 and has_triton() else "Triton does not know this GPU"
    except Exception as error:  # a compiler's, a linker's, a disk's: each means it does not work
        return _explain(error)


def _explain(error: Exception) -> str:
    """Translate a Triton error into its cause and remedy."""
    message = str(error) or type(error).__name__
    if not (os.environ.get("CC") or any(map(shutil.which, _COMPILERS))):
        return "there is no C compiler (Debian: apt install gcc)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers are missing (Debian: apt install python3-dev)"
    if isinstance(error, subprocess.CalledProcessError):
        return (
            "the C compiler failed on Triton's own code: "
            f"{_one_line(' '.join(map(str, error.cmd)))}"
        )
    if "libcuda" in message or "ldconfig" in message:
        return (
            "Triton does not find libcuda.so.1 in the output of `ldconfig -p`; run ldconfig as "
            "root, or set TRITON_LIBCUDA_PATH to its folder"
        )
    if "failed to map segment" in message:
        return (
            "Triton's cache is on a disk mounted noexec; set TRITON_CACHE_DIR to a folder on "
            "another disk"
        )
    if isinstance(error, PermissionError):
        return (
            f"Triton's cache is not writable ({error.filename}); set TRITON_CACHE_DIR to a "
            "writable folder"
        )
    return f"Triton cannot compile a kernel: {type(error).__name__}: {_one_line(message)}"


def _one_line(text: str, most: int = 200) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= most else f"{line[:most]}…"


def report() -> dict[str, Any]:
    """Return versions, GPUs, and what keeps torch from using or Triton from compiling for them."""
    from pipeline.cli import UserError
    from pipeline.distributed.gpus import driver_version, refuse_old_gpu, torch_gpus

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "driver": driver_version(),
        "gpus": [],
        "complaint": "",
        "uncompiled": "",
    }
    try:
        for number in range(torch_gpus()):
            major, minor = torch.cuda.get_device_capability(number)
            found["gpus"].append(
                {"name": torch.cuda.get_device_name(number), "capability": f"{major}.{minor}"}
            )
            refuse_old_gpu(number)
        if found["gpus"]:
            found["uncompiled"] = why_no_triton(torch.device("cuda", 0))
    except UserError as error:
        found["complaint"] = str(error)
    except RuntimeError as error:  # a driver that fails on first use
        found["complaint"] = f"torch cannot use the GPUs: {_one_line(str(error))}"
    return found


if __name__ == "__main__":
    print(json.dumps(report()))
