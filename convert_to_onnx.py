"""Convert a network to ONNX, and to OpenVINO and TensorRT, and prove that it makes the same images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from pipeline import cli


@dataclass(frozen=True)
class Options:
    """Convert a network to ONNX, for example: python convert_to_onnx.py --input demo_x2.pth --output demo_x2.onnx"""
    output: Path
    """The file to write, NAME.onnx; NAME.onnx.failed where the comparison fails (exit status 1)."""
    input: Annotated[Path | None, arg(help_behavior_hint="(default: newest run)")] = None
    """Weights file (.safetensors, .pth...), or run folder: its best averaged weights."""
    io: Literal["float", "uint8"] = "float"
    """Images go in and come out as floats in [0, 1], or as bytes."""
    layout: Literal["nchw", "nhwc"] = "nchw"
    """Order of the dimensions: batch, channels, height, width, or channels last."""
    half: bool = False
    """FP16 weights, arithmetic and, with --io float, images."""
    opset: int = 20
    """Version of ONNX's operators, 17 to 23."""
    images: Annotated[Path | None, arg(help_behavior_hint="(default: scikit-image's)")] = None
    """Folder of photographs to compare on."""
    openvino: bool = False
    """Write NAME.xml and NAME.bin for OpenVINO, too (FP16 weights)."""
    tensorrt: bool = False
    """Build NAME.engine where TensorRT is installed, else print the trtexec line."""


def main(options: Options) -> int:  # imports here, so that --help need not wait for torch
    from pipeline.export.conversion import run_conversion
    return run_conversion(**vars(options))


if __name__ == "__main__":
    cli.run(Options, main)
