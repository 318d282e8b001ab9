"""Networks in files, run by ONNX Runtime (.onnx) or OpenVINO (.onnx, .xml), and which of the two is
installed.

A converted file is compared with PyTorch by the very classes that later run it, with the same
options.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.cli import RunError, UserError, one_line
from pipeline.export.openvino_file import EXACT, SECTION
from pipeline.libraries import import_onnxruntime

# The interface, and what both backends share.


class Device(Protocol):
    """Where a network runs, as `torch.device` has it, which need not be imported for that."""

    type: str
    """"cpu", "cuda"…"""
    index: int | None
    """Of several; `None`: the current one."""


DESCRIBED = ("architecture", "scale", "params")
"""In the metadata of our own files; with them a network can be built."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class NetworkFile(Protocol):
    """A network in a backend that is not PyTorch."""

    title: str
    """Name and version of the backend."""
    inputs: list[tuple[int | None, ...]]
    """Their shapes; `None` is any number."""
    dtype: np.dtype | None
    """Of the first input: float32, float16 or uint8; `None`: something else."""
    metadata: dict[str, str]
    """Of our own files at least `DESCRIBED`."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """One batch as the file takes it -> its first output. `MemoryError`; `RunError` for what it
        cannot run."""

    def most_elements(self, shape: tuple[int, ...]) -> int:
        """What the hungriest operator reads and writes for an input of that shape, without its
        weights."""


def usable_threads() -> int:
    """How many threads a backend may start: `OMP_NUM_THREADS`, else the cores that process and
    container may use."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said):
        return int(said)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or no limit in it
        return cores


