"""The work of `convert_to_onnx.py`: convert a network, compare it, and then give it its name."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.cli import RunError, UserError
from pipeline.export import openvino_file, tensorrt_file
from pipeline.export.int8 import Int8, gather, write_int8
from pipeline.export.network_files import MAX_INPUT, OnnxNetwork, OpenVinoNetwork
from pipeline.export.onnx_file import (
    FIX_SIZE,
    INPUT,
    OPSETS,
    OUTPUT,
    Form,
    convert,
    describe,
    quiet,
)
from pipeline.export.parity import LIMITS, Check, RunBatch, checks, compare, photographs
from pipeline.files import check_utf8, flush, write_atomically
from pipeline.models.common import COLOURS
from pipeline.models.weights import SavedNetwork, read_network
from pipeline.run_folder import network_file

CPU = torch.device("cpu")
FAILED = ".failed"
"""Part of a file's name until the comparison succeeds; a file that fails keeps it."""


def run_conversion(
    input: Path | None,
    output: Path,
    io: str,
    layout: str,
    half: bool,
    opset: int,
    images: Path | None,
    openvino: bool,
    tensorrt: bool,
    shape: str = "",
    int8: Int8 | None = None,
) -> int:
    """Convert as `convert_to_onnx.py --help` describes; return the exit status.

    Raises:
        UserError: an option is wrong, or the network cannot be converted.
        RunError: a converted network fails its comparison with PyTorch.
    """
    _check(output, opset, openvino)
    size = _size_of(shape)
    if int8 is not None and half:
        raise UserError(
            "--int8 quantises the FP32 network, but --half writes an FP16 one; omit one of them"
        )
    if int8 is not None and size is not None:
        raise UserError(
            "--int8 runs the network on images of several sizes, but --shape fixes one; omit one "
            "of them"
        )
    material = None if int8 is None else gather(int8)
    photos = photographs(images)
    source = network_file(input)
    with quiet():
        saved = read_network(source)
        network = saved.build()
    print(f"{saved.name} x{saved.scale} of {source}")
    form = Form(io, layout, half, opset, size)
    forms = [form]
    if not getattr(network, "is_convolutional", True):
        # Compare in FP32 floats first: the wider limits of FP16 and uint8 would hide an attention
        # mask of the wrong size.
        forms = list(dict.fromkeys((replace(form, io="float", half=False), form)))
    failed = output.with_name(output.name + FAILED)
    for one in forms:
        batches = _write_onnx(failed, saved, network, one, photos)
    os.replace(failed, output)
    flush(output.parent)
    print(f"{output}  ({output.stat().st_size / 1e6:.2f} MB): {_described(saved, form)}")
    if openvino:
        _write_openvino(output, saved, form, batches)
    if tensorrt:
        _write_tensorrt(output, form)
    if material is not None:
        write_int8(output, saved, form, material, batches, for_openvino=openvino)
    return 0


def _write_onnx(
    path: Path, saved: SavedNetwork, network: nn.Module, form: Form, photos: list[Tensor]
) -> list[Check]:
    """Write the file and compare it with PyTorch; return the batches of the comparison."""
    with _takes_long(f"writing ONNX, opset {form.opset}, {'FP16' if form.half else 'FP32'}"):
        content = convert(saved, network, form)
    write_atomically(path, content)
    with quiet():
        batches = checks(network, form, photos)
    try:
        print(
            _compared(
                "ONNX Runtime", lambda: OnnxNetwork(path, CPU), batches, form.io, form.half, path
            )
        )
    except RunError as error:
        if form.size is not None or getattr(network, "is_convolutional", True):
            raise
        raise RunError(f"{error}; {FIX_SIZE} writes the network for one size") from error
    return batches


def _write_openvino(onnx_file: Path, saved: SavedNetwork, form: Form, batches: list[Check]) -> None:
    xml = onnx_file.with_suffix(".xml")
    failed = xml.with_name(f"{xml.stem}{FAILED}.xml")
    openvino_file.write_openvino(onnx_file, failed, describe(saved, form))
    print(
        _compared(
            "OpenVINO (FP16 weights)",
            lambda: OpenVinoNetwork(failed, CPU),
            batches,
            form.io,
            True,
            failed,
        )
    )
    openvino_file.rename(failed, xml)
    size = sum(path.stat().st_size for path in openvino_file.parts(xml))
    print(f"{xml} and .bin  ({size / 1e6:.2f} MB)")


def _write_tensorrt(onnx_file: Path, form: Form) -> None:
    engine = onnx_file.with_suffix(".engine")
    if not tensorrt_file.is_installed():
        print(
            "TensorRT is not installed here; build the engine on a machine that has it:\n"
            f"  {tensorrt_file.command(onnx_file, engine, form)}"
        )
        return
    with _takes_long("building the TensorRT engine"):
        tensorrt_file.build(onnx_file, engine, form)
    print(
        f"{engine}  ({engine.stat().st_size / 1e6:.2f} MB), for the GPU of this machine; not "
        "compared with PyTorch"
    )


def _compared(
    title: str, load: Callable[[], RunBatch], batches: list[Check], io: str, half: bool, file: Path
) -> str:
    try:
        return compare(title, load(), batches, LIMITS[io, half])
    except (UserError, RunError) as error:
        raise RunError(f"{error}; {str(file)!r} is kept for inspection: do not use it") from error


def _check(output: Path, opset: int, openvino: bool) -> None:
    if output.suffix != ".onnx":
        raise UserError(f"--output {str(output)!r} must end in .onnx; use {output.stem}.onnx")
    if opset not in OPSETS:
        raise UserError(f"--opset {opset} must be from {OPSETS[0]} to {OPSETS[-1]}")
    missing = [
        package
        for package in ("onnx", "onnxscript", "onnxruntime", *(["openvino"] if openvino else []))
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        raise UserError(
            f"the package {missing[0]!r} is not installed; run: pip install -r requirements.txt"
        )
    check_utf8(output, "ONNX Runtime")
    try:  # fail before the work, not after it
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.with_name(output.name + FAILED)
        write_atomically(probe, b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write {str(output)!r} ({error.strerror}); choose another --output"
        ) from error


def _described(saved: SavedNetwork, form: Form) -> str:
    values = (
        "bytes" if form.io == "uint8" else "float16 in [0, 1]" if form.half else "float32 in [0, 1]"
    )
    size = form.size or ("batch", "height", "width")
    shape = ", ".join(str(part) for part in form.shape(*size))
    return f"RGB {values}, ({shape}) -> x{saved.scale}; input {INPUT!r}, output {OUTPUT!r}"


def _size_of(shape: str) -> tuple[int, int, int] | None:
    """Return batch, height and width of `--shape`; `None` without it."""
    if not shape:
        return None
    found = re.fullmatch(rf"(\d{{1,6}})x{COLOURS}x(\d{{1,6}})x(\d{{1,6}})", shape)
    batch, height, width = (int(number) for number in found.groups()) if found else (0, 0, 0)
    if not 0 < batch * height * width <= MAX_INPUT:
        raise UserError(
            f"--shape {shape!r} must be BATCHx{COLOURS}xHEIGHTxWIDTH in LR pixels, at most "
            f"{MAX_INPUT >> 20} Mi in total, such as 1x{COLOURS}x256x256"
        )
    return batch, height, width


@contextmanager
def _takes_long(what: str) -> Iterator[None]:
    print(f"{what} ...", end="", flush=True)
    start = time.monotonic()
    try:
        yield
        print(f" {time.monotonic() - start:.0f} s")
    except BaseException:
        print(flush=True)
        raise
