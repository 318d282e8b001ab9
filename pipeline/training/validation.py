"""Validation during training: mean scores that are equal for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.cli import UserError
from pipeline.config.recipe import BestSpec, Recipe
from pipeline.data.dataset import Image
from pipeline.data.decoding import BadFileError, HostDecoder
from pipeline.data.image_files import is_npy, load_npy
from pipeline.data.image_pixels import in_depth
from pipeline.data.reader import low_resolution
from pipeline.distributed.ranks import Ranks
from pipeline.images import (
    border_of,
    cubic_resize,
    depth_of,
    to_pixels,
    to_tensor,
    unit_range,
    without_tf32,
)
from pipeline.metrics import METRICS, Measure, Metric, load_measures, means, measure, metric_of

KEPT_BYTES = 1 << 29  # of images kept in memory per rank; the rest is read again each time


class ValidationPair(NamedTuple):
    """A validation image: tensors (1, 3, height, width) in host memory, both uint8 or uint16."""

    name: str
    hr: Tensor
    lr: Tensor


def validation_measures(recipe: Recipe, device: torch.device | str = "cpu") -> list[Measure]:
    """Load the measures of `Recipe.measured`.

    Raises `UserError` if a trunk's weights are missing or do not fit.
    """
    measures = []
    for name, trunk in recipe.measured().items():
        try:
            measures += load_measures([METRICS[name]], trunk and {name: trunk}, device)
        except UserError as error:
            raise UserError(f"metric_weights.{name}: {error}") from error
    return measures


def is_better(new: Mapping[str, float], best: Mapping[str, float] | None, spec: BestSpec) -> bool:
    """Whether the scores `new` beat the `best` so far, by the recipe's rule."""
    if best is None:
        return True
    psnr_y = METRICS["psnr_y"]
    is_measured = all(name in scores for name in spec.metrics for scores in (new, best))
    floor = -math.inf if spec.psnr_floor is None else spec.psnr_floor
    is_above, was_above = (scores["psnr_y"] >= floor for scores in (new, best))
    if is_above != was_above:
        return is_above
    if is_measured and is_above and spec.weights:
        return weighted_score(new, spec) > weighted_score(best, spec)
    # If both are below the floor, prefer the nearer one.
    metric = metric_of(spec.metric) if is_measured and is_above else psnr_y
    return metric.is_better(new[metric.name], best[metric.name])


def weighted_score(
    scores: Mapping[str, float], spec: BestSpec, reference: Mapping[str, float] | None = None
) -> float:
    """Return the sum over `best.weights` of weight times value, or times the gain over `reference`.

    Both order steps in the same way.
    """
    return sum(
        weight * (scores[name] - (reference[name] if reference else 0.0))
        for name, weight in zip(spec.metrics, spec.weights.values(), strict=True)
    )


