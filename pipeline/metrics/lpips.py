"""LPIPS as a metric: perceptual distance of two images; 0 is equal, lower is better."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.images import without_tf32
from pipeline.losses.perceptual import LpipsDistance


class LpipsMetric:
    """LPIPS 0.1 on RGB with the trunk `network` ("alex" is what papers report).

    Arguments and errors are those of `LpipsDistance`. It is computed on `device` in float32. On a
    CPU it uses one thread, because the last digits depend on the number of threads.
    """

    def __init__(
        self, network: str = "alex", weights: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self._distance = LpipsDistance(network, weights).to(self.device)
        # In pixels; smaller images raise `UserError`.
        self.smallest_side = self._distance.smallest_side

    def __call__(self, sr: Tensor, hr: Tensor) -> float:
        """Return the mean over the images; see `each`."""
        distances = self.each(sr, hr)
        return sum(distances) / len(distances)

    @torch.inference_mode()
    def each(self, sr: Tensor, hr: Tensor) -> list[float]:
        """Return one distance per image, for two RGB (N, 3, H, W) tensors of the same shape.

        Each is uint8 0..255 or float in [0, 1]. Raises `ValueError` for other shapes, dtypes and
        ranges: clamp SR first, as is done for everything written to a file.
        """
        if sr.shape != hr.shape or sr.dim() != 4 or sr.shape[1] != 3:
            raise ValueError(
                f"SR {tuple(sr.shape)} and HR {tuple(hr.shape)} must be RGB (N, 3, H, W) of the "
                "same shape"
            )
        _check_range("SR", sr)
        _check_range("HR", hr)
        with without_tf32(), _one_thread():
            return self._distance(sr.to(self.device), hr.to(self.device)).tolist()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_range(title: str, images: Tensor) -> None:
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"{title} is {images.dtype}; LPIPS takes uint8 0..255 or floats in [0, 1]")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{title} is in [{low:.4g}, {high:.4g}]; LPIPS takes floats in [0, 1] or uint8 0..255"
        )
