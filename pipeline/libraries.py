"""Workarounds for libraries: torchvision, ONNX Runtime, OpenVINO, _dynamo, Inductor, glibc.

torchvision's wheel is built against the CUDA build of torch. With the CPU build of torch its
compiled operators cannot load, and torchvision 0.28.0 then fails on import: it registers shape
functions for two of these operators ("nms", "qnms") without checking that they exist. Declaring the
two makes the import pass. What needs the compiled operators (`torchvision.ops.nms`,
`torchvision.io.read_image`) still raises torchvision's own clear error; the networks and
transforms, which are all that is used here, are plain PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.files import private_dir
from pipeline.installation import user_cache_dir

_SCHEMA = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None  # a torch.library.Library; its declarations vanish once it is garbage-collected


class _ImportedOnUse(ModuleType):
    """Placeholder for a module, which is imported on the first access to an attribute.

    Every command imports all the code it may need before it reads its arguments; without this,
    `--help` would wait for large libraries.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import cv2
else:
    cv2 = _ImportedOnUse("cv2")


def import_torchvision() -> ModuleType:
    """Import torchvision with any build of torch, working around a failing import if necessary.

    Call it before importing a library that imports torchvision, in every process. The first call
    takes about a second: call it where torchvision is needed, not at the top of a module.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    else:
        return torchvision
    _declare_operators()
    import torchvision

    return torchvision


def _declare_operators() -> None:
    """Declare the two operators, and remove what the failed import left in `sys.modules`."""
    global _library
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    if _library is None:
        _library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _library.define(_SCHEMA.format(operator))


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime without its telemetry.

    Since version 1.31 an import assigns the machine an id and stores events in the user's cache,
    unless `ORT_DISABLE_TELEMETRY` is set in the environment.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


# Each of torch's optimizers imports torch._dynamo, the front end of torch.compile, only to break a
# graph that is not being traced. That costs 950 modules, and 1.3 of the 3.5 CPU seconds before the
# first step of a run that compiles nothing.


class _PostponedDynamo(ModuleType):
    """Stands in for torch._dynamo; any use except the two below replaces it with the real one."""

    @staticmethod
    def graph_break(*_: object, **__: object) -> None:
        """Do nothing: without the real module nothing is traced, so there is no graph to break."""

    @staticmethod
    def disable(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
        """Return `function` unchanged: without the real module it is not traced anyway."""
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # code that inspects all modules
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__], sys.modules["torch"]._dynamo
        return getattr(importlib.import_module(self.__name__), name)


def postpone_dynamo() -> None:
    """Let torch._dynamo be imported when something is compiled, not by the first optimizer.

    Call it before the first optimizer is built. Does nothing if the module is already imported.
    """
    import torch

    if "torch._dynamo" not in sys.modules:
        sys.modules["torch._dynamo"] = torch._dynamo = _PostponedDynamo("torch._dynamo")


# Compiled code is loaded again by later processes, so nobody else may be able to write it. By
# default Inductor keeps its own in /tmp/torchinductor_USER, a folder that anyone can make first.


def keep_compiled_code_private() -> None:
    """Let Inductor and Triton keep compiled code in a folder that only this user can enter.

    It is below the user's cache, or in /tmp if that cannot be written. A folder that the user has
    chosen with TORCHINDUCTOR_CACHE_DIR or TRITON_CACHE_DIR is used as it is. Raises `UserError` if
    the folder belongs to somebody else.
    """
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    if all(os.environ.get(name) for name in names):
        return
    try:
        folder = private_dir(user_cache_dir() / "compiled")
    except (OSError, RuntimeError):  # RuntimeError: this user has no home folder
        folder = private_dir(Path(tempfile.gettempdir()) / f"vastscale-{os.geteuid()}")
    for name, part in names.items():
        if not os.environ.get(name):
            # Hosts that share a home folder need not have the same compiler and processor.
            os.environ[name] = str(folder / platform.node() / part)


# When a network runs on a CPU, its tensors are freed and allocated again in every step. By default
# glibc returns that memory to the system, and the kernel zeroes new pages in the next step: 125,000
# page faults per step of VapSR, a fifth of its time. With both thresholds raised the process
# keeps the memory. Raising only the trim threshold would make a step twice as slow, because that
# freezes the other one at 128 KiB.

MMAP_THRESHOLD = 1 << 30
MMAP_THRESHOLD_OLD = 1 << 25
"""The largest value that older versions of glibc accept; they ignore larger ones. 2.36 is known to
accept more."""
TRIM_THRESHOLD = 1 << 40  # bytes kept at the end of the heap: all of them
_TUNING = {
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_MAX_",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def allocator_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables that make a process keep the memory it frees.

    Add them to the `environment` with which it is started. Empty if the environment already tunes
    the allocator, or without glibc.
    """
    glibc = _glibc()
    if glibc is None or _is_tuned(environment):
        return {}
    largest = MMAP_THRESHOLD if glibc >= (2, 36) else MMAP_THRESHOLD_OLD
    return {"MALLOC_MMAP_THRESHOLD_": str(largest), "MALLOC_TRIM_THRESHOLD_": str(TRIM_THRESHOLD)}


@functools.cache
def openvino_core() -> Any:
    """Return the process's only `openvino.Core`, which lives as long as the process.

    The CPU plugin of each core puts the stack on which signals are handled into memory of its own,
    and restores the one before it when it ends. With two cores that end in the order in which they
    began, that one is gone, and the next signal that Python handles, such as CTRL+C, would end the
    process with SIGSEGV and without a word (OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


def keep_freed_memory() -> bool:
    """Make the current process keep the memory it frees; return whether anything was set."""
    if _glibc() is None or _is_tuned(os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    if not any(
        mallopt(_M_MMAP_THRESHOLD, threshold) for threshold in (MMAP_THRESHOLD, MMAP_THRESHOLD_OLD)
    ):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, -1))  # never


def _is_tuned(environment: Mapping[str, str]) -> bool:
    """Whether the environment already tunes the allocator."""
    return not _TUNING.isdisjoint(environment) or "glibc.malloc." in environment.get(
        "GLIBC_TUNABLES", ""
    )


def _glibc() -> tuple[int, ...] | None:
    """Return glibc's version; None with another C library."""
    try:
        name, _, number = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, ValueError, OSError):
        return None
    parts = number.split(".")
    return (
        tuple(map(int, parts))
        if name == "glibc" and all(part.isdecimal() for part in parts)
        else None
    )
