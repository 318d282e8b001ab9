"""Run networks over pairs of images and measure them against bicubic and nearest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.cli import UserError, bar_options
from pipeline.evaluation.image_sets import Pair
from pipeline.images import cubic_resize, to_bytes, unit_range
from pipeline.metrics.lpips import LpipsMetric
from pipeline.metrics.psnr_ssim import mean_of, measure

# Run a network over one image: whole, in tiles where it does not fit, or as the mean over the eight symmetries.


# LR pixels that are upscaled in one piece; larger images go in tiles. VapSR then peaks at about 1.5 GB.
WHOLE_IMAGE_PIXELS = 1024 * 1024


@torch.inference_mode()
def upscale(network: nn.Module, lr: Tensor, scale: int, device: torch.device | str,
            self_ensemble: bool = False) -> Tensor:
    """uint8 RGB 1 x 3 x H x W -> uint8 RGB 1 x 3 x scale*H x scale*W on the CPU, whatever the size.

    Above `WHOLE_IMAGE_PIXELS`, and where memory runs out, in tiles that see as much of their surroundings as the
    network ever looks at, so that the result is the same as in one piece. With `self_ensemble` it is the mean of the
    network's outputs for the image turned and mirrored in all eight ways, rounded once. `UserError` where not even the
    smallest tile fits.
    """
    pixels = WHOLE_IMAGE_PIXELS
    while True:
        sr = _upscale_within(network, lr, scale, device, self_ensemble, pixels)
        if sr is not None:
            return sr
        pixels = min(pixels, lr.shape[-2] * lr.shape[-1]) // 4
        if pixels < 9 * network.receptive_radius**2:  # such a tile would be no smaller than the last one
            raise UserError(f"no memory on {device} for an image of {lr.shape[-1]}x{lr.shape[-2]} LR pixels, in tiles "
                            "either; try --device cpu or end other programs")
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()


def symmetries(images: Tensor) -> Iterator[tuple[Tensor, tuple[bool, int]]]:
    """The image turned and mirrored in all eight ways, each with what `undo` wants; the first is the image itself."""
    for mirrored in (False, True):
        for turns in range(4):
            yield torch.rot90(images.flip(-1) if mirrored else images, turns, (-2, -1)), (mirrored, turns)


def undo(images: Tensor, symmetry: tuple[bool, int]) -> Tensor:
    """Turn and mirror an image back."""
    mirrored, turns = symmetry
    images = torch.rot90(images, -turns, (-2, -1))
    return images.flip(-1) if mirrored else images


def _upscale_within(network: nn.Module, lr: Tensor, scale: int, device: torch.device | str, self_ensemble: bool,
                    pixels: int) -> Tensor | None:
    """`upscale` in pieces of about `pixels` LR pixels at the most; None where memory runs out."""
    try:
        if lr.shape[-2] * lr.shape[-1] <= pixels:
            return _upscale_piece(network, lr, device, self_ensemble)
        return _upscale_tiles(network, lr, scale, device, self_ensemble, pixels)
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and the CPU's allocator has none of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
    return None


def _upscale_tiles(network: nn.Module, lr: Tensor, scale: int, device: torch.device | str, self_ensemble: bool,
                   pixels: int) -> Tensor:
    height, width = lr.shape[-2:]
    halo = network.receptive_radius
    tile = max(halo, int(pixels**0.5) - 2 * halo)
    sr = torch.empty((1, 3, height * scale, width * scale), dtype=torch.uint8)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            first_row, first_column = max(0, top - halo), max(0, left - halo)
            piece = _upscale_piece(network, lr[..., first_row : bottom + halo, first_column : right + halo], device,
                                   self_ensemble)
            sr[..., top * scale : bottom * scale, left * scale : right * scale] = piece[
                ..., (top - first_row) * scale : (bottom - first_row) * scale,
                (left - first_column) * scale : (right - first_column) * scale]
    return sr


def _upscale_piece(network: nn.Module, lr: Tensor, device: torch.device | str, self_ensemble: bool = False) -> Tensor:
    # TF32 would cost the digits that papers report; benchmark mode searches anew for every image size.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        lr = lr.to(device)
        if not self_ensemble:
            return to_bytes(network(lr.contiguous(memory_format=torch.channels_last))).cpu()
        outputs = (undo(network(turned.contiguous(memory_format=torch.channels_last)).float(), symmetry)
                   for turned, symmetry in symmetries(lr))
        return to_bytes(sum(outputs) / 8).cpu()


DRIFTS = ("drift_red", "drift_green", "drift_blue")
BASELINES = ("nearest", "bicubic")


@dataclass(frozen=True)
class MethodScores:
    """What was measured on one image, by method: `BASELINES`, then the networks by their titles."""

    name: str
    methods: dict[str, dict[str, float]]
    """Each with `METRICS`, the drift of each colour, and LPIPS where it was asked for."""


@dataclass(frozen=True)
class Views:
    """One image as measured: uint8 RGB 1 x 3 x H x W on the CPU, all of one size, by method."""

    scores: MethodScores
    hr: Tensor
    pixels: dict[str, Tensor]


@dataclass(frozen=True)
class ImageScore:
    """What was measured on one image, for one network and for bicubic: `METRICS`, the drift of each colour, LPIPS."""

    name: str
    model: dict[str, float]
    bicubic: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """The scores of all images, and their means."""

    scale: int
    images: list[ImageScore]

    @property
    def model(self) -> dict[str, float]:
        """The network's mean of every metric."""
        return means([image.model for image in self.images])

    @property
    def bicubic(self) -> dict[str, float]:
        """Bicubic's mean of every metric."""
        return means([image.bicubic for image in self.images])

    @property
    def gain(self) -> float:
        """The network's mean PSNR-Y less bicubic's, in dB."""
        return self.model["psnr_y"] - self.bicubic["psnr_y"]


