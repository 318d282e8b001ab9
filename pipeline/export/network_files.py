"""Run network files with ONNX Runtime (.onnx) or OpenVINO (.onnx, .xml), if they are installed.

A converted file is compared with PyTorch through the same classes, with the same options, that
later run it.
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
from xml.etree import ElementTree

import numpy as np

from pipeline.cli import RunError, UserError, one_line
from pipeline.export.openvino_file import EXACT, SECTION
from pipeline.files import check_utf8
from pipeline.libraries import import_onnxruntime, openvino_core

# The interface, and code that both backends share.


class Device(Protocol):
    """The device of a network: the part of `torch.device` that is needed here, without torch."""

    type: str
    """"cpu", "cuda"…"""
    index: int | None
    """Which of several devices; `None`: the current one."""


DESCRIBED = ("architecture", "scale", "params")
"""Metadata keys of this project's files, from which the network can be built."""
MAX_INPUT = 1 << 26
"""Maximum number of pixels, over all images, that a file may need at once."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class NetworkFile(Protocol):
    """A network in a backend other than PyTorch."""

    title: str
    """Name and version of the backend."""
    inputs: list[tuple[int | None, ...]]
    """Shapes of the inputs; `None` is any number."""
    dtype: np.dtype | None
    """Type of the first input: float32, float16 or uint8; `None`: another one."""
    metadata: dict[str, str]
    """Contains at least `DESCRIBED` for files of this project."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Run the network on one batch and return its first output.

        Raises:
            MemoryError: the memory does not suffice.
            RunError: the network cannot be run on this batch.
        """

    def most_elements(self, shape: tuple[int, ...]) -> int:
        """Return what the largest operator reads and writes for an input of this shape.

        It is a number of elements, without weights.
        """


def usable_threads() -> int:
    """Return the number of threads for a backend.

    It is `OMP_NUM_THREADS` if set, else the number of cores that the process and its container may
    use.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted):
        return int(wanted)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or one without a limit
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
    """Whether an error of PyTorch, ONNX Runtime or OpenVINO means that memory ran out."""
    torch = sys.modules.get("torch")  # without an import of torch, none of its errors can occur
    is_own = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return is_own or isinstance(error, MemoryError) or any(sign in str(error) for sign in _SIGNS)


# An ONNX file in ONNX Runtime, on the CPU or on a CUDA GPU.

ONNX_TITLE = "ONNX Runtime"
_ONNX_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}
_SILENT = 4  # errors are raised as well, so there is no need to log them


