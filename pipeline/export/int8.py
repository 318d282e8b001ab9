"""Quantise a verified FP32 ONNX file to INT8 for ONNX Runtime or OpenVINO, and measure its loss.

The quantisation is static (QDQ), with ranges calibrated on photographs. Other photographs measure
the drop in PSNR-Y against the FP32 network, and a file that loses too much is not written. Weights
are INT8 per output channel. Activations are UINT8 per tensor, between the smallest and the largest
calibrated value: clipping outliers, as percentiles and averages do, turns highlights gray and costs
a whole dB on single images. Grouped convolutions stay in FP32, because depthwise ones gain no speed
from INT8. So do the last convolutions, because no later layer smooths their rounding errors.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pipeline.cli import RunError, UserError, bar_options, one_line
from pipeline.export import openvino_file
from pipeline.export.network_files import FILE_BACKENDS, BackendKind, NetworkFile
from pipeline.export.onnx_file import INPUT, Form, describe, quiet
from pipeline.export.parity import (
    MOST_PHOTOGRAPHS,
    Check,
    Limit,
    Photograph,
    RunBatch,
    compare,
    read_photographs,
)
from pipeline.files import flush
from pipeline.images import (
    border_of,
    crop_to_multiple,
    cubic_resize,
    to_bytes,
    to_tensor,
    unit_range,
)
from pipeline.libraries import import_onnxruntime
from pipeline.metrics.psnr_ssim import psnr, psnr_y
from pipeline.models.weights import SavedNetwork
from pipeline.timing import fastest_seconds

if TYPE_CHECKING:
    import onnx

# Quantising.

CALIBRATION_SIDE = 96
"""Side of a calibration image, in LR pixels."""
QUALITY_AT_X1 = 50
PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""Metadata of a file that ONNX Runtime has pre-processed. It avoids a warning: PyTorch's exporter
has already done that work."""


