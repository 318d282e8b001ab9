"""ONNX Runtime, imported so that it stays offline."""

from __future__ import annotations

import os
from types import ModuleType


def import_onnxruntime() -> ModuleType:
    """The package, without its telemetry: since 1.31 an import gives the machine an id and keeps events in the user's
    cache, which `ORT_DISABLE_TELEMETRY` of the environment prevents."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime
