"""The runtimes besides PyTorch, and which of them are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pipeline.inference.onnx_runtime import TITLE as ONNX_TITLE
from pipeline.inference.onnx_runtime import OnnxRuntime
from pipeline.inference.openvino_runtime import TITLE as OPENVINO_TITLE
from pipeline.inference.openvino_runtime import OpenVinoRuntime


@dataclass(frozen=True)
class RuntimeKind:
    """One runtime."""

    name: str
    """As `--backend` has it."""
    title: str
    package: str
    """What is imported."""
    distributions: tuple[str, ...]
    """What is installed: one of these."""
    load: Callable[[Path | bytes, torch.device], NetworkFile]
    suffixes: tuple[str, ...]
    on_gpu: bool

    def version(self) -> str:
        """Name and version of what is installed of it."""
        found = next(name for name in self.distributions if _is_installed(name))
        return f"{found} {importlib.metadata.version(found)}"

    def missing(self, *, to_convert: bool) -> str | None:
        """The name, for pip, of the first package that is not installed: of the runtime, and of the exporter."""
        wanted = {self.package: self.distributions[0]}
        if to_convert:
            wanted |= {"onnx": "onnx", "onnxscript": "onnxscript", "skimage": "scikit-image"}
        return next((name for package, name in wanted.items() if importlib.util.find_spec(package) is None), None)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


RUNTIMES = {kind.name: kind for kind in (
    RuntimeKind("openvino", OPENVINO_TITLE, "openvino", ("openvino",), OpenVinoRuntime, (".onnx", ".xml"),
                on_gpu=False),
    RuntimeKind("onnx", ONNX_TITLE, "onnxruntime", ("onnxruntime", "onnxruntime-gpu"), OnnxRuntime, (".onnx",),
                on_gpu=True))}


DESCRIBED = ("architecture", "scale", "params")
"""In the metadata of our own files; with them a network can be built."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class NetworkFile(Protocol):
    """A network in a runtime that is not PyTorch."""

    title: str
    """Name and version of the runtime."""
    inputs: list[tuple[int | None, ...]]
    """Their shapes; `None` is any number."""
    dtype: np.dtype | None
    """Of the first input: float32, float16 or uint8; `None`: something else."""
    metadata: dict[str, str]
    """Of our own files at least `DESCRIBED`."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """One batch as the file takes it -> its first output. `MemoryError`; `RunError` for what it cannot run."""

    def most_elements(self, shape: tuple[int, ...]) -> int:
        """What the hungriest operator reads and writes for an input of that shape, without its weights."""


def usable_threads() -> int:
    """How many threads a runtime may start: `OMP_NUM_THREADS`, else the cores that process and container may use."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said):
        return int(said)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or no limit in it
        return cores


_SIGNS = ("allocate memory", "out of memory", "DefaultCPUAllocator", "bad_alloc", "bad allocation",
          "Failed to allocate")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of PyTorch, ONNX Runtime or OpenVINO says that the memory did not suffice."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in _SIGNS)