class OnnxNetwork:
    """A network in ONNX Runtime; see `NetworkFile`.

    Args:
        source: an .onnx file, or its content.
        device: "cpu", or a CUDA device for ONNX Runtime's CUDA provider.

    Raises:
        UserError: the file cannot be loaded, or the provider is not installed.
    """

    def __init__(self, source: Path | bytes, device: Device) -> None:
        onnxruntime = import_onnxruntime()
        self.title = f"{ONNX_TITLE} {'.'.join(onnxruntime.__version__.split('.')[:2])}"
        if isinstance(source, Path):
            check_utf8(source, "ONNX Runtime")
        self._source, self._providers = source, _providers(device)
        self._session = self._opened(onnxruntime.SessionOptions())
        if device.type == "cuda" and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise UserError(
                f"{self.title} has a CUDA provider that does not start; check the versions of CUDA "
                "and cuDNN, or use --backend torch"
            )
        try:
            inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
            if not (inputs and outputs):
                raise UserError(_no_ends(self.title, source))
            self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)
            self._names = [outputs[0].name], inputs[0].name
            self.inputs = [
                tuple(side if isinstance(side, int) else None for side in one.shape)
                for one in inputs
            ]
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.title} finds a name in {_shown(source)} that is not UTF-8; is it damaged?"
            ) from error
        kind = inputs[0].type
        self.dtype = np.dtype(_ONNX_TYPES[kind]) if kind in _ONNX_TYPES else None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `NetworkFile`."""
        outputs, name = self._names
        try:
            return self._session.run(outputs, {name: images})[0]
        except Exception as error:  # ONNX Runtime has many, none of them a RuntimeError
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise RunError(
                f"{self.title} cannot run the network on {images.shape} ({one_line(error)})"
            ) from error

    def most_elements(self, shape: tuple[int, ...]) -> int:
        """See `NetworkFile`; taken from the profile of a run, so after graph optimisation."""
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
        options.enable_mem_pattern = False  # needs a second run's memory for every new size
        source = self._source if isinstance(self._source, bytes) else str(self._source)
        try:
            return onnxruntime.InferenceSession(source, options, providers=self._providers)
        except Exception as error:
            raise UserError(
                f"{self.title} cannot load {_shown(self._source)} ({one_line(error)}); is it a "
                "complete ONNX file?"
            ) from error


def _shown(source: Path | bytes) -> str:
    return repr(str(source)) if isinstance(source, Path) else "the network"


def _no_ends(title: str, source: Path | bytes) -> str:
    return (
        f"{title} finds no input or no output in {_shown(source)}; give a network from image to "
        "image"
    )


def _providers(device: Device) -> list[Any]:
    onnxruntime = import_onnxruntime()
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if (
        device.type != "cuda"
        or "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    ):
        raise UserError(
            f"the installed ONNX Runtime does not run on {device}; replace onnxruntime with "
            "onnxruntime-gpu (they share files: pip uninstall onnxruntime; pip install "
            "onnxruntime-gpu), or use --device cpu or --backend torch"
        )
    cuda = {
        "device_id": str(device.index or 0),
        "use_tf32": "0",  # TF32 keeps only 11 bits
        "cudnn_conv_algo_search": "HEURISTIC",  # others search again for every tile size
    }
    return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]


def _onnx_elements(events: list[dict[str, Any]], made: set[tuple[int, ...]]) -> Iterator[int]:
    """Yield the number of elements that each operator of a profile read and wrote.

    Inputs that no earlier operator made are weights, which are not counted.
    """
    for event in events:
        details = event.get("args", {})
        if event.get("cat") != "Node" or "output_type_shape" not in details:
            continue
        inputs, outputs = (
            [tuple(shape) for one in details[key] for shape in one.values()]
            for key in ("input_type_shape", "output_type_shape")
        )
        made |= set(outputs)
        yield sum(math.prod(shape) for shape in (*outputs, *(one for one in inputs if one in made)))


# An ONNX or OpenVINO file in OpenVINO, on the CPU.

OPENVINO_TITLE = "OpenVINO"
_OPENVINO_TYPES = {"f32": np.float32, "f16": np.float16, "u8": np.uint8}
_NO_WORK = ("Parameter", "Constant", "Result")


class OpenVinoNetwork:
    """A network in OpenVINO; see `NetworkFile`.

    Args:
        source: an .xml file with its .bin beside it, an .onnx file, or the content of an .onnx
            file.
        device: "cpu".
        hint: OpenVINO's options for the precision of its arithmetic.

    Raises:
        UserError: the file cannot be loaded, or the device is not the CPU.
    """

    def __init__(
        self, source: Path | bytes, device: Device, hint: Mapping[str, str] = EXACT
    ) -> None:
        import openvino

        self.title = f"{OPENVINO_TITLE} {'.'.join(openvino.__version__.split('.')[:2])}"
        if device.type != "cpu":
            raise UserError(
                f"OpenVINO is used only on the CPU, not on {device}; use --device cpu or --backend "
                "torch"
            )
        if isinstance(source, Path):
            check_utf8(source, "OpenVINO")
        options = {**hint, "INFERENCE_NUM_THREADS": usable_threads(), "ENABLE_CPU_PINNING": False}
        if isinstance(source, Path):
            _check_kind(source, self.title)
        try:
            self._model = openvino_core().read_model(source)
            self._network = openvino_core().compile_model(self._model, "CPU", options)
        # Also what pybind11 makes of names that are not UTF-8 and of sizes beyond 64 bits.
        except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
            raise UserError(
                f"{self.title} cannot load {_shown(source)} ({one_line(error)}); is it complete?"
            ) from error
        if not (self._model.inputs and self._model.outputs):
            raise UserError(_no_ends(self.title, source))
        self.metadata = _metadata(self._model, source)
        self.inputs = [_sides(one) for one in self._model.inputs]
        name = self._model.inputs[0].get_element_type().get_type_name()
        self.dtype = np.dtype(_OPENVINO_TYPES[name]) if name in _OPENVINO_TYPES else None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `NetworkFile`."""
        try:
            return self._network(images)[0].copy()  # the next run overwrites this memory
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise RunError(
                f"{self.title} cannot run the network on {images.shape} ({one_line(error)})"
            ) from error

    def most_elements(self, shape: tuple[int, ...]) -> int:
        """See `NetworkFile`; taken from the file, so before graph optimisation."""
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
    """Return the number of elements that an operator reads and writes, without weights."""
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


def _check_kind(path: Path, title: str) -> None:
    """Raise `UserError` unless a file is what its suffix says.

    Otherwise OpenVINO would try it in all formats that it knows, each of which prints its errors.
    """
    try:
        if path.suffix.lower() == ".xml":
            root = ElementTree.parse(path).getroot()
            is_known = root.tag == "net" and root.get("version", "").isdecimal()
        elif importlib.util.find_spec("onnx"):
            import onnx

            is_known = bool(onnx.load(path, load_external_data=False).graph.node)
        else:
            return
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror})") from error
    except Exception:  # the parsers have errors of their own, which differ between versions
        is_known = False
    if not is_known:
        kind = "an OpenVINO" if path.suffix.lower() == ".xml" else "an ONNX"
        raise UserError(
            f"{title} cannot load {str(path)!r} (it is not {kind} network); is it complete?"
        )


def _metadata(model: Any, source: Path | bytes) -> dict[str, str]:
    """Return a file's metadata: a section of an .xml file, or the properties of an .onnx file.

    OpenVINO does not read the latter, so the onnx package does.
    """
    if (
        isinstance(source, Path)
        and source.suffix.lower() == ".onnx"
        and importlib.util.find_spec("onnx")
    ):
        import onnx

        found = onnx.load(source, load_external_data=False)
        return {one.key: one.value for one in found.metadata_props}
    described = [key for key in DESCRIBED if model.has_rt_info([SECTION, key])]
    try:
        return {key: model.get_rt_info([SECTION, key]).astype(str) for key in described}
    except (RuntimeError, UnicodeDecodeError):  # not text, so not this project's
        return {}


# The table of backends, and whether they are installed.


@dataclass(frozen=True)
class BackendKind:
    """A backend that runs network files."""

    name: str
    """Its value for `--backend`."""
    title: str
    package: str
    """The package to import."""
    distributions: tuple[str, ...]
    """The distributions that provide it, of which one is installed."""
    load: Callable[[Path | bytes, Device], NetworkFile]
    suffixes: tuple[str, ...]
    on_gpu: bool

    def version(self) -> str:
        """Return name and version of the installed distribution."""
        found = next(name for name in self.distributions if _is_installed(name))
        return f"{found} {importlib.metadata.version(found)}"

    def missing(self, *, to_convert: bool) -> str | None:
        """Return pip's name of the first package that is missing; `None` if all are installed.

        `to_convert` includes the packages of the exporter.
        """
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
