"""Convert a network to ONNX, and to OpenVINO and TensorRT, and prove that it makes the same
images."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from pipeline import cli


@dataclass(frozen=True)
class Options:
    """Convert a network to ONNX, for example: python convert_to_onnx.py --input demo_x2.pth
    --output demo_x2.onnx"""

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
    int8: bool = False
    """With --openvino NAME_int8.xml and .bin, too, and else NAME_int8.onnx for ONNX Runtime:
    convolutions in INT8."""
    calibrate: Annotated[
        Path | None, arg(help_behavior_hint="(default: three of scikit-learn's and scikit-image's)")
    ] = None
    """Folder of photographs that tell --int8 the range of every layer: best such as you train on or
    upscale."""
    calibration_images: int = 32
    """Crops of 96x96 pixels taken from them."""
    seed: int = 0
    """Of the places of the crops."""
    measure: Annotated[
        Path | None, arg(help_behavior_hint="(default: three of scikit-image's)")
    ] = None
    """Folder of sharp photographs, none of --calibrate, on which --int8 is measured: they are HR,
    reduced to LR."""
    keep_last: int = 3
    """So many of the last convolutions stay in FP32: with fewer some networks are faster, and all
    lose more."""
    max_drop: float = 0.1
    """dB of PSNR-Y that INT8 may lose there, in the mean; a file that loses more is not written
    (exit status 1)."""


INT8 = ("calibrate", "calibration_images", "seed", "measure", "keep_last", "max_drop")
"""Options that mean nothing without --int8."""


def main(options: Options) -> int:  # imports here, so that --help need not wait for torch
    from pipeline.export.conversion import run_conversion
    from pipeline.export.int8 import Int8

    values = vars(options).copy()
    given = {name: values.pop(name) for name in INT8}
    if not values["int8"]:
        for field in fields(Options):
            if field.name in given and given[field.name] != field.default:
                raise cli.UserError(
                    f"--{field.name.replace('_', '-')} is of --int8; add --int8, or leave it out"
                )
    return run_conversion(**{**values, "int8": Int8(**given) if values["int8"] else None})


if __name__ == "__main__":
    cli.run(Options, main)
