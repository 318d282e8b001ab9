"""The runtimes besides PyTorch, and which of them are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.inference.backends import NetworkFile
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
