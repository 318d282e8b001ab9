"""An ONNX or OpenVINO file in OpenVINO, on the CPU."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cli import RunError, UserError
from pipeline.export.openvino_file import EXACT, SECTION
from pipeline.export.runtimes import DESCRIBED, is_out_of_memory, usable_threads
from pipeline.models.common import told

TITLE = "OpenVINO"
_TYPES = {"f32": np.float32, "f16": np.float16, "u8": np.uint8}
_NO_WORK = ("Parameter", "Constant", "Result")


class OpenVinoRuntime:
    """One network; see `NetworkFile`.

    Args:
        source: an .xml file with its .bin beside it, an .onnx file, or the content of one.
        device: "cpu"; `UserError` for another.
        hint: OpenVINO's options that decide in what it computes.
    """

    def __init__(self, source: Path | bytes, device: torch.device, hint: Mapping[str, str] = EXACT) -> None:
        import openvino

        self.title = f"{TITLE} {'.'.join(openvino.__version__.split('.')[:2])}"
        if device.type != "cpu":
            raise UserError(f"OpenVINO runs on the CPU here, not on {device}; say --device cpu or --backend torch")
        options = {**hint, "INFERENCE_NUM_THREADS": usable_threads(), "ENABLE_CPU_PINNING": False}
        try:
            self._model = openvino.Core().read_model(source)
            self._network = openvino.Core().compile_model(self._model, "CPU", options)
        except RuntimeError as error:
            what = repr(str(source)) if isinstance(source, Path) else "the network"
            raise UserError(f"{self.title} cannot load {what} ({told(error)}); is it whole?") from error
        self.metadata = _metadata(self._model, source)
        self.inputs = [_sides(one) for one in self._model.inputs]
        self.dtype = np.dtype(_TYPES[name]) if (name := self._model.inputs[0].get_element_type().get_type_name()
                                                ) in _TYPES else None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `NetworkFile`."""
        try:
            return self._network(images)[0].copy()  # the next run writes into the same memory
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise RunError(f"{self.title} cannot run the network on {images.shape} ({told(error)})") from error

    def most_elements(self, shape: tuple[int, ...]) -> int:
        """See `NetworkFile`: of the network as it lies in the file."""
        model = self._model.clone()
        model.reshape(list(shape))
        return max([1, *(_handled(node) for node in model.get_ops() if node.get_type_name() not in _NO_WORK)])


def _handled(node: Any) -> int:
    """What an operator reads and writes, in elements, without its weights."""
    read = [one.get_shape() for one in node.inputs()
            if one.get_source_output().get_node().get_type_name() != "Constant"]
    shapes = (*read, *(one.get_shape() for one in node.outputs()))
    return sum(math.prod(shape) for shape in shapes)


def _sides(one: Any) -> tuple[int | None, ...]:
    shape = one.get_partial_shape()
    return () if shape.rank.is_dynamic else tuple(side.get_length() if side.is_static else None for side in shape)


def _metadata(model: Any, source: Path | bytes) -> dict[str, str]:
    """What our files say of themselves: .xml in a section, .onnx in its properties, which OpenVINO leaves out."""
    if isinstance(source, Path) and source.suffix.lower() == ".onnx" and importlib.util.find_spec("onnx"):
        import onnx

        found = onnx.load(source, load_external_data=False)
        return {one.key: one.value for one in found.metadata_props}
    return {key: model.get_rt_info([SECTION, key]).astype(str) for key in DESCRIBED
            if model.has_rt_info([SECTION, key])}
