"""Libraries that must be used in a certain way: torchvision, with those that import it, ONNX
Runtime, torch._dynamo and glibc.

torchvision's wheel is built against the CUDA build of torch. With the CPU build of torch its
compiled operators cannot load, and torchvision 0.28.0 then fails while it is imported: it gives two
of these operators ("nms", "qnms") a shape function without asking first whether they exist.
Declaring the two lets the import pass. What needs the compiled operators (`torchvision.ops.nms`,
`torchvision.io.read_image`) still raises torchvision's own clear error; the networks and the
transforms, all that is used here, are plain PyTorch.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

_SCHEMA = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None  # a torch.library.Library; what it declares is gone once it is collected


def import_torchvision() -> ModuleType:
    """Import torchvision, whichever build of torch there is; changes nothing where torchvision
    imports by itself.

    To be called before any import of a library that imports torchvision, in every process. It costs
    about a second the first time: call it where torchvision is needed, not at the top of a module.
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
    """Declare the two operators, and forget what the failed import has left behind."""
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

    Since 1.31 an import gives the machine an id and keeps events in the user's cache, unless
    `ORT_DISABLE_TELEMETRY` is set in the environment.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


# Every optimizer of torch imports torch._dynamo, the front end of torch.compile, only to break a
# graph that is not being traced. That is 950 modules and 1.3 of the 3.5 CPU seconds before the
# first step of a run that compiles nothing.


class _PostponedDynamo(ModuleType):
    """Stands in for torch._dynamo; any use but the two below imports the real one in its place."""

    @staticmethod
    def graph_break(*_: object, **__: object) -> None:
        """Nothing is traced while the real module is not there, so there is nothing to break."""

    @staticmethod
    def disable(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
        """Nothing is traced, so the function is one that is not traced."""
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # somebody looks through all modules
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__], sys.modules["torch"]._dynamo
        return getattr(importlib.import_module(self.__name__), name)


def postpone_dynamo() -> None:
    """Let torch._dynamo be imported when something is compiled, and not by the first optimizer.

    To be called before the first optimizer is built. Changes nothing where it is imported already.
    """
    import torch

    if "torch._dynamo" not in sys.modules:
        sys.modules["torch._dynamo"] = torch._dynamo = _PostponedDynamo("torch._dynamo")


# Tensors of a network that runs on a CPU are freed and allocated again in every step. By default
# glibc returns that memory to the system, and the kernel zeroes new pages for the next step:
# 125,000 page faults in a step of VapSR, a quarter of its time. With both thresholds raised the
# process keeps it. The threshold of trimming alone would make it twice as slow: it freezes the
# other one at 128 KiB.

MMAP_THRESHOLD = 1 << 30
MMAP_THRESHOLD_OLD = 1 << 25
"""The most that older versions of glibc take; they ignore a larger one. 2.36 is known to take
more."""
TRIM_THRESHOLD = 1 << 40  # bytes at the end of the heap that are kept: all
_TUNING = {
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_MAX_",
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def allocator_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that let a process keep the memory it frees, to be added to the `environment` it
    starts with.

    Empty where the environment tunes the allocator already, and where there is no glibc.
    """
    glibc = _glibc()
    if glibc is None or _is_tuned(environment):
        return {}
    largest = MMAP_THRESHOLD if glibc >= (2, 36) else MMAP_THRESHOLD_OLD
    return {"MALLOC_MMAP_THRESHOLD_": str(largest), "MALLOC_TRIM_THRESHOLD_": str(TRIM_THRESHOLD)}


def keep_freed_memory() -> bool:
    """The same for the process under way, whose start did not do it. Whether anything was set."""
    if _glibc() is None or _is_tuned(os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    if not any(
        mallopt(_M_MMAP_THRESHOLD, threshold) for threshold in (MMAP_THRESHOLD, MMAP_THRESHOLD_OLD)
    ):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, -1))  # never


def _is_tuned(environment: Mapping[str, str]) -> bool:
    """Whether somebody has decided what the allocator keeps."""
    return not _TUNING.isdisjoint(environment) or "glibc.malloc." in environment.get(
        "GLIBC_TUNABLES", ""
    )


def _glibc() -> tuple[int, ...] | None:
    """Its version; `None` with another C library."""
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
