"""Measure how fast a network upscales in PyTorch, ONNX Runtime and OpenVINO.

The ways take turns, and are compared as ratios within one run: calls on one image in one
process, or, with `--folder`, whole commands on a folder of pictures, including `upscale.py`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import tyro

from benchmarks.inference_folder import (
    COMMANDS,
    FolderRow,
    folder_table,
    measure_folder,
    measure_png,
    psnr_text,
)
from pipeline.cli import UserError, run
from tools.parallel import progress

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.models.weights import SavedNetwork

WAYS = (
    "eager",
    "channels-last",
    "compile",
    "bf16",
    "fp16",
    "onnx",
    "onnx-fp16",
    "onnx-int8",
    "openvino",
    "openvino-bf16",
    "openvino-int8",
)
CALIBRATION_IMAGES = 16
LARGEST_SIDE = 8192

Call = Callable[[], "np.ndarray | torch.Tensor"]
"""Upscales the photograph: RGB floats N x 3 x H x W."""


@dataclass(frozen=True)
class Options:
    """Measure which way upscales an image fastest.

    Every round runs every way once; medians are reported, and ratios to eager PyTorch. PSNR is
    measured on a photograph against PyTorch's FP32 result, to reveal a way that is fast but wrong.

    Example: python benchmarks/inference.py --model VapSR_X4.pth --threads 2

    python benchmarks/inference.py --model VapSR_X4.pth --threads 2 --rounds 3 --folder LR
    """

    model: Path | None = None
    """Weights file or run folder. Default: an untrained VapSR x4 of the published size, whose speed
    is the same."""
    size: Annotated[str, tyro.conf.arg(metavar="HxW")] = "180x320"
    """Height and width of the LR image."""
    threads: int = 1
    """CPU threads for every way."""
    rounds: int = 5
    """Number of rounds, in which each way is measured once; medians are reported."""
    ways: Annotated[tuple[str, ...], tyro.conf.arg(metavar="WAY ...")] = ()
    """Some of eager, channels-last, compile, bf16, fp16 (all PyTorch), onnx, onnx-fp16, onnx-int8,
    openvino, openvino-bf16, openvino-int8; --files may be added. Default: all that run on the
    device."""
    files: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Network files (.onnx for ONNX Runtime, .xml for OpenVINO) of the same network, float NCHW."""
    device: str = "auto"
    """cpu, cuda, cuda:1...; auto uses the GPU if there is one."""
    folder: Path | None = None
    """Folder of PNG pictures: run whole commands on it, on the CPU, and measure time, CPU time and
    memory of their processes. The ways are then bare-onnx (a bare ONNX Runtime loop), plain-torch
    (a PyTorch script), tile-loop (PyTorch in tiles like chaiNNer's), and the backends of
    upscale.py: auto, torch, onnx, openvino. Ratios are to the first way."""
    png: Path | None = None
    """Folder of PNG pictures: measure only the encoding and size of PNG files, by libpng, OpenCV
    and every --png-level."""
    json: Path | None = None
    """File for the numbers."""


@dataclass(frozen=True)
class Row:
    """The result of one way."""

    name: str
    milliseconds: float
    """Time per image, median of the rounds."""
    least: float
    greatest: float
    megapixels: float
    """Output megapixels per second."""
    ratio: float
    """Speed relative to the first way, median of the rounds."""
    psnr: float | None
    """PSNR against PyTorch in FP32, in dB; `None` if the images are equal."""


def main(options: Options) -> int:
    """Build, check, measure and print."""
    height, width = _check_options(options)
    if options.png is not None:
        print(measure_png(options.png, options.rounds))
        return 0
    if options.folder is not None:
        return _measure_folder(options, options.folder)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # the backends read it
    import torch

    from pipeline.evaluation.models import choose_model
    from pipeline.export.onnx_file import quiet
    from pipeline.inference.devices import choose_device

    torch.set_num_threads(options.threads)
    device = torch.device(str(choose_device(options.device)))
    saved = choose_model(options.model).saved if options.model else _published_vapsr()
    photo = _photograph(height, width)
    with tempfile.TemporaryDirectory() as scratch, quiet(), torch.inference_mode():
        calls = _calls(options, saved, photo, device, Path(scratch))
        psnrs = _check(calls, saved.build(), photo)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        with progress(options.rounds * len(calls), "measurement") as bar:
            for _ in range(options.rounds):
                for name, call in calls.items():
                    seconds[name].append(_seconds(call, device))
                    bar.update()
    pixels = height * width * saved.scale**2
    rows = [
        _row(name, times, next(iter(seconds.values())), pixels, psnrs[name])
        for name, times in seconds.items()
    ]
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {options.threads} threads"
    )
    title = (
        f"{saved.name} x{saved.scale}, LR {width}x{height}, {where}; medians of "
        f"{options.rounds} rounds"
    )
    print(_table(title, rows))
    _write_json(options, title, rows)
    return 0