_SIGNS = (
    "allocate memory",
    "out of memory",
    "DefaultCPUAllocator",
    "bad_alloc",
    "bad allocation",
    "Failed to allocate",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of PyTorch, ONNX Runtime or OpenVINO says that the memory did not
    suffice."""
    torch = sys.modules.get("torch")  # an error of its own can only come where it was imported
    is_own = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return is_own or isinstance(error, MemoryError) or any(sign in str(error) for sign in _SIGNS)


# An ONNX file in ONNX Runtime, on the CPU or on a CUDA GPU.

ONNX_TITLE = "ONNX Runtime"
_ONNX_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}
_SILENT = 4  # what goes wrong it raises, too


class OnnxNetwork:
    """One network; see `NetworkFile`.

    Args: source: an .onnx file, or its content. device: "cpu", or a CUDA device for ONNX Runtime's
        CUDA provider. `UserError` where that is not installed.
    """

    def __init__(self, source: Path | bytes, device: Device) -> None:
        onnxruntime = import_onnxruntime()
        self.title = f"{ONNX_TITLE} {'.'.join(onnxruntime.__version__.split('.')[:2])}"
        self._source, self._providers = source, _providers(device)
        self._session = self._opened(onnxruntime.SessionOptions())
        if device.type == "cuda" and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise UserError(
                f"{self.title} has a CUDA provider that does not start; do CUDA and cuDNN fit? "
                "say --backend torch"
            )
        found = self._session.get_modelmeta()
        self.metadata = dict(found.custom_metadata_map)
        self.inputs = [
            tuple(side if isinstance(side, int) else None for side in one.shape)
            for one in self._session.get_inputs()
        ]
        first = self._session.get_inputs()[0]
        self.dtype = np.dtype(_ONNX_TYPES[first.type]) if first.type in _ONNX_TYPES else None
        self._names = [self._session.get_outputs()[0].name], first.name

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `NetworkFile`."""
        outputs, name = self._names
        try:
            return self._session.run(outputs, {name: images})[0]
        except Exception as error:  # it has many of its own, none of which is a RuntimeError
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise RunError(
                f"{self.title} cannot run the network on {images.shape} ({one_line(error)})"
            ) from error

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
        return max([1, *_onnx_elements(events, made)])

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
            raise UserError(
                f"{self.title} cannot load {what} ({one_line(error)}); is it whole, and ONNX?"
            ) from error


def _providers(device: Device) -> list[Any]:
    onnxruntime = import_onnxruntime()
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if (
        device.type != "cuda"
        or "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    ):
        raise UserError(
            f"the installed ONNX Runtime does not run on {device}; uninstall onnxruntime first, "
            "which "
            "onnxruntime-gpu shares its files with (pip uninstall onnxruntime; pip install "
            "onnxruntime-gpu), or say --device cpu or --backend torch"
        )
    cuda = {
        "device_id": str(device.index or 0),
        "use_tf32": "0",  # TF32 keeps 11 bits
        "cudnn_conv_algo_search": "HEURISTIC",
    }  # others search again for every size of tile
    return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]


def _onnx_elements(events: list[dict[str, Any]], made: set[tuple[int, ...]]) -> Iterator[int]:
    """What each operator of a profile read and wrote, in elements, without its weights: inputs that
    nothing made."""
    for event in events:
        told_of = event.get("args", {})
        if event.get("cat") != "Node" or "output_type_shape" not in told_of:
            continue
        inputs, outputs = (
            [tuple(shape) for one in told_of[key] for shape in one.values()]
            for key in ("input_type_shape", "output_type_shape")
        )
        made |= set(outputs)
        yield sum(math.prod(shape) for shape in (*outputs, *(one for one in inputs if one in made)))


# An ONNX or OpenVINO file in OpenVINO, on the CPU.

OPENVINO_TITLE = "OpenVINO"
_OPENVINO_TYPES = {"f32": np.float32, "f16": np.float16, "u8": np.uint8}
_NO_WORK = ("Parameter", "Constant", "Result")


class OpenVinoNetwork:
    """One network; see `NetworkFile`.

    Args:
        source: an .xml file with its .bin beside it, an .onnx file, or the content of one.
        device: "cpu"; `UserError` for another.
        hint: OpenVINO's options that decide in what it computes.
    """

    def __init__(
        self, source: Path | bytes, device: Device, hint: Mapping[str, str] = EXACT
    ) -> None:
        import openvino

        self.title = f"{OPENVINO_TITLE} {'.'.join(openvino.__version__.split('.')[:2])}"
        if device.type != "cpu":
            raise UserError(
                f"OpenVINO runs on the CPU here, not on {device}; say --device cpu or --backend "
                "torch"
            )
        options = {**hint, "INFERENCE_NUM_THREADS": usable_threads(), "ENABLE_CPU_PINNING": False}
        try:
            self._model = openvino.Core().read_model(source)
            self._network = openvino.Core().compile_model(self._model, "CPU", options)
        except RuntimeError as error:
            what = repr(str(source)) if isinstance(source, Path) else "the network"
            raise UserError(
                f"{self.title} cannot load {what} ({one_line(error)}); is it whole?"
            ) from error
        self.metadata = _metadata(self._model, source)
        self.inputs = [_sides(one) for one in self._model.inputs]
        name = self._model.inputs[0].get_element_type().get_type_name()
        self.dtype = np.dtype(_OPENVINO_TYPES[name]) if name in _OPENVINO_TYPES else None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `NetworkFile`."""
        try:
            return self._network(images)[0].copy()  # the next run writes into the same memory
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise RunError(
                f"{self.title} cannot run the network on {images.shape} ({one_line(error)})"
            ) from error

    def most_elements(self, shape: tuple[int, ...]) -> int:
        """See `NetworkFile`: of the network as it lies in the file."""
        model = self._model.clone()
        model.reshape(list(shape))
        return max(
            [
                1,
                *(
                    _openvino_elements(node)
                    for node in model.get_ops()
                    if node.get_type_name() not in _NO_WORK
                ),
            ]
        )


def _openvino_elements(node: Any) -> int:
    """What an operator reads and writes, in elements, without its weights."""
    read = [
        one.get_shape()
        for one in node.inputs()
        if one.get_source_output().get_node().get_type_name() != "Constant"
    ]
    shapes = (*read, *(one.get_shape() for one in node.outputs()))
    return sum(math.prod(shape) for shape in shapes)


def _sides(one: Any) -> tuple[int | None, ...]:
    shape = one.get_partial_shape()
    return (
        ()
        if shape.rank.is_dynamic
        else tuple(side.get_length() if side.is_static else None for side in shape)
    )


def _metadata(model: Any, source: Path | bytes) -> dict[str, str]:
    """What our files say of themselves: .xml in a section, .onnx in its properties, which OpenVINO
    leaves out."""
    if (
        isinstance(source, Path)
        and source.suffix.lower() == ".onnx"
        and importlib.util.find_spec("onnx")
    ):
        import onnx

        found = onnx.load(source, load_external_data=False)
        return {one.key: one.value for one in found.metadata_props}
    return {
        key: model.get_rt_info([SECTION, key]).astype(str)
        for key in DESCRIBED
        if model.has_rt_info([SECTION, key])
    }


# The table of backends, and which of them are installed.


@dataclass(frozen=True)
class BackendKind:
    """A backend that runs network files."""

    name: str
    """As `--backend` has it."""
    title: str
    package: str
    """What is imported."""
    distributions: tuple[str, ...]
    """What is installed: one of these."""
    load: Callable[[Path | bytes, Device], NetworkFile]
    suffixes: tuple[str, ...]
    on_gpu: bool

    def version(self) -> str:
        """Name and version of what is installed of it."""
        found = next(name for name in self.distributions if _is_installed(name))
        return f"{found} {importlib.metadata.version(found)}"

    def missing(self, *, to_convert: bool) -> str | None:
        """The name, for pip, of the first package that is not installed: of the backend, and of the
        exporter."""
        wanted = {self.package: self.distributions[0]}
        if to_convert:
            wanted |= {"onnx": "onnx", "onnxscript": "onnxscript", "skimage": "scikit-image"}
        return next(
            (name for package, name in wanted.items() if importlib.util.find_spec(package) is None),
            None,
        )


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


FILE_BACKENDS = {
    kind.name: kind
    for kind in (
        BackendKind(
            "openvino",
            OPENVINO_TITLE,
            "openvino",
            ("openvino",),
            OpenVinoNetwork,
            (".onnx", ".xml"),
            on_gpu=False,
        ),
        BackendKind(
            "onnx",
            ONNX_TITLE,
            "onnxruntime",
            ("onnxruntime", "onnxruntime-gpu"),
            OnnxNetwork,
            (".onnx",),
            on_gpu=True,
        ),
    )
}
