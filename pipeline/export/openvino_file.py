"""Convert ONNX files to OpenVINO's pair of files, .xml and .bin, with FP16 weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pipeline.cli import RunError, one_line
from pipeline.files import flush
from pipeline.libraries import openvino_core

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""By default OpenVINO computes in BF16 if the processor can: 52 dB for the released VapSR."""
SECTION = "vastscale"


def write_openvino(onnx_file: Path, xml: Path, description: Mapping[str, str]) -> None:
    """Write `xml` and the .bin beside it, with `description` under `SECTION` of its metadata.

    Raises:
        RunError: OpenVINO cannot convert the file.
    """
    import openvino

    try:
        model = openvino_core().read_model(onnx_file)
        for key, value in description.items():
            model.set_rt_info(value, [SECTION, key])
        openvino.save_model(model, xml, compress_to_fp16=True)
    except RuntimeError as error:
        raise RunError(f"OpenVINO cannot convert {str(onnx_file)!r} ({one_line(error)})") from error
    for path in parts(xml):
        flush(path)


def parts(xml: Path) -> tuple[Path, Path]:
    """Return the .bin and the .xml, in the order in which they are moved into place."""
    return xml.with_suffix(".bin"), xml


def rename(old: Path, new: Path) -> None:
    """Rename both files."""
    for source, target in zip(parts(old), parts(new), strict=True):
        os.replace(source, target)
    flush(new.parent)