def _check_options(options: Options) -> tuple[int, int]:
    """Return height and width; raise `UserError` for options that cannot be measured."""
    if min(options.threads, options.rounds) < 1:
        raise UserError("--threads and --rounds must be at least 1")
    sides = options.size.split("x")
    if len(sides) != 2 or not all(
        side.isdecimal() and 1 <= int(side) <= LARGEST_SIDE for side in sides
    ):
        raise UserError(
            f"--size {options.size} must be HxW, such as 180x320, with sides from 1 to "
            f"{LARGEST_SIDE}"
        )
    known = COMMANDS if options.folder is not None else WAYS
    for way in options.ways:
        if way not in known:
            raise UserError(f"--ways: unknown {way!r}; choose from {', '.join(known)}")
    for file in options.files:
        if file.suffix not in (".onnx", ".xml") or not file.is_file():
            raise UserError(f"{str(file)!r} of --files must be an existing .onnx or .xml file")
    return int(sides[0]), int(sides[1])


def _measure_folder(options: Options, folder: Path) -> int:
    """Measure whole commands, as described for `--folder`."""
    from pipeline.evaluation.models import choose_model
    from pipeline.export.onnx_file import Form, convert, quiet
    from pipeline.models.weights import write_network

    saved = choose_model(options.model).saved if options.model else _published_vapsr()
    with tempfile.TemporaryDirectory() as scratch:
        model, onnx_file = Path(scratch, "network.safetensors"), Path(scratch, "network.onnx")
        write_network(model, saved)
        with quiet():
            onnx_file.write_bytes(convert(saved, saved.build(), Form()))
        rows = measure_folder(
            folder, model, onnx_file, options.ways or COMMANDS, options.rounds, options.threads
        )
    title = (
        f"{saved.name} x{saved.scale}, {len(list(folder.glob('*.png')))} pictures of {folder}, "
        f"whole processes, CPU, {options.threads} threads; medians of {options.rounds} rounds"
    )
    print(folder_table(title, rows))
    _write_json(options, title, rows)
    return 0


def _write_json(options: Options, title: str, rows: Sequence[Row | FolderRow]) -> None:
    if options.json:
        options.json.write_text(
            json.dumps({"title": title, "rows": [asdict(row) for row in rows]}, indent=2) + "\n",
            encoding="utf-8",
        )


def _published_vapsr() -> SavedNetwork:
    import torch

    from pipeline.models import build_generator
    from pipeline.models.weights import SavedNetwork

    torch.manual_seed(0)
    return SavedNetwork("vapsr", 4, {}, build_generator("vapsr", 4).state_dict())


def _photograph(height: int, width: int) -> torch.Tensor:
    """Return the middle of a photograph from scikit-image as float 1 x 3 x height x width."""
    import torch

    from pipeline.export.parity import middle, photographs
    from pipeline.images import unit_range

    return unit_range(middle(photographs(None)[0], height, width), torch.float32)


def _calls(
    options: Options, saved: SavedNetwork, photo: torch.Tensor, device: torch.device, folder: Path
) -> dict[str, Call]:
    """Return the functions to measure, by name, ready to run."""
    on_gpu = device.type == "cuda"
    wanted = options.ways or tuple(
        way for way in WAYS if not on_gpu or not way.startswith("openvino")
    )
    calls = {name: call for name, call in _by_torch(saved, photo, device).items() if name in wanted}
    calls |= _by_runtimes(
        [way for way in wanted if way.startswith(("onnx", "openvino"))],
        saved,
        photo,
        device,
        folder,
    )
    for file in options.files:
        name, number = file.name, 2
        while name in calls:
            name, number = f"{file.name} ({number})", number + 1
        calls[name] = _loaded(file, photo, device, by_openvino=file.suffix == ".xml")
    return calls


