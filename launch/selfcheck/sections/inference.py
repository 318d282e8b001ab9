"""Upscale pictures and a video: tiles against whole pictures, low memory, speed."""

from __future__ import annotations

import importlib.metadata
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.selfcheck.report import Report, run_script

if TYPE_CHECKING:
    import numpy as np

SCALE = 4
SMALL = {"num_features": 16, "num_attention_features": 16, "num_blocks": 2}
PICTURES = {"720p": (720, 1280), "4k": (2160, 3840)}
SMALL_PICTURES = {"tiny": (64, 96)}
LITTLE_MEMORY = 0.05
"""Share of the GPU's memory, which forces smaller tiles for a 4K picture."""
HALF_PSNR = 50.0
FRAMES, FRAME_SIZE = 24, (180, 320)


def run(report: Report) -> None:
    """Check VapSR x4 with random weights, which are as fast as trained ones."""
    network = _network(report)
    with report.guarded("tiles"):
        _tiles(report, network)
    if report.is_on_gpu:
        with report.guarded("half"):
            _half(report, network)
    else:
        report.skip("half", "FP16 is for GPUs")
    _rates(report, network)
    if report.is_on_gpu:
        with report.guarded("little_memory"):
            _little_memory(report, network)
    else:
        report.skip("little_memory", "no GPU")
    weights = _write(report, network)
    with report.guarded("film"):
        _video(report, weights)
    with report.guarded("onnx"):
        _onnx(report, weights)


def _network(report: Report) -> Any:
    import torch

    from pipeline.models import build_generator

    torch.manual_seed(0)
    network = build_generator("vapsr", SCALE, **(SMALL if report.is_small else {}))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return network.eval()


def _write(report: Report, network: Any) -> Path:
    from pipeline.models.weights import SavedNetwork, write_network

    file = report.scratch / "network.safetensors"
    params = SMALL if report.is_small else {}
    write_network(file, SavedNetwork("vapsr", SCALE, dict(params), network.state_dict()))
    return file


def picture(height: int, width: int) -> np.ndarray:
    """Return a uint8 RGB image (height, width, 3) with edges, texture and noise."""
    import cv2
    import numpy as np

    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3)).astype(
        np.uint8
    )
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + random.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def _upscaler(
    report: Report, network: Any, precision: str = "auto", tile: int = 0, *, compiles: bool = False
) -> Any:
    from pipeline.inference import TorchBackend, Upscaler

    return Upscaler(TorchBackend(network, report.device, precision, compiles=compiles), tile)


def _upscale(upscaler: Any, image: np.ndarray) -> np.ndarray:
    import numpy as np

    return upscaler(image[None], np.dtype(np.uint8), is_deep=False, advance=lambda pixels: None)[0]


def _tiles(report: Report, network: Any) -> None:
    import numpy as np

    image = picture(96, 128) if report.is_small else picture(360, 640)
    whole, tiled = (
        _upscale(_upscaler(report, network, "fp32", tile), image).astype(int)
        for tile in (4096, 48 if report.is_small else 128)
    )
    report.at_most(
        "tiles",
        int(np.abs(whole - tiled).max()),
        1,
        "levels",
        note="tiled against whole, FP32",
    )


def _half(report: Report, network: Any) -> None:
    image = picture(360, 640)
    half, single = (
        _upscale(_upscaler(report, network, precision), image).astype(float)
        for precision in ("fp16", "fp32")
    )
    error = float(((half - single) ** 2).mean())
    report.at_least(
        "half",
        math.inf if error == 0 else 10 * math.log10(255**2 / error),
        HALF_PSNR,
        "dB",
        note="FP16 against FP32",
    )


