"""Convert a network to ONNX, OpenVINO and TensorRT, and compare its images with PyTorch's."""

from __future__ import annotations

from pipeline.signals import end_at_once

if __name__ == "__main__":
    end_at_once()

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from pipeline import cli


@dataclass(frozen=True)
class Options:
    """Convert a network to ONNX and compare its images with PyTorch's.

    Example: python convert_to_onnx.py --input demo_x2.pth --output demo_x2.onnx
    """

    output: Path
    """The file to write, NAME.onnx. If the comparison fails, it is named NAME.onnx.failed and the
    exit status is 1."""
    input: Annotated[Path | None, arg(help_behavior_hint="(default: newest run)")] = None
    """Weights file (.safetensors, .pth, ...), or run folder (its best averaged weights)."""
    io: Literal["float", "uint8"] = "float"
    """Type of input and output images: floats in [0, 1], or uint8."""
    layout: Literal["nchw", "nhwc"] = "nchw"
    """Order of the dimensions: nchw (batch, channels, height, width) or nhwc (channels last)."""
    half: bool = False
    """Use FP16 for weights, arithmetic and, with --io float, images."""
    opset: int = 20
    """ONNX opset version, 17 to 23."""
    shape: Annotated[str, arg(help_behavior_hint="(default: any size)")] = ""
    """Write the network for images of this shape only, in LR pixels, such as 1x3x256x256 (batch,
    channels, height, width; with every --layout)."""
    images: Annotated[Path | None, arg(help_behavior_hint="(default: scikit-image's)")] = None
    """Folder of photographs to compare on."""
    openvino: bool = False
    """Also write NAME.xml and NAME.bin for OpenVINO (FP16 weights)."""
    tensorrt: bool = False
    """Build NAME.engine if TensorRT is installed; otherwise print the trtexec command."""
    int8: bool = False
    """Also write a file with INT8 convolutions: NAME_int8.xml and .bin with --openvino, otherwise
    NAME_int8.onnx for ONNX Runtime."""
    calibrate: Annotated[
        Path | None, arg(help_behavior_hint="(default: three of scikit-learn's and scikit-image's)")
    ] = None
    """Folder of photographs from which --int8 takes the range of every layer, ideally like those
    that you train on or upscale."""
    calibration_images: int = 32
    """Number of 96x96 crops taken from those photographs."""
    seed: int = 0
    """Seed for the positions of the crops."""
    measure: Annotated[
        Path | None, arg(help_behavior_hint="(default: three of scikit-image's)")
    ] = None
    """Folder of sharp photographs, different from those of --calibrate, for measuring the loss
    of --int8. They are the HR images; LR images are made from them."""
    keep_last: int = 3
    """Number of convolutions at the end that stay in FP32. With fewer, some networks are faster and
    all lose more quality."""
    max_drop: float = 0.1
    """Maximum mean loss of PSNR-Y on the photographs of --measure, in dB. A file that loses more is
    not written (exit status 1)."""


INT8 = ("calibrate", "calibration_images", "seed", "measure", "keep_last", "max_drop")
"""Options that need --int8."""


def main(options: Options) -> int:
    # Imported here, so that --help does not wait for torch.
    from pipeline.export.conversion import run_conversion
    from pipeline.export.int8 import Int8

    values = vars(options).copy()
    given = {name: values.pop(name) for name in INT8}
    if not values["int8"]:
        for field in fields(Options):
            if field.name in given and given[field.name] != field.default:
                raise cli.UserError(
                    f"--{field.name.replace('_', '-')} needs --int8; add --int8, or omit it"
                )
    return run_conversion(**{**values, "int8": Int8(**given) if values["int8"] else None})


if __name__ == "__main__":
    cli.run(Options, main)
