"""Typical programs that upscale a folder of PNG pictures, for comparison with `upscale.py`.

    python benchmarks/inference_loops.py onnx VapSR_X4.onnx FOLDER OUT    a bare ONNX Runtime loop
    python benchmarks/inference_loops.py torch VapSR_X4.pth FOLDER OUT    a plain PyTorch script
    python benchmarks/inference_loops.py tiles VapSR_X4.pth FOLDER OUT    PyTorch in tiles, as
                                                                          chaiNNer's node does it

`torch` and `tiles` use this project's network, in NCHW; nothing else is from this project.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

OVERLAP = 16
"""Overlap of chaiNNer's tiles, in LR pixels."""
LARGEST_TILE = 512
"""Largest side of a tile in LR pixels: chaiNNer's estimate for a few GB of memory."""

Run = Callable[[np.ndarray], np.ndarray]
"""Upscales RGB floats (height, width, 3) in [0, 1]."""


def by_onnx(model: str) -> Run:
    """Run ONNX Runtime as in its documentation."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image.transpose(2, 0, 1)[None]})[0][0].transpose(
        1, 2, 0
    )


def by_torch(model: str) -> Run:
    """Run PyTorch eagerly in NCHW, one picture at a time."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    from pipeline.models.weights import read_network

    network = read_network(model).build()

    def run(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            lr = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
            return network(lr)[0].clamp(0, 1).permute(1, 2, 0).numpy()

    return run


def by_tiles(model: str) -> Run:
    """Run `by_torch` in tiles.

    The picture is halved along its longer side until a piece fits. Pieces overlap by `OVERLAP`, and
    are joined in the middle of the overlap.
    """
    run = by_torch(model)

    def split(image: np.ndarray) -> np.ndarray:
        height, width, _ = image.shape
        if max(height, width) <= LARGEST_TILE:
            return run(image)
        if width > height:
            return split(image.transpose(1, 0, 2)).transpose(1, 0, 2)
        middle = height // 2
        upper, lower = split(image[: middle + OVERLAP]), split(image[middle - OVERLAP :])
        scale = upper.shape[1] // width
        return np.concatenate([upper[: middle * scale], lower[OVERLAP * scale :]])

    return split


def main(way: str, model: str, folder: str, out: str) -> None:
    """Read, upscale and write the pictures one after another."""
    run = {"onnx": by_onnx, "torch": by_torch, "tiles": by_tiles}[way](model)
    Path(out).mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(folder).glob("*.png")):
        image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB).astype(np.float32) / 255
        large = (np.clip(run(image), 0, 1) * 255).round().astype(np.uint8)
        cv2.imwrite(str(Path(out) / file.name), cv2.cvtColor(large, cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main(*sys.argv[1:])