def _rates(report: Report, network: Any) -> None:
    """Measure output megapixels per second, from array to array in host memory."""
    from pipeline.inference.torch_backend import COMPILED_AFTER

    sizes = SMALL_PICTURES if report.is_small else PICTURES
    best = 0.0
    for way in ("fp16", "fp32", "bf16", "fp16_compiled") if report.is_on_gpu else ("fp32",):
        precision, compiled = way[:4], way.endswith("compiled")
        for name, (height, width) in sizes.items():
            # A shape is compiled only after 64 batches of it, which take too long at 4K.
            if compiled and name != "720p":
                continue
            if report.left < 5 and best:
                report.skip(f"{way}.{name}", "out of time for this section")
                continue
            with report.guarded(f"{way}.{name}"):
                upscaler = _upscaler(report, network, precision, compiles=compiled)
                rate = _rate(
                    upscaler, picture(height, width), warm_ups=COMPILED_AFTER + 2 if compiled else 1
                )
                report.number(
                    f"{way}.{name}",
                    rate,
                    "MPix/s",
                    note="output, including copies to and from the device",
                    command="python benchmarks/inference.py --model VapSR_X4.pth",
                )
                best = max(best, rate if precision == "fp16" and name == "720p" else 0.0)
    if best:
        report.number("fp16", best, "MPix/s", note="VapSR x4, 1280x720 to 5120x2880")
    else:
        report.skip("fp16", "FP16 is for GPUs" if not report.is_on_gpu else "not measured")


def _rate(upscaler: Any, image: np.ndarray, warm_ups: int) -> float:
    for _ in range(warm_ups):
        _upscale(upscaler, image)
    count, began = 0, time.perf_counter()
    while not count or time.perf_counter() - began < 1.0:
        result = _upscale(upscaler, image)
        count += 1
    return count * result.shape[0] * result.shape[1] / (time.perf_counter() - began) / 1e6


def _little_memory(report: Report, network: Any) -> None:
    """Upscale a 4K picture with a twentieth of the memory: smaller tiles must give the same."""
    import numpy as np
    import torch

    image = picture(*PICTURES["4k"])
    wanted = _upscale(_upscaler(report, network), image)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(LITTLE_MEMORY, report.device)
    try:
        found = _upscale(_upscaler(report, network), image)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, report.device)
    most = int(np.abs(found.astype(np.int16) - wanted.astype(np.int16)).max())
    report.at_most("little_memory", most, 3, "levels", note="FP16, other tile sizes")


def _video(report: Report, weights: Path) -> None:
    """Run `upscale.py` on a short video, from file to file."""
    import av

    height, width = FRAME_SIZE
    count = 4 if report.is_small else FRAMES
    film = report.scratch / "film.mp4"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        wide = picture(height, width + 4 * count)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(
                wide[:, 4 * number : 4 * number + width].copy(), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    began = time.perf_counter()
    out = report.scratch / "film-large.mp4"
    run_script(
        ["upscale.py", str(film), "-o", str(out), "--model", str(weights), "--backend", "torch"],
        seconds=max(90.0, report.left),
    )
    seconds = time.perf_counter() - began
    with av.open(str(out)) as container:
        frames = list(container.decode(video=0))
    report.fact(
        "film",
        len(frames) == count and frames[0].width == SCALE * width,
        f"{len(frames)} frames",
        note=f"{count / seconds:.2f} frames/s from {width}x{height}, including the start of the "
        "program",
    )


def _onnx(report: Report, weights: Path) -> None:
    """Run ONNX Runtime on the GPU, if its GPU build is installed."""
    if not report.is_on_gpu:
        report.skip("onnx", "no GPU")
        return
    try:
        importlib.metadata.version("onnxruntime-gpu")
    except importlib.metadata.PackageNotFoundError:
        report.skip(
            "onnx",
            "onnxruntime-gpu is not installed (uninstall onnxruntime first: they conflict)",
        )
        return
    import cv2

    cv2.imwrite(str(report.scratch / "photo.png"), picture(180, 320)[..., ::-1])
    run_script(
        [
            "upscale.py",
            str(report.scratch / "photo.png"),
            "-o",
            str(report.scratch / "onnx.png"),
            "--model",
            str(weights),
            "--backend",
            "onnx",
            "--device",
            "cuda",
        ],
        seconds=max(120.0, report.left),
    )
    report.fact("onnx", True, note="upscale.py --backend onnx --device cuda")