class ValidationSet:
    """This rank's share of the validation images: every `world_size`-th, uncropped.

    LR is made or read as in training. Raises `UserError` naming a file that cannot be read or is
    too small.
    """

    def __init__(
        self,
        images: Sequence[Image],
        recipe: Recipe,
        ranks: Ranks,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        limit = recipe.validation_images
        numbers = (
            range(len(images))
            if len(images) <= limit
            else [i * len(images) // limit for i in range(limit)]
        )
        self.count, self.recipe, self.border = len(numbers), recipe, border_of(recipe.scale)
        self.ranks, self.memory_format = ranks, memory_format
        self._images = [
            (number, images[number]) for number in numbers[ranks.rank :: ranks.world_size]
        ]
        self._measures = validation_measures(recipe, ranks.device)
        self._kept: dict[int, ValidationPair] = {}
        room = KEPT_BYTES
        # Read all of them now, so that a bad file fails the run at its start and not hours later.
        for place in range(len(self._images)):
            pair = self.pair(place)
            room -= pair.hr.nbytes + pair.lr.nbytes
            if room > 0:
                self._kept[place] = pair

    def __len__(self) -> int:
        """Number of images in this rank's share."""
        return len(self._images)

    def pair(self, place: int) -> ValidationPair:
        """Return the image at index `place` of this rank's share."""
        number, image = self._images[place]
        return self._kept.get(place) or self._checked_pair(image, number)

    def _checked_pair(self, image: Image, number: int) -> ValidationPair:
        pair = read_pair(image, number, self.recipe)
        height, width = pair.hr.shape[-2:]
        for metric, _, smallest in self._measures:
            if min(height, width) < smallest + 2 * self.border:
                option, way_out = self._asked_by(metric)
                raise UserError(
                    f"{image.path}: {height}x{width} is too small for {option}, which needs "
                    f"{smallest} pixels inside borders of {self.border}; remove it from the "
                    f"validation list, or {way_out}"
                )
        return pair

    def _asked_by(self, metric: Metric) -> tuple[str, str]:
        """Return which of the recipe's keys asks for a metric, and how to do without it."""
        recipe = self.recipe
        if metric.name in recipe.best.metrics:
            key = "best.weights" if recipe.best.weights else "best.metric"
            return f"{key}: {metric.key}", f"choose another {key}"
        if metric.key in recipe.validation_metrics:
            return (
                f"validation_metrics: {metric.key}",
                f"remove {metric.key} from validation_metrics",
            )
        return f"validation_lpips: {recipe.validation_lpips}", "set validation_lpips=off"

    def measure(
        self, network: nn.Module, go_on: Callable[[int, int], bool] = lambda done, share: True
    ) -> dict[str, float] | None:
        """Return the mean scores of `network` over all ranks' images, by metric.

        Borders (`images.border_of`) are cut off. `go_on(images done, share)` is called before each
        image of this rank's share; if it returns False on any rank, the result is None. All ranks
        call it together.
        """
        return self._mean_scores(lambda pair: self.upscale(network, pair), go_on)

    @property
    def reference(self) -> str:
        """What networks are compared with: bicubic, or at x1 the input."""
        return "bicubic" if self.recipe.scale > 1 else "input"

    def measure_reference(
        self, go_on: Callable[[int, int], bool] = lambda done, share: True
    ) -> dict[str, float] | None:
        """Return the mean scores of the `reference`, as `measure` does those of a network."""
        return self._mean_scores(lambda pair: enlarged_input(pair, self.ranks.device), go_on)

    def is_reference(self, known: Mapping[str, Any]) -> bool:
        """Whether `known`, what `Progress.reference` holds, is of these images and metrics."""
        names = {measure.metric.name for measure in self._measures}
        return known.get("images") == self.count and known["scores"].keys() == names

    @torch.inference_mode()
    def _mean_scores(
        self, upscale: Callable[[ValidationPair], Tensor], go_on: Callable[[int, int], bool]
    ) -> dict[str, float] | None:
        scores: list[dict[str, float]] | None = []
        for place in range(len(self)):
            if not go_on(place, len(self)):
                scores = None
                break
            pair = self.pair(place)
            scores.append(self.score(upscale(pair), pair))
        shares = self.ranks.gather(scores)
        if any(share is None for share in shares):
            return None
        # Sum in the order of the list, so that rounding does not depend on the number of ranks.
        return means([shares[i % len(shares)][i // len(shares)] for i in range(self.count)])

    def score(self, sr: Tensor, pair: ValidationPair) -> dict[str, float]:
        """Return the scores of one image, infinite ones limited so that the mean stays finite."""
        scores = measure(sr, pair.hr.to(sr.device), self.border, self._measures)
        return {name: METRICS[name].limited(value) for name, value in scores.items()}

    @torch.inference_mode()
    def upscale(self, network: nn.Module, pair: ValidationPair) -> Tensor:
        """Return the network's output for a pair: pixels of its type, on the device."""
        lr = pair.lr.to(self.ranks.device).contiguous(memory_format=self.memory_format)
        with without_tf32():
            return to_pixels(network(lr), depth_of(pair.hr)).contiguous()


def enlarged_input(pair: ValidationPair, device: torch.device | str = "cpu") -> Tensor:
    """Upscale a pair's LR bicubically to the size of HR: pixels of its type, on `device`.

    At x1, it is LR.
    """
    size = (pair.hr.shape[-2], pair.hr.shape[-1])
    lr = unit_range(pair.lr.to(device), torch.float32)
    return to_pixels(cubic_resize(lr, size), depth_of(pair.hr))


def read_pair(image: Image, number: int, recipe: Recipe, way_out: str = "") -> ValidationPair:
    """Read HR and LR of an image, or make its LR.

    `number`, its index in the list, seeds what is random in the LR. Raises `UserError` naming a
    file that cannot be read or is too small; `way_out` replaces the advice.
    """
    depth = recipe.data.bits
    pixels, scale = _read(image.path, depth), recipe.scale
    height, width = (side - side % scale for side in pixels.shape[:2])
    if min(height, width) < 16 * scale:
        way_out = way_out or (
            "run `python tools/check_training_data.py --clean`, then select the training files "
            "again"
        )
        raise UserError(
            f"{image.path}: {pixels.shape[0]}x{pixels.shape[1]} is too small to validate at scale "
            f"{scale}; {way_out}"
        )
    pixels = np.ascontiguousarray(pixels[:height, :width])
    if image.lr_path is None:
        degradation = recipe.data.degradation.of_folder(image.folder)
        lr = low_resolution(pixels, degradation, scale, seed=recipe.seed, number=number)
    else:
        lr = _read(image.lr_path, depth)
        if lr.shape[:2] != (height // scale, width // scale):
            raise UserError(
                f"{image.lr_path}: {lr.shape[0]}x{lr.shape[1]} is not 1/{scale} of "
                f"{height}x{width}, the size of {image.path}; make the pairs again with "
                "`python tools/pairs_to_data.py`"
            )
    return ValidationPair(image.name, to_tensor(pixels), to_tensor(lr))


def _read(path: str, depth: int) -> np.ndarray:
    """Read pixels of `depth` bits, (height, width, 3), with the decoder that training uses."""
    if is_npy(path):
        return in_depth(load_npy(path), depth)
    decoder = HostDecoder(threads=1, batch=1, depth=depth)
    try:
        (image,) = decoder.decode([path])
    finally:
        decoder.close()
    if isinstance(image, BadFileError):
        raise image
    return image
