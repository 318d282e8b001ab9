"""ONNX files run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.export.onnx_file import INPUT, OUTPUT
from pipeline.export.parity import Runtime
from pipeline.onnxruntime_import import import_onnxruntime


def onnx_runtime(path: Path) -> Runtime:
    """Runs an ONNX file by ONNX Runtime, on the CPU."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong it raises, too
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        return session.run([OUTPUT], {INPUT: images})[0]

    return run