def calibration_images(
    photos: Sequence[Photograph], scale: int, count: int, seed: int
) -> list[Tensor]:
    """Return `count` random crops as uint8 1 x 3 x `CALIBRATION_SIDE` x `CALIBRATION_SIDE`.

    Crops of smaller photographs are smaller. The photographs are taken in turn, alternately in
    their own size, as users upscale them, and as `low_resolution` makes LR images. Reduced ones
    have sharper edges.
    """
    generator = torch.Generator().manual_seed(seed)
    crops = []
    for number in range(count):
        pixels = photos[number % len(photos)].pixels
        size = (pixels.shape[-2] // scale, pixels.shape[-1] // scale)
        if (number + number // len(photos)) % 2 and min(size) >= CALIBRATION_SIDE // 2:
            pixels = low_resolution(pixels, scale)
        top, left = (
            int(torch.randint(max(1, side - CALIBRATION_SIDE + 1), (), generator=generator))
            for side in pixels.shape[-2:]
        )
        crops.append(pixels[..., top : top + CALIBRATION_SIDE, left : left + CALIBRATION_SIDE])
    return crops


def low_resolution(hr: Tensor, scale: int) -> Tensor:
    """Return the uint8 LR images of HR, 1 x 3 x H x W: reduced by `scale`, as benchmarks make them.

    At x1 they are compressed as JPEG of quality `QUALITY_AT_X1` instead: a network that restores
    changes an undegraded photograph so little that INT8's error would be nearly all of the
    difference.
    """
    if scale > 1:
        size = (hr.shape[-2] // scale, hr.shape[-1] // scale)
        return to_bytes(cubic_resize(unit_range(hr, torch.float32), size))
    file = io.BytesIO()
    pixels = np.ascontiguousarray(hr[0].permute(1, 2, 0).numpy())
    Image.fromarray(pixels).save(file, "jpeg", quality=QUALITY_AT_X1)
    return to_tensor(np.array(Image.open(file)))


def as_input(images: Tensor, form: Form) -> np.ndarray:
    """Convert uint8 NCHW images to the input of a file of the given form."""
    if form.layout == "nhwc":
        images = images.permute(0, 2, 3, 1).contiguous()
    return (images if form.io == "uint8" else unit_range(images, form.dtype)).numpy()


def as_bytes(output: np.ndarray, form: Form) -> Tensor:
    """Convert the output of a file of the given form to uint8 NCHW images."""
    images = torch.from_numpy(output)
    if form.layout == "nhwc":
        images = images.permute(0, 3, 1, 2)
    return images if form.io == "uint8" else to_bytes(images)


def quantize(
    source: Path,
    target: Path,
    images: Sequence[np.ndarray],
    keep_last: int = 0,
    *,
    has_int8_outputs: bool,
) -> int:
    """Quantise the convolutions of an ONNX file to INT8; return their number.

    Args:
        source: the FP32 file.
        target: the file to write.
        images: inputs of `source` for the calibration.
        keep_last: number of last convolutions that stay in FP32.
        has_int8_outputs: quantise the outputs of convolutions as well. ONNX Runtime needs that to
            compute in INT8; OpenVINO does not, and loses less without it.

    Raises:
        UserError: there is no convolution to quantise.
    """
    import onnx

    import_onnxruntime()  # must come before the import of its submodules
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    model = onnx.load(source)
    chosen = _dense_convolutions(model)
    if len(chosen) <= keep_last:
        raise UserError(
            f"--int8 quantises ungrouped convolutions; this network has {len(chosen)}, of which "
            f"--keep-last keeps {keep_last} in FP32; omit --int8, or use --keep-last 0"
        )
    chosen = chosen[: len(chosen) - keep_last]
    onnx.helper.set_model_props(model, dict([PREPARED]))
    with quiet():
        quantize_static(
            model,
            target,
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_quantize=chosen,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={}
            if has_int8_outputs
            else {"OpTypesToExcludeOutputQuantization": ["Conv"]},
        )
    return len(chosen)


def describe_file(path: Path, description: Mapping[str, str]) -> None:
    """Replace the metadata of an ONNX file with `description`."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(description))
    path.write_bytes(model.SerializeToString())


class _Reader:
    """Passes calibration images to ONNX Runtime and shows a progress bar."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self._bar = iter(tqdm(images, desc="calibrating", unit="image", **bar_options()))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input; `None` after the last."""
        images = next(self._bar, None)
        return None if images is None else {INPUT: images}


def _dense_convolutions(model: onnx.ModelProto) -> list[str]:
    """Return the names of the ungrouped convolutions whose weights are stored in the file."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv"
        and node.input[1] in stored
        and not any(attribute.name == "group" and attribute.i != 1 for attribute in node.attribute)
    ]


# Measuring the loss: PSNR-Y against HR photographs, compared with the FP32 network.

MEASURED_SIDE = 1024
"""Largest side to measure, in pixels; of a larger photograph the middle is used."""
SMALLEST = 64
"""Smallest height and width of a photograph, in pixels."""


@dataclass(frozen=True)
class PhotographScore:
    """The scores of one photograph."""

    name: str
    fp32: float
    """PSNR-Y of the FP32 network against HR, in dB."""
    int8: float
    """PSNR-Y of the INT8 network against HR, in dB."""
    agreement: float
    """PSNR over RGB of the INT8 network's image against that of the FP32 network, in dB."""

    @property
    def drop(self) -> float:
        """Loss of PSNR-Y in dB; negative if INT8 is closer to HR."""
        return 0.0 if self.fp32 == self.int8 else self.fp32 - self.int8


def measure_drop(
    fp32: RunBatch, int8: RunBatch, photos: Sequence[Photograph], scale: int, form: Form
) -> list[PhotographScore]:
    """Run both networks on the LR image of every photograph (`low_resolution`) and score them.

    PSNR-Y is computed as in the papers (`psnr_ssim`): uint8 Y, without the borders (`border_of`).

    Raises:
        RunError: a network fails.
    """
    scores = []
    for photo in tqdm(photos, desc="measuring the drop", unit="image", **bar_options()):
        hr = crop_to_multiple(_middle(photo.pixels), scale)
        lr = as_input(low_resolution(hr, scale), form)
        try:
            expected, found = as_bytes(fp32(lr), form), as_bytes(int8(lr), form)
        except Exception as error:  # each backend has its own exceptions
            raise RunError(
                f"the network cannot be run on {photo.name!r} ({one_line(error)})"
            ) from error
        border, (height, width) = border_of(scale), hr.shape[-2:]
        hr_inner, expected_inner, found_inner = (
            images[..., border : height - border, border : width - border]
            for images in (hr, expected, found)
        )
        scores.append(
            PhotographScore(
                photo.name,
                psnr_y(expected_inner, hr_inner),
                psnr_y(found_inner, hr_inner),
                psnr(found, expected),
            )
        )
    return scores


def mean_drop(scores: Sequence[PhotographScore]) -> float:
    """Return the mean loss of PSNR-Y in dB."""
    return fmean(score.drop for score in scores)


def table(title: str, scores: Sequence[PhotographScore]) -> str:
    """Return a table with one line per photograph and one for the mean."""
    mean = [
        fmean(values)
        for values in zip(
            *((score.fp32, score.int8, score.drop, score.agreement) for score in scores),
            strict=True,
        )
    ]
    rows = [(score.name, (score.fp32, score.int8, score.drop, score.agreement)) for score in scores]
    width = max(14, *(len(name) for name, _ in rows))
    head = (
        f"{title}, PSNR-Y against HR in dB: FP32, INT8, drop; PSNR of INT8's images against FP32's"
    )
    return "\n".join(
        [
            head,
            *(
                f"  {name:<{width}}{values[0]:8.3f}{values[1]:8.3f}"
                f"{values[2]:+8.3f}{values[3]:7.1f}"
                for name, values in (*rows, ("mean", mean))
            ),
        ]
    )


def _middle(images: torch.Tensor) -> torch.Tensor:
    top, left = (max(0, (side - MEASURED_SIDE) // 2) for side in images.shape[-2:])
    return images[..., top : top + MEASURED_SIDE, left : left + MEASURED_SIDE]


# The INT8 file: photographs to calibrate with, others to measure on, limits, writing.

CALIBRATING = (
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "skimage/data/rocket.jpg",
)
MEASURING = ("skimage/data/astronaut.png", "skimage/data/coffee.png", "skimage/data/chelsea.png")
"""Photographs inside installed packages."""
LIMITS = {"float": Limit(30), "uint8": Limit(30, levels=255)}
"""Minimum agreement with PyTorch, which shows that the file works at every size; the drop in PSNR-Y
shows its quality."""
TIMED = (1, 180, 320)
"""Batch, height and width of the LR images on which both networks are timed."""


@dataclass(frozen=True)
class Int8:
    """How an INT8 file is made and judged; see `convert_to_onnx.py --help`."""

    calibrate: Path | None = None
    calibration_images: int = 32
    seed: int = 0
    measure: Path | None = None
    keep_last: int = 3
    max_drop: float = 0.1

    def check(self) -> None:
        """Raise `UserError` for a number out of its range."""
        if not 1 <= self.calibration_images <= 10_000:
            raise UserError(
                f"--calibration-images {self.calibration_images} must be from 1 to 10000"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed} must be from 0 to 2**63 - 1")
        if self.keep_last < 0:
            raise UserError(f"--keep-last {self.keep_last} must be 0 or more")
        if not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            raise UserError(f"--max-drop {self.max_drop:g} must be a number of dB, 0 or more")


@dataclass(frozen=True)
class Material:
    """The photographs for calibration and those for measurement, which are different ones."""

    int8: Int8
    calibrating: list[Photograph]
    measuring: list[Photograph]


def gather(int8: Int8) -> Material:
    """Read the photographs.

    Raises:
        UserError: a photograph is in both sets, or too small to be measured.
    """
    int8.check()
    calibrating = read_photographs(
        int8.calibrate, "--calibrate", int8.calibration_images, CALIBRATING
    )
    measuring = read_photographs(int8.measure, "--measure", MOST_PHOTOGRAPHS, MEASURING)
    names = {_digest(photo): photo.name for photo in calibrating}
    for photo in measuring:
        if _digest(photo) in names:
            raise UserError(
                f"the photograph {photo.name!r} of --measure is the same as "
                f"{names[_digest(photo)]!r} of --calibrate; an INT8 network must not be measured "
                "on its calibration images: give folders with different photographs"
            )
        if min(photo.pixels.shape[-2:]) < SMALLEST:
            raise UserError(
                f"the photograph {photo.name!r} of --measure is smaller than "
                f"{SMALLEST}x{SMALLEST}; remove it"
            )
    return Material(int8, calibrating, measuring)


def write_int8(
    onnx_file: Path,
    saved: SavedNetwork,
    form: Form,
    material: Material,
    batches: list[Check],
    *,
    for_openvino: bool,
) -> None:
    """Write `NAME_int8.onnx`, or `NAME_int8.xml` and .bin, from the verified FP32 file `NAME.onnx`.

    Raises:
        RunError: PSNR-Y drops by more than `max_drop`, or the file fails at one of the sizes.
            Nothing is written then.
    """
    images = [
        as_input(crop, form)
        for crop in calibration_images(
            material.calibrating, saved.scale, material.int8.calibration_images, material.int8.seed
        )
    ]
    kind = FILE_BACKENDS["openvino" if for_openvino else "onnx"]
    final = onnx_file.with_name(f"{onnx_file.stem}_int8{'.xml' if for_openvino else '.onnx'}")
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as folder:
        quantised = Path(folder, "int8.onnx")
        print(
            f"quantising for {kind.title} with {len(images)} crops from "
            f"{len(material.calibrating)} photographs ...",
            flush=True,
        )
        count = quantize(
            onnx_file, quantised, images, material.int8.keep_last, has_int8_outputs=not for_openvino
        )
        file = quantised
        if for_openvino:
            file = quantised.with_suffix(".xml")
            openvino_file.write_openvino(quantised, file, {})
        fp32, int8 = _loaded(kind, onnx_file), _loaded(kind, file)
        scores = measure_drop(fp32, int8, material.measuring, saved.scale, form)
        print(table(f"{kind.title} in INT8", scores))
        _judge(scores, material.int8)
        print(compare(f"{kind.title} in INT8", int8, batches, LIMITS[form.io]))
        description = {**describe(saved, form), "dtype": "int8", **_calibration(material, scores)}
        if for_openvino:
            openvino_file.write_openvino(quantised, file, description)
            parts = openvino_file.parts(file), openvino_file.parts(final)
        else:
            describe_file(quantised, description)
            flush(quantised)
            parts = (quantised,), (final,)
        _report_speed(kind.title, fp32, int8, form)
        for source, target in zip(*parts, strict=True):
            os.replace(source, target)
        flush(final.parent)
    size = sum(path.stat().st_size for path in parts[1])
    print(
        f"{final}{' and .bin' if for_openvino else ''}  ({size / 1e6:.2f} MB): {count} "
        f"convolutions in INT8, drop {mean_drop(scores):+.3f} dB"
    )


def _judge(scores: list[PhotographScore], int8: Int8) -> None:
    drop = mean_drop(scores)
    if not drop <= int8.max_drop:
        allowed = math.ceil(drop * 100) / 100 if math.isfinite(drop) else drop
        raise RunError(
            f"INT8 loses {drop:.3f} dB of PSNR-Y on average over {len(scores)} photographs, but "
            f"--max-drop allows {int8.max_drop:g}; no file is written. Calibrate with photographs "
            "like yours (--calibrate), keep more convolutions in FP32 (--keep-last), use FP32 or "
            f"--half, or allow it with --max-drop {allowed:g}"
        )


def _calibration(material: Material, scores: list[PhotographScore]) -> dict[str, str]:
    """Return the file's metadata about its calibration and its loss."""
    int8 = material.int8
    return {
        "float32_last_convolutions": str(int8.keep_last),
        "calibration_images": str(int8.calibration_images),
        "calibration_seed": str(int8.seed),
        "calibration_photographs": str(len(material.calibrating)),
        "measured_photographs": str(len(scores)),
        "psnr_y_drop": f"{mean_drop(scores):.4f}",
        "max_psnr_y_drop": f"{max(score.drop for score in scores):.4f}",
    }


def _report_speed(title: str, fp32: RunBatch, int8: RunBatch, form: Form) -> None:
    images = np.zeros(form.shape(*TIMED), np.uint8 if form.io == "uint8" else np.float32)
    before, after = fastest_seconds([lambda: fp32(images), lambda: int8(images)], rounds=3)
    verdict = (
        f"{before / after:.1f} times as fast"
        if after < 0.95 * before
        else "not faster on this processor"
    )
    print(
        f"{TIMED[2]}x{TIMED[1]} pixels in {title}: {before:.3f} s in FP32, {after:.3f} s in INT8: "
        f"{verdict}"
    )


def _loaded(kind: BackendKind, file: Path) -> NetworkFile:
    try:
        return kind.load(file, torch.device("cpu"))
    except UserError as error:
        raise RunError(str(error)) from error


def _digest(photo: Photograph) -> bytes:
    return hashlib.sha256(
        repr(photo.pixels.shape).encode() + photo.pixels.numpy().tobytes()
    ).digest()
