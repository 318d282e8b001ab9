"""LPIPS as a metric, and what it shares with other distances between features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.images import without_tf32
from pipeline.losses.perceptual import LpipsDistance


class PerceptualMetric:
    """A perceptual distance of two images; 0 is equal, lower is better.

    It is computed on `device` in float32. On a CPU it uses one thread, because the last digits
    depend on the number of threads.

    Args:
        title: display name, for messages.
        distance: a module from two NCHW tensors to one distance per image, with a `smallest_side`.
        device: where the distance is computed.
    """

    def __init__(self, title: str, distance: nn.Module, device: torch.device | str) -> None:
        self.title, self.device = title, torch.device(device)
        self._distance = distance.to(self.device)
        # In pixels; smaller images raise `UserError`.
        self.smallest_side: int = distance.smallest_side

    def __call__(self, sr: Tensor, hr: Tensor) -> float:
        """Return the mean over the images; see `each`."""
        distances = self.each(sr, hr)
        return sum(distances) / len(distances)

    @torch.inference_mode()
    def each(self, sr: Tensor, hr: Tensor) -> list[float]:
        """Return one distance per image, for two RGB (N, 3, H, W) tensors of the same shape.

        Each is uint8, uint16 or float in [0, 1]. Raises `ValueError` for other shapes, dtypes and
        ranges: clamp SR first, as is done for everything written to a file.
        """
        if sr.shape != hr.shape or sr.dim() != 4 or sr.shape[1] != 3:
            raise ValueError(
                f"SR {tuple(sr.shape)} and HR {tuple(hr.shape)} must be RGB (N, 3, H, W) of the "
                "same shape"
            )
        for name, images in (("SR", sr), ("HR", hr)):
            self._check_range(name, images)
        with without_tf32(), _one_thread():
            return self._distance(sr.to(self.device), hr.to(self.device)).tolist()

    def _check_range(self, name: str, images: Tensor) -> None:
        if images.dtype in (torch.uint8, torch.uint16):
            return
        if not images.is_floating_point():
            raise ValueError(
                f"{name} is {images.dtype}; {self.title} takes uint8, uint16 or floats in [0, 1]"
            )
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name} is in [{low:.4g}, {high:.4g}]; {self.title} takes floats in [0, 1], uint8 "
                "or uint16"
            )


class LpipsMetric(PerceptualMetric):
    """LPIPS 0.1 on RGB with the trunk `network` ("alex" is what papers report).

    Arguments and errors are those of `LpipsDistance`.
    """

    def __init__(
        self, network: str = "alex", weights: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__("LPIPS", LpipsDistance(network, weights), device)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
