"""Loops that upscale a folder of PNG pictures as people write them, each a whole program, to
compare `upscale.py` with.

    python benchmarks/inference_loops.py onnx VapSR_X4.onnx FOLDER OUT    a bare ONNX Runtime loop
    python benchmarks/inference_loops.py torch VapSR_X4.pth FOLDER OUT    a plain PyTorch script
    python benchmarks/inference_loops.py tiles VapSR_X4.pth FOLDER OUT    PyTorch in tiles, as
                                                                          chaiNNer's node does it

`torch` and `tiles` take the network from this project, in NCHW as they would have it; nothing else
is ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

OVERLAP = 16
"""LR pixels that chaiNNer's tiles overlap by."""
LARGEST_TILE = 512
"""LR pixels along a side of one: its estimate for a few GB of memory."""

Run = Callable[[np.ndarray], np.ndarray]
"""Upscales RGB floats (height, width, 3) in [0, 1]."""


def by_onnx(model: str) -> Run:
    """ONNX Runtime, as its documentation has it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image.transpose(2, 0, 1)[None]})[0][0].transpose(
        1, 2, 0
    )


def by_torch(model: str) -> Run:
    """PyTorch, eager, NCHW, one picture at a time."""
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
    """`by_torch` in tiles: the picture is halved along its longer side until a piece fits; pieces
    overlap by `OVERLAP`, and what they share is cut in its middle."""
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
    """Read, upscale and write every picture, one after the other."""
    run = {"onnx": by_onnx, "torch": by_torch, "tiles": by_tiles}[way](model)
    Path(out).mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(folder).glob("*.png")):
        image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB).astype(np.float32) / 255
        large = (np.clip(run(image), 0, 1) * 255).round().astype(np.uint8)
        cv2.imwrite(str(Path(out) / file.name), cv2.cvtColor(large, cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main(*sys.argv[1:])
