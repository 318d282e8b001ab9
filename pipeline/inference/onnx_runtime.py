"""An ONNX file in ONNX Runtime, on the CPU or on a CUDA GPU."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cli import RunError, UserError
from pipeline.export.runtimes import is_out_of_memory, usable_threads
from pipeline.models.common import told
from pipeline.onnxruntime_import import import_onnxruntime

TITLE = "ONNX Runtime"
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
_SILENT = 4  # what goes wrong it raises, too


class OnnxRuntime:
    """One network; see `NetworkFile`.

    Args:
        source: an .onnx file, or its content.
        device: "cpu", or a CUDA device for ONNX Runtime's CUDA provider. `UserError` where that is not installed.
    """

    def __init__(self, source: Path | bytes, device: torch.device) -> None:
        onnxruntime = import_onnxruntime()
        self.title = f"{TITLE} {'.'.join(onnxruntime.__version__.split('.')[:2])}"
        self._source, self._providers = source, _providers(device)
        self._session = self._opened(onnxruntime.SessionOptions())
        if device.type == "cuda" and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise UserError(f"{self.title} has a CUDA provider that does not start; do CUDA and cuDNN fit? "
                            "say --backend torch")
        found = self._session.get_modelmeta()
        self.metadata = dict(found.custom_metadata_map)
        self.inputs = [tuple(side if isinstance(side, int) else None for side in one.shape)
                       for one in self._session.get_inputs()]
        first = self._session.get_inputs()[0]
        self.dtype = np.dtype(_TYPES[first.type]) if first.type in _TYPES else None
        self._names = [self._session.get_outputs()[0].name], first.name

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `NetworkFile`."""
        outputs, name = self._names
        try:
            return self._session.run(outputs, {name: images})[0]
        except Exception as error:  # it has many of its own, none of which is a RuntimeError
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise RunError(f"{self.title} cannot run the network on {images.shape} ({told(error)})") from error

    def most_elements(self, shape: tuple[int, ...]) -> int:
        """See `NetworkFile`: as the profile of a run says, of the network as it is run."""
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = str(Path(folder) / "run")
            session = self._opened(options)
            session.run(self._names[0], {self._names[1]: np.zeros(shape, self.dtype)})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        made = {shape}
        return max([1, *_handled(events, made)])

    def _opened(self, options: Any) -> Any:
        onnxruntime = import_onnxruntime()
        options.log_severity_level = _SILENT
        options.intra_op_num_threads, options.inter_op_num_threads = usable_threads(), 1
        options.enable_mem_pattern = False  # it takes the memory of a second run at every new size
        source = self._source if isinstance(self._source, bytes) else str(self._source)
        try:
            return onnxruntime.InferenceSession(source, options, providers=self._providers)
        except Exception as error:
            what = repr(str(self._source)) if isinstance(self._source, Path) else "the network"
            raise UserError(f"{self.title} cannot load {what} ({told(error)}); is it whole, and ONNX?") from error


def _providers(device: torch.device) -> list[Any]:
    onnxruntime = import_onnxruntime()
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if device.type != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise UserError(f"the installed ONNX Runtime does not run on {device}; do: pip install onnxruntime-gpu, or say "
                        "--device cpu or --backend torch")
    cuda = {"device_id": str(device.index or 0), "use_tf32": "0",  # TF32 keeps 11 bits
            "cudnn_conv_algo_search": "HEURISTIC"}  # others search anew for every size of tile
    return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]


def _handled(events: list[dict[str, Any]], made: set[tuple[int, ...]]) -> Iterator[int]:
    """What each operator of a profile read and wrote, in elements, without its weights: inputs that nothing made."""
    for event in events:
        told_of = event.get("args", {})
        if event.get("cat") != "Node" or "output_type_shape" not in told_of:
            continue
        inputs, outputs = ([tuple(shape) for one in told_of[key] for shape in one.values()]
                           for key in ("input_type_shape", "output_type_shape"))
        made |= set(outputs)
        yield sum(math.prod(shape) for shape in (*outputs, *(one for one in inputs if one in made)))