def means(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every metric over images."""
    return {metric: sum(score[metric] for score in scores) / len(scores) for metric in scores[0]}


@dataclass(frozen=True)
class Compared:
    """One image as measured: uint8 RGB 1 x 3 x H x W on the CPU, all of one size."""

    score: ImageScore
    hr: Tensor
    bicubic: Tensor
    sr: Tensor


def evaluate(network: nn.Module, pairs: Sequence[Pair], scale: int, device: torch.device | str,
             lpips: LpipsMetric | None = None, visit: Callable[[Compared], None] | None = None) -> Evaluation:
    """Measure one `network` (already on `device`) and bicubic on `pairs`; see `measure_methods`."""
    def show(views: Views) -> None:
        if visit is not None:
            visit(Compared(_score_of(views.scores, "model"), views.hr, views.pixels["bicubic"], views.pixels["model"]))

    images = measure_methods({"model": network}, pairs, scale, device, lpips, show, baselines=("bicubic",))
    return Evaluation(scale, [_score_of(image, "model") for image in images])


def evaluation_of(images: Sequence[MethodScores], title: str, scale: int) -> Evaluation:
    """What was measured of one network."""
    return Evaluation(scale, [_score_of(image, title) for image in images])


def measure_methods(networks: Mapping[str, nn.Module], pairs: Sequence[Pair], scale: int, device: torch.device | str,
                    lpips: LpipsMetric | None = None, visit: Callable[[Views], None] | None = None, *,
                    baselines: Sequence[str] = BASELINES, self_ensemble: bool = False,
                    title: str = "evaluating") -> list[MethodScores]:
    """Measure `networks` (already on `device`) and `baselines` on `pairs`, in the networks' own precision.

    `visit` is shown every image once it is measured, while its pixels are in memory. The networks come back in the mode
    (training or not) that they came in. `UserError` for images that do not fit.
    """
    if not pairs:
        raise UserError("no images to evaluate on")
    images = []
    with evaluating(networks):
        for pair in tqdm(pairs, desc=title, unit="image", **bar_options()):
            views = measure_image(networks, pair, scale, device, lpips, baselines=baselines,
                                  self_ensemble=self_ensemble)
            images.append(views.scores)
            if visit is not None:
                visit(views)
    return images


@contextmanager
def evaluating(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put networks into eval mode for a while."""
    with ExitStack() as modes:
        for network in networks.values():
            modes.callback(network.train, network.training)
            network.eval()
        yield


def measure_image(networks: Mapping[str, nn.Module], pair: Pair, scale: int, device: torch.device | str,
                  lpips: LpipsMetric | None = None, *, baselines: Sequence[str] = BASELINES,
                  self_ensemble: bool = False) -> Views:
    """Measure `networks`, in eval mode and on `device`, and `baselines` on one pair; see `measure_methods`."""
    hr, lr = pair.load(scale)
    pixels = {baseline: _enlarged(lr, scale, baseline) for baseline in baselines}
    for name, network in networks.items():
        pixels[name] = upscale(network, lr, scale, device, self_ensemble)
    height, width = hr.shape[-2:]  # an LR image of a whole HR one may give some pixels more
    pixels = {name: image[..., :height, :width] for name, image in pixels.items()}
    return Views(MethodScores(pair.name, {name: _measured(image, hr, scale, lpips, pair)
                                          for name, image in pixels.items()}), hr, pixels)


def _score_of(scores: MethodScores, title: str) -> ImageScore:
    return ImageScore(scores.name, scores.methods[title], scores.methods["bicubic"])


def _enlarged(lr: Tensor, scale: int, baseline: str) -> Tensor:
    if baseline == "nearest":
        return lr.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    return to_bytes(cubic_resize(unit_range(lr, torch.float32), (lr.shape[-2] * scale, lr.shape[-1] * scale)))


def _measured(image: Tensor, hr: Tensor, scale: int, lpips: LpipsMetric | None, pair: Pair) -> dict[str, float]:
    try:
        return {**measure(image, hr, scale), **_colours(image, hr, scale, lpips)}
    except ValueError as error:
        raise UserError(f"image {str(pair.hr)!r}: {error}") from error


def _colours(sr: Tensor, hr: Tensor, border: int, lpips: LpipsMetric | None) -> dict[str, float]:
    """How much lighter SR is than HR in each colour, in levels, and LPIPS, within the borders."""
    inner = (..., slice(border, -border), slice(border, -border))
    drift = [mean_of(channel) for channel in (sr[inner].double() - hr[inner].double()).unbind(dim=1)]
    scores = dict(zip(DRIFTS, drift, strict=True))
    return scores if lpips is None else {**scores, "lpips": lpips(sr[inner], hr[inner])[0]}
