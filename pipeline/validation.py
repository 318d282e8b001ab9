"""PSNR of the network in training on the validation list, the same to the last bit for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.data.image_files import is_npy, npy_layout
from pipeline.data.loader import decoding_fault
from pipeline.data.reader import cubic_lr
from pipeline.engine import Ranks
from pipeline.images import cubic_resize, to_bytes, unit_range
from pipeline.metrics.psnr_ssim import luma, psnr

KEPT_BYTES = 1 << 29  # of images kept in memory a rank; what is over is read again each time
PSNR_LIMIT = 100.0  # dB; an image reproduced without any error must not make the mean infinite


class Pair(NamedTuple):
    """A validation image, bytes, (1, 3, height, width) each, in host memory."""

    name: str
    hr: Tensor
    lr: Tensor


class ValidationSet:
    """This rank's share of the validation images: every `world_size`-th, whole, with LR made as in training.

    Raises `UserError` naming a file that cannot be read or is too small.
    """

    def __init__(self, root: Path, names: list[str], scale: int, limit: int, ranks: Ranks,
                 memory_format: torch.memory_format = torch.contiguous_format) -> None:
        chosen = names if len(names) <= limit else [names[i * len(names) // limit] for i in range(limit)]
        self.count, self.root, self.scale = len(chosen), root, scale
        self.ranks, self.memory_format = ranks, memory_format
        self.names = chosen[ranks.rank::ranks.world_size]
        self._kept: dict[str, Pair] = {}
        room = KEPT_BYTES
        for name in self.names:  # all are read once, so that a bad one shows now and not in the night
            pair = _pair(root, name, scale)
            room -= pair.hr.numel() + pair.lr.numel()
            if room > 0:
                self._kept[name] = pair

    def pair(self, name: str) -> Pair:
        return self._kept.get(name) or _pair(self.root, name, self.scale)

    @torch.inference_mode()
    def psnr(self, network: nn.Module, go_on: Callable[[int, int], bool] = lambda done, share: True) -> float | None:
        """Mean PSNR-Y in dB (luma rounded, borders of `scale` pixels cut) of `network` over all ranks' images.

        Before each image of this rank's share `go_on(images done, share)` is asked; None if some rank's said no. All
        ranks call it together.
        """
        scores: list[float] | None = []
        for done, name in enumerate(self.names):
            if not go_on(done, len(self.names)):
                scores = None
                break
            pair = self.pair(name)
            scores.append(self._score(self.upscale(network, pair), pair.hr.to(self.ranks.device)))
        shares = self.ranks.gather(scores)
        if any(share is None for share in shares):
            return None
        # In the order of the list, so that rounding does not depend on how the images were shared out.
        ordered = [shares[i % len(shares)][i // len(shares)] for i in range(self.count)]
        return sum(ordered) / self.count

    def _score(self, sr: Tensor, hr: Tensor) -> float:
        inner = (..., slice(self.scale, -self.scale), slice(self.scale, -self.scale))
        return min(psnr(luma(sr[inner], rounded=True), luma(hr[inner], rounded=True)), PSNR_LIMIT)

    def bicubic(self, pair: Pair) -> Tensor:
        """A pair's LR made large by the cubic alone, as bytes."""
        size = (pair.hr.shape[-2], pair.hr.shape[-1])
        return to_bytes(cubic_resize(unit_range(pair.lr, torch.float32), size))

    @torch.inference_mode()
    def upscale(self, network: nn.Module, pair: Pair) -> Tensor:
        """The network's output for a pair, as bytes on the device."""
        lr = pair.lr.to(self.ranks.device).contiguous(memory_format=self.memory_format)
        return to_bytes(network(lr)).contiguous()


def _pair(root: Path, name: str, scale: int) -> Pair:
    path = root / name
    pixels = _read(path)
    height, width = (side - side % scale for side in pixels.shape[:2])
    if min(height, width) < 16 * scale:
        raise UserError(f"{path}: {pixels.shape[0]}x{pixels.shape[1]} is too small to validate at scale {scale}; "
                        "select anew after `python tools/check_training_data.py --clean`")
    pixels = np.ascontiguousarray(pixels[:height, :width])
    return Pair(name, _nchw(pixels), _nchw(_low_resolution(pixels, scale)))


def _nchw(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).contiguous()


def _read(path: Path) -> np.ndarray:
    """HWC bytes, by the decoder that training uses."""
    if is_npy(path):
        layout = npy_layout(path)
        return np.fromfile(path, np.uint8, offset=layout.offset).reshape(layout.height, layout.width, 3)
    fault = "no such file" if not path.is_file() else decoding_fault(str(path))
    if fault:
        raise UserError(f"{path}: {fault}; select anew after `python tools/check_training_data.py --clean`")
    from nvidia.dali import fn, types

    stream = np.fromfile(path, np.uint8)
    return _through_dali(stream, "", lambda node: fn.decoders.image(node, device="cpu", output_type=types.RGB))


def _low_resolution(pixels: np.ndarray, scale: int) -> np.ndarray:
    from nvidia.dali import fn, types

    height, width = pixels.shape[0] // scale, pixels.shape[1] // scale
    return _through_dali(pixels, "HWC", lambda node: cubic_lr(fn, types, node, height, width))


def _through_dali(array: np.ndarray, layout: str, operator: Any) -> np.ndarray:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> Any:
        return operator(fn.external_source(lambda: [array], batch=True, layout=layout))

    return np.array(graph().run()[0].at(0))
