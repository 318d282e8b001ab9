"""A proven FP32 ONNX file as an INT8 file for ONNX Runtime or OpenVINO, which is refused where it loses too much."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cli import RunError, UserError
from pipeline.export import openvino_file
from pipeline.export.drop import SMALLEST, Score, mean_drop, measure, table
from pipeline.export.onnx_file import Form, describe
from pipeline.export.onnx_runtime import onnx_runtime
from pipeline.export.parity import MOST_PHOTOGRAPHS, Check, Limit, Runtime, compare
from pipeline.export.photographs import Photograph, read_photographs
from pipeline.export.quantization import as_input, calibration_images, describe_file, quantize
from pipeline.files import flush
from pipeline.models.common import told
from pipeline.models.weights import SavedNetwork

CALIBRATING = ("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg", "skimage/data/rocket.jpg")
MEASURING = ("skimage/data/astronaut.png", "skimage/data/coffee.png", "skimage/data/chelsea.png")
"""Photographs within packages."""
LIMITS = {"float": Limit(30), "uint8": Limit(30, levels=255)}
"""Against PyTorch, at every size: that the file works there. How good it is, the drop tells."""
TIMED = (1, 180, 320)
"""Batch, height, width of the LR images that both networks are timed on."""


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
        """`UserError` for a number out of its range."""
        if not 1 <= self.calibration_images <= 10_000:
            raise UserError(f"--calibration-images {self.calibration_images} is not from 1 to 10000")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed} is below 0 or has more than 63 bits")
        if self.keep_last < 0:
            raise UserError(f"--keep-last {self.keep_last} is below 0")
        if not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            raise UserError(f"--max-drop {self.max_drop:g} is not a number of dB from 0 on")


@dataclass(frozen=True)
class Material:
    """What calibrates and what measures; no photograph does both."""

    int8: Int8
    calibrating: list[Photograph]
    measuring: list[Photograph]


def gather(int8: Int8) -> Material:
    """Read the photographs. `UserError` for one that would both calibrate and measure, and for a small one."""
    int8.check()
    calibrating = read_photographs(int8.calibrate, "--calibrate", int8.calibration_images, CALIBRATING)
    measuring = read_photographs(int8.measure, "--measure", MOST_PHOTOGRAPHS, MEASURING)
    names = {_digest(photo): photo.name for photo in calibrating}
    for photo in measuring:
        if _digest(photo) in names:
            raise UserError(f"the photograph {photo.name!r} of --measure is {names[_digest(photo)]!r} of --calibrate, "
                            "too; what calibrates an INT8 network must not measure it: give folders that share none")
        if min(photo.pixels.shape[-2:]) < SMALLEST:
            raise UserError(f"the photograph {photo.name!r} of --measure is smaller than {SMALLEST}x{SMALLEST}; "
                            "remove it")
    return Material(int8, calibrating, measuring)


def write_int8(onnx_file: Path, saved: SavedNetwork, form: Form, material: Material, batches: list[Check], *,
               for_openvino: bool) -> None:
    """Write `NAME_int8.onnx`, or `NAME_int8.xml` and .bin, of the proven FP32 file `NAME.onnx`.

    `RunError`, and nothing is written, where PSNR-Y drops by more than `max_drop` or the file fails at a size.
    """
    images = [as_input(crop, form) for crop in calibration_images(
        material.calibrating, saved.scale, material.int8.calibration_images, material.int8.seed)]
    runtime = "OpenVINO" if for_openvino else "ONNX Runtime"
    final = onnx_file.with_name(f"{onnx_file.stem}_int8{'.xml' if for_openvino else '.onnx'}")
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as folder:
        quantised = Path(folder, "int8.onnx")
        print(f"quantising for {runtime} by {len(images)} images of {len(material.calibrating)} photographs ...",
              flush=True)
        count = quantize(onnx_file, quantised, images, material.int8.keep_last,
                         has_int8_outputs=not for_openvino)
        file, load = quantised, onnx_runtime
        if for_openvino:
            file, load = quantised.with_suffix(".xml"), openvino_file.openvino_runtime
            openvino_file.write_openvino(quantised, file, {})
        fp32, int8 = _loaded(load, onnx_file, runtime), _loaded(load, file, runtime)
        scores = measure(fp32, int8, material.measuring, saved.scale, form)
        print(table(f"{runtime} in INT8", scores))
        _judge(scores, material.int8)
        print(compare(f"{runtime} in INT8", int8, batches, LIMITS[form.io]))
        description = {**describe(saved, form), "dtype": "int8", **_told(material, scores)}
        if for_openvino:
            openvino_file.write_openvino(quantised, file, description)
            parts = openvino_file.parts(file), openvino_file.parts(final)
        else:
            describe_file(quantised, description)
            flush(quantised)
            parts = (quantised,), (final,)
        _report_speed(runtime, fp32, int8, form)
        for source, target in zip(*parts, strict=True):
            os.replace(source, target)
        flush(final.parent)
    size = sum(path.stat().st_size for path in parts[1])
    print(f"{final}{' and .bin' if for_openvino else ''}  ({size / 1e6:.2f} MB): {count} convolutions in INT8, "
          f"drop {mean_drop(scores):+.3f} dB")


def _judge(scores: list[Score], int8: Int8) -> None:
    drop = mean_drop(scores)
    if not drop <= int8.max_drop:
        allowed = math.ceil(drop * 100) / 100 if math.isfinite(drop) else drop
        raise RunError(f"INT8 loses {drop:.3f} dB of PSNR-Y in the mean of {len(scores)} photographs, and --max-drop "
                       f"allows {int8.max_drop:g}, so that no file is written; calibrate with photographs like yours "
                       f"(--calibrate), leave more in FP32 (--keep-last), take FP32 or --half, or allow it with "
                       f"--max-drop {allowed:g}")


def _told(material: Material, scores: list[Score]) -> dict[str, str]:
    """What the file says of its calibration and its loss."""
    int8 = material.int8
    return {"float32_last_convolutions": str(int8.keep_last),
            "calibration_images": str(int8.calibration_images), "calibration_seed": str(int8.seed),
            "calibration_photographs": str(len(material.calibrating)),
            "measured_photographs": str(len(scores)), "psnr_y_drop": f"{mean_drop(scores):.4f}",
            "max_psnr_y_drop": f"{max(score.drop for score in scores):.4f}"}


def _report_speed(runtime: str, fp32: Runtime, int8: Runtime, form: Form) -> None:
    images = np.zeros(form.shape(*TIMED), np.uint8 if form.io == "uint8" else np.float32)
    before, after = _seconds(fp32, images), _seconds(int8, images)
    verdict = f"{before / after:.1f} times as fast" if after < 0.95 * before else "not faster on this processor"
    print(f"{TIMED[2]}x{TIMED[1]} pixels by {runtime}: {before:.3f} s in FP32, {after:.3f} s in INT8: {verdict}")


def _seconds(run: Runtime, images: np.ndarray) -> float:
    """Of the fastest of three calls, after one that sets up."""
    run(images)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return min(times)


def _loaded(load: Callable[[Path], Runtime], file: Path, runtime: str) -> Runtime:
    try:
        return load(file)
    except Exception as error:  # each runtime has its own
        raise RunError(f"{runtime} cannot load the network ({told(error)})") from error


def _digest(photo: Photograph) -> bytes:
    return hashlib.sha256(repr(photo.pixels.shape).encode() + photo.pixels.numpy().tobytes()).digest()
