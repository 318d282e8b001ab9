"""An ONNX file with its convolutions in INT8, their ranges taken from photographs (static quantization, QDQ).

Weights are INT8 by output channel, activations UINT8 by tensor, between the smallest and the largest value that the
photographs gave. What cuts outliers off, as percentiles and averages do, turns highlights grey: it costs a whole dB on
single images. Convolutions in groups stay in FP32: a depthwise one gains no speed from INT8. So do the last ones, whose
rounding nothing behind them evens out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.cli import UserError, bar_options
from pipeline.export.onnx_file import INPUT, Form, quiet
from pipeline.export.photographs import Photograph
from pipeline.images import cubic_resize, to_bytes, unit_range
from pipeline.onnxruntime_import import import_onnxruntime

if TYPE_CHECKING:
    import onnx

SIDE = 96
"""Of a calibration image, in LR pixels."""
PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""The mark of a file that ONNX Runtime has prepared; without it, it advises to. PyTorch's exporter did the same."""


def calibration_images(photos: Sequence[Photograph], scale: int, count: int, seed: int) -> list[Tensor]:
    """`count` crops at random places, uint8 1 x 3 x `SIDE` x `SIDE` (less where the photograph is smaller).

    Every photograph in turn, and by turns as it is, which is what users upscale, and reduced `scale` times, which is
    what training and benchmarks take for LR. Reduced ones have the harder edges.
    """
    generator = torch.Generator().manual_seed(seed)
    crops = []
    for number in range(count):
        pixels = photos[number % len(photos)].pixels
        size = (pixels.shape[-2] // scale, pixels.shape[-1] // scale)
        if (number + number // len(photos)) % 2 and min(size) >= SIDE // 2:
            pixels = to_bytes(cubic_resize(unit_range(pixels, torch.float32), size))
        top, left = (int(torch.randint(max(1, side - SIDE + 1), (), generator=generator)) for side in pixels.shape[-2:])
        crops.append(pixels[..., top : top + SIDE, left : left + SIDE])
    return crops


def as_input(images: Tensor, form: Form) -> np.ndarray:
    """uint8 NCHW images as a file of that form takes them."""
    if form.layout == "nhwc":
        images = images.permute(0, 2, 3, 1).contiguous()
    return (images if form.io == "uint8" else unit_range(images, form.dtype)).numpy()


def as_bytes(output: np.ndarray, form: Form) -> Tensor:
    """What a file of that form gives, as uint8 NCHW images."""
    images = torch.from_numpy(output)
    if form.layout == "nhwc":
        images = images.permute(0, 3, 1, 2)
    return images if form.io == "uint8" else to_bytes(images)


def quantize(source: Path, target: Path, images: Sequence[np.ndarray], keep_last: int = 0, *,
             has_int8_outputs: bool) -> int:
    """Write the ONNX file `source`, which takes `images`, as `target` with INT8 convolutions; how many these are.

    `keep_last` is how many of the last convolutions stay as they are. ONNX Runtime computes in INT8 only where the
    output of a convolution is quantised, too; OpenVINO does without, which loses less. `UserError` for a network
    without a convolution to quantise.
    """
    import onnx

    import_onnxruntime()  # before anything else of it
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    model = onnx.load(source)
    chosen = _dense_convolutions(model)
    if len(chosen) <= keep_last:
        raise UserError(f"--int8 quantises convolutions over all channels; this network has {len(chosen)}, of which "
                        f"--keep-last leaves {keep_last} in FP32: leave --int8 out, or say --keep-last 0")
    chosen = chosen[: len(chosen) - keep_last]
    onnx.helper.set_model_props(model, dict([PREPARED]))
    with quiet():
        quantize_static(
            model, target, _Reader(images), quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv"],
            nodes_to_quantize=chosen, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            extra_options={} if has_int8_outputs else {"OpTypesToExcludeOutputQuantization": ["Conv"]})
    return len(chosen)


def describe_file(path: Path, description: Mapping[str, str]) -> None:
    """Put `description` into an ONNX file, in place of what it says about itself."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(description))
    path.write_bytes(model.SerializeToString())


class _Reader:
    """Hands calibration images to ONNX Runtime, and shows how far it is."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self._bar = iter(tqdm(images, desc="calibrating", unit="image", dynamic_ncols=True, **bar_options()))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input, `None` after the last."""
        images = next(self._bar, None)
        return None if images is None else {INPUT: images}


def _dense_convolutions(model: onnx.ModelProto) -> list[str]:
    """The names of the convolutions that see every channel and whose weights lie in the file."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type == "Conv" and node.input[1] in stored
            and not any(attribute.name == "group" and attribute.i != 1 for attribute in node.attribute)]