def _by_torch(saved: SavedNetwork, photo: torch.Tensor, device: torch.device) -> dict[str, Call]:
    import torch

    def call(
        network: nn.Module, memory_format: torch.memory_format, dtype: torch.dtype = torch.float32
    ) -> Call:
        network = network.to(device, dtype, memory_format=memory_format).eval()
        images = photo.to(device, dtype, memory_format=memory_format)
        return lambda: network(images)

    compiled = saved.build().to(device, memory_format=torch.channels_last).eval()
    images = photo.to(device, memory_format=torch.channels_last)
    fast = torch.compile(compiled)
    return {
        "eager": call(saved.build(), torch.contiguous_format),
        "channels-last": call(saved.build(), torch.channels_last),
        "compile": lambda: fast(images),
        "bf16": call(saved.build(), torch.channels_last, torch.bfloat16),
        "fp16": call(saved.build(), torch.channels_last, torch.float16),
    }


def _by_runtimes(
    ways: list[str], saved: SavedNetwork, photo: torch.Tensor, device: torch.device, folder: Path
) -> dict[str, Call]:
    """Export and load files; INT8 is calibrated as by default in `convert_to_onnx.py --int8`."""
    from pipeline.export.int8 import Int8, as_input, calibration_images, gather, quantize
    from pipeline.export.onnx_file import Form, convert

    if not ways:
        return {}
    fp32 = folder / "fp32.onnx"
    fp32.write_bytes(convert(saved, saved.build(), Form()))
    files = {"onnx": fp32, "openvino": fp32, "openvino-bf16": fp32}
    if "onnx-fp16" in ways:
        files["onnx-fp16"] = folder / "fp16.onnx"
        files["onnx-fp16"].write_bytes(convert(saved, saved.build(), Form(half=True)))
    images = (
        []
        if not any("int8" in way for way in ways)
        else [
            as_input(crop, Form())
            for crop in calibration_images(
                gather(Int8()).calibrating, saved.scale, CALIBRATION_IMAGES, 0
            )
        ]
    )
    for way in ("onnx-int8", "openvino-int8"):
        if way in ways:
            files[way] = folder / f"{way}.onnx"
            quantize(fp32, files[way], images, Int8.keep_last, has_int8_outputs=way == "onnx-int8")
    return {
        way: _loaded(
            files[way],
            photo.half() if way.endswith("fp16") else photo,
            device,
            by_openvino=way.startswith("openvino"),
            hint="bf16" if way.endswith("bf16") else "f32",
        )
        for way in ways
    }


def _loaded(
    file: Path, photo: torch.Tensor, device: torch.device, *, by_openvino: bool, hint: str = "f32"
) -> Call:
    from pipeline.export.network_files import OnnxNetwork, OpenVinoNetwork

    network = (
        OpenVinoNetwork(file, device, {"INFERENCE_PRECISION_HINT": hint})
        if by_openvino
        else OnnxNetwork(file, device)
    )
    images = photo.numpy()
    return lambda: network(images)


def _check(
    calls: dict[str, Call], network: nn.Module, photo: torch.Tensor
) -> dict[str, float | None]:
    """Run every way once, which also warms it up.

    Returns each image's PSNR against PyTorch's in FP32 on the CPU; `None` if they are equal.
    """
    import torch

    expected, psnrs = network(photo).double(), {}
    with progress(len(calls), "way") as bar:
        for name, call in calls.items():
            bar.set_description(f"setting up {name}")
            found = torch.as_tensor(call()).cpu().double()
            if found.shape != expected.shape:
                raise UserError(
                    f"{name} gives {tuple(found.shape)}, but the model gives "
                    f"{tuple(expected.shape)}; give --files of this --model"
                )
            error = float(torch.square(found - expected).mean())
            psnrs[name] = None if error == 0 else -10 * float(np.log10(error))
            bar.update()
    return psnrs


def _seconds(call: Call, device: torch.device) -> float:
    import torch

    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _row(name: str, times: list[float], base: list[float], pixels: int, psnr: float | None) -> Row:
    median = statistics.median(times)
    ratio = statistics.median(other / own for own, other in zip(times, base, strict=True))
    return Row(
        name, 1e3 * median, 1e3 * min(times), 1e3 * max(times), pixels / median / 1e6, ratio, psnr
    )


def _table(title: str, rows: list[Row]) -> str:
    width = max(len(row.name) for row in rows) + 2
    lines = [
        title,
        f"{'':{width}}{'ms':>9}{'least':>9}{'greatest':>10}{'MPix/s':>9}{'ratio':>8}{'PSNR':>10}",
    ]
    for row in rows:
        lines.append(
            f"{row.name:{width}}{row.milliseconds:9.1f}{row.least:9.1f}{row.greatest:10.1f}"
            f"{row.megapixels:9.3f}{row.ratio:8.2f}{psnr_text(row.psnr):>10}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(Options, main)
