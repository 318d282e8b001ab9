"""Build TensorRT engines from ONNX files, or give the command that does so elsewhere."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Any

from pipeline.cli import RunError
from pipeline.export.onnx_file import INPUT, Form
from pipeline.files import write_atomically

SIZES = ((1, 16, 16), (1, 360, 640), (4, 1080, 1920))
"""(batch, height, width) of the LR images: minimum, optimum and maximum of the engine's profile."""


def is_installed() -> bool:
    """Whether TensorRT can be imported."""
    return importlib.util.find_spec("tensorrt") is not None


def command(onnx_file: Path, engine: Path, form: Form) -> str:
    """Return the `trtexec` command that builds the engine, in the precision of the ONNX file."""
    # trtexec refuses shapes for a file that has its own.
    shapes = (
        f"--{name}Shapes={INPUT}:{'x'.join(map(str, form.shape(*size)))}"
        for name, size in zip(("min", "opt", "max"), SIZES, strict=True)
        if form.size is None
    )
    return shlex.join(
        ["trtexec", f"--onnx={onnx_file}", f"--saveEngine={engine}", "--stronglyTyped", *shapes]
    )


def build(onnx_file: Path, engine: Path, form: Form) -> None:
    """Build the engine for the GPU of this machine, which takes minutes.

    Raises:
        RunError: TensorRT cannot read the file or build the engine.
    """
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(
        1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        raise RunError(f"TensorRT cannot read {str(onnx_file)!r}: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    if form.size is None:
        config.add_optimization_profile(_profile(builder, form))
    content = builder.build_serialized_network(network, config)
    if content is None:
        raise RunError(
            f"TensorRT cannot build an engine from {str(onnx_file)!r}; see its messages above"
        )
    write_atomically(engine, bytes(content))


def _profile(builder: Any, form: Form) -> Any:
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *(form.shape(*size) for size in SIZES))
    return profile
